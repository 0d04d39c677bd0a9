"""Time of one layer's ablation: this package against Captum's LayerFeatureAblation.

    python -m benchmarks.ablation_speed [--images 8] [--threads 1] [--only resnet20]

Both run on the same images in one process, weights are random, and the largest difference of the
results is printed with the times. Captum's time covers at most `--filters` filters, timed after a
warm-up and scaled to all of them; its cost per filter is constant.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torchvision
from captum.attr import LayerFeatureAblation
from torch import Tensor, nn

from benchmarks.cifar10 import CifarResNet
from captum_classfilters import LayerFilterAblation
from captum_classfilters._internal.suffix import SuffixReplay

CASES: list[tuple[str, Callable[[], nn.Module], int, str]] = [
    ("resnet20", lambda: CifarResNet(20), 32, "layer3"),
    ("resnet20", lambda: CifarResNet(20), 32, "layer2"),
    ("resnet20", lambda: CifarResNet(20), 32, "layer1"),
    ("resnet18", torchvision.models.resnet18, 224, "layer4"),
    ("resnet18", torchvision.models.resnet18, 224, "layer3"),
    ("squeezenet1_1", torchvision.models.squeezenet1_1, 224, "features"),
    ("densenet121", torchvision.models.densenet121, 224, "features.denseblock3"),
]


def measure(
    make: Callable[[], nn.Module], size: int, name: str, images: int, filters: int
) -> tuple[float, float, float, int, str]:
    """Seconds of both, their largest difference relative to the largest drop, K, and the way."""
    torch.manual_seed(0)
    model = make().eval()
    layer, x = model.get_submodule(name), torch.randn(images, 3, size, size)
    target = model(x).argmax(1)
    ours = LayerFilterAblation(model, layer)
    replay = SuffixReplay(model, layer, (x,))  # also the warm-up
    number = replay.num_filters

    start = time.perf_counter()
    scores = ours.filter_scores(ours.attribute(x, target=target))
    own = time.perf_counter() - start

    some = min(filters, number)
    # Filters beyond the first few form one feature, which is left out of the comparison.
    mask = torch.arange(number).clamp(max=some).reshape(1, -1, 1, 1)
    start = time.perf_counter()
    maps: Tensor = LayerFeatureAblation(model, layer).attribute(x, target=target, layer_mask=mask)
    elapsed = time.perf_counter() - start
    passes = min(some + 1, number) + 2  # one evaluation of the layer, one of the model
    captum = elapsed * (number + 2) / passes
    difference = (maps[:, :some].flatten(2)[..., 0] - scores[:, :some]).abs().max()
    return captum, own, float(difference / scores.abs().max()), number, replay.way


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("model layer K way captum_s own_s speedup relative_difference")
    for model, make, size, name in CASES:
        if options.only in model:
            with torch.no_grad():
                captum, own, difference, number, way = measure(
                    make, size, name, options.images, options.filters
                )
            print(
                f"{model} {name} {number} {way.replace(' ', '-')} {captum:.3f} {own:.4f} "
                f"{captum / own:.1f}x {difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
