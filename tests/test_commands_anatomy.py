"""The anatomy of a model as a command of its study."""

from dataclasses import replace
from pathlib import Path

import pytest

from difflex.cli import main
from difflex.commands.anatomy import AnatomyCommand
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


def asked(model: Path, prompts: Path) -> AnatomyCommand:
    return AnatomyCommand(model=str(model), prompts=str(prompts), spectra=("double.1",), out=prompts.parent / "study")


def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every measurement."""
    times: list[int] = []
    measure = station.measure_anatomy
    monkeypatch.setattr(station, "measure_anatomy", lambda *arguments: times.append(1) or measure(*arguments))
    return times


def test_it_puts_measurements_and_labelled_figures_into_the_study(model: Path, prompts: Path):
    study = prompts.parent / "study"
    flags = ["--prompts", str(prompts), "--spectra", "double.1", "--out", str(study)]
    assert main(["anatomy", str(model), *flags]) == 0
    found = Study.open(study)
    anatomy = Anatomy.load(found.anatomy)
    assert (found.model, found.anatomy) == (str(model), study / "anatomy.json")
    assert len(anatomy.norms) == 10 and [str(site) for site in anatomy.shapes] == ["double.1"]
    assert all(sorted(norms) == [500.0, 1000.0] for norms in anatomy.norms.values())
    assert sorted(path.name for path in found.anatomy_figures.iterdir()) == FIGURES


def test_it_returns_what_it_made(model: Path, prompts: Path):
    made = asked(model, prompts)()
    assert made[0].name == "anatomy.json" and [path.name for path in made[1:]] == FIGURES
    assert all(path.is_file() for path in made)


def test_what_is_up_to_date_is_not_measured_again_and_another_wish_is(
    model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    times = measured(monkeypatch)
    for wish in (asked(model, prompts), asked(model, prompts), replace(asked(model, prompts), steps=1)):
        wish()
    assert len(times) == 2
    prompts.write_text("a red star\na blue heart\n")
    replace(asked(model, prompts), steps=1)()
    assert len(times) == 3


def test_a_damaged_anatomy_is_measured_again(model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch):
    times = measured(monkeypatch)
    path, *_ = asked(model, prompts)()
    path.write_text(path.read_text()[:100])
    asked(model, prompts)()
    assert len(times) == 2 and Anatomy.load(path).norms


def test_in_a_recipe_it_is_done_once_and_again_when_a_figure_is_gone(model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch):
    times = measured(monkeypatch)
    study = Study(folder=prompts.parent / "study", model=str(model), commands=(asked(model, prompts),))
    run_study(study)
    assert [status.state for status in command_statuses(study)] == ["done"]
    study.anatomy_figures.joinpath("spectra.png").unlink()
    assert [status.state for status in command_statuses(study)] == ["to do"]
    run_study(study)
    assert [status.state for status in command_statuses(study)] == ["done"] and len(times) == 1


def test_a_study_of_another_model_is_refused(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    study = Study.begin(prompts.parent / "study", "mini-flux")
    assert main(["anatomy", str(model), "--prompts", str(prompts), "--out", str(study.folder)]) == 2
    assert "studies mini-flux, not" in capsys.readouterr().err
    assert not study.anatomy.exists()


def test_a_file_in_the_place_of_the_folder_is_refused_before_it_measures(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(station, "measure_anatomy", lambda *_: pytest.fail("it measured"))
    (tmp_path / "out").write_text("")
    assert main(["anatomy", str(model), "--prompts", "captions", "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
