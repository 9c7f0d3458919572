"""What the verbs that judge edits share: what a model draws of trials and says of images, and what the judge sees in them."""

from collections.abc import Sequence

from difflex.effects import JudgedGenerator, SteeringTrial
from difflex.effects.trials import DrawnJudge, as_images, as_tensor
from difflex.miniature import load_judge
from difflex.pipeline import Pipeline
from difflex.steering import SteeringHook

__all__ = ["drawn_by"]

LEVELS = (0.3, 0.6, 0.9)
"""Of noise, at which finished images are foretold."""
BATCH = 32


def drawn_by(pipe: Pipeline, steps: int | None = None) -> JudgedGenerator:
    """What the model draws in so many steps (its own, if None) and says, and what the judge sees."""

    def images(trials: Sequence[SteeringTrial], steering: SteeringHook | None):
        prompts, seeds = [trial.prompt for trial in trials], [trial.seed for trial in trials]
        assert seeds == list(range(seeds[0], seeds[0] + len(seeds))), "the seeds of a task's trials follow one another"
        edits = [steering] if steering else []
        return as_tensor(each.image for each in pipe.generate(prompts, seed=seeds[0], steps=steps, batch=BATCH, edits=edits))

    return JudgedGenerator(images, DrawnJudge(load_judge()), lambda drawn: pipe.losses(as_images(drawn), LEVELS).mean(1))
