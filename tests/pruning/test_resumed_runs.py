"""Runs that begin where a network changed: equal to whole runs, and shorter."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters.pruning import resumed_runs
from captum_classfilters.pruning.low_rank import replace_module
from captum_classfilters.pruning.resumed_runs import ResumedRuns, can_resume

ORDER = ["stem.0", "body.0.first", "body.0.second", "body.1.first", "body.1.second", "head"]


RUNS: Counter[nn.Module] = Counter()  # of each convolution; what a module itself keeps is put back


class Conv(nn.Conv2d):
    """A convolution that counts its runs."""

    def forward(self, input):
        RUNS[self] += 1
        return super().forward(input)


class Block(nn.Module):
    """A shortcut around two layers, with a function and an activation that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv(3, 5, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = Conv(5, 3, 1)

    def forward(self, x):
        y = self.first(x)
        self.act(y)
        return F.relu(x + self.second(y))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(Conv(2, 3, 3), nn.BatchNorm2d(3))
        self.body = nn.Sequential(Block(), Block())
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.stem(x)
        F.relu_(x)
        return self.head(self.body(x).mean((2, 3)))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(number, 2, 6, 5, generator=generator) for number in (4, 3)]


def counted(model):
    """How often each convolution has run since the last count."""
    modules = model.named_modules()
    return {name: count for name, module in modules if (count := RUNS.pop(module, 0))}


def runs_of(model, order=ORDER):
    return ResumedRuns(model, order, 2)


@torch.no_grad()
def test_changed_layers_run_and_those_before_them_do_not():
    model, data = Net().eval(), batches()
    runs = runs_of(model)
    for name in ORDER:
        for number, x in enumerate(data):
            counted(model)
            found = runs.run(number, (x,), name)
            changed = max(0, ORDER.index(name) - 1)
            assert counted(model) == dict.fromkeys(ORDER[changed:-1], 1)
            assert torch.equal(found, model(x)), name
        for parameter in model.get_submodule(name).parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def test_a_layer_may_be_replaced():
    model, data = Net().eval(), batches()
    runs = runs_of(model)
    for name in ORDER:
        for number, x in enumerate(data):
            assert torch.equal(runs.run(number, (x,), name), model(x)), name
        old = model.get_submodule(name)
        new = nn.Sequential(old, nn.Softplus())
        replace_module(model, old, new)
        runs.replaced(old, new)


@torch.no_grad()
def test_a_run_that_ends_early_is_enough_to_resume():
    model, (x, _) = Net().eval(), batches()
    runs = runs_of(model)

    def stop(*_):
        raise KeyError("stop")

    handle = model.get_submodule("body.0.second").register_forward_hook(stop)
    with pytest.raises(KeyError):
        runs.run(0, (x,), "body.0.second")
    handle.remove()
    model.get_submodule("body.0.second").get_parameter("weight").mul_(-2)
    assert torch.equal(runs.run(0, (x,), "head"), model(x))
    # An earlier layer than before: all of it runs.
    model.get_submodule("stem.0").get_parameter("weight").mul_(-2)
    assert torch.equal(runs.run(0, (x,), "stem.0"), model(x))
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_too_large_records_are_not_kept(monkeypatch):
    model, (x, _) = Net().eval(), batches()
    record = 4 * 3 * 4 * 3 * 4  # what enters the first block: 4 images, 3 x 4 x 3 numbers
    for most, expected in ((2 * record, 1), (2 * record - 1, 3)):
        monkeypatch.setattr(resumed_runs, "_MOST_BYTES", most)
        runs = runs_of(model)
        for _ in range(3):
            runs.run(0, (x,), "body.0.first")
        assert counted(model)["stem.0"] == expected


class Size(nn.Module):
    """Stores how large its images are, in itself or elsewhere, for modules that run later."""

    def __init__(self, elsewhere=None) -> None:
        super().__init__()
        self.elsewhere = [elsewhere]  # lists are looked into, dictionaries in them are not

    def forward(self, x):
        self.size = x.abs().mean((1, 2, 3), keepdim=True)
        if self.elsewhere[0] is not None:
            self.elsewhere[0]["size"] = self.size
        return x


class HandsOn(nn.Module):
    """A network whose end reads what its beginning stored."""

    def __init__(self, elsewhere=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.elsewhere = [elsewhere]
        self.sees = Size(elsewhere)
        self.first, self.second = Conv(2, 3, 3), Conv(3, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.second(self.first(self.sees(x)))
        size = self.sees.size if self.elsewhere[0] is None else self.elsewhere[0]["size"]
        return self.head((x / size).mean((2, 3)))


@torch.no_grad()
def test_what_modules_store_for_later_ones_is_that_of_the_same_batch():
    model, data, order = HandsOn().eval(), batches(), ["first", "second", "head"]
    runs = runs_of(model, order)
    for name in order:
        for number, x in enumerate(data):
            assert torch.equal(runs.run(number, (x,), name), model(x)), (name, number)
            model(torch.rand(1, 2, 6, 5))
    # Two whole runs a step; at the head, and at the layer before it, it need not run by itself.
    assert counted(model) == {"first": 16, "second": 18}


@torch.no_grad()
def test_networks_that_remember_their_last_batch_elsewhere_are_found_out():
    (x, _), order = batches(), ["first", "second", "head"]
    assert can_resume(HandsOn().eval(), order, (x,), (x.flip(-1) + 1,))
    assert can_resume(Net().eval(), ORDER, (x,), (x.flip(-1) + 1,))
    assert not can_resume(HandsOn({}).eval(), order, (x,), (x.flip(-1) + 1,))
