"""Whether features show their concepts at the default strength, and whether images survive it: colours, textures, backgrounds.

A dictionary of `double.2:smooth` of mini-flux is trained and matched to known concepts, and every feature of average precision
0.8 or more is added to images whose captions name another concept: in the region of the object, for backgrounds in the whole
image. Each image has the default strength of `difflex steer`, which is measured on it without a judge. Bars: in the median over
concepts 60 % of images show the concept, and under 5 % of all images are broken: their loss is 1.5 times that of the unedited
image or more, or of all else that captions state and the judge read correctly before, less than half is still right.

--full judges 16 images of each concept in place of 4. --study FOLDER uses a study with a matched dictionary, such as the demo,
and --site another site of it.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from difflex.commands.effects import model_functions
from difflex.commands.evaluation import ConceptsCommand
from difflex.commands.harvest import HarvestCommand
from difflex.commands.training import TrainCommand
from difflex.effects.drawn_world import caption_task, drawn_generator
from difflex.effects.judging import JudgedGenerator, SteeringMethod, batch_hooks
from difflex.features.detected import DetectedConcepts
from difflex.miniature.world import CONCEPTS
from difflex.pipeline import load
from difflex.records import Edit
from difflex.steering import StudyEditor
from difflex.steering.strengths import BROKEN, intact_strengths
from difflex.study import DictionaryRef, Study

MODEL, SITE, GROUPS, MIN_AP = "mini-flux", "double.2:smooth", ("colour", "texture", "background"), 0.8
SUCCESS, BROKEN_SHARE = 0.6, 0.05
"""The bars."""
KEPT = 0.5
"""An image is broken if less than this share of what was right in it is still right."""


class Outcome(NamedTuple):
    """The images of one concept at their default strengths."""

    concept: str
    strengths: Sequence[float]
    success: float
    broken: Sequence[bool]


def make_study(folder: Path, site: str) -> None:
    """Train a dictionary as the demo does, and match it to known concepts."""
    HarvestCommand(model=MODEL, site=(site,), prompts="captions", tokens=200_000, steps=4, out=folder)()
    TrainCommand(study=folder, site=(site,), k=(32,), size=(2048,), tokens=400_000)()
    ConceptsCommand(studies=(folder,), images=600, held_out=0.5, noise=(0.5,), no_baselines=True)()


def judge(
    editor: StudyEditor, place: DictionaryRef, concept: str, feature: int, trials: int, generator: JudgedGenerator
) -> Outcome:
    """Add a feature to images, each at its default strength, and judge them."""
    task = caption_task(concept, trials)
    unedited = generator.images(task.trials, ())
    losses, before = generator.losses(unedited), generator.verdicts(task, task.trials, unedited)
    edit = Edit(operation="add", site=place.site, dictionary=place.label, features=(feature,))
    method = SteeringMethod.adding(edit, editor.features(edit), ())

    def images(strengths: Sequence[float]) -> torch.Tensor:
        pairs = [method.apply(trial, strength) for trial, strength in zip(task.trials, strengths, strict=True)]
        return generator.images(task.trials, batch_hooks(task.trials, [hook for _, hook in pairs]))

    chosen = intact_strengths(lambda strengths: generator.losses(images(strengths)) if any(strengths) else losses, trials)
    strengths = [best.strength for best in chosen]
    edited = images(strengths)
    after, ratios = generator.verdicts(task, task.trials, edited), (generator.losses(edited) / losses).tolist()
    kept = [
        [new.right[name] for name, was_right in old.right.items() if was_right] for old, new in zip(before, after, strict=True)
    ]
    lost = [bool(answers) and sum(answers) / len(answers) < KEPT for answers in kept]
    broken = [ratio >= BROKEN or is_lost for ratio, is_lost in zip(ratios, lost, strict=True)]
    return Outcome(concept, strengths, sum(verdict.shows for verdict in after) / trials, broken)


def measure(folder: Path, site: str, trials: int) -> list[Outcome]:
    """Return the outcomes of all concepts of one dictionary, and print each."""
    study = Study.open(folder)
    places = [ref for ref in study.dictionaries() if str(ref.site) == site and ref.label.startswith("topk")]
    place = places[-1]
    detected = DetectedConcepts.read(study, place)
    assert detected is not None, "difflex concepts was not run"
    pipe = load(MODEL)
    pipe.engine.set_defaults(study.settings.pixels, study.settings.steps, study.settings.guidance)
    generator, editor = drawn_generator(model_functions(pipe)), StudyEditor(study)
    outcomes = []
    for group in GROUPS:
        for concept in CONCEPTS[group]:
            best = detected.by_concept.get(concept)
            if best is None or best.ap < MIN_AP:
                continue
            outcome = judge(editor, place, concept, best.feature, trials, generator)
            outcomes.append(outcome)
            print(
                f"  {group:<11}{concept:<11}AP {best.ap:.2f}  strength {statistics.median(outcome.strengths):4.2f}  "
                f"success {outcome.success:4.0%}  broken {sum(outcome.broken)} of {trials}",
                flush=True,
            )
    return outcomes


def main() -> int:
    """Run the benchmark; return 0 if the bars are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="judge 16 images of each concept in place of 4")
    parser.add_argument("--study", type=Path, help="a study of mini-flux with a matched dictionary of double.2:smooth")
    parser.add_argument("--site", default=SITE, help="the site of the dictionary")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.study or Path(scratch) / "study"
        if arguments.study is None:
            make_study(folder, arguments.site)
        outcomes = measure(folder, arguments.site, 16 if arguments.full else 4)
    success = statistics.median(outcome.success for outcome in outcomes)
    broken = statistics.fmean(is_broken for outcome in outcomes for is_broken in outcome.broken)
    met = success >= SUCCESS and broken < BROKEN_SHARE
    print(
        f"default strength: median success {success:.0%} (bar {SUCCESS:.0%}), broken {broken:.1%} (bar {BROKEN_SHARE:.0%}) over "
        f"{len(outcomes)} concepts: {'met' if met else 'MISSED'}"
    )
    return not met


if __name__ == "__main__":
    sys.exit(main())
