"""Draw the figures of the README and the documentation: ``python docs/make_figures.py``."""

import shutil
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Subset

from captum_classfilters import (
    ClassSpecificGate,
    LayerFilterAblation,
    LayerFilterContribution,
)
from captum_classfilters.cli.demo import load_digits, run_demo, small_cnn, train_classifier
from captum_classfilters.gates import GatedTrainer, GateSchedule
from captum_classfilters.identify import collect_features, contrast_classes, exemplars, unit_scores
from captum_classfilters.metrics import (
    compare_methods,
    mutual_information_bound,
    mutual_information_matrix,
)
from captum_classfilters.pruning import (
    GreedyFilterPruning,
    accuracy_after_removal,
    class_interpretation,
    filter_importance_baselines,
    removal_order,
)
from captum_classfilters.spectral import compare_with_random, model_svd, separation_test
from captum_classfilters.visualize import (
    plot_class_bars,
    plot_class_separation,
    plot_exemplars,
    plot_exponents,
    plot_filter_contrast,
    plot_filter_correlation,
    plot_filter_grid,
    plot_gate_and_weight,
    plot_hypergraph,
    plot_method_comparison,
    plot_mutual_information,
    plot_removal_curves,
    plot_spectrum,
)

FIGURES = Path(__file__).parent / "figures"
NAMES = {
    "class_filters_contribution.png": "class_filters.png",
    "accuracy_curve.png": "accuracy_curve.png",
    "explanations.png": "explanations.png",
}


def spectra() -> None:
    """Spectra of the demo's network, and of its random twin."""
    torch.manual_seed(0)
    model = train_classifier(small_cnn(), load_digits().train, epochs=20)
    compared = compare_with_random(model)
    figure, _ = plot_spectrum(compared.model["filters.0"])
    figure.savefig(FIGURES / "spectrum.png", dpi=110)
    figure, _ = plot_exponents({"trained": compared.model, "random twin": compared.twin})
    figure.savefig(FIGURES / "exponents.png", dpi=110)


def directions() -> None:
    """Exemplary digits of directions, and the hypergraphs of digits and directions."""
    torch.manual_seed(0)
    digits = load_digits()
    model = train_classifier(small_cnn(), digits.train, epochs=20)
    svds = model_svd(model)
    found = exemplars(model, "second.0", digits.test, directions=svds)["second.0"]
    names = [str(digit) for digit in range(10)]
    figure, _ = plot_exemplars(
        found, digits.test.dataset, range(4), num_images=4, class_names=names
    )
    figure.savefig(FIGURES / "exemplars.png", dpi=110)
    scores, labels = unit_scores(model, list(svds), digits.test, directions=svds)
    tests = {name: separation_test(scores[name], labels) for name in svds}
    figure, _ = plot_hypergraph(tests["head"].hypergraph, style="bands")
    figure.savefig(FIGURES / "hypergraph.png", dpi=110)
    figure, _ = plot_class_separation(tests)
    figure.savefig(FIGURES / "class_separation.png", dpi=110)


def main() -> None:
    """Run the demo and keep its pictures; draw those that it has not."""
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder)
        for source, name in NAMES.items():
            shutil.copy(Path(folder) / source, FIGURES / name)
    spectra()
    directions()
    draw_comparisons()
    draw_gates()
    for name, figure in pruning_figures().items():
        figure.savefig(FIGURES / name, dpi=110)


