"""The map of a dictionary, votes and comparisons in a real browser, with a mouse and on a phone."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, CDPSession, Page
from real_browser import browser, visit  # noqa: F401 (a fixture)
from sample_study import new_study, write_book, write_dictionary, write_matches
from test_web import Site
from test_web_browser import ink, numbers

from difflex.features.entries import FeatureNeighbour

SAE = "double.1:smooth/topk-60-k4"
OTHER = "double.1:smooth/itda-60-k4"
FEATURES = 60


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    study = new_study(tmp_path_factory.mktemp("map") / "study")
    write_dictionary(study, SAE)
    neighbours = {
        f: [FeatureNeighbour(10 * (f // 10) + (f + step) % 10, "direction", 0.9 - 0.1 * step) for step in (1, 2, 3)]
        for f in range(FEATURES)
    }
    write_book(study, SAE, features=FEATURES, explained={9: ("stars", 0.9)}, neighbours=neighbours)
    write_matches(study, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=2)
    write_dictionary(study, OTHER)
    write_book(study, OTHER, features=FEATURES)
    site = Site(study)
    yield site
    site.close()


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, site: Site) -> Iterator[Page]:  # noqa: F811 (the fixture)
    with visit(browser, f"http://127.0.0.1:{site.port}/map/{SAE}", *request.param) as page:
        page.wait_for_selector("[data-ready]")
        page.wait_for_timeout(50)
        yield page


def is_phone(page: Page) -> bool:
    return (page.viewport_size or {"width": 0})["width"] < 500


def corners(page: Page) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the map in the window."""
    page.locator(".map canvas").scroll_into_view_if_needed()
    box = page.locator(".map canvas").bounding_box()
    assert box is not None
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def swipe(page: Page, paths: list[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    """Draw each finger from one point to another."""
    touch: CDPSession = page.context.new_cdp_session(page)
    for share in (0.0, 0.3, 0.6, 1.0):
        points = [
            {"x": a[0] + share * (b[0] - a[0]), "y": a[1] + share * (b[1] - a[1]), "id": i} for i, (a, b) in enumerate(paths)
        ]
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove" if share else "touchStart", "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    if is_phone(page):
        swipe(page, [(start, end)])
        return
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    page.mouse.move(*end)
    page.mouse.up()


def test_a_rectangle_on_the_map_opens_the_wall_of_its_features(page: Page):
    assert ink(page, ".map canvas") > 100
    left, top, right, bottom = corners(page)
    page.get_by_text("select", exact=True).click()
    drag(page, (left + 2, top + 2), ((left + right) / 2, bottom - 2))
    page.wait_for_url("**within=0,0,0.5*")
    assert 0 < len(numbers(page)) < FEATURES and "in a part of the map" in page.inner_text("#controls")
    page.get_by_label("Remove: in a part of the map").click()
    page.wait_for_selector(f"text={FEATURES} features")


def test_a_feature_on_the_map_is_shown_and_opened(page: Page):
    left, top, right, bottom = corners(page)
    side = 0.94 * min(right - left, bottom - top)
    script = "fetch(`/api${location.pathname.replace('/map/', '/dictionaries/')}/map/places`).then(a => a.arrayBuffer())"
    x, y = page.evaluate(f"{script}.then(b => [...new Uint16Array(b)].slice(34, 36).map(v => v / 65534))")
    where = (left + right) / 2 + (x - 0.5) * side, (top + bottom) / 2 + (y - 0.5) * side
    if is_phone(page):
        page.touchscreen.tap(*where)
        page.wait_for_selector("#shown:not([hidden])")
        page.locator("#shown").tap()
    else:
        page.mouse.move(*where)
        page.wait_for_selector("#shown:not([hidden])")
        assert "feature 17" in page.inner_text("#shown") and ink(page, "#shown canvas") > 0
        page.mouse.click(*where)
    page.wait_for_url("**/17")
    page.get_by_text("On the map").click()
    page.wait_for_url("**/map/**feature=17")
    page.wait_for_selector("#shown:not([hidden]) >> text=feature 17")


def test_the_map_is_zoomed_moved_and_coloured(page: Page):
    left, top, right, bottom = corners(page)
    middle = (left + right) / 2, (top + bottom) / 2
    whole = page.evaluate("document.querySelector('.map canvas').toDataURL()")

    def changed(since: str) -> str:
        page.wait_for_function("old => document.querySelector('.map canvas').toDataURL() !== old", arg=since, polling=50)
        return page.evaluate("document.querySelector('.map canvas').toDataURL()")

    if is_phone(page):
        swipe(
            page,
            [
                ((middle[0] - 20, middle[1]), (middle[0] - 80, middle[1])),
                ((middle[0] + 20, middle[1]), (middle[0] + 80, middle[1])),
            ],
        )
    else:
        page.mouse.move(*middle)
        page.mouse.wheel(0, -300)
    zoomed = changed(whole)
    drag(page, middle, (middle[0] + 60, middle[1] + 40))
    changed(zoomed)
    page.get_by_role("button", name="Whole map").click()
    page.locator(".map canvas").focus()
    fitted = page.evaluate("document.querySelector('.map canvas').toDataURL()")
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    changed(fitted)
    page.locator("#colour").select_option("peak")
    page.wait_for_selector(".legend .scale")
    assert "colour=peak" in page.url and "60" in page.inner_text("#legend")


def test_a_vote_stays_after_a_reload(page: Page, site: Site):
    page.goto(f"http://127.0.0.1:{site.port}/d/{SAE}/9")
    disagree = page.locator(".votes button[value=false]").first
    agree = page.locator(".votes button[value=true]").first
    agree.click()
    page.wait_for_selector(".votes button[value=true][aria-pressed=true]")
    page.reload()
    assert agree.get_attribute("aria-pressed") == "true" and re.fullmatch(r"Agree \d", agree.inner_text().strip())
    disagree.click()
    page.wait_for_selector(".votes button[value=false][aria-pressed=true]")
    assert agree.get_attribute("aria-pressed") == "false"


def test_a_feature_is_compared_with_those_of_another_dictionary(page: Page, site: Site):
    page.goto(f"http://127.0.0.1:{site.port}/d/{SAE}/9")
    page.get_by_label("Compare with").select_option(OTHER)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**/compare?**feature=9**")
    assert "similarity 1.00" in page.inner_text(".compare") and ink(page, ".compare .small canvas") > 0
    page.get_by_role("link", name="Compare by concepts").click()
    page.wait_for_selector(".pairs")
    assert page.locator(".pairs h2").all_inner_texts() == ["red", "blue", "star"]
