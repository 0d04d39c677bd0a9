"""Run by torchrun: identify on this rank's uneven share, and save what each rank got."""

import sys

import torch
import torch.distributed as dist

from captum_classfilters import (
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from tests.models import batches, deep


def tables(model, data):
    methods = {
        "frequency": LayerFilterFrequency(model, "stage1", top_k=2),
        "contribution": LayerFilterContribution(model, "stage2"),
        "inner contribution": LayerFilterContribution(model, "stage1"),
    }
    return identify_class_filters(
        methods,
        data,
        num_filters=2,
        class_names=["a", "b", "c"],
        significance=True,
        show_progress=False,
    )


def reduction(model, data):
    return LayerFilterAblation(model, "stage1").identify(
        data, metric="accuracy", show_progress=False
    )


def main() -> None:
    torch.set_num_threads(1)
    folder, split = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    data = batches()
    share = data[:split] if rank == 0 else data[split:]
    for name, table in tables(deep(), share).items():
        table.save(f"{folder}/{split}-{rank}-{name}.safetensors")
    torch.save(vars(reduction(deep(), share)), f"{folder}/{split}-{rank}-reduction.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
