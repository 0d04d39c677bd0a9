"""Which methods find the filters that decide, and only those, where the truth is known.

    python -m benchmarks.planted_filters [--seeds 5] [--images 400]

Prints, for every method and depth, precision and recall of as many filters as were planted (the two
are equal), and of the discoveries at a false discovery rate of 0.05, as means over networks. The
target is 1.0 for contribution and ablation at the layer that feeds the head, without a leak.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from captum.attr import (
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import nn

from benchmarks.shared import QUIET, Table, parsed, parser
from captum_classfilters import (
    ClassFilters,
    ClassSpecificGate,
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.gates import GatedTrainer, GateSchedule
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import mutual_information_filters, selectivity_filters
from captum_classfilters.testing import planted_network, recovery
from captum_classfilters.testing.planted import PlantedNetwork


def attributions(model: nn.Module, layer: str) -> dict[str, Any]:
    """Methods that give evidence for single images."""
    module = model.get_submodule(layer)
    return {
        "LayerFilterFrequency, top 3": LayerFilterFrequency(model, layer, top_k=3),
        "LayerFilterContribution": LayerFilterContribution(model, layer),
        "LayerFilterAblation": LayerFilterAblation(model, layer),
        "LayerFilterAblation, mean": LayerFilterAblation(model, layer, replacement="mean"),
        "LayerFilterAblation, log-probability": LayerFilterAblation(
            model, layer, score="log_probability"
        ),
        "Captum LayerActivation": LayerActivation(model, module),
        "Captum LayerGradientXActivation": LayerGradientXActivation(model, module),
        "Captum LayerConductance": LayerConductance(model, module),
        "Captum LayerIntegratedGradients": LayerIntegratedGradients(model, module),
        "Captum InternalInfluence": InternalInfluence(model, module),
        "Captum LayerDeepLift": LayerDeepLift(model, module),
    }


def gate_table(
    model: nn.Module,
    layer: str,
    data: Iterable[Any],
    epochs: int,
    num_classes: int,
    num_filters: int,
) -> ClassFilters:
    """A gate trained on the network as it is."""
    gate = ClassSpecificGate(num_classes, num_filters).attach(model, layer)
    trainer = GatedTrainer(
        model,
        gate,
        torch.optim.Adam([gate.weight], lr=0.02),
        schedule=GateSchedule(period=1, gated=1),
        regularization=1e-2,
    )
    trainer.fit(data, epochs=epochs, **QUIET)
    gate.detach()
    return LayerClassGate(model, layer, gate.weight.detach()).class_filters()


def tables_of(
    planted: PlantedNetwork, layer: str, data: Iterable[Any], epochs: int
) -> dict[str, ClassFilters]:
    """A table for every method."""
    model, classes = planted.model, planted.num_classes
    tables = {
        name: identify_class_filters(method, data, num_classes=classes, significance=True, **QUIET)
        for name, method in attributions(model, layer).items()
    }
    reduction = LayerFilterAblation(model, layer).identify(data, metric="accuracy", **QUIET)
    features, labels = collect_features(model, layer, data, **QUIET)
    return {
        **tables,
        "CAR per class": reduction.to_class_filters(1),
        "CAR per class, soft": reduction.to_class_filters(1, soft=True),
        "class selectivity": selectivity_filters(features, labels),
        "mutual information": mutual_information_filters(features, labels),
        "class gate, network frozen": gate_table(
            model, layer, data, epochs, *planted.truth[layer].shape
        ),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Print a table for networks without a leak, and one for those with a leak."""
    known = parser(__doc__)
    known.add_argument("--seeds", type=int, default=5)
    known.add_argument("--images", type=int, default=400)
    known.add_argument("--epochs", type=int, default=100, help="of training the gate")
    known.add_argument("--leaks", type=float, nargs="+", default=(0.0, 0.02))
    options = parsed(known, given, seeds=1, images=20, epochs=2, leaks=(0.02,))
    for leak in options.leaks:
        results: dict[str, dict[str, list[list[float]]]] = {}
        for seed in range(options.seeds):
            planted = planted_network(leak=leak, seed=seed)
            data = planted.loader(options.images, seed=seed)
            for layer in planted.layers:
                for name, table in tables_of(planted, layer, data, options.epochs).items():
                    truth = planted.truth[layer]
                    row = [recovery(table, truth, as_many=True).precision]
                    if table.q_values is not None:
                        found = recovery(table.select(fdr=0.05), truth)
                        row += [found.precision, found.recall]
                    results.setdefault(name, {}).setdefault(layer, []).append(row)
        print(
            f"\nleak {leak}: precision = recall of as many as planted; precision / recall of "
            f"discoveries at a rate of 0.05; mean of {options.seeds} networks, "
            f"{options.images} images each"
        )
        titles = [title for layer in planted.layers for title in (layer, "discoveries")]
        shown = Table("method", *titles)
        for name, layers in results.items():
            cells = []
            for layer in planted.layers:
                mean = torch.tensor(layers[layer], dtype=torch.float64).nanmean(0).tolist()
                words = ["-" if math.isnan(value) else f"{value:.2f}" for value in mean]
                cells += [words[0], " / ".join(words[1:])]
            shown.row(name, *cells)


if __name__ == "__main__":
    main()
