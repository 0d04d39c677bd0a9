"""A pass that is killed; see test_long_passes."""

import time

import torch
from torch import nn

from captum_classfilters import (
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from tests.models import QUIET, deep


class Slow(nn.Module):
    """A model that gives a kill time to arrive."""

    def __init__(self):
        super().__init__()
        self.net = deep()

    def forward(self, images):
        time.sleep(0.002)
        return self.net(images)


class Beginning:
    """A loader that says when it has begun."""

    def __init__(self, data, pipe):
        self.data, self.pipe = data, pipe

    def __iter__(self):
        for number, batch in enumerate(self.data):
            if number == 1:
                self.pipe.send("begun")
            yield batch


def slow_pass(data, **options):
    """Tables of two methods."""
    model = Slow().eval()
    ways = [LayerFilterContribution(model, "net.stage1"), LayerFilterFrequency(model, "net.stage2")]
    return identify_class_filters(ways, data, num_filters=2, **options, **QUIET)


def killed_pass(path, data, pipe):
    """A pass that saves its state after each batch."""
    torch.set_num_threads(1)
    slow_pass(Beginning(data, pipe), state_path=path, save_every=0)
    pipe.send("ended")
