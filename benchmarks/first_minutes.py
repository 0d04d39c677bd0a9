"""From nothing to a first true statement: a fresh process, a model, and a folder of 500 photographs.

    python -m benchmarks.first_minutes            # about two minutes on one free core
    python -m benchmarks.first_minutes --small

Each command runs in a process of its own, as from a shell, on a CPU. The statement is the table of class
filters on the screen, or the explanations of `explain`; *reading* is what decoding and preparing images takes
within the pass. Photographs and SqueezeNet's weights are public; ResNet-18 has random weights, of which
times do not depend.
"""

import csv
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.shared import DATA, Table, in_own_process, parsed, parser, prepare

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

LAYERS = {"squeezenet1_1": "features", "resnet18": "layer4"}
WEIGHTS = DATA / "squeezenet1_1_imagenet_fp16.safetensors"


def photographs(folder: Path, number: int) -> None:
    """Links to the first photographs of the public set, a subfolder for each class."""
    from torchvision.models import SqueezeNet1_1_Weights

    names = SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]
    source = DATA / "imagenet_val1300"
    with (source / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))[:number]
    for row in rows:
        place = folder / names[int(row["class_index"])].replace("/", " ")
        place.mkdir(parents=True, exist_ok=True)
        (place / row["file"]).symlink_to((source / row["file"]).resolve())


def noise(folder: Path, number: int) -> None:
    """Images of noise in three classes."""
    random = np.random.default_rng(0)
    for index in range(number):
        place = folder / ("ant", "bee", "crab")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.jpg")


def job(command: str, model: str, folder: Path, output: Path, small: bool) -> list[str]:
    """A command line."""
    known = ["--random-weights"]
    if model == "squeezenet1_1" and not small:
        known = ["--checkpoint", str(WEIGHTS)]
    known += ["--image-size", "64"] if small else []
    known += ["--model", model, "--layer", LAYERS[model], "--data", str(folder)]
    return [command, *known, "--output", str(output), "--quiet"]


def timed_run(started: float, arguments: Sequence[str]) -> dict[str, float]:
    """Run a command in this process, begun at a time; seconds of its parts."""
    from captum_classfilters.cli.main import main as command_line

    module = import_module(f"captum_classfilters.cli.{arguments[0]}_folder")
    run = getattr(module, f"run_{arguments[0]}")

    imported = time.time()
    reading, said = [0.0], list[tuple[float, float]]()

    def counted(read: "Callable[[ImageFolder, int], Any]") -> "Callable[[ImageFolder, int], Any]":
        @wraps(read)
        def reads(dataset: "ImageFolder", index: int) -> Any:
            begun = time.time()
            item = read(dataset, index)
            reading[0] += time.time() - begun
            return item

        return reads

    def says(_told: object) -> None:
        said.append((time.time(), time.process_time()))

    from torchvision.datasets import ImageFolder

    ImageFolder.__getitem__ = counted(ImageFolder.__getitem__)
    setattr(module, run.__name__, lambda opened: run(opened, write=says))
    left = command_line(arguments)
    ended, (stated, computed) = time.time(), said[0]
    if left:
        raise SystemExit(f"{arguments[0]} failed.")
    return {
        "imports": imported - started,
        "reading": reading[0],
        "pass": stated - imported - reading[0],
        "files": ended - stated,
        "statement": stated - started,
        "all": ended - started,
        "computed": computed,
        "processor": time.process_time(),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Run and measure."""
    known = parser(__doc__)
    known.add_argument("--images", type=int, default=500)
    known.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    known.add_argument(
        "--commands", nargs="+", choices=["identify", "explain"], default=["identify", "explain"]
    )
    known.add_argument("--one", nargs="+", help="begin and command line of one run, as JSON")
    small = {"images": 6, "models": ["squeezenet1_1"], "commands": ["identify"]}
    options = parsed(known, given, **small)
    if options.one:
        started, arguments = json.loads(options.one[0])
        print(json.dumps(timed_run(started, arguments)))
        return
    prepare(options.small, WEIGHTS.name, "imagenet_val1300")
    table = Table(
        *("command", "seconds to the statement", "imports", "reading", "pass", "files after it"),
        *("all", "processor seconds to the statement", "of all"),
    )
    parts = ("statement", "imports", "reading", "pass", "files", "all", "computed", "processor")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        (noise if options.small else photographs)(folder, options.images)
        for model in options.models:
            for command in options.commands:
                line = job(command, model, folder, Path(place) / command / model, options.small)
                begin = json.dumps([time.time(), line])
                seconds = in_own_process("benchmarks.first_minutes", "--one", begin)
                table.row(f"{command}, {model}", *(f"{seconds[part]:.1f}" for part in parts))


if __name__ == "__main__":
    main()
