"""Features, exemplars, receptive fields and activation scores: batches, devices, outputs, by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters.identify import (
    activation_scores,
    collect_features,
    exemplars,
    receptive_field,
    unit_scores,
)
from tests.models import (
    QUIET,
    TwoInputs,
    TwoTensors,
    batches,
    deep,
    hooks_of,
    images,
    joined,
    pool_linear,
)
from tests.pretend_device import host_reads, pretend


def features_of(model, data, **options):
    return collect_features(model, "stage2", data, **QUIET, **options)


READERS: dict[str, Callable[..., object]] = {
    "unit scores": lambda m, d: unit_scores(m, ["stage1", "head"], d, aggregate="max", **QUIET),
    "features": features_of,
    "flat features": lambda m, d: features_of(m, d, flatten=True),
    "features at the input": lambda m, d: collect_features(
        m, "head", d, attribute_to_layer_input=True, **QUIET
    ),
    "exemplars": lambda m, d: exemplars(m, ["stage1", "stage2"], d, num_exemplars=3, **QUIET),
    "exemplars by norm": lambda m, d: exemplars(m, "stage1", d, aggregate="l2", **QUIET),
    "receptive fields": lambda m, d: receptive_field(m, ["stage1", "head"], d[0][0]),
}
WITH_GRADIENTS: dict[str, Callable[..., object]] = {
    "activation scores": lambda m, d: activation_scores(m, "stage1", d, **QUIET),
}


def tensors(result):
    """All tensors in a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return tensors(list(result.values()))
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in tensors(part)]
    return tensors(list(vars(result).values())) if hasattr(result, "__dict__") else []


def same(found, expected):
    assert len(tensors(found)) == len(tensors(expected)) > 0
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert type(ours) is torch.Tensor  # on the CPU, whatever the model's device
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("cuda", name) for name in READERS),
        *(("meta", name) for name in {**READERS, **WITH_GRADIENTS}),
    ],
)
def test_a_device_gives_the_cpus_numbers_and_is_not_waited_for(kind, name):
    read = {**READERS, **WITH_GRADIENTS}[name]
    expected = read(deep(), batches())
    with pretend(kind) as device:
        model = deep().to(device)
        there = [(x.to(device), y.to(device)) for x, y in batches()]
        same(read(model, there), expected)
        same(read(model, batches()), expected)
        same(read(model, [(x.to(device), y) for x, y in batches()]), expected)
        counts = []
        for times in (3, 6):
            host_reads.clear()
            read(model, there * times)
            counts.append(len(host_reads))
        assert counts[1] - counts[0] <= 3  # for 15 batches more


def test_features_are_mean_unit_scores():
    model, data = deep(), batches()
    features, labels = features_of(model, data)
    scores, again = unit_scores(model, "stage2", data, **QUIET)
    assert torch.equal(features, scores["stage2"])
    assert torch.equal(labels, again)
    x, y = joined(data)
    maps = model.stage2(model.stage1(x)).detach()
    assert torch.equal(labels, y)
    torch.testing.assert_close(features, maps.mean((2, 3)))
    flat, _ = features_of(model, data, flatten=True)
    assert flat.shape == (24, 6 * 36)
    torch.testing.assert_close(flat, maps.flatten(1))


def test_flat_features_are_those_before_an_activation_in_place():
    model, data = deep(), batches()
    flat, _ = collect_features(model, "stage1.1", data, flatten=True, **QUIET)
    expected = model.stage1[:2](joined(data)[0]).detach().flatten(1)
    torch.testing.assert_close(flat, expected)
    assert bool((flat < 0).any())


def test_precision_of_features():
    data = batches()
    double, _ = features_of(deep().double(), [(x.double(), y) for x, y in data])
    assert double.dtype == torch.float64
    half, _ = features_of(deep().bfloat16(), [(x.bfloat16(), y) for x, y in data])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, double.float(), atol=0.05, rtol=0.05)


def test_images_of_several_sizes():
    model = deep()
    data = [(images(3), torch.arange(3)), (images(2, 9), torch.arange(2))]
    features, _ = features_of(model, data)
    assert features.shape == (5, 6)
    message = r"differ in size: the maps of 'stage2' are \(6, 6\) before batch 1 and \(9, 9\)"
    with pytest.raises(ValueError, match=message):
        features_of(model, data, flatten=True)


def test_labels_of_another_task():
    """A backbone's outputs are no classes."""
    backbone = deep()[:4]  # six numbers for each image
    data = [(x, y * 5) for x, y in batches()]  # 0, 5 and 10
    with pytest.raises(ValueError, match="label 10, but there are 6 classes"):
        features_of(backbone, data)
    for options in ({"num_classes": 11}, {}):
        model = backbone if options else backbone[:2]  # whose output is maps
        features, labels = features_of(model, data, **options)
        torch.testing.assert_close(features, features_of(deep(), batches())[0])
        assert labels.tolist() == [5 * y for y in joined(batches())[1].tolist()]
    with pytest.raises(ValueError, match="Batch 1 has a label below 0"):
        features_of(backbone[:2], [data[0], (data[1][0], data[1][1] - 1)])
    with pytest.raises(
        ValueError, match=r"batch 0 are float32 \(5,\); expected one class for each"
    ):
        features_of(backbone[:2], [(data[0][0], torch.zeros(5))])


