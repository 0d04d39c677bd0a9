"""Models that look at their layers, after a layer was replaced."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters import ClassFilters, decompose
from captum_classfilters._core.costs import num_outputs
from captum_classfilters._core.stand_ins import StandIn
from captum_classfilters.answers import build_specialist, forget_class
from captum_classfilters.identify import reinitialize
from captum_classfilters.spectral import factor_layer
from tests.models import QUIET


class Looking(nn.Module):
    """Pads as its convolution's settings say, converts as its weights' types say, and counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 8, (3, 2))
        self.conv = nn.Conv2d(8, 7, 3, stride=2, dilation=1, bias=False)
        self.fc = nn.Linear(7, 4)

    def forward(self, x):
        x = self.stem(x.to(self.stem.weight.dtype)).relu()
        height, width = self.conv.kernel_size
        assert (self.conv.stride, self.conv.padding) == ((2, 2), (0, 0))
        x = F.pad(x, (0, width - 1, 0, height - self.conv.dilation[0]))
        x = self.conv(x.to(self.conv.weight)).relu().mean((2, 3))
        assert (self.conv.in_channels, self.conv.groups) == (self.conv.weight.shape[1], 1)
        assert x.shape[1] == self.fc.in_features == self.conv.out_channels
        assert self.fc.bias is not None
        scores = self.fc(x.to(self.fc.weight.device))
        assert scores.shape[1] == self.fc.out_features
        return scores


def data():
    x = torch.randn(80, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] += torch.arange(80)[:, None, None] % 4
    return [(x, torch.arange(80) % 4)]


def forgotten(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of untrained scores
        return forget_class(model, data(), 2, **QUIET, **options)


def smaller(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = build_specialist(model, [0, 3], data(), data(), budget=0.5, **QUIET)
    assert set(found.ranks) & {"stem", "conv"}
    return found.model


def decomposed(model):
    table = ClassFilters(torch.ones(4, 7), torch.ones(4, dtype=torch.int64), layer="conv")
    return decompose(model, table.select(num_filters=3), head="fc")


REPLACED = {
    "factored": lambda model: factor_layer(model, "conv"),
    "approximated": lambda model: factor_layer(model, "conv", rank=2),
    "factored head": lambda model: factor_layer(model, "fc", rank=2),
    "forgotten at the head": forgotten,
    "forgotten at a layer": lambda model: forgotten(model, layers=["stem", "conv"]),
    "split": smaller,
    "decomposed head": decomposed,
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_replaced_layer_has_what_a_model_reads(kind):
    model = REPLACED[kind](Looking().eval())
    x = data()[0][0][:5]
    with torch.no_grad():
        expected = model(x)
        state = model.state_dict()
        assert {*state} == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), expected)
        double = copy.deepcopy(model).double()
        assert double(x.double()).dtype == torch.float64
        program = torch.export.export(model, (x,))
        assert torch.allclose(program.module()(x), expected, atol=1e-5)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, atol=1e-5)


def convolution(model: nn.Module, name: str) -> nn.Conv2d:
    """The layer, or what stands for it."""
    return model.get_submodule(name)  # type: ignore[return-value]


@pytest.mark.parametrize("layers", ["stem", "conv"])
def test_weight_and_bias_are_those_of_the_row(layers):
    """As where a model multiplies with them, without calling the layer."""
    model = Looking().eval()
    x = torch.randn(3, convolution(model, layers).in_channels, 6, 5)
    for changed in (forgotten(model, layers=layers), factor_layer(model, layers, rank=3)):
        row = convolution(changed, layers)
        expected = F.conv2d(x, row.weight, row.bias, row.stride)
        assert torch.allclose(row(x), expected, atol=1e-5)


ROWS = {
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 1)),
    "grouped": (nn.Conv2d(6, 4, (3, 2), groups=2, bias=False), nn.Conv2d(4, 4, 1)),
    "before a grouped one": (nn.Conv2d(6, 4, 1), nn.Conv2d(4, 8, (2, 3), groups=2)),
    "both grouped": (nn.Conv2d(6, 4, (3, 2), groups=2), nn.Conv2d(4, 8, 1, groups=2)),
    "other groups": (nn.Conv2d(6, 12, (3, 2), groups=3), nn.Conv2d(12, 8, 1, groups=2)),
    "transposed": (nn.ConvTranspose2d(6, 4, (3, 2), groups=2), nn.Conv2d(4, 4, 1)),
    "three": (nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, groups=3), nn.Conv2d(6, 5, 1)),
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_groups_compute_what_their_weight_says(kind, within):
    """Settings and weight belong together, also where the layer is one of the parts."""
    parts = ROWS[kind]
    layer = next(part for part in parts if part.kernel_size != (1, 1))
    row = StandIn({str(place): part for place, part in enumerate(parts)}, layer if within else None)
    convolve = F.conv_transpose2d if kind == "transposed" else F.conv2d
    x = torch.randn(3, 6, 5, 7)
    expected = convolve(x, row.weight, row.bias, groups=row.groups)
    torch.testing.assert_close(row(x), expected, atol=1e-5, rtol=1e-4)
    assert row.groups == (2 if kind == "both grouped" else 1)


def test_a_part_is_not_taken_for_the_row():
    """What else the layer has, is."""
    layer = nn.Conv2d(6, 4, 3, stride=2, groups=2)
    row = StandIn({"layer": layer, "follow": nn.ReLU()}, layer)
    for name in ("weight", "bias", "groups"):
        assert not hasattr(row, name)
    assert row.stride == (2, 2)


def test_the_parts_are_counted_and_not_the_row():
    factored = factor_layer(Looking(), "conv", rank=2)
    expected = {"stem": 8, "conv.directions": 2, "conv.combination": 7, "fc": 4}
    assert num_outputs(factored) == expected
    before = convolution(factored, "conv").weight
    assert not torch.equal(convolution(reinitialize(factored), "conv").weight, before)


def test_a_decomposed_convolution_has_its_settings():
    head = nn.Conv2d(5, 3, 1)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), head)
    table = ClassFilters(torch.ones(3, 5), torch.ones(3, dtype=torch.int64), layer="0")
    found = decompose(model, table.select(num_filters=2), head="1").get_submodule("1")
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "out_channels"):
        assert getattr(found, name) == getattr(head, name)
