"""The rules of the shape: floors, one place for each mechanism, and one vocabulary."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import captum_classfilters

ROOT = Path(captum_classfilters.__file__).parent
PACKAGE = "captum_classfilters"
FLOORS = (
    {"_core", "_version"},
    {"class_filters", "class_scores", "gate_space", "layers", "separate_runs"},
    {"identify"},
    {"attr"},
    {"metrics", "spectral", "testing"},
    {"gates", "heads"},
    {"pruning"},
    {"answers"},
    {"visualize"},
    {"atlas"},
    {"cli", "__main__"},
)
FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
PUBLIC_ROOMS = (
    "",
    "answers",
    "atlas",
    "attr",
    "gates",
    "heads",
    "identify",
    "metrics",
    "pruning",
    "spectral",
    "testing",
    "visualize",
)
MOST_NAMES_AT_THE_TOP = 30
MOST_NAMES = 187
MOST_ANYS = 250  # words that say to a type checker: look away


@dataclass(frozen=True)
class Import:
    """One imported name."""

    place: str  # file and line
    importer: str  # the importing module, without the package's name
    module: str  # likewise, if it is one of ours
    name: str
    in_function: bool
    for_types: bool

    @property
    def target(self):
        """The room that it comes from; empty for the package itself."""
        return room_of(self.module or (self.name if self.name in MODULES else ""))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module):
    return module.split(".")[0]


def imports_of(module, tree, package=PACKAGE):
    """All imports from a package, with whether they stand in a function or are for types only."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def walk(node, in_function, for_types):
        for child in ast.iter_child_nodes(node):
            names: list[tuple[str, str]] = []
            if isinstance(child, ast.ImportFrom) and child.module and not child.level:
                names = [(child.module, alias.name) for alias in child.names]
            elif isinstance(child, ast.Import):
                names = [(alias.name, "") for alias in child.names]
            line = getattr(child, "lineno", 0)
            for source, name in names:
                if source.split(".")[0] == package:
                    inner = source.removeprefix(package).removeprefix(".")
                    place = f"{MODULES[module].relative_to(ROOT)}:{line}"
                    yield Import(place, module, inner, name, in_function, for_types)
            checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(
                child, in_function or isinstance(child, functions), for_types or checked
            )

    yield from walk(tree, False, False)


OWN_IMPORTS = [found for name, tree in TREES.items() for found in imports_of(name, tree)]


def calls(predicate):
    """Files, with the calls in them that a predicate picks by their function's last name."""
    found = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = node.func
                name = getattr(function, "attr", getattr(function, "id", ""))
                if predicate(name):
                    found[module].append(f"line {node.lineno}: {name}")
    return dict(found)


def test_the_walk_sees_imports():
    """The tests below would pass on nothing."""
    code = """
from captum_classfilters import identify
if TYPE_CHECKING:
    import captum_classfilters.cli
def late():
    from captum_classfilters.heads.refit import _private
"""
    top, types, late = imports_of("attr.base", ast.parse(code))
    assert (top.target, top.in_function, top.for_types) == ("identify", False, False)
    assert (types.target, types.for_types) == ("cli", True)
    assert (late.target, late.name, late.in_function) == ("heads", "_private", True)
    assert len(OWN_IMPORTS) > 300


# -- floors --------------------------------------------------------------------------------------


def test_every_room_has_a_floor():
    assert {room_of(name) for name in MODULES} - {""} == set(FLOOR_OF)


def test_dependencies_point_down():
    """What is imported for types alone counts, too."""
    upward = [
        f"{own.place} imports {own.module}.{own.name}"
        for own in OWN_IMPORTS
        if own.importer and own.target and FLOOR_OF[own.target] > FLOOR_OF[room_of(own.importer)]
    ]
    assert not upward


def test_rooms_import_rooms_and_not_the_package():
    """The package's ``__init__`` imports all rooms, so that a room that imports it makes a cycle."""
    from_the_top = [own.place for own in OWN_IMPORTS if own.importer and not own.target]
    assert not from_the_top


def test_no_import_cycle():
    graph = defaultdict(set)
    for own in OWN_IMPORTS:
        if not own.for_types and own.importer:
            inner = f"{own.module}.{own.name}".lstrip(".")
            graph[own.importer].add(inner if inner in MODULES else own.module)
    TopologicalSorter(graph).prepare()  # raises and names the cycle
    rooms = defaultdict(set)
    for own in OWN_IMPORTS:
        if not own.for_types and own.importer and own.target != room_of(own.importer):
            rooms[room_of(own.importer)].add(own.target)
    TopologicalSorter(rooms).prepare()


