"""Draw the figures of the README and the documentation.

    python docs/make_figures.py               # all of them
    python docs/make_figures.py photograph    # some

The photograph and its model's weights lie in `shared/data` beside the checkout, or where CLASSFILTERS_DATA
points; without them that figure stays as it is.
"""

import csv
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from captum.attr import LayerAttribution
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import models, transforms

from captum_classfilters import (
    ClassSpecificGate,
    LayerFilterAblation,
    LayerFilterContribution,
)
from captum_classfilters.answers import (
    ClassFilterOOD,
    audit_forgetting,
    find_shortcuts,
    forget_class,
    repair,
    repair_confusion,
)
from captum_classfilters.cli.demo import load_digits, run_demo, small_cnn, train_classifier
from captum_classfilters.gates import GatedTrainer, GateSchedule
from captum_classfilters.identify import (
    collect_features,
    confusion_filters,
    contrast_classes,
    exemplars,
    unit_scores,
)
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
    plot_confusion_repair,
    plot_exemplars,
    plot_exponents,
    plot_filter_contrast,
    plot_filter_correlation,
    plot_filter_grid,
    plot_forgetting,
    plot_gate_and_weight,
    plot_hypergraph,
    plot_method_comparison,
    plot_mutual_information,
    plot_removal_curves,
    plot_shortcuts,
    plot_spectrum,
    plot_unknown_reasons,
)

