"""Singular directions: are they better features than filters, is the first one special, and the cost.

    python -m benchmarks.spectral --part directions    # CIFAR-10, ResNet-20; a few minutes
    python -m benchmarks.spectral --part first         # class specificity of the first direction
    python -m benchmarks.spectral --part cost          # VGG-16 at 224 px, random weights
    python -m benchmarks.spectral --part null          # exponents and verdicts of random weights

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
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torchvision
from scipy.stats import ks_2samp
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import (
    QUIET,
    Table,
    in_own_process,
    medians,
    parsed,
    parser,
    prepare,
    timed,
)
from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.identify import collect_features
from captum_classfilters.spectral import (
    direction_signals,
    factor_layer,
    fit_power_law,
    model_spectra,
    model_svd,
)
from captum_classfilters.spectral.model_spectra import layer_verdict
from captum_classfilters.spectral.power_law import random_exponents

OWN = "benchmarks.spectral"
LAYER = "layer3.2.conv2"
NUMBERS = (0, 1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64)


# -- directions against filters -------------------------------------------------------------------


def rotated(model: nn.Module, layer: str, seed: int) -> nn.Module:
    """The factored model with random orthonormal directions in place of the singular ones."""
    result = factor_layer(model, layer)
    generator = torch.Generator().manual_seed(seed)
    factored = result.get_submodule(layer)
    weight = model.get_parameter(f"{layer}.weight").detach()
    basis = torch.linalg.qr(torch.randn(len(weight), len(weight), generator=generator))[0]
    combination = factored.get_parameter("combination.weight")
    with torch.no_grad():
        combination.copy_(basis.reshape(combination.shape))
        turned = (basis.T @ weight.flatten(1)).reshape(weight.shape)
        factored.get_parameter("directions.weight").copy_(turned)
    return result


def feature_means(model: nn.Module, layer: str, data: Iterable[Any]) -> Tensor:
    """Mean of each feature over images and positions (K,)."""
    features, _ = collect_features(model, layer, data, **QUIET)
    return features.double().mean(0).float()


def sufficiency(
    model: nn.Module, layer: str, table: ClassFilters, data: Iterable[Any], mean: Tensor | None
) -> tuple[list[float], list[float]]:
    """Accuracy by own logits, and mean recall, with k features for each class."""
    replacement = None if mean is None else lambda _: mean.reshape(1, -1, 1, 1)
    order = table.scores.argsort(dim=1, descending=True, stable=True)
    hits = torch.zeros(2, len(NUMBERS))
    seen = 0
    for images, labels in data:
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


def directions(num_train: int, num_test: int, rotations: int) -> None:
    """Accuracy with few features for each class: filters, singular directions, random ones."""
    model = cifar10.pretrained(20)
    train, test = cifar10.loader("train", num_train), cifar10.loader("test", num_test)
    name = f"{LAYER}.directions"
    candidates: dict[str, tuple[nn.Module, str]] = {
        "filters": (model, LAYER),
        "singular directions": (factor_layer(model, LAYER), name),
    }
    for seed in range(rotations):
        candidates[f"random rotation {seed}"] = (rotated(model, LAYER, seed), name)
    print(f"ResNet-20, {LAYER}, {num_train:,} training and {num_test:,} test images")
    print(f"accuracy of the whole network {cifar10.accuracy(model, test):.2f} %")
    for replacement in ("zero", "mean"):
        shown = Table(f"features kept for each class, the rest replaced by {replacement}", *NUMBERS)
        for title, (candidate, layer) in candidates.items():
            table = LayerFilterContribution(candidate, layer).identify(train, **QUIET)
            mean = feature_means(candidate, layer, train) if replacement == "mean" else None
            own, recall = sufficiency(candidate, layer, table, test, mean)
            for measure, values in (("own logit", own), ("recall", recall)):
                shown.row(f"{title}, {measure}", *(f"{100 * value:.2f}" for value in values))


# -- the first direction --------------------------------------------------------------------------


def specificity(signals: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each direction's variance that lies between classes, and between one class and the rest."""
    centered = (signals - signals.mean(0)).double()
    total = centered.square().sum(0)
    one_class = []
    between = torch.zeros_like(total)
    for label in labels.unique():
        rows = centered[labels == label]
        part = len(rows) * rows.mean(0).square()
        between += part
        one_class.append(part * len(labels) / (len(labels) - len(rows)))
    return between / total, torch.stack(one_class).amax(0) / total


