"""Peak memory of identification does not depend on the number of images.

    python -m benchmarks.memory

Each size runs in a process of its own; images are made batch by batch, so that they do not count.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cifar10 import CifarResNet
from captum_classfilters import (
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)

SIZES = (1000, 5000, 20000)


def made(number: int, batch_size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, number, batch_size):
        generator = torch.Generator().manual_seed(start)
        size = min(batch_size, number - start)
        yield torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 10


def one_size(number: int) -> None:
    torch.manual_seed(0)
    model = CifarResNet(20).eval()
    methods = [
        LayerFilterFrequency(model, "layer2"),
        LayerFilterFrequency(model, "layer3"),
        LayerFilterContribution(model, "layer3"),
    ]
    identify_class_filters(methods, made(number), show_progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images": number, "peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_size(arguments.one)
        return
    print("| images | peak resident memory, MiB |\n|---|---|")
    peaks = []
    for number in SIZES:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", str(number)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(json.loads(output.splitlines()[-1])["peak_mib"])
        print(f"| {number:,} | {peaks[-1]:.0f} |", flush=True)
    print(f"\n{SIZES[-1]:,} against {SIZES[0]:,} images: {peaks[-1] / peaks[0]:.3f}x")


if __name__ == "__main__":
    main()
