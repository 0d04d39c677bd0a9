"""What two networks cost, counted by hand."""

import torch
from torch import nn

from captum_classfilters import LayerFilterContribution, decompose
from captum_classfilters.heads import compare_heads
from captum_classfilters.pruning import compare_networks, multiply_adds
from tests.models import QUIET, batches, hooks_of, images, pool_linear
from tests.pretend_device import pretend


def test_a_decomposed_head_is_counted_by_both_comparisons():
    model = pool_linear(filters=7, classes=3)
    table = LayerFilterContribution(model, "1").identify(batches(), num_filters=2, **QUIET)
    small = decompose(model, table)
    kept = int(table.selected.sum())
    comparison = compare_networks(model, small, images(), repetitions=2)
    assert comparison.before.filters == comparison.after.filters == 7 + 3
    assert comparison.layers == {}
    assert comparison.before.parameters == 7 * 2 * 9 + 7 + 3 * 7 + 3
    assert comparison.after.parameters == 7 * 2 * 9 + 7 + kept + 3
    heads = compare_heads(model, small, images(), repetitions=2)
    saved = comparison.before.parameters - comparison.after.parameters
    assert heads.before.head_parameters - heads.after.head_parameters == saved == 21 - kept
    lines = [" ".join(line.split()) for line in str(comparison).splitlines()]
    assert lines[1] == "filters 10 10 1.00"


def test_counts_of_shared_and_turned_layers():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up = nn.Linear(4, 4), nn.ConvTranspose1d(1, 5, 2)
            self.again = self.first

        def forward(self, x):
            return self.up(self.again(self.first(x))[:, None]).flatten(1)

    cost = compare_networks(Shared(), Shared(), torch.rand(3, 4), repetitions=1).before
    assert cost.filters == 4 + 5  # a shared layer counts once
    assert cost.bytes == 4 * (16 + 4 + 10 + 5)
    assert cost.multiply_adds == 2 * 16 + 4 * 10


def test_models_that_are_elsewhere_or_wrapped():
    model = pool_linear()
    expected = multiply_adds(model, images())
    assert multiply_adds(nn.DataParallel(model), [images()]) == expected
    with pretend("cuda") as device:
        moved = pool_linear().train().to(device)
        comparison = compare_networks(moved, moved, images(), repetitions=1)
        assert moved.training
    assert comparison.before.multiply_adds == expected
    assert hooks_of(model) == 0
