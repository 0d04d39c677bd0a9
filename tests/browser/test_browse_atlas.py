"""The digits' atlas in a browser: nothing breaks, nothing sticks out, it can be searched, sorted and turned
by keys, and axe has nothing to say."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from captum_classfilters.atlas import atlas
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from tests.models import pool_linear

pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python")
pytest.importorskip("playwright", reason="needs playwright")
from tests.browser.browsing import complaints, dead_links, opened, untold_pictures

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, browser: "BrowserContext") -> Path:
    """The demo's network, hardly trained so that it errs, on a few digits."""
    torch.manual_seed(0)
    data = load_digits(0)
    model = train_classifier(small_cnn(), data.train, 1, show_progress=False)
    few = Subset(data.test.dataset, range(100))
    first = atlas(
        model,
        "filters",
        data.train,
        tmp_path_factory.mktemp("browsed") / "site",
        test_dataloader=DataLoader(few, batch_size=100),
        class_names=[f"digit {digit}" for digit in range(10)],
        filter_labels={3: "a vertical bar, or what another tool takes for one"},
        compared={"untrained": small_cnn()},
        num_exemplars=3,
        num_images=1,
        num_errors=2,
        num_optimized=1,
        show_progress=False,
    )
    return first.parent


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first page of an atlas of two layers."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(12, 2, 8, 8), torch.arange(12) % 3)
    return atlas(
        pool_linear(),
        ["0", "1"],
        DataLoader(data, batch_size=5),
        tmp_path_factory.mktemp("layers"),
        num_images=0,
        num_exemplars=2,
        significance=False,
        show_progress=False,
    )


KINDS = (
    *("index.html", "filters.html", "errors.html", "models.html"),
    *("classes/*.html", "filters/*.html", "images/*.html", "errors/*.html"),
)


def rows_of(page: "Page", table: str) -> list[str]:
    """The first cells of the rows that are seen."""
    return page.locator(f"#{table} tbody tr:visible th").all_inner_texts()


def test_nothing_is_dead_and_every_picture_is_told(site: Path, layers: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 80
    for folder in (site, layers.parent):
        assert dead_links(folder) == []
        assert untold_pictures(folder) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_each_kind(browser: "BrowserContext", site: Path, kind: str) -> None:
    """At both widths, light and dark."""
    with opened(browser, min(site.glob(kind))) as page:
        assert complaints(page) == []


def test_a_filter_with_a_label_and_one_with_an_optimized_image(
    browser: "BrowserContext", site: Path
) -> None:
    optimized = next(site.glob("pictures/optimized-*.png")).stem.partition("-")[2]
    for name in ("0003", optimized):
        with opened(browser, site / f"filters/{name}.html") as page:
            assert complaints(page) == []


def test_the_first_page_of_several_layers(browser: "BrowserContext", layers: Path) -> None:
    with opened(browser, layers) as page:
        assert complaints(page) == []


def test_search_leaves_the_rows_with_all_words(browser: "BrowserContext", site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        assert len(rows_of(page, "classes")) == 10
        page.fill("#search", "DIGIT 7")
        assert rows_of(page, "classes") == ["digit 7"]
        assert page.inner_text("output[for=search]") == "1 of 10"
        page.fill("#search", "no such class")
        assert rows_of(page, "classes") == []
        page.fill("#search", "")
        assert len(rows_of(page, "classes")) == 10
    with opened(browser, site / "filters.html") as page:
        page.fill("#search", "bar")
        assert rows_of(page, "filters") == ["3 a vertical bar, or what another tool takes for one"]


def test_a_column_sorts_up_and_down(browser: "BrowserContext", site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        recall = page.get_by_role("button", name="recall")
        cells = page.locator("#classes tbody tr td:nth-child(3)")
        for order in ("ascending", "descending"):
            recall.click()
            assert page.get_attribute("#classes th[aria-sort]", "aria-sort") == order
            values = [float(cell.get_attribute("data-value") or "") for cell in cells.all()]
            assert values == sorted(values, reverse=order == "descending")
            assert len(set(values)) > 2


def test_keys(browser: "BrowserContext", site: Path) -> None:
    """Without a mouse: search, leave it, sort, turn pages, back to the overview; what has the focus is
    seen."""
    with opened(browser, site / "index.html") as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        box = page.locator(".skip").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        page.keyboard.press("/")
        page.keyboard.type("digit 4")
        assert rows_of(page, "classes") == ["digit 4"]
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.tagName") == "BODY"
        page.get_by_role("button", name="recall").focus()
        page.keyboard.press("Enter")
        assert page.get_attribute("#classes th[aria-sort]", "aria-sort") == "ascending"
    pages = sorted(site.glob("filters/*.html"))
    with opened(browser, pages[0]) as page:
        for key, there in (("ArrowRight", pages[1]), ("ArrowRight", pages[2])):
            page.keyboard.press(key)
            page.wait_for_url(there.as_uri())
        page.keyboard.press("ArrowLeft")
        page.wait_for_url(pages[1].as_uri())
        page.keyboard.press("o")
        page.wait_for_url((site / "index.html").as_uri())


def test_the_map_names_and_opens_what_is_under_the_pointer(
    browser: "BrowserContext", site: Path
) -> None:
    with opened(browser, site / "index.html") as page:
        box = page.locator("#map").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 1, box["y"] + 1)
        told = page.inner_text("#map-cell")
        assert told.startswith("digit ")
        page.mouse.click(box["x"] + 1, box["y"] + 1)
        page.wait_for_url("**/classes/*.html")
        assert page.inner_text("h1") == told.partition(",")[0]
