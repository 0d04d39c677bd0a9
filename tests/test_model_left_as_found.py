"""Every public entry leaves the model exactly as found, also after an exception in mid-pass."""

import copy

import pytest
import torch
from torch import nn

from captum_classfilters import (
    ClassFilters,
    ClassFilterSaliency,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    decompose,
    identify_class_filters,
    list_filter_layers,
    select_by_accuracy,
)
from captum_classfilters.evaluate import compare_methods, layer_sweep, model_essentiality
from captum_classfilters.identify import (
    collect_evidence,
    collect_features,
    confusion_filters,
    contrast_classes,
    random_weights_null,
)
from captum_classfilters.networks import GreedyFilterPruning, compare_heads, evaluate_classifier
from tests.models import batches, images

QUIET = {"show_progress": False}


class Alarm(nn.Module):
    """Passes its input on, and raises at a chosen call."""

    def __init__(self):
        super().__init__()
        self.calls_left = None

    def forward(self, x):
        if self.calls_left is not None:
            if self.calls_left == 0:
                raise RuntimeError("alarm")
            self.calls_left -= 1
        return x


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Alarm(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(6, 3),
    )
    model.train()
    model[1].eval()  # flags differ on purpose
    model[0].weight.requires_grad_(False)
    model[7].weight.grad = torch.ones(3, 6)
    return model


def table():
    return ClassFilters(
        torch.arange(18.0).reshape(3, 6) % 7,
        torch.ones(3),
        layer="2",
        provenance={"feeds_head": {"name": "7"}},
    ).select(2)


def both_methods(model):
    return [
        LayerFilterFrequency(model, "2", top_k=2),
        LayerFilterContribution(model, "2"),
        LayerFilterContribution(model, "0"),
    ]


ENTRIES = {
    "identify": lambda m: identify_class_filters(both_methods(m), batches(), **QUIET),
    "identify with significance": lambda m: identify_class_filters(
        both_methods(m), batches(), significance=True, **QUIET
    ),
    "collect_evidence": lambda m: collect_evidence(both_methods(m), batches(), **QUIET),
    "contrast_classes": lambda m: contrast_classes(
        LayerFilterContribution(m, "0"), batches(), 0, 1, **QUIET
    ),
    "confusion_filters": lambda m: confusion_filters(
        LayerFilterContribution(m, "0"), batches(), **QUIET
    ),
    "compare_methods": lambda m: compare_methods(m, "2", batches(), batches(), **QUIET),
    "random weights": lambda m: random_weights_null(
        LayerFilterContribution(m, "0"), batches(), repetitions=1, **QUIET
    ),
    "frequency": lambda m: LayerFilterFrequency(m, "2").attribute(images(), target=0),
    "contribution": lambda m: LayerFilterContribution(m, "2").attribute(images(), target=0),
    "contribution at an inner layer": lambda m: LayerFilterContribution(m, "0").attribute(
        images(), target=0, return_convergence_delta=True
    ),
    "integrated contribution": lambda m: LayerFilterContribution(m, "0").attribute(
        images(), target=0, n_steps=3
    ),
    "saliency": lambda m: ClassFilterSaliency(m, "2", table()).attribute(images(), target=0),
    "saliency maps": lambda m: ClassFilterSaliency(
        m, "2", table(), mode="activation_map"
    ).attribute(images(), target=0),
    "ablation": lambda m: LayerFilterAblation(m, "0").attribute(images(), target=0),
    "accuracy reduction": lambda m: LayerFilterAblation(m, "2").identify(
        batches(), metric="accuracy", **QUIET
    ),
    "greedy pruning": lambda m: GreedyFilterPruning(m, "2").run(batches(), num_filters=4, **QUIET),
    "gate": lambda m: FilterGate(m, "2")(torch.ones(8, 6), images()),
    "list_filter_layers": lambda m: list_filter_layers(m, images()),
    "decompose": lambda m: decompose(m, table(), example_inputs=images()),
    "collect_features": lambda m: collect_features(m, "2", batches(), **QUIET),
    "accuracy_curve": lambda m: accuracy_curve(m, table(), batches(), **QUIET),
    "select_by_accuracy": lambda m: select_by_accuracy(m, table(), batches(), keep=0.1, **QUIET),
    "evaluate_classifier": lambda m: evaluate_classifier(m, batches(), **QUIET),
    "compare_heads": lambda m: compare_heads(
        m, decompose(m, table(), head="7"), images(), repetitions=1
    ),
    "layer_sweep": lambda m: layer_sweep(m, ["2"], batches(), **QUIET),
    "model_essentiality": lambda m: model_essentiality(m, table(), batches(), **QUIET),
}
# Captum's contract: per-image methods run the model as it is, its own random layers included.
PER_IMAGE = {
    "ablation",
    "frequency",
    "contribution",
    "contribution at an inner layer",
    "integrated contribution",
    "saliency",
    "saliency maps",
    "gate",
}


def snapshot(model):
    return {
        "flags": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [id(parameter.grad) for parameter in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "modules": [type(module) for module in model.modules()],
    }


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("fails", [False, True])
def test_left_as_found(name, fails):
    model = make_model()
    if name not in PER_IMAGE and name != "compare_heads":
        model[6].p = 0.5
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    if fails:
        model[3].calls_left = 0 if name in PER_IMAGE else 1
        if name in ("list_filter_layers", "decompose"):
            model[3].calls_left = 0
        with pytest.raises(RuntimeError, match="alarm"):
            ENTRIES[name](model)
    else:
        ENTRIES[name](model)
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    if name not in PER_IMAGE:
        assert torch.equal(torch.get_rng_state(), random_state)


def test_a_loader_that_fails_in_mid_pass():
    model = make_model()
    before = snapshot(model)

    def failing():
        yield from batches()[:2]
        raise OSError("a broken file")

    with pytest.raises(OSError, match="a broken file"):
        identify_class_filters(both_methods(model), failing(), **QUIET)
    assert snapshot(model) == before
