"""Every public picture draws what people have: any type, zeros, one filter, two classes, long names."""

import dataclasses
import inspect
import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch.utils.data import TensorDataset

from captum_classfilters import ClassFilters, visualize
from captum_classfilters.answers.audit_forgetting import ForgettingAudit
from captum_classfilters.answers.confusion import ConfusionRepair
from captum_classfilters.answers.shortcuts import Shortcuts
from captum_classfilters.answers.sides import Side
from captum_classfilters.answers.unknown_inputs import UnknownReasons
from captum_classfilters.heads.accuracy_curve import AccuracyCurve
from captum_classfilters.identify.contrastive import FilterContrast
from captum_classfilters.identify.exemplars import Exemplars, ExemplarSide
from captum_classfilters.metrics.compare_attributions import AttributionComparison
from captum_classfilters.metrics.compare_methods import MethodComparison
from captum_classfilters.pruning.class_interpretation import ClassEffect, FilterInterpretation
from captum_classfilters.pruning.removal_curve import RemovalCurves
from captum_classfilters.spectral import (
    class_hypergraph,
    model_spectra,
    separation_test,
)
from captum_classfilters.visualize.feature_visualization import FeatureVisualization
from tests.pretend_device import pretend

LONG = "common iguana or green lizard of the tropical rain forest, Iguana iguana"


class Data:
    """What the pictures draw, of C classes and K filters, with numbers of one type and kind."""

    def __init__(self, classes=3, filters=7, dtype=torch.float32, kind="any", long=False, layers=4):
        self.classes, self.filters, self.dtype, self.kind = classes, filters, dtype, kind
        self.layers, self.device = layers, torch.device("cpu")
        self.random = torch.Generator().manual_seed(0)
        self.names = [f"{LONG} {c}" if long else f"class {c}" for c in range(classes)]
        self.methods = [f"{LONG} {m}" if long else f"method {m}" for m in range(3)]

    def __call__(self, *shape):
        values = torch.randn(shape, generator=self.random)
        values = {"any": values, "zero": 0 * values, "negative": -values.abs()}[self.kind]
        return values.to(self.device, self.dtype)

    def uniform(self, *shape):
        values = torch.rand(shape, generator=self.random)
        values = 0 * values if self.kind == "zero" else values
        return values.to(self.device, self.dtype)

    def table(self):
        return ClassFilters(
            self(self.classes, self.filters).cpu(),
            torch.full((self.classes,), 9),
            class_names=self.names,
            layer="layer4",
            method="LayerFilterContribution",
        ).with_selection(torch.arange(self.filters).expand(self.classes, -1) < 5)

    def exemplars(self):
        n = 3
        side = ExemplarSide(
            torch.arange(n).repeat(self.filters, 1),
            self(self.filters, n).float(),
            torch.zeros(self.filters, n, 2, dtype=torch.long),
            torch.tensor([1, 1, 6, 7]).expand(self.filters, n, 4),
            torch.zeros(self.filters, n, dtype=torch.long),
        )
        return Exemplars("conv", "mean", side, side, n, False)

    def separation(self):
        labels = torch.arange(12) % self.classes
        scores = self(12, self.filters).float() + torch.rand(12, 1, generator=self.random)
        options: dict[str, Any] = {"rule": "exemplars", "num_exemplars": 2, "show_progress": False}
        return separation_test(scores, labels, permutations=9, **options)

    def comparison(self):
        maps = {name: self(2, 3, 8, 8) for name in self.methods}
        return AttributionComparison(None, {}, self.uniform(2, 3, 8, 8), [0, 1], maps)

    def methods_compared(self):
        m = len(self.methods)
        square = torch.rand(m, m, generator=self.random).double()
        return MethodComparison(
            names=tuple(self.methods),
            tables={name: self.table() for name in self.methods},
            num_filters=5,
            overlap=square,
            chance=0.1,
            rank_correlation=2 * square - 1,
            hits=torch.full((m, self.classes), 4),
            random_hits=torch.full((2, self.classes), 2),
            accuracy=0.9,
            counts=torch.full((self.classes,), 9),
            seconds=dict(zip(self.methods, [1.0, 2.0, float("nan")], strict=True)),
        )

    def contrast(self):
        errors = torch.full((self.filters,), 0.1).double()
        scores = self(self.filters).double()
        return FilterContrast(
            self.names[0], self.names[1], scores, errors, 100 * errors, 1.0, 20, "layer4", "M"
        )

    def interpretations(self):
        effects = tuple(
            ClassEffect(name, value, value - 0.1, value + 0.1, value, 9)
            for name, value in zip(self.names[:4], (0.3, 0.1, -0.05, -0.2), strict=False)
        )
        return [
            FilterInterpretation(k, 0.01 * k, effects, effects[::-1]) for k in range(self.filters)
        ]

    def curves(self):
        steps = min(self.filters + 1, 5)
        accuracy = {
            self.methods[0]: torch.linspace(0.9, 0.1, steps)[None],
            "random": torch.rand(3, steps, generator=self.random),
        }
        orders = {name: torch.zeros(len(a), steps - 1).long() for name, a in accuracy.items()}
        return RemovalCurves("layer4", self.filters, orders, accuracy, 1000)

    def shortcuts(self):
        count = torch.full((self.classes,), 9)
        side = Side(*[torch.zeros(1)] * 5)
        return Shortcuts(
            filter_change=self(self.filters).cpu().double(),
            filter_spread=self.uniform(self.filters).cpu().double(),
            filter_q=torch.zeros(self.filters).double(),
            output_change=self(self.classes).cpu().double(),
            output_spread=self.uniform(self.classes).cpu().double(),
            output_q=torch.zeros(self.classes).double(),
            predicted=torch.stack([count, count + 3], 1),
            weight=self(self.classes, self.filters).cpu().double(),
            without=side,
            with_=side,
            paired=True,
            class_names=tuple(self.names),
            head="head",
            least=0.8,
            fdr=0.05,
        )

    def confusion_repair(self):
        removed = torch.zeros(self.classes, self.filters, dtype=torch.bool)
        removed[0, 0] = self.kind != "zero"
        counts = torch.tensor([20, 20, 30, 0, 50])  # of two classes, none is another
        hits = torch.tensor([5, 15, 27, 0, 42])[:, None].expand(5, 6)
        change = torch.tensor([-2, 1, -1, 0, 0])
        moved = torch.stack([0 * change, change, -change, *[0 * change] * 3], 1)
        lost, gained = (-change).clamp(min=0), change.clamp(min=0)
        names = self.names[0], self.names[1]
        return ConfusionRepair(
            torch.nn.Identity(), removed, *names, hits + moved, lost, gained, counts
        )

    def reasons(self, images=20):
        named = min(self.filters, 7)
        scores = self(images).cpu()
        after = scores[:, None] - self.uniform(images, named).cpu().cumsum(1)
        filters = torch.arange(named).expand(images, -1)
        values, predicted = self.uniform(images, named).cpu(), torch.arange(images) % self.classes
        return UnknownReasons(
            scores, predicted, predicted, filters, values, 1 - values, after, 0.5, tuple(self.names)
        )

    def audit(self):
        models = self.methods if self.classes < 1000 else [f"model {m}" for m in range(20)]
        return ForgettingAudit(tuple(models), *self.uniform(5, len(models)).cpu().double())

    def spectra(self):
        widths = [9] * (self.layers + 1)
        torch.manual_seed(0)
        net = torch.nn.Sequential()
        for index, (n, m) in enumerate(itertools.pairwise(widths)):
            net.add_module(f"a_layer_with_a_name_{index}", torch.nn.Linear(n, m))
        return model_spectra(net)


