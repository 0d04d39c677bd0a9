r"""Smaller networks for pairs of classes: what they keep, what they lose, beside other choices of filters.

    python -m benchmarks.specialists                          # 45 pairs of CIFAR-10, hours on one core
    python -m benchmarks.specialists --pairs 5                # some: the hardest, each other class once
    python -m benchmarks.specialists --results FILE           # goes on where FILE ends
    python -m benchmarks.specialists --part latency           # three classes: measured times

Pairs: the public ResNet-20; filters are chosen and weights fitted on 4,000 training images of a pair, all
is judged on its 2,000 test images. A quarter of the parameters without training, 11 % after one epoch.
Beside it stand networks with as many random filters in each layer, made in the same way; the filters of
largest L1 norm; and Torch-Pruning's pruner with Taylor importance on the pair's images; the last two at no
fewer parameters, with batch normalizations measured anew, and trained alike.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import QUIET, Batches, Table, in_batches, made_up, parsed, parser, prepare
from captum_classfilters.answers import build_specialist
from captum_classfilters.answers.specialist import recalibrate, tune
from captum_classfilters.pruning import prunable_layers, prune_filters
from captum_classfilters.pruning.specialize import with_rows

SETTINGS = ((0.25, 0), (0.11, 1))
NAMES = ("full", "specialist", "random", "magnitude", "Torch-Pruning")
FIRST = ((3, 5), (0, 1), (2, 7), (4, 6), (8, 9))  # cat and dog, and each other class once
RATE = 2e-3


def main(given: Sequence[str] | None = None) -> None:
    """Print a table of each part."""
    options = parser(__doc__)
    options.add_argument("--part", choices=list(PARTS), help="by default all")
    options.add_argument("--pairs", type=int, default=45, help="how many")
    options.add_argument("--results", type=Path, help="a file of results to go on with")
    arguments = parsed(options, given, pairs=1)
    prepare(arguments.small, cifar10.TEST, cifar10.TRAIN)
    for part in [arguments.part] if arguments.part else PARTS:
        PARTS[part](arguments)


# -- pairs ------------------------------------------------------------------------------------------


def pairs_part(arguments: argparse.Namespace) -> None:
    """Accuracies of all pairs, their means and the worst."""
    pairs = list(dict.fromkeys([*FIRST, *itertools.combinations(range(10), 2)]))[: arguments.pairs]
    known = read(arguments.results)
    table = Table("pair", "parameters", "epochs", "kept", *NAMES)
    for pair, (budget, epochs) in itertools.product(pairs, settings()):
        key = json.dumps([pair, budget, epochs])
        if key not in known:
            known[key] = measured(pair, budget, epochs)
            if arguments.results is not None:
                with open(arguments.results, "a") as file:
                    file.write(json.dumps([key, known[key]]) + "\n")
        names = " / ".join(cifar10.CLASSES[row] for row in pair)
        kept, *shares = known[key]
        table.row(names, budget, epochs, f"{kept:.3f}", *(f"{share:.2f}" for share in shares))
    table = Table("pairs", "parameters", "epochs", "change of", "mean, points", "worst, points")
    for budget, epochs in settings():
        rows = torch.tensor([known[json.dumps([pair, budget, epochs])] for pair in pairs])
        for place, name in enumerate(NAMES[1:], 2):
            change = rows[:, place] - rows[:, 1]
            numbers = f"{change.mean():+.2f}", f"{change.min():+.2f}"
            table.row(len(pairs), budget, epochs, name, *numbers)


def settings() -> tuple[tuple[float, int], ...]:
    """Shares of the parameters, and epochs of training; a small run has the last alone."""
    return SETTINGS[-1:] if made_up() else SETTINGS


def read(path: Path | None) -> dict[str, list[float]]:
    """Results of an earlier run."""
    if path is None or not path.is_file():
        return {}
    return dict(json.loads(line) for line in path.read_text().splitlines())


def measured(pair: tuple[int, int], budget: float, epochs: int) -> list[float]:
    """The share kept, and accuracies in per cent: full, specialist, and the others."""
    model, rows = cifar10.pretrained(), list(pair)
    train, test = images_of(rows, "train"), images_of(rows, "test")
    options = {"budget": budget, "epochs": epochs, "class_names": cifar10.CLASSES, **QUIET}
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
    """A specialist for three classes: measured times."""
    rows = [3, 5, 7]
    train = images_of(rows, "train")
    table = Table(
        "parameters", "epochs", "kept", "full", "specialist", "batch", "ms", "after", "ratio"
    )
    for budget, epochs in settings():
        found = build_specialist(
            cifar10.pretrained(), rows, train, None if made_up() else images_of(rows, "test"),
            budget=budget, epochs=epochs, class_names=cifar10.CLASSES, **QUIET,
        )  # fmt: skip
        shares = [f"{100 * share:.2f}" for share in found.accuracy[:2].tolist()]
        for size, cost in found.costs.items():
            times = (f"{1000 * one.seconds:.2f}" for one in (cost.before, cost.after))
            speed = f"{cost.speed_up:.2f}"
            table.row(budget, epochs, f"{found.parameters_kept:.3f}", *shares, size, *times, speed)


PARTS = {"pairs": pairs_part, "latency": latency_part}


if __name__ == "__main__":
    main()
