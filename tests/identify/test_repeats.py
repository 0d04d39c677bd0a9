"""A model that gives other scores for the same images is told from one that does not."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerActivation, LayerGradCam
from torch import nn

from captum_classfilters import (
    GreedyFilterPruning,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    identify_class_filters,
)
from captum_classfilters._core.batches import FEW_IMAGES
from captum_classfilters._core.repeats import difference_of_runs
from captum_classfilters.identify import (
    collect_evidence,
    confusion_filters,
    contrast_classes,
    exemplars,
    unit_scores,
)
from captum_classfilters.metrics import class_curves, evaluate_classifier
from captum_classfilters.pruning import accuracy_after_removal
from tests.models import QUIET, batches, deep, known
from tests.pretend_device import pretend


class Dropping(nn.Module):
    """Dropout that no mode switches off, at the features or in the images."""

    def __init__(self, rate=0.5, at_images=False):
        super().__init__()
        self.net, self.rate, self.at_images = deep(), rate, at_images

    def forward(self, images):
        if self.at_images:
            return self.net(F.dropout(images, self.rate, training=True))
        features = self.net.flatten(self.net.pool(self.net.stage2(self.net.stage1(images))))
        return self.net.head(F.dropout(features, self.rate, training=True))


class Jittered(nn.Module):
    """Scores with a little noise."""

    def __init__(self, size):
        super().__init__()
        self.net, self.size = deep(), size

    def forward(self, images):
        scores = self.net(images)
        return scores * (1 + self.size * torch.rand_like(scores))


def frequency(model, data):
    return LayerFilterFrequency(model, "net.stage1", top_k=2).identify(data, **QUIET)


def table(model):
    """Filters at the head, found without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LayerFilterContribution(model, "net.stage2").identify(batches(), **QUIET)


CALLS: dict[str, Callable[[Any, Any], object]] = {
    "votes": frequency,
    "contributions": lambda m, d: LayerFilterContribution(m, "net.stage2").identify(d, **QUIET),
    "inside": lambda m, d: LayerFilterContribution(m, "net.stage1").identify(d, **QUIET),
    "ablation": lambda m, d: LayerFilterAblation(m, "net.stage1").identify(d, **QUIET),
    "accuracy": lambda m, d: LayerFilterAblation(m, "net.stage1").identify(
        d, metric="accuracy", **QUIET
    ),
    "another package's": lambda m, d: identify_class_filters(
        LayerActivation(m, m.net.stage1), d, **QUIET
    ),
    "several": lambda m, d: identify_class_filters(
        [LayerFilterFrequency(m, "net.stage1", top_k=2), LayerGradCam(m, m.net.stage2)],
        d,
        attribute_kwargs={1: {"attr_dim_summation": False}},
        **QUIET,
    ),
    "both sides": lambda m, d: identify_class_filters(
        {
            "input": LayerFilterFrequency(m, "net.stage1", top_k=2),
            "output": LayerFilterFrequency(m, "net.stage2", top_k=2),
        },
        d,
        attribute_kwargs={"input": {"attribute_to_layer_input": True}},
        **QUIET,
    ),
    "evidence": lambda m, d: collect_evidence(
        LayerFilterFrequency(m, "net.stage1", top_k=2), d, **QUIET
    ),
    "another package's, classes known": lambda m, d: identify_class_filters(
        LayerGradCam(m, m.net.stage2),
        d,
        num_classes=3,
        attribute_kwargs={"attr_dim_summation": False},
        **QUIET,
    ),
    "contrast": lambda m, d: contrast_classes(
        LayerFilterContribution(m, "net.stage2"), d, 0, 1, **QUIET
    ),
    "confusions": lambda m, d: confusion_filters(
        LayerFilterContribution(m, "net.stage2"), d, **QUIET
    ),
    "accuracy of the model": lambda m, d: evaluate_classifier(m, d, **QUIET),
    "curves of classes": lambda m, d: class_curves(m, "net.stage2", table(m), d, **QUIET),
    "curves of accuracy": lambda m, d: accuracy_curve(m, table(m), d, head="net.head", **QUIET),
    "removal": lambda m, d: accuracy_after_removal(m, "net.stage1", [1, 0], d, **QUIET),
    "greedy pruning": lambda m, d: GreedyFilterPruning(m, "net.stage1").run(
        d, num_filters=1, **QUIET
    ),
    "exemplars": lambda m, d: exemplars(m, "net.stage1", d, **QUIET),
    "unit scores": lambda m, d: unit_scores(m, "net.stage1", d, **QUIET),
}


