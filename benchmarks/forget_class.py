"""A class forgotten in closed form, and what can still be told of it.

    python -m benchmarks.forget_class

CIFAR-10's public ResNet-20. For each class: the head without its row, whose features are as before, and
the features without the class's own prototype, or without what a linear probe reads. For one class
also forgetting further down, and with --epochs 10 beside them a ResNet-20 trained from scratch on the 18,000
training images without the class; its weights are kept in a file, if --retrained names one.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import QUIET, Table, in_batches, parsed, parser, prepare, timed
from captum_classfilters.answers import audit_forgetting, forget_class
from captum_classfilters.identify import unit_scores

INNER = ["layer3.1"]
Forgetting = Callable[..., nn.Module]
COLUMNS = ("forget", "retain", "linear probe", "neighbors", "by other classes")


def trained_without(class_index: int, epochs: int, x: Tensor, y: Tensor) -> cifar10.CifarResNet:
    """A ResNet-20 that never saw a class: SGD of one cycle, flips and shifts of whole batches."""
    torch.manual_seed(0)
    keep, size = y != class_index, 128
    x, y = x[keep], y[keep]
    model = cifar10.CifarResNet(20)
    steps = max(1, len(x) // size)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=epochs * steps, pct_start=0.25
    )
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(x))
        for step in range(steps):
            chosen = order[step * size : (step + 1) * size]
            flipped = (torch.rand(len(chosen)) < 0.5)[:, None, None, None]
            images = F.pad(torch.where(flipped, x[chosen].flip(3), x[chosen]), (4,) * 4)
            right, down = torch.randint(0, 9, (2,)).tolist()
            images = images[:, :, down : down + 32, right : right + 32]
            loss = F.cross_entropy(model(images), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def retrained(
    class_index: int, epochs: int, file: str | None, x: Tensor, y: Tensor
) -> cifar10.CifarResNet:
    """The same, from a file if there is one."""
    if file is not None and Path(file).is_file():
        model = cifar10.CifarResNet(20)
        model.load_state_dict(load_file(file))
        return model.eval()
    model = trained_without(class_index, epochs, x, y)
    if file is not None:
        save_file(model.state_dict(), file)
    return model


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


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--images", type=int, default=2000, help="images that forgetting reads")
    options.add_argument("--train", type=int, default=4000, help="images that probes learn from")
    options.add_argument("--test", type=int, default=4000, help="images to judge by")
    options.add_argument("--classes", type=int, default=10, help="classes to forget, one by one")
    options.add_argument("--last", type=int, default=3, help="the class forgotten further down")
    options.add_argument(
        "--epochs", type=int, default=0, help="of the network trained without it; 0: none"
    )
    options.add_argument("--retrained", help="file of that network's weights")
    args = parsed(options, given, images=30, train=30, test=30, classes=1, epochs=1)
    prepare(args.small, cifar10.TEST, cifar10.TRAIN)
    torch.set_num_threads(1)
    network = cifar10.pretrained(20)
    read = in_batches(*cifar10.images("train", args.images), 250)
    own, test_own = cifar10.images("train", args.train), cifar10.images("test", args.test)
    end = nn.Sequential(nn.Identity(), network.linear).eval()
    few = features(network, *cifar10.images("train", args.images))
    train, test = features(network, *own), features(network, *test_own)

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

    last = args.last
    models = {"row removed (features as before)": without_row(network, "linear", last)}
    seconds = {}
    ways: dict[str, Forgetting] = {
        "prototype": partial(forget_class, erase="prototype"),
        "probe": partial(forget_class, erase="probe"),
        f"prototype, also at {', '.join(INNER)}": partial(forget_class, layers=INNER),
    }
    for name, way in ways.items():
        task = partial(way, network, read, last, **QUIET)
        seconds[name], models[name] = timed(task, clock=time.process_time)
    if args.epochs:
        x, y = cifar10.images("train")
        models["trained without"] = retrained(last, args.epochs, args.retrained, x, y)
    table = Table(f"{cifar10.CLASSES[last]} forgotten by", *COLUMNS, "seconds of one processor")
    found = audited(models, last, in_batches(*own, 250), in_batches(*test_own, 250))
    for name, numbers in found.items():
        took = f"{seconds[name]:.1f}" if name in seconds else ""
        table.row(name, *_cells(numbers), took)


def _cells(numbers: list[float]) -> list[str]:
    return [f"{number:.3f}" for number in numbers]


if __name__ == "__main__":
    main(sys.argv[1:])
