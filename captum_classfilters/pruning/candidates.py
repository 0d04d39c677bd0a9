"""What removing each candidate filter does to the accuracy."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_classfilters._core.replay.suffix_replay import SuffixReplay


@dataclass
class Candidates:
    r"""
    Accuracy and cross-entropy without each candidate, measured batch by batch.

    With ``error_probability`` a candidate is dropped as soon as fewer images are right without it
    than without the best candidate so far, beyond chance: of the images that only one of the two
    gets right, too few are the candidate's (one-sided sign test). The level is shared out among
    candidates and batches, so the best is dropped with at most the stated probability.

    Args:

        removed (Tensor): Shape (P, K), bool; the filters without which to run.
        error_probability (float, optional): By default every candidate sees every image.
        looks (int): Number of batches.
    """

    removed: Tensor
    error_probability: float | None = None
    looks: int = 1
    evaluations: int = 0
    possible_evaluations: int = 0
    images: int = 0
    _right: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loss = torch.zeros(len(self.removed), dtype=torch.float64)
        self.active = torch.ones(len(self.removed), dtype=torch.bool)

    def measure(
        self, batches: Iterable[tuple[SuffixReplay, Tensor]], at_once: int | None
    ) -> "Candidates":
        """Run all batches."""
        for replay, labels in batches:
            self._add(replay, labels, at_once)
            self._drop()
        return self

    @property
    def accuracy(self) -> Tensor:
        """Shape (P,); -inf for candidates that were dropped."""
        right = torch.cat(self._right, 1).sum(1, dtype=torch.float64) / self.images
        return right.masked_fill(~self.active, -torch.inf)

    @property
    def mean_loss(self) -> Tensor:
        """Mean cross-entropy (P,)."""
        return self.loss / self.images

    def _add(self, replay: SuffixReplay, labels: Tensor, at_once: int | None) -> None:
        number = len(labels)
        rows = self.active.nonzero()[:, 0]
        right = torch.zeros(len(self.removed), number, dtype=torch.bool)
        for part, outputs in replay.in_parts(self.removed[rows], at_once):
            some = rows[part]
            right[some] = (outputs.argmax(2) == labels).cpu()
            index = labels.expand(outputs.shape[:2])[..., None]
            log_probability = outputs.double().log_softmax(2).gather(2, index)
            self.loss[some] -= log_probability.sum((1, 2)).cpu()
        self._right.append(right)
        self.images += number
        self.evaluations += number * len(rows)
        self.possible_evaluations += number * len(self.removed)

    def _drop(self) -> None:
        if self.error_probability is None or len(self._right) >= self.looks:
            return
        right = torch.cat(self._right, 1)
        right[~self.active] = False
        best = int(right.sum(1).argmax())
        only_best = (right[best] & ~right).sum(1)
        apart = only_best + (right & ~right[best]).sum(1)
        level = self.error_probability / max(1, (len(right) - 1) * (self.looks - 1))
        from scipy.stats import binom

        chance = torch.as_tensor(binom.sf(only_best.numpy() - 1, apart.numpy(), 0.5))
        self.active &= chance >= level


def accuracy_without(
    batches: Iterable[tuple[SuffixReplay, Tensor]], removed: Tensor
) -> tuple[float, float]:
    """Accuracy and mean cross-entropy without one set of filters (K,)."""
    measured = Candidates(removed[None]).measure(batches, 1)
    return float(measured.accuracy), float(measured.mean_loss)
