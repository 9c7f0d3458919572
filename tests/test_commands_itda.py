"""`difflex itda`: from a study's activations to dictionaries in the same study."""

from pathlib import Path

import pytest
import torch

from difflex.cli import main
from difflex.dictionaries import ITDA, Dictionary
from difflex.records import Site
from difflex.store import Store
from difflex.study import Study
from difflex.testing import tiny_folder

SITE = Site("double.1")


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("itda")
    model = tiny_folder("flux", folder / "tiny-flux")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"star {i} over {i * 7 % 13}" for i in range(60)) + "\n")
    words = ["harvest", str(model), "--prompts", str(prompts), "--site", str(SITE), "--out", str(folder / "study")]
    assert main([*words, "--pixels", "16x24", "--steps", "2"]) == 0
    return folder / "study"


@pytest.fixture
def study(harvested: Path, tmp_path: Path) -> Path:
    """A study with activations and no dictionary."""
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "activations").symlink_to(harvested / "activations")
    (tmp_path / "study" / "study.json").write_bytes((harvested / "study.json").read_bytes())
    return tmp_path / "study"


def dictionaries(study: Path) -> list[ITDA]:
    loaded = [Dictionary.load(path.parent) for path in sorted((study / "dictionaries").glob("*/itda-*/dictionary.safetensors"))]
    return [itda for itda in loaded if isinstance(itda, ITDA)]


def test_every_threshold_grows_a_dictionary_with_its_label(study: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["itda", str(study), "--site", str(SITE), "--k", "4", "--threshold", "0.2", "0.4"]) == 0
    output = capsys.readouterr().out
    large, small = sorted(dictionaries(study), key=lambda itda: -itda.size)
    assert large.size > small.size
    for itda in (large, small):
        folder = Study.open(study).dictionary(SITE, itda.label)
        assert folder.is_dir() and f"{folder}: {itda.size:,} atoms" in output
    assert not list((study / "dictionaries").glob("*/growing-*"))


def test_an_atom_is_the_token_that_its_patch_names(study: Path):
    assert main(["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "40"]) == 0
    [itda] = dictionaries(study)
    assert itda.size <= 40
    store = Store.open(study / "activations" / SITE.folder)
    [rows] = store.batches(10**6)
    patch = itda.patch(11)
    assert patch is not None and patch.shot == store.shot(patch.number)
    [row] = ((rows.shots == patch.number) & (rows.tokens == patch.token)).nonzero()[:, 0].tolist()
    z = itda.normalisation.apply(rows.values[row : row + 1])[0]
    torch.testing.assert_close(itda.atoms[11], z / z.norm(), atol=1e-5, rtol=0)


def test_a_repeated_command_grows_nothing_twice(study: Path, capsys: pytest.CaptureFixture[str]):
    words = ["itda", str(study), "--site", str(SITE), "--k", "4", "--threshold", "0.3"]
    assert main(words) == 0
    [before] = sorted((study / "dictionaries").glob("*/*/dictionary.safetensors"))
    stamp = before.stat().st_mtime_ns
    capsys.readouterr()
    assert main(words) == 0
    assert "exists already" in capsys.readouterr().out
    assert before.stat().st_mtime_ns == stamp


def test_paper_sets_the_settings_of_the_paper_and_other_flags_override_them(study: Path):
    words = ["itda", str(study), "--site", str(SITE), "--preset", "paper"]
    assert main([*words, "--size", "50"]) == 0
    assert main([*words, "--k", "4", "--threshold", "0.3", "--pursuit", "matching"]) == 0
    mine, plain = sorted(dictionaries(study), key=lambda itda: itda.k)
    assert (plain.k, plain.pursuit, plain.normalisation.method) == (64, "gradient", "standardise")
    assert plain.origin.training["threshold"] == 0.6
    assert (plain.encode(torch.randn(9, plain.width)).values >= 0).all()
    assert (mine.k, mine.pursuit, mine.origin.training["threshold"]) == (4, "matching", 0.3)


def test_variants_of_one_size_have_different_labels(study: Path):
    words = ["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "16", "--threshold", "0.1"]
    assert main([*words, "0.2", "0.3"]) == 0
    for more in (["--normalisation", "whiten"], ["--pursuit", "gradient"], ["--seed", "1"], ["--tokens", "300"]):
        assert main([*words, *more]) == 0
    assert main([*words[:-2]]) == 0
    grown = dictionaries(study)
    assert len(grown) == 8
    assert {itda.size for itda in grown if "over" in itda.label} == {16}
    assert {path.name for path in (study / "dictionaries" / "double.1").iterdir()} == {itda.label for itda in grown}


def test_a_taken_label_loses_no_growth(study: Path, capsys: pytest.CaptureFixture[str]):
    words = ["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "16", "--threshold", "0.1", "0.2"]
    old = study / "dictionaries" / "double.1" / "itda-16-k4-over0.1"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{")
    assert main(words) == 2
    assert "Move the old one away" in capsys.readouterr().err
    assert [itda.label for itda in dictionaries(study)] == ["itda-16-k4-over0.2"]
    [grown] = old.parent.glob("growing-*/dictionary.safetensors")
    stamp = grown.stat().st_mtime_ns
    old.rename(study / "old")
    assert main(words) == 0
    assert (old / grown.name).stat().st_mtime_ns == stamp
    assert {path.name for path in old.parent.iterdir()} == {"itda-16-k4-over0.1", "itda-16-k4-over0.2"}


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--site", "double.1"], "--threshold 0.3"),
        (["--site", "double.0", "--size", "10"], "The site 'double.0' is unknown; nearest: double.1"),
        (["--site", "double.1", "--threshold", "3"], "Threshold 3.0 is not a share"),
        (["--site", "double.1", "--size", "0"], "--size 0 grows nothing"),
        (["--site", "double.1", "--threshold", "0.3", "--tokens", "0"], "--tokens 0 grows nothing"),
        (["--site", "double.1", "--size", "40", "--tokens", "-5"], "--tokens -5 grows nothing"),
        (["--site", "double.1", "--threshold", "0.3", "--k", "0"], "k is 0"),
    ],
)
def test_impossible_requests_are_explained(study: Path, flags: list, answer: str, capsys):
    assert main(["itda", str(study), *flags]) == 2
    assert answer in capsys.readouterr().err
