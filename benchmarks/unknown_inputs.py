"""Unknown inputs told by one table of class filters: share of unknown images that pass for known ones.

    python -m benchmarks.unknown_inputs

Known images are CIFAR-10's test split, unknown ones digits, photographs of Tiny-ImageNet and ImageNet cut
square, all resized to 32x32, and noise. Each network runs once over each set; detectors get what it
showed. The number of filters and the percentile of "combined" are chosen on the digits with ResNet-20
and kept for all else. The scores stand once more without the photographs of CIFAR-10's own classes, which
are not unknown. Where pytorch-ood is installed, its DICE is compared, and its other
detectors stand beside them (PYTHONPATH may name it).
"""

import argparse
import csv
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import (
    DATA,
    QUIET,
    Table,
    count_processor_time,
    made_up,
    medians,
    mnist,
    parsed,
    parser,
    prepare,
)
from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters.answers import ClassFilterOOD
from captum_classfilters.answers.unknown_inputs import Toward
from captum_classfilters.identify import unit_scores

SETS = ("digits", "Tiny-ImageNet", "ImageNet", "noise")
CHOSEN_ON = "digits"
FOLDERS = {"Tiny-ImageNet": "tiny_imagenet_boxes", "ImageNet": "imagenet_val1300"}
# ImageNet's classes that CIFAR-10 has, too: birds, frogs, dogs, cats, a horse, what looks like deer ...
_ANIMALS = [*range(7, 25), *range(80, 101), *range(127, 147), *range(30, 33), *range(151, 269)]
_ANIMALS += [*range(281, 286), 339, *range(351, 354)]
# ... cars and trucks, ships and boats, aircraft.
_VEHICLES = [407, 436, 468, 511, 555, 569, 609, 627, 656, 661, 675, 717, 734, 751, 817, 864, 867]
_VEHICLES += [403, 472, 484, 510, 554, 625, 628, 724, 780, 814, 833, 871, 913, 914, 404, 895]
ALSO_KNOWN = frozenset(_ANIMALS + _VEHICLES)


@dataclass(frozen=True)
class Shown:
    """What a network showed of a set of images: means of filters at the head and further down."""

    features: Tensor
    earlier: Tensor
    labels: Tensor


class AsShown(nn.Module):
    """The end of a network, for what it showed before: a head, and a layer that passes by."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.earlier, self.features, self.head = nn.Identity(), nn.Identity(), head

    def forward(self, features: Tensor, earlier: Tensor) -> Tensor:
        """Logits of features."""
        self.earlier(earlier)
        return self.head(self.features(features))


# -- images ------------------------------------------------------------------------------------------


def normalized(pixels: Tensor) -> Tensor:
    """Pixels (N, 3, 32, 32) in [0, 1] as the networks take them."""
    return (pixels - cifar10.MEAN) / cifar10.STD


def digits(number: int) -> Tensor:
    """Digits of MNIST's test split, gray, resized to 32x32."""
    x, _ = mnist("test")
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:number])
    larger = F.interpolate(x[chosen], size=32, mode="bilinear", antialias=True)
    return normalized(larger.expand(-1, 3, -1, -1))


def photographs(folder: str, number: int) -> Tensor:
    """The largest square around the center of each photograph, resized to 32x32."""
    if made_up():
        return cifar10.images("test", number)[0] * 0.5
    return normalized(torch.stack([_square(file) for file in _files(folder)[:number]]))


def _files(folder: str) -> list[Path]:
    return sorted((DATA / folder).rglob("*.[jJ][pP]*[gG]"))


def of_other_classes(unknown: Mapping[str, Shown]) -> dict[str, Shown]:
    """The sets without the photographs of classes that the networks know."""
    found = dict(unknown)
    for name, folder in {} if made_up() else FOLDERS.items():
        (table,) = (DATA / folder).glob("*.csv")
        with open(table, newline="") as file:
            classes = {
                Path(row["file"]).name: int(row["class_index"]) for row in csv.DictReader(file)
            }
        files = _files(folder)[: len(unknown[name].labels)]
        other = torch.tensor([classes[file.name] not in ALSO_KNOWN for file in files])
        of = unknown[name]
        found[name] = Shown(of.features[other], of.earlier[other], of.labels[other])
    return found


