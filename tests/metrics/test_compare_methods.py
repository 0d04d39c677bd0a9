"""Methods against methods: every number against its definition, and the picture."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation, Saliency
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

from captum_classfilters import (
    ClassFilters,
    FilterGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerSingularDirection,
    decompose,
    identify_class_filters,
)
from captum_classfilters.identify import binomial_interval
from captum_classfilters.identify.contrastive import FilterContrast
from captum_classfilters.metrics import compare_methods, evaluate_classifier, standard_methods
from captum_classfilters.spectral import factor_layer
from captum_classfilters.testing import planted_network
from captum_classfilters.visualize import plot_filter_contrast, plot_method_comparison
from tests.models import QUIET, ChannelsLast, batches, deep, joined, pool_linear


def two_methods(model, layer):
    return {
        "votes": LayerFilterFrequency(model, layer, top_k=2),
        "logits": LayerFilterContribution(model, layer),
    }


def test_standard_methods_are_told_the_axis_of_the_filters():
    """Where the layer could not tell it, and where both axes have the filters' number."""
    for width in (5, 7):  # maps of three and of five positions a side
        twin = pool_linear(filters=5)
        model = ChannelsLast(twin).eval()
        data = batches(size=width)
        methods = standard_methods(model, "transpose", data, channel_dim=-1)
        table = methods["gradient x activation"]()  # type: ignore[operator]
        layer = LayerGradientXActivation(twin, twin[1])
        expected = identify_class_filters(layer, data, **QUIET)
        assert torch.allclose(table.scores, expected.scores, atol=1e-6)
    found = compare_methods(
        model, "transpose", data, batches(20, size=7), num_filters=2, channel_dim=-1, **QUIET
    )
    assert "gradient x activation" in found.names


def test_at_the_head_sufficiency_is_the_accuracy_of_the_decomposed_head():
    model, train, test = pool_linear(), batches(60), batches(44)
    found = compare_methods(
        model, "1", train, test, methods=two_methods(model, "1"), num_filters=2, **QUIET
    )
    for row, name in enumerate(found.names):
        head = decompose(model, found.tables[name])
        scores = evaluate_classifier(head, test, **QUIET)
        assert float(found.sufficiency[row]) == pytest.approx(scores.accuracy)
        recall = found.hits[row].double() / found.counts
        assert torch.allclose(recall, scores.recall)
    assert found.accuracy == pytest.approx(evaluate_classifier(model, test, **QUIET).accuracy)
    assert found.counts.tolist() == torch.bincount(joined(test)[1]).tolist()


