"""Are deep depthwise filters general? How much they tell of the class, beside other convolutions.

    python -m benchmarks.depthwise_specificity [--cache FOLDER]

The Master Key Filters Hypothesis (Babaiee et al., AAAI 2025, https://arxiv.org/abs/2412.16751) says that
depthwise filters stay general at any depth. Asked here of the filters' responses: a filter's strongest
answer to each image, taken behind its normalization (a ReLU changes nothing that orders images, but for
negative ones), and the share of its variance that lies between classes. Means over a layer's filters; beside
them the same with shuffled labels (mean of 20), and the share of filters with a q value of .05 or less,
Benjamini and Hochberg's, of p values among all shuffled ones of their layer.

EfficientNet-Lite0 and SqueezeNet: 1,246 public photographs of ImageNet in eight groups of classes (dogs,
birds, food ...). ResNet-20, 32 and 44: 2,000 test images of CIFAR-10, ten classes. A depthwise filter reads
one channel, so that what it adds is known channel by channel: the last column is the mean difference to
that channel's share, with half the width of its 95 % interval by Student's distribution.
Needs the extra `benchmarks`.
"""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import cifar10
from benchmarks.shared import (
    DATA,
    QUIET,
    Batches,
    Table,
    efficientnet,
    efficientnet_normalized,
    in_batches,
    parsed,
    parser,
    prepare,
    random_images,
    squeezenet,
)
from benchmarks.shortcuts import FOLDER, MEAN, STD, pictures, tensor
from captum_classfilters.identify import false_discovery_adjusted, unit_scores
from captum_classfilters.metrics import class_means

# Ranges of ImageNet's classes, both ends included.
GROUPS = {
    "fish": ((0, 6), (389, 397)),
    "bird": ((7, 24), (80, 100), (127, 146)),
    "reptile or amphibian": ((25, 68),),
    "arthropod": ((69, 79), (118, 126), (300, 326)),
    "dog": ((151, 268),),
    "other mammal": ((101, 106), (147, 150), (269, 299), (330, 388)),
    "food": ((924, 969),),
    "artifact": ((398, 923),),
}
SHUFFLED = 20
EXPANDING, DEPTHWISE, PROJECTING = "pointwise, expanding", "depthwise", "pointwise, projecting"
Layers = dict[str, str]  # from a layer's name to the kind of its filters
Known = tuple[nn.Module, Layers, DataLoader[tuple[Tensor, Tensor]] | Batches]


def main(given: Sequence[str] | None = None) -> None:
    """Print a table of layers, and one of what depthwise filters and projections add."""
    known = parser(__doc__)
    known.add_argument(
        "--cache", metavar="FOLDER", help="where responses are kept, and found again"
    )
    known.add_argument("--networks", nargs="+", default=list(NETWORKS)[:-1], choices=list(NETWORKS))
    options = parsed(known, given, networks=["small"])
    prepare(options.small, FOLDER, cifar10.TEST)
    titles = ("between classes", "shuffled", "q <= .05", "more than what it reads")
    shown = Table("network", "filters", "depth", "layer", *titles)
    for name in options.networks:
        layers, responses, labels = responses_of(name, options.cache)
        before = torch.zeros(0)
        for place, (layer, kind) in enumerate(layers.items(), 1):
            told, null = specificity(responses[layer], labels)
            p_values = (1 + len(null) - torch.searchsorted(null, told)) / (1 + len(null))
            found = (false_discovery_adjusted(p_values) <= 0.05).double()
            numbers = [f"{values.mean():.3f}" for values in (told, null, found)]
            more = with_interval(told - before) if kind == DEPTHWISE and len(before) else ""
            shown.row(name, kind, f"{place / len(layers):.2f}", layer, *numbers, more)
            before = told if kind == EXPANDING else torch.zeros(0)


def groups() -> list[int]:
    """The group of each public photograph, -1 where it is in none."""
    with open(DATA / FOLDER / "labels.csv") as file:
        classes = [int(row["class_index"]) for row in csv.DictReader(file)]
    spans = [(g, low, high) for g, own in enumerate(GROUPS.values()) for low, high in own]
    return [next((g for g, low, high in spans if low <= c <= high), -1) for c in classes]


