"""What a pass costs, by a model of it and as measured: memory, time, messages between ranks.

    python -m benchmarks.scale
    python -m benchmarks.scale --classes 21841 --filters 4096 --ranks 1 2 4 --rank-filters 64

The model is that of docs/scale.md. T is one table, 8 C K bytes. Each row runs in processes of its own;
peaks are of resident memory, above what was resident before the first table.
"""

import argparse
import json
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch import Tensor, nn

from benchmarks.shared import QUIET, Table, in_own_process, in_own_processes, parsed, parser
from captum_classfilters import (
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.identify import ClassFilterSums

IMAGES, BATCH = 512, 64
IMAGENET_21K = 14_197_122  # images
METHODS = {"contribution": LayerFilterContribution, "frequency": LayerFilterFrequency}


# -- the model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Costs of one method at one layer, by the model; sizes in bytes.

    Args:

        num_classes (int): C.
        num_filters (int): K.
        ranks (int): R.
        integer (bool): Votes are counted.
    """

    num_classes: int
    num_filters: int
    ranks: int = 1
    integer: bool = False

    @property
    def table(self) -> int:
        """T."""
        return 8 * self.num_classes * self.num_filters

    @property
    def made(self) -> int:
        """The sums, and torchmetrics' copy of what they are at the start."""
        return 4 * self.table

    @property
    def computed(self) -> int:
        """Then means and errors besides, each in torchmetrics' cache and as it is returned."""
        return self.made + 4 * self.table

    @property
    def whole(self) -> int:
        """Then the table's own copies, and the sizes of its numbers while it is checked; of votes
        their totals, too."""
        return self.computed + (4 if self.integer else 3) * self.table

    @property
    def merging(self) -> int:
        """At the peak of merging: the sums, their start, their backup, and means and errors, each as
        it is made and as it is returned."""
        return self.computed if self.ranks == 1 else self.computed + 2 * self.table

    @property
    def added_up(self) -> int:
        """What one rank gives to all-reduce: both sums and the counts."""
        return 0 if self.ranks == 1 else 2 * self.table + 8 * self.num_classes

    @property
    def collectives(self) -> int:
        """Means with counts, and M2."""
        return 0 if self.ranks == 1 else 2

    @property
    def objects(self) -> int:
        """Small objects gathered in a pass for one table: what is measured; shapes and notes of all
        tables; the shapes of one."""
        return 0 if self.ranks == 1 else 4


def host_waits(batches: int, batch_bytes: int) -> int:
    """How often the host waits for an accelerator in a pass over so many batches: once for the first,
    and then once for every block, of 8 batches or 256 MiB of inputs."""
    block = min(8, -(-(2**28) // batch_bytes))
    return 1 + -(-(batches - 1) // block)


# -- one process --------------------------------------------------------------------------------------


def resident_peak() -> int:
    """The most bytes that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sums_alone(num_classes: int, num_filters: int) -> dict[str, float]:
    """Memory and seconds of the sums: made, updated with batches, computed."""
    ClassFilterSums(2, 2).update(torch.ones(2, 2), torch.tensor([0, 1]))  # imports, threads
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(BATCH, num_filters, generator=generator)
    before = resident_peak()
    start = time.perf_counter()
    sums = ClassFilterSums(num_classes, num_filters)
    made = time.perf_counter()
    peak_made = resident_peak() - before
    steps = IMAGES // BATCH
    for _ in range(steps):
        sums.update(scores, torch.randint(num_classes, (BATCH,), generator=generator))
    updated = time.perf_counter()
    peak_updated = resident_peak() - before
    sums.compute()
    return {
        "made": peak_made,
        "updated": peak_updated,
        "computed": resident_peak() - before,
        "seconds_made": made - start,
        "seconds_update": (updated - made) / steps,
        "seconds_compute": time.perf_counter() - updated,
    }


class Wide(nn.Sequential):
    """A network whose last layer of filters is as wide as asked, and cheap."""

    def __init__(self, num_classes: int, num_filters: int) -> None:
        super().__init__(
            nn.Conv2d(3, num_filters, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(num_filters, num_classes),
        )


def made_up(num_images: int, num_classes: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of noise whose classes are spread over all."""
    for start in range(first, first + num_images, BATCH):
        size = min(BATCH, first + num_images - start)
        generator = torch.Generator().manual_seed(start)
        labels = torch.randint(num_classes, (size,), generator=generator)
        yield torch.randn(size, 3, 2, 2, generator=generator), labels


def whole_pass(method: str, num_classes: int, num_filters: int) -> dict[str, float]:
    """Peak memory of a pass, from the network on, and seconds with and without the pass's own work."""
    small = Wide(3, 8).eval()
    identify_class_filters(METHODS[method](small, "1"), [*made_up(4, 3)], **QUIET)
    torch.manual_seed(0)
    network = Wide(num_classes, num_filters).eval()
    batches = [*made_up(IMAGES, num_classes)]
    with torch.no_grad():
        network(batches[0][0])
        start = time.perf_counter()
        for images, _ in batches:
            network(images)
    forward = time.perf_counter() - start
    before = resident_peak()
    start = time.perf_counter()
    identify_class_filters(METHODS[method](network, "1"), batches, **QUIET)
    seconds = time.perf_counter() - start
    return {"peak": resident_peak() - before, "seconds": seconds, "forward": forward}


# -- several ranks ------------------------------------------------------------------------------------


@dataclass
class Messages:
    """Collective calls of this process, and the bytes of tensors that they add up."""

    calls: int = 0
    bytes: int = 0
    objects: int = 0
    _own: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the calls in the block."""
        with ExitStack() as stack:
            for name in ("all_reduce", "all_gather", "barrier", "all_gather_object"):
                self._own[name] = getattr(torch.distributed, name)
                stack.enter_context(
                    mock.patch.object(torch.distributed, name, partial(self._call, name))
                )
            yield

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        if name == "all_gather_object":
            self.objects += 1
        else:
            self.calls += 1
            if name == "all_reduce":
                self.bytes += arguments[0].numel() * arguments[0].element_size()
        return self._own[name](*arguments, **options)


def one_rank(rank: int, ranks: int, file: str, num_classes: int, num_filters: int) -> None:
    """Read a share of the images within a group, and print what it took."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=ranks
    )
    torch.manual_seed(0)
    network = Wide(num_classes, num_filters).eval()
    features = nn.Sequential(*[*network][:4])
    share = IMAGES // ranks
    small = Wide(3, 8).eval()
    identify_class_filters(LayerFilterContribution(small, "1"), [*made_up(4, 3)], **QUIET)
    sums = ClassFilterSums(num_classes, num_filters)
    before = resident_peak() - 4 * 8 * num_classes * num_filters
    for images, labels in made_up(BATCH, num_classes, rank * BATCH):
        sums.update(features(images).detach(), labels)
    messages = Messages()
    torch.distributed.barrier()
    start = time.perf_counter()
    with messages.counting():
        sums.compute()
    seconds = time.perf_counter() - start
    peak = resident_peak() - before
    del sums
    whole = Messages()
    with whole.counting():
        identify_class_filters(
            LayerFilterContribution(network, "1"),
            [*made_up(share, num_classes, rank * share)],
            **QUIET,
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    found = {
        "merge_peak": peak,
        "merge_seconds": seconds,
        "added_up": messages.bytes,
        "collectives": messages.calls,
        "objects": whole.objects,
    }
    print(json.dumps(found))


def several_ranks(ranks: int, num_classes: int, num_filters: int) -> dict[str, float]:
    """The largest of what the ranks found."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--one", "rank", "--size", str(num_classes), str(num_filters)]
        place = ["--group", str(ranks), str(Path(folder) / "group")]
        of_each = [[*common, *place, "--rank", str(rank)] for rank in range(ranks)]
        results = in_own_processes("benchmarks.scale", *of_each)
    return {name: max(result[name] for result in results) for name in results[0]}


# -- tables -------------------------------------------------------------------------------------------


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f}" if size >= 2**23 else f"{size / 2**20:.2f}"


def compare(classes: int, filters: int, methods: Sequence[str]) -> None:
    """Print what one process takes, beside the model."""
    costs = Costs(classes, filters)
    found = in_own_process(
        "benchmarks.scale", "--one", "sums", "--size", str(classes), str(filters)
    )
    print(f"\nC = {classes:,}, K = {filters:,}: one table is {mib(costs.table)} MiB")
    table = Table("one process", "predicted MiB", "measured MiB", "seconds")
    table.row(
        "sums made", mib(costs.made), mib(found["made"]), f"{found['seconds_made']:.3f} in all"
    )
    table.row(
        f"a batch of {BATCH} added",
        mib(costs.made),
        mib(found["updated"]),
        f"{found['seconds_update']:.4f} each",
    )
    table.row(
        "means and errors computed",
        mib(costs.computed),
        mib(found["computed"]),
        f"{found['seconds_compute']:.3f} in all",
    )
    for method in methods:
        size = ("--size", str(classes), str(filters))
        whole = in_own_process("benchmarks.scale", "--one", method, *size)
        table.row(
            f"whole pass, {method}, {IMAGES} images",
            mib(Costs(classes, filters, integer=method == "frequency").whole),
            mib(whole["peak"]),
            f"{whole['seconds']:.2f}, of which forward {whole['forward']:.2f}",
        )


def compare_ranks(ranks: Sequence[int], classes: int, filters: int) -> None:
    """Print what merging takes, beside the model."""
    print(
        f"\nC = {classes:,}, K = {filters:,}: one table is {mib(Costs(classes, filters).table)} MiB"
    )
    table = Table(
        "ranks",
        "peak of merging, predicted MiB",
        "measured MiB",
        "added up by a rank, predicted MiB",
        "measured MiB",
        "collective calls, predicted",
        "measured",
        "objects gathered in a pass, predicted",
        "measured",
        "merging, seconds",
    )
    for number in ranks:
        costs, found = Costs(classes, filters, number), several_ranks(number, classes, filters)
        table.row(
            number,
            mib(costs.merging),
            mib(found["merge_peak"]),
            mib(costs.added_up),
            mib(found["added_up"]),
            costs.collectives,
            found["collectives"],
            costs.objects,
            found["objects"],
            f"{found['merge_seconds']:.2f}",
        )


def compute(classes: int, filters: int, ranks: Sequence[int]) -> None:
    """Print what the model says of sizes that were not run."""
    print(f"\nComputed, not measured: C = {classes:,}, K = {filters:,}")
    table = Table(
        "ranks", "peak of merging, GiB per rank", "added up by a rank, GiB", "waits of its host"
    )
    for number in ranks:
        costs = Costs(classes, filters, number)
        waits = host_waits(-(-IMAGENET_21K // (256 * number)), 256 * 3 * 224 * 224 * 4)
        table.row(
            number, f"{costs.merging / 2**30:,.1f}", f"{costs.added_up / 2**30:,.1f}", f"{waits:,}"
        )


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables."""
    warnings.filterwarnings("ignore", message="No filters|Filters that lower|Fewer filters")
    known = parser(__doc__)
    known.add_argument("--classes", type=int, default=21_841, help="C")
    known.add_argument("--filters", type=int, default=4096, help="K, of one process")
    known.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    known.add_argument("--ranks", type=int, nargs="+", default=(2, 3, 4), help="numbers of ranks")
    known.add_argument("--rank-filters", type=int, default=256, help="K, of several ranks")
    known.add_argument("--one", help=argparse.SUPPRESS)
    known.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    known.add_argument("--group", nargs=2, help=argparse.SUPPRESS)
    known.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parsed(
        known, given, classes=50, filters=16, methods=["frequency"], ranks=(2,), rank_filters=8
    )
    if arguments.one == "rank":
        one_rank(arguments.rank, int(arguments.group[0]), arguments.group[1], *arguments.size)
    elif arguments.one == "sums":
        print(json.dumps(sums_alone(*arguments.size)))
    elif arguments.one:
        print(json.dumps(whole_pass(arguments.one, *arguments.size)))
    else:
        compare(arguments.classes, arguments.filters, arguments.methods)
        compare_ranks(arguments.ranks, arguments.classes, arguments.rank_filters)
        compute(21_841, 4096, (8, 64, 1000))
        compute(21_841, 2048, (8, 64, 1000))


if __name__ == "__main__":
    main()
