"""Shapley values of filters: games by hand, all orders, Captum's, and intervals that cover."""

import itertools
import math
from typing import Any

import pytest
import torch
from captum.attr import ShapleyValues
from torch import nn

from captum_classfilters import FilterGate, LayerFilterContribution, LayerFilterShapley
from tests.models import deep, images
from tests.pretend_device import pretend


class Game(nn.Module):
    """The layer's filters are the inputs themselves; scores are what a function makes of them."""

    def __init__(self, worth):
        super().__init__()
        self.layer = nn.Identity()
        self.worth = worth

    def forward(self, x):
        return self.worth(self.layer(x).flatten(1))


def by_all_orders(worth, x):
    """The mean gain over all orders, of one image (K,)."""
    number = len(x)
    values = torch.zeros(number).double()
    for order in itertools.permutations(range(number)):
        stays = torch.zeros(number)
        before = worth((x * stays)[None])[0]
        for player in order:
            stays[player] = 1
            after = worth((x * stays)[None])[0]
            values[player] += (after - before).double()
            before = after
    return values / math.factorial(number)


def two_outputs(score):
    return lambda f: torch.stack([-score(f), score(f)], 1)


def test_a_product_is_shared_and_a_sum_is_not():
    model = Game(two_outputs(lambda f: f[:, 0] * f[:, 1] + 2 * f[:, 2] + 5))
    x = torch.tensor([[3.0, 4.0, 7.0], [1.0, -2.0, 0.5]])[:, :, None, None]
    values = LayerFilterShapley(model, model.layer, channel_dim=1).attribute(x, target=1)
    assert torch.allclose(values[..., 0, 0], torch.tensor([[6.0, 6.0, 14.0], [-1.0, -1.0, 1.0]]))


