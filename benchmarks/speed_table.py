"""How much faster the slow computations are than the straightforward way, side by side in one run.

    python -m benchmarks.speed_table              # or `make bench`: a quarter of an hour on 2 free cores
    python -m benchmarks.speed_table --cpu-time --threads 1   # where other work runs beside it
    python -m benchmarks.speed_table --only resnet20

Straightforward are: a forward pass over all images for each candidate of each step (greedy pruning),
Captum's LayerFeatureAblation (ablation) and scikit-learn's mutual_info_classif called for each class
(mutual information). Each is timed on a part of its work, whose cost is constant, and scaled. The last
column says what could be won at most, were every step of both ways equally quick: multiplications of
the straightforward way over those that must be done: the network once, then for each filter or
candidate what follows the layer, of the next convolution one input channel alone; for mutual
information its time over that of sorting each filter's responses. Operations on single numbers are not
counted, and weigh where little is multiplied.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerFeatureAblation
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cifar10
from benchmarks.shared import (
    QUIET,
    Batches,
    Table,
    count_processor_time,
    in_batches,
    medians,
    parsed,
    parser,
    prepare,
    timed,
)
from captum_classfilters import LayerFilterAblation
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.metrics import mutual_information_matrix
from captum_classfilters.pruning import GreedyFilterPruning, masked_filters

Row = tuple[str, str, float, float, str, float]

# Network, size of its images, layer, the convolutions it feeds, and images at once.
ABLATIONS: list[tuple[str, Callable[[], nn.Module], int, str, list[str], int]] = [
    ("ResNet-20", lambda: cifar10.CifarResNet(20), 32, "layer2", ["layer3.0.conv1"], 64),
    ("ResNet-20", lambda: cifar10.CifarResNet(20), 32, "layer1", ["layer2.0.conv1"], 64),
    *(
        (name, make, 224, "layer3", ["layer4.0.conv1", "layer4.0.downsample.0"], images)
        for name, make, images in (
            ("ResNet-18", torchvision.models.resnet18, 8),
            ("ResNet-50", torchvision.models.resnet50, 2),
        )
    ),
]


def multiplications(model: nn.Module, task: Callable[[], object]) -> dict[str, float]:
    """Multiplications of convolutions and linear layers in a task, by module; all of them as ""."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task()
    counts = {name: sum(parts.values()) for name, parts in counter.get_flop_counts().items()}
    prefix = f"{type(model).__name__}."
    return {"": counts["Global"], **{n.removeprefix(prefix): c for n, c in counts.items()}}


def behind_and_all(
    model: nn.Module, layer: nn.Module, fed: Sequence[str], x: Tensor
) -> tuple[float, float]:
    """Multiplications for a filter removed from a layer, and of the whole model, for a batch."""
    replay = SuffixReplay(model, layer, (x,))
    nothing = replay.mask(torch.zeros(1, replay.num_filters, dtype=torch.bool))
    behind = multiplications(model, lambda: replay.together(nothing))[""]
    counts = multiplications(model, lambda: model(x))
    spared = (1 - 1 / replay.num_filters) * sum(counts[name] for name in fed)
    return behind - spared, counts[""]


# -- greedy pruning ---------------------------------------------------------------------------------


def greedy(options: argparse.Namespace) -> Row:
    """The last block's first convolution of ResNet-20, 64 filters to fewer."""
    model, name = cifar10.pretrained(20), "layer3.2.bn1"
    x, y = cifar10.images("test", options.images)
    few = in_batches(x[: options.plain_images], y[: options.plain_images])
    left, number = options.plain_left, sum(len(labels) for _, labels in few)
    plain, order = timed(lambda: plain_loop(model, name, few, left))
    pruning = GreedyFilterPruning(model, name)
    if pruning.run(few, num_filters=left, **QUIET).order != order:
        raise AssertionError("greedy pruning removes other filters than the plain loop")
    data = in_batches(x, y)
    own, run = timed(lambda: pruning.run(data, num_filters=options.left, **QUIET))
    passes = sum(range(options.left + 1, 65)) * len(x)
    whole = plain / sum(range(left + 1, 65)) / number * passes
    behind, full = behind_and_all(model, model.get_submodule(name), ["layer3.2.conv2"], x[:2])
    most = passes * full / (len(x) * full + sum(run.evaluations) * behind)
    told = f"{run.saving:.0%} of the evaluations spared"
    return f"greedy CAR, 64 to {options.left}, {len(x):,} images", told, whole, own, "", most


@torch.no_grad()
def plain_loop(model: nn.Module, name: str, data: Batches, left: int) -> list[int]:
    """The order of removal by one forward pass over the data for each candidate of each step."""
    kept, order = torch.ones(64, dtype=torch.bool), []
    while int(kept.sum()) > left:
        best: tuple[float, float, int] | None = None
        for candidate in kept.nonzero()[:, 0].tolist():
            mask = kept.clone()
            mask[candidate] = False
            wrong, loss = 0, 0.0
            with masked_filters(model, {name: mask}):
                for images, labels in data:
                    outputs = model(images).double()
                    wrong += int((outputs.argmax(1) != labels).sum())
                    loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
            best = min(best, (wrong, loss, candidate)) if best else (wrong, loss, candidate)
        assert best is not None
        kept[best[2]] = False
        order.append(best[2])
    return order


