r"""Class-specific gates on CIFAR-10: a public gated network, fine-tuning, and what a gated step costs.

    python -m benchmarks.class_specific_gate_cifar10 --public      # about two minutes on one core
    python -m benchmarks.class_specific_gate_cifar10 --fine-tune   # about twenty minutes
    python -m benchmarks.class_specific_gate_cifar10 --fine-tune --views 8 --epochs 32 \
        --trainings "as found" plain                               # about half an hour
    python -m benchmarks.class_specific_gate_cifar10 --fine-tune --views 2 --epochs 8 \
        --trainings "gated, started from the head"                 # about ten minutes
    python -m benchmarks.class_specific_gate_cifar10 --overhead    # about a minute

`--public` reads the gate of a ResNet-20 that others trained with it. `--fine-tune` starts from the public
plain ResNet-20 and trains its last stage and head, once plainly and once with a gate. The first two stages
run once, on the training images as they are or on `--views` randomly flipped and shifted copies of each,
from which every epoch draws as many as there are images; the paper trains from scratch for 150 epochs.
Settings were taken over from digits and MNIST; nothing was chosen on the test images.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset

from benchmarks import cifar10
from benchmarks.class_specific_gate import measured
from benchmarks.shared import QUIET, Table, parsed, parser, prepare, timed
from captum_classfilters import (
    ClassFilters,
    ClassSpecificGate,
    LayerClassGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    identify_class_filters,
)
from captum_classfilters.gates import GatedTrainer, GateSchedule
from captum_classfilters.heads import essentiality, set_overlap
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    evaluate_classifier,
    mutual_information_bound,
)

TRAININGS = ("as found", "plain", "gated, constant start", "gated, started from the head")


def public() -> None:
    """The gate's five highest filters per class beside what the same network's images say."""
    model, gate = cifar10.gated()
    train, test = cifar10.loader("train", 10000), cifar10.loader("test")
    methods = {
        "frequency": LayerFilterFrequency(model, "layer3"),
        "contribution": LayerFilterContribution(model, "layer3"),
    }
    tables = {
        "gate, highest": LayerClassGate(model, "layer3", gate).class_filters(num_filters=5),
        **identify_class_filters(methods, train, num_filters=5, **QUIET),
        "random": random_sets(),
    }
    features, labels = collect_features(model, "layer3", test, **QUIET)
    example = next(iter(test))[0][:2]
    full = evaluate_classifier(model, test, **QUIET).accuracy
    print(f"Public gated ResNet-20, layer3, all filters: test accuracy {full:.4f}")
    rows = Table(
        *("5 filters per class", "recall, noise at the set", "noise at the complement"),
        *("shared with the gate's sets", "Jaccard between classes", "distinct filters"),
        "decomposed accuracy",
    )
    for name, table in tables.items():
        noise = essentiality(features, labels, model.linear.weight, model.linear.bias, table)
        shared = table.agreement(tables["gate, highest"]).mean_overlap
        overlap = set_overlap(table, repetitions=1)
        decomposed = decompose(model, table, head="linear", example_inputs=example)
        accuracy = evaluate_classifier(decomposed, test, **QUIET)
        rows.row(
            name,
            f"{float(noise.at_set.mean()):.3f}",
            f"{float(noise.at_complement.mean()):.3f}",
            f"{shared:.2f}",
            f"{overlap.mean_jaccard:.3f}",
            overlap.distinct_filters,
            f"{accuracy.accuracy:.4f}",
        )


def random_sets() -> ClassFilters:
    scores = torch.rand(10, 64, generator=torch.Generator().manual_seed(0))
    table = ClassFilters(scores, torch.ones(10), layer="layer3", method="random")
    return table.select(num_filters=5)


# -- fine-tuning ---------------------------------------------------------------------------------


def tail_of(model: cifar10.CifarResNet) -> nn.Sequential:
    """The last stage and the head, as a model of the second stage's output."""
    tail = nn.Sequential()
    tail.add_module("layer3", model.layer3)
    tail.add_module("average", nn.AdaptiveAvgPool2d(1))
    tail.add_module("flatten", nn.Flatten())
    tail.add_module("linear", model.linear)
    return tail


@torch.no_grad()
def second_stage(split: str, count: int, views: int = 0) -> TensorDataset:
    """What the frozen stages put out for every image, or for augmented views of it, and the labels."""
    model = cifar10.pretrained(20)
    x, y = cifar10.images(split, count)
    random = torch.Generator().manual_seed(0)
    copies = torch.arange(len(x)).repeat(max(views, 1))
    features = torch.empty(len(copies), 32, 16, 16)
    for part, out in zip(copies.split(250), features.split(250), strict=True):
        taken = augmented(x[part], random) if views else x[part]
        out.copy_(model.layer2(model.layer1(torch.relu(model.bn1(model.conv1(taken))))))
    return TensorDataset(features, y[copies])


