"""Drops of the target's score: explicit formulas, Captum's own ablation, Captum's habits."""

from typing import Any

import pytest
import torch
from captum.attr import LayerFeatureAblation, NoiseTunnel
from torch import nn

from captum_classfilters import LayerFilterAblation, LayerFilterShapley, identify_class_filters
from tests.models import (
    ChannelsLast,
    TwoInputs,
    batches,
    deep,
    hooks_of,
    images,
    joined,
    pool_linear,
)


def captum_drops(model, layer, inputs, baselines=None, at_input=False, num_filters=None, **options):
    """Captum's ablation with one feature per filter, as (N, K)."""
    mask = torch.arange(num_filters).reshape(1, -1, 1, 1)
    maps = LayerFeatureAblation(model, layer).attribute(
        inputs, baselines, layer_mask=mask, attribute_to_layer_input=at_input, **options
    )
    return maps[:, :, 0, 0]


def test_hand_computed_drops_at_a_linear_head():
    model = pool_linear()
    target = torch.tensor([0, 2, 1, 1, 0, 2, 0, 1])
    ablation = LayerFilterAblation(model, "1")
    drops = ablation.attribute(images(), target=target)
    activation = model[1](model[0](images()))
    expected = activation.mean((2, 3)) * model.get_parameter("4.weight")[target]
    assert drops.shape == activation.shape
    torch.testing.assert_close(ablation.filter_scores(drops), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(
    ("make", "name", "sizes"),
    [
        (pool_linear, "1", (6, 6)),
        (deep, "stage1.2", (4, 4)),
        (deep, "stage2.0", (6, 4)),
    ],
)
def test_same_as_captum(make, name, sizes, rows, at_input):
    model = make()
    layer = model.get_submodule(name)
    ablation = LayerFilterAblation(model, layer)
    for baseline in (None, 0.3):
        drops = ablation.attribute(
            images(), baseline, 1, attribute_to_layer_input=at_input, perturbations_per_eval=rows
        )
        expected = captum_drops(
            model, layer, images(), baseline, at_input, sizes[at_input], target=1
        )
        torch.testing.assert_close(
            ablation.filter_scores(drops, at_input), expected, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("method", [LayerFilterAblation, LayerFilterShapley])
@pytest.mark.parametrize("number", [6, 4])  # of filters, and of positions in a row
def test_baselines_that_do_not_fit_are_told_what_would(method, number):
    model, means = pool_linear(), torch.rand(6)
    one = method(model, "1")
    with pytest.raises(ValueError, match=r"shape \(1, 6, 1, 1\)\.$"):
        one.attribute(images(), torch.rand(number), target=1)
    found = one.attribute(images(), means.reshape(1, 6, 1, 1), target=1)
    flat = method(model, "3").attribute(images(), means, target=1)  # (N, K): the last axis
    torch.testing.assert_close(found.sum((2, 3)), flat, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [1, (2,), [0, 1, 2, 0, 1, 2, 0, 1], torch.arange(8) % 3])
def test_every_form_of_target_with_several_filters_at_once(target):
    model = deep()
    ablation = LayerFilterAblation(model, model.stage1)
    drops = ablation.attribute(images(), target=target, perturbations_per_eval=3)
    expected = captum_drops(model, model.stage1, images(), num_filters=4, target=target)
    torch.testing.assert_close(ablation.filter_scores(drops), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("score", "function"),
    [("probability", torch.softmax), ("log_probability", torch.log_softmax)],
)
def test_scores_of_the_softmax(score, function):
    model = deep()
    ablation = LayerFilterAblation(model, model.stage1, score=score)
    expected = captum_drops(
        lambda x: function(model(x), 1), model.stage1, images(), num_filters=4, target=2
    )
    drops = ablation.filter_scores(ablation.attribute(images(), target=2))
    torch.testing.assert_close(drops, expected, rtol=1e-4, atol=1e-6)


def test_mean_and_resampled_replacement():
    model, x = deep(), images()
    activation = model.stage1(x).detach()
    means = activation.mean((0, 2, 3), keepdim=True)
    ablation = LayerFilterAblation(model, "stage1", replacement="mean")
    expected = captum_drops(model, model.stage1, x, means, num_filters=4, target=0)
    drops = ablation.filter_scores(ablation.attribute(x, target=0))
    torch.testing.assert_close(drops, expected, rtol=1e-4, atol=1e-6)

    state = torch.get_rng_state()
    ablation = LayerFilterAblation(model, "stage1", replacement="resample", seed=3)
    drops = ablation.filter_scores(ablation.attribute(x, target=0))
    assert torch.equal(state, torch.get_rng_state())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
    donors = {order[i]: order[i - 1] for i in range(8)}
    others = activation[[donors[i] for i in range(8)]]
    expected = captum_drops(model, model.stage1, x, others, num_filters=4, target=0)
    torch.testing.assert_close(drops, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"another image of the same batch, .* drop_last=True"):
        ablation.attribute(x[:1], target=0)


class MeanHead(nn.Module):
    """The head of a network whose maps are (N, H, W, K)."""

    def __init__(self, model: ChannelsLast) -> None:
        super().__init__()
        self.head = model.head

    def forward(self, maps):
        return self.head(maps.mean((1, 2)))


def test_channels_last_and_several_inputs():
    twin = pool_linear()
    first = LayerFilterAblation(twin, twin[1]).attribute(images(), target=1)
    other = ChannelsLast(twin).eval()
    method = LayerFilterAblation(other, other.transpose, channel_dim=-1)
    last = method.attribute(images(), target=1)
    torch.testing.assert_close(last.permute(0, 3, 1, 2), first)

    # Where filters lie a layer's own norm says; their means are over all other axes.
    normed = nn.Sequential(
        other.conv, other.relu, other.transpose, nn.LayerNorm(6), MeanHead(other)
    )
    found = LayerFilterAblation(normed, "3", replacement="mean").attribute(images(), target=1)
    maps = normed[:4](images()).detach()
    for place in range(6):
        without = maps.clone()
        without[..., place] = maps[..., place].mean()
        expected = (normed[4](maps) - normed[4](without))[:, 1].detach()
        torch.testing.assert_close(found[..., place].sum((1, 2)), expected, rtol=1e-4, atol=1e-6)

    model, inputs = TwoInputs().eval(), (images(), images(seed=5))
    ablation = LayerFilterAblation(model, model.conv)
    drops = ablation.attribute(inputs, target=0, additional_forward_args=2.0)
    expected = captum_drops(
        model, model.conv, inputs, num_filters=4, target=0, additional_forward_args=2.0
    )
    torch.testing.assert_close(ablation.filter_scores(drops), expected, rtol=1e-4, atol=1e-6)


def test_several_layers_bound_method_and_noise_tunnel():
    model = deep()
    stages: list[nn.Module] = [model.stage1, model.stage2]
    both = LayerFilterAblation(model.forward, stages)
    one, two = both.attribute(images(), target=0)
    single = LayerFilterAblation(model, "stage2")
    torch.testing.assert_close(two, single.attribute(images(), target=0))
    assert one.shape == (8, 4, 6, 6)
    assert one.is_contiguous()
    smooth = NoiseTunnel(single).attribute(images(), nt_samples=2, stdevs=0.0, target=0)
    torch.testing.assert_close(smooth, two, rtol=1e-4, atol=1e-6)
    assert single.multiplies_by_inputs
    assert hooks_of(model) == 0


def test_class_table_holds_the_mean_drops():
    model, data = deep(), batches()
    ablation = LayerFilterAblation(model, "stage1")
    table = ablation.identify(data, num_filters=2, show_progress=False)
    x, y = joined(data)
    drops = ablation.filter_scores(ablation.attribute(x, target=y)).double()
    expected = torch.stack([drops[y == label].mean(0) for label in range(3)])
    torch.testing.assert_close(table.scores, expected, rtol=1e-4, atol=1e-6)
    assert table.method == "LayerFilterAblation"
    (same,) = identify_class_filters([ablation], data, num_filters=2, show_progress=False)
    assert torch.equal(same.scores, table.scores)


def test_bad_input():
    model = deep()
    with pytest.raises(ValueError, match="score='accuracy'"):
        LayerFilterAblation(model, "stage1", score="accuracy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replacement='noise'"):
        LayerFilterAblation(model, "stage1", replacement="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be at least 1"):
        LayerFilterAblation(model, "stage1").attribute(images(), perturbations_per_eval=0)
    with pytest.raises(ValueError, match="expected None"):
        LayerFilterAblation(model, "stage1").identify(batches(), metric="f1")  # type: ignore[call-overload]
    with pytest.raises(AssertionError, match="target="):  # as everywhere in Captum
        LayerFilterAblation(model, "stage1").attribute(images())
    maps_out = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()).eval()
    with pytest.raises(AssertionError, match="target="):
        LayerFilterAblation(maps_out, "0").attribute(images())


TABLE = {
    "target": 1,
    "num_filters": 2,
    "mass": 0.9,
    "attribute_kwargs": {"a": 1},
    "significance": True,
}
CLASSES = {"num_classes": 5, "class_names": ["a"], "state_path": "file", "save_every": 1.0}


@pytest.mark.parametrize(
    ("metric", "what", "options"),
    [
        ("accuracy", "a reduction", TABLE),
        (len, "a reduction", TABLE),
        (len, "a function's reduction", CLASSES),
        (None, "a table", {"perturbations_per_eval": 2}),
    ],
)
def test_options_that_mean_nothing_for_what_is_asked_are_refused(metric, what, options):
    ablation: Any = LayerFilterAblation(deep(), "stage1")
    for name, value in options.items():
        with pytest.raises(ValueError, match=rf"^{name}=.*: not an option of {what}\.$"):
            ablation.identify(batches(), metric=metric, **{name: value})


def test_options_of_reductions_reach_them():
    model, names = deep(), ["x", "y", "z", "w"]
    ablation = LayerFilterAblation(model, "stage1")
    found, replays = [], []
    for each in (1, 4):
        runs: list[int] = []
        handle = model.stage2.register_forward_hook(lambda *_, r=runs: r.append(1))
        found.append(
            ablation.identify(
                batches(), metric="accuracy", num_classes=4, class_names=names,
                perturbations_per_eval=each, show_progress=False,
            )
        )  # fmt: skip
        handle.remove()
        replays.append(len(runs))
        assert tuple(found[-1].class_names) == tuple(names)
    assert torch.equal(found[0].reduction, found[1].reduction)
    assert replays[0] > replays[1]
