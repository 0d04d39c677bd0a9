"""Which images a run saw, so that another run does not go on with others."""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from captum_classfilters._core.types import ModelInputs

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LOOKS = 64  # values of an image that are told apart by their place
_ODD = -0x61C8864680B583EB  # spreads small numbers over 64 bits


class DataFingerprint:
    r"""
    A hash over images and their labels, in whatever order and batches they come.

    Each image counts with its label, the sum of its values and a weighted sum of 64 of them, all taken of
    the bits as whole numbers, which gives the same on every device. Two sets of images have the same
    fingerprint if they are the same; others, also augmented ones, practically never do.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._kinds: set[str] = set()

    def add(self, inputs: ModelInputs, labels: Tensor) -> None:
        """Add a batch.

        Args:

            inputs (tuple): The model's inputs; tensors with N rows count.
            labels (Tensor): Shape (N,), whole numbers.
        """
        columns = [labels.to(torch.int64)]
        for part in inputs:
            if isinstance(part, Tensor) and part.dim() and len(part) == len(labels):
                columns += _numbers(part)
                self._kinds.add(f"{part.dtype} {list(part.shape[1:])}")
        self._rows.append(torch.stack([column.to(labels.device) for column in columns], 1))

    def hexdigest(self) -> str:
        """The fingerprint of what was added."""
        digest = hashlib.sha256(json.dumps(sorted(self._kinds)).encode())
        if self._rows:
            rows = torch.cat(self._rows).cpu().numpy()
            digest.update(np.ascontiguousarray(rows[np.lexsort(rows.T)]).data)
        return digest.hexdigest()


def _numbers(images: Tensor) -> list[Tensor]:
    """Two whole numbers for each image (N,)."""
    images = images.detach()
    if images.is_complex():
        images = torch.view_as_real(images)
    bits = images.reshape(len(images), -1).view(_INTEGERS[images.element_size()])
    size = bits.shape[1]
    looks = torch.arange(min(size, _LOOKS), device=bits.device)
    places = looks * (size - 1) // max(1, len(looks) - 1)
    odd = (2 * looks + 1) * _ODD
    return [bits.sum(1, dtype=torch.int64), (bits[:, places].to(torch.int64) * odd).sum(1)]
