"""One entry at a time works on a model: threads wait, and calls from its own hooks are refused."""

import functools
import gc
import os
import threading
import time
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_classfilters import (
    ClassFilters,
    FilterGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    prune_filters,
)
from captum_classfilters._core import guard
from captum_classfilters._core.taps import hooked
from captum_classfilters.answers.head_edits import HeadEdit
from captum_classfilters.heads import replace_head
from captum_classfilters.heads.linear_head import linear_head_of
from captum_classfilters.identify import random_weights_null
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.pruning import compress_layer, magnitude_prune, specialize
from captum_classfilters.spectral import factor_layer
from tests.models import QUIET, hooks_of
from tests.test_model_left_as_found import ENTRIES, batches, make_model, snapshot


def test_threads_on_one_model_wait_for_each_other():
    model = make_model()
    before = snapshot(model)
    methods = {
        name: lambda name=name: LayerFilterContribution(model, name) for name in ("0", "1", "2")
    }
    expected = {
        name: make().identify(batches() * 2, **QUIET).scores for name, make in methods.items()
    }
    found: dict[str, torch.Tensor] = {}
    gone_wrong: list[Exception] = []

    def work(name):
        try:
            found[name] = methods[name]().identify(batches() * 2, **QUIET).scores
        except Exception as error:
            gone_wrong.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in methods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not gone_wrong
    assert all(torch.equal(found[name], expected[name]) for name in methods)
    assert snapshot(model) == before


