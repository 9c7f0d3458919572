"""`difflex steer-eval --concepts`: edits of any model, judged by a CLIP and, over HTTP, by a VLM."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from difflex.cli import main
from difflex.effects import SteeringResults, StrengthCurve
from difflex.effects.judging import SteeringTask, judge_methods
from difflex.effects.removal import RemovalResults
from difflex.effects.steering_evaluation import SteeredConcept
from difflex.steering import EditRecord
from difflex.study import Study
from difflex.testing import RuleServer, tiny_clip, tiny_folder

CONCEPTS = """
[[concept]]
name = "red"
group = "colour"
instead = ["blue", "green"]
prompts = ["{} star", "{} ring"]
region = [0, 0, 0.5, 1]
feature = 5
"""
FLAGS = ["--trials", "3", "--pairs", "2", "--strength", "1:2:1"]
FEW = ["--trials", "1", "--pairs", "1", "--strength", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study of a tiny random FLUX, which has one dictionary, and a file of concepts."""
    root = tmp_path_factory.mktemp("concepts")
    model = tiny_folder("flux", root / "tiny-flux")
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(60)))
    words = ["harvest", str(model), "--prompts", str(root / "prompts.txt"), "--out", str(root / "study"), "--batch", "8"]
    sites = ["double.1", "double.1:text"]
    assert main([*words, "--site", *sites]) == 0
    assert main(["train", str(root / "study"), "--site", *sites, "--k", "12", "--size", "32", "--tokens", "2000"]) == 0
    (root / "concepts.toml").write_text(CONCEPTS)
    return root


def judged(root: Path) -> SteeringResults:
    return SteeringResults.load(root / "study" / "steering" / "judged" / "double.1" / "topk-32-k12.json")


def words(root: Path, *more: str, stream: str = "") -> list[str]:
    place = ["--dictionary", f"double.1{stream}", "--concepts", str(root / "concepts.toml")]
    return ["steer-eval", str(root / "study"), *place, *FLAGS, *more]


def test_a_clip_judges_the_named_feature_and_the_baselines(root: Path, capsys: pytest.CaptureFixture[str]):
    clip = str(tiny_clip(root / "clip"))
    assert main(words(root, "--clip", clip, "--offline")) == 0
    output, results = capsys.readouterr().out, judged(root)
    assert "red by feature 5, 1 of 1" in output and "gain" in output
    assert [curve.method for curve in results.curves] == ["feature", "contrast", "random", "prompt"]
    assert all(curve.trials == 3 and (curve.concept, curve.group) == ("red", "colour") for curve in results.curves)
    assert results.provenance.judge == clip and results.provenance.files["concepts"]


def test_a_strip_that_has_changed_or_a_clip_with_other_weights_is_judged_again(root: Path, capsys: pytest.CaptureFixture[str]):
    clip = tiny_clip(root / "other-clip")
    flags = [*words(root)[: -len(FLAGS)], *FEW, "--clip", str(clip), "--offline"]
    assert main(flags) == 0 and main(flags) == 0
    assert "as before" in capsys.readouterr().out
    folder = root / "study" / "steering" / "judged" / "double.1"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    strip = next(path for path in before if path.suffix == ".webp")
    strip.write_bytes(before[strip][:-9])
    assert main(flags) == 0
    assert "as before" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    tiny_clip(clip, seed=1)
    assert main(flags) == 0
    assert "as before" not in capsys.readouterr().out


def test_edits_are_planned_and_optimised_on_prompts_of_their_own_and_replayed(root: Path, tmp_path: Path):
    flags = [
        "--clip",
        str(tiny_clip(root / "clip")),
        "--offline",
        "--automatic",
        "--effect-updates",
        "2",
        "--effect-directions",
        "--tuning",
        "1",
    ]
    assert main([*words(root)[: -len(FLAGS)], *FEW, *flags]) == 0
    results = judged(root)
    assert [curve.method for curve in results.curves][4:] == ["automatic", "effect-direction"]
    automatic, turned = results.of("automatic")[0], results.of("effect-direction")[0]
    assert len(automatic.points) == len(turned.points) == 1 and turned.description == "4 strengths along 2 directions"
    folder = root / "study" / "steering" / "judged" / "double.1" / "topk-32-k12"
    record = EditRecord.load(folder / "red-automatic.json")
    assert record.shot.prompt == "blue star" and record.edits[0].strength == automatic.points[0].strength
    edits = EditRecord.load(folder / "red-effect-direction.json").edits
    assert {edit.operation for edit in edits} == {"add"} and {edit.contrast for edit in edits} == {
        "effect-red-double.1",
        "effect-red-double.1-text",
    }
    assert (root / "study" / "steering" / "contrasts" / "text-red-double.1-text.safetensors").is_file()
    assert main([*words(root)[: -len(FLAGS)], *FEW, *(flag for flag in flags if flag != "--effect-directions")]) == 0
    aware = judged(root).of("effect-aware")[0]
    assert len(aware.points) == 1 and aware.description == "4 strengths"
    for method in ("automatic", "effect-aware", "effect-direction"):
        command = ["steer", str(root / "study"), "--replay", str(folder / f"red-{method}.json")]
        assert main([*command, "--out", str(tmp_path / "out.png")]) == 0


def run_and_die(command: list[str]) -> None:
    """Run a command in a process that is killed as soon as one concept is finished."""
    save = SteeredConcept.save

    def dying(self: SteeredConcept, path: Path | str) -> Path:
        save(self, path)
        os.kill(os.getpid(), signal.SIGKILL)
        return Path(path)

    SteeredConcept.save = dying
    main(command)


