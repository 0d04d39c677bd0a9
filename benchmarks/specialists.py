r"""Smaller networks for pairs of classes: what they keep, what they lose, beside other choices of filters.

    python -m benchmarks.specialists                          # 45 pairs of CIFAR-10, hours on one core
    python -m benchmarks.specialists --pairs 5                # some: the hardest, each other class once
    python -m benchmarks.specialists --results FILE           # goes on where FILE ends
    python -m benchmarks.specialists --filters-only           # no layers split
    python -m benchmarks.specialists --part latency           # three classes: measured times
    python -m benchmarks.specialists --part limit             # the least time that choosing filters can reach
    python -m benchmarks.specialists --part photographs       # five classes of ImageNet, two networks

Pairs: the public ResNet-20; filters are chosen and weights fitted on 4,000 training images of a pair, all
is judged on its 2,000 test images. A quarter of the parameters without training, 11 % after one epoch.
Beside it stand networks with as many random filters in each layer, made in the same way; the filters of
largest L1 norm; and Torch-Pruning's pruner with Taylor importance on the pair's images; the last two at no
fewer parameters, with batch normalizations measured anew, and trained alike.

Photographs: EfficientNet-Lite0 and SqueezeNet 1.1, five of the 20 classes of Tiny-ImageNet's validation
set, enlarged from 64 pixels; 30 images of each to build with, 20 to judge.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.localization import BOXES, splits
from benchmarks.shared import (
    QUIET,
    Batches,
    Results,
    Table,
    efficientnet,
    efficientnet_normalized,
    in_batches,
    made_up,
    parsed,
    parser,
    prepare,
    squeezenet,
)
from captum_classfilters.answers import build_specialist
from captum_classfilters.answers.specialist import ClassSpecialist
from captum_classfilters.answers.specialist_builder import recalibrate, tune
from captum_classfilters.pruning import compare_networks, prunable_layers, prune_filters
from captum_classfilters.pruning.compare_networks import NetworkComparison
from captum_classfilters.pruning.fold_batch_norms import fold_batch_norms
from captum_classfilters.pruning.network_size import UNITS
from captum_classfilters.pruning.specialize import with_rows

SETTINGS = {0.25: 0, 0.11: 1}  # shares of the parameters, and epochs of training
NAMES = ("full", "specialist", "random", "magnitude", "Torch-Pruning")
FIRST = ((3, 5), (0, 1), (2, 7), (4, 6), (8, 9))  # cat and dog, and each other class once
RATE = 1e-3


def main(given: Sequence[str] | None = None) -> None:
    """Print a table of each part."""
    options = parser(__doc__)
    options.add_argument("--part", choices=list(PARTS), help="by default all")
    options.add_argument("--pairs", type=int, default=45, help="how many")
    options.add_argument("--results", type=Path, help="a file of results to go on with")
    options.add_argument(
        "--budgets", nargs="+", type=float, choices=SETTINGS, default=[*SETTINGS], help="shares"
    )
    options.add_argument("--epochs", type=int, help="of training, but for pairs")
    options.add_argument("--filters-only", action="store_true", help="split no layers")
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=[*NETWORKS][:2])
    arguments = parsed(options, given, pairs=1, networks=["small"], budgets=[0.11])
    prepare(arguments.small, cifar10.TEST, cifar10.TRAIN, BOXES)
    for part in [arguments.part] if arguments.part else PARTS:
        PARTS[part](arguments)


# -- pairs ------------------------------------------------------------------------------------------


def pairs_part(arguments: argparse.Namespace) -> None:
    """Accuracies of all pairs, their means and the worst."""
    pairs = list(dict.fromkeys([*FIRST, *itertools.combinations(range(10), 2)]))[: arguments.pairs]
    known = Results(arguments.results)
    table = Table("pair", "parameters", "epochs", "kept", *NAMES)
    for budget, pair in itertools.product(arguments.budgets, pairs):
        epochs = SETTINGS[budget]
        key = key_of(pair, budget, arguments)
        if key not in known:
            known.keep(key, measured(pair, budget, epochs, not arguments.filters_only))
        names = " / ".join(cifar10.CLASSES[row] for row in pair)
        kept, *shares = known[key]
        table.row(names, budget, epochs, f"{kept:.3f}", *(f"{share:.2f}" for share in shares))
    table = Table(
        "pairs", "parameters", "epochs", "change of", "mean, points", "worst, points",
        "that lose at most 1",
    )  # fmt: skip
    for budget in arguments.budgets:
        epochs = SETTINGS[budget]
        rows = torch.tensor([known[key_of(pair, budget, arguments)] for pair in pairs])
        for place, name in enumerate(NAMES[1:], 2):
            change = rows[:, place] - rows[:, 1]
            numbers = f"{change.mean():+.2f}", f"{change.min():+.2f}", int((change > -1.001).sum())
            table.row(len(pairs), budget, epochs, name, *numbers)


def key_of(pair: tuple[int, int], budget: float, arguments: argparse.Namespace) -> str:
    """What a result is kept under."""
    return json.dumps([pair, budget, "filters" if arguments.filters_only else "filters and ranks"])


def measured(pair: tuple[int, int], budget: float, epochs: int, low_rank: bool) -> list[float]:
    """The share kept, and accuracies in per cent: full, specialist, and the others."""
    model, rows = cifar10.pretrained(), list(pair)
    train, test = images_of(rows, "train"), images_of(rows, "test")
    options = {"budget": budget, "low_rank": low_rank, "epochs": epochs, **QUIET}
    found = build_specialist(model, rows, train, None if made_up() else test, **options)
    shares = (100 * found.accuracy).tolist()
    least = sum(parameter.numel() for parameter in found.model.parameters())
    places = [(x, (y == rows[1]).long()) for x, y in train]
    number = max(1, len(places) // 5)
    full = with_rows(model, "linear", rows)
    for network in (magnitude(full, least), torch_pruning(full, least, places[number:])):
        recalibrate(network, places[number:])
        if epochs:
            tune(network, full, places[number:], places[:number], epochs, RATE, 0, "nothing")
        judged = [(x, (y == rows[1]).long()) for x, y in test]
        shares.append(cifar10.accuracy(network.eval(), judged))
    return [found.parameters_kept, *shares]


def images_of(rows: Sequence[int], split: str) -> Batches:
    """Images of some classes, in random order."""
    x, y = random_pair(rows) if made_up() else cifar10.images(split)
    index = torch.stack([y == row for row in rows]).any(0).nonzero()[:, 0]
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    return in_batches(x[index], y[index], 10 if made_up() else 64)


def random_pair(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Noise, with labels."""
    y = torch.tensor(rows).repeat(25)
    return torch.randn(len(y), 3, 32, 32, generator=torch.Generator().manual_seed(0)), y


