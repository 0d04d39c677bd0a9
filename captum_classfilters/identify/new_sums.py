"""Sums to add evidence to, made when they are needed: torchmetrics is half of what imports cost."""

from typing import TYPE_CHECKING

from torch import Tensor

from captum_classfilters._core.replay.suffix_replay import SuffixReplay

if TYPE_CHECKING:
    from captum_classfilters.identify.accuracy_sums import AccuracySums, Changes
    from captum_classfilters.identify.statistics import ClassFilterSums


def new_sums(
    num_classes: int, num_filters: int, integer: bool = False, sync_on_compute: bool = True
) -> "ClassFilterSums":
    """Count, mean and M2 of each class and filter, nothing added yet."""
    from captum_classfilters.identify.statistics import ClassFilterSums

    return ClassFilterSums(num_classes, num_filters, integer, sync_on_compute=sync_on_compute)


def new_accuracy_sums(num_classes: int, num_filters: int) -> "AccuracySums":
    """Right answers of each class with and without each filter, nothing added yet."""
    from captum_classfilters.identify.accuracy_sums import AccuracySums

    return AccuracySums(num_classes, num_filters)


def changes_without(
    replay: SuffixReplay, labels: Tensor, probabilities: bool, at_once: int | None
) -> "Changes":
    """What becomes of a batch's images without each filter, to be added to such counts."""
    from captum_classfilters.identify.accuracy_sums import changes_of

    return changes_of(replay, labels, probabilities, at_once)
