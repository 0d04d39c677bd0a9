"""Speed, side by side in one run: medians of alternating repetitions, and their ratios.

    python -m benchmarks.speed            # a few minutes on 2 free cores
    python -m benchmarks.speed --images 2000 --repetitions 3

Identification is compared with a bare forward pass over the same loader, per-image contributions with
Captum's LayerFeatureAblation and IntegratedGradients. Without the data folder, images and weights are
random; times hardly depend on them.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from captum.attr import IntegratedGradients, LayerFeatureAblation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import cifar10
from captum_classfilters import (
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)


def measured(tasks: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each task; the tasks take turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repetitions + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if repetition:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def identification(model: nn.Module, loader: DataLoader, repetitions: int) -> None:
    def run(*methods) -> Callable[[], object]:
        return lambda: identify_class_filters(list(methods), loader, show_progress=False)

    @torch.no_grad()
    def bare() -> None:
        for images, _ in loader:
            model(images)

    def votes(layer):
        return LayerFilterFrequency(model, layer)

    def contributions(layer):
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
    seconds = measured(tasks, repetitions)
    total = len(loader.dataset)
    print(f"\n| identification of {total:,} images, ResNet-20 | seconds | of a bare pass |")
    print("|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / seconds['bare forward pass']:.3f}x |")


def explanation(model: nn.Module, images: torch.Tensor, labels, repetitions: int) -> None:
    method = LayerFilterContribution(model, "layer3")
    ablation = LayerFeatureAblation(model, model.layer3)
    integrated = IntegratedGradients(model)
    mask = torch.arange(64).reshape(1, 64, 1, 1)
    ours = method.filter_scores(method.attribute(images, target=labels))
    theirs = ablation.attribute(images, target=labels, layer_mask=mask)[:, :, 0, 0]
    tasks = {
        "LayerFilterContribution": lambda: method.attribute(images, target=labels),
        "bare forward pass": lambda: bare(),
        "LayerFeatureAblation, one filter an evaluation": lambda: ablation.attribute(
            images, target=labels, layer_mask=mask
        ),
        "IntegratedGradients, 50 steps": lambda: integrated.attribute(images, target=labels),
        "IntegratedGradients, 50 steps in chunks of the batch": lambda: integrated.attribute(
            images, target=labels, internal_batch_size=len(images)
        ),
    }

    @torch.no_grad()
    def bare() -> None:
        model(images)

    seconds = measured(tasks, repetitions)
    base = seconds["LayerFilterContribution"]
    print(f"\n| {len(images)} images at once, 64 filters of layer3 | ms an image | against ours |")
    print("|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1000 * value / len(images):.3f} | {value / base:.1f}x |")
    print(f"Largest difference to LayerFeatureAblation: {float((ours - theirs).abs().max()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if cifar10.available():
        model = cifar10.pretrained(20)
        images, labels = cifar10.images("test", arguments.images)
    else:
        print("The data folder is absent: random images and weights.")
        torch.manual_seed(0)
        model = cifar10.CifarResNet(20).eval()
        images = torch.randn(arguments.images, 3, 32, 32)
        labels = torch.randint(0, 10, (arguments.images,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=250)
    identification(model, loader, arguments.repetitions)
    for number in (1, 8, 64):
        explanation(model, images[:number], labels[:number], arguments.repetitions)
    print(
        "\nThe physical limit of both is one forward pass: identification and exact contributions add "
        "means over positions, a sort of the filters, and K products for each image."
    )


if __name__ == "__main__":
    main()
