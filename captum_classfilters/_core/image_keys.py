"""A number for each image by its bytes alone: chance that depends on images, not on batches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def image_keys(inputs: Sequence[object]) -> Tensor:
    """A number (N,) for each image of a batch that depends on its own bytes alone, where it is."""
    tensors = [part for part in inputs if isinstance(part, Tensor) and part.dim()]
    keys = torch.zeros(len(tensors[0]), dtype=torch.int64, device=tensors[0].device)
    for part in tensors:
        if len(part) != len(keys):
            continue
        flat = part.detach().reshape(len(part), -1).contiguous()
        flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat.view(torch.uint8)
        words = flat.view(torch.int32) if flat.shape[1] % 4 == 0 else flat
        places = torch.arange(1, words.shape[1] + 1, device=words.device)
        keys = mixed(keys + (words * mixed(places)).sum(1))
    return keys


def mixed(numbers: Tensor) -> Tensor:
    """Whole numbers thoroughly mixed, as Steele, Lea and Flood's SplitMix64 does."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 31)


def generators_of_images(inputs: Sequence[object], seed: int) -> list[torch.Generator]:
    """A generator for each image of a batch, which draws the same wherever the image is read, and other
    numbers than those of other images."""
    keys = mixed(image_keys(inputs).cpu() + seed % 2**62)
    return [torch.Generator().manual_seed(key) for key in keys.tolist()]
