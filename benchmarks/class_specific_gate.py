"""Class-specific gates on handwritten digits and MNIST, gated against plain training, three seeds.

    python -m benchmarks.class_specific_gate               # digits: about two minutes on one core
    python -m benchmarks.class_specific_gate --mnist       # MNIST: about eight minutes
    python -m benchmarks.class_specific_gate --adversarial # detection of attacks, digits
    python -m benchmarks.class_specific_gate --information # the speed of mutual information

Digits: the demo's network, 60 epochs of all training images. MNIST: a network of six convolutions, 10 epochs
of 6,000 training images. Weight decay and schedule were chosen on 278 of the training digits of seed 0, and
looked at on 2,500 further training images of MNIST; test images are used for the tables alone. More
weight decay makes plain filters more specific, too, so that plain training is shown with both.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.robust import FGSM, PGD
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.adversarial_detection import adversarial_detection
from benchmarks.shared import (
    QUIET,
    Table,
    made_up,
    mnist,
    parsed,
    parser,
    prepare,
    random_images,
    timed,
)
from captum_classfilters import (
    ClassFilters,
    ClassSpecificGate,
    LayerClassGate,
    LayerFilterContribution,
)
from captum_classfilters.cli.demo import load_digits, small_cnn
from captum_classfilters.gates import (
    GatedTrainer,
    GateSchedule,
    assign_filters,
    filter_correlation,
    masking_test,
)
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    evaluate_classifier,
    mutual_information_bound,
    mutual_information_matrix,
    mutual_information_score,
)


@dataclass(frozen=True)
class Setting:
    """Data, network and training."""

    train: DataLoader
    test: DataLoader
    network: Callable[[], nn.Module]
    epochs: int


def digits_setting(seed: int, epochs: int | None = None) -> Setting:
    if made_up():
        data = DataLoader(TensorDataset(*random_images(None, 1, 8)), batch_size=20)
        return Setting(data, data, small_cnn, epochs or 60)
    digits = load_digits(seed)
    return Setting(digits.train, digits.test, small_cnn, epochs or 60)


def mnist_setting(seed: int, epochs: int | None = None) -> Setting:
    x, y = mnist("train")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))[:6000]  # not shuffled
    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(
        TensorDataset(x[order], y[order]), batch_size=64, shuffle=True, generator=generator
    )
    test = DataLoader(TensorDataset(*mnist("test")), batch_size=500)
    return Setting(train, test, deeper_cnn, epochs or 10)


def deeper_cnn() -> nn.Sequential:
    """Six convolutions, for images of 28 pixels; the last one is ``"filters"``."""

    def block(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    model = nn.Sequential(block(1, 16, 2), block(16, 32, 2), *(block(32, 32) for _ in range(3)))
    model.add_module("filters", block(32, 64))
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(64, 10))
    return model


def trained(
    seed: int, training: str, setting: Setting, weight_decay: float
) -> tuple[nn.Module, ClassSpecificGate]:
    torch.manual_seed(seed)
    model = setting.network()
    gate = ClassSpecificGate(10, 64).attach(model, "filters")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.epochs)
    schedule = {
        # A warm-up over all epochs is plain training by the same code.
        "plain": GateSchedule(warmup=setting.epochs),
        "every third epoch gated": GateSchedule(),
        "both paths in every batch": GateSchedule(unit="joint"),
    }[training]
    trainer = GatedTrainer(
        model, gate, optimizer, scheduler=scheduler, regularization=0.05, schedule=schedule
    )
    trainer.fit(setting.train, epochs=setting.epochs, **QUIET)
    gate.detach()
    return model.eval(), gate


def measured(
    model: nn.Module,
    layer: str,
    gate: ClassSpecificGate | None,
    seen: Iterable[Any],
    test: Iterable[Any],
) -> tuple[list[str], ClassFilters]:
    """Figures on test images, and the filters of each class.

    They are those whose gate is above one half; without a gate, or where none is, the six that
    contribute most to the class's training images.
    """
    features, labels = collect_features(model, layer, test, **QUIET)
    score = mutual_information_score(mutual_information_matrix(features, labels, num_workers=1))
    if gate is not None and bool((gate.weight > 0.5).any()):
        table = LayerClassGate(model, layer, gate.weight).class_filters()
        table = table.with_selection(gate.weight.detach() > 0.5)
    else:
        table = LayerFilterContribution(model, layer).identify(seen, num_filters=6, **QUIET)
    masked = masking_test(model, layer, table, test, **QUIET)
    cells = [
        f"{evaluate_classifier(model, test, **QUIET).accuracy:.4f}",
        f"{score:.4f}",
        "-" if gate is None else f"{gate.density:.3f}",
        f"{float(masked.own.mean()):.3f}",
        f"{100 * masked.loss_of_others:+.2f}",
    ]
    return cells, table


def correlation(model: nn.Module, scores: Tensor) -> tuple[float, float]:
    """Mean absolute cosine of weights, within a class and across."""
    owner = assign_filters(scores)
    weights = dict(model.get_submodule("filters").named_parameters())
    table = filter_correlation(weights["0.weight"])
    same = owner[:, None] == owner[None, :]
    pairs = ~torch.eye(len(owner), dtype=torch.bool)
    return float(table[same & pairs].mean()), float(table[~same].mean())


def compare(settings: list[Setting], runs: list[tuple[str, float]]) -> None:
    """Specificity and accuracy after each training, for each seed's setting."""
    table = Table(
        *("seed, training, weight decay", "accuracy", "MIS", "density", "recall of a masked class"),
        *("others lose, points", "cosine within, across"),
    )
    for seed, setting in enumerate(settings):
        for training, decay in runs:
            model, gate = trained(seed, training, setting, decay)
            used = None if training == "plain" else gate
            cells, found = measured(model, "filters", used, setting.train, setting.test)
            within, across = correlation(model, found.scores)
            table.row(f"{seed}, {training}, {decay:g}", *cells, f"{within:.2f}, {across:.2f}")
    labels = torch.cat([y for _, y in setting.test])
    bound = float(mutual_information_bound(labels).mean())
    print(f"\nMIS can be {bound:.4f} at most (entropy of a class's indicator).")