def test_no_import_in_a_function():
    """Except in the command line, whose help must not wait for torch, and of what needs torchmetrics,
    whose import takes as long as all of ours."""
    texts = {name: path.read_text("utf-8") for name, path in MODULES.items()}
    lines = ("\nfrom torchmetrics", " import SummedMetric\n")
    heavy = {name for name, text in texts.items() if any(line in text for line in lines)}
    assert heavy == {
        "heads.hits",
        "identify.accuracy_sums",
        "identify.statistics",
        "identify.summed_metric",
        "metrics.confusion_counts",
    }
    late = [
        own.place
        for own in OWN_IMPORTS
        if own.in_function
        and not own.for_types
        and room_of(own.importer) != "cli"
        and own.module not in heavy
    ]
    assert not late


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, captum.attr, torchvision; before = set(sys.modules); import captum_classfilters;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(ast.literal_eval(run.stdout))
    assert "captum_classfilters" in new
    assert not new & {"hypernetx", "lightning", "networkx", "pandas", "quantus", "torchmetrics"}


def test_underscore_names_stay_in_their_room():
    crossing = [
        f"{own.place} imports {own.name}"
        for own in OWN_IMPORTS
        if own.name.startswith("_")
        and not own.name.startswith("__")
        and own.target != room_of(own.importer)
        and own.name not in FLOOR_OF
    ]
    assert not crossing


# -- one place for each mechanism ------------------------------------------------------------------


def test_captums_private_names_are_imported_in_one_file():
    private = [
        f"{found.place} imports {found.module}.{found.name}"
        for name, tree in TREES.items()
        if name != "_core.captum"
        for found in imports_of(name, tree, "captum")
        if any(part.startswith("_") for part in (*found.module.split("."), found.name))
    ]
    assert not private


def test_layers_are_hooked_in_one_file():
    hooking = calls(lambda name: name.startswith("register_") and name.endswith("_hook"))
    assert set(hooking) == {"_core.taps"}, hooking


def test_data_are_read_in_one_file():
    """Loops over what is called a loader, and iterators made of it."""
    reading = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            source = None
            if isinstance(node, (ast.For, ast.comprehension)):
                source = node.iter
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ITERATING:
                source = node.args[0] if node.args else None
            name = getattr(source, "attr", getattr(source, "id", ""))
            if source is not None and name.strip("_").endswith("loader"):
                reading[module].append(ast.unparse(source))
    assert set(reading) == {"_core.batches"}, dict(reading)


ITERATING = ("enumerate", "iter", "list", "tqdm", "zip")


def test_files_are_opened_in_one_file():
    """By methods of paths, figures and modules, or by the built-in; our own functions do it right."""
    opening = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                method = isinstance(node.func, ast.Attribute) and node.func.attr in OPENING
                if name == "open" or (method and name != "Image.open"):  # which gets an open file
                    opening[module].append(name)
    assert set(opening) == {"_core.files"}, dict(opening)


OPENING = {
    "fromfile", "imread", "imsave", "load_file", "memmap", "mkstemp", "NamedTemporaryFile", "open",
    "read_bytes", "read_text", "safe_open", "save_file", "savefig", "savetxt", "savez", "tofile", "touch",
    "umask", "write_bytes", "write_text",
}  # fmt: skip


def dangerous(tree):
    """What could run code from a file, or needs it to: imports, names and options."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, (ast.Attribute, ast.Name)):
            names = [ast.unparse(node)]
        if isinstance(node, ast.keyword):
            names = [node.arg or ""]
        yield from (name for name in names if name.split(".")[0] in PICKLES or name in LOADERS)


PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
LOADERS = {
    f"{module}.{name}"
    for module in (
        "torch",
        "torch.jit",
        "torch.export",
        "torch.package",
        "torch.hub",
        "np",
        "numpy",
    )
    for name in ("load", "save", "load_state_dict_from_url")
} | {"allow_pickle", "eval", "exec", "torch.serialization"}


def test_no_code_runs_from_a_file():
    """PyTorch's reader is called in one place, which asks for weights alone."""
    found = {module: list(dangerous(tree)) for module, tree in TREES.items()}
    assert {module: names for module, names in found.items() if names} == {
        "_core.checkpoints": ["torch.load"]
    }
    (call,) = [
        node
        for node in ast.walk(TREES["_core.checkpoints"])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]
    code = """
import pickle as p
from torch import save, load as l
from torch.serialization import load
x = np.load(file, allow_pickle=True); torch.jit.load(x); eval(x); model.eval(); trainer.load(x)
"""
    assert sorted(dangerous(ast.parse(code))) == sorted(
        [
            *("pickle", "torch.save", "torch.load", "torch.serialization"),
            *("np.load", "allow_pickle", "torch.jit.load", "eval"),
        ]
    )


