"""Singular directions: are they better features than filters, is the first one special, and the cost.

    python -m benchmarks.spectral --part directions    # CIFAR-10, ResNet-20; a few minutes
    python -m benchmarks.spectral --part first         # class specificity of the first direction
    python -m benchmarks.spectral --part cost          # VGG-16 at 224 px, random weights

``directions``: each class sees only its k best features at one layer (the rest is replaced by zero, or by
its mean over the training images) and the class whose own run has the largest own logit wins; features are
the filters, the singular directions, or directions of a random rotation, all ranked by contribution on
training images and scored on test images. ``cost`` runs each part in a process of its own, so that the peak
memory is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.speed import measured
from captum_classfilters import (
    ClassFilters,
    LayerFilterContribution,
    identify_class_filters,
)
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.spectral import direction_signals, factor_layer, model_svd

LAYER = "layer3.2.conv2"
NUMBERS = (0, 1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64)


# -- directions against filters -------------------------------------------------------------------


def rotated(model: nn.Module, layer: str, seed: int) -> nn.Module:
    """The factored model with random orthonormal directions in place of the singular ones."""
    result = factor_layer(model, layer)
    generator = torch.Generator().manual_seed(seed)
    factored = result.get_submodule(layer)
    weight = model.get_submodule(layer).weight.detach()
    basis = torch.linalg.qr(torch.randn(len(weight), len(weight), generator=generator))[0]
    with torch.no_grad():
        factored.combination.weight.copy_(basis.reshape(factored.combination.weight.shape))
        factored.directions.weight.copy_((basis.T @ weight.flatten(1)).reshape(weight.shape))
    return result


def feature_means(model: nn.Module, layer: nn.Module, loader) -> Tensor:
    """Mean of each feature over images and positions (K,)."""
    total, count = 0.0, 0

    def add(_module, _inputs, output):
        nonlocal total, count
        total = total + output.double().sum((0, 2, 3))
        count += output.shape[0] * output[0, 0].numel()

    handle = layer.register_forward_hook(add)
    with torch.no_grad():
        for images, _ in loader:
            model(images)
    handle.remove()
    return (total / count).float()


def sufficiency(
    model: nn.Module, layer: str, table: ClassFilters, loader, mean: Tensor | None
) -> tuple[list[float], list[float]]:
    """Accuracy by own logits, and mean recall, with k features for each class."""
    replacement = None if mean is None else lambda _: mean.reshape(1, -1, 1, 1)
    order = table.scores.argsort(dim=1, descending=True, stable=True)
    hits = torch.zeros(2, len(NUMBERS))
    seen = 0
    for images, labels in loader:
        replay = SuffixReplay(model, model.get_submodule(layer), (images,), replacement=replacement)
        seen += len(labels)
        for column, number in enumerate(NUMBERS):
            kept = torch.zeros(table.scores.shape, dtype=torch.bool)
            kept.scatter_(1, order[:, :number], True)
            outputs = replay.outputs(~kept)  # (C, N, C)
            own = outputs.diagonal(dim1=0, dim2=2)  # (N, C)
            hits[0, column] += (own.argmax(1) == labels).sum()
            run_of_label = outputs[labels, torch.arange(len(labels))]
            hits[1, column] += (run_of_label.argmax(1) == labels).sum()
    shares = hits / seen
    return shares[0].tolist(), shares[1].tolist()


def directions(num_train: int, num_test: int) -> None:
    model = cifar10.pretrained(20)
    train, test = cifar10.loader("train", num_train), cifar10.loader("test", num_test)
    name = f"{LAYER}.directions"
    candidates: dict[str, tuple[nn.Module, str]] = {
        "filters": (model, LAYER),
        "singular directions": (factor_layer(model, LAYER), name),
    }
    for seed in range(3):
        candidates[f"random rotation {seed}"] = (rotated(model, LAYER, seed), name)
    print(f"ResNet-20, {LAYER}, {num_train:,} training and {num_test:,} test images")
    print(f"accuracy of the whole network {cifar10.accuracy(model, test):.2f} %\n")
    header = "".join(f"{number:>7d}" for number in NUMBERS)
    for replacement in ("zero", "mean"):
        print(f"the rest replaced by {replacement:4s} | features kept for each class")
        print(f"{'':34s}{header}")
        for title, (candidate, layer) in candidates.items():
            module = candidate.get_submodule(layer)
            table = identify_class_filters(
                LayerFilterContribution(candidate, layer), train, show_progress=False
            )
            mean = feature_means(candidate, module, train) if replacement == "mean" else None
            own, recall = sufficiency(candidate, layer, table, test, mean)
            for measure, values in (("own logit", own), ("recall", recall)):
                row = "".join(f"{100 * value:7.2f}" for value in values)
                print(f"{title:22s}{measure:12s}{row}", flush=True)
        print()


# -- the first direction --------------------------------------------------------------------------


def specificity(signals: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each direction's variance that lies between classes, and between one class and the rest."""
    centred = (signals - signals.mean(0)).double()
    total = centred.square().sum(0)
    one_class = []
    between = torch.zeros_like(total)
    for label in labels.unique():
        rows = centred[labels == label]
        part = len(rows) * rows.mean(0).square()
        between += part
        one_class.append(part * len(labels) / (len(labels) - len(rows)))
    return between / total, torch.stack(one_class).amax(0) / total


