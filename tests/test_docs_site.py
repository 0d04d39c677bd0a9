"""What holds for the documentation as a whole: its parts, its length, its reference and its sources."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
REFERENCE = runpy.run_path(str(DOCS / "make_reference.py"))
ROOMS, listed, named = (REFERENCE[name] for name in ("ROOMS", "listed", "named"))
PAGES = sorted(path for path in DOCS.glob("**/*.md") if "_build" not in path.parts)
MOST_WORDS, MOST_ROWS = 1200, 8


def name_of(path):
    return path.relative_to(DOCS).with_suffix("").as_posix()


def without_code(path):
    return re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_can_be_read_in_one_sitting(path):
    text = [line for line in without_code(path).splitlines() if not line.startswith("|")]
    assert len(" ".join(text).split()) <= MOST_WORDS


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_was_measured_is_short(path):
    """Below a heading that speaks of measurements a table has few rows; pages of results have the rest."""
    if name_of(path).startswith("results"):
        return
    for section in re.split(r"^#+ ", without_code(path), flags=re.MULTILINE)[1:]:
        if not re.search(
            r"measured|results|ResNet|watermark", section.split("\n")[0], re.IGNORECASE
        ):
            continue
        for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            assert table.count("\n") - 2 <= MOST_ROWS, section.split("\n")[0]


def test_every_page_has_its_place():
    """In one of the four parts, and nowhere twice."""
    places = []
    for path in [*PAGES, *DOCS.glob("api/*.rst")]:
        text = path.read_text("utf-8")
        blocks = re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
        blocks += re.findall(r"\.\. toctree::\n(.*?)(?:\n\S|\Z)", text, re.DOTALL)
        for line in "\n".join(blocks).splitlines():
            if line.strip() and not line.strip().startswith(":"):
                places.append((path.parent / line.strip()).relative_to(DOCS).as_posix())
    assert len(places) == len(set(places))
    pages = {name_of(path) for path in [*PAGES, *DOCS.glob("api/*.rst")]} - {"index"}
    assert not pages - set(places)
    assert re.findall(
        r"^(tutorials|how_to|explanation|reference)$", (DOCS / "index.md").read_text(), re.M
    ) == [
        "tutorials",
        "how_to",
        "explanation",
        "reference",
    ]


def test_every_public_object_has_one_page():
    things = [named(name) for room in ROOMS for name in listed(room)]
    assert len({id(found) for found in things}) == len(things)
    shown = {id(found) for found in things}
    for room in ["", *(f".{path.stem}" for path in ROOMS)]:
        module = importlib.import_module(f"captum_classfilters{room}")
        missing = [
            name
            for name in module.__all__
            if not name.startswith("__") and id(getattr(module, name)) not in shown
        ]
        assert not missing, f"docs/api{room.replace('.', '/') or '/index'}.rst lacks {missing}"


def test_the_first_objects_are_25_of_these():
    first = listed(DOCS / "api/index.rst")
    assert len(set(first)) == len(first) == 25
    assert set(first) <= {name for room in ROOMS for name in listed(room)}


def test_sources_are_cited_that_exist():
    keys = set(re.findall(r"^@\w+\{(\w+),$", (DOCS / "references.bib").read_text(), re.MULTILINE))
    cited = set()
    for path in PAGES:
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text("utf-8")):
            cited |= {key.strip() for key in group.split(",")}
    assert cited <= keys
    assert {"badola2023", "abbasiasl2021", "liang2020", "praggastis2022"} <= cited
