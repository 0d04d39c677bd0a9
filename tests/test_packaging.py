"""What is declared is what is needed: versions, dependencies, extras, and what a missing extra says."""

import ast
import importlib
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import captum_classfilters
from captum_classfilters import LayerFilterContribution, list_filter_layers
from captum_classfilters._core import extras
from captum_classfilters._core.extras import extra, missing_extra
from captum_classfilters.atlas.site import Site
from captum_classfilters.cli.main import main as command
from captum_classfilters.gates import ClassSpecificGate
from captum_classfilters.heads import filter_clusters
from captum_classfilters.pruning import ClassFilterImportance, compress_layer
from captum_classfilters.pruning.weight_compression import encode_weights, kmeans_quantize
from captum_classfilters.spectral import (
    class_hypergraph,
    distance_matrix,
    persistence,
    profile_graph,
)
from captum_classfilters.visualize import plot_class_filters, plot_hypergraph

ROOT = Path(captum_classfilters.__file__).parents[1]
PACKAGE = ROOT / "captum_classfilters"
# What is imported under another name than it is installed by.
PROJECTS = {"sklearn": "scikit-learn", "torch_pruning": "torch-pruning", "networkx": "hypernetx"}
# A base class must be there when its module is read; without Lightning it is `object`.
AT_MODULE_LEVEL = {("gates/gated_lightning.py", "lightning")}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def section(key: str) -> str:
    """The text of a list in pyproject.toml; Python 3.10 has no reader of it."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{re.escape(key)} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, key
    return found.group(1)


def requirements(key: str) -> dict[str, str]:
    """What a list requires: projects, with what is said of their versions."""
    listed = re.findall(r'"([A-Za-z0-9_-]+)(?:\[[^\]]*\])?([^"]*)"', section(key))
    return {normal(name): bound for name, bound in listed}


def needed() -> dict[str, str]:
    return requirements("dependencies")


def extras_text() -> dict[str, set[str]]:
    """Each extra and its projects."""
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]")[1].split("\n[project.scripts]")[0]
    names = re.findall(r"^(\w+) = \[", table, re.MULTILINE)
    return {name: set(requirements(name)) for name in names}


class Imports(ast.NodeVisitor):
    """Top-level packages that a file imports, and whether in a function or for types alone."""

    def __init__(self) -> None:
        self.depth = 0
        self.found: list[tuple[str, bool]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name.split(".")[0], self.depth > 0) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            self.found.append((node.module.split(".")[0], self.depth > 0))


@cache
def third_party() -> list[tuple[str, str, bool]]:
    """File, package and whether in a function, of every import from elsewhere."""
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        reader = Imports()
        reader.visit(ast.parse(path.read_text(encoding="utf-8")))
        place = path.relative_to(PACKAGE).as_posix()
        own = sys.stdlib_module_names | {"captum_classfilters"}
        result += [(place, name, inside) for name, inside in reader.found if name not in own]
    return result


def test_lower_bounds_are_the_versions_that_are_tested():
    pinned = dict(
        re.findall(r"^([A-Za-z0-9-]+)==(\S+)$", (ROOT / ".ci/oldest.txt").read_text(), re.MULTILINE)
    )
    assert needed() == {name: f">={version}" for name, version in pinned.items()}


def test_what_is_imported_at_module_level_is_declared():
    imported = third_party()
    assert len({name for _, name, _ in imported}) >= 8  # the walk sees something
    undeclared = {
        (place, name)
        for place, name, inside in imported
        if not inside and normal(PROJECTS.get(name, name)) not in needed()
    }
    assert undeclared == AT_MODULE_LEVEL


def test_what_is_declared_is_imported():
    assert set(needed()) == {
        normal(name) for _, name, _ in third_party() if normal(name) in needed()
    }


def test_packages_of_extras_are_imported_in_one_place():
    # Of the command line: timm builds models of others, and torchvision brings Pillow.
    known = set(needed()) | {"timm", "pil"}
    inside = {(place, name) for place, name, inside in third_party() if inside}
    assert not {(place, name) for place, name in inside if normal(name) not in known}


def test_extras_that_errors_name_have_the_package():
    declared = extras_text()
    for module, (_, name) in extras.EXTRAS.items():
        assert PROJECTS.get(module, module) in declared[name], (module, name)
    assert {"scikit-learn", "matplotlib"} <= declared["demo"]


def test_every_use_of_an_extra_names_a_known_package():
    pattern = re.compile(r"\b(?:missing_)?extra\(\s*\"([a-z0-9_]+)")
    used = {
        name for path in PACKAGE.rglob("*.py") for name in pattern.findall(path.read_text("utf-8"))
    }
    assert used | {"matplotlib"} == set(extras.EXTRAS)


# -- a missing extra --------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


IMAGES, LABELS = torch.rand(5, 1, 6, 6), torch.tensor([0, 1, 2, 2, 1])


def table():
    method = LayerFilterContribution(network(), "1")
    return method.identify([(IMAGES, LABELS)], show_progress=False)


def edges():
    return class_hypergraph(torch.eye(4)[:, :3], torch.tensor([0, 1, 2, 0]))


def pair():
    return [(IMAGES, LABELS)]


CASES = {
    "ClassFilters.to_pandas": ("pandas", "pandas", lambda: table().to_pandas()),
    "Tabular.to_pandas": ("pandas", "pandas", lambda: edges().to_pandas()),
    "list_filter_layers().to_pandas": (
        "pandas",
        "pandas",
        lambda: list_filter_layers(network(), IMAGES).to_pandas(),
    ),
    "The atlas": ("jinja2", "atlas", lambda: Site(Path("nowhere"), overwrite=False)),
    "filter_clusters": ("sklearn", "prune", lambda: filter_clusters(torch.rand(4, 3))),
    "kmeans_quantize": ("sklearn", "prune", lambda: kmeans_quantize(torch.rand(9), 2)),
    "compress_layer": (
        "sklearn",
        "prune",
        lambda: compress_layer(network(), "0", IMAGES, clusters=2),
    ),
    "encode_weights": (
        "bitarray",
        "prune",
        lambda: encode_weights(torch.ones(2), torch.ones(1), torch.zeros(2)),
    ),
    "ClassFilterImportance": (
        "torch_pruning",
        "prune",
        lambda: ClassFilterImportance(network(), table(), IMAGES),
    ),
    "to_hypernetx": ("hypernetx", "hypergraph", lambda: edges().to_hypernetx()),
    "plot_hypergraph": (
        "hypernetx",
        "hypergraph",
        lambda: plot_hypergraph(edges(), style="bands"),
    ),
    "profile_graph": (
        "networkx",
        "hypergraph",
        lambda: profile_graph(network(), ["0", "4"], pair(), show_progress=False),
    ),
    "distance_matrix": ("networkx", "hypergraph", lambda: distance_matrix(None)),
    "persistence": ("ripser", "persistence", lambda: persistence(torch.zeros(2, 2).numpy())),
    "Drawing": ("matplotlib", "plot", lambda: plot_class_filters(table())),
}


@pytest.mark.parametrize("name", CASES)
def test_a_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    package, its_extra, task = CASES[name]
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as raised:
        task()
    message = str(raised.value)
    assert f"pip install 'captum-classfilters[{its_extra}]'." in message
    assert message.endswith("]'.")  # a package that is absent is not called broken
    if name in ("filter_clusters", "kmeans_quantize", "encode_weights", "persistence"):
        assert message.startswith(name)


def test_a_callback_without_lightning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    name = "captum_classfilters.gates.gated_lightning"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    with pytest.raises(ImportError, match=r"captum-classfilters\[lightning\]"):
        module.ClassGateCallback(ClassSpecificGate(3, 4))
    monkeypatch.delitem(sys.modules, name)  # the next one to import it gets it with Lightning


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_the_demo_says_it_before_it_makes_a_folder(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
):
    monkeypatch.setitem(sys.modules, package, None)
    output = tmp_path / "demo"
    assert command(["demo", "--output", str(output), "--quiet"]) == 2
    assert "pip install 'captum-classfilters[demo]'" in capsys.readouterr().err
    assert not output.exists()


def test_a_package_that_is_there_but_broken_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path
):
    (tmp_path / "ripser.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ripser", raising=False)
    with pytest.raises(ImportError, match="Its import fails here: No module named 'a_package_th"):
        extra("ripser", "persistence")


def test_a_renamed_name_of_a_package_is_told():
    error = ImportError("cannot import name 'Callback' from 'pandas'", name="pandas")
    assert extra("pandas", "to_pandas").__name__ == "pandas"
    assert "cannot import name 'Callback'" in str(missing_extra("pandas", "to_pandas", error))


def test_what_is_installed_is_returned_by_its_full_name():
    assert extra("pandas", "x").__name__ == "pandas"
    assert extra("sklearn.cluster", "x").__name__ == "sklearn.cluster"
