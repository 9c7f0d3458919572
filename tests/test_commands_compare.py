"""`difflex compare`: two studies side by side, in words and as a page."""

import json
import re
from pathlib import Path

import pytest
from made_study import begun, evaluated, matched, whole

from difflex.cli import main
from difflex.errors import BadInput
from difflex.evaluation.concepts.results import ConfidenceInterval
from difflex.report import read_facts
from difflex.report.comparison import StudyComparison, compare, describe, write_comparison
from difflex.study import Study


def diary(study: Study, *commands: tuple[str, dict[str, object]]) -> None:
    """Writes what was run in `study`."""
    entries = [{"verb": verb, "flags": flags, "outputs": [], "seconds": 1.0} for verb, flags in commands]
    (study.folder / "run.json").write_text(json.dumps({"format": 2, "commands": entries}))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Study, Study]:
    """Two studies: one dictionary alike, one better in the second, one in each alone."""
    one, other = begun(tmp_path / "one"), begun(tmp_path / "other")
    for study, fvu, dead in ((one, 0.3, 100), (other, 0.2, 0)):
        evaluated(study, "double.1/topk-512-k8", fvu=0.25)
        evaluated(study, "double.1/topk-1024-k8", fvu=fvu, dead=dead, share=None)
    evaluated(one, "double.1/topk-64-k8")
    evaluated(other, "double.2/itda-508-k8")
    matched(one, "double.1/topk-512-k8", (0.9, 0.3, 0.9, 0.1))
    matched(other, "double.1/topk-512-k8", (0.9, 0.9, 0.9, 0.5))
    diary(one, ("harvest", {"tokens": 1000, "out": "."}), ("train", {"k": [8], "lr": None}), ("itda", {"size": 64}))
    diary(other, ("harvest", {"tokens": 1000, "out": "."}), ("train", {"k": [8, 16], "lr": 0.1}), ("evaluate", {"effect": 8}))
    return one, other


def compared(two: tuple[Study, Study]) -> StudyComparison:
    return compare(*map(read_facts, two))


def test_what_was_asked_differently_is_found_and_nothing_else(two: tuple[Study, Study]):
    assert [tuple(line) for line in compared(two).asked] == [
        ("train", "k", "8", "8,16"),
        ("train", "lr", "not given", "0.1"),
        ("itda", "", "size=64", ""),
        ("evaluate", "", "", "effect=8"),
    ]


def test_dictionaries_are_in_both_or_in_one(two: tuple[Study, Study]):
    found = compared(two)
    assert [pair.name for pair in found.pairs] == ["double.1/topk-512-k8", "double.1/topk-1024-k8"]
    assert [[each.name for each in only] for only in found.only] == [["double.1/topk-64-k8"], ["double.2/itda-508-k8"]]


def test_a_difference_is_that_of_the_second_less_the_first(two: tuple[Study, Study]):
    found = {(each.pair.name, each.column.name): each for each in compared(two).figured}
    assert found["double.1/topk-1024-k8", "FVU"].difference == pytest.approx(-0.1)
    assert found["double.1/topk-1024-k8", "dead"].difference == pytest.approx(-100 / 1024)
    assert found["double.1/topk-512-k8", "FVU"].difference == 0
    assert found["double.1/topk-1024-k8", "v / mean"].difference is None
    other_way = {(e.pair.name, e.column.name): e for e in compare(*map(read_facts, reversed(two))).figured}
    assert other_way["double.1/topk-1024-k8", "FVU"].difference == pytest.approx(0.1)


def test_coverage_differs_with_an_interval_and_groups_by_their_means(two: tuple[Study, Study]):
    (found,) = compared(two).detected
    assert found.coverage.value == pytest.approx(0.25)
    # Each interval reaches 0.1 to either side, that of the second up to 0.1 below; independent ones add in squares.
    assert found.coverage == pytest.approx(ConfidenceInterval(0.25, 0.25 - 0.02**0.5, 0.25 + 0.02**0.5))
    assert found.groups == {"colour": pytest.approx((0.6, 0.9)), "shape": pytest.approx((0.5, 0.7))}


