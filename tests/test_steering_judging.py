"""Judging edits: curves of success, specificity and quality, the drawn world, and the steer-eval command."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import difflex
from difflex.cli import main
from difflex.dictionaries import Dictionary
from difflex.effects import ImageStrip, Provenance, SteeringConfig, SteeringResults
from difflex.effects.drawn_world import DrawnJudge, caption_pairs, caption_task, group_of
from difflex.effects.judging import (
    JudgedGenerator,
    JudgeVerdict,
    SteeringMethod,
    SteeringTask,
    SteeringTrial,
    batch_hooks,
    judge_methods,
)
from difflex.errors import BrokenFile
from difflex.miniature import draw, load_judge
from difflex.miniature.captions import parse_caption
from difflex.miniature.world import HELD_OUT_SEEDS, SceneMix
from difflex.records import HookContext, Shot, Site
from difflex.steering import SteeringHook
from difflex.steering.contrast import pair_activations

TRIALS = tuple(SteeringTrial(f"image {number}", number, None) for number in range(4))
TASK = SteeringTask(concept="red", group="colour", trials=TRIALS)


def adding(strength: float) -> SteeringHook:
    return SteeringHook(Site("double.1"), lambda x, moment: x + strength)


def fake(spoils: float) -> JudgedGenerator:
    """Images of one number, the strength: red from 1 on, with a wrong background from `spoils` on; the loss grows with it."""

    def images(trials: Sequence[SteeringTrial], hooks: Sequence[SteeringHook]) -> Tensor:
        plain = torch.zeros(len(trials), 1, 1)
        shots = tuple(Shot(model="m", prompt=t.prompt, seed=t.seed, pixels=(8, 8), steps=1, guidance=0.0) for t in trials)
        edited = None if not hooks else hooks[0].change(plain, HookContext(0, 1.0, None, shots, None))
        return (plain if edited is None else edited).view(-1, 1, 1, 1)

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], pixels: Tensor) -> list[JudgeVerdict]:
        return [JudgeVerdict(float(x) >= 1, {"background": float(x) < spoils, "shape": False}, 0.5) for x in pixels.flatten()]

    return JudgedGenerator(images, verdicts, lambda pixels: 1 + pixels.flatten())


def test_a_curve_measures_success_specificity_and_quality():
    [curve] = judge_methods(
        TASK, {"add": SteeringMethod("it", lambda trial, p: (trial, [adding(p)]), (0.2, 1.0, 2.0))}, fake(spoils=2.0)
    )
    assert (curve.without, curve.trials, curve.description) == (0.0, 4, "it")
    assert [point.success for point in curve.points] == [0.0, 1.0, 1.0]
    # The shape is never right, so it cannot be lost.
    assert [point.specificity for point in curve.points] == [1.0, 1.0, 0.0]
    assert [round(point.quality, 3) for point in curve.points] == [1.2, 2.0, 3.0]
    assert curve.breaks == 1.0


def test_the_best_strength_keeps_all_else_and_breaks_no_image():
    [curve] = judge_methods(
        TASK, {"add": SteeringMethod("it", lambda trial, p: (trial, [adding(p)]), (0.2, 0.4))}, fake(spoils=0.3)
    )
    best = curve.best()
    assert best is not None and best.strength == 0.2 and curve.gain() == 0.0
    [spoilt] = judge_methods(TASK, {"add": SteeringMethod("it", lambda trial, p: (trial, [adding(p)]), (2.0,))}, fake(spoils=0.3))
    assert spoilt.best() is None and spoilt.gain() == 0.0


def test_each_image_of_a_batch_gets_its_own_hook():
    other = SteeringHook(Site("single.0"), lambda x, moment: x - 1)
    first, second = batch_hooks(TRIALS[:3], [[adding(1.0)], [], [adding(5.0), other]])
    assert (str(first.site), str(second.site)) == ("double.1", "single.0")
    shots = tuple(Shot(model="m", prompt=t.prompt, seed=t.seed, pixels=(8, 8), steps=1, guidance=0.0) for t in TRIALS[:3])
    changed = [hook.change(torch.zeros(3, 2, 2), HookContext(0, 1.0, None, shots, None)) for hook in (first, second)]
    assert [x is not None and x[:, 0, 0].tolist() for x in changed] == [[1.0, 0.0, 5.0], [0.0, 0.0, -1.0]]
    assert batch_hooks(TRIALS[:2], [[], []]) == []


def test_steering_results_are_loaded_as_saved_and_a_damaged_file_is_refused(tmp_path: Path):
    curves = tuple(
        judge_methods(TASK, {"add": SteeringMethod("it", lambda trial, p: (trial, [adding(p)]), (1.0,))}, fake(spoils=2.0))
    )
    config = SteeringConfig(groups=("colour",), trials=4, edit_steps=(0, 3))
    provenance = Provenance(fingerprints={"double.1/d": "f"}, features={"double.1/d": {"red": 1}}, judge="clip")
    strip = ImageStrip(
        method="add", concept="red", group="colour", prompt="a star", strengths=(1.0,), file="colour-add.webp", sha256="0"
    )
    judged = SteeringResults(model="m", site="double.1", curves=curves, config=config, provenance=provenance, strips=(strip,))
    path = judged.save(tmp_path / "judged.json")
    assert SteeringResults.load(path) == judged
    path.write_text("{}")
    with pytest.raises(BrokenFile):
        SteeringResults.load(path)


@pytest.mark.parametrize("concept", ["cyan", "striped", "night", "star", "cartoon"])
def test_trials_name_another_concept_of_the_group_and_say_where_the_object_is(concept: str):
    task = caption_task(concept, 20)
    assert len(task.trials) == 20 and len({trial.seed for trial in task.trials}) == 20
    for trial in task.trials:
        words = [word for word in trial.prompt.split() if group_of(word) == task.group]
        assert words and concept not in words
        assert (trial.region is None) == (task.group in ("background", "style"))


def test_pairs_differ_only_in_the_concept():
    for positive, negative in caption_pairs("cyan", 10):
        one, other = parse_caption(positive), parse_caption(negative)
        assert one.objects[0].colour == "cyan" != other.objects[0].colour
        assert one.objects[0].shape == other.objects[0].shape and one.background == other.background


def test_the_judge_recognises_drawn_concepts_in_their_region_and_not_elsewhere():
    scenes = draw(torch.arange(400) + HELD_OUT_SEEDS + 7_000_000, SceneMix(1, 0, 0))
    judge = DrawnJudge(load_judge())
    task = caption_task("cyan", 1)
    placed = [i for i, caption in enumerate(scenes.captions) if (item := parse_caption(caption).objects[0]).row and item.column][
        :60
    ]
    trials = [SteeringTrial(scenes.captions[i], i, None) for i in placed]
    truth = [int(scenes.specs.colour[i, 0]) == 4 for i in placed]
    shows = [verdict.shows for verdict in judge(task, trials, scenes.images[placed])]
    assert sum(a == b for a, b in zip(truth, shows, strict=True)) >= 58 and any(truth)
    everywhere = {trial.region for trial in caption_task("cyan", 60).trials}
    corner = next(region for region in everywhere if region is not None and region.left == 0 and region.top == 0)
    for i, verdict in zip(placed, judge(task, [t._replace(region=corner) for t in trials], scenes.images[placed]), strict=True):
        far = int(scenes.specs.row[i, 0]) == 2 or int(scenes.specs.column[i, 0]) == 2
        assert not (far and verdict.shows)


@pytest.mark.parametrize("trials", [1, 3])
def test_fewer_trials_are_the_first_of_more_trials(trials: int):
    for concept in ("small", "cyan", "night"):
        assert caption_task(concept, trials).trials == caption_task(concept, 5).trials[:trials]


def test_contrasts_use_seeds_that_no_trial_has():
    pipe = difflex.load("mini-flux")
    shots = list(pipe.shots("", keep_steps=range(1)))
    sides = pair_activations(lambda shots: pipe.harvest(shots, "double.1"), shots, [("a red star", "a blue star")] * 2)
    positive, negative = ({shot.seed for batch in side for shot in batch.shots} for side in sides)
    assert positive == negative and len(positive) == 2
    assert not positive & {trial.seed for trial in caption_task("red", 50).trials}


def _tiles(path: Path) -> list[bytes]:
    """The images of a strip."""
    with Image.open(path) as file:
        return [file.crop((x, 0, x + 64, 64)).convert("RGB").tobytes() for x in range(0, file.width, 64)]


def _has_all_curves(results: SteeringResults) -> bool:
    """Whether every concept has a curve for each method but the neuron: three at two strengths, and the prompt."""
    curves = [curve for curve in results.curves if curve.method != "neuron"]
    concepts = len(results.of("feature"))
    return concepts > 0 and sum(len(curve.points) for curve in curves) == concepts * (3 * 2 + 1)


def test_steer_eval_judges_features_and_all_baselines_and_reuses_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = str(tmp_path / "study")
    words = [
        "harvest",
        "mini-flux",
        "--prompts",
        "captions",
        "--site",
        "double.1",
        "double.1:neurons",
        "--tokens",
        "8000",
        "--steps",
        "4",
        "--out",
    ]
    assert main([*words, study]) == 0
    assert main(["train", study, "--site", "double.1", "--k", "8", "--size", "256", "--tokens", "8000"]) == 0
    assert main(["neurons", study, "--site", "double.1:neurons", "--k", "8"]) == 0
    assert main(["steer-eval", study, "--dictionary", "double.1"]) == 2
    assert "Run difflex concepts" in capsys.readouterr().err
    assert main(["concepts", study, "--site", "double.1", "--images", "120", "--noise", "0.25"]) == 0
    neurons = tmp_path / "study" / "concepts" / "double.1+neurons" / "neurons-k8.json"
    assert neurons.is_file(), "the neurons of the block get a file of their own"
    capsys.readouterr()
    flags = [
        "--groups",
        "size",
        "--min-ap",
        "0.01",
        "--trials",
        "2",
        "--pairs",
        "2",
        "--strength",
        "1:2:1",
        "--edit-steps",
        "0:3",
    ]
    assert main(["steer-eval", study, "--dictionary", "double.1", *flags]) == 0
    output = capsys.readouterr().out
    judged = SteeringResults.load(tmp_path / "study" / "steering" / "judged" / "double.1" / "topk-256-k8.json")
    assert _has_all_curves(judged)
    assert {curve.method for curve in judged.curves} == {"feature", "contrast", "random", "neuron", "prompt"}
    assert all(len(curve.points) == (1 if curve.method == "prompt" else 2) for curve in judged.curves)
    steered = {curve.description.rpartition(" ")[2] for curve in judged.of("feature")}
    assert {curve.description for curve in judged.of("random")} == {f"seed {feature}" for feature in steered}
    assert "neuron" in output and "gain" in output and "as before" not in output
    images = tmp_path / "study" / "steering" / "judged" / "double.1" / "topk-256-k8"
    assert {strip.method: len(strip.strengths) for strip in judged.strips} == {
        curve.method: len(curve.points) for curve in judged.curves[:5]
    }
    assert {path.name for path in images.iterdir()} == {strip.file for strip in judged.strips}
    unedited = {strip.method: _tiles(images / strip.file)[0] for strip in judged.strips}
    assert len(set(unedited.values())) == 1 and len({*_tiles(images / "size-prompt.webp")}) == 2
    # The same command again reuses the results.
    path = tmp_path / "study" / "steering" / "judged" / "double.1" / "topk-256-k8.json"
    written = path.stat().st_mtime_ns
    assert main(["steer-eval", study, "--dictionary", "double.1", *flags]) == 0
    assert "as before" in capsys.readouterr().out and path.stat().st_mtime_ns == written
    # Neurons that were matched as dictionaries of their own are found, too.
    neurons.rename(neurons.with_name("neurons-768-k8.json"))
    few = ["--groups", "size", "--min-ap", "0.01", "--trials", "2", "--pairs", "1", "--strength", "1"]
    assert main(["steer-eval", study, "--dictionary", "double.1", *few]) == 0
    judged = SteeringResults.load(tmp_path / "study" / "steering" / "judged" / "double.1" / "topk-256-k8.json")
    assert judged.of("neuron")
    # A missing strip is made again.
    (images / "size-prompt.webp").unlink()
    assert main(["steer-eval", study, "--dictionary", "double.1", *few]) == 0
    assert "as before" not in capsys.readouterr().out and (images / "size-prompt.webp").is_file()
    # Matches of other weights are refused.
    changed = Dictionary.load(tmp_path / "study" / "dictionaries" / "double.1" / "topk-256-k8")
    changed.bias.add_(1.0)  # pyright: ignore[reportAttributeAccessIssue]
    changed.save(tmp_path / "study" / "dictionaries" / "double.1" / "topk-256-k8")
    assert main(["steer-eval", study, "--dictionary", "double.1", *few]) == 2
    assert "has changed since" in capsys.readouterr().err