def first(num_images: int, depths: Sequence[int]) -> None:
    """How specific to classes the first direction of each convolution is."""
    images, labels = cifar10.images("test", num_images)
    print(
        "share of the variance of a direction's mean signal that lies between the ten classes (all), or"
    )
    print(
        "between one class and the rest (one), test images; rank 0: the first is the least specific"
    )
    measures = ("all", "one")
    titles = [title for one in measures for title in (f"{one}: first", "median of others", "rank")]
    each, summary = Table(f"layer of ResNet-{depths[0]}", *titles), []
    for depth in depths:
        model = cifar10.pretrained(depth)
        parts: dict[str, list[Tensor]] = {}
        svds = model_svd(model)
        for batch in images.split(500):
            for name, values in direction_signals(model, batch, svds=svds).items():
                parts.setdefault(name, []).append(values)
        quantiles: dict[str, list[float]] = {one: [] for one in measures}
        energy = []
        for name, chunks in parts.items():
            if name == "linear":
                continue
            cells = []
            scores = zip(measures, specificity(torch.cat(chunks), labels), strict=True)
            for measure, values in scores:
                rank = float((values < values[0]).double().sum() / (len(values) - 1))
                quantiles[measure].append(rank)
                figures = (float(values[0]), float(values[1:].median()), rank)
                cells += [f"{value:.3f}" for value in figures]
            energy.append(float(svds[name].values[0].square() / svds[name].values.square().sum()))
            if depth == depths[0]:
                each.row(name, *cells)
        for measure, ranks in quantiles.items():
            below = sum(rank < 0.5 for rank in ranks)
            means = [statistics.mean(ranks), statistics.mean(ranks[-7:]), statistics.mean(energy)]
            shown = [f"{value:.3f}" for value in means]
            summary.append([f"ResNet-{depth}, {measure}", f"{below} of {len(ranks)}", *shown])
    table = Table(
        *("the first direction", "below the median", "mean rank", "in the last seven"),
        "share of energy",
    )
    for row in summary:
        table.row(*row)


# -- cost -----------------------------------------------------------------------------------------


def network(small: bool) -> nn.Module:
    """VGG-16 with random weights, filled in place so that making it does not set the peak memory."""
    if small:
        return cifar10.CifarResNet(8).eval()
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


