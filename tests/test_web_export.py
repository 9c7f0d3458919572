"""`difflex export-html`: a study as static files, on a host that serves them in a sub-folder, in a real browser."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page
from real_browser import browser  # noqa: F401 (a fixture)
from sample_study import new_study, write_book, write_dictionary, write_matches

from difflex.cli import main
from difflex.study import Study

SAE, OTHER = "double.1:smooth/topk-150-k4", "double.2/topk-12-k4"
IMAGE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = new_study(tmp_path_factory.mktemp("export") / "study")
    write_dictionary(study, SAE)
    write_book(
        study, SAE, features=150, explained={149: (f"the last one {IMAGE}", 0.9), 7: ("ladders", 0.7)}, captions={0: IMAGE}
    )
    write_matches(study, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=2)
    write_dictionary(study, OTHER)
    write_book(study, OTHER, explained={10: ("ladders", 0.6)})
    return study


@pytest.fixture(scope="module")
def export(study: Study) -> Path:
    out = study.folder.parent / "host" / "a sub folder" / "export"
    assert main(["export-html", str(study.folder), "--out", str(out), "--features", "140"]) == 0
    return out


@pytest.fixture(scope="module")
def address(export: Path) -> Iterator[str]:
    words = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(export.parents[1])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as host:
        assert host.stdout is not None
        [port] = re.findall(r"port (\d+)", host.stdout.readline())
        yield f"http://127.0.0.1:{port}/a%20sub%20folder/export/"
        host.kill()


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:  # noqa: F811 (the fixture)
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500)
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.extend([message.text] * (message.type == "error")))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the right"
    context.close()
    assert problems == []


def numbers(page: Page) -> list[int]:
    """The features whose tiles are in the page, when all are loaded."""
    page.wait_for_function("document.querySelector('.tile a') && !document.querySelector('[aria-busy]')")
    return [
        int(re.findall(r"(\d+)\.html$", href)[0]) for href in page.locator(".tile a").evaluate_all("all => all.map(a => a.href)")
    ]


def test_an_exported_wall_is_sorted_filtered_and_scrolled(page: Page):
    page.wait_for_selector("text=140 features; 140 of 150 are exported")
    assert numbers(page)[:4] == [0, 4, 1, 5]
    page.locator("select[name=sort]").select_option("peak")
    page.wait_for_url("**sort=peak**")
    page.wait_for_selector('.tile a[href$="/149.html"]')
    assert numbers(page)[:3] == [149, 138, 137]
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_selector('.tile a[href$="/0.html"]')
    page.locator("input[name=where]").fill("peak>130, peak<=135")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=5 features")
    assert numbers(page) == [134, 133, 132, 131, 130]
    page.goto(page.url.partition("?")[0] + "?concept=red&ascending=true")
    page.wait_for_selector("text=2 features")
    assert numbers(page) == [0, 4] and page.locator("select[name=concept]").input_value() == "red"
    page.goto(page.url.partition("?")[0] + "?q=ladder")
    page.wait_for_selector("text=1 feature")
    assert numbers(page) == [7]
    page.goto(page.url.partition("?")[0] + "?where=beauty>1")
    page.wait_for_selector("text=The column 'beauty' is unknown")


def test_an_exported_search_leads_to_pages_with_maps(page: Page):
    page.get_by_role("searchbox", name="Search the features").fill("ladders")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=explained as 'ladders', accuracy 0.80")
    assert numbers(page) == [7, 10] and "search.html" in page.url
    page.locator(".tile a").first.click()
    page.wait_for_url("**/7.html")
    canvas = page.locator(".examples canvas").first
    canvas.scroll_into_view_if_needed()
    script = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 == 3 && v)"
    assert canvas.evaluate(script), "the outline is drawn"
    assert page.locator(".examples img").first.evaluate("image => image.complete && image.naturalWidth") == 8
    assert page.locator(".votes, .actions").count() == 0
    page.locator("main a").first.click()
    page.wait_for_selector("text=140 features")
    page.locator("#dictionary").select_option(OTHER)
    page.wait_for_selector("text=12 features")
    page.locator(".home").click()
    page.wait_for_url("**/export/index.html")


def test_every_link_of_an_export_leads_to_a_file_of_it(export: Path):
    pages = [*export.rglob("*.html")]
    assert len(pages) == 140 + 12 + 2 + 2
    for page in pages:
        text = page.read_text()
        assert IMAGE not in text
        for link in re.findall(r'(?:href|src|action)="([^"#]+)"', text):
            assert not urlsplit(link).scheme and not link.startswith("/"), (page, link)
            assert (page.parent / link.partition("?")[0]).is_file(), (page, link)
        placeholders = re.findall(r"<a(?=[ >])(?![^>]*href=)(?! class=\"picture\")[^>]*>", text)
        assert not placeholders, (page, placeholders, "what needs a server is not in an export")
    for file in export.rglob("*.js"):
        assert '"/' not in file.read_text().replace('"/api', "") or file.name == "feature.js", file
        assert not file.name.startswith("paint")
    for file in export.rglob("*.json"):
        json.loads(file.read_text())


def test_an_export_replaces_only_an_export(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out, words = tmp_path / "out", ["export-html", str(study.folder), "--dictionary", OTHER]
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main([*words, "--out", str(out)]) == 2 and "is no export of difflex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    monkeypatch.chdir(out)
    assert main([*words, "--out", "."]) == 2 and main([*words, "--out", "/"]) == 2
    out = tmp_path / "new"
    (tmp_path / ".new.partial" / "d").mkdir(parents=True)
    (tmp_path / ".new.partial" / "left.html").write_text("by a killed process")
    assert main([*words, "--out", str(out)]) == 0
    assert "all 12 features" in capsys.readouterr().out and not (out / "left.html").exists()
    (out / "older.html").write_text("")
    assert main([*words, "--out", str(out)]) == 0
    assert not (out / "older.html").exists() and {path.name for path in tmp_path.iterdir()} == {"out", "new"}
    assert main(["export-html", str(study.folder), "--out", str(tmp_path / "x"), "--dictionary", "double.9/none"]) == 2
    assert not (tmp_path / "x").exists()
