"""The report in a real browser: on a phone and on a desktop, in light and dark."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from real_browser import browser  # noqa: F401 (a fixture)
from sample_study import control_study, full_study, new_study, write_anatomy, write_evaluation, write_matches

from difflex.evaluation.concepts import Concept
from difflex.report import write_report

VIEWS = [(width, scheme) for width in (390, 1400) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("usual")
    study = full_study(root / "study")
    write_evaluation(
        study,
        "double.2/topk-512-k16-seed1",
        fvu=None,
        similarity={"clip:openai/clip-vit-large-patch14-336": 0.987, "lpips": 0.031},
    )
    flags = {"study": ".", "dictionary": [f"double.2/topk-512-k{k}-standardise-lr0.0002-seed1" for k in (8, 16, 32)]}
    entry = {"verb": "evaluate", "flags": flags, "outputs": [], "seconds": 172_800.0, "finished": "2026-11-21T13:31:25+00:00"}
    (study.folder / "run.json").write_text(json.dumps({"format": 2, "recipe": "mini_full", "commands": [entry] * 3}))
    return write_report(study, control_study(root / "control"))[0]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on a large model: long names, many layers and timesteps, many dictionaries, concept groups and noise levels."""
    study = new_study(
        tmp_path_factory.mktemp("crowded") / "study", model="a-laboratory-with-a-name/A-Large-Model-of-Text-to-Image-v1.5"
    )
    blocks = [f"transformer.single_transformer_blocks.{i}" for i in range(57)]
    norms = {site: {1000.0 - 35 * t: 1e5 / (1 + i + t) for t in range(28)} for i, site in enumerate(blocks)}
    write_anatomy(
        study, norms=norms | {f"{site}:text": by for site, by in norms.items()}, variances=[1 / (i + 1) ** 2 for i in range(3072)]
    )
    levels, groups = (
        [i / 10 for i in range(1, 10)],
        ["shape", "a group with a rather long name", *(f"group {i}" for i in range(12))],
    )
    concepts = tuple(Concept(f"concept {i}", group) for i, group in enumerate(groups))
    for i, site in enumerate((blocks[9], blocks[18], "down_blocks.2.attentions.1.transformer_blocks.3:update")):
        for size in (16384, 32768, 65536):
            for k in (32, 48, 64):
                write_evaluation(
                    study, f"{site}/topk-{size}-k{k}-paper-standardise-lr0.0002-seed1", fvu=size / 3e5 + i / k, dead=size // 9
                )
        write_evaluation(study, f"{site}/itda-61234-k64-over0.3-gradient-first100000", fvu=0.1)
        write_evaluation(study, f"{site}/topk-65536-k64-paper-none-lr0.0002-seed1", fvu=0.5, dead=65000, normalisation="none")
        write_matches(
            study,
            f"{site}/topk-65536-k64-paper-none-lr0.0002-seed1",
            [0.9 - j / 20 for j in range(14)],
            levels=levels,
            concepts=concepts,
        )
        write_matches(study, f"{site}/pca-6144-k64", [0.5 - j / 40 for j in range(14)], levels=levels, concepts=concepts)
    return write_report(study)[0]


