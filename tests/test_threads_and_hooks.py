"""One entry at a time works on a model: threads wait, and calls from its own hooks are refused."""

import gc
import os
import threading
import weakref

import pytest
import torch
from torch import nn

from captum_classfilters import LayerFilterContribution, LayerFilterFrequency
from captum_classfilters._core import guard
from captum_classfilters.metrics import evaluate_classifier
from tests.models import QUIET
from tests.test_model_left_as_found import ENTRIES, batches, make_model, snapshot

WITHOUT_GUARD = {"gate"}  # it is a model, and may be part of another


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


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - WITHOUT_GUARD))
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
