"""A page for each object of the API reference: those that the tables in ``docs/api`` name.

It ends with the pages whose code uses the object, and the page of its source leads back to it.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captum_classfilters.attr import LayerFilterAttribution, WeightedFilterAttribution

DOCS = Path(__file__).parent
ROOMS = sorted(path for path in (DOCS / "api").glob("*.rst") if path.stem != "index")
# What these classes define is documented by those who wrote them.
OTHERS = "Attribution, LayerAttribution, Module, Callback, Tabular, Mapping, Sequence, Enum, tuple, object"
# What is called; all else of these is for those who write a method, and stands on their own pages.
CALLED = {"attribute", "compute_convergence_delta", "filter_scores", "identify"}
METHODS = (LayerFilterAttribution, WeightedFilterAttribution)
NAMES = {name for method in METHODS for name in dir(method) if not name.startswith("_")}
WRITTEN = ", ".join(sorted(NAMES - CALLED))


def listed(path: Path) -> list[str]:
    """The objects in the tables of a page, by the names to import them."""
    return re.findall(r"^   ~(captum_classfilters\S+)$", path.read_text("utf-8"), re.MULTILINE)


def named(name: str) -> object:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def examples() -> Iterator[tuple[str, Path]]:
    """Tutorials and pages in the order of the site, each with the part that it belongs to."""
    for part, contents in (
        ("Tutorials", "tutorials"),
        ("How-to", "how_to"),
        ("Explanation", "explanation"),
    ):
        text = (DOCS / f"{contents}.md").read_text("utf-8")
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
            for name in re.findall(r"^[\w/]+$", block, re.MULTILINE):
                script = DOCS.parent / f"{name}.py"
                path = script if script.exists() else DOCS / f"{name}.md"
                yield "Gallery" if name == "gallery" else part, path


def passages(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """The code of a tutorial, or of a page's sections that have a name, ``(name)=``; each with a link."""
    if path.suffix == ".py":
        yield f":doc:`/tutorials/{path.stem}`", text
        return
    page = f":doc:`/{path.relative_to(DOCS).with_suffix('').as_posix()}`"
    parts = [page, *re.split(r"^\((\w+)\)=$", text, flags=re.MULTILINE)]
    for link, section in zip(parts[::2], parts[1::2], strict=True):
        fences = r"^```(?:python|\{code-block\} python\n:caption:.*)\n(.*?)^```$"
        code = re.findall(fences, section, re.DOTALL | re.MULTILINE)
        yield link if link == page else f":ref:`{link}`", "\n".join(code)


def used(code: str, imported: dict[str, object]) -> list[object]:
    """The objects of ours that code uses, by the names under which it or what stands above imports them."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "captum_classfilters"
        ):
            module = importlib.import_module(str(node.module))
            imported |= {one.asname or one.name: getattr(module, one.name) for one in node.names}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return [found for name, found in imported.items() if name in names]


def users() -> dict[int, dict[str, list[str]]]:
    """By an object's id, links to the pages whose code uses it, in each part of the site."""
    found: dict[int, dict[str, list[str]]] = {}
    for part, path in examples():
        imported: dict[str, object] = {}
        for link, code in passages(path, path.read_text("utf-8")):
            for thing in used(code, imported):
                found.setdefault(id(thing), {}).setdefault(part, []).append(link)
    return found


def lead_back(
    _app: object, page: str, _template: str, context: dict[str, Any], _tree: object
) -> None:
    """Where a source leads back to an object: to its page's own name for it, and not to that of whichever
    object of the same file came first, as Sphinx has it."""
    if page.startswith("_modules/"):
        back = (
            r'(id="([\w.]+)">\n<a class="viewcode-back" href="[^"#]*/objects/([\w.]+)\.html)#[^"]*"'
        )

        def mended(link: re.Match[str]) -> str:
            return f'{link[1]}#{link[3].rpartition(".")[0]}.{link[2]}"'

        context["body"] = re.sub(back, mended, context["body"])


def object_pages() -> Iterator[tuple[str, str]]:
    """Name and text of each object's page."""
    uses = users()
    for name in (name for room in ROOMS for name in listed(room)):
        title = name.rpartition(".")[2]
        lines = [":orphan:", "", title, "=" * len(title), ""]
        found = named(name)
        if inspect.isclass(found):
            lines += [f".. autoclass:: {name}", "   :members:"]
            lines += [f"   :inherited-members: {OTHERS}"]
            if issubclass(found, LayerFilterAttribution) and found not in METHODS:
                lines += [f"   :exclude-members: {WRITTEN}"]
            lines += [""]
        else:
            lines += [f".. autofunction:: {name}", ""]
        links = uses.get(id(found), {})
        if links:
            lines += [".. rubric:: Used in", ""]
        for part, places in links.items():
            lines += [f"**{part}**: " + " · ".join(places), ""]
        yield name, "\n".join(lines)
