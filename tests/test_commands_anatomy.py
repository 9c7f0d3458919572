"""`difflex anatomy` on a tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest

from difflex.cli import main
from difflex.commands.evaluation import AnatomyCommand
from difflex.evaluation import anatomy as station
from difflex.evaluation.anatomy import Anatomy
from difflex.study import Study, command_statuses, run_study
from difflex.testing import tiny_folder

FIGURES = ["norms-image.png", "norms-text.png", "spectra.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("flux", tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    return tmp_path / "prompts.txt"


def anatomy_command(model: Path, prompts: Path) -> AnatomyCommand:
    return AnatomyCommand(model=str(model), prompts=str(prompts), spectra=("double.1",), out=prompts.parent / "study")


def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every measurement."""
    calls: list[int] = []
    measure = station.measure_anatomy
    monkeypatch.setattr(station, "measure_anatomy", lambda *arguments: calls.append(1) or measure(*arguments))
    return calls


def test_anatomy_and_figures_are_saved_in_the_study(model: Path, prompts: Path):
    study = prompts.parent / "study"
    flags = ["--prompts", str(prompts), "--spectra", "double.1", "--out", str(study)]
    assert main(["anatomy", str(model), *flags]) == 0
    opened = Study.open(study)
    anatomy = Anatomy.load(opened.anatomy)
    assert (opened.model, opened.anatomy) == (str(model), study / "anatomy.json")
    assert len(anatomy.norms) == 10 and [str(site) for site in anatomy.shapes] == ["double.1"]
    assert all(sorted(norms) == [500.0, 1000.0] for norms in anatomy.norms.values())
    assert sorted(path.name for path in opened.anatomy_figures.iterdir()) == FIGURES


def test_it_returns_the_paths_of_its_results(model: Path, prompts: Path):
    paths = anatomy_command(model, prompts)()
    assert paths[0].name == "anatomy.json" and [path.name for path in paths[1:]] == FIGURES
    assert all(path.is_file() for path in paths)


def test_the_anatomy_is_measured_again_only_with_other_flags_or_prompts(
    model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = measurements(monkeypatch)
    for command in (
        anatomy_command(model, prompts),
        anatomy_command(model, prompts),
        replace(anatomy_command(model, prompts), text_length=23),
        replace(anatomy_command(model, prompts), steps=1),
    ):
        command()
    assert len(calls) == 3
    prompts.write_text("a red star\na blue heart\n")
    replace(anatomy_command(model, prompts), steps=1)()
    assert len(calls) == 4


def test_a_damaged_anatomy_is_measured_again(model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch):
    calls = measurements(monkeypatch)
    path, *_ = anatomy_command(model, prompts)()
    path.write_text(path.read_text()[:100])
    anatomy_command(model, prompts)()
    assert len(calls) == 2 and Anatomy.load(path).norms


def test_a_recipe_draws_missing_figures_again_without_measuring(model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch):
    calls = measurements(monkeypatch)
    study = Study(folder=prompts.parent / "study", model=str(model), commands=(anatomy_command(model, prompts),))
    run_study(study)
    assert [status.state for status in command_statuses(study)] == ["done"]
    study.anatomy_figures.joinpath("spectra.png").unlink()
    assert [status.state for status in command_statuses(study)] == ["to do"]
    run_study(study)
    assert [status.state for status in command_statuses(study)] == ["done"] and len(calls) == 1


def test_a_study_of_another_model_is_refused(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    study = Study.begin(prompts.parent / "study", "mini-flux")
    assert main(["anatomy", str(model), "--prompts", str(prompts), "--out", str(study.folder)]) == 2
    assert "studies mini-flux, not" in capsys.readouterr().err
    assert not study.anatomy.exists()


def test_a_file_in_place_of_the_study_is_refused_before_measuring(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(station, "measure_anatomy", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "out").write_text("")
    assert main(["anatomy", str(model), "--prompts", "captions", "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
