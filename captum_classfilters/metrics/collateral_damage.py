"""What removing a class's filters does to the other classes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import check_list
from captum_classfilters._core.ranking import descending, first_of, random_sets
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, ForwardFunc, Unpack
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.attr.filter_removal import Replacement
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    at_input_of,
    magnitude_control,
    resolved_layer,
    reversed_name,
)
from captum_classfilters.metrics.replayed_batches import confusion_without

_OWN = "class filters"


@short_repr
@dataclass(frozen=True)
class CollateralDamage(Tabular):
    r"""
    Confusion with each class's filters removed, against the network as it is.

    Args:

        clean (Tensor): Shape (C, C), int64: images of class i recognized as class j.
        without (Tensor): Shape (R, C, C), int64: the same without the filters of each of R classes.
        classes (tuple of int): The R classes whose filters were removed.
        num_filters (Tensor): Shape (R,), how many filters each of them lost.
        control_recall (dict): For ``"class filters, reversed"``, ``"weight magnitude"`` and
                    ``"random"`` a Tensor (R, C): recall of each class with as many other filters
                    removed: the class's lowest scores, the largest weights, and random ones, averaged
                    over repetitions.
        class_names (tuple of str): Names of all C classes.
    """

    clean: Tensor
    without: Tensor
    classes: tuple[int, ...]
    num_filters: Tensor
    control_recall: dict[str, Tensor]
    class_names: tuple[str, ...]

    @property
    def confusion_difference(self) -> Tensor:
        """(R, C, C): change of each confusion, as a share of class i's images; rows sum to zero."""
        return (self.without - self.clean).double() / self._counts()[:, None]

    @property
    def recall_change(self) -> Tensor:
        """(R, C): change of every class's recall."""
        return self.confusion_difference.diagonal(dim1=1, dim2=2)

    @property
    def own(self) -> Tensor:
        """(R,): change of recall of the class whose filters went."""
        return self.recall_change[torch.arange(len(self.classes)), list(self.classes)]

    @property
    def others(self) -> Tensor:
        """(R,): mean change of recall over the other classes: the collateral damage."""
        return self._others(self.recall_change)

    def control(self, name: str) -> tuple[Tensor, Tensor]:
        """What as many filters of a control do: change for the class itself, and for the others.

        Args:

            name (str): A name in ``control_recall``.

        Returns:
            *tuple* of two Tensors (R,).

        Raises:
            ValueError: There is no such control.
        """
        if name not in self.control_recall:
            raise ValueError(f"No control {name!r}; there are {', '.join(self.control_recall)}.")
        change = self.control_recall[name] - self.clean.diagonal().double() / self._counts()
        return change[torch.arange(len(self.classes)), list(self.classes)], self._others(change)

    @arguments_checked
    def largest(self, count: int = 5) -> list[tuple[str, str, str, float]]:
        """The confusions that grew most.

        Args:

            count (int): How many at most; there are R C (C - 1), without those of classes that have no
                        images.
                        Default: 5

        Returns:
            *list* of (class whose filters went, true class, class recognized, change of the share).
        """
        change = self.confusion_difference
        change.diagonal(dim1=1, dim2=2).fill_(torch.nan)  # recognized, which is no confusion
        places = (~change.isnan()).nonzero()
        best = descending(change[~change.isnan()])[:count]
        names = self.class_names
        return [
            (names[self.classes[row]], names[true], names[other], float(change[row, true, other]))
            for row, true, other in places[best].tolist()
        ]

    def _tables(self) -> list[Table]:
        changes = {_OWN: (self.own, self.others)}
        changes.update({name: self.control(name) for name in self.control_recall})
        rows = [
            {"": name, "own class": own.nanmean(), "other classes": others.nanmean()}
            for name, (own, others) in changes.items()
        ]
        formats = {"own class": "+.4f", "other classes": "+.4f"}
        return [Table(rows, formats, "mean change of recall")]

    def _counts(self) -> Tensor:
        return self.clean.sum(1).double()

    def _others(self, change: Tensor) -> Tensor:
        masked = change.clone()
        masked[torch.arange(len(self.classes)), list(self.classes)] = torch.nan
        return masked.nanmean(1)