def decomposition(which: str, small: bool = False) -> dict[str, float]:
    """Time and memory of the decomposition."""
    model = network(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    svds = model_svd(model)
    names = [name for name in svds if which == "all" or not name.startswith("classifier")]
    started, started_cpu = time.perf_counter(), time.process_time()
    slowest = {}
    for name in names:
        slowest[name], left = timed(lambda name=name: svds[name].left)  # type: ignore[misc]
        assert left.shape[0] == svds[name].num_filters
    seconds, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    found = {"seconds": seconds, "cpu": cpu, "peak_gib": peak, "model_gib": before}
    return {**found, **slowest}


def signals(aggregate: str, small: bool = False) -> dict[str, float]:
    """Times of the signals of 32 images at all layers, and of a bare pass."""
    model = network(small)
    svds = model_svd(model)
    for name in svds:
        svds[name]  # decomposed beforehand: the signals alone are timed
    images = torch.randn(2, 3, 32, 32) if small else torch.randn(32, 3, 224, 224)

    @torch.no_grad()
    def bare() -> None:
        model(images)

    wanted: Any = None if aggregate == "maps" else aggregate
    tasks: dict[str, Callable[[], object]] = {
        "bare": bare,
        "signals": lambda: direction_signals(model, images, svds=svds, aggregate=wanted),
    }
    seconds = medians(tasks, 3)
    begun = time.process_time()
    bare()
    middle = time.process_time()
    tasks["signals"]()
    cpu = {"bare cpu": middle - begun, "signals cpu": time.process_time() - middle}
    return {**seconds, **cpu}


def cost(small: bool) -> None:
    """What decompositions and signals cost, each in a process of its own but for a small run."""
    name = "ResNet-8 at 32 px" if small else "VGG-16 at 224 px"
    table = Table(
        f"{name}, random weights, {torch.get_num_threads()} threads",
        *("s", "processor s", "peak memory, GiB", "before, GiB", "fully connected layers, s"),
    )
    for which in ("convolutions", "all"):
        found = decomposition(which, small) if small else in_own_process(OWN, "--decompose", which)
        fully = [f"{found[name]:.2f}" for name in found if name.startswith("classifier")]
        figures = (f"{found[key]:.2f}" for key in ("seconds", "cpu", "peak_gib", "model_gib"))
        table.row(f"left vectors and values, {which}", *figures, ", ".join(fully))
    table = Table(
        f"{name}, signals at all layers",
        *("s", "bare forward pass, s", "ratio", "ratio of processor time"),
    )
    for aggregate in ("mean", "max", "maps"):
        found = signals(aggregate, small) if small else in_own_process(OWN, "--signals", aggregate)
        ratios = found["signals"] / found["bare"], found["signals cpu"] / found["bare cpu"]
        figures = (f"{value:.2f}" for value in (found["signals"], found["bare"], *ratios))
        table.row(aggregate, *figures)


# -- what random weights look like -----------------------------------------------------------------


def null(shapes: Sequence[tuple[int, int]], seeds: Sequence[int], small: bool) -> None:
    """Exponents of random matrices, and verdicts of random networks with and without them."""
    table = Table(
        "Exponents of 400 random matrices",
        *("median", "lowest 5 %", "up to 3, %", "up to 4.5, %", "Kolmogorov-Smirnov p to Gaussian"),
    )
    for rows, columns in shapes:
        exponents = torch.tensor(random_exponents(rows, columns, repetitions=400, seed=1))
        shares = [float((exponents <= limit).double().mean()) * 100 for limit in (3, 4.5)]
        gaussian = [fit_power_law(eigenvalues_of(rows, columns, seed)).alpha for seed in range(100)]
        table.row(
            f"{rows} x {columns}",
            *(f"{float(exponents.quantile(share)):.2f}" for share in (0.5, 0.05)),
            *(f"{share:.1f}" for share in shares),
            f"{ks_2samp(exponents.numpy(), gaussian).pvalue:.2f}",
        )
    name = "ResNet-8" if small else "ResNet-18"
    table = Table(
        f"{name}, random weights: layers not judged untrained",
        *("layers", "by the exponent alone", "and unlike random matrices of the shape"),
    )
    for seed in seeds:
        torch.manual_seed(seed)
        model = cifar10.CifarResNet(8) if small else torchvision.models.resnet18(weights=None)
        spectra = model_spectra(model)
        alone = [layer_verdict(layer.power_law.alpha) for layer in spectra]
        compared = [layer.verdict for layer in spectra]
        numbers = (len(verdicts) - verdicts.count("untrained") for verdicts in (alone, compared))
        table.row(f"seed {seed}", str(len(spectra)), *map(str, numbers))


def eigenvalues_of(rows: int, columns: int, seed: int) -> Tensor:
    """Of a Gaussian matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.svdvals(weight).square()


def main(given: Sequence[str] | None = None) -> None:
    """Print one part's tables, or those of all parts."""
    known = parser(__doc__)
    parts = ("directions", "first", "cost", "null", "all")
    known.add_argument("--part", choices=parts, default="directions")
    known.add_argument("--train", type=int, default=8000)
    known.add_argument("--test", type=int, default=2000)
    known.add_argument("--rotations", type=int, default=3, help="random ones, for directions")
    known.add_argument("--depths", type=int, nargs="+", default=(20, 32, 44), help="for first")
    known.add_argument("--decompose", help=argparse.SUPPRESS)
    known.add_argument("--signals", help=argparse.SUPPRESS)
    options = parsed(*(known, given), part="all", train=20, test=20, rotations=1, depths=(8,))
    if options.decompose:
        print(json.dumps(decomposition(options.decompose)))
        return
    if options.signals:
        print(json.dumps(signals(options.signals)))
        return
    prepare(
        options.small, *([] if options.part in ("cost", "null") else [cifar10.TEST, cifar10.TRAIN])
    )
    if options.part in ("directions", "all"):
        directions(options.train, options.test, options.rotations)
    if options.part in ("first", "all"):
        first(options.test, options.depths)
    if options.part in ("cost", "all"):
        cost(options.small)
    if options.part in ("null", "all"):
        shapes = [(16, 27), (64, 27), (64, 147), (128, 576)]
        seeds = range(2 if options.small else 6)
        null(shapes[: 2 if options.small else 4], seeds, options.small)


if __name__ == "__main__":
    main()
