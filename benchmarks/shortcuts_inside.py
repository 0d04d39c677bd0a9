"""A watermark that SqueezeNet's head cannot be cured of: a few inner filters refitted.

    python -m benchmarks.shortcuts_inside

ImageNet-W's watermark (Li et al., CVPR 2023; package `imagenet-w`) on the 1,300 public images, for the
public SqueezeNet 1.1. Four fifths of the images serve to find and to refit, the last fifth to judge, each in
turn, so that every image is judged once by a network that did not see it. The first convolution runs once
for all images and is not among the layers that change.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.shared import QUIET, Table, made_up, parsed, parser, prepare, squeezenet
from benchmarks.shortcuts import CARTON, FOLDER, MEAN, STD, pictures, tensor, watermark
from captum_classfilters.answers import find_shortcuts, repair_layers
from captum_classfilters.answers.repair import Repair
from captum_classfilters.identify.accuracy_reduction import paired_interval

STEM = 3  # of SqueezeNet's features: a convolution, an activation and a pooling


def parts() -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
    """The first layers, the others, and how images are normalized."""
    if made_up():
        torch.manual_seed(0)
        first, rest = nn.Conv2d(3, 6, 3, 2), [nn.Conv2d(6, 20, 3), nn.ReLU(), nn.Conv2d(20, 10, 1)]
        after = nn.Sequential(*rest, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return first.eval(), after.eval(), lambda x: x
    model = squeezenet()
    features, classifier = (model.get_submodule(name) for name in ("features", "classifier"))
    layers = list(features.children())
    after = nn.Sequential(nn.Sequential(*layers[STEM:]), classifier, nn.Flatten())
    return nn.Sequential(*layers[:STEM]).eval(), after.eval(), lambda x: (x - MEAN) / STD


@torch.no_grad()
def seen_by_stem(file: Path | None) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The layers that follow, what the first ones make of images without and with it, and classes."""
    before, after, normalize = parts()
    images, y = pictures()
    if file is not None and file.is_file():
        found = load_file(file)
        return after, found["clean"], found["marked"], y
    add, rows = watermark(), range(0, len(images), 25)
    clean, marked = (
        torch.cat([
            before(normalize(torch.stack([tensor(change(one)) for one in images[at : at + 25]]))).half()
            for at in rows
        ])
        for change in (lambda picture: picture, add)
    )  # fmt: skip
    if file is not None:
        save_file({"clean": clean, "marked": marked}, file)
    return after, clean, marked, y


class Pairs(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Images without the watermark and with it, and their classes."""

    def __init__(self, clean: Tensor, marked: Tensor, y: Tensor) -> None:
        self.clean, self.marked, self.y = clean, marked, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, at: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.clean[at].float(), self.marked[at].float()), self.y[at]


def main(given: Sequence[str] | None = None) -> None:
    """Print a row for each fifth, and one for all images."""
    options = parser(__doc__)
    options.add_argument("--folds", type=int, default=5, help="parts that are judged in turn")
    options.add_argument("--share", type=float, default=0.05, help="of the filters that may change")
    options.add_argument("--keep", type=float, default=3.0, help="what clean images count")
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--random", type=int, default=1, help="random edits of the control")
    options.add_argument("--permutations", type=int, default=49_999, help="of each search")
    options.add_argument(
        "--cache", type=Path, help="file for what the first layers make of the images"
    )
    args = parsed(options, given, folds=2, share=0.2, epochs=2, permutations=1_999)
    prepare(args.small, FOLDER)
    torch.set_num_threads(1)
    after, clean, marked, y = seen_by_stem(args.cache)
    table = Table(
        "judged on", "filters", "accuracy clean", "change", "95 % interval",
        "accuracy marked", "change", "95 % interval", "gap closed", "random edits",
    )  # fmt: skip
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).chunk(args.folds)
    results = []
    for fold, judged in enumerate(order):
        others = torch.cat([rows for place, rows in enumerate(order) if place != fold])
        results.append(repaired(args, after, Pairs(clean, marked, y), others, judged))
        table.row(f"part {fold + 1}", *told([results[-1]]))
    table.row(f"all {len(y):,}", *told(results))


def repaired(
    args: argparse.Namespace, after: nn.Module, images: Pairs, others: Tensor, judged: Tensor
) -> Repair:
    """Found and refitted on some images, judged on others."""
    generator = torch.Generator().manual_seed(0)
    fit, judge = (
        DataLoader(Subset(images, rows.tolist()), 32, shuffle=True, generator=generator)
        for rows in (others, judged)
    )
    least = (
        0.0 if made_up() else 0.2
    )  # as in `benchmarks.shortcuts`: this network's scores rise less
    found = find_shortcuts(after, fit, least=least, permutations=args.permutations, **QUIET)
    return repair_layers(
        after, found, fit, judge, share=args.share, keep=args.keep, epochs=args.epochs,
        outputs=7 if made_up() else CARTON, repetitions=args.random, **QUIET,
    )  # fmt: skip


def told(results: Sequence[Repair]) -> list[str]:
    """One or more repairs, each judged on images of its own, in cells."""
    right, counts, gained, lost = (
        torch.stack([getattr(one, name) for one in results]).sum(0)
        for name in ("right", "counts", "gained", "lost")
    )
    shares = 100 * right.double() / counts[:, :1]
    ends = 100 * paired_interval(gained, lost, counts, 0.95)
    cells = [", ".join(str(size) for size in sorted({one.size for one in results}))]
    for kind in (0, 1):
        before, changed = shares[kind, 0], shares[kind, 1] - shares[kind, 0]
        low, high = ends[kind, 0].tolist()
        cells += [f"{before:.1f}", f"{changed:+.2f}", f"{low:+.2f} to {high:+.2f}"]
    closed = 100 * (shares[1, 1:] - shares[1, 0]) / (shares[0, 0] - shares[1, 0])
    closed = closed.nan_to_num(posinf=0, neginf=0)  # where the watermark costs nothing
    return [*cells, *(f"{one:.0f} %" for one in (closed[0], closed[1:].mean()))]


if __name__ == "__main__":
    main(sys.argv[1:])
