"""The images of some classes, held in memory, in random parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.types import Dataloader, ModelInputs

BATCH_SIZE = 64
_LEAST_IMAGES = 20  # of each class

Images = list[tuple[Tensor, Tensor]]


def check_one_input(inputs: ModelInputs, batch: int = 0) -> None:
    """Refuse what a specialist is not built for."""
    if len(inputs) != 1:
        raise ValueError(
            f"Batch {batch} has {len(inputs)} inputs; a specialist is built for a model of one tensor of "
            "images."
        )


def images_of_classes(
    model: nn.Module,
    dataloader: Dataloader,
    shares: Sequence[float],
    *,
    rows: Sequence[int],
    names: Sequence[str],
    num_classes: int,
    seed: int,
    reading: dict[str, Any],
) -> list[Images]:
    """The images of some classes, each class's in random parts, with their places as labels."""
    found: list[Tensor] = []
    places: list[Tensor] = []
    with read_batches(model, dataloader, "images", **reading) as batches:
        for batch in batches:
            check_one_input(batch.inputs, batch.number)
            labels = batches.class_labels(batch, num_classes)
            belongs, which = (labels[:, None] == torch.tensor(rows).to(labels)).long().max(1)
            own = batch.inputs[0][belongs.bool()].cpu()
            if found and own.shape[1:] != found[0].shape[1:]:
                raise ValueError(
                    f"Batch {batch.number} has images of shape {tuple(own.shape[1:])}, those before of "
                    f"{tuple(found[0].shape[1:])}; expected images of one size, as the data set's "
                    "transform can make them."
                )
            found.append(own)
            places.append(which[belongs.bool()].cpu())
    x, y = torch.cat(found), torch.cat(places)
    counts = torch.bincount(y, minlength=len(rows)).tolist()
    few = [f"{count} of {name}" for name, count in zip(names, counts, strict=True) if not count]
    if few:
        raise ValueError(
            f"The data loader holds {', '.join(few)} images; are its labels those of the model, "
            f"{', '.join(f'{row} for {name}' for row, name in zip(rows, names, strict=True))}?"
        )
    if min(counts) < _LEAST_IMAGES:
        worst = counts.index(min(counts))
        raise ValueError(
            f"The data loader holds {counts[worst]} images of {names[worst]}; a specialist and its "
            f"accuracy need at least {_LEAST_IMAGES} of each class."
        )
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in shares]
    for place in range(len(rows)):
        index = (y == place).nonzero()[:, 0]
        index = index[torch.randperm(len(index), generator=generator)]
        ends = (torch.tensor(shares).cumsum(0) * len(index)).round().long().tolist()
        for part, start, end in zip(parts, [0, *ends], ends, strict=False):
            part.append(index[start:end])
    orders = [torch.cat(part) for part in parts]
    orders = [order[torch.randperm(len(order), generator=generator)] for order in orders]
    return [
        list(zip(x[order].split(BATCH_SIZE), y[order].split(BATCH_SIZE), strict=True))
        for order in orders
    ]
