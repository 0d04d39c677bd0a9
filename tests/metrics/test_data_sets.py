"""Metrics that read a data set: every kind of output, what is not finite, and seeds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from captum_classfilters import ClassFilters, ClassScores
from captum_classfilters.metrics import (
    class_curves,
    collateral_damage,
    compare_methods,
    evaluate_classifier,
    filter_curves,
    filter_infidelity,
    remove_and_retrain,
)
from tests.models import QUIET, batches, images, joined, pool_linear


def table(num_classes=3):
    scores = torch.arange(6.0 * num_classes).reshape(num_classes, 6) * 7 % 5 + 1
    return ClassFilters(scores, torch.ones(num_classes)).select(2)


def same_methods(num_classes=3):
    return {"one": table(num_classes), "other": table(num_classes).select(2)}


ENTRIES = {
    "class_curves": lambda m, d, layer: class_curves(m, layer, table(), d, **QUIET),
    "collateral_damage": lambda m, d, layer: collateral_damage(m, layer, table(), d, **QUIET),
    "compare_methods": lambda m, d, layer: compare_methods(
        m, layer, d, d[:], methods=same_methods(), num_filters=2, **QUIET
    ),
    "remove_and_retrain": lambda m, d, layer: remove_and_retrain(
        m, layer, table(), d, d, num_filters=[3], epochs=1, repetitions=1, **QUIET
    ),
}
entries = pytest.mark.parametrize("name", ENTRIES)


def numbers(result):
    """What is compared of a result."""
    for name in ("necessity", "without", "hits", "accuracy"):
        value = getattr(result, name, None)
        if value is not None and not isinstance(value, float):
            values = value.values() if isinstance(value, dict) else [value]
            return torch.cat([part.double().flatten() for part in values])
    raise AssertionError(type(result))


def run(name, model, data, layer="1"):
    return numbers(ENTRIES[name](model, data, layer))


class OnlyEight(nn.Module):
    """A model that takes batches of eight and no other."""

    def __init__(self):
        super().__init__()
        self.inner = pool_linear()

    def forward(self, x):
        return self.inner(x.reshape(8, 2, 6, 6))


@entries
def test_a_model_that_takes_its_own_batch_size_only(name):
    data = batches(24, batch_size=8)
    found = run(name, OnlyEight(), data, "inner.1")
    assert torch.equal(found, run(name, pool_linear(), data))


def test_dropout_before_the_layer_is_switched_off_while_the_rest_is_retrained():
    model = pool_linear()
    model.insert(2, nn.Dropout(0.9))
    expected = run("remove_and_retrain", model.eval(), batches())
    model.train()
    assert torch.equal(run("remove_and_retrain", model, batches()), expected)
    assert all(module.training for module in model.modules())


# -- what a model returns ----------------------------------------------------------------------------


class Answer(nn.Module):
    """A model whose scores come in another form."""

    def __init__(self, form, classes=3):
        super().__init__()
        self.body, self.form = pool_linear(classes=classes), form

    def forward(self, x):
        return self.form(self.body(x))


def curves(model, num_classes=3, **options):
    data = [(x, y % num_classes) for x, y in batches()]
    return class_curves(model, "body.1", table(num_classes), data, **options, **QUIET)


FORMS = {
    "logits of an object": lambda z: SimpleNamespace(logits=z),
    "logits of a mapping": lambda z: {"logits": z},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("measure", ["recall", "probability"])
def test_logits_inside_an_answer(form, measure):
    found = curves(Answer(FORMS[form]), measure=measure)
    expected = curves(Answer(lambda z: z), measure=measure)
    for name, curve in expected.necessity.items():
        assert torch.equal(found.necessity[name], curve)


@pytest.mark.parametrize("measure", ["recall", "probability"])
def test_probabilities_are_not_put_through_a_softmax_again(measure):
    found = curves(Answer(lambda z: (3 * z).softmax(1)), measure=measure)
    expected = curves(Answer(lambda z: 3 * z), measure=measure)
    for name, curve in expected.necessity.items():
        assert torch.allclose(found.necessity[name], curve, atol=1e-5)


ONE_OUTPUT = {
    "a logit": lambda z: z,
    "a flat logit": lambda z: z.flatten(),
    "a probability": lambda z: z.sigmoid(),
    "a flat probability": lambda z: z.sigmoid().flatten(),
}


@pytest.mark.parametrize("form", ONE_OUTPUT)
@pytest.mark.parametrize("measure", ["recall", "probability"])
def test_one_output_is_two_classes(form, measure):
    answer = ONE_OUTPUT[form]
    model = Answer(lambda z: answer(z - 0.4), classes=1)
    twin = Answer(lambda z: torch.cat([torch.zeros_like(z), z - 0.4], 1), classes=1)
    found, expected = curves(model, 2, measure=measure), curves(twin, 2, measure=measure)
    for name, curve in expected.necessity.items():
        assert torch.allclose(found.necessity[name], curve, atol=1e-5), name
    data = [(x, y % 2) for x, y in batches()]
    damage = collateral_damage(model, "body.1", table(2), data, **QUIET)
    assert torch.equal(damage.clean, evaluate_classifier(model, data, **QUIET).confusion)
    other = collateral_damage(twin, "body.1", table(2), data, **QUIET)
    assert torch.equal(damage.without, other.without)
    both = [
        compare_methods(m, "body.1", data, data[:], methods=same_methods(2), num_filters=2, **QUIET)
        for m in (model, Answer(lambda z: torch.cat([0.4 - z, z - 0.4], 1), classes=1))
    ]
    assert torch.equal(both[0].hits, both[1].hits)


def test_one_output_is_retrained():
    data = [(x, y % 2) for x, y in batches()]
    for form in (lambda z: z, lambda z: z.sigmoid().flatten()):
        found = remove_and_retrain(
            Answer(form, classes=1), "body.1", table(2), data, data,
            num_filters=[3], epochs=30, learning_rate=0.3, repetitions=1, **QUIET,
        )  # fmt: skip
        assert float(found.full_accuracy) > 0.6


def test_the_loss_of_probabilities_is_that_of_their_logits():
    options: dict[str, Any] = {"num_filters": [2], "epochs": 2, "repetitions": 2, **QUIET}
    accuracies = [
        remove_and_retrain(Answer(form), "body.1", table(), batches(60), batches(60), **options)
        for form in (lambda z: z, lambda z: z.softmax(1))
    ]
    for name, values in accuracies[0].accuracy.items():
        assert torch.equal(values, accuracies[1].accuracy[name])


def test_an_answer_of_another_kind_says_how_to_wrap_the_model():
    model = Answer(lambda z: (z, z))
    with pytest.raises(ValueError, match="ClassScores"):
        curves(model)
    wrapped = ClassScores(model, lambda output: output[0])
    expected = curves(Answer(lambda z: z))
    assert torch.equal(curves(wrapped).necessity["random"], expected.necessity["random"])


# -- what is not finite ------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Divides by what its filter 3 puts out: without it, and it alone, the answer is no number."""

    def __init__(self, value=0.0):
        super().__init__()
        self.body = pool_linear()
        with torch.no_grad():
            self.body.get_parameter("0.bias")[3] = 50.0
        self.value = value

    def forward(self, x):
        maps = self.body[1](self.body[0](x))
        broken = maps[:, 3].sum((1, 2)) == 0
        scores = self.body[4](maps.mean((2, 3)))
        return torch.where(broken[:, None], torch.full_like(scores, self.value), scores)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["class_curves", "collateral_damage", "compare_methods"])