def pruning_figures() -> dict[str, Figure]:
    """Filters of the digits network removed in several orders, chosen on training images."""
    torch.manual_seed(0)
    digits = load_digits()
    model = train_classifier(small_cnn(), digits.train, show_progress=False)
    choose = DataLoader(Subset(digits.train.dataset, range(200)), batch_size=200)
    quiet = {"show_progress": False}
    car = LayerFilterAblation(model, "second").identify(choose, metric="accuracy", **quiet)
    greedy = GreedyFilterPruning(model, "second").run(choose, num_filters=2, **quiet)
    scores = filter_importance_baselines(model, "second", choose, **quiet)
    orders = {
        "CAR, greedy": greedy,
        "CAR, ranked once": removal_order(car.reduction),
        **{name: removal_order(one) for name, one in scores.items()},
    }
    curves = accuracy_after_removal(model, "second", orders, digits.test, **quiet)
    print(curves.table())
    first = GreedyFilterPruning(model, "first").run(choose, num_filters=22, **quiet)
    weights = model.get_submodule("first")[0].weight  # type: ignore[index]
    reduction = LayerFilterAblation(model, "second").identify(
        digits.test, metric="accuracy", **quiet
    )
    strongest = reduction.reduction.sort(descending=True).indices[:2].tolist()
    told = class_interpretation(reduction, num_classes=3)
    return {
        "removal_curves.png": plot_removal_curves(curves)[0],
        "filter_grid.png": plot_filter_grid(weights, first)[0],
        "class_bars.png": plot_class_bars([told[one] for one in strongest])[0],
    }


def draw_gates() -> None:
    """A gated network of digits beside a plain one with the same weight decay."""
    digits = load_digits()
    models, gates, information = [], [], []
    for schedule in (GateSchedule(unit="joint"), GateSchedule(warmup=60)):  # the second never gates
        torch.manual_seed(0)
        model = small_cnn()
        gate = ClassSpecificGate(10, 64).attach(model, "filters")
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-3
        )
        steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        trainer = GatedTrainer(
            model, gate, optimizer, scheduler=steps, schedule=schedule, regularization=0.05
        )
        trainer.fit(digits.train, epochs=60, show_progress=False)
        gate.detach()
        features, labels = collect_features(model, "filters", digits.test, show_progress=False)
        information.append(mutual_information_matrix(features, labels))
        models.append(model)
        gates.append(gate)
    weights = [model.get_submodule("head").weight for model in models]
    figure, _ = plot_gate_and_weight(gates[0].weight, weights[0], other_weight=weights[1])
    figure.savefig(FIGURES / "gate_and_weight.png", dpi=110)
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    bound = float(mutual_information_bound(digits.test_labels).mean())
    for axes, matrix, name in zip(
        figure.subplots(2, 1), information, ("gated", "plain"), strict=True
    ):
        score = float(matrix.max(1).values.mean())
        plot_mutual_information(
            matrix,
            bound=bound,
            title=f"{name}: score {score:.3f} of at most {bound:.3f}",
            plt_fig_axis=(figure, axes),
        )
    figure.savefig(FIGURES / "mutual_information.png", dpi=110)
    figure = Figure(figsize=(12.4, 5.4), layout="constrained")
    heads = (gates[0].weight, weights[1])
    for axes, model, scores, name in zip(
        figure.subplots(1, 2), models, heads, ("gated", "plain"), strict=True
    ):
        convolution = model.get_submodule("filters")[0]  # type: ignore[index]
        plot_filter_correlation(convolution.weight, scores, plt_fig_axis=(figure, axes))
        axes.set_title(f"{name}: {axes.get_title(loc='left')}", loc="left", size=9)
    figure.savefig(FIGURES / "filter_correlation.png", dpi=110)


def draw_comparisons() -> None:
    """Methods against methods, and digit against digit."""
    torch.manual_seed(0)
    digits = load_digits()
    model = train_classifier(small_cnn(), digits.train)
    comparison = compare_methods(model, "filters", digits.train, digits.test)
    figure, _ = plot_method_comparison(comparison)
    figure.savefig(FIGURES / "method_comparison.png", dpi=110)
    method = LayerFilterContribution(model, "filters")
    contrast = contrast_classes(method, digits.test, 3, 8)
    figure, _ = plot_filter_contrast(contrast, num_filters=5)
    figure.savefig(FIGURES / "filter_contrast.png", dpi=110)


if __name__ == "__main__":
    main()
