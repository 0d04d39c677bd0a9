"""Speed, side by side in one run: medians of alternating repetitions, and their ratios.

    python -m benchmarks.speed            # a few minutes on 2 free cores
    python -m benchmarks.speed --images 2000 --repetitions 3

Identification is compared with a bare forward pass over the same loader, per-image contributions with
Captum's LayerFeatureAblation and IntegratedGradients.
"""

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.attr import IntegratedGradients, LayerFeatureAblation
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import QUIET, Batches, Table, in_batches, medians, parsed, parser, prepare
from captum_classfilters import (
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)


def identification(model: nn.Module, data: Batches, repetitions: int) -> None:
    """Print times of one pass for all methods and layers beside those of a bare pass."""

    def run(*methods: Any) -> Callable[[], object]:
        return lambda: identify_class_filters(list(methods), data, **QUIET)

    @torch.no_grad()
    def bare() -> None:
        for images, _ in data:
            model(images)

    def votes(layer: str) -> Any:
        return LayerFilterFrequency(model, layer)

    def contributions(layer: str) -> Any:
        return LayerFilterContribution(model, layer)

    tasks = {
        "bare forward pass": bare,
        "frequency at layer2 and layer3, contribution at layer3": run(
            votes("layer2"), votes("layer3"), contributions("layer3")
        ),
        "frequency and contribution at layer3 and layer3.2": run(
            votes("layer3"),
            votes("layer3.2"),
            contributions("layer3"),
            contributions("layer3.2"),
        ),
        "frequency and contribution at layer2 and layer3": run(
            votes("layer2"), votes("layer3"), contributions("layer2"), contributions("layer3")
        ),
    }
    seconds = medians(tasks, repetitions)
    total = sum(len(labels) for _, labels in data)
    table = Table(f"identification of {total:,} images, ResNet-20", "seconds", "of a bare pass")
    for name, value in seconds.items():
        table.row(name, f"{value:.2f}", f"{value / seconds['bare forward pass']:.3f}x")


def explanation(
    model: cifar10.CifarResNet, images: Tensor, labels: Tensor, repetitions: int
) -> None:
    """Print times of the contributions of all filters beside those of Captum's methods."""
    method = LayerFilterContribution(model, "layer3")
    ablation = LayerFeatureAblation(model, model.layer3)
    integrated = IntegratedGradients(model)
    mask = torch.arange(64).reshape(1, 64, 1, 1)
    ours = method.filter_scores(method.attribute(images, target=labels))
    theirs = ablation.attribute(images, target=labels, layer_mask=mask)[:, :, 0, 0]

    @torch.no_grad()
    def bare() -> None:
        model(images)

    tasks: dict[str, Callable[[], object]] = {
        "LayerFilterContribution": lambda: method.attribute(images, target=labels),
        "bare forward pass": bare,
        "LayerFeatureAblation, one filter an evaluation": lambda: ablation.attribute(
            images, target=labels, layer_mask=mask
        ),
        "IntegratedGradients, 50 steps": lambda: integrated.attribute(images, target=labels),
        "IntegratedGradients, 50 steps in chunks of the batch": lambda: integrated.attribute(
            images, target=labels, internal_batch_size=len(images)
        ),
    }

    seconds = medians(tasks, repetitions)
    base = seconds["LayerFilterContribution"]
    table = Table(
        f"{len(images)} images at once, 64 filters of layer3", "ms an image", "against ours"
    )
    for name, value in seconds.items():
        table.row(name, f"{1000 * value / len(images):.3f}", f"{value / base:.1f}x")
    print(f"Largest difference to LayerFeatureAblation: {float((ours - theirs).abs().max()):.1e}")


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=10000)
    known.add_argument("--repetitions", type=int, default=5)
    known.add_argument("--at-once", type=int, nargs="+", default=(1, 8, 64))
    options = parsed(known, given, images=20, repetitions=1, at_once=(1,))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    prepare(options.small, cifar10.TEST)
    model = cifar10.pretrained(20)
    images, labels = cifar10.images("test", options.images)
    identification(model, in_batches(images, labels, 250), options.repetitions)
    for number in options.at_once:
        explanation(model, images[:number], labels[:number], options.repetitions)
    print(
        "\nThe physical limit of both is one forward pass: identification and exact contributions add "
        "means over positions, a sort of the filters, and K products for each image."
    )


if __name__ == "__main__":
    main()
