"""`difflex steer`, `contrast` and `icon`: from a study to grids of edited images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sample_study import write_matches

from difflex.cli import main
from difflex.commands.flags import _strengths
from difflex.dictionaries import CodeStatistics, Dictionary
from difflex.errors import UnknownName
from difflex.evaluation.concepts import Concept
from difflex.records import Edit, Site
from difflex.steering import StudyEditor
from difflex.steering.contrast import Contrast
from difflex.steering.strengths import STRENGTHS
from difflex.study import DictionaryRef, Study
from difflex.testing import tiny_folder

SITE, LABEL = "double.1", "topk-64-k4"
PLACE = f"{SITE}/{LABEL}"


@pytest.fixture(scope="module")
def shared_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a tiny model with one dictionary."""
    root = tmp_path_factory.mktemp("steer")
    model = tiny_folder("flux", root / "tiny-flux", defaults={"pixels": [[16, 24]]})
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(60)))
    words = ["harvest", str(model), "--prompts", str(root / "prompts.txt"), "--out", str(root / "study"), "--seed", "0"]
    assert main([*words, "--site", SITE]) == 0
    assert (
        main(["train", str(root / "study"), "--site", SITE, "--k", "4", "--size", "64", "--tokens", "2000", "--batch", "64"]) == 0
    )
    return root / "study"


@pytest.fixture
def study(shared_study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_study, tmp_path / "study"))


@pytest.fixture(scope="module")
def alive(shared_study: Path) -> list[str]:
    """The numbers of the features that fire, the liveliest first."""
    peaks = StudyEditor(Study.open(shared_study)).scales(DictionaryRef(Site(SITE), LABEL)).peaks
    return [str(feature) for feature in peaks.argsort(descending=True).tolist() if peaks[feature] > 0]


def steer(study: Path, *words: str) -> int:
    """Run `difflex steer`; the first word is the dictionary, unless it is a flag."""
    first, *features_and_flags = words
    return main(["steer", str(study), *(words if first.startswith("--") else [*features_and_flags, "--dictionary", first])])


def tiles(path: Path) -> list[bytes]:
    """The images of a grid of one row, from left to right."""
    with Image.open(path) as file:
        sheet = file.convert("RGB")
    columns = [x for x in range(sheet.width) if any(sheet.getpixel((x, sheet.height - 20)) != (255, 255, 255) for _ in (0,))]
    starts = [x for x in columns if x - 1 not in columns]
    return [sheet.crop((x, 0, x + 40, sheet.height)).tobytes() for x in starts[-3:]]


