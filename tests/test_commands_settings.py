"""Every command that loads the model of a study loads it as the study says, unless its flags say otherwise."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from sample_study import write_matches

import difflex
from difflex.choices import Precision
from difflex.cli import main, parse
from difflex.commands import VERBS, verb_class
from difflex.commands.flags import StudyImagesCommand, StudyModelCommand
from difflex.commands.inputs import open_study
from difflex.pipeline.engine import Engine
from difflex.steering import EditRecord
from difflex.study import Study, StudySettings
from difflex.testing import tiny_folder

PLACE = "double.1/topk-32-k2"
WORDS = {
    "train": ["--live", "--site", "double.1", "--prompts", "captions", "--tokens", "100", "--k", "2", "--size", "32"],
    "evaluate": ["--effect-shots", "1"],
    "concepts": ["--images", "200", "--pixels", "64"],
    "collect": [],
    "steer": ["1", "--strength", "1"],
    "icon": ["1"],
    "contrast": ["name", "--site", "double.1", "--positive", "a", "--negative", "b"],
    "steer-eval": ["--min-ap", "0.5", "--groups", "colour"],
    "removal": ["--groups", "background"],
    "edit-bench": ["--method", "activations", "--site", "double.1"],
    "findings": ["--site", "double.1"],
}
"""What each verb needs to come as far as the model."""
JUDGED = ("steer-eval", "removal", "edit-bench", "findings")
"""The verbs whose images the judge of the drawn world reads, which are of one size."""


class ModelLoaded(BaseException):
    """Ends a command as soon as it has its model."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a tiny model at 16 x 24 pixels in 3 steps, where the model's defaults are 64 x 64 and 4."""
    root = tmp_path_factory.mktemp("settings")
    model = tiny_folder("flux", root / "flux", defaults={"pixels": [[64, 64], [16, 24]]})
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(40)))
    harvest = ["harvest", str(model), "--site", "double.1", "--prompts", str(root / "prompts.txt"), "--out", str(root / "study")]
    assert main([*harvest, "--pixels", "16x24", "--steps", "3", "--keep-steps", "0:1", "--guidance", "0.5"]) == 0
    assert main(["train", str(root / "study"), "--site", "double.1", "--k", "2", "--size", "32", "--tokens", "500"]) == 0
    write_matches(Study.open(root / "study"), PLACE, (0.9, 0.9, 0.9, 0.9))
    return root / "study"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model was loaded with."""
    arguments, load = dict[str, Any](), difflex.load

    def fake(name: str, **given: Any):
        arguments.update(given, name=name)
        return load(name)

    def end(engine: Engine, *defaults: Any):
        arguments.update(zip(("pixels", "steps", "guidance"), defaults, strict=True))
        raise ModelLoaded

    monkeypatch.setattr(difflex, "load", fake, raising=False)
    monkeypatch.setattr(Engine, "set_defaults", end)
    monkeypatch.setattr("difflex.explore.inputs.has_gpu", lambda: True)
    return arguments


def keep(study: Path, **settings: Any) -> None:
    """Write other settings into the study file."""
    Study.open(study).keep_settings(StudySettings(**settings))


def run(verb: str, study: Path, *flags: str) -> None:
    with pytest.raises(ModelLoaded):
        parse([verb, str(study), *WORDS[verb], *flags])()


def test_every_command_that_loads_the_model_of_a_study_has_the_flags_of_its_settings():
    loading = {verb for verb in VERBS if "load_study_model(" in inspect.getsource(verb_class(verb))}
    assert loading == {verb for verb in VERBS if issubclass(verb_class(verb), StudyModelCommand)} >= WORDS.keys()


@pytest.mark.parametrize("verb", WORDS)
def test_the_model_is_loaded_with_the_settings_of_the_study_and_flags_override(
    verb: str, study: Path, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    precision: Precision = "fp32" if verb in ("evaluate", "collect") else "nf4"  # these repeat stored shots, of the harvest
    pixels = (64, 64) if verb in JUDGED else (16, 24)
    harvest = {"precision": precision, "offload": True, "pixels": pixels, "steps": 3, "guidance": 0.5}
    keep(study, **harvest)
    run(verb, study)
    assert harvest.items() <= loaded.items()
    run(verb, study, "--precision", "bf16", "--no-offload", "--offline")
    assert {**harvest, "precision": "bf16", "offload": False, "offline": True}.items() <= loaded.items()
    if issubclass(verb_class(verb), StudyImagesCommand):
        capsys.readouterr()
        run(verb, study, "--pixels", "64", "--steps", "2", "--guidance", "1")
        assert {**harvest, "pixels": (64, 64), "steps": 2, "guidance": 1.0}.items() <= loaded.items()
        note = "Images are of 64x64 pixels; the study was harvested at 16x24."
        assert (note in capsys.readouterr().out) == (verb not in JUDGED)


def test_a_study_without_settings_takes_those_of_its_first_shot(study: Path, loaded: dict[str, Any]):
    keep(study)
    run("icon", study)
    assert {"precision": "fp32", "offload": False, "pixels": (16, 24), "steps": 3, "guidance": 0.5}.items() <= loaded.items()


@pytest.mark.parametrize("verb", JUDGED)
def test_images_that_the_judge_of_the_drawn_world_does_not_read_are_refused_before_the_model_is_loaded(
    verb: str, study: Path, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    keep(study, precision="fp32", pixels=(16, 24))
    assert main([verb, str(study), *WORDS[verb]]) == 2 and not loaded
    assert "reads images of 64x64 pixels, and here they are of 16x24. Give --pixels 64." in capsys.readouterr().err
    run(verb, study, "--pixels", "64")


def test_offload_and_no_offload_together_are_refused(study: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["icon", str(study), "1", "--offload", "--no-offload"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_precision_chosen_by_memory_keeps_the_model_whole_on_a_cpu(study: Path, capsys: pytest.CaptureFixture[str]):
    keep(study, precision="nf4", offload=True, pixels=(16, 24))
    command = verb_class("icon")(study=study, features=(1,), precision="auto")  # pyright: ignore[reportCallIssue]
    assert isinstance(command, StudyModelCommand)
    settings = open_study(study, command).settings
    assert (settings.precision, settings.offload, settings.pixels) == ("fp32", False, (16, 24))
    assert "Precision auto: fp32, on cpu." in capsys.readouterr().out


def test_a_harvest_that_continues_keeps_the_precision_that_was_chosen_for_it(study: Path, monkeypatch: pytest.MonkeyPatch):
    keep(study, precision="nf4", offload=True)
    chosen = list[tuple[str, bool]]()

    def load(name: str, precision: str, offload: bool, **_: object):
        chosen.append((precision, offload))
        raise ModelLoaded

    monkeypatch.setattr(difflex, "load", load, raising=False)
    for out in (study, study.parent / "new"):
        words = ["harvest", "mini-flux", "--site", "double.2", "--prompts", "captions", "--tokens", "100", "--precision", "auto"]
        with pytest.raises(ModelLoaded):
            main([*words, "--out", str(out)])
    assert chosen == [("nf4", True), ("fp32", False)]


def test_images_are_steered_at_the_size_of_the_study(study: Path, tmp_path: Path):
    keep(study, precision="fp32", pixels=(16, 24), steps=3, guidance=0.5)
    words = ["steer", str(study), "1", "--strength", "1", "--out", str(tmp_path / "x.png"), "--record"]
    assert main([*words, str(tmp_path / "own.json")]) == 0 == main([*words, str(tmp_path / "large.json"), "--pixels", "64"])
    own, large = (EditRecord.load(tmp_path / f"{name}.json").shot for name in ("own", "large"))
    assert (own.pixels, own.steps, own.guidance) == ((16, 24), 3, 0.5) and large.pixels == (64, 64)
