"""`difflex compare`: two studies compared, as text and as a page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from sample_study import full_study, new_study, write_book, write_dictionary, write_evaluation, write_matches, write_steering

from difflex.cli import main
from difflex.errors import BadInput
from difflex.evaluation.concepts.results import ConfidenceInterval
from difflex.report import read_facts
from difflex.report.comparison import StudyComparison, compare, describe, write_comparison
from difflex.study import CommandRecord, Study


def write_log(study: Study, *commands: tuple[str, dict[str, object]]) -> None:
    """Write the log of `study`."""
    entries = [{"verb": verb, "flags": flags, "outputs": [], "seconds": 1.0} for verb, flags in commands]
    (study.folder / "run.json").write_text(json.dumps({"format": 2, "commands": entries}))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Study, Study]:
    """Two studies: one dictionary equal in both, one better in the second, and one in each of them only."""
    one, other = new_study(tmp_path / "one"), new_study(tmp_path / "other")
    for study, fvu, dead in ((one, 0.3, 100), (other, 0.2, 0)):
        write_evaluation(study, "double.1/topk-512-k8", fvu=0.25)
        write_evaluation(study, "double.1/topk-1024-k8", fvu=fvu, dead=dead, share=None)
    write_evaluation(one, "double.1/topk-64-k8")
    write_evaluation(other, "double.2/itda-508-k8")
    write_matches(one, "double.1/topk-512-k8", (0.9, 0.3, 0.9, 0.1))
    write_matches(other, "double.1/topk-512-k8", (0.9, 0.9, 0.9, 0.5))
    write_log(one, ("harvest", {"tokens": 1000, "out": "."}), ("train", {"k": [8], "lr": None}), ("itda", {"size": 64}))
    write_log(other, ("harvest", {"tokens": 1000, "out": "."}), ("train", {"k": [8, 16], "lr": 0.1}), ("evaluate", {"effect": 8}))
    return one, other


def compared(two: tuple[Study, Study]) -> StudyComparison:
    return compare(*map(read_facts, two))


def test_only_settings_that_differ_are_listed(two: tuple[Study, Study]):
    assert [tuple(line) for line in compared(two).settings] == [
        ("train", "k", "8", "8,16"),
        ("train", "lr", "not set", "0.1"),
        ("itda", "", "size=64", ""),
        ("evaluate", "", "", "effect=8"),
    ]


def test_recipes_that_differ_are_shown_by_their_settings(two: tuple[Study, Study]):
    facts = [
        replace(read_facts(study), recipe=CommandRecord(verb="run", flags={"recipe": "mini", "model": model}))
        for study, model in zip(two, ("mini-flux", "mini-flux-small"), strict=True)
    ]
    assert compare(*facts).settings[0] == ("study", "recipe", "recipe=mini model=mini-flux", "recipe=mini model=mini-flux-small")


def test_dictionaries_are_in_both_studies_or_in_one(two: tuple[Study, Study]):
    comparison = compared(two)
    assert [pair.name for pair in comparison.pairs] == ["double.1/topk-512-k8", "double.1/topk-1024-k8"]
    assert [[dictionary.name for dictionary in only] for only in comparison.only] == [
        ["double.1/topk-64-k8"],
        ["double.2/itda-508-k8"],
    ]


def test_a_difference_is_the_second_less_the_first(two: tuple[Study, Study]):
    pairs = {(pair.dictionary, pair.column.name): pair for pair in compared(two).metrics}
    assert pairs["double.1/topk-1024-k8", "FVU"].difference == pytest.approx(-0.1)
    assert pairs["double.1/topk-1024-k8", "dead"].difference == pytest.approx(-100 / 1024)
    assert pairs["double.1/topk-512-k8", "FVU"].difference == 0
    assert pairs["double.1/topk-1024-k8", "v / mean"].difference is None
    reverse = {(pair.dictionary, pair.column.name): pair for pair in compare(*map(read_facts, reversed(two))).metrics}
    assert reverse["double.1/topk-1024-k8", "FVU"].difference == pytest.approx(0.1)


def test_coverage_has_a_difference_with_an_interval_and_groups_have_their_means(two: tuple[Study, Study]):
    (pair,) = compared(two).detections
    assert pair.coverage.value == pytest.approx(0.25)
    # Each interval reaches 0.1 to either side, that of the second up to 0.1 below; independent ones add in squares.
    assert pair.coverage == pytest.approx(ConfidenceInterval(0.25, 0.25 - 0.02**0.5, 0.25 + 0.02**0.5))
    assert pair.groups == {"colour": pytest.approx((0.6, 0.9)), "shape": pytest.approx((0.5, 0.7))}


def test_stale_missing_and_unequal_records_are_named(two: tuple[Study, Study]):
    one, other = two
    write_dictionary(one, "double.1/topk-1024-k8", weights=b"others")
    write_evaluation(other, "double.1/topk-512-k8", normalisation="whiten", data="elsewhere")
    write_matches(other, "double.1/topk-512-k8", (0.9, 0.9, 0.9, 0.5), {"images": "others"})
    problems = "\n".join(compared(two).problems)
    assert "one: double.1/topk-1024-k8: the dictionary has changed since it was evaluated" in problems
    assert "double.1/topk-1024-k8: no valid evaluation in one. Run difflex evaluate." in problems
    assert "Standardise against whiten: double.1/topk-512-k8." in problems
    assert "Trained on different data: double.1/topk-512-k8." in problems
    assert "Concepts measured on different images, or in different ways: double.1/topk-512-k8." in problems
    assert "The concepts of the two studies were not measured with the same images" in problems
    assert {pair.dictionary for pair in compared(two).metrics if pair.difference is not None} == {"double.1/topk-512-k8"}


def test_the_command_prints_the_differences_and_writes_a_page(
    two: tuple[Study, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *(str(study.folder) for study in two)]) == 0
    text = capsys.readouterr().out
    assert "only in one: double.1/topk-64-k8" in text and "compare.html" in text
    (line,) = [line for line in text.splitlines() if line.split()[:2] == ["double.1/topk-1024-k8", "FVU"]]
    assert line.split()[2:] == ["0.300", "0.200", "-0.100"]
    assert "metrics that are equal: 8" in text and "topk-512-k8   FVU" not in text
    page = (tmp_path / "compare.html").read_text()
    assert "topk-1024-k8" in page and "\N{MINUS SIGN}0.100" in page
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", page)


def test_a_measure_of_one_study_is_a_column_of_both(two: tuple[Study, Study], tmp_path: Path):
    write_evaluation(two[1], "double.1/topk-512-k8", similarity={"lpips": 0.0625})
    comparison = compare(read_facts(two[0]), read_facts(two[1]))
    lpips = {pair.dictionary: (pair.first, pair.second) for pair in comparison.metrics if pair.column.name == "lpips"}
    assert lpips["double.1/topk-512-k8"] == (None, 0.0625)
    assert "0.0625" in write_comparison(comparison, tmp_path / "page.html").read_text()


def test_studies_of_two_models_may_be_compared(two: tuple[Study, Study], tmp_path: Path):
    third = new_study(tmp_path / "third", model="OWNER/NAME", revision="abc")
    write_evaluation(third, "double.1/topk-512-k8", fvu=0.9)
    comparison = compare(read_facts(two[0]), read_facts(third))
    assert [tuple(line) for line in comparison.settings[:2]] == [
        ("study", "model", "mini-flux", "OWNER/NAME"),
        ("study", "revision", "not set", "abc"),
    ]
    assert [pair.name for pair in comparison.pairs] == ["double.1/topk-512-k8"]
    assert "mini-flux and OWNER/NAME are two models: a site of one name need not be the same place" in describe(comparison)


@pytest.fixture
def sizes(tmp_path: Path) -> StudyComparison:
    """Two models of different depth whose dictionaries have no site and no size in common, each with all kinds of records."""
    deep, flat = new_study(tmp_path / "deep"), new_study(tmp_path / "flat", model="small")
    deep_names = [f"{site}/topk-512-k8" for site in ("double.0", "double.2", "single.3")]
    for study, names, best in ((deep, deep_names, 0.9), (flat, ["mid.0/topk-64-k8", "up.0.1/topk-64-k8"], 0.7)):
        for i, name in enumerate(names):
            write_evaluation(study, name, fvu=0.1 + i / 10)
            write_matches(study, name, (best, best if i else 0.1, 0.1, 0.85 if i else 0.2))
        write_steering(study, names[-1], success=best)
        write_book(study, names[-1], explained={3: ("red", best), 5: ("stars", best)})
    return compare(read_facts(deep), read_facts(flat))


def test_studies_of_two_sizes_are_compared_block_by_block(sizes: StudyComparison):
    assert sizes.pairs == () and sizes.detections == ()
    assert [problem for problem in sizes.problems if "same images" in problem] == []
    text = describe(sizes)
    lines = [line.split() for line in text.splitlines()]
    assert "mean AP by group" not in text and ["double.2/topk-512-k8", "FVU", "0.200", "\N{EN DASH}", "\N{EN DASH}"] in lines
    assert any(
        "double.2, noise 0.5: 0.90, 2 of 2 detected" in line and "up.0.1, noise 0.5: 0.70" in line for line in text.splitlines()
    )
    assert ["double.0", "1/2", "0/2", "1/4", "4"] in lines and ["any", "2/2", "1/2", "3/4", "4"] in lines


def test_the_page_of_two_sizes_shows_what_one_study_has_at_its_sites(sizes: StudyComparison, tmp_path: Path):
    page = write_comparison(sizes, tmp_path / "page.html").read_text()
    assert 'id="missing"' not in page
    figures = dict(re.findall(r'id="figure-(\w+)"(.*?)</figure>', page, flags=re.DOTALL))
    assert [*figures] == ["roles", "differences", "found", "explained", "steering"]
    assert figures["roles"].count("<svg") == 4 and figures["found"].count("<svg") == 2
    for name, site in (("deep", "single.3/topk-512-k8"), ("flat", "up.0.1/topk-64-k8")):
        assert all(f"{site}" in figures[figure] for figure in ("differences", "explained", "steering"))
        assert f"{name}: best single feature" in figures["roles"]
    assert "not drawn" not in page and "gain 90 %" in figures["steering"] and "0.700" in figures["explained"]


def test_studies_of_one_name_are_named_by_more_of_their_paths(tmp_path: Path):
    one, other = new_study(tmp_path / "a" / "study"), new_study(tmp_path / "b" / "study")
    assert compare(read_facts(one), read_facts(other)).names == ("a/study", "b/study")


def test_studies_that_share_nothing_can_be_compared(tmp_path: Path):
    comparison = compare(read_facts(new_study(tmp_path / "one")), read_facts(new_study(tmp_path / "other")))
    assert "settings: equal" in describe(comparison) and "dictionaries in both: 0" in describe(comparison)
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert page.count("<dt><code>difflex") == 4  # a command for each thing that both lack


def test_the_same_study_twice_is_refused(two: tuple[Study, Study], tmp_path: Path):
    (tmp_path / "link").symlink_to(two[0].folder)
    with pytest.raises(BadInput, match="the same study"):
        compare(read_facts(two[0]), read_facts(Study.open(tmp_path / "link")))


@pytest.mark.parametrize(
    ("other", "out", "message"),
    [
        ("nowhere", "page.html", "is not a study"),
        ("other", ".", "is a folder"),
        ("other", "one/study.json/page.html", "cannot be"),
    ],
)
def test_a_missing_study_and_an_unusable_file_are_errors(
    two: tuple[Study, Study], tmp_path: Path, other: str, out: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["compare", str(two[0].folder), str(tmp_path / other), "--out", str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err


def test_a_whole_study_can_be_compared_with_one_inside_it(tmp_path: Path):
    study = full_study(tmp_path / "study")
    control = new_study(study.folder / "untrained", "mini-flux", "untrained-0")
    write_evaluation(control, "double.1/topk-1024-k16", fvu=0.9)
    write_matches(control, "double.1/topk-1024-k16", (0.2, 0.1, 0.1, 0.1))
    comparison = compare(read_facts(study), read_facts(control))
    assert comparison.names == ("study", "untrained") and len(comparison.pairs) == 1
    assert comparison.detections[0].coverage.value < 0


def test_two_dictionaries_of_a_study_are_compared_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = str(full_study(tmp_path / "study").folder)
    names = ["double.1/topk-1024-k16", "double.1/itda-1020-k16-first100"]
    assert main(["compare", study, "--dictionary", *names]) == 0
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows[""][:2] == names or rows[""][-3:-1] == names
    assert rows["AP of ring"] == ["0.600", "0.400", "-0.200"] and "FVU" in rows and "median gain by steering" in rows
    assert main(["compare", study, "--dictionary", names[0]]) == 2
    assert "Studies: 1, dictionaries: 1: these cannot be compared" in capsys.readouterr().err
    assert main(["compare", study]) == 2
