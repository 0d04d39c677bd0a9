"""Abbasi-Asl and Yu's experiments on LeNet (MNIST), ResNet-20 (CIFAR-10) and SqueezeNet (ImageNet).

    python -m benchmarks.reproduce_car [--part lenet|seeds|compress|resnet20|colors|squeezenet|greedy|all]

Needs the data folder that benchmarks/cifar10.py describes. LeNet is trained here, in about a minute.
"""

import argparse
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar10
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
    masked_filters,
    removal_order,
    selectivity_test,
    weight_chroma,
)

SHARES = (0.25, 0.5, 0.75, 0.9)
QUIET = {"show_progress": False}
Batches = list[tuple[Tensor, Tensor]]


class LeNet(nn.Module):
    """Caffe's LeNet: 20 and 50 filters of 5x5, no activation after the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        x = F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels."""
    with np.load(cifar10.DATA / "mnist.npz", allow_pickle=False) as data:
        x, y = data[f"{split}_x"], data[f"{split}_y"].astype(np.int64)
    return torch.from_numpy(x)[:, None].float() / 255, torch.from_numpy(y)


def in_batches(x: Tensor, y: Tensor, size: int = 100) -> Batches:
    """Batches of (images, labels)."""
    return list(zip(x.split(size), y.split(size), strict=True))


def trained_lenet(seed: int = 0) -> tuple[LeNet, Batches, Batches, Batches]:
    """A LeNet trained for 1,600 steps, and images to train on, to choose by and to report on.

    The images that choose are 1,500 of the training split that the network does not see; those to
    report on are 5,000 of the test split.
    """
    torch.manual_seed(seed)
    model = LeNet()
    x, y = _mixed(*mnist("train"))
    train = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x[:-1500], y[:-1500]), batch_size=64, shuffle=True
    )
    LayerwiseFineTuning(train, 0.01, num_steps=1600, weight_decay=5e-4)(model)
    test_x, test_y = _mixed(*mnist("test"))
    return (
        model.eval(),
        in_batches(x[:-1500], y[:-1500], 64),
        in_batches(x[-1500:], y[-1500:]),
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


def lenet() -> None:
    """Accuracy against the share of filters removed, for every method, with and without training."""
    model, train, choose, report = trained_lenet()
    full = evaluate_classifier(model, report, **QUIET).accuracy
    print(f"LeNet on MNIST, 1,500 images choose, 5,000 test images report: {full:.4f}")
    for layer, after in (("conv1", "conv2"), ("conv2", "fc1")):
        greedy, orders = orders_of(model, layer, choose)
        print(f"\n{layer}, share of filters removed: {', '.join(f'{s:.0%}' for s in SHARES)}")
        for name, values in at_shares(model, layer, orders, report, SHARES).items():
            print(f"{name:20s}" + "".join(f"{value:>10.4f}" for value in values), flush=True)
        tuning = LayerwiseFineTuning(
            _shuffled(train), {layer: 0.001, after: 0.01}, num_steps=30, momentum=0.9
        )
        tuned = GreedyFilterPruning(model, layer).run(
            choose, report, num_filters=1, fine_tune=tuning, **QUIET
        )
        number = greedy.num_filters
        cells = [tuned.report_accuracy[round(share * number)] for share in SHARES]
        print("CAR, greedy, 30 steps of training after each removal")
        print(" " * 20 + "".join(f"{cell:>10.4f}" for cell in cells), flush=True)
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


def lenet_seeds(number: int = 3) -> None:
    """What recomputing CAR after each removal gains at half of the second layer, by training."""
    print("LeNet's conv2, half and three quarters of the filters removed, by seed of the training")
    for seed in range(number):
        model, _, choose, report = trained_lenet(seed)
        _, orders = orders_of(model, "conv2", choose, seeds=1)
        for name, values in at_shares(model, "conv2", orders, report, (0.5, 0.75)).items():
            if "CAR" in name or "ties" in name:
                print(f"{seed} {name:20s}" + "".join(f"{value:>10.4f}" for value in values))


def compress() -> None:
    """Filters removed by CAR, weights by magnitude, values shared, all coded: one layer at a time."""
    model, train, choose, report = trained_lenet()
    print("layer kept sparsity clusters ratio bytes accuracy (before training, after)")
    for layer, after, sparsities in (("conv1", "conv2", (0.5,)), ("conv2", "fc1", (0.8, 0.9))):
        greedy = GreedyFilterPruning(model, layer).run(choose, ratio=2.5, **QUIET)
        small = prune_filters(model, greedy, choose[0][0])
        tuning = LayerwiseFineTuning(_shuffled(train), {layer: 0.003, after: 0.01}, num_steps=600)
        tuning(small)
        for sparsity in sparsities:
            sparse = magnitude_prune(small, layer, sparsity)
            first = evaluate_classifier(sparse, report, **QUIET).accuracy
            tuning(sparse)
            result = compress_layer(
                sparse, layer, choose[0][0], clusters=16, original=model, dataloader=report, **QUIET
            )
            kept = int(greedy.kept().sum())
            print(f"{layer} {kept}/{greedy.num_filters} {sparsity} 16 {result.report.ratio:.1f}x")
            print(result.report)
            print(f"accuracy before this training {first:.4f}")
    comparison = compare_networks(model, small, choose[0][0])
    print(comparison)


def resnet20(choose_images: int, report_images: int) -> None:
    """Every block's first convolution: accuracy when shares of its filters are gone."""
    model = cifar10.pretrained(20)
    x, y = cifar10.images("test", choose_images + report_images)
    choose = in_batches(x[:choose_images], y[:choose_images])
    report = in_batches(x[choose_images:], y[choose_images:])
    full = evaluate_classifier(model, report, **QUIET).accuracy
    print(f"ResNet-20 on CIFAR-10, {choose_images} test images choose, {report_images} others")
    print(f"report; {full:.4f} with every filter. Three random orders.")
    names = [f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in range(3)]
    means: dict[tuple[str, float], list[float]] = {}
    for name in names:
        start = time.perf_counter()
        _, orders = orders_of(model, name, choose, seeds=3)
        table = at_shares(model, name, orders, report, SHARES[:3])
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)")
        for method, values in table.items():
            print(f"{method:20s}" + "".join(f"{value:>10.4f}" for value in values))
            for share, value in zip(SHARES, values, strict=False):
                means.setdefault((method, share), []).append(value)
    print("\nmean over the nine layers, 25 %, 50 %, 75 % of the filters removed")
    for method in dict.fromkeys(method for method, _ in means):
        cells = [sum(means[method, share]) / len(names) for share in SHARES[:3]]
        print(f"{method:20s}" + "".join(f"{cell:>10.4f}" for cell in cells))


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


