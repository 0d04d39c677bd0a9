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
    LayerSingularDirection,
    accuracy_curve,
    decompose,
    identify_class_filters,
    list_filter_layers,
    prune_filters,
    select_by_accuracy,
)
from captum_classfilters.answers import build_specialist
from captum_classfilters.attr import filter_activation_maps, filter_gradient_maps
from captum_classfilters.heads import compare_heads, layer_sweep, model_essentiality
from captum_classfilters.identify import (
    activation_scores,
    collect_evidence,
    collect_features,
    confusion_filters,
    contrast_classes,
    exemplars,
    random_weights_null,
    receptive_field,
    unit_scores,
)
from captum_classfilters.metrics import (
    cascading_randomization,
    class_curves,
    collateral_damage,
    compare_methods,
    evaluate_classifier,
    filter_curves,
    filter_infidelity,
    filter_max_sensitivity,
    remove_and_retrain,
)
from captum_classfilters.pruning import (
    ClassFilterImportance,
    GreedyFilterPruning,
    LayerwiseFineTuning,
    accuracy_after_removal,
    compare_networks,
    compress_layer,
    filter_importance_baselines,
    prunable_layers,
    response_chroma,
    specialize,
)
from captum_classfilters.spectral import (
    compare_with_random,
    direction_signals,
    factor_layer,
    layer_svd,
    model_spectra,
    model_svd,
    profile_graph,
    profile_images,
)
from captum_classfilters.visualize import FeatureObjective, visualize_features
from tests.models import QUIET, batches, images


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


class TwoOfThree(nn.Module):
    """Red and green, for a model that reads two colors."""

    def forward(self, x):
        return x[:, :2]


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
    "filter activation maps": lambda m: filter_activation_maps(m, "2", images()),
    "filter gradient maps": lambda m: filter_gradient_maps(m, "2", images(), torch.arange(2)),
    "ablation": lambda m: LayerFilterAblation(m, "0").attribute(images(), target=0),
    "accuracy reduction": lambda m: LayerFilterAblation(m, "2").identify(
        batches(), metric="accuracy", **QUIET
    ),
    "greedy pruning": lambda m: GreedyFilterPruning(m, "2").run(batches(), num_filters=4, **QUIET),
    "greedy pruning of layers with fine-tuning": lambda m: GreedyFilterPruning(m, ["0", "2"]).run(
        batches(),
        num_filters=10,
        schedule="all_layers",
        fine_tune=LayerwiseFineTuning(batches(), 0.1, num_steps=2),
        **QUIET,
    ),
    "gate": lambda m: FilterGate(m, "2")(torch.ones(8, 6), images()),
    "list_filter_layers": lambda m: list_filter_layers(m, images()),
    "decompose": lambda m: decompose(m, table(), example_inputs=images()),
    "collect_features": lambda m: collect_features(m, "2", batches(), **QUIET),
    "exemplars": lambda m: exemplars(m, ["0", "2"], batches(), **QUIET),
    "receptive_field": lambda m: receptive_field(m, "2", images()),
    "unit_scores": lambda m: unit_scores(m, ["0", "2"], batches(), **QUIET),
    "profile_images": lambda m: profile_images(m, ["0", "2"], batches(), **QUIET),
    "profile_graph": lambda m: profile_graph(m, ["0", "7"], batches(), **QUIET),
    "visualize_features": lambda m: visualize_features(
        m, FeatureObjective.of_filter("2", 1), (2, 6, 6), steps=2, **QUIET
    ),
    "accuracy_curve": lambda m: accuracy_curve(m, table(), batches(), **QUIET),
    "select_by_accuracy": lambda m: select_by_accuracy(m, table(), batches(), keep=0.1, **QUIET),
    "evaluate_classifier": lambda m: evaluate_classifier(m, batches(), **QUIET),
    "compare_heads": lambda m: compare_heads(
        m, decompose(m, table(), head="7"), images(), repetitions=1
    ),
    "compare_networks": lambda m: compare_networks(m, copy.deepcopy(m), images(), repetitions=1),
    "prune_filters": lambda m: prune_filters(m, "0", images(), remove=[1]),
    "prunable_layers": lambda m: prunable_layers(m, images()),
    "torch_pruning importance": lambda m: ClassFilterImportance(m, table(), images()),
    "activation_scores": lambda m: activation_scores(m, "2", batches(), **QUIET),
    "baselines": lambda m: filter_importance_baselines(m, "2", batches(), **QUIET),
    "accuracy_after_removal": lambda m: accuracy_after_removal(m, "2", [1, 0], batches(), **QUIET),
    "compress_layer": lambda m: compress_layer(m, "0", images()),
    "specialize": lambda m: specialize(m, table(), [0, 2], images(), dataloader=batches(), **QUIET),
    "build_specialist": lambda m: build_specialist(
        m, [0, 2], batches(120, batch_size=50), budget=0.8, epochs=1, **QUIET
    ),
    "response_chroma": lambda m: response_chroma(
        nn.Sequential(TwoOfThree(), m), "1.2", [torch.ones(4, 3, 6, 6)] * 2, **QUIET
    ),
    "layer_sweep": lambda m: layer_sweep(m, ["2"], batches(), **QUIET),
    "direction signals": lambda m: direction_signals(m, images()),
    "singular directions": lambda m: LayerSingularDirection(m, "0").attribute(images()),
    "contributions of directions": lambda m: LayerSingularDirection(
        m, "0", evidence="contribution"
    ).attribute(images(), target=0),
    "identify directions": lambda m: LayerSingularDirection(
        m, "0", evidence="contribution"
    ).identify(batches(), **QUIET),
    "model_essentiality": lambda m: model_essentiality(m, table(), batches(), **QUIET),
    "filter_infidelity": lambda m: filter_infidelity(
        m, "2", images(), torch.ones(8, 6), target=0, each_filter=True
    ),
    "filter_curves": lambda m: filter_curves(m, "2", images(), torch.ones(8, 6), target=0),
    "filter_max_sensitivity": lambda m: filter_max_sensitivity(
        LayerFilterContribution(m, "2"), images(), target=0
    ),
    "class_curves": lambda m: class_curves(m, "2", table(), batches(), **QUIET),
    "collateral_damage": lambda m: collateral_damage(m, "2", table(), batches(), **QUIET),
    "cascading_randomization": lambda m: cascading_randomization(
        m, lambda twin: LayerFilterContribution(twin, "2"), images(), target=0
    ),
    "remove_and_retrain": lambda m: remove_and_retrain(
        m, "2", table(), batches(), batches(), num_filters=[2], epochs=1, repetitions=1, **QUIET
    ),
}
# These run the model once.
ONE_PASS = {
    "list_filter_layers",
    "decompose",
    "compress_layer",
    "prune_filters",
    "prunable_layers",
    "torch_pruning importance",
    "receptive_field",
    "filter activation maps",
    "filter gradient maps",
    "filter_infidelity",
    "filter_curves",
    "filter_max_sensitivity",
    "cascading_randomization",
    "remove_and_retrain",
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
    "direction signals",
    "singular directions",
    "contributions of directions",
}
# These read weights and never run the model.
WEIGHTS_ONLY = {
    "layer_svd": lambda m: layer_svd(m[0]),
    "model_svd": lambda m: [svd.left for svd in model_svd(m).values()],
    "model_spectra": model_spectra,
    "compare_with_random": compare_with_random,
    "factor_layer": lambda m: factor_layer(m, "0").train(),
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
        if name in ONE_PASS:
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


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_left_as_found_by_what_reads_weights(name):
    model = make_model()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    WEIGHTS_ONLY[name](model)
    assert snapshot(model) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
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
