"""A class forgotten in closed form, and what can still be told of it.

    python -m benchmarks.forget_class

CIFAR-10's public ResNet-20. For each class: the head without its row, whose features are as before, and
the features without the class's own prototype, or without what a linear probe reads. For one class also
forgetting further down. Retrained, for each class: networks that never saw the class in training their
last stage. The public network's first two stages are kept, its last stage and head drawn anew and trained
on those of 10,000 images that are of other classes, and alike on all for a network to forget in.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import QUIET, Table, in_batches, parsed, parser, prepare, timed
from captum_classfilters.answers import audit_forgetting, forget_class
from captum_classfilters.identify import unit_scores

INNER = ["layer3.1"]
Forgetting = Callable[..., nn.Module]
COLUMNS = ("forget", "retain", "linear probe", "neighbors", "by other classes")


def features(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The head's inputs, in batches."""
    means, _ = unit_scores(model, "layer3", in_batches(x, y, 250), **QUIET)
    return in_batches(means["layer3"], y, 2000)


def without_row(model: nn.Module, head: str, class_index: int) -> nn.Module:
    """A network that never names a class, as if its row were removed; the other rows keep their
    places, so that labels are as before."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(f"{head}.bias")[class_index] = -1e4
    return changed


class Late(nn.Module):
    """The last stage and the head of a ResNet-20, for what comes before them."""

    def __init__(self, network: cifar10.CifarResNet) -> None:
        super().__init__()
        self.layer3, self.linear = network.layer3, network.linear

    def forward(self, maps: Tensor) -> Tensor:
        """Logits of maps (N, 32, 16, 16)."""
        scores: Tensor = self.linear(self.layer3(maps).mean((2, 3)))
        return scores


def audited(
    models: dict[str, nn.Module], class_index: int, train: object, test: object
) -> dict[str, list[float]]:
    """The numbers of an audit by model."""
    audit = audit_forgetting(models, class_index, train, test, **QUIET)  # type: ignore[arg-type]
    columns = torch.stack(
        [
            audit.forget_accuracy,
            audit.retain_accuracy,
            audit.linear_probe,
            audit.neighbor_probe,
            audit.other_classes_probe,
        ],
        1,
    )
    return dict(zip(audit.models, columns.tolist(), strict=True))


def each_class(args: argparse.Namespace) -> None:
    """The head's features without each class."""
    network = cifar10.pretrained(20)
    end = nn.Sequential(nn.Identity(), network.linear).eval()
    few, train, test = (
        features(network, *cifar10.images(split, number))
        for split, number in (("train", args.images), ("train", args.train), ("test", args.test))
    )
    table = Table("class", "network", *COLUMNS)
    sums: dict[str, list[list[float]]] = {}
    for class_index in range(args.classes):
        models: dict[str, nn.Module] = {
            "row removed (features as before)": without_row(end, "1", class_index),
            "prototype": forget_class(end, few, class_index, **QUIET),
            "probe": forget_class(end, few, class_index, erase="probe", **QUIET),
        }
        for name, numbers in audited(models, class_index, train, test).items():
            sums.setdefault(name, []).append(numbers)
            name_of_class = cifar10.CLASSES[class_index]
            table.row(name_of_class, name, *_cells(numbers))
    for name, all_numbers in sums.items():
        means = torch.tensor(all_numbers).mean(0).tolist()
        table.row("mean", name, *_cells(means))


def whole_network(args: argparse.Namespace) -> None:
    """One class, forgotten at the head and further down, and the time that takes."""
    network, last = cifar10.pretrained(20), args.last
    read = in_batches(*cifar10.images("train", args.images), 250)
    own, test_own = cifar10.images("train", args.train), cifar10.images("test", args.test)
    models: dict[str, nn.Module] = {
        "row removed (features as before)": without_row(network, "linear", last)
    }
    seconds = {}
    ways: dict[str, Forgetting] = {
        "prototype": partial(forget_class, erase="prototype"),
        "probe": partial(forget_class, erase="probe"),
        f"prototype, also at {', '.join(INNER)}": partial(forget_class, layers=INNER),
    }
    for name, way in ways.items():
        task = partial(way, network, read, last, **QUIET)
        seconds[name], models[name] = timed(task, clock=time.process_time)
    table = Table(f"{cifar10.CLASSES[last]} forgotten by", *COLUMNS, "seconds of one processor")
    found = audited(models, last, in_batches(*own, 250), in_batches(*test_own, 250))
    for name, numbers in found.items():
        took = f"{seconds[name]:.1f}" if name in seconds else ""
        table.row(name, *_cells(numbers), took)