@arguments_checked
def collateral_damage(
    model: nn.Module | ForwardFunc,
    layer: nn.Module | str,
    class_filters: ClassFilters,
    dataloader: Dataloader,
    *,
    classes: Iterable[int | str] | None = None,
    replacement: Replacement = "zero",
    repetitions: int = 5,
    seed: int = 0,
    weight_magnitude: Tensor | None = None,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> CollateralDamage:
    r"""
    Remove each class's selected filters from *all* images, and see whom it hurts.

    A filter is specific to a class if the class falls without it and the others do not. Sets of the
    same size are removed as controls: the class's lowest scores, the largest weights, and random ones.

    Args:

        model (nn.Module or Callable): The model, or its forward function, with scores (N, C).
        layer (nn.Module or str): The layer that the table was found at, or its dotted name. Filters
                    of a table found at its input are removed there.
        class_filters (ClassFilters): A table with a selection, found on *other* images.
        dataloader (iterable): Batches of (inputs, labels).
        classes (iterable of int or str, optional): Whose filters to remove, one class at a time; by
                    default every class with a selection.
        replacement (str): What stands in for a removed filter, as in
                    :class:`~captum_classfilters.LayerFilterAblation`.
                    Default: "zero"
        repetitions (int): Random sets for each class to average over.
                    Default: 5
        seed (int): Seed of the random sets; the global random state is not touched.
                    Default: 0
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *CollateralDamage*.

    Raises:
        ValueError: A class has no selected filters, the table does not fit, there are no images, or
                    the model returns NaN or Inf, with filters or without.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import collateral_damage
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(6, 3, 6, 6), torch.tensor([0, 1, 1, 0, 1, 0]))]
        >>> table = LayerFilterContribution(net, net[1]).identify(
        ...     data, num_filters=2, show_progress=False)
        >>> damage = collateral_damage(net, net[1], table, data, show_progress=False)
        >>> damage.recall_change.shape
        torch.Size([2, 2])
    """
    if repetitions < 1:
        raise ValueError("repetitions must be at least 1: damage needs its control.")
    rows = _rows(class_filters, classes)
    layer = resolved_layer(model, layer)
    number, at_input = class_filters.num_filters, at_input_of(model, layer, {"": class_filters})
    magnitude = magnitude_control(model, layer, number, weight_magnitude, at_input)
    sets = _sets(class_filters, rows, magnitude, repetitions, seed)
    clean, without = confusion_without(
        LayerFilterAblation(model, layer, replacement=replacement, channel_dim=channel_dim),
        layer,
        torch.cat([masks.flatten(0, 1) for masks in sets.values()]),
        class_filters.num_classes,
        dataloader,
        unpack=unpack,
        device=device,
        show_progress=show_progress,
        at_input=at_input,
    )
    sizes = [len(masks) * len(rows) for masks in sets.values()]
    parts = dict(zip(sets, without.split(sizes), strict=True))
    own = parts.pop(_OWN)
    recall = {
        name: (part.diagonal(dim1=1, dim2=2).double() / clean.sum(1))
        .unflatten(0, (-1, len(rows)))
        .mean(0)
        for name, part in parts.items()
    }
    num_filters = sets[_OWN][0].sum(1)
    return CollateralDamage(clean, own, tuple(rows), num_filters, recall, class_filters.class_names)


def _sets(
    class_filters: ClassFilters,
    rows: list[int],
    magnitude: Tensor,
    repetitions: int,
    seed: int,
) -> dict[str, Tensor]:
    """Masks (draws, R, K) of the selected filters, and as many of every control."""
    own = class_filters.selected[rows]
    sizes = own.sum(1)
    lowest = descending(class_filters.scores[rows]).flip(-1)
    return {
        _OWN: own[None],
        reversed_name(_OWN): first_of(lowest, sizes)[None],
        MAGNITUDE: first_of(descending(magnitude).expand(own.shape), sizes)[None],
        RANDOM: random_sets(own, repetitions, seed),
    }


def _rows(class_filters: ClassFilters, classes: Iterable[int | str] | None) -> list[int]:
    """The classes whose filters are removed."""
    some = class_filters.selected.any(1)
    if classes is None:
        rows: list[int] = some.nonzero()[:, 0].tolist()
    else:
        check_list("classes", classes)
        rows = [class_filters.class_index(class_) for class_ in classes]
    empty = [class_filters.class_names[row] for row in rows if not bool(some[row])]
    if empty or not rows:
        raise ValueError(
            f"class_filters selects no filters of {', '.join(empty) or 'any class'}; choose some "
            "with class_filters.select(num_filters=...)."
        )
    return rows