def open_page(browser: Browser, page: Path, width: int, scheme: str) -> Iterator[Page]:  # noqa: F811 (the fixture)
    """Yield `page` in a window; requests to the network and messages on the console are errors."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce"
    )
    view, urls, messages = context.new_page(), [], []
    view.on("request", lambda request: urls.append(request.url))
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.goto(page.as_uri())
    yield view
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == [] and messages == []
    context.close()


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def view(request: pytest.FixtureRequest, browser: Browser, usual: Path) -> Iterator[Page]:  # noqa: F811 (the fixture)
    yield from open_page(browser, usual, *request.param)


@pytest.fixture(params=VIEWS[::3], ids=lambda view: f"{view[0]}-{view[1]}")
def full(request: pytest.FixtureRequest, browser: Browser, crowded: Path) -> Iterator[Page]:  # noqa: F811 (the fixture)
    yield from open_page(browser, crowded, *request.param)


@pytest.fixture
def desk(browser: Browser, usual: Path) -> Iterator[Page]:  # noqa: F811 (the fixture)
    yield from open_page(browser, usual, 1400, "light")


@pytest.fixture
def phone(browser: Browser, usual: Path) -> Iterator[Page]:  # noqa: F811 (the fixture)
    yield from open_page(browser, usual, 390, "light")


TOO_WIDE = """() => {
  const page = document.documentElement, errors = [];
  if (page.scrollWidth > page.clientWidth) errors.push(`page ${page.scrollWidth}`);
  for (const part of document.querySelectorAll("h1, h2, h3, p, li, dd, dt, figcaption, .panel, .claim, .legend button, pre")) {
    if (part.closest(".box")) continue;  // which scrolls, and says so
    const box = part.getBoundingClientRect();
    if (box.right > page.clientWidth + 0.5 || box.left < -0.5) errors.push(part.outerHTML.slice(0, 90));
    const over = part.clientWidth && part.scrollWidth > part.clientWidth + 1;
    if (over && part.tagName !== "PRE") errors.push(`cut: ${part.innerText}`);
  }
  return errors;
}"""

CUT_OR_OVERLAPPING = """() => {
  const errors = [];
  for (const drawing of document.querySelectorAll("svg.drawing")) {
    const whole = drawing.getBoundingClientRect();
    const texts = [...drawing.querySelectorAll("text")].filter((text) => text.textContent).map((text) => {
      const box = text.getBoundingClientRect();
      return { words: text.textContent, left: box.left, right: box.right, top: box.top + 2, bottom: box.bottom - 2 };
    });
    for (const text of texts) {
      const across = text.left < whole.left - 1 || text.right > whole.right + 1;
      if (across || text.top < whole.top - 1 || text.bottom > whole.bottom + 1) errors.push(`cut: ${text.words}`);
    }
    texts.forEach((a, i) => texts.slice(i + 1).forEach((b) => {
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.5) errors.push(`${a.words} / ${b.words}`);
    }));
  }
  return errors;
}"""

MEANINGS = """() => {
  const errors = [];
  for (const name of document.querySelectorAll(".meanings dt")) {
    const [term, meaning] = [name, name.nextElementSibling].map((part) => part.getBoundingClientRect());
    if (term.right > meaning.left || name.scrollWidth > name.clientWidth + 1) errors.push(name.innerText);
    if (meaning.width < 150) errors.push(`narrow: ${name.nextElementSibling.innerText}`);
  }
  return errors;
}"""

CARDS = """() => {
  const errors = [], boxes = [...document.querySelectorAll(".claim, figure .panel, section > h2, figcaption, .cards > li")]
    .filter((card) => card.checkVisibility())  // others are folded away
    .map((card) => [card.className || card.tagName, card.getBoundingClientRect()]);
  boxes.forEach(([first, a], i) => boxes.slice(i + 1).forEach(([second, b]) => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
      errors.push(`${first} ${a.top} / ${second} ${b.top}`);
  }));
  return errors;
}"""


def test_nothing_is_wider_than_the_window(view: Page):
    assert view.evaluate(TOO_WIDE) == []


def test_the_meanings_of_columns_fit_into_the_window(view: Page):
    view.locator("#reconstruction summary").click()
    assert view.locator(".meanings dd", has_text="for equal images").count() == 2
    assert view.evaluate(TOO_WIDE) == [] and view.evaluate(MEANINGS) == []


def test_texts_of_figures_are_not_cut_and_do_not_overlap(view: Page):
    assert view.locator("svg.drawing text").count() > 100
    assert view.evaluate(CUT_OR_OVERLAPPING) == []


def test_cards_captions_and_figures_do_not_overlap(view: Page):
    assert view.evaluate(CARDS) == []


def test_a_large_study_fits_as_well(full: Page):
    assert full.evaluate(TOO_WIDE) == [] and full.evaluate(CUT_OR_OVERLAPPING) == [] and full.evaluate(CARDS) == []


def test_letters_are_large_enough_to_read(view: Page):
    sizes = view.evaluate(
        "() => [...document.querySelectorAll('svg.drawing text.tick')].map((text) => {"
        " const own = text.ownerSVGElement; return 12 * own.getBoundingClientRect().width / own.viewBox.baseVal.width; })"
    )
    assert min(size for size in sizes if size) >= 10  # others are folded away


def test_the_page_follows_the_colour_scheme_of_the_browser(view: Page):
    dark = view.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    background = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark


def column_texts(view: Page, number: int) -> list[str]:
    return view.locator(f".sortable tbody tr > :nth-child({number})").all_text_contents()


def test_clicking_a_column_sorts_by_it_and_clicking_again_reverses_the_order(desk: Page):
    head = desk.locator(".sortable thead th").nth(3)
    assert "FVU" in head.inner_text()
    unsorted = column_texts(desk, 4)
    head.locator("button").click()
    up = column_texts(desk, 4)
    head.locator("button").click()
    down = column_texts(desk, 4)
    numbers = [value for value in up if value != "\u2013"]
    assert up != unsorted and numbers == sorted(numbers, key=float) and up[-1] == down[-1] == "\u2013"
    assert down[:-1] == sorted(numbers, key=float, reverse=True) and head.get_attribute("aria-sort") == "descending"
    names = desk.locator(".sortable thead th").first
    names.locator("button").click()
    assert column_texts(desk, 1)[0].startswith("double.1/itda-508-k8") and head.get_attribute("aria-sort") is None


def test_the_first_feature_is_on_the_first_screen(view: Page):
    box = view.locator("main img").first.bounding_box()
    assert box is not None and box["y"] + box["height"] <= 900 and box["height"] > 100


def test_a_feature_opens_large_with_all_its_images(desk: Page):
    desk.locator("#wall .zoom").first.click()
    dialog = desk.locator("#zoom")
    assert dialog.is_visible() and dialog.locator("img").count() == 5
    assert "of double.1/topk-1024-k16" in dialog.locator("h2").inner_text()
    dialog.locator("button").click()
    assert not dialog.is_visible()


def test_what_scrolls_sideways_says_so_until_its_end(phone: Page):
    box = phone.locator("#reconstruction .box").first
    assert "more" in str(box.get_attribute("class"))
    box.evaluate("(box) => { box.scrollLeft = box.scrollWidth; }")
    phone.wait_for_function("() => !document.querySelector('#reconstruction .box').classList.contains('more')")
    cut = "() => [...document.querySelectorAll('.box')].filter((box) => box.scrollWidth > box.clientWidth + 2 && !box.scrollLeft)"
    assert phone.evaluate(f"({cut})().every((box) => box.classList.contains('more'))")


def test_a_figure_is_enlarged_by_its_button(desk: Page):
    drawing = desk.locator("#figure-timesteps svg.drawing").first
    before = drawing.bounding_box()
    desk.locator("#figure-timesteps .enlarge").click()
    after = drawing.bounding_box()
    assert before and after and after["width"] > 1.5 * before["width"]


def test_a_table_scrolls_inside_its_own_box(phone: Page):
    box = phone.locator("#reconstruction .box")
    assert box.evaluate("(box) => box.scrollWidth > box.clientWidth && box.getBoundingClientRect().right <= innerWidth")


def test_the_names_of_dictionaries_stay_visible_while_the_table_scrolls(desk: Page):
    covering = desk.locator("#reconstruction .box").evaluate(
        """(box) => {
          box.scrollIntoView();
          const name = box.querySelector("thead th"), covering = [];
          for (let far = 0; far <= box.scrollWidth - box.clientWidth; far += 7) {
            box.scrollLeft = far;
            const own = name.getBoundingClientRect();
            for (let x = own.left + 4; x < own.right - 4; x += 4) {
              const top = document.elementFromPoint(x, (own.top + own.bottom) / 2);
              if (!name.contains(top)) covering.push(`${top.innerText} at ${x}`);
            }
          }
          return covering;
        }"""
    )
    assert covering == []


def test_a_button_of_a_legend_hides_its_series_and_shows_it_again(desk: Page):
    figure = desk.locator("#figure-sweep")
    button = figure.locator(".legend button").first
    series = button.get_attribute("data-series")
    parts = figure.locator(f'svg.drawing [data-series="{series}"]')
    others = figure.locator(f'svg.drawing [data-series]:not([data-series="{series}"])')
    assert parts.count() == 3 and parts.first.is_visible()
    button.click()
    assert not any(part.is_visible() for part in parts.all()) and others.first.is_visible()
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert parts.first.is_visible() and button.get_attribute("aria-pressed") == "true"
    assert desk.locator(f'#figure-sites svg.drawing [data-series="{series}"]').count() == 0  # only its own figure


def test_pointing_at_a_mark_shows_its_numbers(desk: Page):
    mark = desk.locator("#figure-sweep [data-tip]").first
    tip = desk.locator("#tip")
    assert not tip.is_visible()
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    assert box is not None
    desk.mouse.move(box["x"] + 9, box["y"] - 5)  # near it is enough
    tip.wait_for(state="visible")  # a busy browser is a little late
    assert tip.inner_text() == mark.get_attribute("data-tip")
    own = tip.bounding_box()
    assert own is not None and own["x"] >= 0 and own["x"] + own["width"] <= 1400
    desk.mouse.move(0, 0)
    tip.wait_for(state="hidden")


def test_arrow_keys_show_the_numbers_of_one_mark_after_another(desk: Page):
    desk.locator("#figure-sweep svg.drawing").first.focus()
    marks = desk.locator("#figure-sweep svg.drawing").first.locator("[data-tip]")
    desk.wait_for_timeout(100)  # until the page has scrolled there
    tips = []
    for _ in range(3):
        desk.keyboard.press("ArrowRight")
        tips.append(desk.locator("#tip").inner_text())
    assert tips == [marks.nth(i).get_attribute("data-tip") for i in range(3)]
    desk.keyboard.press("Escape")
    assert not desk.locator("#tip").is_visible()


def test_a_download_gives_the_file_of_the_figure(desk: Page, usual: Path):
    with desk.expect_download() as download:
        desk.locator("#figure-effect .files a").click()
    assert download.value.suggested_filename == "effect.csv"
    assert Path(download.value.path()).read_bytes() == (usual.parent / "report" / "effect.csv").read_bytes()
