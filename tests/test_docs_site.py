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


def test_an_object_leads_to_the_pages_whose_code_uses_it():
    pages = dict(REFERENCE["object_pages"]())
    shortcuts = pages["captum_classfilters.answers.find_shortcuts"]
    assert "**Tutorials**: :doc:`/tutorials/08_from_shortcut_to_repair`\n" in shortcuts
    assert "**How-to**: :doc:`/shortcuts`\n" in shortcuts
    first = pages["captum_classfilters.LayerFilterContribution"].split(".. rubric:: Used in")[1]
    assert first.index("01_class_filters") < first.index("How-to") < first.index("/identify`")
    for link in re.findall(r":doc:`/([^`]+)`", first):
        path = DOCS / f"{link}.md"
        path = path if path.exists() else DOCS.parent / f"{link}.py"
        assert "LayerFilterContribution(" in path.read_text("utf-8"), link
    assert "/glossary" not in "".join(pages.values())


def test_names_are_used_where_their_import_stands_above():
    code = "```python\nfrom captum_classfilters.heads import psi, decompose as cut\n```\n"
    page = f"{code}(named)=\n\n## Section\n\n```python\ncut(model)\n```\n```text\npsi(x)\n```\n"
    imported: dict[str, object] = {}
    heads = importlib.import_module("captum_classfilters.heads")
    parts = {
        link: REFERENCE["used"](text, imported)
        for link, text in REFERENCE["passages"](DOCS / "page.md", page)
    }
    assert parts == {":doc:`/page`": [], ":ref:`named`": [heads.decompose]}


def test_a_source_leads_back_to_the_page_of_each_object():
    back = (
        '<div class="viewcode-block" id="Table.of">\n<a class="viewcode-back" href="../api/objects/'
    )
    context = {"body": f'{back}ours.Table.html#ours.tables.other.Table.of">[docs]</a>'}
    REFERENCE["lead_back"](None, "_modules/ours/tables", "", context, None)
    assert context["body"] == f'{back}ours.Table.html#ours.Table.of">[docs]</a>'


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