def colors() -> None:
    """Are the first filters to go those that see color? The first convolution of ResNet-20."""
    model = cifar10.pretrained(20)
    choose = in_batches(*cifar10.images("test", 2000))
    order = GreedyFilterPruning(model, "bn1").run(choose, num_filters=1, **QUIET).order
    order += [one for one in range(16) if one not in order]
    index = weight_chroma(model.conv1.weight)
    print("\nfirst convolution of ResNet-20: chroma index of each filter")
    print(" ".join(f"{float(one):.2f}" for one in index))
    print("order of removal:", order)
    for top in (4, 8):
        print(selectivity_test(torch.tensor(order), index > 0.5, top=top))
    clusters = filter_clusters(model.conv1.weight.flatten(1), num_clusters=6)
    for number in (12, 8, 4):
        kept = torch.ones(16, dtype=torch.bool)
        kept[order[: 16 - number]] = False
        print(f"{number} filters left: {coverage(clusters, kept)}")


def squeezenet() -> None:
    """CAR of each class at the input of SqueezeNet's classifier, 512 filters."""
    import csv

    import torchvision
    from safetensors.torch import load_file
    from torchvision.io import decode_image

    folder = cifar10.DATA / "imagenet_val1300"
    model = torchvision.models.squeezenet1_1()
    state = load_file(cifar10.DATA / "squeezenet1_1_imagenet_fp16.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    with open(folder / "labels.csv") as file:
        rows = [(row["file"], int(row["class_index"])) for row in csv.DictReader(file)]
    names = [
        line.split(" ", 1)[1].split(",")[0]
        for line in (folder / "synset_words.txt").read_text().splitlines()
    ]

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for start in range(0, len(rows), 50):
            some = rows[start : start + 50]
            images = torch.stack([decode_image(str(folder / name), "RGB") for name, _ in some])
            top = (images.shape[-1] - 224) // 2
            pixels = images[..., top : top + 224, top : top + 224].float() / 255
            mean, std = cifar10.MEAN.new_tensor([0.485, 0.456, 0.406]), cifar10.STD
            yield (
                (pixels - mean.reshape(1, 3, 1, 1))
                / std.new_tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1),
                torch.tensor([label for _, label in some]),
            )

    model.eval()
    start = time.perf_counter()
    car = LayerFilterAblation(model, "classifier.1").identify(
        batches(),
        metric="accuracy",
        attribute_to_layer_input=True,
        class_names=names,
        show_progress=False,
    )
    elapsed = time.perf_counter() - start
    accuracy = int(car.correct.sum()) / int(car.counts.sum())
    print(f"SqueezeNet 1.1, {int(car.counts.sum())} images, {accuracy:.4f} top-1: CAR of 512")
    print(f"filters for {int((car.counts > 0).sum())} classes in {elapsed:.0f} s")
    weights = car.counts.double() / car.counts.sum()
    identity = (car.class_reduction.nan_to_num() * weights[:, None]).sum(0) - car.reduction
    print(f"count-weighted mean over classes = CAR to {float(identity.abs().max()):.1e}")
    best = car.reduction.argsort(descending=True)[:5]
    low, high = car.interval().unbind(-1)
    for one in best.tolist():
        print(f"filter {one}: CAR {car.reduction[one]:.4f} [{low[one]:.4f}, {high[one]:.4f}]")
    told = class_interpretation(car, num_classes=3)
    for one in best.tolist():
        print(told[one])


