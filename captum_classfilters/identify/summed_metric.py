"""Sums that processes add up, whatever their number, in the memory of a few tables."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from captum_classfilters._core.distributed import added_up, check_alike, gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SummedMetric(Metric):
    """A Metric whose states are summed over processes by all-reduce; torchmetrics would collect those
    of all processes on each of them."""

    full_state_update = False

    def state(self) -> dict[str, Tensor]:
        """What has been added so far, as it is."""
        return {name: getattr(self, name) for name in self._defaults}

    def of_this_process(self) -> dict[str, Tensor]:
        """What ``compute`` returns, without waiting for other processes."""
        found: dict[str, Tensor] = type(self).compute(self)
        return found

    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., object] = gather_all_tensors,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        """What torchmetrics calls to put the sums of all processes in the place of the own ones."""
        if dist_sync_fn is not gather_all_tensors:  # the caller has another way
            super()._sync_dist(dist_sync_fn, process_group)
            return
        group = process_group or self.process_group
        shapes = {
            f"the shape of {name!r}": tuple(value.shape) for name, value in self.state().items()
        }
        check_alike(gather(shapes, group))
        for name, value in self._over_ranks(group).items():
            setattr(self, name, value)

    def _over_ranks(self, group: "ProcessGroup | None") -> Mapping[str, Tensor]:
        """The states of all processes together: their sums, one call for each type of numbers."""
        own = self.state()
        whole: dict[str, Tensor] = {}
        for dtype in {value.dtype: None for value in own.values()}:
            names = [name for name, value in own.items() if value.dtype == dtype]
            whole |= dict(zip(names, added_up([own[name] for name in names], group), strict=True))
        return whole