def test_nothing_in_the_core_is_unused():
    """A name at the top of a module of `_core` that stands nowhere else."""
    counts = Counter(
        word for path in MODULES.values() for word in re.findall(r"\w+", path.read_text("utf-8"))
    )
    unused = {
        f"{module}.{node.name}"
        for module, tree in TREES.items()
        if room_of(module) == "_core"
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and counts[node.name] == 1
    }
    assert not unused - UNUSED


UNUSED: set[str] = set()


# -- names ---------------------------------------------------------------------------------------


def public_names():
    """Every public name once, with the objects that it stands for."""
    names = defaultdict(set)
    for room in PUBLIC_ROOMS:
        module = importlib.import_module(f"{PACKAGE}.{room}" if room else PACKAGE)
        for name in module.__all__:
            names[name].add(getattr(module, name))
    return dict(names)


def test_number_of_names():
    names = public_names()
    print(f"{len(captum_classfilters.__all__)} names at the top, {len(names)} in all")
    assert len(captum_classfilters.__all__) <= MOST_NAMES_AT_THE_TOP
    assert len(names) <= MOST_NAMES


def test_number_of_anys():
    words = [re.findall(r"\bAny\b", path.read_text()) for path in ROOT.rglob("*.py")]
    assert sum(map(len, words)) <= MOST_ANYS


