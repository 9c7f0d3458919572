"""Painting in a real browser: prompt, features, a brush with a mouse and a finger, undo, links, files, two tabs, cancel."""

# ruff: noqa: F811 (fixtures of other files)

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, CDPSession, Page, expect
from real_browser import browser  # noqa: F401 (a fixture)
from test_web import Site
from test_web_paint import LABEL, SITE, SlowModel, feature, site, study  # noqa: F401 (fixtures)

from difflex.cli import main
from difflex.images import contact_sheet
from difflex.study import Study
from difflex.web import Studio
from difflex.web.studio import PaintChoices

ERASED = [0, 0, 0, 255, 0, 0] + [0] * 6 + [0, 0, 0, 255, 0, 0] * 2
PIXELS = """async image => {
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  return [canvas.height, canvas.width, [...pen.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""


@pytest.fixture
def tabs(browser: Browser) -> Iterator[ExitStack]:
    """Closes pages and checks that nothing was wrong in them."""
    with ExitStack() as stack:
        yield stack


def open_page(browser: Browser, tabs: ExitStack, site: Site, query: str = "", width: int = 1400) -> Page:
    context = browser.new_context(viewport={"width": width, "height": 900}, has_touch=width < 500, accept_downloads=True)
    page, problems = context.new_page(), list[str]()
    page.on(
        "console",
        lambda message: problems.extend(
            [message.text] * (not re.search("getImageData|Readback|Not Found|ERR_CONNECTION", message.text))
        ),
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"http://127.0.0.1:{site.port}/paint{query}")
    expect(page.locator(".offer").first).to_be_visible()

    def close() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the right"
        context.close()
        assert problems == []

    tabs.callback(close)
    return page


def shown(page: Page, pane: str) -> np.ndarray:
    """The pixels of the image in a pane, when nothing is being generated."""
    expect(page.locator(f"#{pane}")).not_to_have_class(re.compile("stale"))
    height, width, values = page.locator(f"#{pane} > img").evaluate(PIXELS)
    return np.array(values, dtype=np.uint8).reshape(height, width, 4)[..., :3]


def wait(page: Page) -> None:
    """Wait until what is in the page was generated."""
    expect(page.locator("#status")).to_have_text(re.compile(r"images? in [\d.]+ s"))
    expect(page.locator(".stale")).to_have_count(0)


def change(page: Page) -> None:
    """Forget the sentence of the former generation."""
    page.locator("#status").evaluate("node => node.textContent = ''")


def edit(page: Page) -> dict[str, object]:
    """The first edit that the address holds, its mask as levels."""
    return page.evaluate("""async () => {
      const { unpacked } = await import("/static/paint-state.js");
      const [edit] = (await unpacked(location.hash.slice(1))).edits;
      return { ...edit, mask: edit.mask && [...atob(edit.mask.weights)].map((letter) => letter.charCodeAt(0)) };
    }""")


def expect_edit(page: Page, is_right: Callable[[dict[str, object]], bool]) -> None:
    """Wait until the address holds an edit that is right."""
    for _ in range(100):
        if is_right(edit(page)):
            return
        page.wait_for_timeout(30)
    raise AssertionError(edit(page))


def pick(page: Page, name: str) -> None:
    """Click on one of several choices that are buttons in a row."""
    page.locator(".choice label", has_text=name).first.click()


def choose(page: Page, words: str) -> None:
    page.get_by_role("combobox", name="Paint with").fill(words)
    expect(page.locator("#found [role=option]").first).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")


def paint(page: Page, *tokens: tuple[int, int]) -> None:
    """Drag the mouse over tokens, given by row and column of 4 x 6."""
    box = page.locator("#mask").bounding_box()
    assert box is not None
    places = [
        (box["x"] + (column + 0.5) * box["width"] / 6, box["y"] + (row + 0.5) * box["height"] / 4) for row, column in tokens
    ]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()


def test_an_edit_is_painted_undone_reloaded_downloaded_and_replayed(
    browser: Browser,
    tabs: ExitStack,
    site: Site,
    study: Study,
    tmp_path: Path,
):
    page, number = open_page(browser, tabs, site), feature(study)
    page.get_by_label("Prompt").fill("star 1")
    page.get_by_label("Seed", exact=True).fill("3")
    wait(page)
    plain = shown(page, "unedited")
    choose(page, str(number))
    pick(page, "painted")
    expect(page.locator(".card-hint")).to_have_text("Paint on the unedited image where it should act.")
    change(page)
    paint(page, (1, 1), (1, 4))
    wait(page)
    expect_edit(page, lambda edit: edit["mask"] == [0] * 7 + [255] * 4 + [0] * 13)
    change(page)
    page.locator(".card").get_by_role("spinbutton", name="Strength").fill("3")
    wait(page)
    painted = shown(page, "edited")
    assert (shown(page, "unedited") == plain).all() and (painted != plain).any()
    change(page)
    page.locator(".card").get_by_role("spinbutton", name="Strength").fill("-3")
    wait(page)
    other = shown(page, "edited")
    assert (other != painted).any()
    page.keyboard.press("Control+z")
    assert (shown(page, "edited") == painted).all(), "without generating it again"
    page.get_by_role("button", name="Redo").click()
    assert (shown(page, "edited") == other).all()
    page.get_by_role("button", name="Undo").click()
    expect_edit(page, lambda edit: edit["strength"] == 3)
    page.reload()
    assert (shown(page, "edited") == painted).all() and page.get_by_label("Seed", exact=True).input_value() == "3"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download edit").click()
    download.value.save_as(tmp_path / "edit.json")
    assert main(["steer", str(study.folder), "--replay", str(tmp_path / "edit.json"), "--out", str(tmp_path / "sheet.png")]) == 0
    rows = [[Image.fromarray(plain), Image.fromarray(painted)]]
    expected = contact_sheet(rows, row_labels=["star 1, seed 3"], column_labels=["unedited", "add 3 peak"])
    assert (np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")) == np.asarray(expected.convert("RGB"))).all()
    page.get_by_role("button", name="Remove").click()
    page.locator("#file").set_input_files(tmp_path / "edit.json")
    assert (shown(page, "edited") == painted).all()
    page.locator("#file").set_input_files({"name": "x.json", "mimeType": "application/json", "buffer": b"{}"})
    expect(page.locator("#status.wrong")).to_have_text(re.compile("is not an edit"))


def test_a_mask_is_painted_with_a_finger_without_scrolling(
    browser: Browser,
    tabs: ExitStack,
    site: Site,
    study: Study,
):
    query = f"?site={SITE}&dictionary={LABEL}&feature={feature(study)}&prompt=star+2"
    page = open_page(browser, tabs, site, query, width=390)
    wait(page)
    pick(page, "painted")
    page.get_by_role("button", name="Larger").click()
    page.wait_for_timeout(100)  # it is scrolled into view
    box, before = page.locator("#mask").bounding_box(), page.evaluate("scrollY")
    assert box is not None
    touch = page.context.new_cdp_session(page)
    change(page)
    drag(touch, *[(box["x"] + box["width"] / 12, box["y"] + (row + 0.5) * box["height"] / 4) for row in range(4)])
    wait(page)
    expect_edit(page, lambda edit: edit["mask"] == [255, 0, 0, 0, 0, 0] * 4)
    assert page.evaluate("scrollY") == before
    pick(page, "Move")
    drag(touch, *[(box["x"] + (column + 0.5) * box["width"] / 6, box["y"] + box["height"] / 2) for column in (0, 1, 2)])
    expect_edit(page, lambda edit: edit["mask"] == [0, 0, 255, 0, 0, 0] * 4)
    page.locator("#mask").focus()
    page.keyboard.press("ArrowRight")
    expect_edit(page, lambda edit: edit["mask"] == [0, 0, 0, 255, 0, 0] * 4)
    pick(page, "Eraser")
    page.locator("#mask").focus()
    for key in ("ArrowRight", "Space"):
        page.keyboard.press(key)
    expect_edit(page, lambda edit: edit["mask"] == ERASED)
    page.get_by_role("button", name="Use its map").click()
    expect(page.locator("#tools-note")).to_have_text(re.compile("This is where it fires"))
    expect_edit(page, lambda edit: edit["mask"] != ERASED)


def drag(touch: CDPSession, *places: tuple[float, float]) -> None:
    """Move a finger over places."""
    for number, (x, y) in enumerate(places):
        kind = "touchMove" if number else "touchStart"
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_several_seeds_and_strengths_are_a_grid_and_differences_are_shown(
    browser: Browser,
    tabs: ExitStack,
    site: Site,
):
    page = open_page(browser, tabs, site)
    page.get_by_label("Seeds at once").select_option("2")
    page.get_by_label("several strengths").check()
    page.locator(".offer").first.click()
    wait(page)
    cells = page.locator(".cell img")
    expect(cells).to_have_count(12)
    assert len(set(cells.evaluate_all("all => all.map(image => image.src)"))) == 12
    page.locator(".cell").nth(7).click()
    assert page.locator(".cell[aria-pressed=true]").get_attribute("data-seed") == "1"
    pick(page, "Difference")
    expect(page.locator("#difference")).to_be_visible()
    page.locator(".card").first.get_by_role("button", name="Mute").click()
    expect(page.locator("#difference")).to_be_hidden()
    expect(page.locator(".cell")).to_have_count(2)
    choose(page, "lines")
    expect(page.locator(".card")).to_have_count(2)


def test_two_tabs_both_finish(browser: Browser, tabs: ExitStack, site: Site):
    pages = [open_page(browser, tabs, site, f"?prompt=star+{number}") for number in (5, 6)]
    for number, page in enumerate(pages):
        page.get_by_label("Seed", exact=True).fill(str(40 + number))
    for page in pages:
        page.get_by_role("button", name="Generate").click()
    for page in pages:
        wait(page)
    one, two = (shown(page, "unedited") for page in pages)
    assert (one != two).any()


def test_a_generation_is_cancelled_and_problems_are_sentences(
    browser: Browser,
    tabs: ExitStack,
    study: Study,
):
    model = SlowModel()
    studio = Studio(lambda: model, lambda: PaintChoices([], {}))
    site = Site(study, studio=studio)
    for close in (studio.close, lambda: model.go.release(1000), site.close):
        tabs.callback(close)
    page = open_page(browser, tabs, site, "?prompt=star&steps=100")
    model.go.release(3)
    expect(page.locator("#status")).to_have_text("Generating …")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    for _ in range(90):
        if studio.is_idle:
            break
        model.go.release(1)
        page.wait_for_timeout(20)
    assert studio.is_idle and model.made == []
    site.close()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status.wrong")).to_have_text(re.compile("The server does not answer"))


def test_without_a_model_the_page_says_so(study: Study):
    site = Site(study)
    page = site.get("/paint")
    assert page.status == 200 and "difflex serve" in page.text and 'href="/paint"' not in page.text
    assert json.loads(site.get("/api/paint").text)["error"]
    site.close()


def test_a_damaged_link_and_a_dictionary_that_is_unknown_are_sentences(browser: Browser, tabs: ExitStack, site: Site):
    page = open_page(browser, tabs, site, "#damaged")
    expect(page.locator("#status.wrong")).to_have_text(re.compile("The link is damaged"))
    page.evaluate(
        """async site => {
      const { newEdit, packed, START } = await import("/static/paint-state.js");
      const edit = newEdit({ site, dictionary: "<b>none</b>", features: [1], contrast: null });
      location.hash = await packed({ ...START, prompt: "star", edits: [edit] });
    }""",
        SITE,
    )
    expect(page.locator("#status.wrong")).to_have_text(re.compile("'double.1/<b>none</b>' is unknown"))
    assert page.locator(".card b").count() == 0
