"""Filters that go together, because a sum, a product or another operation combines them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from captum_classfilters._core.filter_operations import Meeting, Numbers
from captum_classfilters._core.filter_trace import FIRST_PARAMETER, Record


class Gone:
    r"""
    Some filters of one layer and all that go with them, by their numbers.

    Args:

        numbers (array): All of them, sorted ...
        which (array): ... and the place, in their layer, of the filter with which each goes.
        owners (frozenset of int): The layers, by their order, whose filters they are.
    """

    def __init__(self, numbers: Numbers, which: Numbers, owners: frozenset[int]) -> None:
        self.numbers, self.which, self.owners = numbers, which, owners

    def places(self, record: Record) -> list[int]:
        """Where a record holds some of them."""
        if record.owners.isdisjoint(self.owners):
            return []
        return self._among(record).nonzero()[0].tolist()

    def meet(self, record: Record) -> bool:
        """Whether a record holds some of them."""
        return not record.owners.isdisjoint(self.owners) and bool(self._among(record).any())

    def _among(self, record: Record) -> NDArray[np.bool_]:
        numbers = record.numbers.ravel()
        nearest = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return self.numbers[nearest] == numbers

    def between(self, start: int, end: int) -> Numbers:
        """Those with a number in a range."""
        first, last = np.searchsorted(self.numbers, [start, end])
        return self.numbers[first:last]

    def goes_with(self, numbers: Numbers) -> list[int]:
        """For some of them, the filters with which they go."""
        return self.which[np.searchsorted(self.numbers, numbers)].tolist()


class Ties:
    r"""
    Which filters are combined, directly or by others.

    Args:

        meetings (sequence of Meeting): Filters that an operation combines.
    """

    def __init__(self, meetings: Sequence[Meeting]) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        nobody = np.zeros(1, np.int64)  # with itself
        left = np.concatenate([nobody, *(meeting.left for meeting in meetings)])
        right = np.concatenate([nobody, *(meeting.right for meeting in meetings)])
        product = [np.full(len(meeting.left), meeting.product) for meeting in meetings]
        sums = ~np.concatenate([np.ones(1, bool), *product])
        sums &= np.maximum(left, right) < FIRST_PARAMETER
        self._numbers, ends = np.unique(np.stack([left, right]), return_inverse=True)
        ends = ends.reshape(2, -1).astype(np.int32)  # SciPy's graphs took no others before 1.12
        links = coo_array((np.ones(len(left), bool), (ends[0], ends[1])), (len(self._numbers),) * 2)
        number, self._groups = connected_components(links, directed=False)
        self._summed = np.zeros(number, bool)
        self._summed[self._groups[ends[0][sums]]] = True

    def with_them(self, numbers: Numbers, which: Sequence[int]) -> tuple[Numbers, Numbers, bool]:
        r"""
        All that goes with some filters, and whether by a sum.

        Args:

            numbers (array): The filters.
            which (sequence of int): The place of each in its layer.

        Returns:
            *tuple* of the numbers of all, sorted, of the place of the filter with which each goes,
            and of whether a sum combines some.
        """
        place = np.minimum(np.searchsorted(self._numbers, numbers), len(self._numbers) - 1)
        tied = self._numbers[place] == numbers
        groups, own = self._groups[place[tied]], np.array(which, np.int64)
        leaders = np.full(len(self._summed), -1)
        leaders[groups] = own[tied]
        of_others = leaders[self._groups]
        others = of_others >= 0
        gone = np.concatenate([numbers[~tied], self._numbers[others]])
        goes_with = np.concatenate([own[~tied], of_others[others]])
        order = gone.argsort()
        gone, goes_with = gone[order], goes_with[order]
        goes_with[np.searchsorted(gone, numbers)] = own
        return gone, goes_with, bool(self._summed[groups].any())
