"""Time of one layer's ablation: this package against Captum's LayerFeatureAblation.

    python -m benchmarks.ablation_speed [--images 8] [--threads 1] [--only resnet20]

Both run on the same images in one process, in turn, beside a bare forward pass; weights are random, times
are medians, and the largest difference of the results is printed with them. Captum's time covers at
most `--filters` filters and is scaled to all of them; its cost per filter is constant. What lies
before the layer must run once, so that no method takes less than about one forward pass where the
layer is near the end.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from captum.attr import LayerFeatureAblation
from torch import Tensor, nn

from benchmarks.cifar10 import CifarResNet
from captum_classfilters import LayerFilterAblation
from captum_classfilters._core.replay.suffix_replay import SuffixReplay

CASES: list[tuple[str, Callable[[], nn.Module], int, str]] = [
    ("resnet20", lambda: CifarResNet(20), 32, "layer3"),
    ("resnet20", lambda: CifarResNet(20), 32, "layer2"),
    ("resnet20", lambda: CifarResNet(20), 32, "layer1"),
    ("resnet18", torchvision.models.resnet18, 224, "layer4"),
    ("resnet18", torchvision.models.resnet18, 224, "layer3"),
    ("squeezenet1_1", torchvision.models.squeezenet1_1, 224, "features"),
    ("densenet121", torchvision.models.densenet121, 224, "features.denseblock3"),
]


@dataclass
class Row:
    """Median seconds, and how far the two results are apart relative to the largest drop."""

    captum: float
    own: float
    forward: float
    difference: float
    num_filters: int
    way: str


def measure(
    make: Callable[[], nn.Module], size: int, name: str, images: int, filters: int, repeats: int
) -> Row:
    """One layer's ablation and a bare forward pass, in turn, after a warm-up."""
    torch.manual_seed(0)
    model = make().eval()
    layer, x = model.get_submodule(name), torch.randn(images, 3, size, size)
    target = model(x).argmax(1)
    ours, theirs = LayerFilterAblation(model, layer), LayerFeatureAblation(model, layer)
    replay = SuffixReplay(model, layer, (x,))
    number = replay.num_filters
    some = min(filters, number)
    # Filters beyond the first few form one feature, which is left out of the comparison.
    mask = torch.arange(number).clamp(max=some).reshape(1, -1, 1, 1)
    ways: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: model(x),
        "own": lambda: ours.filter_scores(ours.attribute(x, target=target)),
        "captum": lambda: theirs.attribute(x, target=target, layer_mask=mask),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results = {}
    for _ in range(repeats):
        for way, run in ways.items():
            start = time.perf_counter()
            results[way] = run()
            seconds[way].append(time.perf_counter() - start)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    passes = min(some + 1, number) + 2  # one evaluation of the layer, one of the model
    scores, maps = results["own"], results["captum"]
    difference = (maps[:, :some].flatten(2)[..., 0] - scores[:, :some]).abs().max()
    return Row(
        captum=median["captum"] * (number + 2) / passes,
        own=median["own"],
        forward=median["forward"],
        difference=float(difference / scores.abs().max()),
        num_filters=number,
        way=replay.way,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{'model':14s} {'layer':21s} {'K':>4s} {'way':12s} {'captum s':>9s} {'own s':>8s} "
        f"{'speed-up':>8s} {'forward passes':>14s} difference"
    )
    for model, make, size, name in CASES:
        if options.only in model:
            with torch.no_grad():
                row = measure(make, size, name, options.images, options.filters, options.repeats)
            print(
                f"{model:14s} {name:21s} {row.num_filters:4d} {row.way:12s} {row.captum:9.3f} "
                f"{row.own:8.4f} {row.captum / row.own:7.1f}x {row.own / row.forward:14.2f} "
                f"{row.difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
