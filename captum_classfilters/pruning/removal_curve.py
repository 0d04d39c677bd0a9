"""Accuracy while a layer's filters are removed in given orders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.layers import find_layer, layer_name, module_of
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters.pruning.candidates import (
    Candidates,
    LabeledReplay,
    checked_labels,
    places_of,
)
from captum_classfilters.pruning.pruning_order import PruningOrder

Order = Tensor | Sequence[int] | PruningOrder
_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)


@short_repr
@dataclass(frozen=True)
class RemovalCurves(Tabular):
    r"""
    Accuracy against the number of filters removed, for several orders of the same layer; prints as
    a table.

    Args:

        layer (str): Dotted name of the layer.
        num_filters (int): K.
        orders (dict): For each name its orders (S, R), int64: S = 1, or one for each random seed.
        accuracy (dict): For each name accuracies (S, R + 1), before the first removal and after
                    each; never without every filter.
        num_images (int): N.
        way (str): How outputs without filters were found: ``"closed form"``, ``"replay"``, ``"whole
                    model"``, or several of these for other batches.
    """

    layer: str
    num_filters: int
    orders: dict[str, Tensor]
    accuracy: dict[str, Tensor]
    num_images: int
    way: str = ""

    @property
    def full_accuracy(self) -> float:
        """Accuracy with every filter."""
        return float(next(iter(self.accuracy.values()))[0, 0])

    @arguments_checked
    def at(self, share: float, name: str | None = None) -> float:
        """Mean accuracy when a share of the layer's filters is gone, rounded to whole filters.

        Args:

            share (float): Share of the filters, from 0 to below 1.
            name (str, optional): Which order; may be left out if there is one.

        Returns:
            *float*.

        Raises:
            ValueError: The order does not reach that far.
        """
        if name is None and len(self.accuracy) > 1:
            raise ValueError(f"Name one of the orders: {', '.join(self.accuracy)}.")
        values = self.accuracy[name if name is not None else next(iter(self.accuracy))]
        removed = round(share * self.num_filters)
        if not 0 <= removed < values.shape[1]:
            raise ValueError(
                f"share={share} is {removed} of {self.num_filters} filters; the curve has 0 to "
                f"{values.shape[1] - 1}."
            )
        return float(values[:, removed].mean())

    def table(self, shares: Sequence[float] = (0.25, 0.5, 0.75, 0.9)) -> str:
        """The accuracies at some shares as text, one line for each order.

        Args:

            shares (sequence of float): Shares of the filters.

        Returns:
            *str*.
        """
        return str(self._table(shares))

    def _table(self, shares: Sequence[float], title: str = "") -> Table:
        rows = [
            {"removed": name, **{f"{share:.0%}": self.at(share, name) for share in shares}}
            for name in self.accuracy
        ]
        return Table(rows, {f"{share:.0%}": ".4f" for share in shares}, title)

    def _tables(self) -> list[Table]:
        longest = min(values.shape[1] for values in self.accuracy.values()) - 1
        shares = [share for share in _SHARES if round(share * self.num_filters) <= longest]
        return [self._table(shares, f"accuracy without filters of {self.layer}")]


@arguments_checked
def removal_order(scores: Tensor) -> Tensor:
    """The order in which scores remove filters: smallest first, ties in the order of the filters.

    Args:

        scores (Tensor): Shape (K,) or (S, K), larger is more worth keeping.

    Returns:
        *Tensor* of int64, the shape of ``scores``.

    Raises:
        ValueError: A score is NaN.
    """
    if bool(scores.isnan().any()):
        raise ValueError("The scores hold NaN, which has no place in an order.")
    return scores.sort(dim=-1, stable=True).indices


@arguments_checked
def accuracy_after_removal(
    forward_func: Callable[..., Tensor],
    layer: nn.Module | str,
    orders: Order | Mapping[str, Order],
    dataloader: Dataloader,
    *,
    channel_dim: int | None = None,
    perturbations_per_eval: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> RemovalCurves:
    r"""
    Accuracy while a layer's filters are removed one after another, in given orders.

    The same masking as CAR and :class:`GreedyFilterPruning`: filters are set to zero in the layer's
    output. The part of the model up to the layer runs once for each batch, whatever the number of
    orders; equal sets of filters are measured once. Order filters on other images than these.

    Args:

        forward_func (Callable): The forward function of the model, with scores (N, C) or one logit.
        layer (nn.Module or str): The layer, or its dotted name.
        orders (Tensor, sequence, PruningOrder or mapping of them): Filters in the order of their
                    removal, (R,) or several orders (S, R); see :func:`removal_order`. A mapping
                    names them.
        dataloader (iterable): Batches of (inputs, labels).
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        perturbations_per_eval (int, optional): Sets of filters per replay. By default as many as a
                    memory budget allows.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *RemovalCurves*.

    Raises:
        ValueError: The loader is empty, an order names a filter twice or one that is not there, or
                    the model returns NaN or Inf, with filters or without.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import accuracy_after_removal
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> curves = accuracy_after_removal(net, "1", [2, 0, 1], data, show_progress=False)
        >>> curves.accuracy["order"].shape  # 0 to 3 of 4 filters removed
        torch.Size([1, 4])
    """
    model = module_of(forward_func, [layer])
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    named = dict(orders) if isinstance(orders, Mapping) else {"order": orders}
    if not named:
        raise ValueError("The mapping of orders is empty.")
    sets: _Sets | None = None
    ways: set[str] = set()
    name = layer_name(model, module)
    with read_batches(
        model,
        dataloader,
        f"removing {name}",
        device=device,
        unpack=unpack,
        show_progress=show_progress,
    ) as batches:
        reader = ScoreReader(forward_func, batches, [module])
        for batch in batches:
            replay = SuffixReplay(forward_func, module, batch.inputs, channel_dim=channel_dim)
            batches.check_repeats(forward_func, batch, replay.output)
            ways.add(replay.way)
            labels = checked_labels(batches, batch, replay.output)
            if sets is None:
                sets = _Sets(named, replay.num_filters)
            probabilities = reader.probabilities(batch, replay.output)
            sets.counts.add(
                LabeledReplay(replay, labels, probabilities, places_of(batch)),
                perturbations_per_eval,
            )
    assert sets is not None  # the loader has an image
    return RemovalCurves(
        name,
        sets.num_filters,
        sets.orders,
        sets.accuracy(),
        num_images=sets.counts.num_images,
        way=", ".join(sorted(ways)),
    )


class _Sets:
    """The different sets of filters that the orders pass, and how many images each gets right."""

    def __init__(self, named: Mapping[str, Order], num_filters: int) -> None:
        self.num_filters = num_filters
        self.orders = {name: _checked(name, order, num_filters) for name, order in named.items()}
        self.points: dict[str, Tensor] = {}
        sets: dict[bytes, int] = {}
        rows: list[Tensor] = []
        for name, orders in self.orders.items():
            place = torch.zeros(len(orders), min(orders.shape[1], num_filters - 1) + 1).long()
            for row, order in enumerate(orders):
                removed = torch.zeros(num_filters, dtype=torch.bool)
                for step in range(place.shape[1]):
                    if step:
                        removed[order[step - 1]] = True
                    key = removed.numpy().tobytes()
                    if key not in sets:
                        sets[key] = len(rows)
                        rows.append(removed.clone())
                    place[row, step] = sets[key]
            self.points[name] = place
        self.counts = Candidates(torch.stack(rows))

    def accuracy(self) -> dict[str, Tensor]:
        """Accuracies (S, R + 1) of each order."""
        share = self.counts.accuracy
        return {name: share[place] for name, place in self.points.items()}


def _checked(name: str, order: Order, num_filters: int) -> Tensor:
    """Orders as a matrix (S, R)."""
    rows = torch.as_tensor(order.order if isinstance(order, PruningOrder) else order).cpu()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(
            f"The order {name!r} is {rows.dtype} of shape {tuple(rows.shape)}; expected indices of "
            "filters, (R,) or (S, R)."
        )
    for row in rows.tolist():
        if len(set(row)) != len(row):
            raise ValueError(f"The order {name!r} names a filter twice.")
        wrong = [index for index in row if not 0 <= index < num_filters]
        if wrong:
            raise ValueError(
                f"The order {name!r} names filter {wrong[0]}; the layer has {num_filters}."
            )
    return rows.long()