def beside_retrained(args: argparse.Namespace) -> None:
    """Networks with and without a class, trained alike, and what can be told of it in both."""
    x, y = cifar10.images("train", args.trained)
    maps = cifar10.early_maps(x, _kept(args, "maps"))
    test_x, test_y = cifar10.images("test", 2 * args.test)
    test_maps = cifar10.early_maps(test_x, _kept(args, f"maps-test-{len(test_x)}")).float()
    half = len(test_y) // 2
    judge = in_batches(test_maps[half:], test_y[half:], 250)
    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    learned = {
        "test images": in_batches(test_maps[:half], test_y[:half], 250),
        "training images": in_batches(maps[some[: args.train]].float(), y[some[: args.train]], 250),
    }
    few = some[: args.images]
    read = in_batches(maps[few].float(), y[few], 250)
    full = Late(cifar10.last_stage_trained(maps, y, args.epochs, _kept(args, "trained"))).eval()
    table = Table("class", "probes learn from", "network", *COLUMNS)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for class_index in args.retrained:
        rest, file = y != class_index, _kept(args, f"trained-without-{class_index}")
        without = cifar10.last_stage_trained(maps[rest], y[rest], args.epochs, file)
        models: dict[str, nn.Module] = {
            "row removed (features as before)": without_row(full, "linear", class_index),
            "prototype": forget_class(full, read, class_index, **QUIET),
            "probe": forget_class(full, read, class_index, erase="probe", **QUIET),
            f"prototype, also at {', '.join(INNER)}": forget_class(
                full, read, class_index, layers=INNER, **QUIET
            ),
            "retrained without": Late(without).eval(),
        }
        for source, train in learned.items():
            for name, numbers in audited(models, class_index, train, judge).items():
                table.row(cifar10.CLASSES[class_index], source, name, *_cells(numbers))
                found.setdefault((source, name), []).append(numbers)
    for (source, name), rows in found.items():
        table.row("mean", source, name, *_cells(torch.tensor(rows).mean(0).tolist()))
        apart = torch.tensor(rows) - torch.tensor(found[source, "retrained without"])
        furthest = apart[apart.abs().argmax(0), torch.arange(len(COLUMNS))].tolist()
        table.row("furthest from retrained", source, name, *(f"{x:+.3f}" for x in furthest))


def _kept(args: argparse.Namespace, name: str) -> Path | None:
    return None if args.cache is None else args.cache / f"{name}.safetensors"


PARTS = {"classes": each_class, "network": whole_network, "retrained": beside_retrained}


def main(given: Sequence[str] | None = None) -> None:
    """Print a table for each part."""
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--part", choices=list(PARTS), help="by default all")
    options.add_argument("--images", type=int, default=2000, help="images that forgetting reads")
    options.add_argument("--train", type=int, default=4000, help="images that probes learn from")
    options.add_argument("--test", type=int, default=4000, help="images to judge by")
    options.add_argument("--classes", type=int, default=10, help="classes to forget, one by one")
    options.add_argument("--last", type=int, default=3, help="the class forgotten further down")
    options.add_argument("--trained", type=int, default=10000, help="images to retrain with")
    options.add_argument("--epochs", type=int, default=4, help="of networks that are retrained")
    options.add_argument(
        "--retrained",
        type=int,
        nargs="*",
        default=[*range(10)],
        help="classes that these never saw",
    )
    options.add_argument("--cache", type=Path, help="folder where maps and weights are kept")
    args = parsed(options, given, images=30, train=30, test=15, classes=1, epochs=1, retrained=[3])
    prepare(args.small, cifar10.TEST, cifar10.TRAIN)
    torch.set_num_threads(1)
    for part in [args.part] if args.part else PARTS:
        PARTS[part](args)


def _cells(numbers: list[float]) -> list[str]:
    return [f"{number:.3f}" for number in numbers]


if __name__ == "__main__":
    main(sys.argv[1:])
