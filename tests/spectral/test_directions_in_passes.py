"""Directions in passes over data: any device, weights that change, decompositions that do not fit."""

import copy
import gc
import weakref

import networkx
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from captum_classfilters import LayerSingularDirection
from captum_classfilters.identify import exemplars, random_weights_null, unit_scores
from captum_classfilters.spectral import (
    direction_signals,
    layer_svd,
    model_svd,
    profile_graph,
    profile_images,
)
from tests.models import QUIET, batches, deep, hooks_of, images, joined
from tests.pretend_device import DeviceTensor, host_reads, pretend

LAYERS = ["stage1.0", "stage2.0"]


def scores_of(method, data):
    """The scores of each layer's table: a method of several layers makes a list of them."""
    return [part.scores for part in method.identify(data, num_filters=2, **QUIET)]


def table(model, data, evidence="signal", **options):
    method = LayerSingularDirection(model, LAYERS, evidence=evidence, **options)
    return scores_of(method, data)


READERS = {
    "signals": lambda m, d: table(m, d),
    "signals of given decompositions": lambda m, d: table(m, d, svds=model_svd(m)),
    "contributions": lambda m, d: table(m, d, "contribution"),
    "unit scores": lambda m, d: unit_scores(
        m, LAYERS, d, directions=model_svd(m), aggregate="l2", **QUIET
    )[0],
    "exemplars": lambda m, d: (
        exemplars(m, "stage2.0", d, directions=model_svd(m), num_exemplars=2, **QUIET)[
            "stage2.0"
        ].highest.score
    ),
    "profiles of directions": lambda m, d: (
        profile_images(m, LAYERS, d, kind="direction", directions=model_svd(m), **QUIET).weights
    ),
    "profiles of elements": lambda m, d: (
        profile_images(m, ["stage1", "stage2"], d, kind="element", **QUIET).weights
    ),
    "graph": lambda m, d: profile_graph(m, ["stage1", "stage2", "head"], d, **QUIET),
    "graph of directions": lambda m, d: profile_graph(
        m, LAYERS, d, kind="direction", directions=model_svd(m), **QUIET
    ),
    "direction signals": lambda m, d: {
        name: values.cpu() for name, values in direction_signals(m, d[0][0]).items()
    },
}


def numbers(result):
    if isinstance(result, networkx.Graph):
        edges = sorted(result.edges(data="weight"))
        return [np.array([weight for _, _, weight in edges]), [edge[:2] for edge in edges]]
    if isinstance(result, torch.Tensor):
        assert type(result) is torch.Tensor  # on the CPU, whatever the model's device
        return [result.numpy()]
    if isinstance(result, dict):
        return [number for part in result.values() for number in numbers(part)]
    if isinstance(result, list):
        return [number for part in result for number in numbers(part)]
    return [result.toarray()]


def same(found, expected):
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        if isinstance(ours, list):
            assert ours == theirs
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def device(monkeypatch):
    # What is on the pretended device has values, unlike tensors of PyTorch's own "meta".
    monkeypatch.setattr(DeviceTensor, "is_meta", False, raising=False)
    with pretend("meta") as device:
        yield device


@pytest.mark.parametrize("name", READERS)
def test_a_device_gives_the_cpus_numbers(name, device):
    expected = READERS[name](deep(), batches())
    model = deep().to(device)
    there = [(x.to(device), y.to(device)) for x, y in batches()]
    same(READERS[name](model, there), expected)
    same(READERS[name](model, batches()), expected)
    if "graph" in name:
        return  # which backward passes it needs depends on the numbers
    counts = []
    for times in (3, 6):
        host_reads.clear()
        READERS[name](model, there * times)
        counts.append(len(host_reads))
    assert counts[1] - counts[0] <= 3  # for 15 batches more


def test_decompositions_on_the_cpu_follow_the_model(device):
    svds = {name: svd for name, svd in model_svd(deep()).items() if name in LAYERS}
    expected = table(deep(), batches())
    model = deep()
    method = LayerSingularDirection(model, LAYERS, svds=svds)
    model.to(device)
    same(scores_of(method, batches()), expected)
    assert method.svd("stage1.0").left.device == device


@pytest.mark.parametrize("evidence", ["signal", "contribution"])
def test_a_changed_weight_is_decomposed_again_in_the_next_pass(evidence):
    model, data = deep(), batches()
    method = LayerSingularDirection(model, LAYERS, evidence=evidence)
    first = scores_of(method, data)
    same(first, table(deep(), data, evidence))
    scale = torch.linspace(1, 2, 6).reshape(6, 1, 1, 1)
    # Autograd's version counter says nothing of it.
    model.get_parameter("stage2.0.weight").data.mul_(scale)
    changed = scores_of(method, data)
    same(changed, table(model, data, evidence))
    assert not torch.allclose(changed[1], first[1])