def test_threads_on_a_model_and_on_its_wrapper():
    model = make_model()
    before = snapshot(model)
    wrapper = nn.DataParallel(model)
    expected = evaluate_classifier(model, batches(), **QUIET).accuracy
    accuracies: list[float] = []

    def work(network):
        accuracies.extend(
            evaluate_classifier(network, batches(), **QUIET).accuracy for _ in range(3)
        )

    threads = [threading.Thread(target=work, args=(network,)) for network in (model, wrapper)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accuracies == [expected] * 6
    assert snapshot(model) == before


@pytest.mark.parametrize("how", ["plain", "part", "whole", "outside"])
def test_gradients_of_gates_in_two_threads(how):
    """Each thread has its own numbers, however its layers run again in the backward pass."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

        def features(self, x):
            for _ in range(3):  # time for the other thread
                time.sleep(1e-4)
            return self.relu(self.conv(x)).sigmoid().mean((2, 3))

        def scores(self, x):
            return self.head(self.features(x))

        def forward(self, x):
            if how == "whole":
                return again(self.scores, x)
            return self.head(again(self.features, x) if how == "part" else self.features(x))

    again = functools.partial(checkpoint, use_reentrant=False)
    gate = FilterGate(Network(), "relu")
    run = functools.partial(again, gate) if how == "outside" else gate
    given = [torch.linspace(low, 1 - low, 4).expand(2, 4) for low in (0.0, 0.9)]

    def slope(gates):
        own = gates.clone().requires_grad_()
        return torch.autograd.grad(run(own, IMAGES).logsumexp(1).sum(), own)[0]

    expected = [slope(gates) for gates in given]
    wrong: list[object] = []

    def work(place):
        try:
            for _ in range(20):
                if not torch.allclose(slope(given[place]), expected[place], rtol=1e-4, atol=0):
                    wrong.append(place)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hooks_of(gate) == 0


def test_a_gate_waits_for_another_thread_unless_a_backward_pass_runs_it_again():
    model, working, done = small_network(), threading.Event(), threading.Event()
    gate = FilterGate(model, "1")
    gates = gate.ones(2).requires_grad_()
    score = checkpoint(gate, gates, IMAGES, use_reentrant=False).sum()

    def hold():
        with guard.held(model):
            working.set()
            done.wait(10)

    seen: list[bool] = []
    holder = threading.Thread(target=hold)
    holder.start()
    working.wait()
    waiting = threading.Thread(target=lambda: seen.append(gate(gates, IMAGES).requires_grad))
    waiting.start()
    score.backward()  # the holder may itself wait for such a pass
    assert gates.grad is not None
    waiting.join(0.2)
    assert not seen
    done.set()
    holder.join()
    waiting.join()
    assert seen == [True]


def test_a_gate_may_be_part_of_a_model():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = FilterGate(small_network(), "1")

        def forward(self, x):
            return self.gate(self.gate.ones(len(x)), x)

    model = Whole()
    data = [(IMAGES, torch.tensor([0, 1]))]
    expected = LayerFilterContribution(small_network(), "1").identify(data, **QUIET)
    found = LayerFilterContribution(model, "gate.model.1").identify(data, **QUIET)
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_a_call_from_a_hook_of_a_running_call_is_refused(name):
    model = make_model()
    refusals: list[str] = []
    busy: list[bool] = []

    def hook(_module, _inputs, _output):
        if not busy:
            busy.append(True)
            try:
                ENTRIES[name](model)
            except ValueError as error:
                refusals.append(str(error))
            busy.clear()

    method = LayerFilterFrequency(model, "2", top_k=2)
    expected = method.identify(batches(), **QUIET)
    before = snapshot(model)
    handle = model[2].register_forward_hook(hook)
    table = method.identify(batches(), **QUIET)
    handle.remove()
    assert torch.equal(table.scores, expected.scores)
    assert len(refusals) >= len(batches())
    assert all(
        "a hook of its ReLU" in text or "hook of its Sequential" in text for text in refusals
    )
    assert snapshot(model) == before


def test_what_is_no_forward_pass_of_a_running_call_may_call():
    model = make_model()
    method = LayerFilterFrequency(model, "2", top_k=2)
    expected = method.identify(batches(), **QUIET).scores

    def loader():  # between the batches of one call
        for batch in batches():
            assert torch.equal(method.identify(batches(), **QUIET).scores, expected)
            yield batch

    assert torch.equal(method.identify(loader(), **QUIET).scores, expected)

    class Trained(nn.Module):  # in a forward pass of the user's own, as training steps may be
        def forward(self, _x):
            return method.identify(batches(), **QUIET).scores

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.step = model, Trained()

        def forward(self, x):
            return self.step(x)

    assert torch.equal(Whole()(torch.rand(1)), expected)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


IMAGES = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
CHOSEN = ClassFilters(
    torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]]), torch.ones(2), layer="1"
)
CHOSEN = CHOSEN.select(num_filters=2)

COPIES = {
    "replace_head": lambda model: replace_head(model, "4", nn.Linear(4, 2)),
    "decompose": lambda model: decompose(model, CHOSEN, head="4"),
    "prune_filters": lambda model: prune_filters(model, "0", IMAGES, remove=[1]),
    "specialize": lambda model: specialize(model, CHOSEN, [0, 1], IMAGES).model,
    "factor_layer": lambda model: factor_layer(model, "0"),
    "compress_layer": lambda model: compress_layer(model, "0", IMAGES, clusters=2).model,
    "magnitude_prune": lambda model: magnitude_prune(model, "0", 0.5),
    "edited": lambda model: HeadEdit(torch.zeros(4)).edited(model, linear_head_of(model, "4")),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_made_while_another_thread_works_is_of_the_model_as_found(name):
    """Not of the frozen one, in evaluation mode and with hooks, that a running pass works on."""
    model, working, copied = small_network(), threading.Event(), threading.Event()
    model[0].bias.requires_grad_(False)
    in_training = COPIES[name](model)
    expected = [parameter.requires_grad for parameter in in_training.parameters()]
    assert True in expected
    made: list[nn.Module] = []

    def work():
        with (
            guard.model_left_as_found(model, evaluation=True, freeze=True),
            hooked([model[0], model[4]], lambda _module, _inputs, _output: None),
        ):
            working.set()
            copied.wait(0.3)  # long enough for a copy that does not wait

    def copy():
        made.append(COPIES[name](model))
        copied.set()

    threads = [threading.Thread(target=work), threading.Thread(target=copy)]
    threads[0].start()
    working.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    (own,) = made
    assert [parameter.requires_grad for parameter in own.parameters()] == expected
    assert all(module.training and not module._forward_hooks for module in own.modules())


class Watched(nn.ReLU):
    """Notes whether another thread could work on a model while it is being copied."""

    model: ClassVar[list[nn.Module]] = []
    free: ClassVar[list[bool]] = []

    def __deepcopy__(self, memo):
        lock = guard._lock_of(self.model[0])
        other = threading.Thread(target=lambda: self.free.append(lock.acquire(blocking=False)))
        other.start()
        other.join()
        return Watched()


def test_random_networks_are_copied_while_no_other_thread_works(monkeypatch):
    model = small_network()
    model[2] = nn.Sequential(Watched(), model[2])
    monkeypatch.setattr(Watched, "model", [model])
    monkeypatch.setattr(Watched, "free", [])
    data = [(IMAGES, torch.tensor([0, 1]))]
    random_weights_null(LayerFilterContribution(model, "1"), data, repetitions=2, **QUIET)
    assert Watched.free == [False, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_does_not_wait_for_threads_that_are_not_in_it():
    """A worker of a loader, say, that is started while another thread works on a model."""
    model, started, done = make_model(), threading.Event(), threading.Event()

    def hold():
        with guard.held(model):
            started.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    started.wait()
    free = guard._lock_of(model).acquire(blocking=False)  # of another thread
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 1 - guard._lock_of(model).acquire(blocking=False)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert not free
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_guard_keeps_no_model_alive():
    gc.disable()
    try:
        model = make_model()
        LayerFilterFrequency(model, "2", top_k=2).identify(batches(), **QUIET)
        kept = weakref.ref(model)
        del model
        assert kept() is None
    finally:
        gc.enable()
