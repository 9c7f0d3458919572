"""The web app in a real browser: browse, sort, search, look, with a mouse and on a phone."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page
from real_browser import browser, visit  # noqa: F401 (a fixture)
from sample_study import new_study, write_book, write_dictionary, write_matches
from test_web import Site

SAE = "double.1:smooth/topk-400-k4"
FEATURES = 400


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    study = new_study(tmp_path_factory.mktemp("browser") / "study")
    write_dictionary(study, SAE)
    write_book(study, SAE, features=FEATURES, explained={399: ("the last one", 0.9)})
    write_matches(study, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=2)
    site = Site(study)
    yield site
    site.close()


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, site: Site) -> Iterator[Page]:  # noqa: F811 (the fixture)
    # The readback that it warns of is that of these tests, and what is not found is what they request.
    address = f"http://127.0.0.1:{site.port}/"
    with visit(browser, address, *request.param, expected="getImageData|Not Found") as page:
        yield page


def numbers(page: Page) -> list[int]:
    """The features whose tiles are in the page and loaded."""
    return [int(href.rpartition("/")[2]) for href in page.locator(".tile a").evaluate_all("all => all.map(a => a.href)")]


def ink(page: Page, canvas: str) -> int:
    """How many pixels are drawn on a canvas."""
    script = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v).length"
    return page.locator(canvas).first.evaluate(script)


def test_a_wall_is_scrolled_to_its_end_with_few_tiles_in_the_page(page: Page):
    assert numbers(page)[0] == 0 and ink(page, ".tile canvas") > 0
    page.locator("select[name=sort]").select_option("feature")
    page.wait_for_url("**sort=feature**")
    page.locator("input[name=ascending]").check()
    page.wait_for_url("**ascending=true**")
    height = page.evaluate("document.documentElement.scrollHeight")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_selector(f'.tile a[href$="/{FEATURES - 1}"]')
    page.wait_for_function("!document.querySelector('[aria-busy]')")
    assert numbers(page) == [*range(FEATURES - len(numbers(page)), FEATURES)] and len(numbers(page)) < FEATURES / 2
    assert abs(page.evaluate("document.documentElement.scrollHeight") - height) < 2, "the page does not jump"
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_selector('.tile a[href$="/0"]')


def test_a_feature_is_found_by_words_and_looked_at(page: Page):
    page.get_by_role("searchbox", name="Search the features").fill("red")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=detects red, AP 0.90")
    page.locator(".tile a").first.click()
    page.wait_for_url("**/1")
    canvas = page.locator(".examples canvas").first
    canvas.scroll_into_view_if_needed()
    outline = ink(page, ".examples canvas")
    page.locator("select[name=style]").select_option("heat")
    assert 0 < outline != ink(page, ".examples canvas") > 0
    page.locator("select[name=style]").select_option("plain")
    assert ink(page, ".examples canvas") == 0
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    assert page.locator("#value").text_content() == "2.00 at row 0, column 0"
    page.mouse.move(box["x"] + 3 * box["width"] / 4, box["y"] + box["height"] / 4)
    assert page.locator("#value").text_content() == "0.00 at row 0, column 1"
    page.reload()
    assert "feature 1" in (page.locator("h1").text_content() or "")


def test_an_address_holds_what_is_shown(page: Page):
    page.locator("input[name=where]").fill("peak>390")
    page.keyboard.press("Enter")
    page.wait_for_url("**where=peak**")
    shown = numbers(page)
    assert len(shown) == 10 and "concept=" not in page.url, "empty fields are not in the address"
    page.reload()
    assert numbers(page) == shown and page.locator("input[name=where]").input_value() == "peak>390"
    page.locator("input[name=where]").fill("beauty>1")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The column 'beauty' is unknown")
    page.go_back()
    page.wait_for_selector("text=10 features")
