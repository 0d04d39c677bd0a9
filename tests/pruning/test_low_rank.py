"""Layers split into two: reduced-rank regression by hand, sizes, and where ranks go."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from captum_classfilters.pruning import low_rank as module
from captum_classfilters.pruning.least_squares import Seen
from captum_classfilters.pruning.low_rank import (
    LowRank,
    choose_ranks,
    replace_module,
    shape_of,
    split_layer,
)
from captum_classfilters.pruning.network_size import UNITS, NetworkSize, Ranks, Shape

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
    assert plain.output_values.tolist() == pytest.approx([16, 9, 9], rel=2e-3)
    root = torch.diag(torch.tensor([1.0, 1.0, 2.0])).double()
    weighted = LowRank(layer, seen_of(layer, read), root)
    assert weighted.output_values.tolist() == pytest.approx([36, 16, 9], rel=2e-3)
    found = weighted.split(Ranks(3, 2))(read)
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
            error = (low_rank.split(Ranks(7, rank))(read) - layer(read)).double() @ root.T
        left = float(low_rank.output_values[rank:].sum())
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
def test_parts_of_full_rank_do_what_the_layer_did(layer, size):
    torch.manual_seed(0)
    x = torch.randn(size)
    layer.eval().requires_grad_(False)
    shape = shape_of(layer)
    kernel = layer.weight.detach().reshape(shape)
    bias = torch.zeros(shape.outputs) if layer.bias is None else layer.bias.detach()
    turn = torch.linalg.qr(torch.randn(shape.outputs, shape.outputs)).Q
    turned = torch.einsum("rc,cip->rip", turn.T, kernel)
    eye = torch.eye(shape.inputs)
    whole = split_layer(layer, eye, turned, turn, bias)
    assert [type(part) for part in whole] == [type(layer)]  # nothing is narrower
    assert torch.allclose(whole(x), layer(x), atol=1e-5)
    # One output is nothing but zeros: the others are what they were.
    making = turn * (torch.arange(shape.outputs) > 0)
    narrower = split_layer(layer, eye, turned[1:], turn[:, 1:], bias)
    same = split_layer(layer, eye, turned, making, bias)
    assert torch.allclose(narrower(x), same(x), atol=1e-5)
    assert not narrower.training
    assert not any(parameter.requires_grad for parameter in narrower.parameters())
    for unit in UNITS:
        count = NetworkSize(nn.Sequential(layer), (x,), unit)
        assert count.of_layer("0", layer) == count.of(layer)
        assert count.of(narrower) == count.of_split(
            "0", shape, Ranks(shape.inputs, shape.outputs - 1)
        )


def test_a_kernel_that_reads_less_counts_and_does_what_it_should():
    """Two of three inputs are read; the third is a sum of them, so that nothing is lost."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(1, 0))
    x = torch.randn(40, 2, 7, 6)
    x = torch.cat([x, x[:, :1] - 2 * x[:, 1:]], 1)
    rows = nn.functional.unfold(x, (3, 2), padding=(1, 0), stride=2).transpose(1, 2).flatten(0, 1)
    seen = seen_of(as_linear(layer), rows)
    low_rank = LowRank(layer, seen, torch.randn(5, 5).double())
    assert float(low_rank.input_values[2]) < 1e-2 * float(low_rank.input_values[1])
    assert float(low_rank.input_values.sum()) == pytest.approx(float(low_rank.output_values.sum()))
    parts = low_rank.split(Ranks(2, 4))
    assert [tuple(part.get_parameter("weight").shape) for part in parts] == [
        (2, 3, 1, 1),
        (4, 2, 3, 2),
        (5, 4, 1, 1),
    ]
    reduced = low_rank.split(Ranks(3, 4))
    assert torch.allclose(parts(x), reduced(x), atol=0.02)
    assert torch.allclose(low_rank.split(Ranks(2, 5))(x), layer(x), atol=0.02)
    for unit in UNITS:
        count = NetworkSize(nn.Sequential(layer), (x[:1],), unit)
        # 42 positions are read, 4 by 3 are made.
        expected = {"parameters": 6 + 48 + 20 + 5, "multiply_adds": 6 * 42 + (48 + 20) * 12}[unit]
        assert count.of_split("0", Shape(5, 3, 6), Ranks(2, 4)) == expected


def test_the_weights_of_parts_are_of_one_size():
    """What training changes in each part is a like share of it; a number that is not read may be zero."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 7, (3, 2)), torch.randn(2, 6, 5, 4)
    reading, kernel = torch.randn(3, 6), 100 * torch.randn(4, 3, 6)
    making = 0.01 * torch.randn(7, 4) * torch.tensor([1, 10, 0.1, 0])
    parts = split_layer(layer, reading, kernel, making, torch.zeros(7))
    weights = [part.get_parameter("weight").detach() for part in parts]
    for made, read in itertools.pairwise(weights):
        sizes = made.flatten(1).square().mean(1), read.transpose(0, 1).flatten(1).square().mean(1)
        assert torch.allclose(sizes[0][:3], sizes[1][:3], rtol=0.02)
    assert not weights[2][:, 3].any()
    assert weights[1][3].any()
    whole = torch.einsum("cr,rap,ai->cip", making, kernel, reading).reshape(layer.weight.shape)
    assert torch.allclose(parts(x), nn.functional.conv2d(x, whole), rtol=1e-4, atol=1e-3)


def test_what_is_read_is_fitted_to_what_is_made_of_it():
    """Fitted in turn, combinations of correlated positions lose less than those that start."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3)
    x = torch.randn(60, 6, 9, 9).cumsum(2).cumsum(3) / 9
    rows = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    low_rank = LowRank(layer, seen_of(as_linear(layer), rows), torch.eye(4).double())

    def error(rounds: int, monkeypatch: pytest.MonkeyPatch) -> float:
        monkeypatch.setattr(module, "_ROUNDS", rounds)
        return float((low_rank.split(Ranks(2, 3))(x) - layer(x)).square().mean())

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        errors = [error(rounds, patch) for rounds in (0, 1, 2, 6)]
    assert errors[0] > 1.02 * errors[1] > 1.001 * errors[2] >= errors[3] * 0.999


