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
import time

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset

from benchmarks import cifar10
from captum_classfilters import (
    ClassFilters,
    ClassSpecificGate,
    LayerClassGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    identify_class_filters,
)
from captum_classfilters.gates import GatedTrainer, GateSchedule, masking_test
from captum_classfilters.heads import essentiality, set_overlap
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    evaluate_classifier,
    mutual_information_bound,
    mutual_information_matrix,
    mutual_information_score,
)

QUIET = {"show_progress": False}
TRAININGS = ("as found", "plain", "gated, constant start", "gated, started from the head")
GATED = "resnet20_csg_cifar10.safetensors"


def public() -> None:
    """The gate's five highest filters a class beside what the same network's images say."""
    model = cifar10.pretrained(20, GATED)
    gate = load_file(cifar10.DATA / GATED)["gate"]
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
    print(f"Public gated ResNet-20, layer3, all filters: test accuracy {full:.4f}\n")
    print(
        "| 5 filters a class | recall, noise at the set | noise at the complement | shared with the "
        "gate's sets | Jaccard between classes | distinct filters | decomposed accuracy |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, table in tables.items():
        noise = essentiality(features, labels, model.linear.weight, model.linear.bias, table)
        shared = table.agreement(tables["gate, highest"]).mean_overlap
        overlap = set_overlap(table, random_seeds=1)
        decomposed = decompose(model, table, head="linear", example_inputs=example)
        accuracy = evaluate_classifier(decomposed, test, **QUIET)
        print(
            f"| {name} | {float(noise.at_set.mean()):.3f} | "
            f"{float(noise.at_complement.mean()):.3f} | {shared:.2f} | {overlap.mean_jaccard:.3f} | "
            f"{overlap.distinct_filters} | {accuracy.accuracy:.4f} |",
            flush=True,
        )


def random_sets() -> ClassFilters:
    scores = torch.rand(10, 64, generator=torch.Generator().manual_seed(0))
    table = ClassFilters(scores, torch.ones(10), layer="layer3", method="random")
    return table.select(num_filters=5)


# -- fine-tuning ---------------------------------------------------------------------------------


def tail_of(model: nn.Module) -> nn.Sequential:
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
    """Images shifted by up to four pixels and flipped half the time."""
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    rows, columns = torch.randint(0, 9, (2, len(x)), generator=random).tolist()
    shifted = torch.stack(
        [padded[one, :, rows[one] :, columns[one] :][:, :32, :32] for one in range(len(x))]
    )
    flip = torch.rand(len(x), generator=random) < 0.5
    return torch.where(flip[:, None, None, None], shifted.flip(3), shifted)


def fine_tune(arguments: argparse.Namespace) -> None:
    """The last stage and the head, trained plainly and with a gate."""
    epochs, seed, train_images = arguments.epochs, arguments.seed, arguments.train_images
    train_set = second_stage("train", train_images, arguments.views)
    test = DataLoader(second_stage("test", arguments.test_images), batch_size=250)
    bound = float(mutual_information_bound(test.dataset.tensors[1]).mean())
    print(
        f"{epochs} epochs of {train_images} images, {arguments.views} augmented views of each, seed "
        f"{seed}, {arguments.test_images} test images; the bound of the MIS is {bound:.4f}\n"
    )
    print(
        "| training | accuracy | MIS | density | recall of a masked class | others lose, points | "
        "minutes |"
    )
    print("|---|---|---|---|---|---|---|")
    for training in arguments.trainings:
        print(tuned(training, train_set, test, arguments), flush=True)


def tuned(
    training: str, train_set: TensorDataset, test: DataLoader, arguments: argparse.Namespace
) -> str:
    """One row of the table.

    A trained network's gated loss is small from the first step on, and a uniform shrinkage of the
    gates, which is what the regulariser asks for, is undone by the rescaling projection; hence the
    last way: gates that start from the head's positive weights, and the Euclidean projection.
    """
    epochs = arguments.epochs
    torch.manual_seed(arguments.seed)
    tail = tail_of(cifar10.pretrained(20))
    if training == "as found":
        return f"| as found | {' | '.join(measured(tail, None, train_set, test))} | - |"
    gate = ClassSpecificGate(10, 64)
    if training == "gated, started from the head":
        weight = tail.linear.weight.detach().clamp(min=0)
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
    started = time.perf_counter()
    trainer.fit(loader, epochs=epochs)
    minutes = (time.perf_counter() - started) / 60
    cells = measured(tail.eval(), None if training == "plain" else gate, train_set, test)
    return f"| {training} | {' | '.join(cells)} | {minutes:.1f} |"


def measured(
    tail: nn.Module, gate: ClassSpecificGate | None, train_set: TensorDataset, test: DataLoader
) -> list[str]:
    features, labels = collect_features(tail, "layer3", test, **QUIET)
    score = mutual_information_score(mutual_information_matrix(features, labels, num_workers=1))
    if gate is not None:
        table = LayerClassGate(tail, "layer3", gate.weight).class_filters()
        table = table.with_selection(gate.weight.detach() > 0.5)
    else:
        first = Subset(train_set, range(min(len(train_set), 20000)))  # one view of each image
        batches = DataLoader(first, batch_size=250)
        table = LayerFilterContribution(tail, "layer3").identify(batches, num_filters=6, **QUIET)
    masked = masking_test(tail, "layer3", table, test, **QUIET)
    return [
        f"{evaluate_classifier(tail, test, **QUIET).accuracy:.4f}",
        f"{score:.4f}",
        "-" if gate is None else f"{gate.density:.3f}",
        f"{float(masked.own.mean()):.3f}",
        f"{100 * masked.loss_of_others:+.2f}",
    ]


# -- cost ----------------------------------------------------------------------------------------


def overhead(repetitions: int = 15) -> None:
    """Time of a gated step over a plain one, in turn; median of the ratios of neighbours."""
    x, y = cifar10.images("train", 256)
    print("| images a step | plain step, ms | gated over plain, median | quartiles |")
    print("|---|---|---|---|")
    for size in (32, 128):
        model = cifar10.pretrained(20).train()
        gate = ClassSpecificGate(10, 64).attach(model, "layer3")
        trainer = GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=1e-3))
        plain, ratios = [], []
        for repetition in range(repetitions + 2):
            seconds = {}
            # The order alternates, so that neither always follows the other.
            for gated in (False, True) if repetition % 2 else (True, False):
                started = time.perf_counter()
                trainer.step(x[:size], y[:size], gated)
                seconds[gated] = time.perf_counter() - started
            if repetition >= 2:
                plain.append(1000 * seconds[False])
                ratios.append(seconds[True] / seconds[False])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {size} | {statistics.median(plain):.0f} | {middle:.3f} | {low:.3f} to {high:.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("public", "fine-tune", "overhead"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=int, default=20000)
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--views", type=int, default=0)
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=TRAININGS)
    arguments = parser.parse_args()
    if not cifar10.available():
        raise SystemExit(f"The data folder {cifar10.DATA.name} is absent; set CLASSFILTERS_DATA.")
    if arguments.public:
        public()
    if arguments.fine_tune:
        fine_tune(arguments)
    if arguments.overhead:
        overhead()


if __name__ == "__main__":
    main()
