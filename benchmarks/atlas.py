"""How long an atlas takes and how large its pages are: the digits, and 1,000 classes by 2,048 filters.

    python -m benchmarks.atlas [--output FOLDER] [--only digits|large]

The digits' atlas has the demo's network, trained as there; two images of each class are explained. The
large one has a network with random weights and random images, two of each class, none explained: its size is
what is measured.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters._core.tables import text_table
from captum_classfilters.atlas import atlas
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier

CLASSES, FILTERS = 1000, 2048


def digits(output: Path) -> Path:
    """The demo's network on the digits."""
    torch.manual_seed(0)
    data = load_digits()
    model = train_classifier(small_cnn(), data.train, show_progress=False)
    names = [f"digit {digit}" for digit in range(10)]
    return timed(
        output,
        lambda: atlas(
            model,
            "filters",
            data.train,
            output,
            test_dataloader=data.test,
            class_names=names,
            overwrite=True,
            show_progress=False,
        ),
    )


def large(output: Path) -> Path:
    """As many classes and filters as ImageNet and ResNet-50 have."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, FILTERS, 4, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(FILTERS, CLASSES),
    )
    images, labels = torch.rand(2 * CLASSES, 3, 16, 16), torch.arange(2 * CLASSES) % CLASSES
    loader = DataLoader(TensorDataset(images, labels), batch_size=100)
    names = [f"n{index:08d} class {index}, the synonyms of it" for index in range(CLASSES)]
    return timed(
        output,
        lambda: atlas(
            model,
            "1",
            loader,
            output,
            class_names=names,
            num_images=0,
            significance=False,
            overwrite=True,
            show_progress=False,
        ),
    )


def timed(output: Path, build) -> Path:  # type: ignore[no-untyped-def]
    """Build an atlas and print its time and sizes."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first: Path = build()
    seconds = time.perf_counter() - start
    files = [path for path in output.rglob("*") if path.is_file()]
    pages = [path for path in files if path.suffix == ".html"]
    others = [path for path in pages if path != first]
    seen_at_once = [
        first,
        output / "pictures/scores.png",
        output / "atlas.css",
        output / "atlas.js",
    ]
    rows = [
        {"what": "seconds", "": round(seconds, 1)},
        {"what": "pages", "": len(pages)},
        {"what": "first page, kB", "": first.stat().st_size // 1000},
        {"what": "... with its map, kB", "": sum(p.stat().st_size for p in seen_at_once) // 1000},
        {"what": "largest other page, kB", "": max(p.stat().st_size for p in others) // 1000},
        {"what": "whole folder, MB", "": sum(p.stat().st_size for p in files) // 10**6},
    ]
    print(text_table(rows, title=str(output)), flush=True)
    return first


def main() -> None:
    """Build and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="folder to keep the atlases in")
    parser.add_argument("--only", choices=["digits", "large"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(arguments.output or folder)
        for name, build in {"digits": digits, "large": large}.items():
            if arguments.only in (None, name):
                build(output / name)


if __name__ == "__main__":
    main()
