"""What one of several processes does: run by torchrun, or forked by `tests/test_distributed.py`."""

import os
import pickle
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from captum_classfilters import (
    LabelPermutation,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters.heads.hits import Hits
from captum_classfilters.identify import ClassFilterSums, collect_evidence
from captum_classfilters.identify.accuracy_sums import AccuracySums
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.metrics.confusion_counts import ConfusionCounts
from tests.models import QUIET, batches, deep, joined
from tests.test_every_loader import ENTRIES as EVERY_ENTRY

DATA = {"number": 47, "batch_size": 4}  # 12 batches, the last one smaller


def methods(model):
    return {
        "frequency": LayerFilterFrequency(model, "stage1", top_k=2),
        "contribution": LayerFilterContribution(model, "stage2"),
        "inner contribution": LayerFilterContribution(model, "stage1"),
    }


def tables(model, data, **options):
    options = {
        "num_filters": 2,
        "class_names": ["a", "b", "c"],
        "significance": LabelPermutation(permutations=99),
        **options,
    }
    return identify_class_filters(methods(model), data, **QUIET, **options)


def reduction(model, data, **options):
    return LayerFilterAblation(model, "stage1").identify(
        data, metric="accuracy", **QUIET, **options
    )


def share(rank, world, uneven=True):
    """Some ranks have more batches than others; the last of more than two has none."""
    data = batches(**DATA)
    if world > 2:
        world -= 1
    if rank >= world:
        return []
    ends = [0, *(2 + 3 * place for place in range(world - 1)), len(data)]
    return data[ends[rank] : ends[rank + 1]]


# -- checks, each run on every rank of a group; what they return goes to the test ------------------


def all_results(rank, world):
    """The three entries that are summed, on uneven shares."""
    own = share(rank, world)
    evidence = collect_evidence(LayerFilterContribution(deep(), "stage2"), own, **QUIET)
    return {
        "tables": tables(deep(), own),
        "reduction": reduction(deep(), own),
        "evidence": evidence.class_filters(),
        "classifier": evaluate_classifier(deep(), own, **QUIET),
    }


class Failing:
    """A loader that fails in its third batch."""

    def __iter__(self):
        yield from batches()[:2]
        raise OSError("the disk is gone")


ENTRIES: dict[str, Any] = {
    "tables": tables,
    "reduction": reduction,
    "evidence": lambda m, d: collect_evidence(LayerFilterContribution(m, "stage1"), d, **QUIET),
    "classifier": lambda m, d: evaluate_classifier(m, d, **QUIET),
}


def failing(rank, world, entry):
    return ENTRIES[entry](deep(), Failing() if rank == 1 else batches())


def failing_early(rank, world):
    return tables(deep(), batches(), num_filters=0 if rank == 1 else 2)


def failing_on_nan(rank, world):
    data = batches()
    if rank == world - 1:
        data[3] = (torch.full_like(data[3][0], torch.nan), data[3][1])
    return tables(deep(), data)


def mismatched(rank, world, what):
    odd, model = rank == 1, deep()
    options: dict[str, Any] = {}
    if what == "the model" and odd:
        model.head.weight.data[0, 0] += 1e-3
    method = LayerFilterFrequency if what == "the method" and odd else LayerFilterContribution
    layer = "stage1" if what == "the layer" and odd else "stage2"
    values = {
        "num_filters": (2, 3),
        "class_names": (["a", "b", "c"], ["a", "c", "b"]),
        "target": (None, 1),
        "attribute_to_layer_input": (False, True),
        "significance": (False, True),
    }
    if what in values:
        options[what] = values[what][odd]
    if what == "target":
        options["num_classes"] = 3
    return method(model, layer).identify(batches(), **QUIET, **options)


def other_numbers_of_classes(rank, world):
    """Which is known from the labels' names alone."""
    names = ["a", "b", "c", "d"][: 3 + rank]
    return LayerFilterFrequency(deep(), "stage1", top_k=2).identify(
        batches(), class_names=names, num_classes=len(names), **QUIET
    )


def another_measurement(rank, world):
    return (ENTRIES["classifier"] if rank else ENTRIES["tables"])(deep(), batches())


def killed(rank, world):
    def data():
        yield from batches()[:2]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from batches()[2:]

    return tables(deep(), data())


def sampled(rank, world, shuffle, drop_last, number):
    x, y = joined(batches(**DATA))
    data = TensorDataset(x[:number], y[:number])
    sampler: DistributedSampler = DistributedSampler(data, shuffle=shuffle, drop_last=drop_last)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    return {"tables": tables(deep(), loader), "reduction": reduction(deep(), loader)}


def interrupted(rank, world, folder):
    """One rank fails; started again, all go on where they were."""
    own = share(rank, world)
    path = Path(folder) / "state"

    def data():
        yield from own[:-1]
        raise OSError("the disk is gone")

    try:
        tables(deep(), data() if rank == 1 else own, state_path=path)
    except ValueError as error:
        partial = error.partial["frequency"] if hasattr(error, "partial") else None
    dist.barrier()
    left = sorted(file.name for file in Path(folder).iterdir())
    dist.barrier()
    again = tables(deep(), own, state_path=path)
    dist.barrier()
    return {
        "counted": None if partial is None else int(partial.counts.sum()),
        "left": left,
        "tables": again,
        "then": sorted(file.name for file in Path(folder).iterdir()),
    }


def merging(rank, world, num_filters=(5, 5)):
    """What merging sums says to the others: bytes of each call, by what is merged."""
    said: dict[str, list[int]] = {}

    def all_reduce(tensor, **options):
        said[name].append(tensor.numel() * tensor.element_size())
        own(tensor, **options)

    sums = {
        "means": ClassFilterSums(3, num_filters[rank > 0]),
        "votes": ClassFilterSums(3, num_filters[rank > 0], integer=True),
        "accuracy": AccuracySums(3, num_filters[rank > 0]),
        "confusion": ConfusionCounts(3),
        "curves": Hits(4, 3),
    }
    own = dist.all_reduce
    gathered = mock.patch.object(dist, "all_gather", side_effect=AssertionError)
    with gathered, mock.patch.object(dist, "all_reduce", all_reduce):
        for name, metric in sums.items():
            said[name] = []
            metric.compute()
    return said


def survey(rank, world):
    """What every public entry that reads a loader says when several processes read the same."""
    said = {}
    for name, entry in EVERY_ENTRY.items():
        if entry.slow:
            continue
        try:
            entry.call(deep(), batches(), **QUIET)
            said[name] = "has a result"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


CHECKS = {name: value for name, value in globals().items() if callable(value)}


def main() -> None:
    """Run by torchrun: save what each rank got."""
    torch.set_num_threads(1)
    folder = sys.argv[1]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    own = share(rank, world)
    for name, table in tables(deep(), own).items():
        table.save(f"{folder}/{rank}-{name}.safetensors")
    torch.save(vars(reduction(deep(), own)), f"{folder}/{rank}-reduction.pt")
    dist.barrier()
    dist.destroy_process_group()


def one_rank(rank, world, store, pipe, checks):
    """Run some checks one after the other, and send what each returned or raised."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=240),
    )
    try:
        for name, *arguments in checks:
            try:
                found = CHECKS[name](rank, world, *arguments)
            except Exception as error:
                found = (type(error).__name__, str(error), getattr(error, "partial", None))
            pipe.send_bytes(pickle.dumps(found))  # tensors as they are, not as shared memory
    except BaseException:
        pipe.send_bytes(pickle.dumps(traceback.format_exc()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