def inner(model: nn.Module) -> dict[str, int]:
    """The layers that can lose filters, with their numbers."""
    found = prunable_layers(model, torch.rand(2, 3, 32, 32), show_progress=False)
    return {layer.name: layer.num_filters for layer in found.prunable}


def magnitude(model: nn.Module, least: int) -> nn.Module:
    """The filters of largest L1 norm, the same share of each layer."""
    example, smaller = torch.rand(2, 3, 32, 32), model
    for share in torch.arange(0.02, 1.02, 0.02).tolist():
        kept = {}
        for name, number in inner(model).items():
            norms = model.get_parameter(f"{name}.weight").detach().abs().sum((1, 2, 3))
            size = min(number, max(1, round(share * number)))
            kept[name] = norms.argsort(descending=True)[:size]
        smaller = prune_filters(model, kept, example)
        if sum(parameter.numel() for parameter in smaller.parameters()) >= least:
            break
    return smaller


def torch_pruning(model: nn.Module, least: int, data: Batches) -> nn.Module:
    """Torch-Pruning's own, with Taylor importance on some images, the same share of each layer."""
    import copy

    import torch_pruning as tp

    best = model
    low, high = 0.0, 1.0
    for _ in range(6):
        ratio = (low + high) / 2
        network = copy.deepcopy(model)
        names = inner(model)
        others = [
            module
            for name, module in network.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in names
        ]
        importance = tp.importance.GroupTaylorImportance()
        pruner = tp.pruner.MagnitudePruner(
            network,
            torch.rand(2, 3, 32, 32),
            importance,
            pruning_ratio=ratio,
            ignored_layers=others,
        )
        for x, y in data[:8]:
            F.cross_entropy(network(x), y).backward()
        pruner.step()
        network.zero_grad()
        if sum(parameter.numel() for parameter in network.parameters()) >= least:
            best, low = network, ratio
        else:
            high = ratio
    return best


# -- latency ----------------------------------------------------------------------------------------


def latency_part(arguments: argparse.Namespace) -> None:
    """A specialist for three classes: measured times, the filters of both networks before or behind
    the positions in memory."""
    rows = [3, 5, 7]
    train, test = images_of(rows, "train"), images_of(rows, "test")
    table = Table("budget of", "layers split", "layout", *COLUMNS)
    ways = itertools.product(UNITS, (False, True), arguments.budgets)
    for unit, low_rank, budget in ways:
        epochs = SETTINGS[budget] if arguments.epochs is None else arguments.epochs
        model = small() if made_up() else cifar10.pretrained()
        found = build_specialist(
            model, rows, train, None if made_up() else test,
            budget=budget, unit=unit, low_rank=low_rank, epochs=epochs, **QUIET,
        )  # fmt: skip
        images = torch.cat([x for x, _ in test])
        for layout in (torch.contiguous_format, torch.channels_last):
            before, after = (each.to(memory_format=layout) for each in (model, found.model))
            costs = {
                size: compare_networks(
                    before,
                    after,
                    images[:size].contiguous(memory_format=layout),
                    repetitions=times,
                )
                for size, times in ((1, 30), (64, 10))
            }
            for row in rows_of(found, costs):
                name = "filters last" if layout is torch.channels_last else "filters first"
                split = "yes" if found.ranks else "no"
                table.row(unit.replace("_", "-"), split, name, budget, epochs, *row)


