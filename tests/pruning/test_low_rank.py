"""Layers split into two: reduced-rank regression by hand, sizes, and where ranks go."""

import pytest
import torch
from torch import Tensor, nn

from captum_classfilters.pruning.least_squares import Seen
from captum_classfilters.pruning.low_rank import (
    LowRank,
    choose_ranks,
    replace_module,
    shape_of,
    split_layer,
)
from captum_classfilters.pruning.network_size import UNITS, NetworkSize

PARAMETERS = NetworkSize(nn.Sequential())


def seen_of(layer: nn.Linear, read: Tensor) -> Seen:
    """What a layer reads and makes of some rows."""
    seen, rows = Seen(), torch.cat([read, torch.ones(len(read), 1)], 1).double()
    seen.see(rows, layer(read).detach().double())
    return seen


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def test_what_counts_least_goes():
    """Outputs 3 a, 2 b and c with a, b, c of variance 1, 4, 9 cost 9, 16, 9 and, weighted, 9, 16, 36."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) * torch.tensor([1.0, 2.0, 3.0])
    read = corners + torch.tensor([5.0, 0.0, -1.0])
    layer = linear([[3, 0, 0], [0, 2, 0], [0, 0, 1]], [1, 2, 3])
    plain = LowRank(layer, seen_of(layer, read), torch.eye(3).double())
    assert plain.values.tolist() == pytest.approx([16, 9, 9], rel=2e-3)
    root = torch.diag(torch.tensor([1.0, 1.0, 2.0])).double()
    weighted = LowRank(layer, seen_of(layer, read), root)
    assert weighted.values.tolist() == pytest.approx([36, 16, 9], rel=2e-3)
    found = weighted.split(2)(read)
    expected = layer(read).detach()
    assert torch.allclose(found[:, 1:], expected[:, 1:], atol=0.02)
    assert torch.allclose(found[:, 0], torch.full((8,), 16.0), atol=0.02)  # its mean, 3 * 5 + 1


def test_the_errors_are_those_of_the_split_layer():
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(500, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 1
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    root = torch.randn(5, 5, generator=generator).double()
    low_rank = LowRank(layer, seen_of(layer, read), root)
    for rank in range(1, 6):
        with torch.no_grad():
            error = (low_rank.split(rank)(read) - layer(read)).double() @ root.T
        left = float(low_rank.values[rank:].sum())
        assert float(error.square().sum(1).mean()) == pytest.approx(left, rel=0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(6, 4), (5, 6)),
        (nn.Conv2d(2, 5, (3, 2), bias=False), (3, 2, 7, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=(2, 1), dilation=(1, 2)), (2, 3, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 7)),
    ],
)
def test_halves_of_full_rank_do_what_the_layer_did(layer, size):
    torch.manual_seed(0)
    x = torch.randn(size)
    weight = layer.weight.detach().flatten(1)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    layer.eval().requires_grad_(False)
    both = split_layer(layer, weight, torch.eye(len(weight)), bias)
    assert torch.allclose(both(x), layer(x), atol=1e-5)
    assert not both.training
    assert not any(parameter.requires_grad for parameter in both.parameters())
    for unit in UNITS:
        size = NetworkSize(nn.Sequential(layer), (x,), unit)
        each, fixed = size.of_split("0", *shape_of(layer))
        assert size.of_layer("0", layer) == size.of(layer)
        assert size.of(both) == each * len(weight) + fixed


def with_values(outputs: int, inputs: int, values: list[float]) -> LowRank:
    """A layer of which only sizes and errors matter."""
    layer = nn.Linear(inputs, outputs)
    low_rank = LowRank(layer, seen_of(layer, torch.randn(40, inputs)), torch.eye(outputs).double())
    low_rank.values = torch.tensor(values)
    return low_rank


def test_ranks_go_where_they_save_most_for_each_parameter():
    """A rank of the first layer has 16 parameters, one of the second 32; their biases 6 and 12."""
    layers = {
        "first": with_values(6, 10, [9, 4, 3, 2, 1, 1]),  # whole: 66
        "second": with_values(12, 20, [9, 7, 5, *[0.1] * 9]),  # whole: 252
    }
    least = 16 + 6 + 32 + 12
    assert choose_ranks(layers, least, PARAMETERS) == {"first": 1, "second": 1}
    assert choose_ranks(layers, 0, PARAMETERS) == {"first": 1, "second": 1}
    assert choose_ranks(layers, least + 16, PARAMETERS) == {"first": 2, "second": 1}
    # 4 / 16, then 7 / 32 before 3 / 16
    assert choose_ranks(layers, least + 16 + 32, PARAMETERS) == {"first": 2, "second": 2}
    # Where the next one has no room, those of the other layer may have.
    assert choose_ranks(layers, least + 16 + 27, PARAMETERS) == {"first": 3, "second": 1}
    # At rank 4 the first layer would have 70 of its 66 parameters: it stays whole.
    assert choose_ranks(layers, 66 + 32 * 3 + 12, PARAMETERS) == {"second": 3}
    assert choose_ranks(layers, 66 + 252, PARAMETERS) == {}
    layers["second"].values[3:] = 1e-7  # is rounding, and nothing to spend parameters on
    assert choose_ranks(layers, 66 + 252, PARAMETERS) == {"second": 3}


def test_where_multiply_adds_count_positions_do():
    """A rank of the first layer has 16 weights at one position, one of the second 32 at three."""
    layers = {
        "first": with_values(6, 10, [9, 4, 3, 2, 1, 1]),
        "second": with_values(12, 20, [9, 7, 5, *[0.1] * 9]),
    }
    model = nn.ModuleDict({name: layer.module for name, layer in layers.items()})
    model.forward = lambda x: (model["first"](x[:, 0, :10]), model["second"](x))
    size = NetworkSize(model, (torch.rand(2, 3, 20),), "multiply_adds")
    assert [size.of_layer(name, layer.module) for name, layer in layers.items()] == [60, 720]
    least = 16 + 96
    assert choose_ranks(layers, least, size) == {"first": 1, "second": 1}
    # 4 / 16, 3 / 16 and 2 / 16 before 7 / 96; the first is whole before its fourth rank.
    assert choose_ranks(layers, least + 31, size) == {"first": 2, "second": 1}
    assert choose_ranks(layers, least + 32, size) == {"first": 3, "second": 1}
    assert choose_ranks(layers, 60 + 192, size) == {"second": 2}


def test_a_layer_that_is_there_twice_is_replaced_twice():
    shared, other = nn.Linear(3, 3), nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(nn.Tanh(), shared), shared)
    replace_module(model, shared, other)
    assert [model.get_submodule(name) for name in ("0", "1.1", "2")] == [other] * 3
