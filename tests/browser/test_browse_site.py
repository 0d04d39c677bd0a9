"""The built documentation in a browser; `make check-site` builds it and runs this.

Only with CLASSFILTERS_SITE, the folder of its pages: what an older build holds says nothing of the sources.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python")
pytest.importorskip("playwright", reason="needs playwright")
from tests.browser.browsing import complaints, dead_links, opened, untold_pictures

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

FOLDER = os.environ.get("CLASSFILTERS_SITE", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs CLASSFILTERS_SITE, a built documentation")
#: Start page, a tutorial, a page of the API and one of an object, a how-to, and pages of pictures.
PAGES = (
    "index.html",
    "tutorials/01_class_filters_in_five_minutes.html",
    "api/index.html",
    "api/objects/captum_classfilters.LayerFilterContribution.html",
    "atlas.html",
    "gallery.html",
    "pictures.html",
)
#: What is left out of pages that would take minutes: an API's sections and entries are alike.
ALIKE = {"api/index.html": "section section ~ section ~ section, dl.py ~ dl.py ~ dl.py"}


@pytest.fixture(scope="module")
def site() -> Path:
    """The folder of the built pages."""
    return Path(FOLDER).resolve()


def test_nothing_is_dead(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 30
    assert dead_links(site) == []


def test_every_picture_is_told(site: Path) -> None:
    assert untold_pictures(site) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page(browser: "BrowserContext", site: Path, name: str) -> None:
    """At both widths, light and dark."""
    with opened(browser, site / name) as page:
        assert complaints(page, alike=ALIKE.get(name, "")) == []
