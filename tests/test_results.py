"""Every result shows itself: a short line, a table that is text or HTML, and a data frame."""

import ast
import copy
import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import captum_classfilters
from captum_classfilters import ClassFilters
from captum_classfilters._core.equality import equal_by_value, same
from captum_classfilters._core.names import close_names, short_name
from captum_classfilters._core.tables import Tabular
from tests.results import CLASSES, FILTERS, HOSTILE, NAMES, RESULTS, data, loader, method, table

# Parts of the rooms' machinery, which nobody is handed.
INTERNAL = {"BatchReading", "HeadFeatures", "HeadRun", "LinearHead", "ReplayedBatch", "Settings"}
INTERNAL |= {"Explained", "LabeledReplay", "Source", "Space", "Tally", "GatedEpoch"}
INTERNAL |= {"Built", "Changes", "HeadFit", "Ranks", "Reader", "Seen", "Shape"}
INTERNAL |= {"Circuit", "Gates", "Ordered", "Plan"}  # of trained networks
INTERNAL |= {"HeadEdit", "Kept", "Relabeling", "SeenBatch", "Side"}
INTERNAL |= {"Answers", "Compared", "LayerFindings", "Optimized", "Shown", "Survey"}  # of the atlas


def result_classes():
    """All dataclasses, named tuples and tables of the public rooms."""
    found = {}
    for info in pkgutil.walk_packages(captum_classfilters.__path__, "captum_classfilters."):
        if any(part.startswith("_") or part == "cli" for part in info.name.split(".")):
            continue
        if info.name.endswith("gated_lightning"):  # of an extra
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            own = isinstance(value, type) and value.__module__ == info.name
            shown = own and (dataclasses.is_dataclass(value) or hasattr(value, "_fields"))
            if own and not name.startswith("_") and (shown or issubclass(value, Tabular)):
                found[name] = value
    return found


def test_every_result_is_tried():
    assert set(result_classes()) - INTERNAL <= set(RESULTS)


