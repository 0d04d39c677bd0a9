"""Counts of right answers without each filter, as a torchmetrics Metric."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters._core.outputs import as_rows, log_probabilities
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.identify.summed_metric import SummedMetric


class AccuracySums(SummedMetric):
    """Whole-number counts and sums, so that the order of the batches does not matter."""

    counts: Tensor
    correct: Tensor
    lost: Tensor
    gained: Tensor
    log_drop: Tensor
    drop: Tensor

    def __init__(self, num_classes: int, num_filters: int) -> None:
        super().__init__()
        table = torch.zeros(num_classes, num_filters)
        states = {
            "counts": table[:, 0].long(),
            "correct": table[:, 0].long(),
            "lost": torch.zeros_like(table, dtype=torch.int64),
            "gained": torch.zeros_like(table, dtype=torch.int64),
            "log_drop": torch.zeros_like(table, dtype=torch.float64),
            "drop": torch.zeros_like(table, dtype=torch.float64),
        }
        for name, zeros in states.items():
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, changes: "Changes", labels: Tensor) -> None:
        """Add a batch with labels (N,)."""
        place = labels.to(self.counts.device)
        self.counts.index_add_(0, place, torch.ones_like(place))
        self.correct.index_add_(0, place, changes.correct.to(place))
        for name in ("lost", "gained", "log_drop", "drop"):
            state = getattr(self, name)
            rows = getattr(changes, name).to(state.device, state.dtype)
            state += torch.zeros_like(state).index_add_(0, place, rows)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        for name, value in self.state().items():
            setattr(self, name, state[name].to(value))
        nothing = torch.zeros(0, dtype=torch.int64, device=self.counts.device)
        table = torch.zeros(0, self.lost.shape[1], device=self.counts.device)
        # torchmetrics counts updates
        self.update(Changes(nothing, *[table] * 4), nothing)

    def compute(self) -> dict[str, Tensor]:
        """The states, summed over processes."""
        return {name: value.cpu().clone() for name, value in self.state().items()}


@dataclass(frozen=True)
class Changes:
    """What becomes of a batch's images without each filter.

    Args:

        correct (Tensor): Shape (N,), bool. Whether the full network is right.
        lost (Tensor): Shape (N, K), bool. Whether it becomes wrong.
        gained (Tensor): Shape (N, K), bool. Whether it becomes right.
        log_drop (Tensor): Shape (N, K). What the true class's log-probability loses.
        drop (Tensor): Shape (N, K). What its probability loses.
    """

    correct: Tensor
    lost: Tensor
    gained: Tensor
    log_drop: Tensor
    drop: Tensor


def changes_of(
    replay: SuffixReplay, labels: Tensor, probabilities: bool, at_once: int | None
) -> Changes:
    """Run a batch without each filter, some filters at a time."""
    full = as_rows(replay.output)
    right, log_probability = _right_and_log_probability(full, labels, probabilities)
    parts: list[tuple[Tensor, ...]] = []
    for some, outputs in replay.in_parts(replay.each_filter(), at_once):
        scores = outputs.reshape(len(outputs), *full.shape)
        still, log_without = _right_and_log_probability(scores, labels, probabilities)
        if not bool(log_without.isfinite().all()):
            raise ValueError(
                f"The model returns NaN or Inf without some of the filters {some.start} to "
                f"{some.start + len(outputs) - 1}; accuracy would take it for some class."
            )
        log_drop = log_probability - log_without
        drop = log_probability.exp() - log_without.exp()
        parts.append((right & ~still, still & ~right, log_drop, drop))
    return Changes(right, *(torch.cat(part).T for part in zip(*parts, strict=True)))


def _right_and_log_probability(
    scores: Tensor, labels: Tensor, probabilities: bool
) -> tuple[Tensor, Tensor]:
    """Whether the best of scores (..., N, C) is the label, and its log-probability: (..., N)."""
    logs = log_probabilities(scores, probabilities)
    index = labels.expand(logs.shape[:-1])[..., None]
    return logs.argmax(-1) == labels, logs.gather(-1, index)[..., 0]