def test_filters_that_no_image_needs_are_told_by_the_table_alone():
    """No single filter decides an image, so that the accuracy without it stays, and none is selected."""
    model, data = pool_linear(), batches(24)
    head = model[-1]
    assert isinstance(head, torch.nn.Linear)
    head.weight.data *= 1e-3  # the bias decides
    head.bias.data = torch.tensor([9.0, 0.0, 0.0])
    answers = [(x, torch.zeros_like(y)) for x, y in data]
    standard = standard_methods(model, "1", answers, num_filters=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Every score")
        found = compare_methods(
            model,
            "1",
            answers,
            batches(30),
            methods={"CAR per class": standard["CAR per class"]},
            num_filters=2,
            **QUIET,
        )
    assert not found.tables["CAR per class"].selected.any()


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_at_an_inner_layer_each_logit_is_computed_with_its_own_filters(replacement):
    model, (x, y) = deep(), joined(batches(40))
    methods = two_methods(model, "stage1")
    found = compare_methods(
        model,
        "stage1",
        batches(30),
        [(x, y)],
        methods=methods,
        num_filters=2,
        replacement=replacement,
        **QUIET,
    )
    for row, name in enumerate(found.names):
        logits = torch.zeros(40, 3)
        for class_ in range(3):
            kept = found.tables[name].selected[class_]

            def hook(_module, _inputs, output, kept=kept):
                stands_in = output.mean((0, 2, 3), keepdim=True) * (replacement == "mean")
                return torch.where(kept[None, :, None, None], output, stands_in)

            handle = model.stage1.register_forward_hook(hook)
            with torch.no_grad():
                logits[:, class_] = model(x)[:, class_]
            handle.remove()
        right = logits.argmax(1) == y
        assert found.hits[row].tolist() == torch.bincount(y[right], minlength=3).tolist()
    if replacement == "zero":
        gates = found.tables["votes"].selected.float()
        with torch.no_grad():
            gated = FilterGate(model, "stage1")
            each = torch.stack([gated(gates[c][None], x)[:, c] for c in range(3)], 1)
        assert int((each.argmax(1) == y).sum()) == int(found.hits[0].sum())


def test_agreement_cost_and_the_control():
    model, train, test = deep(), batches(60), batches(44)
    given = ClassFilters(torch.rand(3, 6), torch.ones(3), layer="stage2", method="Given")
    methods = {
        **two_methods(model, "stage2"),
        "captum": LayerGradientXActivation(model, model.stage2),
        "given": given,
        "made": lambda: given,
    }
    found = compare_methods(
        model, "stage2", train, test, methods=methods, num_filters=2, repetitions=7, **QUIET
    )
    names = list(found.names)
    assert names == list(methods)
    for a, first in enumerate(names):
        for b, second in enumerate(names):
            agreement = found.tables[first].agreement(found.tables[second])
            assert float(found.overlap[a, b]) == pytest.approx(agreement.mean_overlap)
            correlation = agreement.mean_rank_correlation
            assert float(found.rank_correlation[a, b]) == pytest.approx(correlation, abs=1e-6)
    assert float(found.overlap[names.index("given"), names.index("made")]) == 1.0
    assert found.chance == pytest.approx(2 / 6)
    assert np.isnan(found.seconds["given"])
    assert found.seconds["captum"] > 0
    assert found.random_hits.shape == (7, 3)
    interval = binomial_interval(found.hits.sum(1), found.counts.sum())
    assert torch.equal(found.sufficiency_interval(), interval)
    frame = found.to_pandas()
    assert frame.loc["votes", "sufficiency at 2"] == pytest.approx(float(found.sufficiency[0]))
    others = [float(found.overlap[0, b]) for b in range(1, 5)]
    assert frame.loc["votes", "overlap@2 with the others"] == pytest.approx(np.mean(others))
    assert frame.loc["random filters", "overlap@2 with the others"] == found.chance
    assert frame.loc["all filters", "sufficiency at 2"] == found.accuracy
    assert str(found).count("\n") == 7


def test_a_method_without_evidence_gets_fewer_filters():
    model = deep()
    scores = torch.zeros(3, 6)
    scores[0, 3] = scores[1, 1] = scores[1, 2] = 1.0
    methods = {**two_methods(model, "stage2"), "sparse": ClassFilters(scores, torch.ones(3))}
    found = compare_methods(
        model, "stage2", batches(60), batches(44), methods=methods, num_filters=2, **QUIET
    )
    filters = found.to_pandas()["filters per class"]
    assert (filters["votes"], filters["sparse"]) == (2, 1)
    assert (filters["random filters"], filters["all filters"]) == (2, 6)


def test_a_method_that_cannot_tell_has_no_correlation_and_spoils_no_mean():
    model = deep()
    methods = two_methods(model, "stage2")
    methods["same"] = ClassFilters(torch.ones(3, 6), torch.ones(3), layer="stage2")
    found = compare_methods(
        model, "stage2", batches(60), batches(44), methods=methods, num_filters=2, **QUIET
    )
    assert found.rank_correlation[2, :2].isnan().all()
    frame = found.to_pandas()["rank correlation with the others"]
    assert frame["votes"] == pytest.approx(float(found.rank_correlation[0, 1]))
    assert np.isnan(frame["same"])


def test_the_standard_methods_and_what_does_not_apply():
    planted = planted_network()
    gate = torch.rand(4, 17)
    data = planted.loader(80)
    found = compare_methods(
        planted.model, "deep", data, planted.loader(60, seed=1), num_filters=3, gate=gate, **QUIET
    )
    assert found.names[0] == "frequency"
    assert "class gate" in found.names
    assert not found.skipped
    row = found.names.index("contribution")
    assert float(found.sufficiency[row]) == 1.0
    assert float(found.sufficiency[row]) > found.random_sufficiency + 0.2
    # Before the ReLU responses are negative, and class selectivity has no meaning.
    before = compare_methods(
        planted.model, "shallow.0", data, planted.loader(60, seed=1), num_filters=3, **QUIET
    )
    assert list(before.skipped) == ["selectivity"]
    assert "negative" in before.skipped["selectivity"]
    assert "selectivity does not apply" in str(before)
    more = standard_methods(planted.model, "deep", data)
    assert set(found.names) - {"class gate"} == set(more)


def test_bad_input():
    model, data = pool_linear(), batches()
    with pytest.warns(UserWarning, match="on the images that the filters were found on"):
        compare_methods(model, "1", data, data, methods=two_methods(model, "1"), **QUIET)
    with pytest.raises(ValueError, match="methods is empty"):
        compare_methods(model, "1", data, batches(), methods={}, **QUIET)
    with pytest.raises(ValueError, match="read only once"):
        compare_methods(model, "1", iter(data), batches(), **QUIET)
    with pytest.raises(ValueError, match="num_filters=9"):
        compare_methods(
            model, "1", data, batches(), methods=two_methods(model, "1"), num_filters=9, **QUIET
        )
    with pytest.raises(ValueError, match="data loader is empty"):
        compare_methods(
            model, "1", data, [], methods=two_methods(model, "1"), num_filters=2, **QUIET
        )
    other = {"other": ClassFilters(torch.rand(3, 9), torch.ones(3))}
    with pytest.raises(
        ValueError, match="3 classes and 9 filters; the model has 3 classes and the layer 6"
    ):
        compare_methods(model, "1", data, batches(), methods=other, num_filters=2, **QUIET)
    with pytest.raises(ValueError, match="different shapes"):
        compare_methods(
            model,
            "1",
            data,
            batches(),
            methods={**other, **two_methods(model, "1")},
            num_filters=2,
            **QUIET,
        )
    with pytest.raises(ValueError, match="No method of the standard set applies: The data loader"):
        compare_methods(model, "1", [], batches(), num_classes=3, num_filters=2, **QUIET)
    with pytest.raises(ValueError, match="'one' is a Saliency; expected a LayerAttribution"):
        compare_methods(model, "1", data, batches(), methods={"one": Saliency(model)}, **QUIET)
    with pytest.raises(ValueError, match="expected a ClassFilters table"):
        compare_methods(model, "1", data, batches(), methods={"made": lambda: 3}, **QUIET)  # type: ignore[dict-item, return-value]


def test_picture_shows_the_numbers():
    model = deep()
    found = compare_methods(
        model,
        "stage2",
        batches(60),
        batches(44),
        methods=two_methods(model, "stage2"),
        num_filters=2,
        **QUIET,
    )
    figure, axes = plot_method_comparison(found)
    np.testing.assert_allclose(axes[0].images[0].get_array(), found.overlap.numpy())
    np.testing.assert_allclose(axes[1].images[0].get_array(), found.rank_correlation.numpy())
    shown = axes[2].containers[0].lines[0].get_xdata()
    np.testing.assert_allclose(shown, 100 * found.sufficiency.numpy())
    widths = [bar.get_width() for bar in axes[3].patches]
    assert widths == pytest.approx(list(found.seconds.values()))
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(found.names)
    assert "stage2" in figure.get_suptitle()


def test_picture_of_a_contrast():
    scores = torch.tensor([0.1, -2.0, 3.0, 0.2, -0.1])
    contrast = FilterContrast(
        "cat", "dog", scores, torch.full((5,), 0.1), torch.full((5,), 20.0), 1.0, 22
    )
    _, axes = plot_filter_contrast(contrast, num_filters=2)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["filter 2", "filter 3", "filter 4", "filter 1"]
    bars = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert bars == pytest.approx([3.0, 0.2, -0.1, -2.0])
    lines = axes.collections[0]
    assert isinstance(lines, LineCollection)
    segments = lines.get_segments()
    expected = contrast.interval(0.95, simultaneous=True)[[2, 3, 4, 1]]
    np.testing.assert_allclose([[a[0], b[0]] for a, b in segments], expected.numpy())
    _, axes = plot_filter_contrast(contrast, num_filters=99)
    assert len(axes.patches) == 4
    assert "cut" not in axes.get_title(loc="left")


def test_long_intervals_of_a_contrast_leave_its_bars_visible():
    scores, errors, freedom = torch.tensor([0.5, -0.25]), torch.ones(2), torch.full((2,), 2.0)
    contrast = FilterContrast("cat", "dog", scores, errors, freedom, 0.0, 3)
    assert contrast.interval(simultaneous=True).abs().max() > 4
    _, axes = plot_filter_contrast(contrast)
    assert axes.get_xlim() == (-2, 2)
    assert axes.get_title(loc="left").endswith("3 images, intervals cut")
    assert len(axes.patches) == 2
    _, axes = plot_filter_contrast(dataclasses.replace(contrast, scores=torch.zeros(2)))
    assert "cut" not in axes.get_title(loc="left")


def test_singular_directions_are_compared_where_they_are_the_filters():
    planted = planted_network()
    train, test = planted.loader(120), planted.loader(60, seed=1)
    factored, layer = factor_layer(planted.model, "deep.0"), "deep.0.directions"
    methods = {
        "contribution": LayerFilterContribution(factored, layer),
        "singular directions": LayerSingularDirection(
            planted.model, "deep.0", evidence="contribution"
        ),
    }
    found = compare_methods(factored, layer, train, test, methods=methods, num_filters=3, **QUIET)
    one, other = [found.tables[name].scores for name in methods]
    assert torch.allclose(one, other, atol=1e-5)  # gradient times response, in either way
    assert float(found.overlap[0, 1]) == 1.0
