"""Which methods find the filters that decide, and only those, where the truth is known.

    python -m benchmarks.planted_filters [--seeds 5] [--images 400]

Prints, for every method and depth, precision and recall of as many filters as were planted (the two
are equal), and of the discoveries at a false discovery rate of 0.05, as means over networks. The
target is 1.0 for contribution and ablation at the layer that feeds the head, without a leak.
"""

import argparse
import time

import torch
from captum.attr import (
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)

from captum_classfilters import (
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


def attributions(model, layer):
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


def gate_table(model, layer, data, num_filters):
    """A gate trained on the network as it is."""
    num_classes = model.head.out_features
    gate = ClassSpecificGate(num_classes, num_filters).attach(model, layer)
    trainer = GatedTrainer(
        model,
        gate,
        torch.optim.Adam([gate.weight], lr=0.02),
        schedule=GateSchedule(period=1, gated=1),
        regularization=1e-2,
    )
    trainer.fit(data, epochs=100, show_progress=False)
    gate.detach()
    return LayerClassGate(model, layer, gate.weight.detach()).class_filters()


def tables_of(planted, layer, data):
    """A table for every method, and the seconds it took."""
    model, tables, seconds = planted.model, {}, {}

    def timed(name, make):
        started = time.perf_counter()
        tables[name] = make()
        seconds[name] = time.perf_counter() - started

    for name, method in attributions(model, layer).items():
        timed(
            name,
            lambda method=method: identify_class_filters(
                method,
                data,
                num_classes=planted.num_classes,
                significance=True,
                show_progress=False,
            ),
        )
    car = LayerFilterAblation(model, layer)
    reduction = car.identify(data, metric="accuracy", show_progress=False)
    timed("CAR per class", lambda: reduction.to_class_filters(1))
    timed("CAR per class, soft", lambda: reduction.to_class_filters(1, soft=True))
    features, labels = collect_features(model, layer, data, show_progress=False)
    timed("class selectivity", lambda: selectivity_filters(features, labels))
    timed("mutual information", lambda: mutual_information_filters(features, labels))
    timed(
        "class gate, network frozen",
        lambda: gate_table(model, layer, data, planted.truth[layer].shape[1]),
    )
    return tables, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=400)
    arguments = parser.parse_args()
    for leak in (0.0, 0.02):
        results = {}
        for seed in range(arguments.seeds):
            planted = planted_network(leak=leak, seed=seed)
            data = planted.loader(arguments.images, seed=seed)
            for layer in planted.layers:
                tables, _ = tables_of(planted, layer, data)
                for name, table in tables.items():
                    truth = planted.truth[layer]
                    row = [recovery(table, truth, as_many=True).precision]
                    if table.q_values is not None:
                        found = recovery(table.select(fdr=0.05), truth)
                        row += [found.precision, found.recall]
                    results.setdefault(name, {}).setdefault(layer, []).append(row)
        print(
            f"\nleak {leak}: precision = recall of as many as planted; precision / recall of "
            f"discoveries at a rate of 0.05; mean of {arguments.seeds} networks, "
            f"{arguments.images} images each"
        )
        print(
            "| method | " + " | ".join(f"{layer} | discoveries" for layer in planted.layers) + " |"
        )
        print("|---" * 7 + "|")
        for name, layers in results.items():
            cells = []
            for layer in planted.layers:
                mean = torch.tensor(layers[layer], dtype=torch.float64).nanmean(0).tolist()
                cells.append(f"{mean[0]:.2f}")
                cells.append(f"{mean[1]:.2f} / {mean[2]:.2f}" if len(mean) == 3 else "")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