def greedy_speed(images: int, plain_images: int, plain_left: int) -> None:
    """Greedy pruning of the last block's first convolution, 64 to 32, against the plain loop."""
    model, name = cifar10.pretrained(20), "layer3.2.bn1"
    x, y = cifar10.images("test", images)
    data = in_batches(x, y)
    # The plain loop: one whole forward pass over the images for each candidate of each step.
    few = in_batches(x[:plain_images], y[:plain_images])
    start = time.process_time()
    order = _plain_loop(model, name, few, plain_left)
    plain = time.process_time() - start
    passes = sum(range(plain_left + 1, 65))
    ours = GreedyFilterPruning(model, name).run(few, num_filters=plain_left, **QUIET)
    print(f"order of removal to {plain_left} filters on {plain_images} images equal to the plain")
    print(f"loop's: {ours.order == order}")
    per_image = plain / passes / plain_images
    start = time.process_time()
    run = GreedyFilterPruning(model, name).run(data, num_filters=32, **QUIET)
    own = time.process_time() - start
    whole = per_image * images * sum(range(33, 65))
    print(f"64 to 32 filters on {images} images, CPU time: {own:.0f} s; the plain loop takes")
    print(f"{1e3 * per_image:.2f} ms a pass and image, {whole:.0f} s in all: {whole / own:.0f}x")
    print(f"accuracy {run.accuracy[0]:.4f} -> {run.accuracy[-1]:.4f}")
    start = time.process_time()
    early = GreedyFilterPruning(model, name).run(
        data, num_filters=32, error_probability=0.05, **QUIET
    )
    print(f"sequential testing at 0.05: {early.saving:.0%} of the evaluations spared,")
    print(f"{time.process_time() - start:.0f} s, accuracy {early.accuracy[-1]:.4f}")


@torch.no_grad()
def _plain_loop(model: nn.Module, name: str, data: Batches, left: int) -> list[int]:
    kept, order = torch.ones(64, dtype=torch.bool), []
    while int(kept.sum()) > left:
        best: tuple[float, float, int] | None = None
        for candidate in kept.nonzero()[:, 0].tolist():
            mask = kept.clone()
            mask[candidate] = False
            wrong, loss = 0, 0.0
            with masked_filters(model, {name: mask}):
                for images, labels in data:
                    outputs = model(images).double()
                    wrong += int((outputs.argmax(1) != labels).sum())
                    loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
            best = min(best, (wrong, loss, candidate)) if best else (wrong, loss, candidate)
        assert best is not None
        kept[best[2]] = False
        order.append(best[2])
    return order


def _shuffled(batches: Batches) -> torch.utils.data.DataLoader:
    dataset = torch.utils.data.TensorDataset(*_joined(batches))
    return torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)


def _joined(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _mixed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Images in random order; the files have an order of their own."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choose", type=int, default=1000)
    parser.add_argument("--report", type=int, default=2000)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--plain-images", type=int, default=200)
    parser.add_argument("--plain-left", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not cifar10.available():
        raise SystemExit(f"There is no data at {cifar10.DATA}.")
    parts: dict[str, Callable[[], None]] = {
        "lenet": lenet,
        "seeds": lenet_seeds,
        "compress": compress,
        "resnet20": lambda: resnet20(options.choose, options.report),
        "colors": colors,
        "squeezenet": squeezenet,
        "greedy": lambda: greedy_speed(options.images, options.plain_images, options.plain_left),
    }
    for name, part in parts.items():
        if options.part in (name, "all"):
            print(f"\n== {name}")
            part()


if __name__ == "__main__":
    main()