def as_linear(layer: nn.Conv2d) -> nn.Linear:
    """A convolution's weight as that of a linear layer over what it reads at a position."""
    same = nn.Linear(layer.weight[0].numel(), len(layer.weight))
    same.weight.data = layer.weight.detach().flatten(1)
    same.bias.data = layer.get_parameter("bias").detach()
    return same


def test_a_kernel_that_reads_and_makes_gets_ranks_of_both():
    """A 3x3 kernel of 8 inputs and 6 outputs; the first ranks have 8 + 9 + 6 weights, and 6 biases."""
    layer = nn.Conv2d(8, 6, 3)
    rows = torch.randn(200, 72)
    low_rank = LowRank(layer, seen_of(as_linear(layer), rows), torch.eye(6).double())
    low_rank.input_values = torch.tensor([9.0, 6, 0.1, *[1e-9] * 5])
    low_rank.output_values = torch.tensor([9.0, 3, 2, *[1e-9] * 3])
    layers = {"only": low_rank}
    assert choose_ranks(layers, 29, PARAMETERS) == {"only": Ranks(1, 1)}
    # One input more adds 8 + 9 weights, one output more 9 + 6: 6 / 17 before 3 / 15.
    assert choose_ranks(layers, 29 + 17, PARAMETERS) == {"only": Ranks(2, 1)}
    assert choose_ranks(layers, 29 + 16, PARAMETERS) == {"only": Ranks(1, 2)}
    assert choose_ranks(layers, 29 + 17 + 24, PARAMETERS) == {"only": Ranks(2, 2)}
    assert choose_ranks(layers, 10_000, PARAMETERS) == {"only": Ranks(3, 3)}  # the rest is rounding


def with_values(outputs: int, inputs: int, values: list[float]) -> LowRank:
    """A layer of which only sizes and errors matter."""
    layer = nn.Linear(inputs, outputs)
    low_rank = LowRank(layer, seen_of(layer, torch.randn(40, inputs)), torch.eye(outputs).double())
    low_rank.output_values = torch.tensor(values)
    return low_rank


def test_ranks_go_where_they_save_most_for_each_parameter():
    """A rank of the first layer has 16 parameters, one of the second 32; their biases 6 and 12."""
    layers = {
        "first": with_values(6, 10, [9, 4, 3, 2, 1, 1]),  # whole: 66
        "second": with_values(12, 20, [9, 7, 5, *[0.1] * 9]),  # whole: 252
    }
    least = 16 + 6 + 32 + 12
    assert choose_ranks(layers, least, PARAMETERS) == {
        "first": Ranks(10, 1),
        "second": Ranks(20, 1),
    }
    assert choose_ranks(layers, 0, PARAMETERS) == {"first": Ranks(10, 1), "second": Ranks(20, 1)}
    assert choose_ranks(layers, least + 16, PARAMETERS) == {
        "first": Ranks(10, 2),
        "second": Ranks(20, 1),
    }
    # 4 / 16, then 7 / 32 before 3 / 16
    assert choose_ranks(layers, least + 16 + 32, PARAMETERS) == {
        "first": Ranks(10, 2),
        "second": Ranks(20, 2),
    }
    # Where the next one has no room, those of the other layer may have.
    assert choose_ranks(layers, least + 16 + 27, PARAMETERS) == {
        "first": Ranks(10, 3),
        "second": Ranks(20, 1),
    }
    # At rank 4 the first layer would have 70 of its 66 parameters: it stays whole.
    assert choose_ranks(layers, 66 + 32 * 3 + 12, PARAMETERS) == {"second": Ranks(20, 3)}
    assert choose_ranks(layers, 66 + 252, PARAMETERS) == {}
    layers["second"].output_values[3:] = 1e-7  # is rounding, and nothing to spend parameters on
    assert choose_ranks(layers, 66 + 252, PARAMETERS) == {"second": Ranks(20, 3)}


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
    assert choose_ranks(layers, least, size) == {"first": Ranks(10, 1), "second": Ranks(20, 1)}
    # 4 / 16, 3 / 16 and 2 / 16 before 7 / 96; the first is whole before its fourth rank.
    assert choose_ranks(layers, least + 31, size) == {"first": Ranks(10, 2), "second": Ranks(20, 1)}
    assert choose_ranks(layers, least + 32, size) == {"first": Ranks(10, 3), "second": Ranks(20, 1)}
    assert choose_ranks(layers, 60 + 192, size) == {"second": Ranks(20, 2)}


def test_a_layer_that_is_there_twice_is_replaced_twice():
    shared, other = nn.Linear(3, 3), nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(nn.Tanh(), shared), shared)
    replace_module(model, shared, other)
    assert [model.get_submodule(name) for name in ("0", "1.1", "2")] == [other] * 3
