"""Class-specific gates on handwritten digits, gated against plain training, three seeds.

python -m benchmarks.class_specific_gate               # about a minute
python -m benchmarks.class_specific_gate --information # also the speed of mutual information
"""

import argparse
import time

import torch
from torch import nn

from captum_classfilters import ClassSpecificGate, LayerClassGate, LayerFilterContribution
from captum_classfilters.demo import load_digits, small_cnn
from captum_classfilters.evaluate import (
    masking_test,
    mutual_information_bound,
    mutual_information_matrix,
    mutual_information_score,
)
from captum_classfilters.identify import collect_features
from captum_classfilters.networks import GatedTrainer, GateSchedule, evaluate_classifier

EPOCHS = 90


def trained(seed: int, gated: bool, digits) -> tuple[nn.Module, ClassSpecificGate]:
    torch.manual_seed(seed)
    model = small_cnn()
    gate = ClassSpecificGate(10, 64).attach(model, "filters")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    # A warm-up over all epochs is plain training by the same code.
    schedule = GateSchedule() if gated else GateSchedule(warmup=EPOCHS)
    trainer = GatedTrainer(
        model, gate, optimizer, scheduler=scheduler, regularisation=0.05, schedule=schedule
    )
    trainer.fit(digits.train, epochs=EPOCHS, show_progress=False)
    return model.eval(), gate


def measured(model, gate, gated, digits) -> list[str]:
    features, labels = collect_features(model, "filters", digits.test, show_progress=False)
    score = mutual_information_score(mutual_information_matrix(features, labels))
    if gated:
        table = LayerClassGate(model, "filters", gate.weight).class_filters()
        table = table.with_selection(gate.weight.detach() > 0.5)
    else:
        table = LayerFilterContribution(model, "filters").identify(
            digits.train, num_filters=6, show_progress=False
        )
    result = masking_test(model, "filters", table, digits.test, show_progress=False)
    accuracy = evaluate_classifier(model, digits.test, show_progress=False).accuracy
    return [
        f"{accuracy:.4f}",
        f"{score:.4f}",
        f"{gate.density:.3f}" if gated else "-",
        f"{float(result.own.mean()):.3f}",
        f"{100 * result.loss_of_others:+.2f}",
    ]


def information_speed() -> None:
    noise = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 1000, (50000,), generator=noise)
    features = torch.randn(50000, 8, generator=noise).relu()
    started = time.perf_counter()
    mutual_information_matrix(features, labels, num_workers=2)
    seconds = (time.perf_counter() - started) / 8
    print(
        f"\nMutual information, 1,000 classes, 50,000 images: {seconds:.2f} s a filter on two threads, "
        f"{512 * seconds / 60:.1f} minutes for 512 filters"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--information", action="store_true")
    arguments = parser.parse_args()
    print(
        "| seed, training | accuracy | MIS | density | recall of a masked class | others lose, points |"
    )
    print("|---|---|---|---|---|---|")
    for seed in range(3):
        digits = load_digits(seed)
        for gated in (False, True):
            model, gate = trained(seed, gated, digits)
            cells = " | ".join(measured(model, gate, gated, digits))
            print(f"| {seed}, {'gated' if gated else 'plain'} | {cells} |", flush=True)
    bound = float(mutual_information_bound(digits.test_labels).mean())
    print(f"\nMIS can be {bound:.4f} at most (entropy of a class's indicator).")
    if arguments.information:
        information_speed()


if __name__ == "__main__":
    main()
