"""Metrics over filters against Captum's own in gate space, and against explicit loops."""

import math
from typing import Any, ClassVar

import pytest
import torch
from captum.attr import (
    Attribution,
    FeatureAblation,
    GuidedGradCam,
    IntegratedGradients,
    LayerConductance,
    LayerGradCam,
    LayerGradientXActivation,
    NeuronGradient,
    NoiseTunnel,
    Saliency,
)
from captum.metrics import infidelity, sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import (
    ClassFilters,
    ClassFilterSaliency,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.metrics import (
    cascading_randomization,
    class_curves,
    collateral_damage,
    evaluate_classifier,
    explanation_for_sensitivity,
    filter_curves,
    filter_infidelity,
    filter_max_sensitivity,
    filter_scores_of,
    remove_and_retrain,
)
from captum_classfilters.metrics.collateral_damage import CollateralDamage
from captum_classfilters.metrics.removals import magnitude_control
from tests.models import (
    ONE_OUTPUT,
    ChannelsLast,
    TwoInputs,
    TwoScores,
    batches,
    deep,
    images,
    joined,
    one_output,
    pool_linear,
)

TARGETS = torch.arange(8) % 3
CASES = [(pool_linear, "1", 6), (deep, "stage1", 4), (deep, "stage2", 6)]
cases = pytest.mark.parametrize(("make", "layer", "number"), CASES)


def random_scores(number, seed=3):
    return torch.randn(8, number, generator=torch.Generator().manual_seed(seed))


def table_of(model, layer, number=2, scores=None):
    if scores is None:
        table = LayerFilterContribution(model, layer).identify(batches(), show_progress=False)
        return table.select(number)
    return ClassFilters(scores, torch.ones(len(scores)), layer=layer).select(number)


# -- sets of filters that differ between images ---------------------------------------------------


@cases
@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("rows", [8, 1])
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_a_set_of_filters_for_each_image(make, layer, number, closed_form, cut, rows, share):
    model, x = make(), images(rows)
    removed = torch.rand(3, rows, number, generator=torch.Generator().manual_seed(0)) < share
    removed[0, 0, 0] = True
    replay = SuffixReplay(model, model.get_submodule(layer), (x,), closed_form=closed_form, cut=cut)
    gate = FilterGate(model, layer)
    for sets, found in zip(removed, replay.outputs(removed, 2), strict=True):
        assert torch.allclose(found, gate((~sets).float(), x), atol=1e-5)


# -- infidelity -----------------------------------------------------------------------------------


def same_sets(number, samples, seed=0, probability=0.5):
    """Captum's perturbation function that removes the sets which our function draws."""
    generator = torch.Generator().manual_seed(seed)
    removed = torch.rand(samples, 8, number, generator=generator) < probability

    def perturb(gates):
        mask = removed.transpose(0, 1).flatten(0, 1).to(gates)  # Captum: an image's copies adjacent
        return mask, gates - mask

    return perturb


@cases
@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_is_captums(make, layer, number, normalize):
    model, x, scores = make(), images(), random_scores(number)
    gate = FilterGate(model, layer)
    expected = infidelity(
        gate,
        same_sets(number, 12),
        gate.ones(8),
        scores,
        target=TARGETS,
        additional_forward_args=x,
        n_perturb_samples=12,
        normalize=normalize,
    )
    found = filter_infidelity(model, layer, x, scores, target=TARGETS, n_perturb_samples=12)
    table = found.scale_invariant if normalize else found.infidelity
    assert torch.allclose(table["scores"].float(), expected, rtol=1e-3, atol=1e-5)


@cases
def test_infidelity_of_each_filter_is_captums_in_a_loop(make, layer, number):
    model, x, scores = make(), images(), random_scores(number)
    gate = FilterGate(model, layer)
    found = filter_infidelity(model, layer, x, scores, target=TARGETS, each_filter=True)
    for filter_ in range(number):
        alone = torch.zeros(8, number)
        alone[:, filter_] = 1

        def without(gates, alone=alone):
            return alone, gates - alone

        expected = infidelity(
            gate,
            without,
            gate.ones(8),
            scores,
            target=TARGETS,
            additional_forward_args=x,
            n_perturb_samples=1,
        )
        assert torch.allclose(found.by_filter["scores"][:, filter_].float(), expected, atol=1e-5)


def test_exact_contributions_leave_nothing_and_chance_does():
    model, x = pool_linear(), images()
    method = LayerFilterContribution(model, "1")
    exact = method.filter_scores(method.attribute(x, target=TARGETS))
    tables = {"exact": exact, "seven times": 7 * exact}
    found = filter_infidelity(model, "1", x, tables, target=TARGETS)
    assert float(found.infidelity["exact"].max()) < 1e-10
    assert float(found.infidelity["random"].mean()) > 1e-4
    assert float(found.infidelity["seven times"].mean()) > 1e-3
    assert float(found.scale_invariant["seven times"].max()) < 1e-10  # a factor does not matter
    assert set(found.infidelity) == {"exact", "seven times", "random"}


def test_infidelity_by_hand():
    """One filter: removed with probability p, it costs its contribution; a score of 0 misses it."""
    model, x = pool_linear(filters=1), images()
    cost = model(x)[:, 0] - model.get_parameter("4.bias")[0]
    found = filter_infidelity(
        model, "1", x, torch.zeros(8, 1), target=0, n_perturb_samples=400, drop_probability=0.25
    )
    drawn = torch.rand(400, 8, 1, generator=torch.Generator().manual_seed(0)) < 0.25
    expected = drawn.double().mean(0)[:, 0] * cost.detach().double().square()
    assert torch.allclose(found.infidelity["scores"], expected, atol=1e-6)
    assert torch.allclose(found.scale_invariant["scores"], expected, atol=1e-6)  # zero stays zero


def of_random_orders(shape, repetitions, generator=None):
    """Scores that put filters in the orders of the random control."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return {str(place): -torch.rand(shape, generator=generator) for place in range(repetitions)}


def mean_of(table, names):
    return torch.stack([table[name] for name in names]).mean(0)


def test_infidelitys_control_is_the_scores_at_random_filters():
    model, x, scores = pool_linear(), images(), random_scores(6)
    options: dict[str, Any] = {"target": TARGETS, "each_filter": True}
    found = filter_infidelity(model, "1", x, scores, repetitions=3, **options)
    generator = torch.Generator().manual_seed(0)
    torch.rand(20, 8, 6, generator=generator)  # the sets of filters are drawn first
    drawn = of_random_orders((8, 6), 3, generator)
    places = {name: (-scores).argsort(1) for name, scores in drawn.items()}
    shuffled = {name: scores.gather(1, place) for name, place in places.items()}
    expected = filter_infidelity(model, "1", x, shuffled, **options)
    for table in ("infidelity", "scale_invariant", "by_filter"):
        control, means = getattr(found, table)["random"], mean_of(getattr(expected, table), places)
        assert torch.allclose(control, means), table


def test_several_inputs_and_further_arguments():
    model, x = TwoInputs(), images()
    arguments: dict[str, Any] = {"target": 1, "additional_forward_args": 2.0}
    method = LayerFilterAblation(model, "conv")
    drops = method.filter_scores(method.attribute((x, x), **arguments))
    found = filter_infidelity(model, "conv", (x, x), drops, each_filter=True, **arguments)
    assert float(found.by_filter["scores"].max()) < 1e-10
    curves = filter_curves(model, "conv", (x, x), drops, **arguments)
    assert torch.allclose(
        curves.deletion["scores"][:, 0].float(), model(x, x, 2.0).softmax(1)[:, 1], atol=1e-6
    )


def test_channels_last_layers():
    twin = pool_linear()
    model, x, scores = ChannelsLast(twin), images(), random_scores(6)
    found = filter_infidelity(model, "transpose", x, scores, target=TARGETS, channel_dim=-1)
    expected = filter_infidelity(twin, "1", x, scores, target=TARGETS)
    assert torch.allclose(
        found.infidelity["scores"], expected.infidelity["scores"], rtol=1e-4, atol=1e-6
    )


# -- max-sensitivity ------------------------------------------------------------------------------


def test_captums_trap_and_the_safe_explanation():
    """For a single image Captum takes Grad-CAM's tensor for a tuple, and is wrong without a word."""
    model, x = deep(), images(1)
    method = LayerGradCam(model, model.stage2)
    options: dict[str, Any] = {"target": 1, "n_perturb_samples": 8}
    torch.manual_seed(0)
    trapped = sensitivity_max(method.attribute, x, **options)
    torch.manual_seed(0)
    safe = sensitivity_max(explanation_for_sensitivity(method), x, **options)
    torch.manual_seed(0)
    noisy = x.repeat(8, 1, 1, 1) + torch.empty(8, *x.shape[1:]).uniform_(-0.02, 0.02)
    reference = method.attribute(x, target=1).detach()
    changes = (method.attribute(noisy, target=1).detach() - reference).flatten(1).norm(dim=1)
    assert float(safe) == pytest.approx(float(changes.max() / reference.norm()), rel=1e-5)
    assert float(trapped) > 1.5 * float(safe)


@pytest.mark.parametrize("target", [1, TARGETS, TARGETS.tolist()])
@pytest.mark.parametrize("at_once", [None, 16])
def test_safe_explanation_of_batches(target, at_once):
    model, x = deep(), images()
    for method in (
        LayerGradientXActivation(model, model.stage1),
        LayerFilterContribution(model, "stage2"),
    ):
        safe = explanation_for_sensitivity(method)
        values = sensitivity_max(safe, x, target=target, max_examples_per_batch=at_once)
        assert values.shape == (8,)
        assert bool((values > 0).all())


def test_safe_explanation_of_several_tensors_and_layers():
    model, x = deep(), images()
    several = LayerGradientXActivation(model, [model.stage1, model.stage2])
    found = explanation_for_sensitivity(several)((x,), target=0)
    assert [one.shape[1] for one in found] == [4, 6]
    assert not any(one.requires_grad for one in found)
    with pytest.raises(TypeError, match="Tensor is not an attribution"):
        explanation_for_sensitivity(x)


@pytest.mark.parametrize("at_once", [None, 16])
def test_sensitivity_of_each_filter_is_captums_in_a_loop(at_once):
    model, x = deep(), images()
    method = LayerFilterContribution(model, "stage1")
    options: dict[str, Any] = {
        "target": TARGETS,
        "n_perturb_samples": 4,
        "max_examples_per_batch": at_once,
    }
    found = filter_max_sensitivity(method, x, **options)

    def scores(inputs, **arguments):
        given = inputs[0] if isinstance(inputs, tuple) else inputs
        return (method.filter_scores(method.attribute(given, **arguments)),)

    torch.manual_seed(0)
    assert torch.allclose(found.overall, sensitivity_max(scores, x, **options))
    for filter_ in range(4):

        def one(inputs, filter_=filter_, **arguments):
            return (scores(inputs, **arguments)[0][:, [filter_]].contiguous(),)

        torch.manual_seed(0)
        expected = sensitivity_max(one, x, **options)
        assert torch.allclose(found.by_filter[:, filter_], expected, rtol=1e-4, atol=1e-6)


def test_sensitivity_of_a_silent_filter():
    """A score of zero that stays zero does not move; its own size cannot be the unit."""
    model = pool_linear()
    with torch.no_grad():
        model.get_parameter("0.weight")[2], model.get_parameter("0.bias")[2] = 0, -1
    method = LayerFilterContribution(model, "1")
    found = filter_max_sensitivity(method, images(), target=TARGETS).by_filter
    assert torch.equal(found[:, 2], torch.zeros(8))


def test_sensitivity_to_gates_is_captums_in_gate_space():
    """Dropping one filter of a gated model: Captum's ablation over gates, and ours of the layer."""
    model, x = deep(), images()
    gate = FilterGate(model, "stage1")
    options: dict[str, Any] = {"target": TARGETS, "n_perturb_samples": 3, "perturb_radius": 0.3}
    for method in (LayerFilterAblation(model, "stage1"), LayerFilterAblation(model, "stage2")):
        found = filter_max_sensitivity(method, x, space="gates", **options)
        gate = FilterGate(model, method.layer)
        torch.manual_seed(0)
        expected = sensitivity_max(
            explanation_for_sensitivity(FeatureAblation(gate)),
            gate.ones(8),
            additional_forward_args=x,
            **options,
        )
        assert torch.allclose(found.overall, expected, rtol=1e-3)
        assert float(found.overall.max()) > 0.01


def test_linear_methods_feel_gates_in_proportion():
    """At a linear head a contribution is its gate times itself: it moves by what the gate moves."""
    found = filter_max_sensitivity(
        LayerFilterContribution(pool_linear(), "1"),
        images(),
        target=TARGETS,
        space="gates",
        perturb_radius=0.1,
        n_perturb_samples=50,
    )
    moved = found.by_filter[found.by_filter > 0]
    assert 0.08 < float(moved.min()) <= float(moved.max()) < 0.1 + 1e-5


@pytest.mark.parametrize("space", ["images", "gates"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_sensitivity_of_models_in_half_precision(space, dtype, near):
    found = []
    for kind in (torch.float32, dtype):
        method = LayerFilterContribution(pool_linear().to(kind), "1")
        x, options = images().to(kind), {"target": TARGETS, "space": space, "perturb_radius": 0.2}
        found.append(filter_max_sensitivity(method, x, **options).overall.float())
    assert torch.allclose(found[0], found[1], rtol=near)


def test_captums_layer_methods_have_filter_scores():
    model, x = deep(), images()
    method = LayerConductance(model, model.stage1)
    maps = method.attribute(x, target=0)
    assert torch.allclose(filter_scores_of(method, maps), maps.sum((2, 3)))
    assert filter_max_sensitivity(method, x, target=0, n_perturb_samples=2).by_filter.shape == (
        8,
        4,
    )


CLASS_TABLE = ClassFilters(torch.arange(12.0).view(3, 4), torch.ones(3), layer="stage1").select(2)
EXPLAINING_THE_INPUT: dict[str, Any] = {
    "class filters": lambda m: ClassFilterSaliency(m, "stage1", CLASS_TABLE),
    "a neuron": lambda m: NeuronGradient(m, m.stage1),
    "guided": lambda m: GuidedGradCam(m, m.stage1),
    "pixels": Saliency,
}


@pytest.mark.parametrize("kind", EXPLAINING_THE_INPUT)
@pytest.mark.parametrize("space", ["images", "gates"])
def test_colors_are_no_filters(kind, space):
    model, x = deep(), images()
    method = EXPLAINING_THE_INPUT[kind](model)
    options = {"neuron_selector": (0, 1, 2)} if kind == "a neuron" else {"target": 0}
    name = type(method).__name__
    if space == "images" or hasattr(method, "layer"):
        with pytest.raises(ValueError, match=f"{name} is no LayerAttribution: it explains the"):
            filter_max_sensitivity(method, x, space=space, **options)
    with pytest.raises(ValueError, match=f"{name} is no LayerAttribution: it explains the"):
        filter_scores_of(method, method.attribute(x, **options))


class OfOnesOwn(Attribution):
    """Explains a layer, by a class that is no LayerAttribution, in maps or in scores."""

    def __init__(self, model, layer, as_scores):
        super().__init__(model)
        self.layer, self.as_scores = layer, as_scores

    def attribute(self, inputs, target=None):
        maps = LayerConductance(self.forward_func, self.layer).attribute(inputs, target=target)
        return maps.sum((2, 3)) if self.as_scores else maps


class Floating(Attribution):
    """Explains what it will."""

    def attribute(self, inputs, target=None):
        return torch.ones(len(inputs[0]), 4, 3, 2)


@pytest.mark.parametrize("as_scores", [False, True])
def test_a_method_of_ones_own_is_believed(as_scores):
    model, x = deep(), images()
    expected = LayerConductance(model, model.stage1)
    own: Any = OfOnesOwn(model, model.stage1, as_scores)
    options: dict[str, Any] = {"target": 0, "n_perturb_samples": 2}
    found = filter_max_sensitivity(own, x, **options).by_filter
    assert torch.equal(found, filter_max_sensitivity(expected, x, **options).by_filter)
    scores = filter_scores_of(own, own.attribute(x, target=0))
    assert torch.equal(scores, filter_scores_of(expected, expected.attribute(x, target=0)))
    with pytest.raises(ValueError, match="Floating has no attribute 'layer', so the filters of"):
        filter_max_sensitivity(Floating(model), x, target=0)  # type: ignore[arg-type]


def test_noise_around_a_layer_method_is_of_its_layer():
    model, x = deep(), images()
    method = LayerConductance(model, model.stage1)
    smooth = NoiseTunnel(method)
    options: dict[str, Any] = {"nt_samples": 2, "stdevs": 0.0, "target": 0}
    scores = filter_scores_of(smooth, smooth.attribute(x, **options))
    torch.testing.assert_close(scores, filter_scores_of(method, method.attribute(x, target=0)))
    found = filter_max_sensitivity(smooth, x, n_perturb_samples=2, **options)
    assert found.by_filter.shape == scores.shape
    of_input = NoiseTunnel(Saliency(model))
    with pytest.raises(ValueError, match="Saliency is no LayerAttribution: it explains the"):
        filter_scores_of(of_input, of_input.attribute(x, **options))


# -- curves ---------------------------------------------------------------------------------------


def gated_probability(model, layer, x, gates, target):
    return FilterGate(model, layer)(gates, x).softmax(1)[torch.arange(len(x)), target].detach()


@cases
def test_curves_are_explicit_loops(make, layer, number):
    model, x, scores = make(), images(), random_scores(number)
    curves = filter_curves(model, layer, x, scores, target=TARGETS)
    assert curves.num_filters == list(range(number + 1))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    for name, one in {"scores": order, "scores, reversed": order.flip(1)}.items():
        for point in range(number + 1):
            first = torch.zeros(8, number).scatter_(1, one[:, :point], 1)
            without = gated_probability(model, layer, x, 1 - first, TARGETS).double()
            alone = gated_probability(model, layer, x, first, TARGETS).double()
            assert torch.allclose(curves.deletion[name][:, point], without, atol=1e-5)
            assert torch.allclose(curves.insertion[name][:, point], alone, atol=1e-5)


def test_magnitude_control_follows_the_weights():
    model, x = pool_linear(), images()
    curves = filter_curves(model, "1", x, random_scores(6), target=TARGETS)
    norms = model.get_parameter("0.weight").flatten(1).norm(dim=1)
    given = filter_curves(model, "1", x, norms.expand(8, 6), target=TARGETS)
    assert torch.equal(curves.deletion["weight magnitude"], given.deletion["scores"])
    assert torch.equal(curves.insertion["weight magnitude"], given.insertion["scores"])


DERIVED = {
    "mask": lambda layer: prune.random_unstructured(layer, "weight", 20),
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", DERIVED)
def test_magnitude_control_follows_loaded_weights(kind, training):
    def derived():
        model = pool_linear()
        DERIVED[kind](model[0])
        return model.train(training)

    saved, loaded = derived(), derived()
    sizes = torch.tensor([3.0, 0.1, 2.0, 0.2, 1.0, 0.3])
    with torch.no_grad():
        for name in {"weight_orig", "weight_g"} & set(saved[0]._parameters):
            saved[0].get_parameter(name).mul_(sizes.view(6, 1, 1, 1))
    loaded.load_state_dict(saved.state_dict())  # and not run since, so that it holds other weights
    saved.eval()(images())
    norms = saved[0].weight.detach().flatten(1).norm(dim=1).double()
    torch.testing.assert_close(magnitude_control(loaded, loaded[1], 6, None), norms)
    table = table_of(pool_linear(), "1")
    expected, found = (
        class_curves(
            model,
            "1",
            table,
            batches(),
            measure="probability",
            weight_magnitude=given,
            show_progress=False,
        )
        for model, given in ((saved, norms), (loaded, None))
    )
    assert torch.equal(*(curves.necessity["weight magnitude"] for curves in (expected, found)))


def test_random_curves_are_means_over_random_orders():
    model, x = pool_linear(), images()
    curves = filter_curves(model, "1", x, random_scores(6), target=TARGETS, repetitions=3)
    orders = of_random_orders((8, 6), 3)
    given = filter_curves(model, "1", x, orders, target=TARGETS)
    assert torch.allclose(curves.deletion["random"], mean_of(given.deletion, orders), atol=1e-6)
    orders = of_random_orders((3, 6), 3)
    tables = {name: table_of(model, "1", scores=one) for name, one in orders.items()}
    options: dict[str, Any] = {"measure": "probability", "show_progress": False}
    found = class_curves(model, "1", table_of(model, "1"), batches(), repetitions=3, **options)
    each = class_curves(model, "1", tables, batches(), **options)
    assert torch.allclose(found.necessity["random"], mean_of(each.necessity, orders), atol=1e-6)


def test_every_curve_has_its_controls():
    curves = filter_curves(pool_linear(), "1", images(), {"a": random_scores(6)}, target=0)
    names = {"a", "a, reversed", "random", "weight magnitude", "weight magnitude, reversed"}
    for table in (curves.deletion, curves.insertion, curves.deletion_area, curves.insertion_area):
        assert set(table) == names


def test_area_of_a_straight_line():
    """A linear head, logits, equal contributions: the curve is a line, its area the mean of its ends."""
    model = pool_linear(filters=4, bias=False)
    with torch.no_grad():
        weight = model.get_parameter("0.weight")
        weight.copy_(weight[:1].expand_as(weight))
        model.get_parameter("0.bias").fill_(0.5)
        model.get_parameter("4.weight").fill_(1.0)
    x = images()
    curves = filter_curves(model, "1", x, random_scores(4), target=0, score="logit")
    full = model(x)[:, 0].detach().double()
    for area in curves.deletion_area.values():
        assert torch.allclose(area, full / 2, atol=1e-5)
    assert torch.allclose(curves.deletion["random"][:, 1], full * 3 / 4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sets(st.integers(0, 6), max_size=4))
def test_inserting_an_order_is_deleting_its_reverse_backwards(seed, numbers):
    scores = random_scores(6, seed)
    curves = filter_curves(
        pool_linear(), "1", images(), scores, target=0, num_filters=sorted(numbers) or None
    )
    assert {6 - number for number in curves.num_filters} == set(curves.num_filters)
    for name in ("scores", "scores, reversed"):
        other = "scores, reversed" if name == "scores" else "scores"
        assert torch.equal(curves.insertion[name].flip(1), curves.deletion[other])


@cases
@pytest.mark.parametrize("measure", ["recall", "probability"])
def test_class_curves_are_explicit_loops(make, layer, number, measure):
    model = make()
    table = table_of(model, layer)
    curves = class_curves(
        model, layer, {"own": table}, batches(), measure=measure, show_progress=False
    )
    x, y = joined(batches())
    order = table.scores.sort(dim=1, descending=True, stable=True).indices[y]
    for point in (0, 1, number // 2, number):
        first = torch.zeros(len(y), number).scatter_(1, order[:, :point], 1)
        for found, gates in ((curves.necessity, 1 - first), (curves.sufficiency, first)):
            outputs = FilterGate(model, layer)(gates, x)
            value = (
                (outputs.argmax(1) == y).double()
                if measure == "recall"
                else outputs.softmax(1)[torch.arange(len(y)), y].double()
            )
            for class_ in range(3):
                expected = float(value[y == class_].detach().mean())
                assert float(found["own"][point, class_]) == pytest.approx(expected, abs=1e-5)
    assert curves.counts.tolist() == torch.bincount(y).tolist()
    names = {"own", "own, reversed", "random", "weight magnitude", "weight magnitude, reversed"}
    assert set(curves.necessity_area) == set(curves.sufficiency_area) == names
    for areas, tables in (
        (curves.necessity_area, curves.necessity),
        (curves.sufficiency_area, curves.sufficiency),
    ):
        points = torch.tensor(curves.num_filters) / number
        area = torch.trapezoid(tables["own"], points.double(), dim=0)
        assert torch.allclose(areas["own"], area)


def test_class_curves_without_images_of_a_class():
    model = pool_linear()
    data = [(x, torch.zeros_like(y)) for x, y in batches()]
    curves = class_curves(model, "1", table_of(model, "1"), data, show_progress=False)
    assert math.isnan(curves.necessity["random"][0, 1])
    assert not math.isnan(curves.necessity["random"][0, 0])


# -- collateral damage ----------------------------------------------------------------------------


class Without(nn.Module):
    """The model without some filters, for all images."""

    def __init__(self, model, layer, removed):
        super().__init__()
        self.gate, self.removed = FilterGate(model, layer), removed

    def forward(self, x):
        return self.gate((~self.removed)[None].float(), x)


@cases
def test_collateral_damage_is_confusion_without_filters(make, layer, number):
    model = make()
    table = table_of(model, layer)
    damage = collateral_damage(model, layer, table, batches(), show_progress=False)
    clean = evaluate_classifier(model, batches(), show_progress=False)
    assert torch.equal(damage.clean, clean.confusion)
    for class_ in range(3):
        without = evaluate_classifier(
            Without(model, layer, table.selected[class_]), batches(), show_progress=False
        )
        assert torch.equal(damage.without[class_], without.confusion)
        change = without.recall - clean.recall
        assert torch.allclose(damage.recall_change[class_], change)
        assert float(damage.own[class_]) == pytest.approx(float(change[class_]))
        others = [float(change[other]) for other in range(3) if other != class_]
        assert float(damage.others[class_]) == pytest.approx(sum(others) / 2)
    assert torch.allclose(
        damage.confusion_difference.sum(2), torch.zeros(3, 3).double(), atol=1e-12
    )


def test_damage_of_controls_of_the_same_size():
    model = pool_linear()
    table = table_of(model, "1", 3)
    damage = collateral_damage(model, "1", table, batches(), show_progress=False)
    norms = model.get_parameter("0.weight").flatten(1).norm(dim=1)
    heavy = torch.zeros(6, dtype=torch.bool)
    heavy[norms.topk(3).indices] = True
    without = evaluate_classifier(Without(model, "1", heavy), batches(), show_progress=False)
    for class_ in range(3):
        assert torch.allclose(damage.control_recall["weight magnitude"][class_], without.recall)
    own, others = damage.control("weight magnitude")
    clean = evaluate_classifier(model, batches(), show_progress=False).recall
    assert torch.allclose(own, without.recall - clean)
    assert others.shape == (3,)
    for class_ in range(3):
        lowest = torch.zeros(6, dtype=torch.bool)
        lowest[table.scores[class_].argsort()[:3]] = True
        without = evaluate_classifier(Without(model, "1", lowest), batches(), show_progress=False)
        found = damage.control_recall["class filters, reversed"][class_]
        assert torch.allclose(found, without.recall)
    assert set(damage.control_recall) == {
        "class filters, reversed",
        "random",
        "weight magnitude",
    }
    with pytest.raises(ValueError, match="No control 'magnitude'; there are class filters, rev"):
        damage.control("magnitude")


def test_damage_by_hand():
    """Four images of one class and two of the other; all filters of the first class removed."""
    damage = CollateralDamage(
        clean=torch.tensor([[4, 0], [1, 1]]),
        without=torch.tensor([[[1, 3], [0, 2]]]),
        classes=(0,),
        num_filters=torch.tensor([2]),
        control_recall={"random": torch.tensor([[0.5, 1.0]]).double()},
        class_names=("a", "b"),
    )
    assert damage.confusion_difference.tolist() == [[[-0.75, 0.75], [-0.5, 0.5]]]
    assert (damage.own.tolist(), damage.others.tolist()) == ([-0.75], [0.5])
    assert [one.tolist() for one in damage.control("random")] == [[-0.5], [0.5]]
    assert damage.largest(1) == [("a", "a", "b", 0.75)]


@pytest.mark.parametrize(("clean", "number"), [([[4, 0], [1, 1]], 4), ([[4, 0], [0, 0]], 2)])
def test_damage_names_confusions_alone(clean, number):
    """Neither what is recognized nor classes without images are among them, however many are asked."""
    damage = CollateralDamage(
        clean=torch.tensor(clean),
        without=torch.tensor([clean, [[1, 3], clean[1]]]),
        classes=(0, 1),
        num_filters=torch.tensor([2, 2]),
        control_recall={},
        class_names=("a", "b"),
    )
    for count in (5, 100):
        found = damage.largest(count)
        assert found[0] == ("b", "a", "b", 0.75)
        assert len(found) == number
        assert all(true != other for _, true, other, _ in found)


def test_damage_of_random_sets_is_a_mean_over_seeds():
    model, data = pool_linear(), batches()
    table = table_of(model, "1", 3)
    damage = collateral_damage(model, "1", table, data, repetitions=3, show_progress=False)
    expected = torch.zeros(3, 3)
    for order in of_random_orders((3, 6), 3).values():
        for row in range(3):
            removed = torch.zeros(6, dtype=torch.bool)
            removed[order[row].argsort(descending=True)[:3]] = True
            without = evaluate_classifier(Without(model, "1", removed), data, show_progress=False)
            expected[row] += without.recall / 3
    assert torch.allclose(damage.control_recall["random"].float(), expected)


def test_largest_confusions_name_the_classes():
    model = pool_linear()
    damage = collateral_damage(
        model, "1", table_of(model, "1", 4), batches(), classes=[2], show_progress=False
    )
    removed, true, seen, change = damage.largest(1)[0]
    difference = damage.confusion_difference[0].clone()
    difference.fill_diagonal_(-1)
    assert removed == damage.class_names[2]
    assert true != seen
    assert change == pytest.approx(float(difference.max()))


# -- cascading randomization ----------------------------------------------------------------------


class Ignorant:
    """Explains by the image itself, whatever the model."""

    layer: Any  # none, and nothing asks for it

    def attribute(self, inputs, target=None):
        return inputs


def test_randomization_unmasks_what_ignores_the_model():
    model, x = deep(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blind = cascading_randomization(model, lambda _: Ignorant(), x, target=0)
    assert torch.allclose(blind.rank_correlation, torch.ones_like(blind.rank_correlation))
    honest = cascading_randomization(
        model, lambda twin: LayerFilterContribution(twin, "stage2"), x, target=TARGETS
    )
    assert honest.modules == ["head", "stage2.1", "stage2.0", "stage1.1", "stage1.0"]
    assert float(honest.rank_correlation[-1].nanmean().abs()) < 0.6
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)


def test_randomized_modules_of_a_wrapped_model_have_their_own_names():
    check = cascading_randomization(
        nn.DataParallel(deep()), lambda twin: LayerFilterContribution(twin, "stage2"), images(),
        target=0,
    )  # fmt: skip
    assert check.modules == ["head", "stage2.1", "stage2.0", "stage1.1", "stage1.0"]


def test_randomization_of_one_map_for_all_filters():
    """Grad-CAM's map has as many columns as the layer has filters; it is compared as a map."""
    check = cascading_randomization(
        deep(), lambda twin: LayerGradCam(twin, twin.stage2), images(), target=0
    )
    assert bool(torch.isfinite(check.rank_correlation[0]).all())
    assert float(check.absolute_rank_correlation[-1].nanmean().abs()) < 0.9


def test_randomization_is_cumulative_from_the_output():
    """The first stage changes the head alone: a method that reads no head does not notice."""
    model, x = deep(), images()

    class Activation:
        layer: Any

        def __init__(self, twin):
            self.twin = twin

        def attribute(self, inputs, target=None):
            return self.twin.stage2(self.twin.stage1(inputs)).detach()

    check = cascading_randomization(model, Activation, x, target=0)
    assert torch.allclose(check.rank_correlation[0], torch.ones(8).double())
    assert float(check.rank_correlation[2].mean()) < 0.9


def test_randomization_tells_signs_from_sizes():
    """An explanation that only turns its sign is the opposite, and in absolute values the same."""
    model, x = deep(), images()
    before = model.get_parameter("stage1.0.weight").clone()

    class Turning:
        layer: Any

        def __init__(self, twin):
            self.weight = twin.stage1[0].weight

        def attribute(self, inputs, target=None):
            return inputs if torch.equal(self.weight, before) else -inputs

    check = cascading_randomization(model, Turning, x, target=0)
    assert torch.allclose(check.rank_correlation[-1], -torch.ones(8).double())
    assert torch.allclose(check.absolute_rank_correlation[-1], torch.ones(8).double())


# -- remove and retrain ---------------------------------------------------------------------------


class Watching(nn.Linear):
    """A linear layer that notes in which mode it runs, in copies too."""

    modes: ClassVar[list[bool]] = []

    def forward(self, x):
        self.modes.append(self.training)
        return super().forward(x)


def test_every_repetition_trains_in_training_mode_from_other_weights(monkeypatch):
    model = pool_linear()
    model[4] = Watching(6, 3)
    seeds, reset = [], torch.manual_seed

    def note_and_reset(seed):
        seeds.append(seed)
        return reset(seed)

    monkeypatch.setattr(torch, "manual_seed", note_and_reset)
    Watching.modes.clear()
    retrained(model, random_scores(6)[0], repetitions=2, epochs=1, seed=5)
    assert set(seeds) == {5, 6}
    # For each of 2 x (1 + 4) trainings as many batches to train as to test on.
    in_training = sum(Watching.modes)
    assert in_training == 10 * len(batches())
    assert Watching.modes[-1] is False


def planted():
    """Six filters, of which 1 and 4 see the class and the others see nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
        model.get_parameter("0.bias").fill_(0.5)
        model.get_parameter("0.weight")[1, 0] = 1
        model.get_parameter("0.weight")[4, 1] = 1
    y = torch.arange(200) % 2
    x = 0.1 * torch.randn(200, 2, 3, 3) + torch.stack([y, 1 - y], 1)[:, :, None, None]
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    return model.eval(), loader


def test_only_planted_filters_cannot_be_made_up_for():
    model, loader = planted()
    scores = torch.tensor([0.0, 2, 0, 0, 1, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = remove_and_retrain(
        model,
        "1",
        {"planted": scores},
        loader,
        loader,
        num_filters=[1, 2],
        epochs=5,
        learning_rate=0.2,
        repetitions=2,
        show_progress=False,
    )
    assert float(result.full_accuracy.min()) > 0.95
    assert float(result.accuracy["planted"][0].min()) > 0.95  # the other one makes up for it
    assert float(result.accuracy["planted"][1].max()) < 0.6  # nothing is left to learn from
    assert float(result.accuracy["planted, reversed"].min()) > 0.95
    assert set(result.accuracy) == {"planted", "planted, reversed", "random", "weight magnitude"}
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)


# -- bad input ------------------------------------------------------------------------------------


def retrained(model, rankings, train=None, **given):
    options: dict[str, Any] = {
        "num_filters": [1],
        "weight_magnitude": None,
        "show_progress": False,
        **given,
    }
    if isinstance(rankings, torch.Tensor):
        options["weight_magnitude"] = torch.rand(len(rankings))
    train = batches() if train is None else train
    return remove_and_retrain(model, "1", rankings, train, batches(), **options)


def constant_gate():
    return nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Softmax(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, s: filter_infidelity(m, "1", x, s[:, :5], target=0), r"\(8, 6\)"),
        (lambda m, x, s: filter_infidelity(m, "1", x, s / 0, target=0), "NaN or Inf"),
        (lambda m, x, s: filter_infidelity(m, "1", x, {}, target=0), "at least one"),
        (lambda m, x, s: filter_infidelity(m, "1", x, {"random": s}, target=0), "control's own"),
        (
            lambda m, x, s: filter_infidelity(m, "1", x, s, target=0, drop_probability=1.0),
            "between 0 and 1",
        ),
        (lambda m, x, s: filter_infidelity(m, "nowhere", x, s, target=0), "no layer 'nowhere'"),
        (lambda m, x, s: filter_curves(m, "1", x, s, target=0, num_filters=[7]), "from 0 to 6"),
        (lambda m, x, s: filter_curves(m, "1", x, s, target=0, repetitions=0), "its control"),
        (
            lambda m, x, s: filter_curves(m, "1", x, s, target=0, weight_magnitude=s[0, :5]),
            r"expected \(6,\)",
        ),
        (
            lambda m, x, s: filter_max_sensitivity(
                LayerFilterContribution(m, "1"),
                x,
                target=0,
                space="pixels",  # type: ignore[arg-type]
            ),
            "'images' or 'gates'",
        ),
        (
            lambda m, x, s: class_curves(m, "1", {}, batches(), show_progress=False),
            "at least one table",
        ),
        (
            lambda m, x, s: class_curves(m, "1", table_of(m, "1"), [], show_progress=False),
            "empty",
        ),
        (
            lambda m, x, s: class_curves(
                m, "1", table_of(m, "1", scores=torch.rand(4, 6)), batches(), show_progress=False
            ),
            "4 classes and 6 filters",
        ),
        (
            lambda m, x, s: collateral_damage(
                m,
                "1",
                table_of(m, "1").with_selection(torch.zeros(3, 6, dtype=torch.bool)),
                batches(),
            ),
            "selects no filters",
        ),
        (
            lambda m, x, s: remove_and_retrain(
                m, "1", {"a": s[0]}, batches(), batches(), num_filters=[6]
            ),
            "from 1 to 5",
        ),
        (
            lambda m, x, s: remove_and_retrain(
                m, "4", {"a": s[0, :3]}, batches(), batches(), num_filters=[1]
            ),
            "Nothing with weights follows",
        ),
        (
            lambda m, x, s: remove_and_retrain(
                m, "1", {"a": s[0], "b": s[0, :3]}, batches(), batches(), num_filters=[1]
            ),
            "one length",
        ),
        (
            lambda m, x, s: filter_infidelity(m, "1", x[:0], s[:0], target=0),
            "no images",
        ),
        (
            lambda m, x, s: filter_max_sensitivity(Saliency(m), x, target=0),
            "Saliency is no LayerAttribution",
        ),
        (
            lambda m, x, s: filter_max_sensitivity(
                LayerFilterFrequency(m, ["0", "1"], top_k=2), x, target=0
            ),
            "returned 2 tensors",
        ),
        (
            lambda m, x, s: filter_max_sensitivity(
                LayerFilterContribution(m, "1"), x, target=0, n_perturb_samples=0
            ),
            "n_perturb_samples=0 at least 1",
        ),
        (
            lambda m, x, s: cascading_randomization(m, LayerFilterContribution(m, "1"), x),  # type: ignore[arg-type]
            "make_method is a LayerFilterContribution; expected a function",
        ),
        (
            lambda m, x, s: cascading_randomization(
                m, lambda net: LayerFilterContribution(m, "1"), x, target=0
            ),
            "for the model itself",
        ),
        (
            lambda m, x, s: cascading_randomization(
                m, lambda net: IntegratedGradients(FilterGate(m, "1")), x, target=0
            ),
            "for the model itself",
        ),
        (lambda m, x, s: retrained(m, s[0, :5]), "The rankings have 5 filters, the layer '1' 6"),
        (lambda m, x, s: retrained(m, s[0] / 0), "'ranking' holds NaN"),
        (lambda m, x, s: retrained(m, s[0], iter(batches())), "read only once"),
        (lambda m, x, s: retrained(m, s[0], []), "data loader is empty"),
        (lambda m, x, s: retrained(m, s[0], epochs=0), "at least 1"),
        (lambda m, x, s: retrained(m, {"a": [1, 2]}), "Tensors"),
    ],
)
def test_bad_input_says_what_would_be_right(call, message):
    with pytest.raises(ValueError, match=message):
        call(pool_linear(), images(), random_scores(6))


def test_targets_fail_as_captums_do():
    with pytest.raises(AssertionError):
        filter_infidelity(pool_linear(), "1", images(), random_scores(6), target=(9,) * 20)


def test_a_layer_whose_weights_cannot_be_found():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.split = nn.Identity()

        def forward(self, x):
            return self.split(x.flatten(1)[:, :6])[:, :3]

    model, scores = Fixed(), random_scores(6)
    with pytest.raises(ValueError, match="pass weight_magnitude"):
        filter_curves(model, "split", images(), scores, target=0)
    filter_curves(model, "split", images(), scores, target=0, weight_magnitude=torch.arange(6.0))


@pytest.mark.parametrize("target", [0, 1, torch.tensor([0, 1, 1, 0, 1])])
@pytest.mark.parametrize("kind", ONE_OUTPUT)
def test_captums_methods_explain_the_classes_of_one_output(kind, target):
    """Of -z for class 0 and z for class 1, as with a model that returns both."""
    model, x = one_output(kind), images()[:5]
    two = TwoScores(model)

    def conductance(net):
        return LayerConductance(
            net, net.get_submodule("net.1" if isinstance(net, TwoScores) else "1")
        )

    for space in ("images", "gates"):
        found, expected = (
            filter_max_sensitivity(conductance(net), x, target=target, space=space)
            for net in (model, two)
        )
        torch.testing.assert_close(found.by_filter, expected.by_filter)
    for method in (conductance, IntegratedGradients):
        one, other = (
            cascading_randomization(net, method, x, target=target).rank_correlation
            for net in (model, two)
        )
        torch.testing.assert_close(one, other, equal_nan=True)


def test_without_a_target_the_one_output_itself_is_explained():
    model, x = one_output("logit"), images()[:5]
    method = LayerConductance(model, model[1])
    none, one = (filter_max_sensitivity(method, x, target=target).overall for target in (None, 1))
    torch.testing.assert_close(none, one)
