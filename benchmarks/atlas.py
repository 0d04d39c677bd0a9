"""How long an atlas takes, and how large its pages are.

    python -m benchmarks.atlas                # about ten minutes
    python -m benchmarks.atlas --only digits

The digits' atlas has the demo's network, trained as there; two images of each class are explained.
That of photographs is the command's, as ``make docs`` calls it: SqueezeNet and the 55 public photographs
of ten frequent classes. The large one, 1,000 classes by 2,048 filters, has a network with random weights
and random images, two of each class, none explained: its size is what is measured.
"""

import runpy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.shared import QUIET, Table, parsed, parser, prepare, timed
from captum_classfilters.atlas import atlas
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier


def digits(output: Path) -> Path:
    """The demo's network on the digits."""
    torch.manual_seed(0)
    data = load_digits()
    model = train_classifier(small_cnn(), data.train, show_progress=False)
    names = [f"digit {digit}" for digit in range(10)]
    return atlas(
        model,
        "filters",
        data.train,
        output,
        test_dataloader=data.test,
        class_names=names,
        overwrite=True,
        **QUIET,
    )


def photographs(output: Path) -> Path:
    """SqueezeNet on photographs, as the documentation's is made."""
    script = Path(__file__).parents[1] / "docs" / "make_atlases.py"
    first: Path = runpy.run_path(str(script))["photographs"](output)
    return first


def large(output: Path, num_classes: int, num_filters: int) -> Path:
    """A network of random weights, by default as wide as ResNet-50 for ImageNet."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, num_filters, 4, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(num_filters, num_classes),
    )
    labels = torch.arange(2 * num_classes) % num_classes
    images = torch.rand(len(labels), 3, 16, 16)
    return atlas(
        model,
        "1",
        DataLoader(TensorDataset(images, labels), batch_size=100),
        output,
        class_names=[f"n{index:08d} class {index}, its synonyms" for index in range(num_classes)],
        num_images=0,
        significance=False,
        overwrite=True,
        **QUIET,
    )


def measured(output: Path, build: Callable[[Path], Path]) -> list[str]:
    """Build an atlas: its seconds, and its sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds, first = timed(lambda: build(output))
    size = {path: path.stat().st_size for path in output.rglob("*") if path.is_file()}
    pages = [path for path in size if path.suffix == ".html"]
    seen = [first, *(output / name for name in ("pictures/scores.png", "atlas.css", "atlas.js"))]
    largest = max(size[path] for path in pages if path != first)
    kilobytes = (size[first], sum(size[path] for path in seen), largest, sum(size.values()))
    return [f"{seconds:.1f}", str(len(pages)), *(f"{number / 1000:,.0f}" for number in kilobytes)]


def main(given: Sequence[str] | None = None) -> None:
    """Build and measure."""
    known = parser(__doc__)
    known.add_argument("--output", help="folder to keep the atlases in")
    names = ["digits", "photographs", "large"]
    known.add_argument("--only", nargs="+", choices=names, default=names)
    known.add_argument("--classes", type=int, default=1000, help="of the large one")
    known.add_argument("--filters", type=int, default=2048)
    options = parsed(known, given, only=["large"], classes=6, filters=10)
    builds: dict[str, Callable[[Path], Path]] = {
        "digits": digits,
        "photographs": photographs,
        "large": lambda output: large(output, options.classes, options.filters),
    }
    public = ["imagenet_val1300", "squeezenet1_1_imagenet_fp16.safetensors"]
    prepare(options.small, *(public if "photographs" in options.only else []))
    table = Table(
        *("atlas", "seconds", "pages", "first page, kB", "with map, style and script, kB"),
        *("largest other page, kB", "all files, kB"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            table.row(name, *measured(Path(options.output or folder) / name, builds[name]))


if __name__ == "__main__":
    main()