def augmented(x: Tensor, random: torch.Generator) -> Tensor:
    """Images shifted by up to four pixels and flipped half the time, where they are."""
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4)).movedim(1, 3)
    shifts = torch.randint(0, 9, (2, len(x)), generator=random)
    flip = torch.rand(len(x), generator=random) < 0.5
    pixels = torch.arange(32)
    across = torch.where(flip[:, None], pixels.flip(0), pixels)
    rows, columns = (
        (shifts[0, :, None] + pixels).to(x.device),
        (shifts[1, :, None] + across).to(x.device),
    )
    images = torch.arange(len(x), device=x.device)
    return (
        padded[images[:, None, None], rows[:, :, None], columns[:, None]].movedim(3, 1).contiguous()
    )


def fine_tune(arguments: argparse.Namespace) -> None:
    """The last stage and the head, trained plainly and with a gate."""
    epochs, seed, train_images = arguments.epochs, arguments.seed, arguments.train_images
    train_set = second_stage("train", train_images, arguments.views)
    test_set = second_stage("test", arguments.test_images)
    test = DataLoader(test_set, batch_size=250)
    bound = float(mutual_information_bound(test_set.tensors[1]).mean())
    print(
        f"{epochs} epochs of {train_images} images, {arguments.views} augmented views of each, seed "
        f"{seed}, {arguments.test_images} test images; the bound of the MIS is {bound:.4f}"
    )
    table = Table(
        *("training", "accuracy", "MIS", "density", "recall of a masked class"),
        *("others lose, points", "minutes"),
    )
    for training in arguments.trainings:
        table.row(training, *tuned(training, train_set, test, arguments))


def tuned(
    training: str, train_set: TensorDataset, test: DataLoader, arguments: argparse.Namespace
) -> list[str]:
    """One row of the table.

    A trained network's gated loss is small from the first step on, and a uniform shrinkage of the
    gates, which is what the regularizer asks for, is undone by the rescaling projection; hence the
    last way: gates that start from the head's positive weights, and the Euclidean projection.
    """
    epochs = arguments.epochs
    torch.manual_seed(arguments.seed)
    tail = tail_of(cifar10.pretrained(20))
    once = Subset(train_set, range(min(len(train_set), 20000)))  # one view of each image
    seen = DataLoader(once, batch_size=250)
    if training == "as found":
        return [*measured(tail, "layer3", None, seen, test)[0], "-"]
    gate = ClassSpecificGate(10, 64)
    if training == "gated, started from the head":
        weight = tail.get_parameter("linear.weight").detach().clamp(min=0)
        gate = ClassSpecificGate(10, 64, weight / weight.max(0).values, projection="euclidean")
    gate.attach(tail, "layer3")
    optimizer = torch.optim.SGD(
        tail.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    drawn = RandomSampler(train_set, num_samples=arguments.train_images, generator=generator)
    loader = DataLoader(train_set, batch_size=128, sampler=drawn)
    plain = GateSchedule(warmup=epochs)
    trainer = GatedTrainer(
        tail,
        gate,
        optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        regularization=0.05,
        schedule=plain if training == "plain" else GateSchedule("batch", 3, 2),
    )
    seconds, _ = timed(lambda: trainer.fit(loader, epochs=epochs, **QUIET))
    used = None if training == "plain" else gate
    cells, _ = measured(tail.eval(), "layer3", used, seen, test)
    return [*cells, f"{seconds / 60:.1f}"]


# -- cost ----------------------------------------------------------------------------------------


def overhead(repetitions: int) -> None:
    """Time of a gated step over a plain one, in turn; median of the ratios of neighbors."""
    x, y = cifar10.images("train", 256)
    table = Table("images a step", "plain step, ms", "gated over plain, median", "quartiles")
    for size in (32, 128):
        model = cifar10.pretrained(20).train()
        gate = ClassSpecificGate(10, 64).attach(model, "layer3")
        trainer = GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=1e-3))
        plain, ratios = [], []
        for repetition in range(repetitions + 2):
            seconds = {}
            # The order alternates, so that neither always follows the other.
            for gated in (False, True) if repetition % 2 else (True, False):
                seconds[gated], _ = timed(partial(trainer.step, x[:size], y[:size], gated))
            if repetition >= 2:
                plain.append(1000 * seconds[False])
                ratios.append(seconds[True] / seconds[False])
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.row(
            size, f"{statistics.median(plain):.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"
        )


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables that are asked for, all of them in a small run."""
    known = parser(__doc__)
    for name in ("public", "fine-tune", "overhead"):
        known.add_argument(f"--{name}", action="store_true")
    known.add_argument("--epochs", type=int, default=6)
    known.add_argument("--seed", type=int, default=0)
    known.add_argument("--train-images", type=int, default=20000)
    known.add_argument("--test-images", type=int, default=10000)
    known.add_argument("--views", type=int, default=0)
    known.add_argument("--repetitions", type=int, default=15, help="for --overhead")
    known.add_argument("--trainings", nargs="+", choices=TRAININGS, default=TRAININGS)
    small = {"public": True, "fine_tune": True, "overhead": True}
    sizes = {"epochs": 1, "train_images": 30, "test_images": 20, "views": 1, "repetitions": 2}
    arguments = parsed(known, given, **small, **sizes)
    prepare(arguments.small, cifar10.TEST, cifar10.GATED)
    if arguments.public:
        public()
    if arguments.fine_tune:
        fine_tune(arguments)
    if arguments.overhead:
        overhead(arguments.repetitions)


if __name__ == "__main__":
    main()
