"""The null of a comparison: who has something and who has not, told anew."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES_AT_ONCE = 2**22  # of the matrix relabelings x images
_ROUNDING = 1e-6  # of a sum in float32, relative to the sum of absolute values


@dataclass(frozen=True)
class Relabeling:
    r"""
    A mean difference as a weighted sum over rows, and the sums that other labels would give.

    Of pairs, each row is a difference, and labels are told anew by turning its sign. Of groups, each
    row is an image, and who has it is shuffled among the images of the same class.

    Args:

        weights (Tensor): Shape (N,). The difference is ``weights @ values``.
        has (Tensor): Shape (N,). By how much each row grows if all images that have it grow by 1.
        blocks (Tensor, optional): Shape (N,). Rows that may change places with each other; None for
                    pairs, whose signs turn.
    """

    weights: Tensor
    has: Tensor
    blocks: Tensor | None = None

    @classmethod
    def of_pairs(cls, number: int) -> "Relabeling":
        """Of so many pairs."""
        ones = torch.ones(number, dtype=torch.float64)
        return cls(ones / number, ones)

    @classmethod
    def of_groups(cls, has: Tensor, classes: Tensor) -> "Relabeling":
        """Of images that have it or not, (N,), compared within their classes (N,)."""
        blocks = classes.unique(return_inverse=True)[1]
        count = torch.bincount(blocks).double()
        share = torch.bincount(blocks, has.double()) / count
        apart = has.double() - share[blocks]
        total = float(apart.square().sum())
        if not total:
            raise ValueError(
                "In no class are there images with it and images without it, so what it does cannot "
                "be told from what the classes are; give images of both kinds for some class."
            )
        return cls(apart / total, has.double(), blocks)

    @property
    def bits(self) -> float:
        """Binary logarithm of how many relabelings there are."""
        if self.blocks is None:
            return float(len(self.weights))
        logarithm = 0.0
        for block in range(int(self.blocks.max()) + 1):
            has = self.has[self.blocks == block]
            logarithm += math.log(math.comb(len(has), int(has.sum())))
        return logarithm / math.log(2)

    def differences(self, values: Tensor) -> Tensor:
        """The mean difference of each column of values (N, U)."""
        return self.weights @ values.double()

    def p_values(self, values: Tensor, margins: Tensor, permutations: int, seed: int) -> Tensor:
        r"""
        Whether differences exceed margins by more than chance.

        With the margin taken off the rows that have it, a relabeling counts against a column if its
        difference, of either sign, is as large. Without a margin that is the two-sided test.

        Args:

            values (Tensor): Shape (N, U).
            margins (Tensor): Shape (U,), not negative.
            permutations (int): Number of relabelings to draw.
            seed (int): Of these.

        Returns:
            *Tensor* of shape (U,), float64.
        """
        found = self.differences(values)
        beyond = found.abs() - margins
        result = torch.ones(len(found), dtype=torch.float64)
        open_ = (beyond > 0).nonzero()[:, 0]
        if not len(open_):
            return result
        rest = values[:, open_].double() * found[open_].sign()
        rest = (rest - self.has[:, None] * margins[open_]).float()
        least = beyond[open_].float() - _ROUNDING * (self.weights.abs().float() @ rest.abs())
        reached = torch.zeros(len(open_), dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        for weights in self._draws(permutations, generator):
            reached += ((weights @ rest).abs() >= least).sum(0)
        result[open_] = (1 + reached.double()) / (1 + permutations)
        return result

    def _draws(self, number: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Weights (P, N) of other labels, a part of all P = ``number`` at a time."""
        size = len(self.weights)
        weights = self.weights.float()
        at_once = max(1, _ENTRIES_AT_ONCE // size)
        for start in range(0, number, at_once):
            rows = min(at_once, number - start)
            if self.blocks is None:
                signs = torch.randint(0, 2, (rows, size), generator=generator, dtype=torch.int8)
                yield (2 * signs - 1) * weights
                continue
            random = torch.rand(rows, size, generator=generator, dtype=torch.float64)
            order = (self.blocks + random).argsort(1)  # block by block, at random within
            sorted_weights = weights[self.blocks.argsort(stable=True)].expand(rows, -1)
            yield torch.empty(rows, size).scatter_(1, order, sorted_weights)
