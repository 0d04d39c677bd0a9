"""Batch normalizations folded where nothing changes by it, and left where something would."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from captum_classfilters.pruning.fold_batch_norms import fold_batch_norms
from tests.models import hooks_of


def seen(model, *shape):
    """The model with statistics, weights and biases of normalizations that are not as they begin."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name in ("weight", "bias", "running_mean", "running_var"):
                if getattr(module, name) is not None:
                    getattr(module, name).data.uniform_(0.5, 1.5)
    return model.eval(), torch.randn(*shape)


class Net(nn.Module):
    """Normalizations after all kinds of layers, in one of several ways."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=way == "bias"), nn.BatchNorm2d(4)
        self.rows, self.rows_norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        maps = self.conv(x)
        if self.way == "activated in place":
            F.relu_(maps)
        made = maps + 1 if self.way == "something between" else maps
        if self.way == "twice":
            made = self.norm(made)
        normed = self.norm(made)
        if self.way == "read beside":
            normed = normed + maps
        if self.way == "reads its weight":
            normed = normed * self.norm.weight.mean()
        rows = self.rows_norm(self.rows(normed.relu().mean((2, 3))))
        return self.head(rows)


@pytest.mark.parametrize("way", ["", "bias"])
def test_a_normalization_becomes_part_of_its_layer(way):
    model, x = seen(Net(way), 3, 2, 6, 5)
    before, expected = copy.deepcopy(model), model(x)
    assert fold_batch_norms(model, (x[:2],)) == 2
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.rows_norm, nn.Identity)
    scale = before.norm.weight / (before.norm.running_var + before.norm.eps).sqrt()
    bias = 0 if before.conv.bias is None else before.conv.bias
    shift = before.norm.bias + (bias - before.norm.running_mean) * scale
    assert torch.allclose(model.conv.weight, before.conv.weight * scale[:, None, None, None])
    assert model.conv.bias is not None
    assert torch.allclose(model.conv.bias, shift, atol=1e-6)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    "way", ["activated in place", "something between", "twice", "read beside", "reads its weight"]
)
def test_one_that_cannot_be_folded_stays(way):
    model, x = seen(Net(way), 3, 2, 6, 5)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    assert fold_batch_norms(model, (x,)) == 1  # that of the rows
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert isinstance(model.norm, nn.BatchNorm2d)
    for key, value in model.state_dict().items():
        if not key.startswith("rows"):
            assert torch.equal(value, before[key]), key
    assert model.conv.bias is None


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(2, 4, 2, stride=2), nn.BatchNorm1d(4, affine=False), (2, 2, 7)),
        (nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.BatchNorm2d(4, eps=0.1), (2, 4, 5, 6)),
        (nn.Conv3d(1, 4, 2, dilation=2), nn.BatchNorm3d(4), (2, 1, 5, 4, 6)),
    ],
)
def test_convolutions_of_all_kinds(layer, norm, shape):
    model, x = seen(nn.Sequential(layer, norm, nn.Flatten(), nn.LazyLinear(3)), *shape)
    expected = model(x)
    assert fold_batch_norms(model, (x,)) == 1
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_some_have_no_statistics_or_no_weight_of_their_own():
    free = nn.BatchNorm2d(4, track_running_stats=False)
    model, x = seen(nn.Sequential(nn.Conv2d(2, 4, 3), free, nn.Flatten()), 2, 2, 5, 5)
    assert fold_batch_norms(model, (x,)) == 0
    computed = parametrizations.weight_norm(nn.Conv2d(2, 4, 3))
    model, x = seen(nn.Sequential(computed, nn.BatchNorm2d(4), nn.Flatten()), 2, 2, 5, 5)
    assert fold_batch_norms(model, (x,)) == 0
    shared = nn.Conv2d(4, 4, 1)
    model, x = seen(nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.Flatten()), 2, 4, 5, 5)
    expected = model(x)
    assert fold_batch_norms(model, (x,)) == 0
    assert torch.equal(model(x), expected)
