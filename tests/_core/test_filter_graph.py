"""Filters followed through networks whose wiring is written out here."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters._core.filter_trace import FilterTrace


class Wired(nn.Module):
    """Two convolutions side by side, a gate, a depthwise convolution and a head."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.norm = nn.BatchNorm2d(7)
        self.squeeze, self.excite = nn.Linear(7, 2), nn.Linear(2, 7)
        self.blur = nn.Conv2d(7, 7, 3, groups=7)
        self.head = nn.Linear(7 * 6, 5)

    def forward(self, x):
        maps = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        gate = self.excite(torch.relu(self.squeeze(maps.mean((2, 3))))).sigmoid()
        return self.head(self.blur(maps * gate[:, :, None, None]).flatten(1))


def traced(model, *shape):
    return FilterGraph(model.eval(), (torch.randn(*shape),))


def test_what_goes_with_a_filter():
    model = Wired()
    graph = traced(model, 2, 2, 4, 5)
    reach = graph.reach(model.right, [1])  # filter 4 of the seven
    assert reach.reason == ""
    assert reach.consumers == {"squeeze": [4], "head": [24, 25, 26, 27, 28, 29]}
    assert reach.read_filters == {"squeeze": [1], "head": [1] * 6}
    assert reach.removed == {"right": [1], "excite": [4], "norm": [4], "blur": [4]}
    assert (
        graph.reach(model.excite, [4]).reason == "it is a gate of 'right'; remove the filters there"
    )
    assert graph.reach(model.squeeze).consumers == {"excite": [0, 1]}
    assert graph.reach(model.head).reason == "its filters are the model's outputs"


def test_the_layers_behind_a_concatenation():
    graph = traced(Wired(), 2, 2, 4, 5)
    left, right = graph.sources(graph.layer("norm"))
    assert (left.name, left.filters, left.places) == ("left", [0, 1, 2], [0, 1, 2])
    assert (right.name, right.filters, right.places) == ("right", [0, 1, 2, 3], [3, 4, 5, 6])


@pytest.mark.parametrize(
    ("modules", "point"),
    [
        ([nn.BatchNorm2d(4), nn.ReLU()], "2"),
        ([nn.ReLU(), nn.PReLU(4), nn.Hardswish()], "3"),
        ([nn.MaxPool2d(3, 1, 1), nn.ReLU()], "0"),
        ([nn.ReLU(), nn.ChannelShuffle(2)], "1"),
        ([nn.ReLU(), nn.Softmax(3)], "1"),
        ([nn.GroupNorm(2, 4), nn.ReLU()], "0"),
        ([nn.Dropout(), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4), nn.ReLU()], "2"),
    ],
)
def test_masks_stand_behind_norms_and_activations(modules, point):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), *modules, nn.Conv2d(4, 3, 1))
    graph = traced(model, 2, 2, 5, 6)
    assert graph.names[graph.mask_point(model[0])] == point


def test_an_activation_written_out_is_an_activation():
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    model = nn.Sequential(nn.Conv2d(2, 4, 1), Swish(), nn.Conv2d(4, 3, 1))
    graph = traced(model, 2, 2, 5, 6)
    assert graph.mask_point(model[0]) is model[1]


# -- operations -----------------------------------------------------------------------------------

# What is done with maps of 6 filters of 4 x 5 positions, and which filters the channels of the
# outcome then are; None where they must not be followed.
OPERATIONS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "pointwise": (lambda maps: maps.exp() + 1, [0, 1, 2, 3, 4, 5]),
    "in place": (lambda maps: F.relu(maps, inplace=True), [0, 1, 2, 3, 4, 5]),
    "cat": (lambda maps: torch.cat([maps, maps], 1), [0, 1, 2, 3, 4, 5] * 2),
    "stack": (
        lambda maps: torch.stack([maps, maps], 2).flatten(1, 2),
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
    ),
    "repeat": (lambda maps: maps.repeat(1, 2, 1, 1), [0, 1, 2, 3, 4, 5] * 2),
    "pad": (lambda maps: F.pad(maps, (1, 1, 0, 0, 1, 0)), [None, 0, 1, 2, 3, 4, 5]),
    "flatten": (
        lambda maps: maps[..., :2, :1].flatten(1),
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
    ),
    "flatten the other way": (
        lambda maps: maps[..., :2, :1].movedim(1, -1).flatten(1),
        [0, 1, 2, 3, 4, 5] * 2,
    ),
    "positions pooled": (lambda maps: F.max_pool2d(maps, 2), [0, 1, 2, 3, 4, 5]),
    "positions averaged": (lambda maps: maps.mean((2, 3)), [0, 1, 2, 3, 4, 5]),
    "positions chosen": (lambda maps: maps[:, :, [2, 0]], [0, 1, 2, 3, 4, 5]),
    "whole slice": (lambda maps: maps[:, 0:6], [0, 1, 2, 3, 4, 5]),
    "softmax of positions": (lambda maps: maps.softmax(2), [0, 1, 2, 3, 4, 5]),
    "other types": (lambda maps: maps.double().clone(), [0, 1, 2, 3, 4, 5]),
    "roll": (lambda maps: maps.roll(1, 1), None),
    "roll of all": (lambda maps: maps.roll(1), None),
    "slice": (lambda maps: maps[:, 1:], None),
    "split": (lambda maps: maps.split([2, 4], 1)[1], None),
    "unbind": (lambda maps: maps.unbind(1)[2], None),
    "index": (lambda maps: maps[:, [1, 0]], None),
    "bool index": (lambda maps: maps[maps > 0], None),
    "taken apart": (lambda maps: maps.unflatten(1, (2, 3)), None),
    "crop of filters": (lambda maps: F.pad(maps, (0, 0, 0, 0, -1, 0)), None),
    "pooled over filters": (lambda maps: F.avg_pool2d(maps.transpose(1, 2), 2), None),
    "maximum of filters": (lambda maps: maps.max(1)[0], None),
    "sorted filters": (lambda maps: maps.sort(1)[0], None),
    "cumulated filters": (lambda maps: maps.cumsum(1), None),
    "matrix product": (lambda maps: maps.mT @ maps, None),
    "parts written": (lambda maps: maps.clone().index_fill_(1, torch.tensor([0]), 0), None),
    "copied into a part": (lambda maps: torch.zeros(3, 8, 4, 5)[:, 1:7].copy_(maps), None),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    function, expected = OPERATIONS[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.done = nn.Conv2d(2, 6, 1), nn.Identity()

        def forward(self, x):
            return self.done(function(self.conv(x)))

    model = Model().eval()
    trace = FilterTrace(model)
    trace.run((torch.randn(3, 2, 4, 5),))
    lost = [record for record in trace.lost if record.kind == "operation"]
    assert bool(lost) == (expected is None)
    if expected is not None:
        numbers = trace.outputs[model.done].numbers
        filters = [0 if channel is None else channel + 1 for channel in expected]
        assert np.array_equal(numbers.ravel(), filters)
        assert numbers.shape[1] == len(filters)