def adversarial(settings: list[Setting], folds: int) -> None:
    """Detection error of attacked test images, for each seed's setting."""
    loss = nn.CrossEntropyLoss(reduction="none")
    table = Table("seed, training", "attack", "accuracy after", "detection error", "+-", "AUC")
    for seed, setting in enumerate(settings):
        for training in ("plain", "both paths in every batch"):
            model, _ = trained(seed, training, setting, 5e-3)
            fgsm = FGSM(model, loss_func=loss, lower_bound=0.0, upper_bound=1.0)
            pgd = PGD(model, loss_func=loss, lower_bound=0.0, upper_bound=1.0)
            attacks = {
                "FGSM, 0.1": lambda x, y, fgsm=fgsm: fgsm.perturb(x, epsilon=0.1, target=y),
                "PGD, 0.1, 10 steps": lambda x, y, pgd=pgd: pgd.perturb(
                    x, radius=0.1, step_size=0.02, step_num=10, target=y, random_start=True
                ),
            }
            for name, attack in attacks.items():
                found = adversarial_detection(
                    model, "filters", setting.test, attack, folds=folds, **QUIET
                )
                figures = (found.attacked_accuracy, found.error, found.standard_error, found.auc)
                table.row(f"{seed}, {training}", name, *(f"{value:.3f}" for value in figures))


def information_speed(images: int) -> None:
    """Time of the mutual information of filters and 1,000 classes."""
    noise = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 1000, (images,), generator=noise)
    features = torch.randn(images, 8, generator=noise).relu()
    seconds, _ = timed(lambda: mutual_information_matrix(features, labels, num_workers=2))
    table = Table("mutual information, 1,000 classes", "s a filter", "minutes for 512 filters")
    name = f"{images:,} images, two threads"
    table.row(name, f"{seconds / 8:.2f}", f"{512 * seconds / 8 / 60:.1f}")


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables; a small run has one seed, and prints all of them."""
    known = parser(__doc__)
    for name in ("mnist", "adversarial", "information"):
        known.add_argument(f"--{name}", action="store_true")
    known.add_argument("--seeds", type=int, default=3)
    known.add_argument("--epochs", type=int, help="by default 60 on digits, 10 on MNIST")
    known.add_argument("--images", type=int, default=50000, help="for --information")
    known.add_argument("--folds", type=int, default=5, help="for --adversarial")
    small = {"mnist": True, "adversarial": True, "information": True}
    options = parsed(known, given, seeds=1, epochs=1, folds=2, images=2000, **small)
    prepare(options.small, *(["mnist.npz"] if options.mnist else []))
    if options.mnist:
        settings = [mnist_setting(seed, options.epochs) for seed in range(options.seeds)]
        compare(settings, [("plain", 1e-4), ("plain", 5e-3), ("both paths in every batch", 5e-3)])
    digits = [digits_setting(seed, options.epochs) for seed in range(options.seeds)]
    if options.adversarial:
        adversarial(digits, options.folds)
    if options.information:
        information_speed(options.images)
    if options.small or not (options.mnist or options.adversarial or options.information):
        runs = [
            ("plain", 1e-4),
            ("every third epoch gated", 1e-4),
            ("plain", 5e-3),
            ("both paths in every batch", 5e-3),
        ]
        compare(digits, runs)


if __name__ == "__main__":
    main()
