"""A fixture: an installed browser, driven by Playwright. Without one tests are skipped, or fail with DIFFLEX_BROWSER=required."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        (pytest.fail if os.environ.get("DIFFLEX_BROWSER") == "required" else pytest.skip)(
            f"no browser: install chromium, so that one of {', '.join(BROWSERS)} is on the path"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*OPTIONS, "--no-first-run"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, address: str, width: int, scheme: str, expected: str = "getImageData") -> Iterator[Page]:
    """Open a page, on a phone if it is narrow; at the end nothing is cut off, and the console has only `expected` messages."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500)  # pyright: ignore
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.extend([message.text] * (not re.search(expected, message.text))))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the right"
    context.close()
    assert problems == []
