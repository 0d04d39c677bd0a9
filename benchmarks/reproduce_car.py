"""Abbasi-Asl and Yu's experiments on LeNet (MNIST), ResNet-20 (CIFAR-10) and SqueezeNet (ImageNet).

    python -m benchmarks.reproduce_car [--part lenet|seeds|compress|resnet20|colors|squeezenet|all]

Needs the data folder that benchmarks/shared.py describes. LeNet is trained here, in about a minute.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.io import decode_image

from benchmarks import cifar10
from benchmarks.shared import (
    DATA,
    QUIET,
    Batches,
    Table,
    in_batches,
    made_up,
    mnist,
    parsed,
    parser,
    prepare,
    random_images,
    squeezenet,
    timed,
)
from captum_classfilters import LayerFilterAblation, prune_filters
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.heads import coverage, filter_clusters
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.pruning import (
    GreedyFilterPruning,
    LayerwiseFineTuning,
    PruningOrder,
    accuracy_after_removal,
    class_interpretation,
    compare_networks,
    compress_layer,
    filter_importance_baselines,
    magnitude_prune,
    removal_order,
    selectivity_test,
    weight_chroma,
)

IMAGENET = "imagenet_val1300"
SHARES = (0.25, 0.5, 0.75, 0.9)
Options = argparse.Namespace


class LeNet(nn.Module):
    """Caffe's LeNet: 20 and 50 filters of 5x5, no activation after the convolutions."""

    def __init__(self, first: int = 20, second: int = 50) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, first, 5), nn.Conv2d(first, second, 5)
        self.fc1, self.fc2 = nn.Linear(16 * second, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        x = F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def trained_lenet(steps: int, seed: int = 0) -> tuple[LeNet, Batches, Batches, Batches]:
    """A LeNet trained for 1,600 steps, and images to train on, to choose by and to report on.

    The images that choose are 1,500 of the training split that the network does not see; those to
    report on are 5,000 of the test split.
    """
    torch.manual_seed(seed)
    model = LeNet(8, 10) if made_up() else LeNet()
    x, y = _mixed(*mnist("train"))
    chosen = min(1500, len(x) // 3)
    seen = in_batches(x[:-chosen], y[:-chosen], 64)
    LayerwiseFineTuning(_shuffled(seen), 0.01, num_steps=steps, weight_decay=5e-4)(model)
    test_x, test_y = _mixed(*mnist("test"))
    return (
        model.eval(),
        seen,
        in_batches(x[-chosen:], y[-chosen:]),
        in_batches(test_x[:5000], test_y[:5000]),
    )


def orders_of(
    model: nn.Module, layer: str, choose: Batches, seeds: int = 10
) -> tuple[PruningOrder, dict[str, Tensor]]:
    """The greedy run, and every method's order of removal."""
    greedy = GreedyFilterPruning(model, layer).run(choose, num_filters=1, **QUIET)
    car = LayerFilterAblation(model, layer).identify(choose, metric="accuracy", **QUIET)
    scores = {
        # Ties of the accuracy are decided by the cross-entropy, as in the greedy run.
        "CAR, one-shot": car.reduction + 1e-6 * car.loss_increase,
        "… ties by index": car.reduction,
        **filter_importance_baselines(model, layer, choose, repetitions=seeds, **QUIET),
    }
    rest = {name: removal_order(values) for name, values in scores.items()}
    return greedy, {"CAR, greedy": torch.tensor(greedy.order), **rest}


def lenet(options: Options) -> None:
    """Accuracy against the share of filters removed, for every method, with and without training."""
    model, train, choose, report = trained_lenet(options.steps)
    full = evaluate_classifier(model, report, **QUIET).accuracy
    print(f"LeNet on MNIST, 1,500 images choose, 5,000 test images report: {full:.4f}")
    for layer, after in (("conv1", "conv2"), ("conv2", "fc1")):
        greedy, orders = orders_of(model, layer, choose)
        shown = Table(f"{layer}, share of filters removed", *(f"{share:.0%}" for share in SHARES))
        for name, values in at_shares(model, layer, orders, report, SHARES).items():
            shown.row(name, *_rounded(values))
        rates, steps = {layer: 0.001, after: 0.01}, min(30, options.steps)
        tuning = LayerwiseFineTuning(_shuffled(train), rates, num_steps=steps, momentum=0.9)
        tuned = GreedyFilterPruning(model, layer).run(
            choose, report, num_filters=1, fine_tune=tuning, **QUIET
        )
        number = greedy.num_filters
        cells = [tuned.report_accuracy[round(share * number)] for share in SHARES]
        shown.row(f"CAR, greedy, {steps} steps of training after each removal", *_rounded(cells))
        early = GreedyFilterPruning(model, layer).run(
            in_batches(*_joined(choose), 50),
            num_filters=number // 2,
            error_probability=0.05,
            **QUIET,
        )
        alike = accuracy_after_removal(model, layer, early, report, **QUIET).at(0.5)
        print(
            f"sequential testing at 0.05: {early.saving:.0%} of the evaluations spared, "
            f"{alike:.4f} at half"
        )


def lenet_seeds(options: Options) -> None:
    """What recomputing CAR after each removal gains at half of the second layer, by training."""
    shown = Table("seed of the training", "LeNet's conv2, filters removed", "50%", "75%")
    for seed in range(options.seeds):
        model, _, choose, report = trained_lenet(options.steps, seed)
        _, orders = orders_of(model, "conv2", choose, seeds=1)
        for name, values in at_shares(model, "conv2", orders, report, (0.5, 0.75)).items():
            if "CAR" in name or "ties" in name:
                shown.row(seed, name, *_rounded(values))


def compress(options: Options) -> None:
    """Filters removed by CAR, weights by magnitude, values shared, all coded: one layer at a time."""
    model, train, choose, report = trained_lenet(options.steps)
    shown = Table("layer", "kept", "sparsity", "ratio", "accuracy before training", "after")
    reports = []
    for layer, after, sparsities in (("conv1", "conv2", (0.5,)), ("conv2", "fc1", (0.8, 0.9))):
        greedy = GreedyFilterPruning(model, layer).run(choose, ratio=2.5, **QUIET)
        small = prune_filters(model, greedy, choose[0][0])
        rates, steps = {layer: 0.003, after: 0.01}, min(600, options.steps)
        tuning = LayerwiseFineTuning(_shuffled(train), rates, num_steps=steps)
        tuning(small)
        for sparsity in sparsities:
            sparse = magnitude_prune(small, layer, sparsity)
            first = evaluate_classifier(sparse, report, **QUIET).accuracy
            tuning(sparse)
            result = compress_layer(
                sparse, layer, choose[0][0], clusters=16, original=model, dataloader=report, **QUIET
            )
            last = evaluate_classifier(result.model, report, **QUIET).accuracy
            kept = f"{int(greedy.kept().sum())} of {greedy.num_filters}"
            ratio = f"{result.report.ratio:.1f}x"
            shown.row(layer, kept, sparsity, ratio, *_rounded((first, last)))
            reports.append(str(result.report))
    print("", *reports, compare_networks(model, small, choose[0][0]), sep="\n")


def resnet20(options: Options) -> None:
    """Every block's first convolution: accuracy when shares of its filters are gone."""
    model = cifar10.pretrained(8 if options.small else 20)
    x, y = cifar10.images("test", options.choose + options.report)
    choose = in_batches(x[: options.choose], y[: options.choose])
    report = in_batches(x[options.choose :], y[options.choose :])
    full = evaluate_classifier(model, report, **QUIET).accuracy
    print(
        f"ResNet-20 on CIFAR-10, {options.choose} test images choose, {options.report} others report; "
        f"{full:.4f} with every filter. Three random orders."
    )
    names = [f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in range(3)]
    names = names[: options.layers]
    means: dict[tuple[str, float], list[float]] = {}
    shares = [f"{share:.0%}" for share in SHARES[:3]]
    for name in names:
        _, orders = orders_of(model, name, choose, seeds=3)
        shown = Table(f"{name}, share of filters removed", *shares)
        for method, values in at_shares(model, name, orders, report, SHARES[:3]).items():
            shown.row(method, *_rounded(values))
            for share, value in zip(SHARES, values, strict=False):
                means.setdefault((method, share), []).append(value)
    shown = Table(f"mean over {len(names)} layers, share of filters removed", *shares)
    for method in dict.fromkeys(method for method, _ in means):
        shown.row(method, *_rounded(sum(means[method, s]) / len(names) for s in SHARES[:3]))


def at_shares(
    model: nn.Module,
    layer: str,
    orders: dict[str, Tensor],
    report: Batches,
    shares: Iterable[float],
) -> dict[str, list[float]]:
    """Accuracy of each order at a few shares only."""
    sets, places = [], []
    number = max(order.shape[-1] for order in orders.values())
    for name, order in orders.items():
        for row in order.reshape(-1, order.shape[-1]):
            for share in shares:
                removed = torch.zeros(number, dtype=torch.bool)
                removed[row[: round(share * number)]] = True
                sets.append(removed)
                places.append((name, share))
    right = torch.zeros(len(sets))
    for images, labels in report:
        replay = SuffixReplay(model, model.get_submodule(layer), (images,))
        right += (replay.outputs(torch.stack(sets)).argmax(2) == labels).sum(1)
    accuracy = right / sum(len(labels) for _, labels in report)
    table: dict[str, list[float]] = {}
    for name in orders:
        table[name] = [
            float(
                torch.stack([a for a, p in zip(accuracy, places, strict=True) if p == key]).mean()
            )
            for key in ((name, share) for share in shares)
        ]
    return table


def _rounded(values: Iterable[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def colors(options: Options) -> None:
    """Are the first filters to go those that see color? The first convolution of ResNet-20."""
    model = cifar10.pretrained(8 if options.small else 20)
    choose = in_batches(*cifar10.images("test", options.images))
    order = GreedyFilterPruning(model, "bn1").run(choose, num_filters=1, **QUIET).order
    order += [one for one in range(16) if one not in order]
    index = weight_chroma(model.conv1.weight)
    shown = Table("filter of ResNet-20's first convolution", "removed as number", "chroma index")
    for one in order:
        shown.row(one, order.index(one) + 1, f"{float(index[one]):.2f}")
    print()
    colored = index > (index.median() if made_up() else 0.5)
    for top in (4, 8):
        print(selectivity_test(torch.tensor(order), colored, top=top))
    clusters = filter_clusters(model.conv1.weight.flatten(1), num_clusters=6)
    for number in (12, 8, 4):
        kept = torch.ones(16, dtype=torch.bool)
        kept[order[: 16 - number]] = False
        print(f"{number} filters left: {coverage(clusters, kept)}")


def imagenet() -> tuple[Iterable[tuple[Tensor, Tensor]], list[str]]:
    """Batches of validation images with their labels, and the classes' names."""
    if made_up():
        return in_batches(*random_images(2, 3, 112, 2)), [f"class {one}" for one in range(1000)]
    folder = DATA / IMAGENET
    with open(folder / "labels.csv") as file:
        rows = [(row["file"], int(row["class_index"])) for row in csv.DictReader(file)]
    words = (folder / "synset_words.txt").read_text().splitlines()
    names = [line.split(" ", 1)[1].split(",")[0] for line in words]

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for start in range(0, len(rows), 50):
            some = rows[start : start + 50]
            images = torch.stack([decode_image(str(folder / name), "RGB") for name, _ in some])
            top = (images.shape[-1] - 224) // 2
            pixels = images[..., top : top + 224, top : top + 224].float() / 255
            labels = torch.tensor([label for _, label in some])
            yield (pixels - cifar10.MEAN) / cifar10.STD, labels

    return batches(), names


def car_of_classes(_options: Options) -> None:
    """CAR of each class at the input of SqueezeNet's classifier, 512 filters."""
    model = squeezenet()
    batches, names = imagenet()
    method = LayerFilterAblation(model, "classifier.1")
    seconds, car = timed(
        lambda: method.identify(
            batches, metric="accuracy", attribute_to_layer_input=True, class_names=names, **QUIET
        )
    )
    accuracy = int(car.correct.sum()) / int(car.counts.sum())
    print(
        f"SqueezeNet 1.1, {int(car.counts.sum())} images, {accuracy:.4f} top-1: CAR of 512 filters "
        f"for {int((car.counts > 0).sum())} classes in {seconds:.0f} s"
    )
    weights = car.counts.double() / car.counts.sum()
    identity = (car.class_reduction.nan_to_num() * weights[:, None]).sum(0) - car.reduction
    print(f"count-weighted mean over classes = CAR to {float(identity.abs().max()):.1e}")
    best = car.reduction.argsort(descending=True)[:5]
    low, high = car.interval().unbind(-1)
    shown = Table("filter", "CAR", "95 % interval")
    for one in best.tolist():
        shown.row(one, f"{car.reduction[one]:.4f}", f"{low[one]:.4f} to {high[one]:.4f}")
    told = class_interpretation(car, num_classes=3)
    for one in best.tolist():
        print(told[one])


def _shuffled(batches: Batches) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*_joined(batches)), batch_size=64, shuffle=True)


def _joined(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Images in random order; the files have an order of their own."""
    if made_up():
        return x, y
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


PARTS: dict[str, tuple[Callable[[Options], None], list[str]]] = {
    "lenet": (lenet, ["mnist.npz"]),
    "seeds": (lenet_seeds, ["mnist.npz"]),
    "compress": (compress, ["mnist.npz"]),
    "resnet20": (resnet20, [cifar10.TEST]),
    "colors": (colors, [cifar10.TEST]),
    "squeezenet": (car_of_classes, [IMAGENET]),
}


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables of one part or of all."""
    known = parser(__doc__)
    known.add_argument("--part", choices=[*PARTS, "all"], default="all")
    known.add_argument("--threads", type=int, default=1)
    known.add_argument("--steps", type=int, default=1600, help="of training, for LeNet")
    known.add_argument("--seeds", type=int, default=3, help="of training, for seeds")
    known.add_argument("--layers", type=int, default=9, help="for resnet20")
    known.add_argument("--choose", type=int, default=1000, help="images, for resnet20")
    known.add_argument("--report", type=int, default=2000, help="images, for resnet20")
    known.add_argument("--images", type=int, default=2000, help="for colors")
    sizes = {"choose": 10, "report": 10, "images": 4}
    options = parsed(known, given, steps=2, seeds=1, layers=1, **sizes)
    torch.set_num_threads(options.threads)
    parts = PARTS if options.part == "all" else {options.part: PARTS[options.part]}
    prepare(options.small, *(file for _, files in parts.values() for file in files))
    for name, (part, _) in parts.items():
        print(f"\n== {name}")
        part(options)


if __name__ == "__main__":
    main()