def test_decompositions_of_other_weights_are_refused():
    model, data = deep(), batches()
    svds = model_svd(model)
    method = LayerSingularDirection(model, "stage2.0", svds=svds)
    method.attribute(images())
    twin = copy.deepcopy(model)
    twin.get_parameter("stage2.0.weight").data.add_(0.1)
    for other in (
        {"stage2.0": layer_svd(twin.stage2[0])},
        {"stage2.0": layer_svd(model.stage1[0])},
        {"stage2.0": layer_svd(nn.Conv2d(4, 6, 3, groups=2))},
    ):
        with pytest.raises(ValueError, match=r"given for 'stage2\.0' is not that of its weight"):
            LayerSingularDirection(model, "stage2.0", svds=other).attribute(images())
    with pytest.raises(ValueError, match="is not that of its weight as it is now"):
        random_weights_null(method, data, repetitions=1, seed=1, **QUIET)
    model.get_parameter("stage2.0.weight").data.add_(0.1)
    for use in (
        lambda: method.attribute(images()),
        lambda: method.signals(images()),
        lambda: method.identify(data, **QUIET),
        method.svd,
    ):
        with pytest.raises(ValueError, match="make it anew"):
            use()
    assert hooks_of(model) == 0


def test_decompositions_of_few_directions_are_of_their_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 2))
    x = torch.randn(3, 300)
    for route in ("direct", "gram", "randomized"):
        svds = {"0": layer_svd(model[0], rank=4, method=route)}
        found = LayerSingularDirection(model, "0", svds=svds).attribute(x)
        expected = svds["0"].signals((model[0](x) - model[0].bias).detach())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_weights_that_are_computed(change):
    """They are looked at in the pass, where hooks are on the layer."""
    torch.manual_seed(0)
    model, data = deep(), batches()
    change(model.stage2[0])
    model.train()
    state = copy.deepcopy(model.state_dict())
    method = LayerSingularDirection(model, "stage2.0", evidence="contribution")
    scores = method.identify(data, num_filters=2, **QUIET).scores
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.eval()
    x, y = joined(data)
    each = method.filter_scores(method.attribute(x, target=y)).double()
    means = torch.stack([each[y == row].mean(0) for row in range(3)])
    torch.testing.assert_close(scores, means, atol=1e-6, rtol=1e-4)


def test_only_outputs_have_directions():
    model = deep()
    method = LayerSingularDirection(model, "stage2.0")
    with pytest.raises(ValueError, match="directions combine a layer's outputs"):
        method.identify(batches(), attribute_to_layer_input=True, **QUIET)


def test_grad_kwargs_and_modes():
    model, x = deep(), images()
    method = LayerSingularDirection(model, "stage2.0", evidence="contribution")
    expected = method.attribute(x, target=1)
    found = method.attribute(x, target=1, grad_kwargs={"create_graph": True})
    assert torch.equal(found, expected)
    assert not found.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(method.attribute(x, target=1), expected)
            assert torch.equal(method.signals(x), method.signals(x.clone()))
    model.train()
    assert torch.equal(method.attribute(x, target=1), expected)
    assert torch.equal(
        direction_signals(model, x)["stage2.0"], direction_signals(deep(), x)["stage2.0"]
    )
    assert model.stage1[1].num_batches_tracked == 0
    assert all(module.training for module in model.modules())


def test_signals_need_no_gradient():
    class Backbone(nn.Module):
        """Its stages run without gradients."""

        def __init__(self):
            super().__init__()
            self.inner = deep()

        def forward(self, x):
            with torch.no_grad():
                x = self.inner[:4](x)
            return self.inner[4](x)

    x, model = images(), Backbone().eval()
    method = LayerSingularDirection(model, "inner.stage2.0", evidence="contribution")
    expected = LayerSingularDirection(deep(), "stage2.0").signals(x)
    assert torch.equal(method.signals(x), expected)
    with pytest.raises(ValueError, match=r"under torch\.no_grad\(\)"):
        method.attribute(x, target=0)


def test_direction_signals_leave_out_layers_without_a_row_for_each_example():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.windows = nn.Linear(4, 3), nn.Linear(3, 5)

        def forward(self, x):
            x = self.whole(x)
            return self.windows(x.reshape(-1, 2, 3)).reshape(len(x), -1, 5)

    model, x = Windows(), torch.rand(3, 4, 4)
    assert list(direction_signals(model, x)) == ["whole"]
    with pytest.raises(ValueError, match="'windows' puts out 6 rows for 3 images"):
        direction_signals(model, x, ["windows"])


def test_graphs_name_gradients_that_are_not_finite():
    class Root(nn.Module):
        def forward(self, x):
            return x.abs().sqrt()  # which has no derivative at zero

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Root(), nn.Conv2d(4, 3, 1)).eval()
    nn.init.zeros_(model.get_parameter("0.weight"))
    nn.init.zeros_(model.get_parameter("0.bias"))
    nn.init.ones_(model.get_parameter("2.bias"))
    data = [(images(2), torch.zeros(2))]
    with pytest.raises(ValueError, match="gradients of the layer '2' at '0' in batch 0"):
        profile_graph(model, ["0", "2"], data, **QUIET)


def test_the_model_is_not_kept_alive():
    gc.collect()
    gc.disable()
    try:
        model = deep()
        alive = weakref.ref(model)
        unit_scores(model, LAYERS, batches(), directions=model_svd(deep()), **QUIET)
        exemplars(model, "stage2", batches(), **QUIET)
        profile_images(model, "stage2", batches(), kind="element", **QUIET)
        profile_graph(model, ["stage1", "stage2"], batches(), **QUIET)
        table(model, batches(), "contribution")
        del model
        assert alive() is None
    finally:
        gc.enable()