def limit_part(arguments: argparse.Namespace) -> None:
    """Times with one filter in each layer that can lose some: no choice of filters is faster."""
    model, images = small() if made_up() else cifar10.pretrained(), torch.randn(64, 3, 32, 32)
    few = images[:2]
    layers = [layer.name for layer in prunable_layers(model, few, **QUIET).prunable]
    smaller = prune_filters(model, {name: [0] for name in layers}, few).eval()
    fold_batch_norms(smaller, (few,))
    table = Table("one filter in each of", "multiply-adds", "batch", "ms", "after", "ratio")
    for size, times in ((1, 30), (64, 10)):
        cost = compare_networks(model, smaller, images[:size], repetitions=times)
        share = cost.after.multiply_adds / cost.before.multiply_adds
        seconds = (f"{1000 * each.seconds:.2f}" for each in (cost.before, cost.after))
        table.row(len(layers), f"{share:.3f}", size, *seconds, f"{cost.speed_up:.2f}")


COLUMNS = (
    "budget", "epochs", "parameters", "multiply-adds", "full", "specialist", "change, 95 %", "random",
    "batch", "ms", "after", "ratio",
)  # fmt: skip


def rows_of(
    found: ClassSpecialist, costs: Mapping[int, NetworkComparison]
) -> list[list[str | int]]:
    """Accuracies in per cent, and times, for each size of a batch."""
    shares = [f"{100 * share:.2f}" for share in found.accuracy.tolist()]
    low, high = (100 * found.interval()).tolist()
    kept = f"{found.parameters_kept:.3f}", f"{found.multiply_adds_kept:.3f}"
    start = [*kept, *shares[:2], f"{low:+.1f} to {high:+.1f}", shares[2]]
    return [
        [
            *start, size, f"{1000 * cost.before.seconds:.2f}", f"{1000 * cost.after.seconds:.2f}",
            f"{cost.speed_up:.2f}",
        ]
        for size, cost in costs.items()
    ]  # fmt: skip


# -- photographs ------------------------------------------------------------------------------------


def small() -> nn.Module:
    """A random network, for a small run."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.Conv2d(16, 12, 3, stride=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    ).eval()  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "EfficientNet-Lite0": (efficientnet, efficientnet_normalized),
    "SqueezeNet 1.1": (squeezenet, lambda x: (x - cifar10.MEAN) / cifar10.STD),
    "small": (small, lambda x: x),
}


def photographs_part(arguments: argparse.Namespace) -> None:
    """Five classes of a thousand, from few photographs."""
    build, judge, rows = photographs()
    table = Table("network", *COLUMNS)
    for name, budget in itertools.product(arguments.networks, arguments.budgets):
        epochs = SETTINGS[budget] if arguments.epochs is None else arguments.epochs
        model, normalize = NETWORKS[name]
        data = [in_batches(normalize(x), y, 25) for x, y in (build, judge)]
        found = build_specialist(
            model(), rows, data[0], data[1], budget=budget, epochs=epochs,
            low_rank=not arguments.filters_only, **QUIET,
        )  # fmt: skip
        for row in rows_of(found, found.costs):
            table.row(name, budget, epochs, *row)
    print("classes: " + ", ".join(map(str, rows)))


def photographs() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[int]]:
    """Images between 0 and 1 to build with, and to judge by, and every fourth class."""
    if made_up():
        x = torch.rand(130, 3, 33, 30, generator=torch.Generator().manual_seed(0))
        y = torch.arange(130) % 5
        return (x[:100], y[:100]), (x, y), [0, 1, 2, 3, 4]
    parts = [(x * cifar10.STD + cifar10.MEAN, y) for x, y, _ in splits(40)]
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    rows = y.unique()[::4]
    places = torch.stack([(y == row).nonzero()[:, 0] for row in rows])
    build, judge = places[:, :30].flatten(), places[:, 30:].flatten()
    return (x[build], y[build]), (x[judge], y[judge]), rows.tolist()


PARTS = {
    "pairs": pairs_part,
    "latency": latency_part,
    "limit": limit_part,
    "photographs": photographs_part,
}


if __name__ == "__main__":
    main()