def test_names_at_the_top_are_imported_when_asked_for():
    """What type checkers see is what is found; nothing else is there."""
    checked = {
        node.names[i].name
        for node in ast.walk(TREES[""])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE)
        for i in range(len(node.names))
    }
    assert checked == set(captum_classfilters.__all__)
    assert set(captum_classfilters.__all__) <= set(dir(captum_classfilters))
    for room in filter(None, PUBLIC_ROOMS):
        assert getattr(captum_classfilters, room) is importlib.import_module(f"{PACKAGE}.{room}")
    with pytest.raises(AttributeError, match="has no attribute 'LayerFilterFrequencies'"):
        _ = captum_classfilters.LayerFilterFrequencies
    code = (
        f"import sys, {PACKAGE}; from {PACKAGE} import LayerFilterContribution;"
        "print([m for m in sys.modules if m.startswith('captum_classfilters.')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] for name in ast.literal_eval(run.stdout)}
    assert "attr" in loaded
    assert not loaded & {
        "metrics",
        "spectral",
        "heads",
        "gates",
        "pruning",
        "answers",
        "visualize",
        "atlas",
        "cli",
    }


def test_a_name_stands_for_one_thing():
    assert {name for name, objects in public_names().items() if len(objects) > 1} <= TWO_THINGS


TWO_THINGS = {"effective_rank"}  # of features in `heads`, of singular values in `spectral`


def test_every_room_says_what_is_public():
    """``__all__`` is sorted, without doubles, and nothing in it is private."""
    for room in PUBLIC_ROOMS:
        module = importlib.import_module(f"{PACKAGE}.{room}" if room else PACKAGE)
        names = list(module.__all__)
        assert len(set(names)) == len(names)
        assert not [n for n in names if n.startswith("_") and n != "__version__"]


# -- the vocabulary --------------------------------------------------------------------------------

FORBIDDEN = {
    "loader": "dataloader",
    "data_loader": "dataloader",
    "k": "num_filters",
    "num_k": "num_filters",
    "n_filters": "num_filters",
    "colour": "color",
    "n_seeds": "repetitions",
    "num_seeds": "repetitions",
    "random_seeds": "repetitions",
    "aggregation": "aggregate",
}
# Where these names are parameters, this is their default everywhere.
DEFAULTS = {"channel_dim": None, "device": None, "seed": 0, "show_progress": True, "unpack": None}
EXCEPTIONS = {
    # As Captum's `attribute` has it.
    ("LayerFilterAblation.attribute", "show_progress"),
    ("LayerFilterAblation.drops", "show_progress"),
    ("LayerFilterShapley.attribute", "show_progress"),
    # Work on features that are already there is over in a moment.
    ("mutual_information_matrix", "show_progress"),
    # A row of a list of layers is made with what was seen.
    ("FilterLayer.__init__", "channel_dim"),
    # As `torch.Tensor.to`.
    ("LayerSVD.to", "device"),
}


def signatures():
    """Public functions and methods, by a name for messages, with their parameters."""
    for name, objects in sorted(public_names().items()):
        for thing in objects:
            if inspect.isclass(thing):
                for owner in thing.__mro__:
                    if owner.__module__.split(".")[0] != PACKAGE:
                        continue
                    for member, value in vars(owner).items():
                        function = getattr(value, "__func__", value)
                        public = not member.startswith("_") or member in ("__init__", "__call__")
                        if public and inspect.isfunction(function):
                            yield f"{owner.__name__}.{member}", function
            elif inspect.isfunction(thing):
                yield name, thing


PARAMETERS = sorted(
    {
        (name, parameter.name): parameter
        for name, function in signatures()
        for parameter in inspect.signature(function).parameters.values()
    }.items()
)


def test_the_walk_sees_signatures():
    """The tests below would pass on nothing."""
    assert len(PARAMETERS) > 500
    assert ("LayerFilterAttribution.identify", "dataloader") in dict(PARAMETERS)
    assert ("accuracy_curve", "num_filters") in dict(PARAMETERS)


def test_no_second_word_for_a_parameter():
    wrong = [
        f"{owner}({name}) -> {FORBIDDEN[name]}"
        for (owner, name), _ in PARAMETERS
        if name in FORBIDDEN
    ]
    assert not wrong


def test_american_spelling():
    """Of public names and their parameters."""
    words = {*public_names(), *(name for _, name in dict(PARAMETERS))}
    british = re.compile(r"(?:^|_)(?:\w*(?:is(?:e|er|ed|ation)|our|oured)|centred?|grey\w*)(?=_|$)")
    others = {"noise", "pairwise", "precise", "otherwise", "raise"}
    found = {
        word
        for word in words
        for match in british.finditer(word.lower())
        if match[0].strip("_").split("_")[-1] not in others
    }
    assert not found - KEPT


# Names of the first release.
KEPT = {"favored", "normalize", "reinitialize", "selectivity_regularizer", "specialize"}


@pytest.mark.parametrize("word", DEFAULTS)
def test_a_parameter_has_one_default(word):
    wrong = [
        f"{owner}({parameter})"
        for (owner, name), parameter in PARAMETERS
        if name == word and (owner, name) not in EXCEPTIONS and parameter.default != DEFAULTS[word]
    ]
    assert not wrong


def test_repetitions_are_a_number():
    """How many draws are enough differs, that there is a default does not."""
    wrong = [
        f"{owner}({parameter})"
        for (owner, name), parameter in PARAMETERS
        if name == "repetitions"
        and not (isinstance(parameter.default, int) and parameter.default > 0)
    ]
    assert not wrong


def test_who_reads_a_loader_says_how():
    """How batches are unpacked, and whether a bar is shown."""
    by_owner: dict[object, dict[str, inspect.Parameter]] = defaultdict(dict)
    for (owner, name), parameter in PARAMETERS:
        by_owner[owner][name] = parameter
    missing = {
        (owner, word)
        for owner, own in by_owner.items()
        for word in ("unpack", "show_progress")
        if "dataloader" in own and word not in own
    }
    assert not missing - HOW_IS_OPEN


HOW_IS_OPEN = {
    # Passes its options on to what they are of.
    ("LayerFilterAblation.identify", "unpack"),
    ("LayerFilterAblation.identify", "show_progress"),
    ("random_weights_null", "unpack"),
    ("random_weights_null", "show_progress"),
    # Make something that reads later, without a bar.
    ("LayerwiseFineTuning.__init__", "show_progress"),
    ("standard_methods", "show_progress"),
    # What it calls has a bar of its own.
    ("validate", "show_progress"),
    # Not yet.
    ("specialize", "unpack"),
}
