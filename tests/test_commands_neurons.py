"""`difflex neurons`: the neurons of a block as a dictionary of a study."""

import pytest

from difflex.cli import main
from difflex.commands.neurons import NeuronsCommand
from difflex.errors import StaleWork
from difflex.evaluation import Evaluation
from difflex.study import Study
from difflex.testing import tiny_folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("neurons")
    model = tiny_folder("flux", root / "tiny-flux")
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(60)))
    words = ["harvest", str(model), "--prompts", str(root / "prompts.txt"), "--out", str(root / "study"), "--pixels", "16x24"]
    assert main([*words, "--site", "double.1:neurons", "double.1", "--batch", "8"]) == 0
    return Study.open(root / "study")


def test_neurons_are_a_dictionary_like_any_other(study: Study, capsys: pytest.CaptureFixture[str]):
    assert main(["neurons", str(study.folder), "--site", "double.1:neurons", "--k", "8,128"]) == 0
    assert "128 neurons, 8 per token" in capsys.readouterr().out
    assert [str(place) for place in study.dictionaries()] == [
        "double.1:neurons/neurons-128-k8",
        "double.1:neurons/neurons-128-k128",
    ]
    assert main(["evaluate", str(study.folder), "--effect-shots", "0"]) == 0
    few, all_of_them = (Evaluation.load(study.evaluation(*place)) for place in study.dictionaries())
    assert few.overall.l0 <= 8 and (few.overall.model_space.fvu or 0) > 0
    assert all_of_them.overall.model_space.fvu == 0


def test_a_repeated_command_keeps_the_dictionary(study: Study):
    command = NeuronsCommand(study=study.folder, site=("double.1:neurons",), k=(4,))
    (folder,) = command()
    before = (folder / "config.json").stat().st_mtime_ns
    assert command() == [folder] and (folder / "config.json").stat().st_mtime_ns == before


def test_neurons_of_another_model_are_an_error(study: Study):
    command = NeuronsCommand(study=study.folder, site=("double.1:neurons",), k=(5,))
    (folder,) = command()
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("tiny-flux", "other-flux"))
    with pytest.raises(StaleWork, match="of another model") as raised:
        command()
    assert raised.value.path == folder


@pytest.mark.parametrize(
    ("site", "words"), [("double.0:neurons", "Harvest it first"), ("double.1", "has no neurons"), ("", "at least one --site")]
)
def test_sites_without_neurons_are_explained(study: Study, site: str, words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["neurons", str(study.folder), "--site", *([site] if site else [])]) == 2
    assert words in capsys.readouterr().err