def test_what_is_not_finite_is_no_wrong_answer(name, value):
    with pytest.raises(ValueError, match=r"NaN or Inf for image 0 of batch 0 with .* removed"):
        run(name, Fragile(value), batches(), "body.1")


def everything_but(filter_):
    scores = torch.ones(3, 6)
    scores[:, filter_] = 2.0
    return ClassFilters(scores, torch.ones(3), layer="body.1").select(1)


def test_the_error_names_the_filters():
    model = Fragile(float("nan"))
    with pytest.raises(ValueError, match="batch 0 with the filters 3 removed; it would count as a"):
        collateral_damage(model, "body.1", everything_but(3), batches(), **QUIET)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert not any(hooks)
    with pytest.raises(ValueError, match="with no filter removed"):
        class_curves(
            model, "body.1", table(), [(x * float("nan"), y) for x, y in batches()], **QUIET
        )


def test_classes_masked_by_minus_infinity_are_no_fault():
    def masked(z):
        return torch.cat([z[:, :2], torch.full_like(z[:, 2:], -float("inf"))], 1)

    data = [(x, y % 2) for x, y in batches()]
    damage = collateral_damage(Answer(masked), "body.1", table(), data, **QUIET)
    assert int(damage.clean.sum()) == 24


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_single_images_likewise(value):
    model, x = Fragile(value), images()
    scores = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for metric in (filter_curves, filter_infidelity):
        with pytest.raises(ValueError, match=r"NaN or Inf for image .* removed"):
            metric(model, "body.1", x, scores, target=0)


# -- seeds -------------------------------------------------------------------------------------------


def test_seeds_and_repetitions():
    """More repetitions go on where fewer ended; another seed is another control and nothing else."""
    model, data = pool_linear(), batches(60)

    def curve(**options):
        return class_curves(model, "1", table(), data, measure="probability", **options, **QUIET)

    one, two = curve(repetitions=1), curve(repetitions=2)
    own, other = curve(repetitions=1, seed=7), curve(repetitions=2, seed=7)
    assert torch.equal(one.necessity["class filters"], own.necessity["class filters"])
    assert not torch.equal(one.necessity["random"], own.necessity["random"])
    second = 2 * two.necessity["random"] - one.necessity["random"]
    assert not torch.allclose(second, one.necessity["random"])
    assert not torch.allclose(second, own.necessity["random"])  # no seed plus one
    assert not torch.allclose(2 * other.necessity["random"] - own.necessity["random"], second)
    damages = [collateral_damage(model, "1", table(), data, seed=s, **QUIET) for s in (0, 0, 1)]
    random = [damage.control_recall["random"] for damage in damages]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])
    x, y = joined(data)
    compared = [
        compare_methods(
            model, "1", data, [(x, y)], methods=same_methods(), num_filters=2, seed=s, **QUIET
        ).random_hits
        for s in (0, 0, 1)
    ]
    assert torch.equal(compared[0], compared[1])
    assert not torch.equal(compared[0], compared[2])