def first(num_images: int) -> None:
    images, labels = cifar10.images("test", num_images)
    print(
        "share of the variance of a direction's mean signal that lies between the ten classes (all), or"
    )
    print(
        "between one class and the rest (one), test images; rank 0: the first is the least specific\n"
    )
    for depth in (20, 32, 44):
        model = cifar10.pretrained(depth)
        parts: dict[str, list[Tensor]] = {}
        svds = model_svd(model)
        for batch in images.split(500):
            for name, values in direction_signals(model, batch, svds=svds).items():
                parts.setdefault(name, []).append(values)
        quantiles: dict[str, list[float]] = {"all": [], "one": []}
        energy = []
        for name, chunks in parts.items():
            if name == "linear":
                continue
            scores = dict(zip(("all", "one"), specificity(torch.cat(chunks), labels), strict=True))
            row = f"ResNet-{depth} {name:18s}"
            for measure, values in scores.items():
                rank = float((values < values[0]).double().sum() / (len(values) - 1))
                quantiles[measure].append(rank)
                row += f"  {measure}: first {values[0]:.3f}, median of the others "
                row += f"{values[1:].median():.3f}, rank {rank:.2f}"
            energy.append(float(svds[name].values[0].square() / svds[name].values.square().sum()))
            if depth == 20:
                print(row)
        for measure, ranks in quantiles.items():
            below = sum(rank < 0.5 for rank in ranks)
            last = ranks[-7:]
            print(
                f"ResNet-{depth}, {measure}: the first direction is below the median in {below} of "
                f"{len(ranks)} convolutions; mean rank {statistics.mean(ranks):.2f}, in the last seven "
                f"{statistics.mean(last):.2f}; its mean share of energy {statistics.mean(energy):.3f}"
            )
        print()


# -- cost -----------------------------------------------------------------------------------------


def vgg16() -> nn.Module:
    """VGG-16 with random weights, filled in place so that making it does not set the peak memory."""
    with torch.device("meta"):
        model = torchvision.models.vgg16(weights=None)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.zeros_(parameter)
    return model


def decomposition(which: str) -> None:
    model = vgg16()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    svds = model_svd(model)
    names = [name for name in svds if which == "all" or name.startswith("features")]
    started, started_cpu = time.perf_counter(), time.process_time()
    slowest = {}
    for name in names:
        begun = time.perf_counter()
        assert svds[name].left.shape[0] == svds[name].num_filters
        slowest[name] = time.perf_counter() - begun
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    found = {"seconds": seconds, "cpu": cpu, "peak_gib": peak, "model_gib": before}
    print(json.dumps({**found, **slowest}))


def signals(reduction: str) -> None:
    model = vgg16()
    svds = model_svd(model)
    for name in svds:
        svds[name]  # decomposed beforehand: the signals alone are timed
    images = torch.randn(32, 3, 224, 224)

    @torch.no_grad()
    def bare() -> None:
        model(images)

    wanted = None if reduction == "maps" else reduction
    tasks: dict[str, Callable[[], object]] = {
        "bare": bare,
        "signals": lambda: direction_signals(model, images, svds=svds, reduction=wanted),
    }
    seconds = measured(tasks, 3)
    begun = time.process_time()
    bare()
    middle = time.process_time()
    tasks["signals"]()
    cpu = {"bare cpu": middle - begun, "signals cpu": time.process_time() - middle}
    print(json.dumps({**seconds, **cpu}))


def cost() -> None:
    def run(*arguments: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.spectral", *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found: dict[str, float] = json.loads(output.splitlines()[-1])
        return found

    print(f"VGG-16 at 224 px, random weights, {torch.get_num_threads()} threads")
    for which in ("convolutions", "all"):
        found = run("--decompose", which)
        fully = {name: round(found[name], 2) for name in found if name.startswith("classifier")}
        print(
            f"left vectors and values, {which}: {found['seconds']:.1f} s ({found['cpu']:.1f} s of "
            f"processor time), peak memory "
            f"{found['peak_gib']:.2f} GiB (with the model and PyTorch {found['model_gib']:.2f} "
            f"before) {fully or ''}",
            flush=True,
        )
    for reduction in ("mean", "max", "maps"):
        found = run("--signals", reduction)
        print(
            f"signals of 32 images at all 16 layers, {reduction}: {found['signals']:.2f} s, bare "
            f"forward {found['bare']:.2f} s, ratio {found['signals'] / found['bare']:.2f}, of processor "
            f"time {found['signals cpu'] / found['bare cpu']:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("directions", "first", "cost"), default="directions")
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--decompose", help=argparse.SUPPRESS)
    parser.add_argument("--signals", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decompose:
        decomposition(arguments.decompose)
    elif arguments.signals:
        signals(arguments.signals)
    elif arguments.part == "cost":
        cost()
    elif not cifar10.available():
        sys.exit("CIFAR-10 and the public checkpoints are absent; set CLASSFILTERS_DATA.")
    elif arguments.part == "first":
        first(arguments.test)
    else:
        directions(arguments.train, arguments.test)


if __name__ == "__main__":
    main()