class Photographs(Dataset[tuple[Tensor, Tensor]]):
    """The public photographs that have a group, normalized when they are asked for."""

    def __init__(self, normalize: Callable[[Tensor], Tensor]) -> None:
        known = zip(pictures()[0], groups(), strict=True)
        self.pictures, self.labels = zip(*(pair for pair in known if pair[1] >= 0), strict=True)
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.normalize(tensor(self.pictures[index])[None])[0]
        return image, torch.tensor(self.labels[index])


# -- networks: the model, its layers with their kinds, and data ---------------------------------------


def efficientnet_layers() -> Known:
    """EfficientNet-Lite0, layers behind their normalization."""
    model = efficientnet()
    kinds = {"_bn0": EXPANDING, "_bn1": DEPTHWISE, "_bn2": PROJECTING}
    layers = {
        name: kinds[name.rsplit(".", 1)[1]]
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith("_blocks")
    }
    return model, layers, DataLoader(Photographs(efficientnet_normalized), batch_size=10)


def squeezenet_layers() -> Known:
    """SqueezeNet 1.1, which has no normalization."""
    model = squeezenet()
    kinds = {"squeeze": "1x1, squeezing", "expand1x1": "1x1", "expand3x3": "3x3"}
    layers = {
        name: kinds[name.rsplit(".", 1)[1]]
        for name, _ in model.named_modules()
        if name.rsplit(".", 1)[-1] in kinds
    }
    return model, layers, DataLoader(Photographs(lambda x: (x - MEAN) / STD), batch_size=10)


def resnet(depth: int) -> Known:
    """A public CIFAR ResNet."""
    model = cifar10.pretrained(depth)
    layers = {
        name: "3x3"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and "." in name
    }
    return model, layers, in_batches(*cifar10.images("test", 2000))


def small() -> Known:
    """A random network, for a small run."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("expand", nn.Conv2d(3, 8, 1))
    model.add_module("depthwise", nn.Conv2d(8, 8, 3, groups=8))
    model.add_module("project", nn.Conv2d(8, 4, 1))
    layers = {"expand": EXPANDING, "depthwise": DEPTHWISE, "project": PROJECTING}
    return model.eval(), layers, in_batches(*random_images(30, 3, 12, 8), 10)


NETWORKS: dict[str, Callable[[], Known]] = {
    "EfficientNet-Lite0": efficientnet_layers,
    "SqueezeNet 1.1": squeezenet_layers,
    **{f"ResNet-{depth}": partial(resnet, depth) for depth in (20, 32, 44)},
    "small": small,
}


# -- what is measured ---------------------------------------------------------------------------------


def responses_of(name: str, folder: str | None) -> tuple[Layers, dict[str, Tensor], Tensor]:
    """A network's layers, each filter's strongest answer to each image (N, K), and labels."""
    model, layers, data = NETWORKS[name]()
    path = Path(folder or "") / f"specificity {name}.safetensors"
    if folder and path.exists():
        kept = load_file(path)
        return layers, kept, kept.pop("labels")
    found, labels = unit_scores(model, list(layers), data, aggregate="max", **QUIET)
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**found, "labels": labels}, path)
    return layers, found, labels


def specificity(responses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each filter's variance between classes (K,), and those of shuffled labels, sorted."""
    values = responses.double() - responses.double().mean(0)
    counts = labels.bincount().double()
    total = values.square().sum(0).clamp_min(1e-30)
    generator = torch.Generator().manual_seed(0)

    def share(of: Tensor) -> Tensor:
        return counts @ class_means(values, of).square() / total

    orders = [torch.randperm(len(labels), generator=generator) for _ in range(SHUFFLED)]
    null = torch.cat([share(labels[order]) for order in orders])
    return share(labels), null.sort().values


def with_interval(values: Tensor) -> str:
    """Mean and half the width of its 95 % interval."""
    half = student.ppf(0.975, len(values) - 1) * float(values.std()) / len(values) ** 0.5
    return f"{float(values.mean()):+.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
