"""Budgets: parameters counted against real networks, and where filters go."""

import pytest
import torch
from torch import nn

from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters.pruning import prunable_layers, prune_filters
from captum_classfilters.pruning.filter_budget import ParameterCount, allocate
from tests.models import QUIET, deep


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "sizes"),
    [(deep(), {"stage1.0": 3, "stage2.0": 2}), (Depthwise().eval(), {"0": 4, "6": 2})],
)
def test_parameters_are_those_of_the_pruned_network(model, sizes):
    x = torch.rand(2, 2 if "stage1.0" in sizes else 3, *([8, 8] if "stage1.0" in sizes else [4, 4]))
    found = prunable_layers(model, x, **QUIET)
    assert {layer.name for layer in found.prunable} == sizes.keys()
    count = ParameterCount(model, FilterGraph(model, (x,)), sizes)
    smaller = prune_filters(
        model, {name: range(size) for name, size in sizes.items()}, x, constants="drop"
    )
    real = sum(parameter.numel() for parameter in smaller.parameters())
    assert count.total - count.saved(sizes) == pytest.approx(real)
    whole = dict(count.widths)
    assert count.saved(whole) == 0
    for name, size in sizes.items():
        alone = {**whole, name: size}
        assert count.saved(alone, name) == pytest.approx(count.saved(alone))


def test_filters_go_where_they_cost_least_for_each_parameter():
    model, x = deep(), torch.rand(2, 2, 8, 8)
    count = ParameterCount(model, FilterGraph(model, (x,)), ["stage1.0", "stage2.0"])
    free = torch.zeros(4)
    dear = torch.arange(6.0) * 1000
    sizes = allocate(count, {"stage1.0": free, "stage2.0": dear}, count.total - 1)
    assert sizes["stage2.0"] == 6
    assert sizes["stage1.0"] < 4
    sizes = allocate(count, {"stage1.0": torch.arange(4.0) * 1000, "stage2.0": dear * 0}, 200)
    assert sizes["stage2.0"] < 6
    assert count.total - count.saved(sizes) <= 200
    assert allocate(count, {"stage1.0": free, "stage2.0": dear}, 0) == {
        "stage1.0": 1,
        "stage2.0": 1,
    }
