"""Comparison of attributions: Captum's own metrics and explicit loops say the same."""

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import (
    DeepLift,
    GradientShap,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerConductance,
    LayerGradCam,
    LayerIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.metrics import infidelity, sensitivity_max
from scipy import stats
from torch import nn

from captum_classfilters import (
    ClassFilterSaliency,
    FilterGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerSingularDirection,
)
from captum_classfilters.metrics import (
    compare_attributions,
    explanation_for_sensitivity,
    filter_curves,
    filter_infidelity,
)
from captum_classfilters.visualize import plot_comparison
from tests.models import (
    ONE_OUTPUT,
    QUIET,
    TwoScores,
    batches,
    deep,
    images,
    one_output,
    pool_linear,
)

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already")
TARGETS = torch.arange(8) % 3


def compare(model, methods, x=None, **options):
    x = images() if x is None else x
    return compare_attributions(model, methods, x, TARGETS[: len(x)], **{**QUIET, **options})


def table_of(model, layer):
    return LayerFilterContribution(model, layer).identify(batches(), num_filters=2, **QUIET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    found = []
    for kind in (torch.float32, dtype):
        model = deep().to(kind)
        methods = {"pixels": Saliency(model), "filters": LayerFilterContribution(model, "stage1")}
        comparison = compare(model, methods, images().to(kind), perturb_radius=0.2)
        assert comparison.pixels is not None
        tables = {"pixels": comparison.pixels, "filters": comparison.filters["stage1"]}
        found.append(
            [table.values[name]["max_sensitivity"].mean() for name, table in tables.items()]
        )
    plain, half = (torch.tensor(values).double() for values in found)
    assert torch.allclose(plain, half, rtol=0.2)


def test_spaces_are_kept_apart():
    model = deep()
    saliency = ClassFilterSaliency(model, "stage2", table_of(model, "stage2"))
    comparison = compare(
        model,
        {
            "Saliency": Saliency(model),
            "Grad-CAM": LayerGradCam(model, model.stage2),
            "class filters": saliency,
            "function": lambda inputs, target: inputs,
            "contribution": LayerFilterContribution(model, "stage2"),
            "conductance": (LayerConductance(model, model.stage2), {"n_steps": 4}),
            "gates": (IntegratedGradients(FilterGate(model, "stage2")), {"n_steps": 4}),
            "earlier": LayerFilterFrequency(model, "stage1", top_k=2),
        },
    )
    pixels = ["Saliency", "Grad-CAM", "class filters", "function"]
    assert list(comparison.pixels.values) == [*pixels, "random"]
    assert list(comparison.filters) == ["stage2", "stage1"]
    controls = ["random", "weight magnitude"]
    expected = ["contribution", "conductance", "gates", *controls]
    assert list(comparison.filters["stage2"].values) == expected
    assert list(comparison.filters["stage1"].values) == ["earlier", *controls]
    assert list(comparison.maps) == pixels
    text = str(comparison)
    for space in ("pixels: 8 images", "filters of layer 'stage2': 8 images", "layer 'stage1'"):
        assert space in text


@pytest.mark.parametrize("baseline", [0.0, 0.3])
@pytest.mark.parametrize("local", [False, True])
def test_pixel_infidelity_is_captums(local, baseline):
    """Saliency is local: Captum then multiplies it by the change of the input."""
    model, x, samples = deep(), images(), 6
    method = Saliency(model) if local else InputXGradient(model)
    options: dict[str, Any] = {"n_perturb_samples": samples, "baseline": baseline}
    found = compare(model, {"one": method}, **options).pixels.values["one"]
    drawn = torch.Generator().manual_seed(0)
    removed = torch.rand(samples, 8, 36, generator=drawn) < 0.2

    def perturb(inputs):
        mask = removed.transpose(0, 1).flatten(0, 1).reshape(-1, 1, 6, 6).expand_as(inputs)
        return (inputs - baseline) * mask if local else mask.float(), inputs.where(~mask, baseline)

    attributions = method.attribute(x, target=TARGETS)
    for metric, normalize in (("infidelity", False), ("scale_invariant_infidelity", True)):
        expected = infidelity(
            model,
            perturb,
            x,
            attributions,
            target=TARGETS,
            n_perturb_samples=samples,
            normalize=normalize,
        )
        assert torch.allclose(found[metric].float(), expected, rtol=1e-3, atol=1e-6), metric


def test_max_sensitivity_is_captums():
    model, x = deep(), images()
    cam, contribution = LayerGradCam(model, model.stage2), LayerFilterContribution(model, "stage1")
    found = compare(model, {"cam": cam, "filters": contribution}, sensitivity_samples=3)

    def maps(inputs, target):
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        raw = LayerAttribution.interpolate(cam.attribute(inputs, target=target), (6, 6), "bilinear")
        return raw.expand_as(inputs) / 2

    def scores(inputs, target):
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        return contribution.attribute(inputs, target=target).sum((2, 3))

    assert torch.allclose(found.maps["cam"], maps(x, TARGETS)[: len(found.maps["cam"])])
    for table, name, function in (
        (found.pixels, "cam", maps),
        (found.filters["stage1"], "filters", scores),
    ):
        torch.manual_seed(0)
        expected = sensitivity_max(
            explanation_for_sensitivity(function), x, target=TARGETS, n_perturb_samples=3
        )
        assert torch.allclose(table.values[name]["max_sensitivity"], expected.double(), rtol=1e-4)


def test_pixel_curves_are_explicit_loops():
    model, x = deep(), images()
    method, baseline = InputXGradient(model), 0.3
    found = compare(model, {"one": method}, points=4, baseline=baseline).pixels.values["one"]
    order = method.attribute(x, target=TARGETS).sum(1).flatten(1).detach()
    order = order.sort(dim=1, descending=True, stable=True).indices
    for reverse in (False, True):
        one = order.flip(1) if reverse else order
        deletion: list[Any] = []
        insertion: list[Any] = []
        for number in (0, 9, 18, 27, 36):
            mask = torch.zeros(8, 36).scatter_(1, one[:, :number], 1).reshape(8, 1, 6, 6)
            for curve, gone in ((deletion, mask), (insertion, 1 - mask)):
                outputs = model(x * (1 - gone) + baseline * gone).softmax(1)
                curve.append(outputs[torch.arange(8), TARGETS].detach().double())
        suffix = "_reversed" if reverse else ""
        for name, curve in (("deletion_area", deletion), ("insertion_area", insertion)):
            expected = torch.trapezoid(torch.stack(curve, 1), dx=0.25)
            assert torch.allclose(found[name + suffix], expected, atol=1e-5)


def test_filter_infidelity_is_the_metrics():
    model, x = deep(), images()
    method = LayerFilterContribution(model, "stage1")
    table = compare(model, {"one": method}, n_perturb_samples=7).filters["stage1"]
    scores = method.filter_scores(method.attribute(x, target=TARGETS))
    expected = filter_infidelity(model, "stage1", x, scores, target=TARGETS, n_perturb_samples=7)
    assert torch.allclose(table.values["one"]["infidelity"], expected.infidelity["scores"])


def test_filter_curves_are_the_metrics():
    model, x = deep(), images()
    method = LayerFilterContribution(model, "stage1")
    values = compare(model, {"one": method}).filters["stage1"].values
    scores = method.filter_scores(method.attribute(x, target=TARGETS))
    expected = filter_curves(model, "stage1", x, {"one": scores}, target=TARGETS)
    for name in ("one", "weight magnitude"):
        for metric in ("deletion_area", "insertion_area"):
            areas = getattr(expected, metric)
            assert torch.allclose(values[name][metric], areas[name], atol=1e-6)
            backwards = areas[f"{name}, reversed"]
            assert torch.allclose(values[name][f"{metric}_reversed"], backwards, atol=1e-6)


class Joined(nn.Module):
    """Two convolutions of three filters, catenated: no weight has six."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)

    def forward(self, x):
        return torch.cat([self.one(x), self.other(x)], 1)


def test_the_control_by_weights_is_left_out_where_a_layer_has_no_single_weight(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(
        Joined(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    method = {"contribution": LayerFilterContribution(model, "1")}
    with caplog.at_level("WARNING", logger="captum_classfilters"):
        comparison = compare(model, method, batch_size=4)  # two batches, one line
    (table,) = comparison.filters.values()
    assert list(table.to_pandas().index) == ["contribution", "random"]
    (record,) = caplog.records
    assert "'weight magnitude' is left out" in record.getMessage()


def test_time_is_that_of_an_image(monkeypatch):
    module = importlib.import_module("captum_classfilters.metrics.attribution_space")
    monkeypatch.setattr(module, "measured", lambda function, device: (function(), 12.0, None))
    table = compare(model := deep(), {"one": Saliency(model)}, batch_size=6).pixels
    assert table.seconds["one"].tolist() == [2.0, 6.0]  # batches of six images and of two
    assert table.rows()[0]["seconds_per_image"] == 2.0


def test_random_scores_are_no_methods():
    """Also beside methods of one sign, whose shuffled scores would be nearly constant."""
    model = deep()
    constant = torch.ones_like
    found = compare(model, {"one": lambda x, target: constant(x)}, n_perturb_samples=300)
    values, random = found.pixels.values["one"], found.pixels.values["random"]
    # Normal scores of variance 4 (two channels of one each) predict 36 * 0.2 of them to be lost.
    surplus = random["infidelity"] - random_loss(model, 300).square().mean(0)
    assert float(surplus.mean()) == pytest.approx(36 * 0.2 * 4, rel=0.15)
    assert (random["scale_invariant_infidelity"] > 0).all()
    assert not torch.allclose(values["infidelity"], random["infidelity"], rtol=0.1)


def random_loss(model, samples):
    """What the sets of pixels that the comparison draws cost, (P, N)."""
    x = images()
    removed = torch.rand(samples, 8, 36, generator=torch.Generator().manual_seed(0)) < 0.2
    with torch.no_grad():
        full = model(x)[torch.arange(8), TARGETS]
        kept = [model(x * ~one.reshape(8, 1, 6, 6))[torch.arange(8), TARGETS] for one in removed]
    return full - torch.stack(kept)


def test_batches_only_change_the_draws():
    """What has no draw in it does not depend on the batches."""
    model = deep()
    methods = {"one": InputXGradient(model), "two": LayerFilterContribution(model, "stage1")}
    whole, parts = compare(model, methods), compare(model, methods, batch_size=3)
    for left, right, name in (
        (whole.pixels, parts.pixels, "one"),
        (whole.filters["stage1"], parts.filters["stage1"], "two"),
    ):
        for metric in ("deletion_area", "insertion_area"):
            assert torch.allclose(left.values[name][metric], right.values[name][metric], atol=1e-5)
        assert len(left.seconds[name]) == 1
        assert len(right.seconds[name]) == 3


def test_localization_where_there_are_boxes():
    model = deep()
    boxes = torch.tensor([[0, 0, 3, 3]] * 8)
    corner = torch.zeros(8, 2, 6, 6)
    corner[:, :, 1, 2] = 1
    methods = {
        "inside": lambda inputs, target: corner[:1].expand_as(inputs),
        "outside": lambda inputs, target: corner[:1].expand_as(inputs).flip(3),
        "filters": LayerFilterContribution(model, "stage2"),
    }
    found = compare(model, methods, boxes=boxes, sensitivity_samples=1)
    assert found.pixels.interval("inside", "pointing_game")[0] == 1
    assert found.pixels.interval("outside", "pointing_game")[0] == 0
    assert "pointing_game" not in found.filters["stage2"].values["filters"]
    assert "pointing_game" not in compare(model, methods).pixels.values["inside"]


def test_intervals_are_students():
    model = deep()
    table = compare(model, {"one": InputXGradient(model)}).pixels
    values = table.values["one"]["deletion_area"]
    mean, low, high = table.interval("one", "deletion_area", 0.9)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        table.interval("one", "deletion_area", 2.0)
    error = stats.sem(values.numpy())
    expected = stats.t.interval(0.9, 7, loc=float(values.mean()), scale=error)
    assert mean == pytest.approx(float(values.mean()))
    assert (low, high) == pytest.approx(expected)
    single = compare(model, {"one": InputXGradient(model)}, images(1)).pixels
    assert math.isnan(single.interval("one", "deletion_area")[1])


def test_rows_and_data_frame():
    pytest.importorskip("pandas")
    model = deep()
    table = compare(model, {"one": LayerFilterContribution(model, "stage1")}).filters["stage1"]
    frame = table.to_pandas()
    assert list(frame.index) == ["one", "random", "weight magnitude"]
    assert frame.loc["one", "infidelity"] == pytest.approx(
        float(table.values["one"]["infidelity"].mean())
    )
    assert frame.loc["one", "seconds_per_image"] > 0
    assert math.isnan(frame.loc["random", "seconds_per_image"])
    assert frame.loc["one", "infidelity_low"] <= frame.loc["one", "infidelity"]


def test_methods_with_draws_and_options():
    model = deep()
    shap = (GradientShap(model), {"baselines": torch.zeros(1, 2, 6, 6), "stdevs": 0.1})
    first = compare(model, {"shap": shap})
    again = compare(model, {"shap": shap})
    for metric, values in first.pixels.values["shap"].items():
        assert torch.equal(values, again.pixels.values["shap"][metric])


def test_the_model_comes_back_as_found():
    model = deep().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    compare(model, {"one": Saliency(model), "two": LayerFilterContribution(model, "stage1")})
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)


def test_picture():
    pytest.importorskip("matplotlib")
    model, x = pool_linear(), torch.rand(5, 1, 6, 6)
    model[0] = nn.Conv2d(1, 6, 3)
    found = compare(
        model, {"saliency": Saliency(model), "filters": LayerFilterContribution(model, "1")}, x
    )
    _, grid = plot_comparison(found)
    assert grid.shape == (4, 2)
    assert grid[0, 1].get_title() == "saliency"
    assert [row[0].get_ylabel() for row in grid] == ["class 0", "class 1", "class 2", "class 0"]
    _, named = plot_comparison(found, images=2, class_names=["cat", "dog", "fox"])
    assert [row[0].get_ylabel() for row in named] == ["cat", "dog"]
    only_filters = compare(model, {"filters": LayerFilterContribution(model, "1")}, x)
    with pytest.raises(ValueError, match="No method of the comparison explains pixels"):
        plot_comparison(only_filters)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (lambda m: {}, {}, "methods is empty"),
        (lambda m: {"random": Saliency(m)}, {}, "control's own"),
        (lambda m: {"one": 3}, {}, "'one' is an int; expected an attribution"),
        (lambda m: {"one": lambda x, target: x[:, :1]}, {}, r"'one' returns \(8, 1, 6, 6\)"),
        (lambda m: {"one": Saliency(m)}, {"boxes": torch.zeros(8, 3)}, r"expected \(8, 4\)"),
        (lambda m: {"one": Saliency(m)}, {"points": 0}, "at least 1"),
        (
            lambda m: {"one": LayerFilterContribution(m, ["stage1", "stage2"])},
            {},
            "has no single layer",
        ),
        (lambda m: {"one": LayerSingularDirection(m, "stage1.0")}, {}, "'one' scores directions"),
        (lambda m: [Saliency(m)], {}, "methods is a list; expected attributions by name"),
        (lambda m: {"one": Saliency}, {}, r"'one' is a class; pass Saliency\(model\)"),
        (lambda m: {"one": Saliency(deep())}, {}, "'one' explains another model"),
        (
            lambda m: {"one": IntegratedGradients(FilterGate(deep(), "stage1"))},
            {},
            "'one' explains another model",
        ),
        (lambda m: {"one": Saliency(m)}, {"drop_probability": {"pixel": 0.2}}, "'pixel': 0.2"),
        (lambda m: {"one": Saliency(m)}, {"drop_probability": {"pixels": 1.0}}, "between 0 and 1"),
    ],
)
def test_bad_input_says_what_would_be_right(methods, options, message):
    model = deep()
    with pytest.raises(ValueError, match=message):
        compare(model, methods(model), **options)


def test_methods_of_a_model_that_returns_an_object_are_compared_as_they_are():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = deep()

        def forward(self, x):
            return SimpleNamespace(logits=self.net(x))

    def methods(model, stage1):
        return {
            "pixels": Saliency(model),
            "gates": InputXGradient(FilterGate(model, stage1)),
            "ours": LayerFilterContribution(model, stage1),
        }

    model, plain = Returns().eval(), deep()
    found = compare(model, methods(model, model.net.stage1))
    expected = compare(plain, methods(plain, plain.stage1))
    assert found.pixels is not None
    assert expected.pixels is not None
    for ours, theirs in (
        (found.pixels, expected.pixels),
        (found.filters["net.stage1"], expected.filters["stage1"]),
    ):
        assert ours.values.keys() == theirs.values.keys()
        for name, values in theirs.values.items():
            for metric in values.keys() - {"seconds"}:
                torch.testing.assert_close(ours.values[name][metric], values[metric])


def captums(model, relu):
    """Methods of Captum, with all the ways in which they hold their model."""
    return {
        "saliency": Saliency(model),
        "occlusion": (Occlusion(model), {"sliding_window_shapes": (2, 3, 3)}),
        "attribute": IntegratedGradients(model).attribute,
        "function": InputXGradient(lambda x: model(x)),
        "bound": InputXGradient(model.forward),
        "hooks": DeepLift(model),
        "noise": (NoiseTunnel(InputXGradient(model)), {"nt_samples": 3, "stdevs": 0.1}),
        "made of two": GuidedGradCam(model, relu),
        "one map": LayerGradCam(model, relu),
        "layer": LayerConductance(model, relu),
        "layer and another": LayerIntegratedGradients(model, relu),
        "layer of a function": LayerConductance(lambda x: model(x), relu),
        "gates": IntegratedGradients(FilterGate(model, relu)),
    }


@pytest.mark.parametrize("target", [0, 1, torch.tensor([0, 1, 1, 0, 1])])
@pytest.mark.parametrize("kind", ONE_OUTPUT)
def test_captums_methods_explain_the_classes_of_one_output(kind, target):
    """Of -z for class 0 and z for class 1, as with a model that returns both."""
    model = one_output(kind)
    two = TwoScores(model)
    options = {**QUIET, "n_perturb_samples": 3, "sensitivity_samples": 2, "points": 3}
    found, expected = (
        compare_attributions(own, captums(own, model[1]), images()[:5], target, **options)
        for own in (model, two)
    )
    assert found.pixels is not None
    assert expected.pixels is not None
    for name, own in found.maps.items():
        torch.testing.assert_close(own, expected.maps[name])
    pairs = [
        (found.pixels, expected.pixels),
        *zip(found.filters.values(), expected.filters.values(), strict=True),
    ]
    assert sum(len(own.seconds) for own, _ in pairs) == 13
    for mine, theirs in pairs:
        for name in mine.seconds:
            for metric in ("infidelity", "max_sensitivity"):
                torch.testing.assert_close(mine.values[name][metric], theirs.values[name][metric])


def test_one_target_and_one_image():
    model = deep()
    method = {"one": InputXGradient(model)}
    one = compare_attributions(model, method, images(), 1, show_progress=False)
    same = compare_attributions(model, method, images(), [1] * 8, show_progress=False)
    left, right = (
        table.pixels.values["one"]["infidelity"] for table in (one, same) if table.pixels
    )
    assert torch.equal(left, right)
    alone = compare_attributions(model, method, images()[:1], 1, show_progress=False)
    assert "nan" not in str(alone)
    assert "±" not in str(alone).split("interval")[1]


def test_targets_must_fit():
    model = deep()
    with pytest.raises(ValueError, match="do not fit"):
        compare_attributions(model, {"one": Saliency(model)}, images(), TARGETS[:3])