@pytest.mark.parametrize("name", [*READERS, *WITH_GRADIENTS])
def test_a_model_that_takes_only_its_own_batch_size(name):
    """As some exported models do."""
    model, data = deep(), batches(12, batch_size=4)
    read = {**READERS, **WITH_GRADIENTS}[name]
    expected = read(deep(), data)
    model.register_forward_pre_hook(lambda _, args: (args[0].reshape(4, 2, 6, 6),))
    same(read(model, data), expected)


def test_exemplars_with_labels_of_any_kind():
    model, data = pool_linear(), batches()
    found = exemplars(model, "1", data, num_exemplars=2, **QUIET)["1"].highest
    for variant in (lambda x, y: (x, y.tolist()), lambda x, y: (x, y[:, None])):
        same(
            exemplars(model, "1", [variant(*b) for b in data], num_exemplars=2, **QUIET)[
                "1"
            ].highest,
            found,
        )
    for unlabeled in (
        lambda x, y: x,
        lambda x, y: (x,),
        lambda x, y: (x, y.float()),
        lambda x, y: (x, F.one_hot(y)),
    ):
        without = exemplars(model, "1", [unlabeled(*b) for b in data], num_exemplars=2, **QUIET)[
            "1"
        ]
        assert without.highest.label is None
        assert torch.equal(without.highest.image, found.image)
    mixed = [data[0], *((x, y.float()) for x, y in data[1:])]
    assert exemplars(model, "1", mixed, **QUIET)["1"].highest.label is None


def test_receptive_fields_do_not_depend_on_the_batch():
    model = deep()
    alone = receptive_field(model, ["stage1", "stage2"], images(1))
    for options in ({}, {"batch_size": 1}, {"batch_size": 4}):
        same(receptive_field(model, ["stage1", "stage2"], images(5), **options), alone)
    sizes = []
    handle = model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    receptive_field(model, "head", images(5))
    handle.remove()
    assert sizes == [5]  # a later pass ends at the layer, before the model's hook


def taylor(activation, logits, loss):
    (gradient,) = torch.autograd.grad(loss, activation)
    return (activation * gradient).abs().double().mean((0, 2, 3))


def test_activation_scores_of_other_outputs():
    x, y = joined(batches())
    y = y % 2
    data = [(x[:20], y[:20]), (x[20:], y[20:])]
    one_logit = pool_linear(classes=1)
    maps = one_logit[1](one_logit[0](x)).detach().requires_grad_()
    logits = one_logit[2:](maps)[:, 0]
    loss = F.binary_cross_entropy_with_logits(logits, y.float(), reduction="sum")
    found = activation_scores(one_logit, "1", data, **QUIET)
    torch.testing.assert_close(found.taylor, taylor(maps, logits, loss))
    two = pool_linear(classes=2)
    with_softmax = nn.Sequential(*two, nn.Softmax(1))
    for model in (two, with_softmax):
        maps = two[1](two[0](x)).detach().requires_grad_()
        logits = two[2:](maps)
        expected = taylor(maps, logits, F.cross_entropy(logits, y, reduction="sum"))
        found = activation_scores(model, "1", data, **QUIET)
        torch.testing.assert_close(found.taylor, expected, rtol=1e-4, atol=1e-7)
    assert found.num_images == 24
    assert repr(found).startswith("ActivationScores(mean=float64 (6,)")


def test_activation_scores_refuse():
    model, data = deep(), batches()
    hot = [(x, torch.ones(len(x), 3)) for x, _ in data]
    with pytest.raises(ValueError, match="several classes for one image"):
        activation_scores(model, "stage1", hot, **QUIET)
    with pytest.raises(ValueError, match="not a single tensor"):
        activation_scores(TwoTensors(), "split", data, **QUIET)

    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="No gradient of the model's output reaches the layer '1'"):
        activation_scores(Detached(*pool_linear()), "1", data, **QUIET)
    broken = pool_linear()
    broken.get_parameter("4.weight").data[1, 2] = float("nan")
    with pytest.raises(ValueError, match="gradients of the layer '1' for image 0: batch 0"):
        activation_scores(broken, "1", data, **QUIET)
    assert hooks_of(model) == 0


def test_several_inputs():
    model = TwoInputs().eval()
    pairs = [((x, -2 * x), y) for x, y in batches()]
    features, _ = collect_features(model, "conv", pairs, **QUIET)
    x, _ = joined(batches())
    torch.testing.assert_close(features, model.conv(-x).detach().mean((2, 3)))
