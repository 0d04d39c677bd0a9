"""Decomposing the Deep on public weights: ResNet-20/32/44 and CIFAR-10.

    python -m benchmarks.reproduce_badola              # the whole table, about ten minutes on 2 cores
    python -m benchmarks.reproduce_badola --quick      # without fine-tuning and the deeper networks
    python -m benchmarks.reproduce_badola --figures    # also draws docs/figures/depth_claim.png

Filters are ranked, heads refitted and networks fine-tuned on 18,000 of the 20,000 training images;
the other 2,000 choose the best state. The networks were trained on all of them, so accuracy there is
optimistic; the test images are used for the table alone.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import cifar10
from benchmarks.shared import QUIET, Table, parsed, parser, prepare
from captum_classfilters import (
    ClassFilters,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    decompose,
    fine_tune,
    identify_class_filters,
    refit_head,
)
from captum_classfilters.heads.accuracy_curve import AccuracyCurve
from captum_classfilters.identify import collect_features

RELEASED = [
    [7, 22, 23, 50, 54],
    [6, 9, 40, 47, 55],
    [1, 13, 23, 53, 61],
    [17, 49, 53, 57, 59],
    [25, 46, 48, 57, 61],
    [13, 37, 42, 49, 63],
    [9, 48, 52, 56, 61],
    [0, 16, 25, 53, 56],
    [2, 9, 21, 22, 29],
    [8, 21, 40, 54, 55],
]


def released_filters() -> ClassFilters:
    """The authors' public sets."""
    mask = torch.zeros(10, 64, dtype=torch.bool)
    for row, filters in enumerate(RELEASED):
        mask[row, filters] = True
    return ClassFilters(mask.double(), torch.ones(10)).with_selection(mask)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Random flips, and crops of the image padded by four pixels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        top, left = torch.randint(0, 9, (2,)).tolist()
        padded = nn.functional.pad(image, (4, 4, 4, 4))
        return padded[:, top : top + 32, left : left + 32], self.labels[index]


class Data:
    """Training, validation and test images."""

    def __init__(self) -> None:
        images, labels = cifar10.images("train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        train, validation = order.split([9 * len(order) // 10, len(order) - 9 * len(order) // 10])
        self.train_images, self.train_labels = images[train], labels[train]
        self.train = DataLoader(TensorDataset(images[train], labels[train]), batch_size=500)
        self.validation = DataLoader(
            TensorDataset(images[validation], labels[validation]), batch_size=500
        )
        self.test = cifar10.loader("test", batch_size=500)

    def augmented(self, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            Augmented(self.train_images, self.train_labels),
            batch_size=128,
            shuffle=True,
            generator=generator,
        )


def tables_of(model: nn.Module, data: Data) -> dict[str, ClassFilters]:
    methods = {
        "frequency": LayerFilterFrequency(model, "layer3", top_k=5),
        "contribution": LayerFilterContribution(model, "layer3"),
    }
    return identify_class_filters(
        methods, data.train, num_filters=5, class_names=cifar10.CLASSES, **QUIET
    )


def tuned(model: nn.Module, table: ClassFilters, data: Data, taught: bool) -> float:
    """Accuracy after two epochs over the whole network, as the last row of the table."""
    torch.manual_seed(0)
    decomposed = decompose(model, table)
    rate, steps = (1e-3 if taught else 1e-4), 2 * len(data.augmented(0))
    optimizer = torch.optim.Adam(decomposed.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.02, 1 - i / steps))
    history = fine_tune(
        decomposed,
        data.augmented(0),
        data.validation,
        epochs=2,
        optimizer=optimizer,
        scheduler=falling,
        freeze="batch_norm_statistics",
        teacher=model if taught else None,
        **QUIET,
    )
    shown = ", ".join(f"{100 * epoch.validation_accuracy:.2f}" for epoch in history)
    print(f"    (validation before and after each epoch: {shown})")
    return cifar10.accuracy(decomposed, data.test)