STEPS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 512]
CALLS = {
    "plot_accuracy_curve": lambda d, v, **o: v.plot_accuracy_curve(
        AccuracyCurve(
            STEPS,
            {name: [0.1 * (1 + i)] * 14 for i, name in enumerate(d.methods)},
            {},
            0.9,
            [0.1] * 14,
            [0.02] * 14,
            100,
        ),
        **o,
    ),
    "plot_class_bars": lambda d, v, **o: v.plot_class_bars(
        d.interpretations(), d(d.filters, 3, 5, 5), **o
    ),
    "plot_class_filters": lambda d, v, **o: v.plot_class_filters(d.table(), **o),
    "plot_class_overlap": lambda d, v, **o: v.plot_class_overlap(d.table(), **o),
    "plot_class_separation": lambda d, v, **o: v.plot_class_separation(
        {f"layer {n}": d.separation() for n in range(d.layers)}, score="purity", **o
    ),
    "plot_comparison": lambda d, v, **o: v.plot_comparison(
        d.comparison(), class_names=d.names, **o
    ),
    "plot_confusion_repair": lambda d, v, **o: v.plot_confusion_repair(d.confusion_repair(), **o),
    "plot_exemplars": lambda d, v, **o: v.plot_exemplars(
        d.exemplars(), TensorDataset(d.uniform(3, 3, 8, 8)), [0], class_names=d.names, **o
    ),
    "plot_explanations": lambda d, v, **o: v.plot_explanations(
        d.uniform(2, 3, 8, 8),
        {name: d(2, 3, 8, 8) for name in d.methods},
        titles=d.names[:2],
        **o,
    ),
    "plot_exponents": lambda d, v, **o: v.plot_exponents(d.spectra(), **o),
    "plot_features": lambda d, v, **o: v.plot_features(
        FeatureVisualization(
            d.uniform(3, 3, 8, 8), d(3), d(3), d(4, 3), torch.tensor([True, True, False])
        ),
        d.methods,
        **o,
    ),
    "plot_filter_contrast": lambda d, v, **o: v.plot_filter_contrast(d.contrast(), **o),
    "plot_filter_correlation": lambda d, v, **o: v.plot_filter_correlation(
        d(d.filters, 3, 3, 3), d(d.classes, d.filters), class_names=d.names, **o
    ),
    "plot_filter_grid": lambda d, v, **o: v.plot_filter_grid(d(d.filters, 3, 3, 3), [0], **o),
    "plot_filter_maps": lambda d, v, **o: v.plot_filter_maps(
        d.uniform(3, 8, 8), d(d.filters, 4, 4), d.table(), 1, **o
    ),
    "plot_forgetting": lambda d, v, **o: v.plot_forgetting(d.audit(), **o),
    "plot_gate_and_weight": lambda d, v, **o: v.plot_gate_and_weight(
        d.uniform(d.classes, d.filters),
        d(d.classes, d.filters),
        other_weight=d(d.classes, d.filters),
        class_names=d.names,
        **o,
    ),
    "plot_hypergraph": lambda d, v, **o: v.plot_hypergraph(
        class_hypergraph(
            torch.eye(d.classes).repeat(1, -(-d.filters // d.classes))[:, : d.filters],
            torch.arange(d.classes),
            class_names=d.names,
            threshold=0.01,
        ),
        **o,
    ),
    "plot_method_comparison": lambda d, v, **o: v.plot_method_comparison(d.methods_compared(), **o),
    "plot_mutual_information": lambda d, v, **o: v.plot_mutual_information(
        d.uniform(d.classes, d.filters), class_names=d.names, **o
    ),
    "plot_profile_similarity": lambda d, v, **o: v.plot_profile_similarity(
        d.uniform(d.classes, d.classes), d.names, **o
    ),
    "plot_removal_curves": lambda d, v, **o: v.plot_removal_curves(d.curves(), **o),
    "plot_shortcuts": lambda d, v, **o: v.plot_shortcuts(d.shortcuts(), **o),
    "plot_spectrum": lambda d, v, **o: v.plot_spectrum(next(iter(d.spectra())), **o),
    "plot_unknown_reasons": lambda d, v, **o: v.plot_unknown_reasons(d.reasons(), **o),
}
SIZES: dict[str, dict[str, Any]] = {
    "many": {"classes": 60, "filters": 300, "layers": 30, "long": True},
    "plain": {"classes": 4, "filters": 6},
    "small": {"classes": 2, "filters": 1},
    "long": {"classes": 5, "filters": 4, "long": True},
    "large": {"classes": 1000, "filters": 2048, "layers": 90},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "zero": {"kind": "zero"},
    "negative": {"kind": "negative"},
}


def drawn(name, size, **options):
    figure, axes = CALLS[name](Data(**SIZES[size]), visualize, **options)
    figure.canvas.draw()  # what breaks there breaks here
    return figure, axes


def test_every_public_picture_is_tried():
    assert set(CALLS) == {name for name in visualize.__all__ if name.startswith("plot_")}


@pytest.mark.parametrize("size", [size for size in SIZES if size not in ("large", "many")])
@pytest.mark.parametrize("name", CALLS)
def test_draws(name, size, recwarn):
    drawn(name, size)
    assert not recwarn.list


# What is given numbers, and not a result that holds them.
OF_NUMBERS = [
    "plot_class_bars",
    "plot_explanations",
    "plot_filter_correlation",
    "plot_filter_grid",
    "plot_filter_maps",
    "plot_gate_and_weight",
    "plot_mutual_information",
    "plot_profile_similarity",
]


@pytest.mark.parametrize("name", [*OF_NUMBERS, "plot_exemplars"])
def test_draws_tensors_of_an_accelerator(name):
    data = Data(**SIZES["plain"])
    with pretend("cuda") as device:
        exemplars = data.exemplars()
        vars(data).update(exemplars=lambda: exemplars, device=device)
        CALLS[name](data, visualize)


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_from_elsewhere_are_drawn_as_tensors_are(name):
    """Every Tensor that the call gives becomes an array."""
    converted = []

    def called(*args, **options):
        def other(value):
            if isinstance(value, dict):
                return {key: other(part) for key, part in value.items()}
            if isinstance(value, torch.Tensor):
                converted.append(value)
                return np.asarray(value)
            return value

        options = {name: other(value) for name, value in options.items()}
        return getattr(visualize, name)(*map(other, args), **options)

    expected, _ = drawn(name, "plain")
    figure, _ = CALLS[name](Data(**SIZES["plain"]), SimpleNamespace(**{name: called}))
    figure.canvas.draw()
    assert converted
    assert np.array_equal(figure.canvas.buffer_rgba(), expected.canvas.buffer_rgba())


@pytest.mark.parametrize("name", CALLS)
def test_draws_on_the_callers_axes(name):
    assert "plt_fig_axis" in inspect.signature(getattr(visualize, name)).parameters
    figure, axes = drawn(name, "plain")
    wanted = np.atleast_1d(np.asarray(axes, dtype=object))
    own = Figure(figsize=figure.get_size_inches())
    given = own.subplots(*(wanted.shape if wanted.ndim == 2 else (1, wanted.size)), squeeze=False)
    own_figure, own_axes = drawn(
        name, "plain", plt_fig_axis=(own, given.item() if wanted.size == 1 else given.flatten())
    )
    assert own_figure is own
    assert np.shape(own_axes) == np.shape(axes)
    assert set(np.ravel(own_axes)) == set(given.flat)
    for one in given.flat:
        assert one.has_data()
    with pytest.raises(ValueError, match="plt_fig_axis holds 81 axes"):
        drawn(name, "plain", plt_fig_axis=(own, [own.axes[0]] * 81))
    with pytest.raises(ValueError, match="pair of figure and axes"):
        drawn(name, "plain", plt_fig_axis=own)


def test_a_confusion_repair_shows_changes_in_points():
    _, axes = drawn("plot_confusion_repair", "plain")
    dots = {line.get_label(): np.asarray(line.get_xdata()) for line in axes.get_lines()}
    cell, true, predicted, other, every = dots["the edit"]
    assert (cell, true, every) == pytest.approx((-10, 5, 0))
    assert predicted == pytest.approx(-100 / 30)
    assert np.isnan(other)
    assert dots["a lowered bias"][0] == pytest.approx(10)
    assert dots["random edits, mean"][0] == 0
    assert labels(axes, "y")[:1] == ["class 0, taken for\nclass 1\n25.0 → 15.0 %"]
    assert labels(axes, "y")[3] == "other classes, right\nno image"
    assert axes.get_title(loc="left") == "1 of the head's 24 weights edited"
    _, axes = drawn("plot_confusion_repair", "zero")
    assert "model unchanged" in axes.get_title(loc="left")


def test_reasons_show_the_most_unknown_images_and_where_they_pass():
    data = Data(**SIZES["plain"])
    found = data.reasons()
    _, axes = visualize.plot_unknown_reasons(found, most=3)
    order = found.scores.argsort(descending=True)[:3].tolist()
    rings = [line for line in axes.get_lines() if line.get_fillstyle() == "none"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in rings] == pytest.approx(
        found.scores[order].tolist()
    )
    assert labels(axes, "y") == [f"image {i}, as class {i % 4}" for i in order]
    assert [text.get_text() for text in axes.texts] == ["filters 0, 1, 2, 3, 4, …"] * 3
    assert "the 3 of 20 images, the most unknown" in axes.get_title(loc="left")
    with pytest.raises(ValueError, match="most=0"):
        visualize.plot_unknown_reasons(found, most=0)


def test_bars_of_an_audit_are_its_numbers():
    audit = Data(**SIZES["plain"]).audit()
    _, axes = visualize.plot_forgetting(audit)
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    columns = [audit.forget_accuracy, audit.retain_accuracy, audit.linear_probe]
    columns += [audit.neighbor_probe, audit.other_classes_probe]
    torch.testing.assert_close(torch.tensor(heights).T, torch.stack(columns), check_dtype=False)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(audit.models)


def labels(axes, side):
    return [text.get_text() for text in getattr(axes, f"get_{side}ticklabels")()]


@pytest.mark.parametrize(
    "name",
    [
        "plot_class_filters",
        "plot_class_overlap",
        "plot_filter_correlation",
        "plot_filter_grid",
        "plot_class_bars",
        "plot_gate_and_weight",
        "plot_hypergraph",
        "plot_mutual_information",
        "plot_profile_similarity",
    ],
)
def test_large_tables_show_the_largest_and_say_so(name):
    figure, axes = CALLS[name](Data(**SIZES["large"]), visualize)
    panels = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    assert len(panels) <= 128
    said = figure.get_suptitle() + "".join(
        one.get_xlabel() + one.get_title(loc="left") for one in panels
    )
    assert " of 2,048 " in said or " of 1,000 " in said
    assert max(len(labels(one, side)) for one in panels for side in "xy") <= 200
    assert max(figure.get_size_inches()) <= 25


def test_which_of_a_large_table_is_the_callers_choice():
    table = Data(classes=50, filters=300).table()
    _, axes = visualize.plot_class_filters(
        table, classes=["class 3", 1], filters=[9, 4, 6], order="index"
    )
    expected = table.scores[[3, 1]][:, [9, 4, 6]]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert labels(axes, "y") == ["class 3", "class 1"]
    assert labels(axes, "x") == ["9", "4", "6"]
    _, axes = visualize.plot_class_filters(table, classes=2, filters=300, order="index")
    rows = table.scores.abs().amax(1).topk(2).indices.sort().values
    np.testing.assert_array_equal(axes.images[0].get_array(), table.scores[rows])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"classes": 0}, "classes=0; expected a positive number"),
        (
            {"classes": ["cat"]},
            "classes hold 'cat'; expected 0 to 49, or names. The names are 'class 0'",
        ),
        ({"filters": [300]}, "filters hold 300; expected 0 to 299"),
        ({"filters": []}, "filters are empty"),
        ({"filters": "all"}, "expected a number, or a list"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            visualize.plot_class_filters(table, **options)


def texts(figure):
    """All that is written in a figure, in all of its axes."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("name", CALLS)
def test_long_names_are_short_and_apart(name):
    figure, axes = drawn(name, "long")
    for one in np.atleast_1d(np.asarray(axes, dtype=object)).ravel():
        legend = one.get_legend()
        entries = [text.get_text() for text in legend.get_texts()] if legend else []
        for side in (labels(one, "x"), labels(one, "y"), entries):
            named = [text for text in side if text.startswith("common")]
            assert len(set(named)) == len(named)
            assert all(len(text.split(",")[0]) <= 25 for text in named)
    assert not any(LONG in text for text in texts(figure))


@pytest.mark.parametrize("name", CALLS)
def test_no_text_is_cut_off_or_hides_another(name):
    figure, _ = drawn(name, "many")
    whole = figure.bbox
    for axes in figure.axes:
        for side in (axes.xaxis, axes.yaxis):
            shown = [label for label in side.get_ticklabels() if label.get_text()]
            boxes = [label.get_window_extent() for label in shown if label.get_visible()]
            boxes.sort(key=lambda box: box.x0 if side is axes.xaxis else box.y0)
            for one, two in itertools.pairwise(boxes):
                apart = (two.x0 - one.x1) if side is axes.xaxis else (two.y0 - one.y1)
                assert apart > -2 or _slanted(side)
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if text.get_text() and text.get_visible() and text.get_figure() is figure:
            inside = box.x0 > -2 and box.x1 < whole.x1 + 2 and box.y0 > -2 and box.y1 < whole.y1 + 2
            assert inside or not _is_drawn(text, figure), text.get_text()


def _slanted(side):
    return any(label.get_rotation() not in (0, 90) for label in side.get_ticklabels())


def _is_drawn(text, figure):
    """Ticks beyond an axis' limits have labels that are not drawn."""
    for axes in figure.axes:
        for side in (axes.xaxis, axes.yaxis):
            ends = sorted(side.get_view_interval())
            for tick in [*side.get_major_ticks(), *side.get_minor_ticks()]:
                if text in (tick.label1, tick.label2):
                    return (
                        axes.axison and ends[0] <= tick.get_loc() <= ends[1] and text.get_visible()
                    )
    return True


@pytest.mark.parametrize(("exact", "said"), [(True, "exact"), (False, "not exact"), (None, "")])
def test_contributions_say_whether_they_are_exact(exact, said):
    data = Data()
    plain = data.table()
    provenance = {} if exact is None else {"exact": exact}
    table = ClassFilters(
        plain.scores,
        plain.counts,
        plain.selected,
        layer="layer4",
        method="LayerFilterContribution",
        provenance=provenance,
    )
    end = f", {said}" if said else ""
    _, axes = visualize.plot_class_filters(table)
    assert axes.get_title(loc="left") == f"LayerFilterContribution at layer4{end}"
    figure, _ = visualize.plot_filter_maps(data.uniform(3, 8, 8), data(7, 4, 4), table, 1)
    assert figure.get_suptitle() == f"LayerFilterContribution at layer4{end}"
    contrast = dataclasses.replace(data.contrast(), provenance=provenance)
    _, axes = visualize.plot_filter_contrast(contrast)
    assert axes.get_title(loc="left") == f"M at layer4{end}, 20 images"


def test_an_image_that_was_not_optimized_says_so_in_the_picture():
    _, grid = CALLS["plot_features"](Data(), visualize)
    said = [[text.get_text() for text in one.texts] for one in grid]
    assert said == [[], [], ["nothing was\noptimized"]]


# What is not finite


NOT_FINITE = {
    "plot_class_bars": lambda v, x, d: v.plot_class_bars(d.interpretations(), x(7, 3, 5, 5)),
    "plot_explanations": lambda v, x, d: v.plot_explanations(x(2, 3, 8, 8), {}),
    "maps": lambda v, x, d: v.plot_explanations(d(2, 3, 8, 8), {"a": x(2, 3, 8, 8)}),
    "plot_filter_correlation": lambda v, x, d: v.plot_filter_correlation(x(7, 3, 3), d(3, 7)),
    "scores": lambda v, x, d: v.plot_filter_correlation(d(7, 3, 3), x(3, 7)),
    "plot_filter_grid": lambda v, x, d: v.plot_filter_grid(x(7, 3, 3, 3), [0]),
    "plot_filter_maps": lambda v, x, d: v.plot_filter_maps(d(3, 8, 8), x(7, 4, 4), d.table(), 1),
    "plot_gate_and_weight": lambda v, x, d: v.plot_gate_and_weight(x(3, 7), d(3, 7)),
    "weight": lambda v, x, d: v.plot_gate_and_weight(d(3, 7), x(3, 7)),
    "other_weight": lambda v, x, d: v.plot_gate_and_weight(d(3, 7), d(3, 7), other_weight=x(3, 7)),
    "plot_mutual_information": lambda v, x, d: v.plot_mutual_information(x(3, 7)),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_nan_and_infinity_are_named(name, value):
    data = Data()

    def broken(*shape):
        values = torch.zeros(shape)
        values[(0,) * len(shape)] = value
        return values

    with pytest.raises(ValueError, match="1 NaN or infinite value"):
        NOT_FINITE[name](visualize, broken, data)


def test_unknown_similarities_are_gray_and_infinite_ones_are_named():
    values = np.array([[1.0, np.nan, 0.5], [np.nan, 1.0, 0.25], [0.5, 0.25, 1.0]])
    _, axes = visualize.plot_profile_similarity(values, "abc")
    assert {text.get_text() for text in axes.texts} == {"0.50", "0.25"}
    values[0, 1] = np.inf
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        visualize.plot_profile_similarity(values, "abc")


# Images of any number of channels


def shown(images, **options):
    _, grid = visualize.plot_explanations(images, {}, **options)
    return np.asarray(grid[0, 0].images[0].get_array())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_channels_of_an_image(dtype):
    for channels in (1, 2, 4, 7):
        images = torch.rand(1, channels, 5, 6).to(dtype)
        np.testing.assert_allclose(shown(images), images[0].double().mean(0), atol=1e-7)
    images = torch.rand(1, 7, 5, 6).to(dtype)
    expected = images[0, [6, 2, 3]].double().permute(1, 2, 0)
    np.testing.assert_array_equal(shown(images, channels=(6, 2, 3)), expected)
    np.testing.assert_array_equal(shown(images[:, :3]), images[0, :3].double().permute(1, 2, 0))


def test_values_outside_the_unit_interval():
    images = torch.rand(1, 3, 5, 6)
    bytes_ = (255 * images).to(torch.uint8)
    np.testing.assert_allclose(shown(bytes_), bytes_[0].permute(1, 2, 0) / 255)
    np.testing.assert_allclose(shown(images - 1e-4), (images[0] - 1e-4).clamp(0).permute(1, 2, 0))
    far = 7 * images - 3
    low, high = far.min(), far.max()
    np.testing.assert_allclose(shown(far), ((far[0] - low) / (high - low)).permute(1, 2, 0), 1e-5)
    assert shown(torch.full((1, 1, 4, 4), 0.5)).max() == 0.5
    _, grid = visualize.plot_explanations(torch.full((1, 2, 4, 4), 0.5), {})
    assert grid[0, 0].images[0].get_clim() == (0, 1)  # gray means the same in every picture


@pytest.mark.parametrize("channels", [(0, 1, 4), (0, 1), (-1, 0, 1), (0, 1, 2, 3)])
def test_channels_that_are_not_there(channels):
    for call in (
        lambda: visualize.plot_explanations(torch.rand(1, 4, 5, 5), {}, channels=channels),
        lambda: visualize.plot_filter_grid(torch.rand(2, 4, 5, 5), [0], channels=channels),
        lambda: visualize.plot_class_bars(
            Data().interpretations(), torch.rand(7, 4, 5, 5), channels=channels
        ),
    ):
        with pytest.raises(ValueError, match="choose three from 0 to 3"):
            call()


def test_weights_of_any_number_of_channels():
    weights = torch.randn(4, 5, 3, 3)
    _, grid = visualize.plot_filter_grid(weights, [2])
    np.testing.assert_allclose(grid[0].images[0].get_array(), weights[2].double().mean(0))
    _, grid = visualize.plot_filter_grid(weights, [2], channels=(4, 0, 1))
    part = weights[2, [4, 0, 1]]
    expected = 0.5 + part / (2 * part.abs().max())
    np.testing.assert_allclose(grid[0].images[0].get_array(), expected.permute(1, 2, 0), atol=1e-6)
    pictures = weights.sigmoid()
    _, grid = visualize.plot_filter_grid(pictures, [2])
    np.testing.assert_allclose(grid[0].images[0].get_array(), pictures[2].double().mean(0))
    # One filter of positive weights among others is one of weights, too.
    weights[1] = 0.25
    _, grid = visualize.plot_filter_grid(weights[:, :3], [1])
    np.testing.assert_allclose(grid[0].images[0].get_array(), 1)


# Maps


@pytest.mark.parametrize(
    ("maps", "sign", "said"),
    [
        (torch.zeros(1, 3, 4, 4), "all", "zero"),
        (-torch.rand(1, 3, 4, 4) - 0.1, "positive", "no positive values"),
        (torch.rand(1, 3, 4, 4) + 0.1, "negative", "no negative values"),
    ],
)
def test_maps_without_values_of_the_sign_say_so(maps, sign, said):
    _, grid = visualize.plot_explanations(torch.rand(1, 3, 4, 4), {"a": maps}, sign=sign)
    assert [text.get_text() for text in grid[0, 1].texts] == [said]


@pytest.mark.parametrize("sign", ["all", "positive", "negative", "absolute_value"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_maps_are_scaled_by_themselves(sign, scale, recwarn):
    maps = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, 6, 6)
    _, plain = visualize.plot_explanations(images, {"a": maps}, sign=sign)
    _, scaled = visualize.plot_explanations(images, {"a": scale * maps}, sign=sign)
    one, two = (np.asarray(grid[0, 1].images[0].get_array()) for grid in (plain, scaled))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert not recwarn.list
    top = maps[0].sum(0).abs().numpy()
    if sign == "all":  # warm where the sum over the channels is positive
        assert (np.sign(one) == np.sign(maps[0].sum(0).numpy())).all()
        assert abs(one).argmax() in np.flatnonzero(top >= np.quantile(top, 0.9))


def test_blended_maps_need_the_images_size():
    images, small = torch.rand(1, 2, 8, 8), torch.rand(1, 1, 4, 4)
    visualize.plot_explanations(images, {"a": small})
    visualize.plot_explanations(images, {"a": images}, method="blended_heat_map")
    with pytest.raises(ValueError, match=r"interpolate, or choose method='heat_map'"):
        visualize.plot_explanations(images, {"a": small}, method="blended_heat_map")


def test_attributions_in_a_tuple_of_one_are_taken():
    images = torch.rand(2, 3, 4, 4)
    for given in (images, (images,)):
        _, grid = visualize.plot_explanations(images, {"a": given})
        assert grid.shape == (2, 2)


def test_explanations_refuse():
    images: Any = torch.rand(2, 3, 4, 4)
    for call, message in [
        (lambda: visualize.plot_explanations(images, images), "is a Tensor; expected titles and"),
        (lambda: visualize.plot_explanations(images, {"a": (images, images)}), "'a' are a tuple"),
        (lambda: visualize.plot_explanations(images, {"a": images[:1]}), "expected 2 maps"),
        (lambda: visualize.plot_explanations(images[0], {}), r"expected \(N, C, H, W\)"),
        (lambda: visualize.plot_explanations(images[:0], {}), "an image at least"),
        (lambda: visualize.plot_explanations(images, {}, method="masked"), "method='masked'"),
        (lambda: visualize.plot_explanations(images, {}, sign="plus"), "sign='plus'"),
        (lambda: visualize.plot_explanations(images, {}, outlier_perc=100), "outlier_perc=100"),
        (lambda: visualize.plot_explanations(images, {}, titles=["a"]), "1 titles for 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_class_without_filters_has_no_maps():
    table = ClassFilters(torch.rand(2, 3), torch.ones(2).long(), class_names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"No filters .* 'dog': choose some with"):
        visualize.plot_filter_maps(torch.rand(3, 4, 4), torch.rand(3, 2, 2), table, "dog")
    with pytest.raises(ValueError, match="num_filters=0; expected a positive number"):
        visualize.plot_filter_maps(
            torch.rand(3, 4, 4), torch.rand(3, 2, 2), table.select(2), "dog", num_filters=0
        )


def test_marks_may_be_a_list():
    marked = [True, False] * 4
    for given in (marked, np.array(marked), torch.tensor(marked)):
        _, grid = visualize.plot_filter_grid(torch.rand(8, 3, 5, 5), [*range(8)], marked=given)
        assert [len(axes.lines) for axes in grid] == [1, 0] * 4
    with pytest.raises(ValueError, match=r"marked has shape \(2,\)"):
        visualize.plot_filter_grid(torch.rand(8, 3, 5, 5), [0], marked=[True, False])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_matrices_are_named(shape):
    empty = torch.rand(shape)
    for call in (
        lambda: visualize.plot_gate_and_weight(empty, empty),
        lambda: visualize.plot_mutual_information(empty),
        lambda: visualize.plot_filter_correlation(torch.rand(shape[1], 4), empty),
    ):
        with pytest.raises(ValueError, match="not empty"):
            call()


def test_bounds_are_one_or_one_of_each_class():
    for bound in (2.0, torch.tensor(2.0), torch.tensor([1.0, 2.0, 0.5])):
        _, axes = visualize.plot_mutual_information(torch.rand(3, 8), bound=bound)
        assert "of at most 2.000" in axes.get_title(loc="left")
    with pytest.raises(ValueError, match=r"bound has shape \(7,\); expected a number, or one"):
        visualize.plot_mutual_information(torch.rand(3, 8), bound=torch.rand(7))


@pytest.mark.parametrize("name", ["plot_mutual_information", "plot_filter_grid"])
def test_axes_that_are_none_are_named(name):
    draw = {
        "plot_mutual_information": lambda pair: visualize.plot_mutual_information(
            torch.rand(3, 8), plt_fig_axis=pair
        ),
        "plot_filter_grid": lambda pair: visualize.plot_filter_grid(
            torch.rand(1, 3, 5, 5), [0], plt_fig_axis=pair
        ),
    }[name]
    figure: Any = Figure()
    with pytest.raises(ValueError, match="holds a NoneType; expected axes of Matplotlib"):
        draw((figure, None))
    with pytest.raises(ValueError, match="holds an Axes; expected figure of Matplotlib"):
        draw((figure.subplots(), figure))


def test_units_and_data_sets_of_exemplars():
    data: Any = Data()
    with pytest.raises(ValueError, match="units=0 is one number; expected a list"):
        visualize.plot_exemplars(data.exemplars(), [torch.rand(3, 8, 8)] * 3, 0)  # type: ignore[arg-type]
    batches = [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"dataset has 1 entries, .* and no batches"):
        visualize.plot_exemplars(data.exemplars(), batches, [0])


@pytest.mark.parametrize("names", [[], ["cat"], {0: "cat"}], ids=["none", "one", "by index"])
@pytest.mark.parametrize("name", ["plot_exemplars", "plot_comparison"])
def test_a_class_without_a_name_is_named(name, names):
    data: Any = Data()
    seen = data.exemplars()
    label = torch.tensor([0, -1, 1]).repeat(data.filters, 1)  # -1 is not known
    side = dataclasses.replace(seen.highest, label=label)
    seen = dataclasses.replace(seen, highest=side, lowest=side)
    draw = {
        "plot_exemplars": lambda: visualize.plot_exemplars(
            seen, [torch.rand(3, 8, 8)] * 3, [0], class_names=names
        ),
        "plot_comparison": lambda: visualize.plot_comparison(data.comparison(), class_names=names),
    }[name]
    first = len(names)
    with pytest.raises(ValueError, match=f"class_names has {first} names, none for class {first};"):
        draw()


@pytest.mark.parametrize("images", [-1, 0])
def test_images_of_a_comparison_are_a_positive_number(images):
    with pytest.raises(ValueError, match=f"images={images}; expected a positive number"):
        visualize.plot_comparison(Data().comparison(), images=images)
    _, grid = visualize.plot_comparison(Data().comparison(), images=1)
    assert len(grid) == 1


@pytest.mark.parametrize("order", [(2, 0, 1), (2, 1, 0), (0, 1, 2)])
def test_an_accuracy_curve_rises_with_its_numbers(order):
    numbers, values, spread = [1, 3, 50], [0.2, 0.4, 0.9], [0.05, 0.1, 0.02]
    given = [[column[place] for place in order] for column in (numbers, values, spread)]
    curve = AccuracyCurve(given[0], {"own": given[1]}, {}, 0.9, given[1], given[2], 10)
    _, axes = visualize.plot_accuracy_curve(curve)
    for line in axes.lines[1:]:  # the table's, and that of random filters
        assert np.asarray(line.get_xdata()).tolist() == numbers
        assert np.asarray(line.get_ydata()).tolist() == pytest.approx([20, 40, 90])
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    edges = {(x, round(y)) for x, y in band.tolist()}
    assert edges == {(1, 15), (1, 25), (3, 30), (3, 50), (50, 88), (50, 92)}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([None], "classes hold None; expected 0 to 2"),
        ([1.5], r"classes hold 1\.5; expected 0 to 2"),
        ([True], "classes hold True; expected 0 to 2"),
        ([0, [1]], r"classes hold \[1\]; expected 0 to 2"),
        (1.5, r"classes=1\.5; expected a number, or a list"),
        (None, "classes=None; expected a number, or a list"),
    ],
)
def test_rows_that_are_no_numbers_are_named(chosen, message):
    with pytest.raises(ValueError, match=message):
        visualize.plot_class_filters(Data().table(), classes=chosen)
    rows: Any = [np.int64(2), torch.tensor(0)]
    _, axes = visualize.plot_class_filters(Data().table(), classes=rows)
    assert labels(axes, "y") == ["class 2", "class 0"]


def test_a_data_set_of_what_is_no_tensor():
    pil = pytest.importorskip("PIL.Image")
    pictures = [pil.new("RGB", (8, 8), (255, 0, 0))] * 3
    with pytest.raises(ValueError, match=r"gives an Image; expected a Tensor .* to_display"):
        visualize.plot_exemplars(Data().exemplars(), pictures, [0])
    to_display = lambda image: torch.as_tensor(np.array(image)).permute(2, 0, 1)  # noqa: E731
    _, grid = visualize.plot_exemplars(Data().exemplars(), pictures, [0], to_display=to_display)
    assert grid[0, 0].images[0].get_array()[0, 0].tolist() == [1, 0, 0]


# Names


def test_names_are_short_and_stay_apart():
    names = ["tench, Tinca tinca", f"{LONG} A", f"{LONG} B", "costs $5 or $6"]
    table = ClassFilters(torch.rand(4, 3), torch.ones(4).long(), class_names=names)
    figure, axes = visualize.plot_class_filters(table)
    assert labels(axes, "y") == [
        "tench",
        "common iguana or… [1]",
        "common iguana or… [2]",
        r"costs \$5 or \$6",
    ]
    figure.canvas.draw()  # dollars are not mathematics
    word = "Donaudampfschifffahrtsgesellschaft"
    assert visualize.figures.short_name(word) == f"{word[:24]}…"


@pytest.mark.parametrize("name", CALLS)
def test_dollars_are_drawn_as_they_are(name):
    data = Data()
    data.names, data.methods = ([f"cost$ {place}" for place in range(3)] for _ in range(2))
    figure, _ = CALLS[name](data, visualize)
    before = re.findall(r"cost(\\*)\$", "\n".join(texts(figure)))
    assert set(before) <= {"\\"}


def test_a_callers_headline_stays():
    own = Figure()
    own.suptitle("mine")
    axes = own.subplots(1, 4)
    visualize.plot_method_comparison(Data().methods_compared(), plt_fig_axis=(own, axes))
    assert own.get_suptitle() == "mine"
    visualize.plot_method_comparison(
        Data().methods_compared(), title="theirs", plt_fig_axis=(own, axes)
    )
    assert own.get_suptitle() == "theirs"
