"""Peak memory of identification does not depend on the number of images.

    python -m benchmarks.memory

Each size runs in a process of its own; images are made batch by batch, so that they do not count.
"""

import argparse
import json
import resource
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.cifar10 import CifarResNet
from benchmarks.shared import QUIET, Table, in_own_process, parsed, parser
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
    identify_class_filters(methods, made(number), **QUIET)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images": number, "peak_mib": peak}))


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    known = parser(__doc__)
    known.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images")
    known.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parsed(known, given, sizes=(10,))
    if arguments.one:
        one_size(arguments.one)
        return
    table = Table("images", "peak resident memory, MiB", "of the first")
    first = 0.0
    for number in arguments.sizes:
        peak = in_own_process("benchmarks.memory", "--one", str(number))["peak_mib"]
        first = first or peak
        table.row(f"{number:,}", f"{peak:.0f}", f"{peak / first:.3f}x")


if __name__ == "__main__":
    main()
