"""`difflex train`: from a harvested study to dictionaries in it."""

import json
from pathlib import Path

import pytest

from difflex.cli import main
from difflex.dictionaries import SAE, Dictionary
from difflex.testing import tiny_folder

PLACE = Path("dictionaries") / "double.1+update"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with the update of one block, 1,000 rows of width 32."""
    root = tmp_path_factory.mktemp("train")
    model = tiny_folder("flux", root / "tiny-flux")
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(60)))
    words = ["harvest", str(model), "--prompts", str(root / "prompts.txt"), "--out", str(root / "study"), "--pixels", "16x24"]
    assert main([*words, "--site", "double.1:update", "--batch", "8"]) == 0
    return root / "study"


def train(study: Path, *flags: str) -> int:
    words = ["train", str(study), "--site", "double.1:update", "--k", "3,4", "--size", "64", "--batch", "64", "--tokens", "2000"]
    return main([*words, *flags])


def test_every_size_is_trained_with_every_k(study: Path, capsys: pytest.CaptureFixture[str]):
    assert train(study, "--size", "64,96") == 0
    output = capsys.readouterr().out
    for label in ("topk-64-k3", "topk-64-k4", "topk-96-k3", "topk-96-k4"):
        dictionary = Dictionary.load(study / PLACE / label)
        assert dictionary.name == f"double.1:update/{label}" and label in output
    assert train(study, "--size", "64,96") == 0  # trained already: the same output again
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "matryoshka"])
@pytest.mark.parametrize("preset", ["default", "paper", "paper-auxk", "unbox"])
def test_every_preset_and_kind_has_its_own_label(study: Path, preset: str, kind: str):
    assert (
        train(study, "--preset", preset, "--kind", kind, "--learning-rate", "0.001", "--seed", "5", "--normalisation", "whiten")
        == 0
    )
    label = f"{kind}-64-k3{'' if preset == 'default' else f'-{preset}'}-whiten-lr0.001-seed5"
    config = json.loads((study / PLACE / label / "config.json").read_text())["training"]["config"]
    assert (
        config["initialisation"]["seed"] == 5
        and config["optimiser"]["learning_rate"] == 0.001
        and config["normalisation"] == "whiten"
    )
    made = Dictionary.load(study / PLACE / label)
    assert isinstance(made, SAE) and made.label == label


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--site", "double.7"], "The site 'double.7' is unknown"),
        (["--tokens", "0"], "learns nothing"),
        (["--tokens", "-5"], "learns nothing"),
        (["--learning-rate", "-1"], "learning rate"),
        (["--learning-rate", "nan"], "learning rate"),
        (["--k", "65"], "k 65 does not fit"),
    ],
)
def test_impossible_requests_are_explained(study: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str):
    assert train(study, *flags) == 2
    assert words in capsys.readouterr().err


def test_a_list_of_numbers_may_have_commas_or_spaces(study: Path):
    with pytest.raises(SystemExit):
        train(study, "--k", "3,x")
    assert train(study, "--k", "3", "4", "--seed", "9", "--size", "72") == 0
    assert (study / PLACE / "topk-72-k4-seed9" / "config.json").exists()
