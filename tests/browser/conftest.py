"""One browser for each file of tests: the system's Chromium, by Playwright. Without either the tests skip."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

COMMANDS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator["BrowserContext"]:
    """A browser without a window. It ends with the file's last test: Playwright's loop must not stay in
    the way of tests that run one of their own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    command = next(filter(None, map(shutil.which, COMMANDS)), None)
    if command is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=command)
        yield browser.new_context()
        browser.close()
