"""Counts of right answers without each filter, as a torchmetrics Metric."""

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_classfilters._core.outputs import are_probabilities, as_rows, log_probabilities
from captum_classfilters._core.replay.suffix_replay import SuffixReplay


class AccuracySums(Metric):
    """Whole-number counts and sums, so that the order of the batches does not matter."""

    full_state_update = False
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
            "lost": table.long(),
            "gained": table.long(),
            "log_drop": table.double(),
            "drop": table.double(),
        }
        for name, zeros in states.items():
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, replay: SuffixReplay, labels: Tensor, at_once: int | None) -> None:
        """Add a batch, some filters at a time."""
        full = as_rows(replay.output)
        probabilities = are_probabilities(full)
        right, log_probability = _right_and_log_probability(full, labels, probabilities)
        place = labels.to(self.counts.device)
        self.counts.index_add_(0, place, torch.ones_like(place))
        self.correct.index_add_(0, place, right.to(place))
        for some, outputs in replay.in_parts(replay.each_filter(), at_once):
            scores = outputs.reshape(len(outputs), *full.shape)
            still, log_without = _right_and_log_probability(scores, labels, probabilities)
            if not bool(log_without.isfinite().all()):
                raise ValueError(
                    f"The model returns NaN or Inf without some of the filters {some.start} to "
                    f"{some.start + len(outputs) - 1}; accuracy would take it for some class."
                )
            parts = {
                "lost": right & ~still,
                "gained": still & ~right,
                "log_drop": log_probability - log_without,
                "drop": log_probability.exp() - log_without.exp(),
            }
            for name, values in parts.items():
                state = getattr(self, name)
                rows = values.T.to(state.device, state.dtype)
                table = torch.zeros_like(state[:, some]).index_add_(0, place, rows)
                state[:, some] += table

    def compute(self) -> dict[str, Tensor]:
        """The states, summed over processes."""
        return {name: getattr(self, name).cpu().clone() for name in self._defaults}


def _right_and_log_probability(
    scores: Tensor, labels: Tensor, probabilities: bool
) -> tuple[Tensor, Tensor]:
    """Whether the best of scores (..., N, C) is the label, and its log-probability: (..., N)."""
    logs = log_probabilities(scores, probabilities)
    index = labels.expand(logs.shape[:-1])[..., None]
    return logs.argmax(-1) == labels, logs.gather(-1, index)[..., 0]
