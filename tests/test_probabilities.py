"""A model that ends in a sigmoid or a softmax has the numbers of the same model without it, wherever
they depend on what its scores mean."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from captum_classfilters import (
    ClassFilters,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterShapley,
)
from captum_classfilters._core.layers import module_of
from captum_classfilters._core.outputs import are_probabilities, log_probabilities, two_classes
from captum_classfilters._core.score_reader import gives_probabilities
from captum_classfilters.cli.folder_classes import answers_of
from captum_classfilters.gates import ClassSpecificGate, GatedTrainer, GateSchedule, masking_test
from captum_classfilters.heads import fine_tune
from captum_classfilters.identify import activation_scores, confusion_filters
from captum_classfilters.metrics import (
    class_curves,
    collateral_damage,
    evaluate_classifier,
    filter_curves,
    filter_infidelity,
    remove_and_retrain,
)
from captum_classfilters.pruning import (
    GreedyFilterPruning,
    LayerwiseFineTuning,
    accuracy_after_removal,
)
from tests.models import QUIET, known

X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KNOWN = torch.rand(60, 6, generator=torch.Generator().manual_seed(3))
ENDS: dict[str, tuple[int, nn.Module]] = {
    "sigmoid": (1, nn.Sigmoid()),
    "softmax": (3, nn.Softmax(1)),
}


def network(outputs: int) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, outputs)
    )
    with torch.no_grad():
        model.get_parameter("4.weight").mul_(20)
        model.get_parameter("4.bias").sub_(model(X).median(0).values)
    return model.eval()


def data_of(model: nn.Module) -> list[Any]:
    """The images with what the model says, but for the first five."""
    with torch.no_grad():
        scores = two_classes(model(X))
    labels = scores.argmax(1)
    labels[:5] = scores[:5].argmin(1)
    return [(X[:40], labels[:40]), (X[40:], labels[40:])]


def table_of(data: Any) -> ClassFilters:
    labels = torch.cat([y for _, y in data])
    counts = labels.bincount()
    return ClassFilters(KNOWN[: len(counts)], counts, layer="1").select(2)


def targets(data: Any) -> dict[str, Any]:
    return {"target": torch.cat([y for _, y in data])}


def reduction(model, layer, data):
    found = LayerFilterAblation(model, layer).identify(data, metric="accuracy", **QUIET)
    return [found.accuracy, found.class_reduction, found.log_probability_drop]


def attributed(method, score):
    def run(model, layer, data):
        own = method(model, layer, score=score)
        scores = own.filter_scores(own.attribute(X, **targets(data)))
        return [scores, own.identify(data, **QUIET).scores]

    return run


def trained(model, layer, data, how):
    """Losses of training at a rate of 0, and accuracies."""
    classes = int(torch.cat([y for _, y in data]).max()) + 1
    if how == "fine_tune":
        epochs = fine_tune(model, data, data, learning_rate=0.0, **QUIET)
        return [value for e in epochs for value in (e.loss or 0.0, e.validation_accuracy)]
    if how == "layerwise":
        return LayerwiseFineTuning(data, 0.0, num_steps=3)(model)
    schedule = GateSchedule(
        "joint" if how == "gated" else "epoch", warmup=0 if how == "gated" else 9
    )
    gate = ClassSpecificGate(classes, 6).attach(model, "1")
    rate = torch.optim.SGD(model.parameters(), lr=0.0)
    (epoch,) = GatedTrainer(model, gate, rate, schedule=schedule).fit(data, data, **QUIET)
    return [epoch.loss, epoch.accuracy, epoch.validation_accuracy]


def retrained(model, layer, data):
    found = remove_and_retrain(
        model,
        layer,
        KNOWN[0],
        data,
        data,
        num_filters=[2],
        epochs=30,
        repetitions=1,
        learning_rate=0.3,
        **QUIET,
    )
    return [found.full_accuracy, *found.accuracy.values()]


def curves(measure):
    def run(model, layer, data):
        found = class_curves(model, layer, table_of(data), data, measure=measure, **QUIET)
        return [*found.necessity.values(), *found.sufficiency.values()]

    return run


#: From a model or a function, its layer and data to numbers.
OF_FUNCTIONS = {
    "accuracy reduction": reduction,
    "confusion": lambda m, layer, data: (
        confusion_filters(
            LayerFilterContribution(known(module_of(m, [layer])), layer), data, **QUIET
        ).confusion
    ),
    "ablation, probability": attributed(LayerFilterAblation, "probability"),
    "ablation, log-probability": attributed(LayerFilterAblation, "log_probability"),
    "Shapley values": attributed(LayerFilterShapley, "probability"),
    "filter_curves": lambda m, layer, data: list(
        filter_curves(m, layer, X, KNOWN, **targets(data)).deletion.values()
    ),
    "filter_infidelity": lambda m, layer, data: filter_infidelity(
        m, layer, X, KNOWN, score="probability", **targets(data)
    ).infidelity["scores"],
    "class_curves, recall": curves("recall"),
    "class_curves, probability": curves("probability"),
    "collateral_damage": lambda m, layer, data: (
        collateral_damage(m, layer, table_of(data), data, **QUIET).without
    ),
    "greedy pruning": lambda m, layer, data: [
        (order := GreedyFilterPruning(m, layer).run(data, num_filters=2, **QUIET)).accuracy,
        order.order,
    ],
    "accuracy_after_removal": lambda m, layer, data: accuracy_after_removal(
        m, layer, [3, 1, 0], data, **QUIET
    ).accuracy["order"],
}
OF_MODULES = {
    "evaluate_classifier": lambda m, layer, data: evaluate_classifier(m, data, **QUIET).confusion,
    "answers of a folder": lambda m, layer, data: answers_of(m, [x for x, _ in data]),
    "masking_test": lambda m, layer, data: (
        masking_test(m, layer, table_of(data), data, **QUIET).confusion
    ),
    "activation_scores": lambda m, layer, data: activation_scores(m, layer, data, **QUIET).taylor,
    "remove_and_retrain": retrained,
    **{how: partial(trained, how=how) for how in ("fine_tune", "layerwise", "gated", "ungated")},
}
FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "function": lambda model: lambda x: model(x),
    "bound method": lambda model: model.forward,
}
CASES = [
    *((name, form) for name in OF_FUNCTIONS for form in FORMS),
    *((name, "module") for name in OF_MODULES),
]


def numbers(found: Any) -> torch.Tensor:
    if isinstance(found, (list, tuple)):
        return torch.cat([numbers(part) for part in found])
    return torch.as_tensor(found).detach().double().flatten()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_end_makes_no_difference(name, form, end):
    outputs, module = ENDS[end]
    logits, data = network(outputs), data_of(network(outputs))
    ended = nn.Sequential(*network(outputs), module).eval()
    measure = {**OF_FUNCTIONS, **OF_MODULES}[name]
    found, expected = (
        numbers(measure(FORMS[form](model), model[1], data)) for model in (ended, logits)
    )
    assert len(expected.nan_to_num().unique()) > 1 or name == "layerwise"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_probabilities_of_half_precision(dtype, classes):
    logits = torch.randn(200, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = logits.exp() / logits.exp().sum(1, keepdim=True)
    for probabilities in (logits.softmax(1), rounded):
        assert are_probabilities(probabilities)
        assert not are_probabilities(1.1 * probabilities)
    expected = logits.float().log_softmax(1)
    assert torch.allclose(log_probabilities(logits.softmax(1), True), expected, atol=0.02)


def test_a_model_of_half_precision_is_not_put_through_a_softmax_again():
    outputs, end = ENDS["softmax"]
    logits = network(outputs)
    ended = nn.Sequential(*network(outputs), end).eval()
    own, half = (
        LayerFilterAblation(model, "1", score="probability").attribute(X.to(dtype), target=0)
        for model, dtype in ((logits, torch.float32), (ended.bfloat16(), torch.bfloat16))
    )
    torch.testing.assert_close(half.float(), own, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["accuracy reduction", "greedy pruning", "activation_scores"])
def test_a_batch_that_contradicts_the_first_is_refused(name):
    """What a Softplus makes of a logit is neither."""
    model = network(1)
    shifted = nn.Sequential(*model, nn.Softplus(), nn.Flatten())
    with torch.no_grad():
        order = shifted(X)[:, 0].argsort()
    data = [(X[order[:20]], torch.ones(20).long()), (X[order[-20:]], torch.ones(20).long())]
    with pytest.raises(ValueError, match=r"batch 1 has values outside \[0, 1\].*ClassScores"):
        numbers({**OF_FUNCTIONS, **OF_MODULES}[name](shifted, shifted[1], data))


def test_training_mode_does_not_hide_the_logit():
    """Dropout and batch statistics change from run to run, and a look leaves them as they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 1))
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(0.01)
        model.get_parameter("3.bias").fill_(0.5)
    scores = model.train()(X)
    mean = model.get_buffer("2.running_mean").clone()
    assert 0 <= float(scores.min()) <= float(scores.max()) <= 1
    assert not gives_probabilities(scores, model, lambda: model(X))
    assert torch.equal(model.get_buffer("2.running_mean"), mean)
    assert model.training
