"""What removing a class's filters does to the other classes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import module_of
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.attr.layer_filter_ablation import Replacement
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.class_curves import replays
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    first_of,
    magnitude_control,
    order_of,
    random_orders,
    resolved_layer,
    reversed_name,
)

_OWN = "class filters"


@dataclass(frozen=True)
class CollateralDamage:
    r"""
    Confusion with each class's filters removed, against the network as it is.

    Args:

        clean (Tensor): Shape (C, C), int64: images of class i recognised as class j.
        without (Tensor): Shape (R, C, C), int64: the same without the filters of each of R classes.
        classes (tuple of int): The R classes whose filters were removed.
        num_filters (Tensor): Shape (R,), how many filters each of them lost.
        control_recall (dict): For ``"class filters, reversed"``, ``"weight magnitude"`` and
                    ``"random"`` a Tensor (R, C): recall of each class with as many other filters
                    removed: the class's lowest scores, the largest weights, and random ones, averaged
                    over seeds.
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

    def largest(self, number: int = 5) -> list[tuple[str, str, str, float]]:
        """The confusions that grew most.

        Args:

            number (int): How many.

        Returns:
            *list* of (class whose filters went, true class, class recognised, change of the share).
        """
        change = self.confusion_difference.nan_to_num()
        change.diagonal(dim1=1, dim2=2).fill_(-1)
        size = len(self.class_names)
        cells = change.flatten().topk(min(number, change.numel()))
        return [
            (
                self.class_names[self.classes[place // size**2]],
                self.class_names[place // size % size],
                self.class_names[place % size],
                share,
            )
            for share, place in zip(cells.values.tolist(), cells.indices.tolist(), strict=True)
        ]

    def __str__(self) -> str:
        lines = [f"{'mean change of recall':24s} own class  other classes"]
        rows = {_OWN: (self.own, self.others)}
        rows.update({name: self.control(name) for name in self.control_recall})
        lines += [
            f"{name:24s} {float(own.nanmean()):+9.4f}  {float(others.nanmean()):+13.4f}"
            for name, (own, others) in rows.items()
        ]
        return "\n".join(lines)

    def _counts(self) -> Tensor:
        return self.clean.sum(1).double()

    def _others(self, change: Tensor) -> Tensor:
        masked = change.clone()
        masked[torch.arange(len(self.classes)), list(self.classes)] = torch.nan
        return masked.nanmean(1)


def collateral_damage(
    forward_func: Callable[..., Tensor],
    layer: nn.Module | str,
    class_filters: ClassFilters,
    dataloader: Iterable[Any],
    *,
    classes: Iterable[int | str] | None = None,
    replacement: Replacement = "zero",
    random_seeds: int = 5,
    weight_magnitude: Tensor | None = None,
    channel_dim: int | None = None,
    show_progress: bool = True,
) -> CollateralDamage:
    r"""
    Remove each class's selected filters from *all* images, and see whom it hurts.

    A filter is specific to a class if the class falls without it and the others do not. Sets of the
    same size are removed as controls: the class's lowest scores, the largest weights, and random ones.

    Args:

        forward_func (Callable): The forward function of the model, with outputs (N, C).
        layer (nn.Module or str): The layer that the table was found at, or its dotted name.
        class_filters (ClassFilters): A table with a selection, found on *other* images.
        dataloader (iterable): Batches of (images, labels).
        classes (iterable of int or str, optional): Whose filters to remove, one class at a time; by
                    default every class with a selection.
        replacement (str): What stands in for a removed filter, as in
                    :class:`~captum_classfilters.LayerFilterAblation`.
                    Default: "zero"
        random_seeds (int): Random sets to average over.
                    Default: 5
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *CollateralDamage*.

    Raises:
        ValueError: A class has no selected filters, the table does not fit, or there are no images.

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
    if random_seeds < 1:
        raise ValueError("random_seeds must be at least 1: damage needs its control.")
    rows = _rows(class_filters, classes)
    layer = resolved_layer(forward_func, layer)
    shape = (class_filters.num_classes, class_filters.num_filters)
    magnitude = magnitude_control(forward_func, layer, shape[1], weight_magnitude)
    sets = _sets(class_filters, rows, magnitude, random_seeds)
    removed = torch.cat([one.flatten(0, 1) for one in sets.values()])
    ablation = LayerFilterAblation(
        forward_func, layer, replacement=replacement, channel_dim=channel_dim
    )
    clean = torch.zeros(shape[0], shape[0], dtype=torch.int64)
    without = torch.zeros(len(removed), shape[0], shape[0], dtype=torch.int64)
    with model_left_as_found(module_of(forward_func), evaluation=True), torch.no_grad():
        for replay, labels in replays(ablation, layer, shape, dataloader, show_progress):
            clean += _confusion(replay.output[None], labels)[0]
            without += _confusion(replay.outputs(removed), labels)
    parts = dict(
        zip(sets, without.split([len(one) * len(rows) for one in sets.values()]), strict=True)
    )
    own = parts.pop(_OWN)
    recall = {
        name: (part.diagonal(dim1=1, dim2=2).double() / clean.sum(1))
        .unflatten(0, (-1, len(rows)))
        .mean(0)
        for name, part in parts.items()
    }
    number = sets[_OWN][0].sum(1)
    return CollateralDamage(clean, own, tuple(rows), number, recall, class_filters.class_names)


def _sets(
    class_filters: ClassFilters, rows: list[int], magnitude: Tensor, random_seeds: int
) -> dict[str, Tensor]:
    """Masks (draws, R, K) of the selected filters, and as many of every control."""
    own = class_filters.selected[rows]
    orders = {
        reversed_name(_OWN): [order_of(class_filters.scores[rows]).flip(-1)],
        MAGNITUDE: [order_of(magnitude).expand(own.shape)],
        RANDOM: random_orders(own.shape, random_seeds),
    }
    sets = {_OWN: own[None]}
    for name, drawn in orders.items():
        sets[name] = torch.stack([_as_many(order, own) for order in drawn])
    return sets


def _rows(class_filters: ClassFilters, classes: Iterable[int | str] | None) -> list[int]:
    some = class_filters.selected.any(1)
    if classes is None:
        rows: list[int] = some.nonzero()[:, 0].tolist()
    else:
        rows = [class_filters.class_index(class_) for class_ in classes]
    empty = [class_filters.class_names[row] for row in rows if not bool(some[row])]
    if empty or not rows:
        raise ValueError(
            f"class_filters selects no filters of {', '.join(empty) or 'any class'}; choose some "
            "with class_filters.select(num_filters=...)."
        )
    return rows


def _as_many(order: Tensor, like: Tensor) -> Tensor:
    """Masks (R, K) of the first filters of orders, as many as each row of ``like`` has."""
    everything = first_of(order, range(like.shape[1] + 1))  # (K + 1, R, K)
    return everything[like.sum(1), torch.arange(len(like))]


def _confusion(outputs: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrices (P, C, C) of outputs (P, N, C)."""
    sets, _, classes = outputs.shape
    cells = labels * classes + outputs.argmax(-1).cpu()
    cells = cells + torch.arange(sets)[:, None] * classes**2
    counts = torch.bincount(cells.flatten(), minlength=sets * classes**2)
    return counts.reshape(sets, classes, classes)