class Checked(HTMLParser):
    """Raises where a tag is closed that is not the open one; keeps text and tags."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        assert all(not name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    parser = Checked()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RESULTS)
def test_shows_itself(name):
    result = RESULTS[name]()
    assert type(result).__name__ == name
    line = repr(result)
    assert len(line) <= 1000
    assert line.count("\n") < 12
    assert name in line
    assert " object at 0x" not in line
    for text in (line, str(result)):
        assert "tensor(" not in text
        assert " array(" not in text
        assert len(text.splitlines()) <= 50
    if name not in result_classes() or name == "FeatureObjective":  # what is asked for, no result
        return
    html = parsed(result._repr_html_())
    assert set(html.tags) <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert len(result._repr_html_()) < 60_000
    if isinstance(result, Tabular):
        frame = result.to_pandas()
        assert len(frame) >= 1
        assert len(set(frame.columns)) == len(frame.columns)
    if NAMES[0] in str(result):
        assert any(NAMES[0] in text for text in html.text)  # escaped, and nothing is lost


def holds(value, kind):
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value) if field.compare]
    value = list(value.values()) if isinstance(value, dict) else value
    parts = value if isinstance(value, (list, tuple)) else []
    return isinstance(value, kind) or any(holds(part, kind) for part in parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in RESULTS if name in result_classes()])
def test_equal_to_its_copy(name):
    result = RESULTS[name]()
    copied = copy.deepcopy(result)
    if dataclasses.is_dataclass(result) and not holds(result, (nn.Module, DataLoader, Callable)):
        assert result == copied
        if type(result).__hash__ is not None:
            assert hash(result) == hash(copied)
    assert result == result
    assert result != name


def test_equal_by_value():
    result = RESULTS["Essentiality"]()
    for name, value in vars(result).items():
        assert result != dataclasses.replace(result, **{name: value + 1})
    for left, right in (
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2).double()),
        ([torch.ones(2)], [torch.zeros(2)]),
        (float("nan"), 1.0),
    ):
        assert not same(left, right)
        assert same(left, copy.deepcopy(left))


@pytest.mark.parametrize("name", ["ClassFilters", "ModelSpectra", "FilterLayers", "ClassCurves"])
def test_without_pandas_the_extra_is_named(name, monkeypatch):
    result = RESULTS[name]()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"captum-classfilters\[pandas\]"):
        result.to_pandas()


def test_to_pandas_imports_in_one_place():
    for path in captum_classfilters.__path__:
        for module in pkgutil.walk_packages([path], "captum_classfilters."):
            spec = importlib.util.find_spec(module.name)
            assert spec is not None
            assert spec.origin is not None
            with open(spec.origin, encoding="utf-8") as file:
                tree = ast.parse(file.read())
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef) and function.name != "import_pandas":
                    names = [
                        alias.name
                        for node in function.body
                        if isinstance(node, ast.Import)
                        for alias in node.names
                    ]
                    assert "pandas" not in names, f"{module.name}.{function.name}"


# -- tables of a thousand classes --------------------------------------------------------------------


def test_a_large_table_is_short_and_its_data_frame_whole():
    large = ClassFilters(
        torch.rand(1000, 2048), torch.ones(1000).long(), class_names=[f"c{i}" for i in range(1000)]
    ).select(num_filters=3)
    assert len(str(large).splitlines()) < 50
    assert "960 more rows" in str(large)
    assert len(large._repr_html_()) < 30_000
    assert len(large["c7"].to_pandas()) == 2048
    assert len(str(large["c7"]).splitlines()) == 12 + 1


# -- a class by its name -----------------------------------------------------------------------------


def test_a_row_by_name_index_and_in_turn():
    found = table()
    row = found[NAMES[4]]
    order = found.scores[4].sort(descending=True, stable=True).indices
    assert torch.equal(row.filters, order)
    assert torch.equal(row.scores, found.scores[4][order])
    assert torch.equal(row.filters[row.selected], found.filters_of(4))
    assert row.count == int(found.counts[4])
    errors = found.standard_errors
    assert errors is not None
    assert row.standard_errors is not None
    assert torch.equal(row.standard_errors, errors[4][order])
    assert (row.name, row.layer, row.p_values) == (NAMES[4], "3", None)
    assert torch.equal(found[torch.tensor(4)].scores, row.scores)  # type: ignore[index]
    assert [each.name for each in found] == NAMES
    assert len(found) == CLASSES
    assert NAMES[0] in found
    assert "cat" not in found
    frame = row.to_pandas()
    assert list(frame.columns) == ["filter", "score", "standard_error", "selected"]
    assert len(frame) == FILTERS


def test_a_class_without_images_has_a_row():
    scores = torch.tensor([[1.0, 2.0], [float("nan")] * 2])
    found = ClassFilters(scores, torch.tensor([3, 0]), class_names=["cat", "dog"])
    assert found["dog"].scores.isnan().all()
    assert "-" in str(found["dog"])
    parsed(found._repr_html_())


def small(names):
    return ClassFilters(torch.rand(len(names), 3), torch.ones(len(names)).long(), class_names=names)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("tiger cta", "tiger cat, Felis tigris"),
        ("Tiger_Cat", "tiger cat, Felis tigris"),
        ("felis tigris", "tiger cat, Felis tigris"),
        ("TENCH", "n01440764 tench"),
        ("Chihuahu", "n02085620-Chihuahua"),
        ("cat", "tiger cat, Felis tigris"),
    ],
)
def test_did_you_mean(wrong, near):
    names = ["tiger cat, Felis tigris", "n01440764 tench", "n02085620-Chihuahua", "goldfish"]
    found = small(names)
    calls = [
        lambda: found[wrong],
        lambda: found.class_index(wrong),
        lambda: found.filters_of(wrong),
        lambda: captum_classfilters.visualize.plot_class_filters(found, classes=[wrong]),
        lambda: captum_classfilters.identify.contrast_classes(
            method(), loader(), wrong, 1, class_names=[*names, *NAMES[4:]], show_progress=False
        ),
        lambda: captum_classfilters.metrics.collateral_damage(
            RESULTS["FilterGate"]().model, "3", renamed(names), loader(), classes=[wrong]
        ),
        lambda: captum_classfilters.pruning.specialize(
            RESULTS["FilterGate"]().model, renamed(names), [0, wrong], data()[0][:2]
        ),
        lambda: captum_classfilters.pruning.ClassFilterImportance(
            RESULTS["FilterGate"]().model, renamed(names), data()[0][:2], classes=[wrong]
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Did you mean") as error:
            call()
        assert near in str(error.value)
        assert wrong in str(error.value)


def renamed(names):
    own = table()
    return ClassFilters(
        own.scores, own.counts, own.selected, class_names=[*names, *NAMES[4:]], layer="2"
    )


def test_names_that_are_near_nothing():
    with pytest.raises(ValueError, match=r"No class named 'xyzzy'. The names are 'a', 'b'\."):
        small(["a", "b"])["xyzzy"]
    with pytest.raises(ValueError, match="not by a float"):
        small(["a", "b"])[0.5]
    with pytest.raises(ValueError, match="not by a slice"):
        small(["a", "b"])[0:2]
    with pytest.raises(ValueError, match="Class 2 is out of range"):
        small(["a", "b"])[2]
    assert close_names("", ["a"]) == []
    assert close_names("kitten", ["kitten", "mitten", "dog"])[0] == "kitten"


def test_layers_by_a_misspelt_name():
    for name in ("FilterLayers", "PrunableLayers", "ModelSpectra", "ModelSVD"):
        with pytest.raises(KeyError, match="7"):
            RESULTS[name]()["7"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("tench, Tinca tinca", "tench"),
        ("n01440764 tench, Tinca tinca", "tench"),
        ("n02123045_tiger_cat", "tiger_cat"),
        ("n02085620-Chihuahua", "Chihuahua"),
        ("n01440764", "n01440764"),
        ("nectarine", "nectarine"),
        ("  two   words ", "two words"),
        (", comma first", ", comma first"),
        ("a" * 70, "a" * 24 + "…"),
        (HOSTILE, "<script>alert('x')</scri…"),
        (7, "7"),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short
    assert len(short_name(name)) <= 25


def test_methods_say_what_they_are_bound_to():
    net = RESULTS["FilterGate"]().model
    kinds = captum_classfilters
    assert repr(method()) == "LayerFilterContribution(Sequential, layer='3')"
    several = kinds.LayerFilterFrequency(net, ["1", "3"])
    assert repr(several) == "LayerFilterFrequency(Sequential, layer=('1', '3'))"
    wrapped = kinds.LayerFilterAblation(lambda images: net(images), net[3])
    assert repr(wrapped) == "LayerFilterAblation(Sequential, layer='3')"
    parallel = kinds.LayerFilterContribution(torch.nn.DataParallel(net), "3")
    assert repr(parallel) == "LayerFilterContribution(Sequential, layer='3')"
    assert repr(kinds.FilterGate(net, "1")) == "FilterGate(Sequential, layer='1')"
    saliency = kinds.ClassFilterSaliency(net, None, table())
    assert repr(saliency).startswith("ClassFilterSaliency(Sequential, layer=None")


def test_what_is_equal_has_equal_hashes():
    """Whole numbers and floats, too, which are equal without being of one type."""

    @dataclasses.dataclass(frozen=True)
    class Pair:
        name: str
        number: float

    equal_by_value(Pair)
    assert Pair("a", 1) == Pair("a", 1.0)
    assert hash(Pair("a", 1)) == hash(Pair("a", 1.0))
    assert Pair("a", 1) != Pair("b", 1)
