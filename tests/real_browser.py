"""A fixture: an installed browser, driven by Playwright. Without one tests are skipped, or fail with DIFFLEX_BROWSER=required."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

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
