"""Unknown inputs: options chosen on one set of unknown images, judged on the others.

    python -m benchmarks.unknown_inputs_chosen

The "combined" score is put together anew: the number of filters, the percentile, and what the clipped
decomposed head and the likeness weigh beside the energy are those with which the fewest images of one set
pass for known with ResNet-20; each set is the one in turn. The same options stand for ResNet-44. Images
and networks are those of `benchmarks.unknown_inputs`.
"""

import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import cifar10
from benchmarks.shared import Table, parsed, parser, prepare
from benchmarks.unknown_inputs import (
    SETS,
    AsShown,
    Shown,
    detector,
    of_other_classes,
    scores,
    shown,
    table_of,
    unknown_images,
)

NUMBERS, PERCENTILES, WEIGHTS = (5, 10, 20), (0.9, 0.95, 0.98), (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Options:
    """What is chosen: filters of a class, percentile, weights of the decomposed head and the likeness."""

    number: int
    percentile: float
    dice: float
    likeness: float


Parts = dict[str, Tensor]  # scores of each set, and of the known images that judge, as "test"
AllParts = tuple[Parts, Parts, dict[tuple[int, float], Parts]]


def standardized(model: AsShown, known: Shown, sets: Mapping[str, Shown]) -> AllParts:
    """Energy, likeness, and energy of the clipped decomposed head for each number of filters and
    percentile, in standard deviations over the known images."""

    def of(clip: float, score: str, number: int = 10) -> Parts:
        made = detector(model, table_of(model, known, number), known, score=score)

        def seen(images: Shown) -> Tensor:
            clipped = images.features.clamp(max=clip)
            return scores(made, Shown(clipped, images.earlier, images.labels)).double()

        own = seen(known)
        return {
            name: (seen(images) - own.mean()) / own.std(correction=0)
            for name, images in sets.items()
        }

    clips = {p: float(known.features.double().flatten().quantile(p)) for p in PERCENTILES}
    heads = {
        (number, p): of(clips[p], "dice", number)
        for number, p in itertools.product(NUMBERS, PERCENTILES)
    }
    return of(torch.inf, "energy"), of(torch.inf, "likeness"), heads


def rates(parts: AllParts, options: Options) -> dict[str, float]:
    """The share of each set that passes for known when 95 % of the test images do."""
    energy, likeness, heads = parts
    head = heads[options.number, options.percentile]
    combined = {
        name: energy[name] + options.dice * head[name] + options.likeness * likeness[name]
        for name in energy
    }
    level = combined["test"].quantile(0.95)
    return {name: float((combined[name] <= level).double().mean()) for name in SETS}


def check(
    model: AsShown, known: Shown, sets: Mapping[str, Shown],
    parts: AllParts,
) -> None:  # fmt: skip
    """The score put together here is the detector's at its weights."""
    made = detector(model, table_of(model, known, 10), known, percentile=0.9)
    energy, likeness, heads = parts
    ours = energy["test"] + 0.5 * heads[10, 0.9]["test"] + 0.5 * likeness["test"]
    torch.testing.assert_close(ours, scores(made, sets["test"]).double(), rtol=1e-3, atol=1e-3)


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    options = parser(__doc__)
    options.add_argument("--train", type=int, default=8000, help="known images to fit")
    options.add_argument("--test", type=int, default=10000, help="known images to judge by")
    options.add_argument("--unknown", type=int, default=2000, help="images of each unknown set")
    args = parsed(options, given, train=30, test=30, unknown=30)
    prepare(args.small, cifar10.TEST, cifar10.TRAIN, "mnist.npz", "tiny_imagenet_boxes")
    torch.set_num_threads(1)
    logging.getLogger("captum_classfilters").setLevel(logging.ERROR)
    images = unknown_images(args.unknown)
    found: dict[tuple[str, int], AllParts] = {}
    for depth in (20, 44):
        network = cifar10.pretrained(depth)
        model = AsShown(network.linear).eval()
        known = shown(network, "layer2.0", *cifar10.images("train", args.train))
        test = shown(network, "layer2.0", *cifar10.images("test", args.test))
        unknown = {name: shown(network, "layer2.0", x) for name, x in images.items()}
        for kind, sets in (("all", unknown), ("other classes", of_other_classes(unknown))):
            with_test = {**sets, "test": test}
            found[kind, depth] = standardized(model, known, with_test)
            check(model, known, with_test, found[kind, depth])
    every = [Options(*one) for one in itertools.product(NUMBERS, PERCENTILES, WEIGHTS, WEIGHTS)]
    for kind in ("all", "other classes"):
        print_chosen(kind, {depth: found[kind, depth] for depth in (20, 44)}, every)


def print_chosen(
    kind: str,
    parts: Mapping[int, AllParts],
    every: list[Options],
) -> None:
    """A table of the shares that pass for known, the set that options were chosen on in brackets."""
    table = Table(
        "ResNet", f"chosen on ({kind})", "filters", "percentile", "weight of the decomposed head",
        "of likeness", *SETS, "mean of the others", "energy's",
    )  # fmt: skip
    best = {one: min(every, key=lambda o: rates(parts[20], o)[one]) for one in SETS}
    for depth, (one, chosen) in itertools.product(parts, best.items()):
        own, base = rates(parts[depth], chosen), rates(parts[depth], Options(10, 0.9, 0.0, 0.0))
        others = [name for name in SETS if name != one]
        means = [sum(of[name] for name in others) / len(others) for of in (own, base)]
        cells = [f"({own[name]:.3f})" if name == one else f"{own[name]:.3f}" for name in SETS]
        table.row(
            depth, one, chosen.number, chosen.percentile, chosen.dice, chosen.likeness, *cells,
            *(f"{mean:.3f}" for mean in means),
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
