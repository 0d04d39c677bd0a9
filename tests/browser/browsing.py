"""Pages in a browser: what is asked of every one of them, and links followed on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import BrowserContext, Page

#: Width, height, color scheme, and whether axe tries all its rules or those that colors decide.
WINDOWS: tuple[tuple[int, int, Literal["light", "dark"], bool], ...] = (
    (1280, 800, "light", True),
    (1280, 800, "dark", False),
    (390, 800, "dark", True),
    (390, 800, "light", False),
)
_OPTIONS = {"resultTypes": ["violations"], "preload": False}  # pages on disk may not be read twice
_COLORS = {**_OPTIONS, "runOnly": ["color-contrast", "link-in-text-block"]}
# What sticks out of the window, unless something around it scrolls.
_WIDE = """() => {
  const scrolls = (node) => node && (
    /auto|scroll|hidden|clip/.test(getComputedStyle(node).overflowX) || scrolls(node.parentElement));
  const width = document.documentElement.clientWidth;
  const found = [...document.body.querySelectorAll("*")].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.width && box.right > width + 1 && box.left >= 0 && !scrolls(node.parentElement);
  }).map((node) => `${node.tagName} ${node.className} ${node.textContent.trim().slice(0, 40)}`);
  if (document.documentElement.scrollWidth > width) found.push("the page scrolls sideways");
  return found;
}"""
# The first rows of a long table, and the first entries of a list, stand for all.
_ALIKE = "tbody tr:nth-child(n+9), li li:nth-child(n+9)"
_LEAVE_OUT = """(alike) => {
  for (const node of document.querySelectorAll(alike)) node.remove();
}"""
_BROKEN = """async () => {
  const broken = [];
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const image of document.images) {
    image.loading = "eager";
    try { await image.decode(); } catch { broken.push(image.src); }
  }
  return broken;
}"""


@contextmanager
def opened(browser: BrowserContext, path: Path) -> Iterator[Page]:
    """A page from disk; an error on its console, or a file that is missing, fails the test."""
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda told: said.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"missing: {request.url}"))
    try:
        page.goto(path.as_uri())
        yield page
        assert not said, (path.name, said)
    finally:
        page.close()


def complaints(page: Page, alike: str = "") -> list[str]:
    """What is wrong with a page at both widths, light and dark: pictures that do not load, what sticks out
    of the window, and what axe finds, without elements that are alike."""
    found = [f"no picture: {source}" for source in page.evaluate(_BROKEN)]
    page.evaluate(_LEAVE_OUT, f"{_ALIKE}, {alike}" if alike else _ALIKE)
    page.evaluate(AXE_SCRIPT)
    for width, height, scheme, everything in WINDOWS:
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        where = f"{width} pixels, {scheme}"
        found += [f"{where}, too wide: {text}" for text in page.evaluate(_WIDE)]
        options = _OPTIONS if everything else _COLORS
        told = page.evaluate("async (options) => (await axe.run(options)).violations", options)
        found += [
            f"{where}, {violation['id']}: {node['html'][:200]} {node['failureSummary']}"
            for violation in told
            for node in violation["nodes"]
        ]
    return found


class Links(HTMLParser):
    """What a page on disk links to or shows, the ids in it, and pictures that it does not tell in words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.untold: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        self.ids |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "img" and not values.get("alt"):
            self.untold.append(str(values.get("src")))


def dead_links(folder: Path) -> list[str]:
    """Links of all pages in a folder to files or places that are not there; addresses are not followed."""
    pages = {path.resolve(): Links(path) for path in sorted(folder.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            place = unquote(parts.fragment)
            there = target.is_file() and (
                not place or target not in pages or place in pages[target].ids
            )
            if not there:
                dead.append(f"{path.relative_to(folder.resolve())}: {link}")
    return dead


def untold_pictures(folder: Path) -> list[str]:
    """Pictures without words, of all pages in a folder."""
    return [
        f"{path.relative_to(folder)}: {source}"
        for path in sorted(folder.rglob("*.html"))
        for source in Links(path).untold
    ]
