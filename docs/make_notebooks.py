"""Notebooks of the tutorials, which are plain scripts with cells (jupytext's percent format).

    python docs/make_notebooks.py    # writes tutorials/notebooks/

Those that are written install the package in their first cell, so that they run in a hosted notebook, and
are committed; a test says when they must be written again. The documentation's pages are made by the same
function, without that cell and with a link to the notebook.
"""

import re
from pathlib import Path

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
NOTEBOOKS = TUTORIALS / "notebooks"
# What a tutorial needs beyond the extra `demo`.
EXTRAS = {
    "02_compare_with_integrated_gradients": ["pandas"],
    "04_prune_with_car": ["prune"],
    "06_spectral_view": ["hypergraph", "pandas"],
    "07_your_model_and_folder": ["photographs"],
}
_LINK = re.compile(r"\]\(([\w./-]+)\)")


def scripts() -> list[Path]:
    """The tutorials, in their order."""
    return sorted(TUTORIALS.glob("*.py"))


def extras_of(script: Path) -> list[str]:
    """The extras that a tutorial needs."""
    return ["demo", *EXTRAS.get(script.stem, [])]


def hosted(script: Path) -> str:
    """A notebook that installs what it needs; its links lead through the repository."""
    notebook: NotebookNode = jupytext.read(script)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub(_in_repository, cell.source)
    install = f'%pip install -q "captum-classfilters[{",".join(extras_of(script))}]"'
    notebook.cells.insert(0, new_code_cell(install))
    return written(notebook, script.stem)


def page(script: Path) -> str:
    """A notebook that becomes a page, which offers the hosted one."""
    notebook: NotebookNode = jupytext.read(script)
    title, _, rest = notebook.cells[0].source.partition("\n")
    target = f"../../tutorials/notebooks/{script.stem}.ipynb"
    notebook.cells[0].source = f"{title}\n\n{{download}}`Download as a notebook <{target}>`\n{rest}"
    return written(notebook, script.stem)


def written(notebook: NotebookNode, name: str) -> str:
    """The text of a notebook, the same each time: cells are numbered."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name[:2]}-{number:02}"
    text: str = jupytext.writes(notebook, fmt="ipynb")
    return text


def _in_repository(link: re.Match[str]) -> str:
    """A page's link to another, for a file of tutorials/notebooks."""
    target = link.group(1)
    if target.startswith("../"):
        return f"](../../docs/{target[3:].removesuffix('.md')}.md)"
    return f"]({target}.ipynb)"


def main() -> None:
    """Write all notebooks."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for script in scripts():
        (NOTEBOOKS / f"{script.stem}.ipynb").write_text(hosted(script), encoding="utf-8")


if __name__ == "__main__":
    main()
