"""Per-class sums as a torchmetrics Metric, which adds, merges, synchronizes and saves them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.distributed import added_up
from captum_classfilters.identify.summed_metric import SummedMetric

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ClassFilterSums(SummedMetric):
    r"""
    Streaming statistics of per-image filter scores, class by class: count, mean and M2.

    M2 is the sum of squared deviations from the mean (Welford; merged as by Chan, Golub and LeVeque,
    1983), so that a spread far smaller than the scores is not canceled away. Memory is O(C K)
    whatever the number of images. Merging across processes leaves counts bitwise those of one
    process; means and M2 differ by rounding in float64 only. It takes two all-reduces, one for whole
    numbers, so that neither memory nor bytes depend on the number of processes.

    Args:

        num_classes (int): C.
        num_filters (int): K.
        integer (bool): Scores are whole numbers, votes for example; their totals and squares are
                    then counted in int64, without rounding.
                    Default: False

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import ClassFilterSums
        >>> sums = ClassFilterSums(num_classes=2, num_filters=3)
        >>> sums.update(torch.tensor([[1., 0., 2.], [3., 0., 0.]]), torch.tensor([0, 0]))
        >>> sums.compute()["mean"][0]
        tensor([2., 0., 1.], dtype=torch.float64)
    """

    higher_is_better = None
    is_differentiable = False

    count: Tensor
    mean: Tensor
    m2: Tensor
    total: Tensor
    squares: Tensor

    @arguments_checked
    def __init__(
        self, num_classes: int, num_filters: int, integer: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.integer, self.num_classes, self.num_filters = integer, num_classes, num_filters
        counts = torch.zeros(num_classes, dtype=torch.int64)
        if integer:
            table = torch.zeros(num_classes, num_filters, dtype=torch.int64)
            self.add_state("count", counts, dist_reduce_fx="sum")
            self.add_state("total", table, dist_reduce_fx="sum")
            self.add_state("squares", table.clone(), dist_reduce_fx="sum")
        else:
            # Without a reduction, what `merge_state` merges comes stacked, and `compute` joins it.
            table = torch.zeros(num_classes, num_filters, dtype=torch.float64)
            self.add_state("count", counts, dist_reduce_fx=None)
            self.add_state("mean", table, dist_reduce_fx=None)
            self.add_state("m2", table.clone(), dist_reduce_fx=None)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:

            scores (Tensor): Shape (N, K).
            labels (Tensor): Shape (N,), int64 in [0, C).
        """
        values = scores.detach().to(self.count.device)
        labels = labels.to(values.device)
        if self.integer:
            votes = values.to(torch.int64)
            self.count.index_add_(0, labels, torch.ones_like(labels))
            self.total.index_add_(0, labels, votes)
            self.squares.index_add_(0, labels, votes * votes)
            return
        values = values.to(torch.float64)
        if values.device.type != "cpu":  # which classes are there, only the device knows
            batch = _moments(values, labels, len(self.count))
            self.count, self.mean, self.m2 = _joined((self.count, self.mean, self.m2), batch)
            return
        rows, places = labels.unique(return_inverse=True)
        own = (self.count[rows], self.mean[rows], self.m2[rows])
        joined = _joined(own, _moments(values, places, len(rows)))
        self.count[rows], self.mean[rows], self.m2[rows] = joined

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        for name, value in self.state().items():
            setattr(self, name, state[name].to(value))
        nothing = torch.zeros(0, self.num_filters, device=self.count.device)
        self.update(nothing, torch.zeros(0, dtype=torch.int64))  # torchmetrics counts updates

    def compute(self) -> dict[str, Tensor]:
        """The table so far, where the sums are.

        Returns:
            *dict* with **count** (C,), **mean** and **standard_error** (C, K), and of whole numbers
            their **total** (C, K). The mean of a class without images is NaN; so is the standard
            error of one with fewer than two.
        """
        count, mean, m2 = self._merged()
        number = count.to(torch.float64)[:, None]
        error = (m2 / ((number - 1) * number)).sqrt_()
        sums = {"total": self.total} if self.integer else {}
        return sums | {
            "count": count,
            "mean": mean.masked_fill(number == 0, float("nan")),
            "standard_error": error.masked_fill_(number < 2, float("nan")),
        }

    def tables(self) -> dict[str, Tensor]:
        """What ``compute`` returns, with its axes: torchmetrics takes them off tables of one number."""
        shape = (self.num_classes, self.num_filters)
        return {
            name: value.reshape(shape[:1] if name == "count" else shape)
            for name, value in self.compute().items()
        }

    def _over_ranks(self, group: "ProcessGroup | None") -> Mapping[str, Tensor]:
        """Whole numbers are added up; else the means first, and then M2 around the mean of all."""
        if self.integer:
            return super()._over_ranks(group)
        own = self.count.to(torch.float64)[:, None]  # exact to 2**53
        number, total = added_up([own, self.mean * own], group)
        mean = total.div_(number.clamp(min=1))
        spread = (self.mean - mean).square_().mul_(own).add_(self.m2)
        (m2,) = added_up([spread], group)
        return {"count": number[:, 0].to(self.count.dtype), "mean": mean, "m2": m2}

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and M2 of all that was merged."""
        if self.integer:
            number = self.count.clamp(min=1)[:, None]
            mean = self.total / number.to(torch.float64)
            # In whole numbers as long as possible: the difference of two large products is exact.
            m2 = (self.squares * number - self.total * self.total) / number.to(torch.float64)
            return self.count, mean, m2
        parts = (self.count, self.mean, self.m2)
        if self.mean.dim() == 2:
            return parts
        states = list(zip(*(part.unbind(0) for part in parts), strict=True))
        merged = states[0]
        for state in states[1:]:
            merged = _joined(merged, state)
        return merged


def _moments(values: Tensor, rows: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of values (N, K) in so many rows."""
    count = torch.zeros(number, dtype=torch.int64, device=values.device)
    count.index_add_(0, rows, torch.ones_like(rows))
    table = values.new_zeros(number, values.shape[1])
    mean = table.index_add(0, rows, values).div_(count.clamp(min=1)[:, None])
    return count, mean, table.index_add_(0, rows, (values - mean[rows]).square_())


def _joined(
    left: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of two sets of images together."""
    counts = left[0] + right[0]
    share = right[0][:, None] / counts.clamp(min=1)[:, None].to(torch.float64)
    difference = right[1] - left[1]
    mean = left[1] + difference * share
    m2 = left[2] + right[2] + difference.square() * (left[0][:, None] * share)
    return counts, mean, m2
