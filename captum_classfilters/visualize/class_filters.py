"""Heat maps of a table: classes by filters, and classes by classes."""

from typing import Any

import torch

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.visualize.figures import axes_of

_MOST_TICKS = 40


def plot_class_filters(
    class_filters: ClassFilters,
    *,
    order: str = "class",
    mark_selected: bool = True,
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    Classes by filters as a heat map, selected cells marked.

    Scores of both signs get a diverging colour map centred at zero, others a sequential one; colours
    saturate at the 99.5th percentile, so that one filter does not hide the rest. Classes without
    images are grey.

    Args:

        class_filters (ClassFilters): The table.
        order (str): ``"class"`` puts filters beside the class they score highest for, ``"index"``
                    keeps their order.
                    Default: "class"
        mark_selected (bool): Mark selected cells with a dot.
                    Default: True
        title (str, optional): Title; by default method and layer.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: The order is unknown.
    """
    if order not in ("class", "index"):
        raise ValueError(f"order={order!r}; choose 'class' or 'index'.")
    scores = class_filters.scores
    columns = _by_class(scores) if order == "class" else torch.arange(scores.shape[1])
    width = min(16.0, 3.0 + 0.12 * len(columns))
    height = min(12.0, 1.6 + 0.26 * len(scores))
    figure, axes = axes_of(plt_fig_axis, (max(width, 6.0), max(height, 2.6)))
    shown = scores[:, columns].numpy()
    limit = float(torch.quantile(scores[~scores.isnan()].abs().float(), 0.995)) or 1.0
    signed = bool((scores < 0).any())
    axes.set_facecolor("0.85")
    image = axes.imshow(
        shown,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r" if signed else "viridis",
        vmin=-limit if signed else 0.0,
        vmax=limit,
    )
    if mark_selected:
        rows, places = class_filters.selected[:, columns].nonzero(as_tuple=True)
        size = max(2.0, min(14.0, 900 / len(columns)))
        axes.scatter(places, rows, s=size, c="black" if signed else "white", linewidths=0)
    _ticks(axes.set_yticks, class_filters.class_names)
    _ticks(axes.set_xticks, [str(column) for column in columns.tolist()], rotation=90)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(
        "filter, beside the class it scores highest for" if order == "class" else "filter"
    )
    axes.set_title(title or f"{class_filters.method} at {class_filters.layer}", loc="left")
    figure.colorbar(image, ax=axes, label=_unit(class_filters), pad=0.01)
    return figure, axes


def plot_class_overlap(
    class_filters: ClassFilters,
    *,
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    How many selected filters every two classes share, as a heat map.

    Args:

        class_filters (ClassFilters): A table with a selection.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.
    """
    shared = class_filters.overlap().count
    number = len(shared)
    side = min(12.0, 3.0 + 0.3 * number)
    figure, axes = axes_of(plt_fig_axis, (side + 0.8, side))
    off_diagonal = shared.double().clone()
    off_diagonal.fill_diagonal_(float("nan"))
    axes.set_facecolor("0.85")
    image = axes.imshow(off_diagonal.numpy(), cmap="viridis", vmin=0, interpolation="nearest")
    if number <= 20:
        top = float(off_diagonal.nan_to_num().max()) or 1.0
        for row in range(number):
            for column in range(number):
                if row != column:
                    value = int(shared[row, column])
                    colour = "black" if value > 0.6 * top else "white"
                    axes.text(column, row, value, ha="center", va="center", size=7, c=colour)
    _ticks(axes.set_xticks, class_filters.class_names, rotation=90)
    _ticks(axes.set_yticks, class_filters.class_names)
    axes.tick_params(labelsize=8)
    axes.set_title(title or "filters that two classes share", loc="left")
    figure.colorbar(image, ax=axes, label="number of filters")
    return figure, axes


def _by_class(scores: torch.Tensor) -> torch.Tensor:
    """Filters grouped by their best class, best first within a class."""
    filled = scores.nan_to_num(nan=-float("inf"))
    best, owner = filled.max(0)
    by_score = best.sort(descending=True, stable=True).indices
    return by_score[owner[by_score].sort(stable=True).indices]


def _unit(class_filters: ClassFilters) -> str:
    """What a score is in, for the methods of this package."""
    units = {
        "LayerFilterFrequency": "share of the class's images",
        "LayerFilterContribution": "mean contribution to the logit",
        "LayerFilterAblation": "mean drop of the score",
    }
    return units.get(class_filters.method, "score")


def _ticks(setter: Any, names: Any, **options: Any) -> None:
    step = -(-len(names) // _MOST_TICKS) if len(names) > 80 else 1
    positions = list(range(0, len(names), step))
    setter(positions, [names[position] for position in positions], **options)
