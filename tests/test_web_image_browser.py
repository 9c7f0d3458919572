"""The page of an image in a real browser: maps, steps, places by mouse, touch and keyboard, and readings that were dropped."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, Page, expect
from real_browser import browser, visit  # noqa: F401 (a fixture)
from test_web import Site
from test_web_browser import ink
from test_web_image import NEURONS, SAE, KnownModel, known  # noqa: F401 (a fixture)

NEW = "/image?prompt=a+star&seed=3"


class Open(NamedTuple):
    """A page in a browser, the server's address and its model."""

    page: Page
    root: str
    model: KnownModel
    has_touch: bool

    def touch(self, right: float, down: float) -> None:
        """Click or tap on the image, at shares of its width and height."""
        box = self.page.locator("#overlay").bounding_box()
        assert box is not None
        place = (box["x"] + right * box["width"], box["y"] + down * box["height"])
        self.page.touchscreen.tap(*place) if self.has_touch else self.page.mouse.click(*place)

    def features(self) -> list[int]:
        return self.page.locator("#features li").evaluate_all("all => all.map(item => Number(item.dataset.feature))")


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=["desk", "phone"])
def opened(request: pytest.FixtureRequest, browser: Browser, known: tuple[Site, KnownModel]) -> Iterator[Open]:  # noqa: F811 (the fixture)
    with visit(browser, "about:blank", *request.param, expected="getImageData|Not Found") as page:
        page.set_default_timeout(10_000)
        yield Open(page, f"http://127.0.0.1:{known[0].port}", known[1], request.param[0] < 500)


def test_a_new_image_is_read_and_asked_about(opened: Open):
    page = opened.page
    page.goto(f"{opened.root}/image")
    page.get_by_label("Prompt").fill("a star")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_url("**/image?prompt=a+star&seed=3&steps=")
    page.wait_for_selector('#features li[data-feature="3"]')
    assert page.locator("output[name=at]").text_content() == "2 of 2, t 500"
    assert "text tokens" in (page.locator("#progress").text_content() or "")
    assert page.locator(".frame img").get_attribute("src", timeout=1000).startswith("/generated/")  # pyright: ignore
    assert ink(page, "#features canvas") > 0 and ink(page, "#overlay") > 0
    page.locator("select[name=order]").select_option("peak")
    expect(page.locator("#count")).to_contain_text("strongest in shares")
    page.locator('[data-feature="3"] button').click()
    assert page.locator('[data-feature="3"] button').get_attribute("aria-pressed") == "true"
    assert (page.locator("#chosen").text_content() or "").startswith("feature 3 4.00 at most, 100 % of its peak, on 25 %")
    opened.touch(0.75, 0.75)
    page.wait_for_selector("#features.here li")
    assert opened.features() == [3, 2] and page.locator("#where").text_content() == "At row 1, column 1"
    assert "Row 1, column 1: feature 3 100 %, star 50 %" in (page.locator("#spoken").text_content() or "")
    assert "feature=3" in (page.locator(".here .more a").first.get_attribute("href") or "")
    page.locator(".here .more button").nth(1).click()
    page.wait_for_selector("#chosen >> text=feature 2: 1.50 at most")
    page.locator("#whole").click()
    page.wait_for_selector("#features:not(.here) li")
    page.reload()
    page.wait_for_selector('#features li[data-feature="3"]')


def test_another_step_shows_the_maps_of_that_step(opened: Open):
    page = opened.page
    page.goto(opened.root + NEW)
    page.wait_for_selector('#features li[data-feature="3"]')
    page.locator("input[name=step]").fill("0")
    expect(page.locator("output[name=at]")).to_have_text("1 of 2, t 1000")
    expect(page.locator("#features li")).to_have_count(2)
    page.locator("select[name=dictionary]").select_option(NEURONS)
    expect(page.locator("#features .name").first).to_have_text("feature 1")
    expect(page.locator("#features .name").last).to_have_text("feature 2")


def test_the_keyboard_moves_over_the_tokens(opened: Open):
    page = opened.page
    page.goto(opened.root + NEW)
    page.wait_for_selector("#features li")
    page.locator("#overlay").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#features.here")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#where")).to_have_text("At row 0, column 0")
    expect(page.locator("#spoken")).to_have_text("Row 0, column 0: blue 100 %, star 50 %")
    assert opened.features() == [1, 2]
    page.keyboard.press("Escape")
    page.wait_for_selector("#features:not(.here) li")


def test_an_image_that_was_dropped_is_read_again(opened: Open):
    page = opened.page
    page.goto(opened.root + NEW)
    page.wait_for_selector("#features li")
    dropped = list[str]()

    def drop(route) -> None:
        if dropped:
            route.continue_()
        else:
            dropped.append(route.request.url)
            route.fulfill(status=404, json={"error": "This image is not kept in memory any more. Read it again."})

    page.route("**/api/readings/*/at*", drop)
    with page.expect_request("**/api/read"):
        opened.touch(0.25, 0.25)
    page.wait_for_selector("#features.here li")
    assert opened.features() == [1, 2] and dropped


def test_an_image_of_a_book_is_shown_at_once_and_read_on_demand(opened: Open):
    page = opened.page
    page.goto(f"{opened.root}/image/{SAE}/6")
    assert opened.features() == [1] and ink(page, "#overlay") > 0
    if not opened.has_touch:
        box = page.locator("#overlay").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
        assert page.locator("#value").text_content() == "2.00 at row 0, column 0"
    opened.touch(0.75, 0.75)
    page.wait_for_selector("text=known to fire here: none.")
    page.locator("#whole").click()
    page.locator("#read").click()
    page.wait_for_selector('#features li[data-feature="2"]')
    assert page.locator("#read").is_hidden() and page.locator("#known").count() == 0
    page.goto(f"{opened.root}/image/{SAE}/6")
    page.locator("select[name=dictionary]").select_option(NEURONS)
    page.wait_for_url(f"**/image/{NEURONS}/6")
