"""Budgets: what is counted against real networks, and where filters go."""

import pytest
import torch
from torch import nn

from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters.pruning import prunable_layers, prune_filters
from captum_classfilters.pruning.filter_budget import RemainingSize, allocate
from captum_classfilters.pruning.network_size import UNITS, NetworkSize
from tests.models import QUIET, deep


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3),
        )  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("model", "sizes"),
    [(deep(), {"stage1.0": 3, "stage2.0": 2}), (Depthwise().eval(), {"0": 4, "6": 2})],
)
def test_what_is_left_is_the_pruned_network(model, sizes, unit):
    x = torch.rand(2, 2 if "stage1.0" in sizes else 3, *([8, 8] if "stage1.0" in sizes else [4, 4]))
    found = prunable_layers(model, x, **QUIET)
    assert {layer.name for layer in found.prunable} == sizes.keys()
    size_of = NetworkSize(model, (x,), unit)
    count = RemainingSize(model, FilterGraph(model, (x,)), sizes, size_of)
    smaller = prune_filters(
        model, {name: range(size) for name, size in sizes.items()}, x, constants="drop"
    )
    assert count.total - count.saved(sizes) == pytest.approx(size_of.of(smaller))
    whole = dict(count.widths)
    assert count.saved(whole) == 0
    for name, size in sizes.items():
        alone = {**whole, name: size}
        assert count.saved(alone, name) == pytest.approx(count.saved(alone))


def test_a_weight_counts_at_every_position_and_in_every_run():
    conv, head = nn.Conv2d(2, 4, 3), nn.Linear(2, 3)
    assert conv.bias is not None
    both = nn.Sequential(
        conv, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), conv, nn.Flatten(2), head
    ).eval()
    size = NetworkSize(both, (torch.rand(5, 2, 6, 5),), "multiply_adds")
    # 4 x 3 positions of the first run and 2 x 1 of the second; the head has one for each of four.
    assert size.of_parameter("0", conv.weight) == 4 * 2 * 9 * (12 + 2)
    assert size.of_parameter("0", conv.bias) == size.of_layer("1", both[1]) == 0
    assert size.of_layer("2", both[2]) == 8 * 12
    assert size.of_layer("5", head) == 6 * 4
    assert size.of(both) == 72 * 14 + 8 * 12 + 6 * 4
    assert NetworkSize(both).of(both) == sum(p.numel() for p in both.parameters())


def test_filters_go_where_they_cost_least_for_each_parameter():
    model, x = deep(), torch.rand(2, 2, 8, 8)
    names = ["stage1.0", "stage2.0"]
    count = RemainingSize(model, FilterGraph(model, (x,)), names, NetworkSize(model))
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


@pytest.mark.parametrize("most", [0.2, 0.45, 0.8])
def test_steps_are_the_cheapest_of_all_layers_each_time(most):
    """Only what a step touches is looked at again: the same as looking at all."""
    model, x = Depthwise().eval(), torch.rand(2, 3, 4, 4)
    count = RemainingSize(
        model, FilterGraph(model, (x,)), ["0", "6"], NetworkSize(model, (x,), "multiply_adds")
    )
    damage = {"0": torch.arange(6.0).square(), "6": torch.tensor([0, 1, 9, 9.5, 10])}
    sizes = dict(count.widths)
    while count.total - count.saved(sizes) > most * count.total:
        steps = []
        for name, size in sizes.items():
            after = {**sizes, name: size - 1}  # of so few filters one goes at a time
            if size > 1:
                rise = damage[name][1 - size] - damage[name][-size]
                steps.append((rise / (count.saved(after) - count.saved(sizes)), after))
        sizes = min(steps, key=lambda step: step[0])[1]
    found = allocate(count, damage, most * count.total)
    assert count.total - count.saved(found) <= most * count.total
    assert found == sizes