def _square(file: Path) -> Tensor:
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.crop(box).resize((32, 32), Image.Resampling.BILINEAR)).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def noise(number: int) -> Tensor:
    """Half of the images with uniform, half with normal pixels."""
    generator = torch.Generator().manual_seed(0)
    shape = (number // 2, 3, 32, 32)
    uniform = torch.rand(shape, generator=generator)
    normal = (torch.randn(shape, generator=generator) / 4 + 0.5).clamp(0, 1)
    return normalized(torch.cat([uniform, normal]))


def unknown_images(number: int) -> dict[str, Tensor]:
    """The sets of unknown images."""
    found = (
        digits(number),
        *(photographs(folder, number) for folder in FOLDERS.values()),
        noise(number),
    )
    return dict(zip(SETS, found, strict=True))


# -- a network's part --------------------------------------------------------------------------------


def shown(model: nn.Module, earlier: str, x: Tensor, y: Tensor | None = None) -> Shown:
    """What a network shows of images."""
    labels = torch.zeros(len(x), dtype=torch.long) if y is None else y
    data = list(zip(x.split(250), labels.split(250), strict=True))
    means, _ = unit_scores(model, ["layer3", earlier], data, **QUIET)
    return Shown(means["layer3"], means[earlier], labels)


def loader(images: Shown) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """What was shown as a loader."""
    return [((images.features, images.earlier), images.labels)]


def table_of(model: AsShown, known: Shown, num_filters: int) -> ClassFilters:
    """The class filters by contribution."""
    method = LayerFilterContribution(model, "features")
    return method.identify(loader(known), num_filters=num_filters, unpack=_as_is, **QUIET)


def _as_is(batch: tuple[tuple[Tensor, Tensor], Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return batch


def detector(
    model: AsShown, table: ClassFilters, known: Shown, **options: object
) -> ClassFilterOOD:
    """A fitted detector."""
    made = ClassFilterOOD(model, table, **options)  # type: ignore[arg-type]
    return made.fit(loader(known), unpack=_as_is, **QUIET)


class Another:
    """A detector of pytorch-ood, on the head's inputs."""

    def __init__(self, detector: Any) -> None:
        self.detector = detector

    def predict(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Scores (N,)."""
        found: Tensor = self.detector.predict_features(inputs[0])
        return found


def others(model: AsShown, known: Shown) -> dict[str, Another]:
    """Detectors of pytorch-ood with its defaults, if it is there."""
    try:
        from pytorch_ood.detector import KNN, Mahalanobis, ViM  # type: ignore[import-not-found]
    except ImportError:
        return {}
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    made = {
        "50 nearest neighbors (Sun et al. 2022)": KNN(None, min(50, len(known.features))),
        "Mahalanobis (Lee et al. 2018)": Mahalanobis(None),
        "ViM (Wang et al. 2022), 32 dimensions": ViM(None, 32, weight, bias),
    }
    return {
        name: Another(of.fit_features(known.features, known.labels)) for name, of in made.items()
    }


def scores(of: ClassFilterOOD | Another, images: Shown) -> Tensor:
    """Scores of what was shown."""
    return of.predict((images.features, images.earlier))


def rates(of: ClassFilterOOD | Another, test: Shown, unknown: Mapping[str, Shown]) -> list[float]:
    """The share of each set that passes for known when 95 % of the test images do."""
    level = scores(of, test).quantile(0.95)
    return [float((scores(of, images) <= level).float().mean()) for images in unknown.values()]


def chosen(
    model: AsShown, known: Shown, test: Shown, unknown: Mapping[str, Shown]
) -> tuple[int, float]:
    """The number of filters and the percentile that do best on one set."""
    one, found = {CHOSEN_ON: unknown[CHOSEN_ON]}, {}
    for number in (5, 10, 20):
        table = table_of(model, known, number)
        for percentile in (0.9, 0.95, 0.98):
            made = detector(model, table, known, percentile=percentile)
            found[number, percentile] = rates(made, test, one)[0]
    return min(found, key=lambda options: found[options])


def flipped(
    of: ClassFilterOOD,
    known: Shown,
    test: Shown,
    images: Shown,
    most: int,
    toward: Toward,
) -> tuple[float, float]:
    """Shares of unknown images that pass for known once three filters have what a class has: those
    named, and three drawn at random, given what the class predicted has, or the best one for them."""
    level = scores(of, test).quantile(0.95)
    found = scores(of, images) > level
    inputs = images.features[found][:most], images.earlier[found][:most]
    if not len(inputs[0]):
        return 0.0, 0.0
    reasons = of.reasons(inputs, threshold=float(level), toward=toward)
    means = torch.stack([known.features[known.labels == c].mean(0) for c in range(10)])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(inputs[0].shape, generator=generator).argsort(1)[:, :3]

    def after(filters: Tensor, classes: Tensor) -> Tensor:
        changed = inputs[0].scatter(1, filters, means[classes].gather(1, filters))
        return of.predict((changed, inputs[1]))

    tried = [reasons.predicted]
    if toward == "nearest":
        tried = [torch.full_like(reasons.predicted, row) for row in range(len(means))]
    passed = [
        after(reasons.filters, reasons.toward),
        torch.stack([after(drawn, classes) for classes in tried]).amin(0),
    ]
    named, random = (float((values <= level).float().mean()) for values in passed)
    return named, random


# -- tables ------------------------------------------------------------------------------------------


def rows_of_scores(
    depth: int, model: AsShown, known: Shown, test: Shown, unknown: Mapping[str, Shown],
    options: tuple[int, float],
) -> dict[str, ClassFilterOOD]:  # fmt: skip
    """Print the rates of all scores; return the detectors that reasons are asked of."""
    number, percentile = options
    table = table_of(model, known, number)
    made = {
        "energy": detector(model, table, known, score="energy"),
        f"decomposed head, k={number} (dice)": detector(model, table, known, score="dice"),
        "clipped (react)": detector(model, table, known, score="react", percentile=percentile),
        "clipped, class's filters (line)": detector(
            model, table, known, score="line", percentile=percentile
        ),
        "likeness": detector(model, table, known, score="likeness"),
        "combined": detector(model, table, known, percentile=percentile),
        "combined, earlier": detector(
            model, table, known, percentile=percentile, earlier="earlier"
        ),
    }
    compared: dict[str, ClassFilterOOD | Another] = {**made, **others(model, known)}
    for kind, sets in (("score", unknown), ("score, other classes", of_other_classes(unknown))):
        print_rates(depth, kind, compared, test, sets)
    return {name: of for name, of in made.items() if name.startswith("combined")}


def print_rates(
    depth: int, kind: str, compared: Mapping[str, ClassFilterOOD | Another], test: Shown,
    unknown: Mapping[str, Shown],
) -> None:  # fmt: skip
    """A table of the shares that pass for known."""
    energy = rates(compared["energy"], test, unknown)
    printed = Table("ResNet", kind, *SETS, "mean", f"mean without {CHOSEN_ON}", "worst - energy")
    for name, of in compared.items():
        own = rates(of, test, unknown)
        not_chosen_on = [rate for rate, name in zip(own, SETS, strict=True) if name != CHOSEN_ON]
        worst = max(rate - base for rate, base in zip(own, energy, strict=True))
        means = [sum(own) / len(own), sum(not_chosen_on) / len(not_chosen_on), worst]
        printed.row(depth, name, *(f"{value:.3f}" for value in (*own, *means)))


def row_of_dice(model: AsShown, known: Shown, test: Shown, p: float = 0.7) -> tuple[float, str]:
    """The largest difference to DICE with the paper's selection, over the largest score."""
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    contributions = known.features.mean(0) * weight
    selected = contributions > torch.quantile(contributions.flatten(), p)
    counts = torch.full((len(weight),), len(known.features))
    table = ClassFilters(
        contributions, counts, selected | (contributions == contributions.amax(1, True))
    )
    ours = ClassFilterOOD(model, table, score="dice", head="head").predict(
        (test.features, test.earlier)
    )
    try:
        from pytorch_ood.detector import DICE
    except ImportError:
        masked = torch.where(table.selected, weight, 0)
        theirs, by = -(test.features @ masked.T + bias).logsumexp(1), "the formula"
    else:
        other = DICE(None, weight, bias, p).fit_features(known.features, known.labels)
        theirs, by = other.predict_features(test.features), "pytorch-ood"
    return float((ours - theirs).abs().max() / theirs.abs().max()), by


def cost(model: nn.Module, earlier: str, known: Shown, end: AsShown, repetitions: int) -> float:
    """Time of a prediction over that of a forward pass."""
    table = table_of(end, known, 20)
    own = ClassFilters(table.scores, table.counts, table.selected, layer="layer3")
    data = cifar10.loader("train", 500)
    of = ClassFilterOOD(model, own, earlier=earlier, head="linear").fit(data, **QUIET)
    x = cifar10.images("test", 250)[0]

    @torch.no_grad()
    def forward() -> object:
        return model(x)

    count_processor_time()
    times = medians({"forward": forward, "predict": lambda: of.predict(x)}, repetitions)
    return times["predict"] / times["forward"]


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--train", type=int, default=8000, help="known images to fit")
    options.add_argument("--test", type=int, default=10000, help="known images to judge by")
    options.add_argument("--unknown", type=int, default=2000, help="images of each unknown set")
    options.add_argument("--repetitions", type=int, default=15, help="timed passes")
    args = parsed(options, given, train=30, test=30, unknown=30, repetitions=1)
    prepare(args.small, cifar10.TEST, cifar10.TRAIN, "mnist.npz", "tiny_imagenet_boxes")
    torch.set_num_threads(1)
    logging.getLogger("captum_classfilters").setLevel(logging.ERROR)
    sets, settings = unknown_images(args.unknown), None
    judged, checks = [], []
    for depth, earlier in ((20, "layer2.0"), (44, "layer2.0")):
        network = cifar10.pretrained(depth)
        model = AsShown(network.linear).eval()
        known = shown(network, earlier, *cifar10.images("train", args.train))
        test = shown(network, earlier, *cifar10.images("test", args.test))
        unknown = {name: shown(network, earlier, x) for name, x in sets.items()}
        settings = settings or chosen(model, known, test, unknown)
        made = rows_of_scores(depth, model, known, test, unknown, settings)
        for (name, of), toward in itertools.product(made.items(), get_args(Toward)):
            shares = [flipped(of, known, test, own, 500, toward) for own in unknown.values()]
            judged.append((depth, name, toward, shares))
        checks.append(
            (depth, *row_of_dice(model, known, test),
             cost(network, earlier, known, model, args.repetitions))
        )  # fmt: skip
    table = Table("ResNet", "three filters flip", "as of the class", *SETS, "mean", "random three")
    for depth, name, toward, shares in judged:
        named, random = zip(*shares, strict=True)
        cells = [*named, sum(named) / len(named), sum(random) / len(random)]
        table.row(depth, name, toward, *(f"{share:.3f}" for share in cells))
    assert settings is not None
    table = Table("ResNet", "filters", "percentile", "off DICE", "of", "passes a prediction costs")
    for depth, difference, by, ratio in checks:
        table.row(depth, *settings, f"{difference:.1e}", by, f"{ratio:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