def test_concepts_that_were_finished_before_a_kill_are_not_judged_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    two = tmp_path / "two.toml"
    two.write_text(CONCEPTS + CONCEPTS.replace('"red"', '"blue"').replace('"blue", "green"', '"red", "green"'))
    flags = ["--dictionary", "double.1", "--concepts", str(two), *FEW, "--clip", str(tiny_clip(root / "clip")), "--offline"]
    command = ["steer-eval", str(root / "study"), *flags]
    assert main(command) == 0
    whole, path = judged(root), root / "study" / "steering" / "judged" / "double.1" / "topk-32-k12.json"
    path.unlink()
    process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(command,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not path.exists()
    [part] = (path.with_suffix(".unfinished")).rglob("*.json")
    tasks = list[str]()

    def counted(task: SteeringTask, *rest: Any) -> Iterator[StrengthCurve]:
        tasks.append(task.concept)
        return judge_methods(task, *rest)

    monkeypatch.setattr("difflex.effects.steering_evaluation.judge_methods", counted)
    assert main(command) == 0
    assert tasks == ["blue"] and judged(root) == whole and not part.exists()


def test_text_tokens_are_steered_without_a_region(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(words(root, "--clip", str(tiny_clip(root / "clip")), "--offline", stream=":text")) == 0
    assert "red by feature 5, 1 of 1" in capsys.readouterr().out


def test_a_vlm_is_asked_once_for_each_image_in_spite_of_bad_answers(root: Path, capsys: pytest.CaptureFixture[str]):
    def rule(images, instruction: str, form: str) -> dict[str, bool]:
        assert form == "presence" and len(images) == 2 and '"red"' in instruction and '"something ' in instruction
        return {"shows": images[1].width < images[1].height, "rest": True}  # the left half is shown, too

    with RuleServer({"malformed": 0.2, "limited": 0.1}, rule=rule) as server:
        flags = ["--vlm", server.url, "--model", "rule", "--connections", "4"]
        assert main(words(root, *flags)) == 0
        output, calls = capsys.readouterr().out, len(server.served)
        before = judged(root)
        assert (
            f"{calls} calls" in output
            and len({request.request for request in server.served if request.behaviour == "good"}) <= 3 * 8
        )
        assert main(words(root, *flags)) == 0
        # Cached answers are not requested again.
        assert len(server.served) == calls and judged(root) == before
    assert all(curve.without == 1 and point.success == 1 for curve in before.curves for point in curve.points)


REMOVAL = ["--images", "2", "--selection-images", "1", "--tuning-images", "1", "--features", "1", "--strength", "0"]


def test_a_concept_of_any_world_is_removed_by_its_feature_as_a_clip_judges(root: Path, capsys: pytest.CaptureFixture[str]):
    command = ["removal", str(root / "study"), "--dictionary", "double.1", "--concepts", str(root / "concepts.toml"), *REMOVAL]
    clip = ["--clip", str(tiny_clip(root / "clip")), "--offline"]
    assert main([*command, *clip]) == 0 and main([*command, *clip]) == 0
    output = capsys.readouterr().out
    assert "of 1 concepts reach 90/90" in output and "as before" in output
    [path] = Study.open(root / "study").removals()
    results = RemovalResults.load(path)
    [removed] = results.concepts
    assert (removed.concept, removed.group, removed.images) == ("red", "colour", 2)
    assert results.provenance.judge == clip[1] and set(results.provenance.files) == {"concepts", "judge"}
    assert (path.with_suffix("") / "red.webp").is_file()
    assert main([*command]) == 2 and "name one of --clip and --vlm" in capsys.readouterr().err
    both = ["removal", str(root / "study"), "--dictionary", "double.1,double.1:text", *command[4:]]
    assert main([*both, *clip]) == 2 and "features, which are of one dictionary" in capsys.readouterr().err


def test_a_vlm_judges_what_a_removal_removed_and_kept(root: Path, capsys: pytest.CaptureFixture[str]):
    def rule(images, instruction: str, form: str) -> dict[str, bool]:
        return {"shows": any(name in instruction for name in ('"red"', '"blue"', '"green"')), "rest": "something" in instruction}

    with RuleServer(rule=rule) as server:
        flags = ["--concepts", str(root / "concepts.toml"), "--vlm", server.url, "--model", "rule", *REMOVAL]
        assert main(["removal", str(root / "study"), "--dictionary", "double.1", *flags]) == 0
    [removed] = RemovalResults.load(Study.open(root / "study").removals()[0]).concepts
    # It always says yes: the concept is still there, and so is all else.
    assert (removed.shown, *removed.rates) == (1.0, 0.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name one of --clip and --vlm"),
        (["--clip", "a", "--vlm", "b"], "name one of --clip and --vlm"),
        (["--clip", "nowhere", "--offline"], "cannot be opened as a CLIP"),
        (["--vlm", "http://127.0.0.1:9/v1"], "--model NAME"),
        (["--vlm", "http://127.0.0.1:9/v1", "--model", "m", "--effect-updates", "1"], "has no gradients"),
    ],
)
def test_judges_that_cannot_be_used_are_explained(root: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str):
    assert main(words(root, *flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_drawn_world_takes_no_other_judge(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["steer-eval", str(root / "study"), "--clip", "a"]) == 2
    assert "has its own judge" in capsys.readouterr().err


def test_a_concept_without_a_feature_needs_difflex_concepts(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "concepts.toml").write_text(CONCEPTS.replace("feature = 5", ""))
    command = ["steer-eval", str(root / "study"), "--concepts", str(tmp_path / "concepts.toml"), "--clip", "a"]
    assert main(command) == 2
    assert "Run difflex concepts" in capsys.readouterr().err
