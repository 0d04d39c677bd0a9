r"""Shapley values of a ResNet-20's filters: evaluations beside Captum's, and what removing by them does.

    python -m benchmarks.filter_shapley                     # both parts, about 20 minutes on one core
    python -m benchmarks.filter_shapley --part evaluations
    python -m benchmarks.filter_shapley --part removal

Evaluations: runs of the model for an image until half of each value's 95 % interval is at most a twentieth
of the image's largest value. Captum's `ShapleyValueSampling` averages what filters gain over random
orders, with K runs for an order; how many orders it needs follows from the spread over some
orders, run as sets of filters. Removal: class tables on training images, filters removed from each
class's test images in their order; the area under the class's probability, and under what its filters
alone keep.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import cifar10
from benchmarks.shared import QUIET, Table, made_up, parsed, parser, prepare, timed
from captum_classfilters import (
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerFilterShapley,
)
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.attr.filter_removal import Score, score_reader
from captum_classfilters.metrics import class_curves

CASES: tuple[tuple[str, Score], ...] = (
    ("layer3", "logit"), ("layer3", "log_probability"), ("layer2", "logit"),
)  # fmt: skip
TOLERANCE = 0.05


def main(given: Sequence[str] | None = None) -> None:
    """Print a table of each part."""
    options = parser(__doc__)
    options.add_argument("--part", choices=list(PARTS), help="by default both")
    options.add_argument("--images", type=int, default=8)
    options.add_argument("--orders", type=int, default=60)
    options.add_argument("--most", type=int, default=40000, help="evaluations of ours")
    options.add_argument("--train", type=int, default=1000)
    options.add_argument("--test", type=int, default=1000)
    sizes = {"images": 2, "orders": 3, "most": 300, "train": 20, "test": 20}
    arguments = parsed(options, given, **sizes)
    prepare(arguments.small, cifar10.TEST, cifar10.TRAIN)
    torch.set_num_threads(1)
    for part in [arguments.part] if arguments.part else PARTS:
        PARTS[part](arguments)


# -- evaluations ------------------------------------------------------------------------------------


def evaluations_part(arguments: argparse.Namespace) -> None:
    """How many runs both ways take for an image, medians over the images."""
    model = cifar10.pretrained()
    x, y = cifar10.images("test")
    places = torch.linspace(0, len(x) - 1, arguments.images).long()
    x, y = x[places], y[places]
    table = Table("layer", "score", "K", "Captum's", "ours", "ratio", "largest difference")
    for layer, score in CASES:
        sampled, error, largest = by_orders(model, layer, score, x, y, arguments.orders)
        number = error.shape[1]
        orders = (error / (TOLERANCE * largest[:, None])).amax(1).square().clamp(min=1).ceil()
        found, ours = by_sets(model, layer, score, x, y, arguments.most)
        off = (sampled - found).abs().amax(1) / largest
        captum = float((number * orders + 1).median())
        median = float(ours.median())
        table.row(
            f"`{layer}`", score, number, f"{captum:,.0f}", f"{median:,.0f}",
            f"{captum / median:.0f}", f"{float(off.median()):.3f}",
        )  # fmt: skip


def by_orders(
    model: torch.nn.Module, layer: str, score: Score, x: Tensor, y: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean gains over random orders (N, K), half the width of one order's interval, and each image's
    largest value."""
    method = LayerFilterAblation(model, layer)
    with torch.no_grad():
        replay = method.replay(model.get_submodule(layer), (x,))
        read = score_reader(replay, y, score)
        generator, filters = torch.Generator().manual_seed(1), replay.num_filters
        gains = torch.empty(number, filters, len(x), dtype=torch.float64)
        for row in range(number):
            order = torch.randperm(filters, generator=generator)
            comes = order.argsort()
            there = comes[None] < torch.arange(filters + 1)[:, None]  # after 0 to K filters
            parts = replay.in_parts(~there)
            worth = torch.stack([read(out) for _, outs in parts for out in outs]).double()
            gains[row, order] = worth[1:] - worth[:-1]
    mean = gains.mean(0).T
    return mean, 1.96 * gains.std(0).T, mean.abs().amax(1)


def by_sets(
    model: torch.nn.Module, layer: str, score: Score, x: Tensor, y: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Our values (N, K), and the number of runs for each image (N,)."""
    counted: list[int] = []
    plain = SuffixReplay.in_parts

    def counting(
        replay: SuffixReplay, removed: Tensor, perturbations_per_eval: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        counted[-1] += len(removed)
        return plain(replay, removed, perturbations_per_eval)

    method = LayerFilterShapley(
        model, layer, score=score, tolerance=TOLERANCE, max_evaluations=most
    )
    values = []
    with patch.object(SuffixReplay, "in_parts", counting):
        for image, label in zip(x.split(1), y.tolist(), strict=True):
            counted.append(1)
            values.append(method.filter_scores(method.attribute(image, target=label)))
    return torch.cat(values).double(), torch.tensor(counted)


# -- removal ----------------------------------------------------------------------------------------


def removal_part(arguments: argparse.Namespace) -> None:
    """Areas under curves: how fast a class's probability falls, and how much its filters keep."""
    model = cifar10.pretrained()
    train = cifar10.loader("train", arguments.train)
    test = cifar10.loader("test", arguments.test)
    table = Table("layer", "table", "filters removed", "filters alone", "seconds")
    for layer in ("layer3",) if made_up() else ("layer3", "layer2"):
        contribution = LayerFilterContribution(model, layer)
        filters = contribution.identify(train, **QUIET).num_filters
        options: dict[str, Any] = {"tolerance": None, "max_evaluations": 4 * filters}
        methods = {
            "frequency": LayerFilterFrequency(model, layer),
            "contribution": contribution,
            "ablation, logit": LayerFilterAblation(model, layer),
            "ablation, log-probability": LayerFilterAblation(model, layer, score="log_probability"),
            "Shapley, logit": LayerFilterShapley(model, layer, **options),
            "Shapley, log-probability": LayerFilterShapley(
                model, layer, score="log_probability", **options
            ),
        }  # fmt: skip
        seconds, tables = {}, {}
        for name, method in methods.items():
            seconds[name], tables[name] = timed(partial(method.identify, train, **QUIET))
        numbers = None if not made_up() else [1, 2]
        curves = class_curves(
            model, layer, tables, test, measure="probability", num_filters=numbers, **QUIET
        )
        for name in (*methods, "random"):
            low, high = (
                float(areas[name].mean())
                for areas in (curves.necessity_area, curves.sufficiency_area)
            )
            took = f"{seconds[name]:.1f}" if name in seconds else "-"
            table.row(f"`{layer}`", name, f"{low:.4f}", f"{high:.4f}", took)


PARTS = {"evaluations": evaluations_part, "removal": removal_part}


if __name__ == "__main__":
    main()