def test_what_is_stale_or_missing_or_not_alike_is_said(two: tuple[Study, Study]):
    one, other = two
    (one.folder / "dictionaries/double.1/topk-1024-k8/dictionary.safetensors").write_bytes(b"others")
    evaluated(other, "double.1/topk-512-k8", normalisation="whiten", data="elsewhere")
    matched(other, "double.1/topk-512-k8", (0.9, 0.9, 0.9, 0.5), {"images": "others"})
    said = "\n".join(compared(two).troubles)
    assert "one: double.1/topk-1024-k8: the dictionary has changed since it was evaluated" in said
    assert "double.1/topk-1024-k8: no evaluation that holds in one. difflex evaluate makes it." in said
    assert "Standardise against whiten: double.1/topk-512-k8." in said and "Made from other data: double.1/topk-512-k8." in said
    assert "Held against other images, or in another way: double.1/topk-512-k8." in said
    assert {each.pair.name for each in compared(two).figured} == {"double.1/topk-512-k8"}


def test_the_command_says_it_and_writes_a_page_by_itself(
    two: tuple[Study, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *(str(study.folder) for study in two)]) == 0
    said = capsys.readouterr().out
    assert "only in one: double.1/topk-64-k8" in said and "compare.html: the same as a page" in said
    (line,) = [line for line in said.splitlines() if line.split()[:2] == ["double.1/topk-1024-k8", "FVU"]]
    assert line.split()[2:] == ["0.300", "0.200", "-0.100"]
    assert "figures that are equal: 8" in said and "topk-512-k8   FVU" not in said
    page = (tmp_path / "compare.html").read_text()
    assert "topk-1024-k8" in page and "\N{MINUS SIGN}0.100" in page
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", page)


def test_a_measure_that_one_study_has_is_told_of_both(two: tuple[Study, Study], tmp_path: Path):
    evaluated(two[1], "double.1/topk-512-k8", alike={"lpips": 0.0625})
    found = compare(read_facts(two[0]), read_facts(two[1]))
    told = {each.pair.name: (each.one, each.other) for each in found.figured if each.column.name == "lpips"}
    assert told["double.1/topk-512-k8"] == (None, 0.0625)
    assert "0.0625" in write_comparison(found, tmp_path / "page.html").read_text()


def test_studies_of_two_models_may_be_compared(two: tuple[Study, Study], tmp_path: Path):
    third = begun(tmp_path / "third", model="OWNER/NAME", revision="abc")
    evaluated(third, "double.1/topk-512-k8", fvu=0.9)
    found = compare(read_facts(two[0]), read_facts(third))
    assert [tuple(line) for line in found.asked[:2]] == [
        ("study", "model", "mini-flux", "OWNER/NAME"),
        ("study", "revision", "not given", "abc"),
    ]
    assert [pair.name for pair in found.pairs] == ["double.1/topk-512-k8"]


def test_studies_of_one_name_are_told_apart(tmp_path: Path):
    one, other = begun(tmp_path / "a" / "study"), begun(tmp_path / "b" / "study")
    assert compare(read_facts(one), read_facts(other)).names == ("a/study", "b/study")


def test_studies_that_share_nothing_are_compared_all_the_same(tmp_path: Path):
    found = compare(read_facts(begun(tmp_path / "one")), read_facts(begun(tmp_path / "other")))
    assert "asked: the same of both" in describe(found) and "dictionaries in both: 0" in describe(found)
    page = write_comparison(found, tmp_path / "page.html").read_text()
    assert page.count("Not here yet") == 2


def test_the_same_study_twice_is_refused(two: tuple[Study, Study], tmp_path: Path):
    (tmp_path / "link").symlink_to(two[0].folder)
    with pytest.raises(BadInput, match="the same study"):
        compare(read_facts(two[0]), read_facts(Study.open(tmp_path / "link")))


@pytest.mark.parametrize(
    ("other", "out", "words"),
    [
        ("nowhere", "page.html", "is not a study"),
        ("other", ".", "is a folder"),
        ("other", "one/study.json/page.html", "cannot be"),
    ],
)
def test_what_cannot_be_compared_or_written_is_said(
    two: tuple[Study, Study], tmp_path: Path, other: str, out: str, words: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["compare", str(two[0].folder), str(tmp_path / other), "--out", str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err


def test_a_whole_study_can_be_compared_with_one_inside_it(tmp_path: Path):
    study = whole(tmp_path / "study")
    control = begun(study.folder / "untrained", "mini-flux", "untrained-0")
    evaluated(control, "double.1/topk-1024-k16", fvu=0.9)
    matched(control, "double.1/topk-1024-k16", (0.2, 0.1, 0.1, 0.1))
    found = compare(read_facts(study), read_facts(control))
    assert found.names == ("study", "untrained") and len(found.pairs) == 1 and found.detected[0].coverage.value < 0