def test_a_sweep_starts_with_the_unedited_image_which_equals_strength_zero(study: Path, alive: list[str], tmp_path: Path):
    out = tmp_path / "grid.png"
    assert steer(study, SITE, *alive[:2], "--prompt", "a star", "--strength", "0:40:20", "--unit", "code", "--out", str(out)) == 0
    nothing, some, more = tiles(out)
    assert len({nothing, some, more}) == 3
    assert steer(study, SITE, *alive[:2], "--prompt", "a star", "--strength", "0", "--out", str(tmp_path / "plain.png")) == 0
    plain, unedited = tiles(tmp_path / "plain.png")[-2:]
    below_the_titles = slice(len(plain) // 4, None)
    assert plain[below_the_titles] == unedited[below_the_titles]


def test_a_recorded_edit_is_replayed_exactly_and_refused_after_its_dictionary_changed(
    study: Path, alive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first, again, record = (tmp_path / name for name in ("first.png", "again.png", "edit.json"))
    flags = ["--prompt", "a star", "--region", "0,0,0.5,1", "--edit-steps", "0:1", "--strength", "9", "--record", str(record)]
    assert steer(study, PLACE, alive[0], *flags, "--out", str(first)) == 0
    assert steer(study, "--replay", str(record), "--out", str(again)) == 0
    assert first.read_bytes() == again.read_bytes()
    assert steer(study, "--replay", str(record), "--steps", "3", "--out", str(again)) == 2
    assert "leave out --steps" in capsys.readouterr().err
    folder = study / "dictionaries" / SITE / LABEL
    changed = Dictionary.load(folder)
    changed.bias.add_(1.0)  # pyright: ignore[reportAttributeAccessIssue]
    changed.save(folder)
    assert steer(study, "--replay", str(record), "--out", str(again)) == 2
    assert f"{PLACE} has changed since" in capsys.readouterr().err


def test_a_replay_is_refused_after_its_region_image_changed(
    study: Path, alive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mask, record = tmp_path / "mask.png", tmp_path / "edit.json"
    Image.linear_gradient("L").save(mask)
    words = [PLACE, alive[0], "--region", str(mask), "--strength", "9", "--record", str(record)]
    assert steer(study, *words, "--out", str(tmp_path / "first.png")) == 0
    assert steer(study, "--replay", str(record), "--out", str(tmp_path / "again.png")) == 0
    Image.linear_gradient("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(mask)
    assert steer(study, "--replay", str(record), "--out", str(tmp_path / "again.png")) == 2
    assert "mask.png has changed since" in capsys.readouterr().err.replace("\n", "")


def test_a_transplant_of_an_image_into_itself_changes_nothing(study: Path, alive: list[str], tmp_path: Path):
    out = tmp_path / "grid.png"
    flags = ["--operation", "transplant", "--prompt", "a star", "--source", "a star", "--source-seed", "0", "--out", str(out)]
    assert steer(study, SITE, *alive, *flags) == 0
    unedited, transplanted = tiles(out)[-2:]
    assert unedited[len(unedited) // 4 :] == transplanted[len(unedited) // 4 :]


def test_a_contrast_is_found_saved_decomposed_and_steered_along(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "pairs.txt").write_text("a star\ta ring\n\na red star\ta red ring\n")
    words = ["contrast", str(study), "star", "--site", SITE, "--pairs", str(tmp_path / "pairs.txt"), "--seeds", "0:3"]
    assert main([*words, "--keep-steps", "0:1", "--dictionary", SITE]) == 0
    output = capsys.readouterr().out
    contrast = Contrast.load(study / "steering" / "contrasts" / "star.safetensors")
    assert contrast.pairs == 6 and contrast.positive == ("a star", "a red star") and len(contrast.timesteps) == 1
    assert "6 pairs" in output and "cosine" in output
    out = tmp_path / "grid.png"
    assert (
        steer(study, "--contrast", "star", "--prompt", "a ring", "--strength", "-8:8:8", "--differences", "--out", str(out)) == 0
    )
    assert len(set(tiles(out))) == 3


def test_features_are_named_by_words_and_what_was_meant_is_printed(
    study: Path, alive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_matches(Study.open(study), PLACE, (0.93, 0.9, 0.8, 0.8), rare=(Concept("green", "colour"),))
    named, numbered = tmp_path / "named.png", tmp_path / "numbered.png"
    flags = ["--prompt", "a star", "--strength", "9", "--unit", "code"]
    assert main(["steer", str(study), "red", *flags, "--out", str(named)]) == 0
    assert f"red: feature 1 of {PLACE} (detects red, AP 0.93)" in capsys.readouterr().out
    assert steer(study, PLACE, "1", *flags, "--out", str(numbered)) == 0
    assert named.read_bytes() == numbered.read_bytes()
    assert main(["icon", str(study), "red", "--strength", "1", "--out", str(named)]) == 0
    capsys.readouterr()
    assert main(["steer", str(study), "green", *flags]) == 2
    assert "Left out because too rare in 9 images; run difflex concepts" in capsys.readouterr().err
    assert main(["steer", str(study), "rad", *flags]) == 2
    assert "nearest: red" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # as on the command line, which prints them
def test_an_edit_where_features_fire_warns_if_they_fire_nowhere(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scales = StudyEditor(Study.open(study)).scales(DictionaryRef(Site(SITE), LABEL))
    dead = next(feature for feature in range(64) if scales.peaks[feature] == 0)
    flags = ["--region", "fires", "--strength", "2", "--unit", "code", "--out", str(tmp_path / "grid.png")]
    assert steer(study, SITE, str(dead), *flags, "--prompt", "a star") == 0
    assert "fires at no token of 'a star', seed 0, so the edit changes nothing there" in capsys.readouterr().err


def test_without_a_strength_the_largest_that_leaves_images_intact_is_measured(
    study: Path, alive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = tmp_path / "edit.json"
    words = [PLACE, alive[0], "--prompt", "a star", "--out", str(tmp_path / "x.png"), "--record", str(record)]
    assert steer(study, *words) == 0
    strength = json.loads(record.read_text())["edits"][0]["strength"]
    assert strength in STRENGTHS and f"strength {strength:g} peak: the largest at which" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*is dead")
def test_a_concept_is_erased_by_the_features_that_detect_it(
    study: Path, alive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_matches(Study.open(study), PLACE, (0.93, 0.9, 0.8, 0.8), per_concept=2)
    out = tmp_path / "erased.png"
    words = ["erase", str(study), "red", "--prompt", "a star", "--seeds", "0:2", "--out", str(out)]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert f"features 1, 0, 4 of {PLACE}; codes times" in output and "2 images before and after" in output
    assert main([*words, "--strength", "0.5", "--edit-steps", "0:1"]) == 0
    assert "codes times 0.5" in capsys.readouterr().out


def test_a_study_is_steered_from_another_folder_than_it_was_made_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_folder("flux", tmp_path / "tiny-flux", defaults={"pixels": [[16, 24]]})
    (tmp_path / "prompts.txt").write_text("a star\na ring\n")
    monkeypatch.chdir(tmp_path)
    words = ["harvest", f"./{model.name}", "--prompts", "prompts.txt", "--site", SITE, "--out", "study"]
    assert main(words) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["contrast", "../study", "x", "--site", SITE, "--positive", "a star", "--negative", "a ring"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0, "the same folder by another name is the same model"


def test_icons_are_generated_for_each_feature(study: Path, alive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "icons.png"
    assert main(["icon", str(study), *alive[:2], "--dictionary", SITE, "--strength", "1:2:1", "--out", str(out)]) == 0
    assert "2 features at 2 strengths" in capsys.readouterr().out and out.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((SITE, "64"), "numbered 0 to 63"),
        (("double.0", "1"), "nearest: double.1"),
        ((), "There is nothing to steer with"),
        ((SITE,), "Name features"),
        ((SITE, "1", "--region", "0,0,30,10"), "outside the image of 24 x 16 pixels"),
        ((SITE, "1", "--region", "nothing.png"), "is no file"),
        ((SITE, "1", "--edit-steps", "1:9"), "the run has 2"),
        ((SITE, "1", "--contrast", "red"), "one of the two"),
        (("--contrast", "red"), "The contrast 'red' is unknown"),
        ((SITE, "1", "--operation", "transplant"), "needs a source"),
        ((SITE, "1", "--operation", "scale"), "by 1 nothing changes"),
        ((SITE, "1", "--out", "grid.txt"), "does not name an image file"),
        (("--replay", "nothing.json"), "There is no file nothing.json"),
        ((SITE, "1", "--strength", "1:2:1", "--record", "x.json"), "One edit of one image"),
    ],
)
def test_impossible_edits_are_explained(
    study: Path, alive: list[str], words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    words = tuple(alive[0] if word == "1" else word for word in words)
    out = () if "--out" in words else ("--out", str(tmp_path / "x.png"))
    assert steer(study, *words, *out) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--positive", "a star"), "1 positive and 0 negative"),
        (("--pairs", "nothing.txt"), "cannot be read"),
        (("--positive", "a star", "--negative", "a star"), "do not differ"),
    ],
)
def test_impossible_contrasts_are_explained(
    study: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["contrast", str(study), "x", "--site", SITE, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_pair_with_nul_is_refused_before_it_is_harvested(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "pairs.txt").write_text("a star\ta ring\na\0star\ta ring\n")
    assert main(["contrast", str(study), "x", "--site", SITE, "--pairs", str(tmp_path / "pairs.txt")]) == 2
    assert "Line 2 of" in capsys.readouterr().err


def test_strengths_are_even_and_include_both_ends():
    assert _strengths(["-2:2:0.5"]) == (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
    assert _strengths(["0.3"]) == (0.3,)
    assert _strengths(["0.5,1,1.5"]) == (0.5, 1.0, 1.5)
    assert _strengths(["-4,-1:1:1"]) == (-4.0, -1.0, 0.0, 1.0)
    for no_strength in ("nan", "1:2", "2:1:1", "1:2:0"):
        with pytest.raises(ValueError, match="is not a strength"):
            _strengths([no_strength])


def test_a_record_is_plain_json(study: Path, alive: list[str], tmp_path: Path):
    record = tmp_path / "new" / "edit.json"
    assert steer(study, SITE, alive[0], "--strength", "1", "--record", str(record), "--out", str(tmp_path / "x.png")) == 0
    entries = json.loads(record.read_text())
    assert entries["format"] == 2 and entries["edits"][0]["features"] == [int(alive[0])] and entries["shot"]["seed"] == 0


def test_edits_of_whole_blocks_and_of_several_sites_are_recorded_combined_and_replayed(
    study: Path, alive: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name = lambda word: str(tmp_path / word)  # noqa: E731
    flags = ["--prompt", "a star", "--differences", "--out", name("x.png")]
    zero = ["--operation", "zero", "--at", "double.0..single.0:update", "--record", name("zero.json")]
    assert steer(study, *zero, *flags) == 0
    entry = json.loads(Path(name("zero.json")).read_text())["edits"][0]
    assert entry["at"] == ["double.0:update", "double.1:update", "single.0:update"]
    several = ["--at", "double.1", "single.*", "--strength", "3", "--unit", "code", "--also", name("zero.json")]
    assert (
        steer(study, PLACE, alive[0], *several, "--record", name("both.json"), "--prompt", "a star", "--out", name("y.png")) == 0
    )
    assert steer(study, "--replay", name("both.json"), "--out", name("z.png")) == 0
    assert Path(name("y.png")).read_bytes() == Path(name("z.png")).read_bytes()
    assert steer(study, "--operation", "reconstruct", "--dictionary", PLACE, "--half", "both", *flags) == 0
    capsys.readouterr()
    for words, message in (
        ((PLACE, "--operation", "zero", "--at", "double.0"), "Leave out features"),
        (("--operation", "zero"), "Name sites with --at"),
        ((PLACE, alive[0], "--operation", "reconstruct"), "whole dictionary"),
        ((PLACE, alive[0], "--at", "single.0..double.0"), "no range"),
        (("--replay", name("both.json"), "--also", name("zero.json")), "leave out --also"),
    ):
        assert steer(study, *words) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_icon_of_a_mean_code_is_recorded_and_replayed(study: Path, alive: list[str], tmp_path: Path):
    record, out, again = (str(tmp_path / name) for name in ("icon.json", "icon.png", "again.png"))
    words = ["icon", str(study), alive[0], "--strength", "1.5", "--unit", "mean", "--seed", "3", "--out", out]
    assert main([*words, "--record", record]) == 0
    assert json.loads(Path(record).read_text())["edits"][0]["unit"] == "mean"
    assert steer(study, "--replay", record, "--out", again) == 0
    assert tiles(Path(out))[-1][-2000:] == tiles(Path(again))[-1][-2000:]
    assert main([*words, "--strength", "1,2", "--record", record]) == 2


def test_a_mean_code_that_a_dictionary_was_imported_with_is_its_unit_and_needs_no_activations(study: Path, alive: list[str]):
    shutil.rmtree(study / "activations")
    shutil.rmtree(study / "steering", ignore_errors=True)
    folder, feature = study / "dictionaries" / SITE / LABEL, int(alive[0])
    CodeStatistics(mean=torch.arange(64.0)).save(folder)
    edit = Edit(operation="replace", site=Site(SITE), dictionary=LABEL, features=(feature,), unit="mean")
    assert StudyEditor(Study.open(study)).features(edit).units["mean"].tolist() == [feature]
    with pytest.raises(UnknownName, match="harvest the site"):
        StudyEditor(Study.open(study)).features(replace(edit, unit="peak"))
