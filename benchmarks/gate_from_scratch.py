r"""A ResNet-20 trained from scratch on CIFAR-10: plainly, with a class-specific gate, with a rival penalty.

    python -m benchmarks.gate_from_scratch                       # on a GPU
    python -m benchmarks.gate_from_scratch --device cpu --trainings plain "every third epoch gated"
    python -m benchmarks.gate_from_scratch --device cpu --threads 1 --epochs 45 --train-images 13000 \
        --results benchmarks/gate_from_scratch.jsonl             # goes on where the file ends

20,000 training images, flipped and shifted anew in each epoch, 60 epochs of SGD (.1, cosine, Nesterov
momentum), batches of 128, 10,000 test images; each training with each seed.
The paper trains on 50,000 images for 150 epochs or more. The penalty, the mean squared cosine between the
last convolution's filters, is there because a gain could be any penalty's.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.class_specific_gate import measured
from benchmarks.class_specific_gate_cifar10 import augmented
from benchmarks.shared import QUIET, Results, Table, make_up, parsed, parser, prepare, timed
from captum_classfilters import ClassSpecificGate
from captum_classfilters.gates import GatedTrainer, GateSchedule

SCHEDULES = {
    "every third epoch gated": GateSchedule("epoch", 3, 1, warmup=5),
    "both paths in every batch": GateSchedule("joint"),
}
PENALTY = "orthogonality"
TRAININGS = ("plain", *SCHEDULES, PENALTY)


@dataclass(frozen=True)
class Augmented:
    """Shuffled batches of flipped and shifted images, other ones in each epoch, where the images are."""

    x: Tensor
    y: Tensor
    batch_size: int
    random: torch.Generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (images, labels); the last, smaller one is left out."""
        order = torch.randperm(len(self.x), generator=self.random)
        for part in order.split(self.batch_size):
            if len(part) == min(self.batch_size, len(self.x)):
                there = part.to(self.x.device)
                yield augmented(self.x[there], self.random), self.y[there]


def orthogonality(model: nn.Module, strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy, and the mean squared cosine between the last convolution's filters."""
    weight = model.get_parameter("layer3.2.conv2.weight")

    def criterion(scores: Tensor, labels: Tensor) -> Tensor:
        rows = F.normalize(weight.flatten(1), dim=1)
        cosines = rows @ rows.T - torch.eye(len(rows), device=rows.device)
        return F.cross_entropy(scores, labels) + strength * cosines.square().sum() / len(rows)

    return criterion


def trained(training: str, seed: int, settings: argparse.Namespace) -> list[float]:
    """Accuracy, score, density, recall of a masked class, what the others lose, and minutes."""
    make_up(settings.small)  # this is a process of its own
    if settings.threads is not None or settings.processes > 1:
        torch.set_num_threads(settings.threads or 1)
    torch.manual_seed(seed)
    device = torch.device(settings.device)
    x, y = (t.to(device) for t in cifar10.images("train", settings.train_images))
    # Channels last is an eighth to a third faster on processors.
    model: Any = cifar10.CifarResNet().to(device).to(memory_format=torch.channels_last)
    gate = ClassSpecificGate(10, 64).to(device).attach(model, "layer3")
    penalized = training == PENALTY
    trainer = GatedTrainer(
        model,
        gate,
        optimizer := torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=settings.decay
        ),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs),
        regularization=0.05,
        schedule=SCHEDULES.get(training, GateSchedule(warmup=settings.epochs)),
        criterion=orthogonality(model, settings.penalty) if penalized else F.cross_entropy,
    )
    batches = Augmented(x, y, 128, torch.Generator().manual_seed(seed))
    seconds, _ = timed(lambda: trainer.fit(batches, epochs=settings.epochs, **QUIET))
    gate.detach()
    used = gate if training in SCHEDULES else None
    seen, test = (
        [(x.to(device), y.to(device)) for x, y in cifar10.loader(split, count)]
        for split, count in (("train", settings.train_images), ("test", settings.test_images))
    )
    cells, _ = measured(model.eval(), "layer3", used, seen, test)
    return [float(cell) if cell != "-" else float("nan") for cell in cells] + [seconds / 60]


def compare(settings: argparse.Namespace) -> None:
    """Print each run, then means and spreads over seeds."""
    columns = ("accuracy", "MIS", "density", "recall of a masked class", "others lose, points")
    table = Table("training, seed", *columns, "minutes")
    found: dict[str, list[list[float]]] = {training: [] for training in settings.trainings}
    for (training, seed), values in _done(settings):
        found[training].append(values)
        table.row(f"{training}, {seed}", *map(_cell, values))
    means = Table(f"mean and standard deviation, decay {settings.decay:g}", *columns)
    for training, values_of in found.items():
        means.row(training, *map(_spread, zip(*(values[:-1] for values in values_of), strict=True)))


def _done(settings: argparse.Namespace) -> Iterator[tuple[tuple[str, int], list[float]]]:
    """Runs and their figures, as they end; those of an earlier benchmark first."""
    known = Results(settings.results)
    how = (settings.train_images, settings.epochs, settings.decay)
    runs = {
        json.dumps([training, seed, *how]): (training, seed)
        for seed in settings.seeds
        for training in settings.trainings
    }
    yield from ((run, known[name]) for name, run in runs.items() if name in known)
    missing = {name: run for name, run in runs.items() if name not in known}
    with ProcessPoolExecutor(settings.processes, get_context("spawn")) as pool:
        begun = {pool.submit(trained, *run, settings): name for name, run in missing.items()}
        for future in as_completed(begun):
            known.keep(begun[future], future.result())
            yield runs[begun[future]], future.result()


def _cell(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2 or values[0] != values[0]:
        return _cell(values[0])
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    known = parser(__doc__)
    known.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    known.add_argument("--epochs", type=int, default=60)
    known.add_argument("--decay", type=float, default=5e-4)
    known.add_argument("--penalty", type=float, default=0.1, help="strength of the orthogonality")
    known.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    known.add_argument("--train-images", type=int, default=20000)
    known.add_argument("--test-images", type=int, default=10000)
    known.add_argument("--processes", type=int, default=1)
    known.add_argument("--threads", type=int, help="of each process; of several, one by default")
    known.add_argument("--results", type=Path, help="a file of results to go on with")
    known.add_argument("--trainings", nargs="+", choices=TRAININGS, default=TRAININGS)
    sizes = {
        "epochs": 1,
        "train_images": 30,
        "test_images": 20,
        "seeds": [0, 1],
        "trainings": TRAININGS[1::2],
    }
    settings = parsed(known, given, **sizes)
    prepare(settings.small, cifar10.TEST, cifar10.TRAIN)
    compare(settings)


if __name__ == "__main__":
    main()