def test_twins_share_what_neither_would_lose_alone():
    model = Game(two_outputs(lambda f: f[:, :2].amax(1)))
    x = torch.tensor([[6.0, 6.0, 1.0]])[:, :, None, None]
    values = LayerFilterShapley(model, model.layer, channel_dim=1).attribute(x, target=1)
    assert torch.allclose(values.flatten(), torch.tensor([3.0, 3.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_all_sets_are_all_orders(number):
    weight = torch.randn(number, 4, generator=torch.Generator().manual_seed(1))
    worth = lambda f: torch.tanh(f @ weight).prod(1) + f.amax(1).square()  # noqa: E731
    x = torch.randn(3, number, generator=torch.Generator().manual_seed(2))
    model = Game(two_outputs(worth))
    method = LayerFilterShapley(model, model.layer, channel_dim=1)
    values, half = method.attribute(x[:, :, None, None], target=1, return_half_widths=True)
    expected = torch.stack([by_all_orders(worth, row) for row in x])
    assert torch.allclose(values.flatten(1).double(), expected, atol=1e-5)
    assert half.tolist() == [[0.0] * number] * 3


@pytest.mark.parametrize("score", ["logit", "log_probability"])
def test_captums_values(score):
    model, x = deep(), images()
    gate = FilterGate(model, "stage1")

    def read(gates, x):
        return gate(gates, x) if score == "logit" else gate(gates, x).log_softmax(1)

    expected = ShapleyValues(read).attribute(gate.ones(len(x)), target=2, additional_forward_args=x)
    method = LayerFilterShapley(model, "stage1", score=score)
    found = method.filter_scores(method.attribute(x, target=2))
    assert torch.allclose(found, expected, atol=1e-5)
    with torch.no_grad():
        everything = read(gate.ones(len(x)), x) - read(0 * gate.ones(len(x)), x)
    assert torch.allclose(found.sum(1), everything[:, 2], atol=1e-5)


def test_logits_of_a_linear_head_are_contributions():
    model, x = deep(), images()
    method = LayerFilterShapley(model, "stage2")
    found, half = method.attribute(x, target=1, return_half_widths=True)
    expected = LayerFilterContribution(model, "stage2")
    gave = expected.filter_scores(expected.attribute(x, target=1))
    assert torch.allclose(method.filter_scores(found), gave, atol=1e-5)
    assert half.shape == gave.shape
    assert not half.any()


def crowd(number=12, rows=24):
    """A game of many filters, its values by all sets, and the images."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(number, 6, generator=generator)
    x = torch.randn(rows, number, generator=generator)
    return Game(two_outputs(lambda f: (f @ weight).relu().square().sum(1) / 10)), x[..., None, None]


def test_intervals_cover():
    model, x = crowd()
    options: dict[str, Any] = {"channel_dim": 1, "tolerance": None}
    method = LayerFilterShapley(model, model.layer, max_evaluations=400, **options)
    found, half = method.attribute(x, target=1, return_half_widths=True)
    plain = LayerFilterShapley(model, model.layer, max_evaluations=30000, **options)
    expected, small = plain.attribute(x, target=1, return_half_widths=True)
    assert small.mean() < half.mean() / 6
    off = (found - expected).flatten(1).abs()
    covered = (off <= half).double().mean()
    assert 0.92 <= covered <= 0.98
    # Values add up to what all filters are worth, whatever was drawn.
    with torch.no_grad():
        everything = model(x)[:, 1] - model(0 * x)[:, 1]
    assert torch.allclose(found.flatten(1).sum(1), everything, atol=1e-4)


def test_sets_are_added_until_values_are_close(recwarn):
    model, x = crowd(rows=3)
    method = LayerFilterShapley(
        model, model.layer, tolerance=0.1, channel_dim=1, max_evaluations=20000
    )
    values, half = method.attribute(x, target=1, return_half_widths=True)
    shares = half.amax(1) / values.flatten(1).abs().amax(1)
    assert 0.03 < shares.max() <= 0.1
    assert not recwarn.list
    again = method.attribute(x, target=1)
    assert torch.equal(values, again)
    few = LayerFilterShapley(model, model.layer, tolerance=0.01, channel_dim=1, max_evaluations=100)
    with pytest.warns(UserWarning, match="more than tolerance=0.01; give more evaluations"):
        few.attribute(x, target=1)


def test_a_table_over_a_data_set():
    model, x = crowd(rows=20)
    labels = torch.arange(20) % 2
    method = LayerFilterShapley(
        model, model.layer, tolerance=None, max_evaluations=60, channel_dim=1
    )
    table = method.identify([(x, labels)], num_classes=2, show_progress=False)
    values = method.filter_scores(method.attribute(x, target=labels))
    for label in (0, 1):
        mean = values[labels == label].mean(0).double()
        assert torch.allclose(table.scores[label], mean, atol=1e-5)
    assert table.method == "LayerFilterShapley"


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_sets_are_those_of_the_image_wherever_it_is_read(batch_size):
    model, x = crowd(rows=20)
    options: dict[str, Any] = {"tolerance": None, "max_evaluations": 60, "channel_dim": 1}
    method = LayerFilterShapley(model, model.layer, **options)
    expected = method.attribute(x, target=1)
    state = torch.get_rng_state()
    order = torch.arange(20).flip(0)
    parts = [method.attribute(x[rows], target=1) for rows in order.split(batch_size)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(torch.cat(parts)[order], expected, atol=1e-5)
    other = LayerFilterShapley(model, model.layer, seed=1, **options).attribute(x, target=1)
    assert not torch.allclose(other, expected, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 10, 200])
def test_errors_of_images_average_out_over_a_data_set(batch_size):
    """Filters that no output depends on have the value 0, and tables say so within their errors."""
    model, x = crowd(number=16, rows=200)
    silent = torch.arange(16) >= 8
    x = x.abs()  # images alike, so that the same sets err alike
    x[:, silent] *= 1e-6
    method = LayerFilterShapley(
        model, model.layer, tolerance=None, max_evaluations=64, channel_dim=1
    )
    data = [(part, torch.ones(len(part), dtype=torch.int64)) for part in x.split(batch_size)]
    table = method.identify(data, num_classes=2, significance=True, show_progress=False)
    assert table.standard_errors is not None
    means, errors = table.scores[1, silent], table.standard_errors[1, silent]
    single = method.attribute(x, target=1).flatten(1)[:, silent]
    assert means.square().mean().sqrt() < 0.15 * single.square().mean().sqrt()
    assert float((means.abs() / errors).max()) < 3.5


@pytest.mark.parametrize("score", ["logit", "log_probability"])
@pytest.mark.parametrize("layer", ["stage1", "stage2"])
def test_an_accelerator_gives_the_cpus_values(layer, score):
    model, x = deep(), images()
    labels = torch.arange(len(x)) % 3
    expected = LayerFilterShapley(model, layer, score=score).attribute(x, target=labels)
    with pretend("cuda") as device:
        found = LayerFilterShapley(model.to(device), layer, score=score).attribute(
            x.to(device), target=labels.to(device)
        )
        assert found.device == device
        found = found.cpu()
    assert torch.allclose(found, expected, atol=1e-5)


def test_several_layers():
    model, x = deep(), images()
    method = LayerFilterShapley(model, ["stage1", "stage2"])
    (first, second), half = method.attribute(x, target=0, return_half_widths=True)
    assert first.shape[1] != second.shape[1] or first.shape[2] != second.shape[2]
    assert [part.shape for part in half] == [(len(x), first.shape[1]), (len(x), second.shape[1])]


@pytest.mark.parametrize("number", [5, 12])
def test_nan_without_filters_is_named_and_nan_with_all_of_them_is_handed_on(number):
    model = Game(two_outputs(lambda f: f[:, 0] / f.sum(1)))
    x = torch.ones(2, number, 1, 1)
    method = LayerFilterShapley(model, model.layer, channel_dim=1)
    with pytest.raises(ValueError, match=r"Without filter 0, 1, 2, 3, 4.* returns NaN for image 0"):
        method.attribute(x, target=1)
    model = Game(two_outputs(lambda f: f.prod(1) * torch.nan))
    assert (
        LayerFilterShapley(model, model.layer, channel_dim=1).attribute(x, target=1).isnan().all()
    )


@pytest.mark.parametrize(("filters", "least"), [(1, 2), (2, 4), (3, 8), (4, 16), (5, 20)])
def test_fewest_evaluations(filters, least):
    """All sets of three filters are eight, fewer than four times three."""
    model = Game(two_outputs(lambda f: f.prod(1)))
    x = torch.full((2, filters, 1, 1), 2.0)
    enough, few = (
        LayerFilterShapley(
            model, model.layer, channel_dim=1, max_evaluations=number, tolerance=None
        )
        for number in (least, least - 1)
    )
    assert enough.attribute(x, target=1).shape == x.shape
    with pytest.raises(ValueError, match=f"too few for {filters} filters; give at least {least}"):
        few.attribute(x, target=1)


def test_bad_input():
    model, x = crowd(rows=2)
    with pytest.raises(ValueError, match=r"tolerance=0\.0: expected a positive share"):
        LayerFilterShapley(model, model.layer, tolerance=0.0)
    with pytest.raises(ValueError, match="score='rank'; choose one of"):
        LayerFilterShapley(model, model.layer, score="rank")  # type: ignore[arg-type]
    few = LayerFilterShapley(model, model.layer, max_evaluations=40, channel_dim=1)
    with pytest.raises(ValueError, match="too few for 12 filters; give at least 48"):
        few.attribute(x, target=1)
    told = LayerFilterShapley(model, model.layer, max_evaluations=48, channel_dim=1, tolerance=None)
    assert told.attribute(x, target=1).shape == x.shape
