"""Sums to add evidence to, made when they are needed: torchmetrics is half of what imports cost."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captum_classfilters.identify.accuracy_sums import AccuracySums
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