def main_table(data: Data, quick: bool) -> None:
    model = cifar10.pretrained(20)
    tables = tables_of(model, data)
    features, _ = collect_features(
        model, "linear", data.train, attribute_to_layer_input=True, **QUIET
    )
    rows = [("full network", "91.73", "91.7 +- 0.1", cifar10.accuracy(model, data.test))]
    frequency, contribution = tables["frequency"], tables["contribution"]
    rows.append(
        (
            "frequency rule, no tuning",
            "88.59",
            "88.7 +- 0.4",
            cifar10.accuracy(decompose(model, frequency), data.test),
        )
    )
    rows.append(
        (
            "contribution rule, no tuning",
            "-",
            ">= 89.0",
            cifar10.accuracy(decompose(model, contribution), data.test),
        )
    )
    folded = decompose(model, contribution, dropped_means=features.mean(0))
    rows.append(
        (
            "contribution rule, dropped means in the bias",
            "-",
            "-",
            cifar10.accuracy(folded, data.test),
        )
    )
    for name, table, goal in (
        ("frequency", frequency, "-"),
        ("contribution", contribution, ">= 90.8"),
    ):
        refitted = decompose(model, table)
        refit_head(refitted, data.train, **QUIET)
        accuracy = cifar10.accuracy(refitted, data.test)
        rows.append((f"head refitted, {name} sets", "-", goal, accuracy))
    if not quick:
        for name, table, taught in (
            ("frequency", frequency, False),
            ("contribution", contribution, False),
            ("contribution, taught by the full network", contribution, True),
        ):
            goal = ">= 91.3" if name == "contribution" else "-"
            accuracy = tuned(model, table, data, taught)
            rows.append((f"whole network tuned, 2 epochs, {name}", "91.3-91.6", goal, accuracy))
    shown = Table(
        "ResNet-20, CIFAR-10 test, 5 of 64 filters per class", "published", "goal", "measured"
    )
    for name, published, goal, measured in rows:
        shown.row(name, published, goal, f"{measured:.2f}")
    shared = (frequency.selected & released_filters().selected).sum().item() / 10
    print(f"\nOverlap of our frequency sets with the authors' public sets: {shared:.1f} of 5")


def depth_claim(data: Data, depths: Sequence[int], figures: bool) -> None:
    ks = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
    curves = {}
    for depth in depths:
        model = cifar10.pretrained(depth)
        tables = tables_of(model, data)
        curves[depth] = accuracy_curve(
            model, tables, data.test, num_filters=ks, repetitions=10, **QUIET
        )
    table = Table("accuracy by filters kept", *ks, "full")
    for depth, curve in curves.items():
        for name, values in {**curve.accuracy, "random": curve.random_mean}.items():
            cells = [f"{100 * value:.2f}" for value in (*values, curve.full_accuracy)]
            table.row(f"ResNet-{depth}, {name}", *cells)
    table = Table("smallest k within 1 point of full", "frequency", "contribution")
    for depth, curve in curves.items():
        keep = (curve.full_accuracy - 0.01) / curve.full_accuracy
        found = [curve.smallest(keep, name) for name in ("frequency", "contribution")]
        table.row(f"ResNet-{depth} ({100 * curve.full_accuracy:.2f})", *found)
    if figures:
        draw_depth_claim(curves)


def draw_depth_claim(curves: dict[int, AccuracyCurve]) -> None:
    from captum_classfilters.visualize.figures import COLORS, new_figure, quiet

    figure = new_figure((6.4, 4.0))
    axes = figure.subplots()
    for color, (depth, curve) in zip(COLORS, curves.items(), strict=False):
        for name, style in (("frequency", "--"), ("contribution", "-")):
            loss = [100 * (curve.full_accuracy - value) for value in curve.accuracy[name]]
            label = f"ResNet-{depth}, {name}"
            axes.plot(curve.num_filters, loss, style, marker="o", ms=3, color=color, label=label)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(curve.num_filters, [str(value) for value in curve.num_filters], size=7)
    axes.minorticks_off()
    axes.set_ylim(-0.5, 12)
    axes.set_xlabel("filters kept for each class, of 64")
    axes.set_ylabel("accuracy lost, points")
    axes.set_title("Do deeper networks need fewer filters per class?", loc="left")
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    path = Path(__file__).parents[1] / "docs" / "figures" / "depth_claim.png"
    figure.savefig(path, dpi=110)


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    known = parser(__doc__)
    known.add_argument("--quick", action="store_true")
    known.add_argument("--figures", action="store_true")
    known.add_argument("--depths", type=int, nargs="+", default=(20, 32, 44))
    arguments = parsed(known, given, depths=(8,))
    checkpoints = [f"resnet{depth}_cifar10.safetensors" for depth in arguments.depths]
    prepare(arguments.small, cifar10.TEST, cifar10.TRAIN, *checkpoints)
    data = Data()
    main_table(data, arguments.quick)
    if not arguments.quick:
        depth_claim(data, arguments.depths, arguments.figures)


if __name__ == "__main__":
    main()