# -- mutual information -----------------------------------------------------------------------------


def information(options: argparse.Namespace) -> Row:
    """Every pair of 24 filters and ten classes."""
    noise = torch.Generator().manual_seed(0)
    number = min(options.images * 2, 4000)
    labels = torch.arange(number) % 10
    features = torch.randn(number, 24, generator=noise) + 0.1 * labels[:, None]
    some, values = features[:, : options.columns].numpy(), features.double().numpy()
    found: dict[str, np.ndarray] = {}

    def own() -> None:
        found["own"] = mutual_information_matrix(
            features, labels, num_workers=options.threads
        ).numpy()

    def theirs() -> None:
        indicators = [(labels == index).numpy() for index in range(10)]
        found["theirs"] = np.stack(
            [mutual_info_classif(some, each, random_state=0) for each in indicators]
        )

    def sorting() -> None:
        for column in values.T:
            np.argsort(column)

    seconds = medians({"own": own, "theirs": theirs, "sort": sorting}, options.repetitions)
    scaled = seconds["theirs"] * 24 / options.columns
    off = np.abs(found["own"][:, : options.columns] - found["theirs"]).max()
    name = f"mutual information, 24 x 10, {number:,} images"
    return name, "", scaled, seconds["own"], f"{off:.0e}", scaled / seconds["sort"]


# -- ablation ---------------------------------------------------------------------------------------


def ablation(options: argparse.Namespace, number: int) -> Row:
    """One layer's ablation against Captum's; weights are random."""
    label, make, size, name, fed, images = ABLATIONS[number]
    torch.manual_seed(0)
    model = make().eval()
    layer = model.get_submodule(name)
    x = torch.randn(min(images, options.images), 3, size, size)
    with torch.no_grad():
        target = model(x).argmax(1)
    ours, theirs = LayerFilterAblation(model, layer), LayerFeatureAblation(model, layer)
    filters = ours.replay(layer, (x,)).num_filters
    # Filters beyond the first few form one feature, which is left out of the comparison.
    some = min(options.filters, filters)
    mask = torch.arange(filters).clamp(max=some).reshape(1, -1, 1, 1)
    found: dict[str, Tensor] = {}

    def own() -> None:
        found["own"] = ours.filter_scores(ours.attribute(x, target=target))

    @torch.no_grad()
    def captum() -> None:
        found["captum"] = theirs.attribute(x, target=target, layer_mask=mask)

    seconds = medians({"own": own, "captum": captum}, options.repetitions)
    scaled = seconds["captum"] * (filters + 2) / (min(some + 1, filters) + 2)
    scores, maps = found["own"], found["captum"].flatten(2)[..., 0]
    off = float((maps[:, :some] - scores[:, :some]).abs().max() / scores.abs().max())
    behind, full = behind_and_all(model, layer, fed, x[:2])
    most = (filters + 2) * full / (full + filters * behind)
    told = f"a filter takes {behind / full:.0%} of a pass"
    title = f"ablation of {label} `{name}`, {filters} filters, {len(x)} images"
    return title, told, scaled, seconds["own"], f"{off:.0e}", most


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All rows, or those whose name has some words in it."""
    tasks: dict[str, Callable[[], Row]] = {
        "greedy": lambda: greedy(options),
        "information": lambda: information(options),
    }
    for number, (label, _, _, name, *_) in enumerate(ABLATIONS[: options.networks]):
        key = f"{label} {name}".lower().replace("-", "")
        tasks[key] = partial(ablation, options, number)
    for key, task in tasks.items():
        if options.only in key:
            yield task()


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    known = parser(__doc__)
    known.add_argument("--threads", type=int, default=2)
    known.add_argument("--cpu-time", action="store_true", help="processor seconds")
    known.add_argument("--only", default="", help="greedy, information, resnet20 layer1, ...")
    known.add_argument("--repetitions", type=int, default=3)
    known.add_argument("--images", type=int, default=2000, help="of greedy pruning")
    known.add_argument("--left", type=int, default=32, help="filters, of greedy pruning")
    known.add_argument("--plain-images", type=int, default=200, help="of its plain loop")
    known.add_argument("--plain-left", type=int, default=60, help="of its plain loop")
    known.add_argument("--columns", type=int, default=4, help="filters, of scikit-learn's loop")
    known.add_argument("--filters", type=int, default=8, help="of Captum's ablation")
    known.add_argument("--networks", type=int, default=len(ABLATIONS))
    sizes = {"repetitions": 1, "images": 20, "left": 62, "plain_images": 2, "plain_left": 63}
    options = parsed(known, given, columns=1, filters=2, networks=1, **sizes)
    prepare(options.small, cifar10.TEST)
    torch.set_num_threads(options.threads)
    before = time.perf_counter
    if options.cpu_time:
        count_processor_time()
    try:
        kind = "processor seconds" if options.cpu_time else "seconds"
        print(f"{platform.machine()}, torch {torch.__version__}, {options.threads} threads, {kind}")
        table = Table(
            *("work", "", "straightforward s", "own s", "speed-up", "difference", "at most"),
        )
        for name, told, plain, own, off, most in rows(options):
            ratio = f"{plain / own:.1f}x"
            table.row(name, told, f"{plain:.2f}", f"{own:.3f}", ratio, off, f"{most:.1f}x")
    finally:
        time.perf_counter = before


if __name__ == "__main__":
    main()
