"""Commands that steer and measure: they check that they can write before a model is loaded, and give the same bytes again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
from PIL import Image

import difflex
from difflex.cli import main
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights, fingerprint
from difflex.files import folder_lock
from difflex.records import Edit, Shot, Site
from difflex.steering import EditRecord
from difflex.steering.contrast import Contrast
from difflex.steering.features import FeatureScales
from difflex.study import Study
from difflex.testing import tiny_folder

SITE, LABEL, WIDTH = Site("double.1"), "topk-24-k4", 192
CONCEPTS = '[[concept]]\nname = "red"\ninstead = ["blue"]\nprompts = ["a {} star"]\nfeature = 5\n'
PAIR = ["--positive", "a star", "--negative", "a ring"]
REMOVAL = ["--groups", "background", "--images", "1", "--selection-images", "1", "--tuning-images", "1", "--features", "1"]
FINDINGS = ["--groups", "texture", "--concepts-per-group", "1", "--trials", "1", "--pairs", "1,2", "--strength", "0.3"]


def sae(width: int, model: str, seed: int = 0) -> Dictionary:
    directions = torch.nn.functional.normalize(torch.randn(24, width, generator=torch.Generator().manual_seed(seed)), dim=1)
    weights = SAEWeights(encoder=directions, decoder=directions.clone(), bias=torch.zeros(width), encoder_bias=torch.zeros(24))
    origin = DictionaryOrigin(site=SITE, model=model)
    return SAE(kind="topk", k=4, origin=origin, normalisation=Normalisation.identity(width), weights=weights)


def with_scales(study: Study, width: int) -> Study:
    """Save a dictionary in a study, with scales, so that no activations are needed."""
    folder = sae(width, study.model).save(study.dictionary(SITE, LABEL))
    scales = FeatureScales(peaks=torch.ones(24), means=torch.ones(24), norm=1.0, ceiling=9.0, sample=torch.ones(4, width))
    scales.save(study.scales(SITE, LABEL), fingerprint(folder))
    return study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of the drawn world; the test's folder is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concepts.toml").write_text(CONCEPTS)
    (tmp_path / "prompts.txt").write_text("a star\n")
    return with_scales(Study.begin(tmp_path / "study", "mini-flux"), WIDTH)


WRITING = {
    "steering/removal": ["removal", "study", *REMOVAL],
    "steering/findings": ["findings", "study", "--site", "double.1"],
    "steering/judged": ["steer-eval", "study", "--concepts", "concepts.toml", "--clip", "clip"],
    "steering/edit-bench": ["edit-bench", "study", "--count", "1"],
    "steering/contrasts": ["contrast", "study", "red", "--site", "double.1", *PAIR],
    "concepts": ["concepts", "study", "--images", "160", "--noise", "0.25"],
    "out": ["steer", "study", "1", "--strength", "1", "--out", "study/out/steered.png"],
    "more": ["icon", "study", "1", "--out", "study/more/icon.png"],
    "anatomy.json/": ["anatomy", "mini-flux", "--prompts", "prompts.txt", "--out", "study/anatomy.json"],
}


@pytest.mark.parametrize(("place", "words"), WRITING.items(), ids=[words[0] for words in WRITING.values()])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    study: Study, place: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(difflex, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("difflex.evaluation.ClipModel.checksum", lambda *_, **__: "")
    (study.folder / place).parent.mkdir(parents=True, exist_ok=True)
    (study.folder / place).write_text("in the way")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and "a file where a folder is needed" in error
    assert (study.folder / place).read_text() == "in the way"


@pytest.mark.parametrize(
    "place", ["steering/removal/double.1", "steering/judged/double.1", "steering/edit-bench/drawn", "concepts/double.1+neurons"]
)
def test_a_second_process_is_refused_before_a_model_is_loaded(
    study: Study, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(difflex, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("difflex.evaluation.ClipModel.checksum", lambda *_, **__: "")
    with folder_lock(study.folder / place):
        assert main(WRITING[place.rpartition("/")[0]]) == 2
    assert f"Another process is writing in study/{place}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["steer", "icon"])
def test_an_output_that_is_a_folder_is_refused_before_a_model_is_loaded(
    study: Study, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(difflex, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    Path("grid.png").mkdir()
    assert main([verb, "study", "1", "--strength", "1", "--out", "grid.png"]) == 2
    assert "There is a folder where a file is needed" in capsys.readouterr().err


def test_a_dictionary_contrast_or_scale_that_is_not_finite_draws_nothing(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(difflex.Pipeline, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    monkeypatch.setattr(Contrast, "__post_init__", lambda _: None)
    fields = {"site": SITE, "model": "mini-flux", "revision": None, "method": "mean", "pairs": 1, "timesteps": (1.0,)}
    prompts = {"positive": ("a",), "negative": ("b",), "norm": 1.0, "direction": torch.full((WIDTH,), torch.nan)}
    Contrast(**fields, **prompts).save(study.contrast("red"))  # pyright: ignore[reportArgumentType]
    monkeypatch.undo()
    monkeypatch.chdir(study.folder.parent)
    monkeypatch.setattr(difflex.Pipeline, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    assert main(["steer", "study", "--contrast", "red", "--strength", "1"]) == 2
    assert "NaN" in capsys.readouterr().err
    monkeypatch.setattr(FeatureScales, "__post_init__", lambda _: None)
    scales = FeatureScales(
        peaks=torch.full((24,), torch.inf), means=torch.ones(24), norm=1.0, ceiling=9.0, sample=torch.ones(4, WIDTH)
    )
    scales.save(study.scales(SITE, LABEL), fingerprint(study.dictionary(SITE, LABEL)))
    monkeypatch.undo()
    monkeypatch.chdir(study.folder.parent)
    monkeypatch.setattr(difflex.Pipeline, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    for words in (["steer", "study", "1", "--strength", "1"], ["icon", "study", "1"]):
        assert main(words) == 2
        assert "infinity" in capsys.readouterr().err
    assert not Path("steered.png").exists() and not Path("icons.png").exists()


# In processes of their own, with a tiny model: the same command in two folders, and a command that is killed.


def run(folder: Path, words: Sequence[str], seed: int, wait: bool = True) -> subprocess.Popen:
    """Run a command in a folder, with hashes of texts by a seed."""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-c", SEVERAL, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if wait:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output.decode()
    return process


SEVERAL = """
import sys, torch
torch.set_num_threads(1)
from difflex.cli import main
from itertools import groupby
commands = [list(part) for is_end, part in groupby(sys.argv[1:], lambda word: word == "then") if not is_end]
sys.exit(max(main(words) for words in commands))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts, masks, and a study with a dictionary."""
    root = tmp_path_factory.mktemp("writing")
    tiny_folder("flux", root / "tiny", defaults={"pixels": [[16, 24]]})
    (root / "prompts.txt").write_text("a star\na ring\n")
    Image.linear_gradient("L").save(root / "mask.png")
    pipe = difflex.load(str(root / "tiny"))
    width = next(row.width for row in pipe.sites() if row.site == SITE)
    with_scales(Study.begin(root / "study", "tiny"), width)
    return root


COMMANDS = [
    *["contrast", "study", "red", "--site", "double.1", *PAIR, "then"],
    *["anatomy", "tiny", "--prompts", "prompts.txt", "--spectra", "double.1", "--out", "study", "then"],
    *["steer", "study", "1", "2", "--region", "../mask.png", "--strength", "2", "--record", "edit.json", "then"],
    *["icon", "study", "1", "--strength", "1", "then"],
    *["steer", "study", "--contrast", "red", "--strength", "1", "--out", "along.webp"],
]


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def split(words: Sequence[str]) -> list[list[str]]:
    return [list(part) for is_end, part in groupby(words, lambda word: word == "then") if not is_end]


def check_two_folders(root: Path, tmp_path: Path, run_in: Callable[[Path, Sequence[str], int], object]) -> None:
    """Run the same commands in two folders and compare all bytes; a finished anatomy given again rewrites nothing."""
    for name, seed in (("one", 1), ("two", 2)):
        shutil.copytree(root, tmp_path / name)
        shutil.copy(root / "mask.png", tmp_path)
        run_in(tmp_path / name, COMMANDS, seed)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {"edit.json", "steered.png", "icons.png", "along.webp", "study/anatomy.json"} < one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    anatomy = [*(tmp_path / "one" / "study").glob("anatomy*"), *(tmp_path / "one" / "study" / "anatomy").iterdir()]
    before = {path: path.stat().st_mtime_ns for path in anatomy}
    run_in(tmp_path / "one", split(COMMANDS)[1], 3)
    assert {path: path.stat().st_mtime_ns for path in anatomy} == before


def test_the_same_commands_in_two_folders_give_the_same_bytes_and_again_rewrite_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run_in(folder: Path, words: Sequence[str], _: int) -> None:
        monkeypatch.chdir(folder)
        assert [main(command) for command in split(words)] == [0] * len(split(words))

    check_two_folders(root, tmp_path, run_in)


@pytest.mark.slow
def test_so_they_do_in_processes_with_other_hashes_of_texts(root: Path, tmp_path: Path):
    check_two_folders(root, tmp_path, run)


def test_a_record_written_by_hand_is_of_the_model_of_its_study(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shot = Shot(model="elsewhere", pixels=(16, 24), steps=2, guidance=0.0)
    edit = Edit(operation="add", site=SITE, dictionary=LABEL, features=(1,))
    EditRecord(shot=shot, edits=(edit,), checksums={}).save(tmp_path / "edit.json")
    assert main(["steer", str(root / "study"), "--replay", str(tmp_path / "edit.json"), "--out", str(tmp_path / "x.png")]) == 2
    assert "was made for elsewhere, but the model is tiny." in capsys.readouterr().err


def test_hooks_of_a_study_are_refused_by_another_model(root: Path, tmp_path: Path):
    other = difflex.load(tiny_folder("flux", tmp_path / "other", defaults={"pixels": [[16, 24]]}))
    edit = difflex.Edit(operation="add", site=SITE, dictionary=LABEL, features=(1,))
    hooks = difflex.steer(Study.open(root / "study"), [edit])
    with pytest.raises(difflex.DifflexError, match=r"made for tiny, but the model is .*other"):
        other.generate("a star", steps=1, edits=hooks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["removal", "study", *REMOVAL, "--strength", "0.5,0"],
        ["findings", "study", "--site", "double.1", "--finding", "pairs", "quality", *FINDINGS],
        ["concepts", "study", "--images", "160", "--noise", "0.25"],
        ["anatomy", "mini-flux", "--prompts", "captions", "--max-prompts", "16", "--out", "study"],
    ],
    ids=lambda words: words[0],
)
def test_a_killed_command_given_again_ends_like_one_that_was_not_and_then_rewrites_nothing(
    study: Study, words: list[str], tmp_path: Path
):
    for name in ("quiet", "killed"):
        (tmp_path / name).mkdir()
        shutil.copytree(study.folder, tmp_path / name / "study")
    start = time.monotonic()
    run(tmp_path / "quiet", words, 1)
    seconds = time.monotonic() - start
    for share in (0.6, 0.9):
        process = run(tmp_path / "killed", words, 2, wait=False)
        time.sleep(share * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run(tmp_path / "killed", words, 3)
    expected, actual = contents(tmp_path / "quiet"), contents(tmp_path / "killed")
    assert expected == {name: content for name, content in actual.items() if not name.endswith(".tmp")}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    run(tmp_path / "killed", words, 4)
    assert {path: path.stat().st_mtime_ns for path in before} == before