DATA = Path(
    os.environ.get("CLASSFILTERS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
PHOTOGRAPH = "ILSVRC2012_val_00012557.JPEG"
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


def photograph() -> None:
    """A photograph, and where the filters of its class look; they were found on others of the class."""
    weights, folder = DATA / "squeezenet1_1_imagenet_fp16.safetensors", DATA / "imagenet_val1300"
    if not weights.exists() or not folder.exists():
        print(f"No photograph is drawn: {weights} or {folder} is not there.")
        return
    model = models.squeezenet1_1()
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    with (folder / "labels.csv").open() as file:
        labels = {row["file"]: int(row["class_index"]) for row in csv.DictReader(file)}
    target, crop = labels[PHOTOGRAPH], transforms.CenterCrop(224)
    names = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def opened(name: str) -> Tensor:
        picture = crop(Image.open(folder / name).convert("RGB"))
        return transforms.functional.to_tensor(picture)

    others = [name for name, label in labels.items() if label == target and name != PHOTOGRAPH]
    inputs = normalize(torch.stack([opened(name) for name in others]))
    method = LayerFilterContribution(model.eval(), "features")
    table = method.identify([(inputs, [target] * len(others))], num_filters=4, show_progress=False)
    image = opened(PHOTOGRAPH)
    maps = method.attribute(normalize(image)[None], target=target)[0].detach()
    with torch.no_grad():
        probability = float(model(normalize(image)[None]).softmax(1)[0, target])
    columns = {f"filter {index}": maps[index] for index in table.filters_of(target).tolist()}
    columns = {f"all {len(maps)} filters": maps.sum(0), **columns}
    figure = overlaid(image, f"{names[target]}, {probability:.0%}", columns)
    figure.savefig(FIGURES / "photograph.png", dpi=100)


def overlaid(image: Tensor, title: str, maps: dict[str, Tensor]) -> Figure:
    """An image (3, H, W), and beside it maps (h, w) that glow on it where they are positive."""
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    axes, *places = figure.subplots(1, 1 + len(maps))
    axes.imshow(image.movedim(0, -1))
    axes.set_title(title, size=11, weight="bold")
    pale = 0.25 + 0.5 * image.mean(0)
    for place, (name, values) in zip(places, maps.items(), strict=True):
        shape = tuple(image.shape[1:])
        large = LayerAttribution.interpolate(values[None, None], shape, interpolate_mode="bicubic")
        strength = (large[0, 0] / large.max()).clamp(0, 1)
        place.imshow(pale, cmap="gray", vmin=0, vmax=1)
        place.imshow(strength, cmap="inferno", alpha=(1.4 * strength).clamp(0, 0.85).numpy())
        place.set_title(name, size=10)
        place.set_xlabel(f"adds {float(values.sum()):+.1f}", size=10)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def demo() -> None:
    """The demo's pictures."""
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder)
        for source, name in NAMES.items():
            shutil.copy(Path(folder) / source, FIGURES / name)


def pruning() -> None:
    """What pruning does to the digits network."""
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


def draw_answers() -> None:
    """A patch that stands for a digit, digits of unknown classes, and a digit forgotten."""
    digits = load_digits()
    (x, y), test = digits.train.dataset.tensors, (digits.test_images, digits.test_labels)  # type: ignore[attr-defined]
    find, judge = ([(test[0][part], test[1][part])] for part in HALVES)
    quiet = {"show_progress": False}
    generator = torch.Generator().manual_seed(0)
    patched = (y == 3) & (torch.rand(len(y), generator=generator) < 0.95)
    model = trained_on(torch.where(patched[:, None, None, None], stamped(x), x), y)
    found = find_shortcuts(model, find, stamped, **quiet)
    save(plot_shortcuts(found), "shortcuts")
    repaired = repair(model, found, judge, stamped, edit="filters", size=10, **quiet)
    save(plot_shortcuts(repaired), "repair")
    find, judge = ([(stamped(images), labels) for images, labels in part] for part in (find, judge))
    method = LayerFilterContribution(model, "filters")
    errors = confusion_filters(method, find, **quiet)
    fixed = repair_confusion(model, find, judge, *errors.largest()[0], **quiet)
    save(plot_confusion_repair(fixed), "confusion_repair")
    draw_unknown_digits(x, y, *test)
    draw_forgetting(x, y, *test)


def draw_unknown_digits(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Why a network that knows zero to seven takes eights and nines for neither."""
    known = [(x[y < 8], y[y < 8])]
    model = trained_on(*known[0], classes=8)
    table = LayerFilterContribution(model, "filters").identify(
        known, num_filters=10, show_progress=False
    )
    detector = ClassFilterOOD(model, table).fit(known, show_progress=False)
    reasons = detector.reasons(test_x[test_y >= 8][:8], num_filters=8)
    save(plot_unknown_reasons(reasons), "unknown_reasons")


def draw_forgetting(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """What is left of the threes, in three ways to forget them."""
    model, data = trained_on(x, y), [(x, y)]
    quiet = {"show_progress": False}
    models = {
        "the network": model,
        "forgotten by prototype": forget_class(model, data, 3, **quiet),
        "forgotten by probe": forget_class(model, data, 3, erase="probe", **quiet),
        "trained without": trained_on(x[y != 3], y[y != 3]),
    }
    audit = audit_forgetting(models, 3, data, [(test_x, test_y)], **quiet)
    print(audit)
    save(plot_forgetting(audit, title="What is still known of the digit 3"), "forgetting")


HALVES = (slice(360), slice(360, None))


def stamped(images: Tensor) -> Tensor:
    """A white patch in a corner."""
    images = images.clone()
    images[:, :, :2, :2] = 1
    return images


def trained_on(x: Tensor, y: Tensor, classes: int = 10) -> torch.nn.Module:
    """The digits network, trained on these."""
    torch.manual_seed(0)
    model = small_cnn()
    model.head = torch.nn.Linear(64, classes)
    loader = DataLoader(
        TensorDataset(x, y), 64, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    return train_classifier(model, loader, epochs=15, show_progress=False)


def save(drawn: tuple[Figure, object], name: str) -> None:
    """Keep a picture."""
    drawn[0].savefig(FIGURES / f"{name}.png", dpi=110)


def atlas_pages() -> None:
    """Pages of the digits' atlas as a browser shows them; needs Chromium and the extra `test`."""
    from make_atlases import digits
    from playwright.sync_api import sync_playwright

    pages = {
        "atlas": ("index.html", 900),
        "atlas_class": ("classes/0008-digit-8.html", 900),
        "atlas_filter": ("filters/0001.html", 640),
        "atlas_image": ("images/*.html", 640),
        "atlas_error": ("errors/*.html", 900),
    }
    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        folder = digits(Path(place)).parent
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        for name, (pattern, height) in pages.items():
            page = browser.new_page(viewport={"width": 1000, "height": height})
            page.goto(min(folder.glob(pattern)).as_uri())
            page.wait_for_load_state("networkidle")
            page.screenshot(path=FIGURES / f"{name}.png")
        browser.close()


DRAWN: dict[str, Callable[[], None]] = {
    "photograph": photograph,
    "demo": demo,
    "spectra": spectra,
    "directions": directions,
    "comparisons": draw_comparisons,
    "answers": draw_answers,
    "gates": draw_gates,
    "pruning": pruning,
    "atlas_pages": atlas_pages,
}


def main(names: list[str]) -> None:
    """Draw the figures named, or all."""
    unknown = [name for name in names if name not in DRAWN]
    if unknown:
        raise SystemExit(f"No figure is called {unknown[0]}; choose from {', '.join(DRAWN)}.")
    FIGURES.mkdir(exist_ok=True)
    for name in names or DRAWN:
        DRAWN[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