def about_noise(call, model, data):
    """The warnings about noise that a call gives."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call(model.eval(), data)
    return [str(w.message) for w in seen if "different scores" in str(w.message)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("at_images", [False, True])
def test_dropout_that_is_never_off_is_warned_of_once(name, at_images):
    messages = about_noise(CALLS[name], Dropping(at_images=at_images), batches())
    assert len(messages) == 1
    assert "the first batch, run twice, differs by up to" in messages[0]


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_repeats_itself_is_not(name):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.drop = deep(), nn.Dropout(0.5)

        def forward(self, images):
            return self.drop(self.net(images))

    assert not about_noise(CALLS[name], Same(), batches())


@pytest.mark.parametrize(("size", "told"), [(1e-6, False), (1e-3, True)])
def test_rounding_is_no_noise(size, told):
    assert bool(about_noise(frequency, Jittered(size), batches())) == told


def test_the_numbers_are_those_of_a_run_that_was_not_looked_at():
    """The second run leaves the random numbers of the batches that follow as they are."""
    model, data = Dropping().eval(), batches()
    torch.manual_seed(5)
    table = LayerFilterFrequency(model, "net.stage1", top_k=2).identify(data, **QUIET)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    again = LayerFilterFrequency(model, "net.stage1", top_k=2).identify(data, **QUIET)
    assert torch.equal(table.scores, again.scores)


def test_a_few_images_of_the_first_batch_run_once_more_and_no_others():
    model, data, runs = deep(), batches(batch_size=6), []
    handle = model.register_forward_hook(lambda _, inputs, __: runs.append(inputs[0]))
    LayerFilterFrequency(model, "stage1", top_k=2).identify(
        [(data[0][0][:0], data[0][1][:0]), *data], **QUIET
    )
    handle.remove()
    first, *others = [images for images, _ in data]
    expected = [first, first[:FEW_IMAGES], *others]
    assert len(runs) == len(expected)
    assert all(map(torch.equal, runs, expected))


class OfOneSize(nn.Module):
    """A model whose batches have six images, or whose scores depend on how many there are."""

    def __init__(self, refuses, noisy=False):
        super().__init__()
        self.net, self.refuses, self.noisy, self.sizes = deep(), refuses, noisy, []

    def forward(self, images):
        self.sizes.append(len(images))
        if self.refuses and len(images) != 6:
            raise RuntimeError("made for six images")
        scores = self.net(images) * len(images)
        return scores + torch.rand(1) if self.noisy else scores


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
def test_batches_of_one_size(refuses, noisy):
    model, data = OfOneSize(refuses, noisy), batches(18, batch_size=6)
    assert bool(about_noise(CALLS["accuracy of the model"], model, data)) == noisy
    assert model.sizes == [6, FEW_IMAGES, 6, 6, 6]


def test_a_device_is_not_waited_for():
    with pretend("cuda") as device:
        model, data = deep().to(device), batches(115)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LayerFilterFrequency(model, "stage1", top_k=2).identify(data, num_filters=2, **QUIET)


def compared(output, run):
    return known(difference_of_runs(output, run))


class TestDifferences:
    def test_of_scores_of_all_forms(self):
        scores = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
        forms: list[Any] = [lambda s: s, lambda s: {"logits": s}, lambda s: s[:, 0]]
        for wrap in forms:
            same, distance, size = compared(wrap(scores), partial(wrap, scores))
            assert bool(same)
            assert float(distance) == 0
            other = scores.clone()
            other[0] += 0.5
            same, distance, size = compared(wrap(scores), partial(wrap, other))
            assert not bool(same)
            assert float(distance) == 0.5
            assert float(size) == float(class_of(wrap(scores)).abs().max())

    def test_what_is_not_finite_must_be_so_again(self):
        scores = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]])
        assert bool(compared(scores, lambda: scores.clone())[0])
        assert not bool(compared(scores, lambda: scores.nan_to_num(0.0))[0])

    def test_scores_that_the_second_run_writes_into(self):
        scores = torch.zeros(2, 3)
        assert not bool(compared(scores, lambda: scores.add_(1))[0])

    def test_nothing_is_compared_where_there_are_no_scores(self):
        assert difference_of_runs((1, 2), lambda: (1, 2)) is None
        assert difference_of_runs(torch.tensor([1]), lambda: torch.tensor([1])) is None

    def test_half_precision_rounds_more(self):
        scores = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
        assert bool(compared(scores, lambda: scores * 1.01)[0])
        assert not bool(compared(scores.float(), lambda: scores.float() * 1.01)[0])


def class_of(output):
    return output["logits"] if isinstance(output, dict) else output
