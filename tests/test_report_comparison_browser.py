"""The comparison of two studies in a real browser: on a phone and on a desktop, in light and dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from sample_study import full_study, new_study, write_evaluation, write_matches
from test_report_browser import CARDS, CUT_OR_OVERLAPPING, TOO_WIDE, VIEWS, browser, open_page

from difflex.evaluation.concepts import Concept
from difflex.report import read_facts
from difflex.report.comparison import compare, write_comparison

__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("usual")
    one, other = full_study(root / "study"), full_study(root / "another-study")
    write_evaluation(other, "double.1/topk-1024-k16", fvu=0.4, dead=300)
    write_evaluation(other, "double.2/topk-512-k16", fvu=None)
    write_matches(other, "double.1/topk-1024-k16", (0.2, 0.9, 0.3, 0.6))
    return write_comparison(compare(read_facts(one), read_facts(other)), root / "compare.html")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with long names, many dictionaries and many groups."""
    root = tmp_path_factory.mktemp("crowded")
    model = "a-laboratory-with-a-name/A-Large-Model-of-Text-to-Image-v1.5"
    concepts = tuple(Concept(f"concept {i}", f"a group with a rather long name, number {i}") for i in range(14))
    studies = [
        new_study(root / f"a study with a name that says all that was tried in it, {i}", model, f"{i}abc" * 9) for i in (1, 2)
    ]
    for number, study in enumerate(studies):
        for block in range(8):
            for size in (16384, 32768, 65536):
                for k in (32, 48, 64):
                    name = (
                        f"transformer.single_transformer_blocks.{block}:update/topk-{size}-k{k}-paper-standardise-lr0.0002-seed1"
                    )
                    write_evaluation(
                        study, name, fvu=(size / 3e5 + number) / (block + k), dead=size // (9 + number), data=str(number)
                    )
            write_matches(study, name, [0.9 - (j + number) / 20 for j in range(14)], concepts=concepts)
    return write_comparison(compare(*map(read_facts, studies)), root / "compare.html")


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def view(request: pytest.FixtureRequest, browser: Browser, usual: Path) -> Iterator[Page]:
    yield from open_page(browser, usual, *request.param)


@pytest.fixture(params=VIEWS[::3], ids=lambda view: f"{view[0]}-{view[1]}")
def full(request: pytest.FixtureRequest, browser: Browser, crowded: Path) -> Iterator[Page]:
    yield from open_page(browser, crowded, *request.param)


def test_nothing_is_wider_than_the_window_cut_or_overlapping(view: Page):
    assert view.locator("svg.drawing text").count() > 50
    assert view.evaluate(TOO_WIDE) == [] and view.evaluate(CUT_OR_OVERLAPPING) == [] and view.evaluate(CARDS) == []


def test_large_studies_fit_as_well(full: Page):
    assert full.evaluate(TOO_WIDE) == [] and full.evaluate(CUT_OR_OVERLAPPING) == [] and full.evaluate(CARDS) == []


def test_the_table_of_all_figures_opens_and_sorts(browser: Browser, usual: Path):
    for page in open_page(browser, usual, 1400, "light"):
        page.locator("summary", has_text="All").click()
        head = page.locator(".sortable thead th").nth(4)
        head.locator("button").click()
        first = page.locator(".sortable tbody tr").first.locator(":scope > *").all_text_contents()
        assert head.get_attribute("aria-sort") == "ascending" and first[4].startswith("\N{MINUS SIGN}")
