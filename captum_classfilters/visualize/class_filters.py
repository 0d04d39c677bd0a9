"""Heat maps of a table: classes by filters, and classes by classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, whole_number
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.visualize.arrays import by_class, chosen, out_of
from captum_classfilters.visualize.figures import (
    MISSING,
    SIGNED,
    UNSIGNED,
    FigureAndAxes,
    axes_of,
    drawing,
    exactness,
    set_ticks,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@arguments_checked
def plot_class_filters(
    class_filters: ClassFilters,
    *,
    order: str = "class",
    mark_selected: bool = True,
    classes: int | Sequence[int | str] = 40,
    filters: int | Sequence[int] = 200,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Classes by filters as a heat map, selected cells marked.

    Scores of both signs get a diverging color map centered at zero, others a sequential one; colors
    saturate at the 99.5th percentile, so that one filter does not hide the rest. Classes without
    images are gray, or left out of a table of more classes than are drawn.

    Args:

        class_filters (ClassFilters): The table.
        order (str): ``"class"`` puts filters beside the class they score highest for, ``"index"``
                    keeps their order.
                    Default: "class"
        mark_selected (bool): Mark selected cells with a dot.
                    Default: True
        classes (int or sequence): Draw at most so many classes, those with the largest scores; or
                    these, by their indices or names.
                    Default: 40
        filters (int or sequence): Draw at most so many filters, those with the largest scores for
                    the classes drawn; or these.
                    Default: 200
        title (str, optional): Title; by default method and layer, and whether contributions are
                    exact.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: The order, a class or a filter is unknown.
    """
    check_order(order)
    scores = class_filters.scores
    sizes = _largest(scores, 1)
    rows = chosen(classes, sizes, "classes", class_filters.class_names)
    if whole_number(classes) is not None and len(rows) < len(scores) and (sizes >= 0).any():
        rows = rows[sizes[rows] >= 0]
    columns = chosen(filters, _largest(scores[rows], 0), "filters")
    if order == "class":
        columns = columns[by_class(scores[rows][:, columns])]
    shown = scores[rows][:, columns]
    size = (min(16.0, 3.0 + 0.12 * len(columns)), min(12.0, 1.6 + 0.26 * len(rows)))
    figure, axes = axes_of(plt_fig_axis, (max(size[0], 6.0), max(size[1], 2.6)))
    low, high, colors = color_scale(shown)
    axes.set_facecolor(MISSING)
    image = axes.imshow(
        shown.numpy(), aspect="auto", interpolation="nearest", cmap=colors, vmin=low, vmax=high
    )
    if mark_selected:
        marked = class_filters.selected[rows][:, columns].nonzero(as_tuple=True)
        dot = max(2.0, min(14.0, 900 / len(columns)))
        axes.scatter(
            marked[1],
            marked[0],
            s=dot,
            linewidths=0.4 if dot > 8 else 0,
            c="black" if low else "white",
            edgecolors="white" if low else None,
        )
    names = short_names(class_filters.class_names)
    set_ticks(axes, "y", [names[row] for row in rows.tolist()])
    set_ticks(axes, "x", [str(column) for column in columns.tolist()], rotation=90)
    axes.tick_params(labelsize=8)
    told = ["filter, beside the class it scores highest for" if order == "class" else "filter"]
    told += [
        out_of(len(rows), scores.shape[0], "classes"),
        out_of(len(columns), scores.shape[1], "filters"),
    ]
    axes.set_xlabel("; ".join(filter(None, told)))
    told = [f"{class_filters.method} at {class_filters.layer}"]
    told += [exactness(class_filters.provenance)]
    axes.set_title(title or ", ".join(filter(None, told)), loc="left")
    figure.colorbar(image, ax=axes, label=_unit(class_filters), pad=0.01)
    return figure, axes


def color_scale(scores: Tensor) -> tuple[float, float, str]:
    """The lowest and highest score that colors tell apart, and the color map: diverging, centered at
    zero, where scores are of both signs. It ends at the 99.5th percentile of sizes, so that one filter
    does not hide the rest."""
    known = scores[~scores.isnan()].abs()
    limit = (float(np.quantile(known.numpy(), 0.995)) if len(known) else 0.0) or 1.0
    signed = bool((scores < 0).any())
    return (-limit, limit, SIGNED) if signed else (0.0, limit, UNSIGNED)


@arguments_checked
def plot_class_overlap(
    class_filters: ClassFilters,
    *,
    classes: int | Sequence[int | str] = 40,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    How many selected filters every two classes share, as a heat map.

    Args:

        class_filters (ClassFilters): A table with a selection.
        classes (int or sequence): Draw at most so many classes, those that share most with another;
                    or these, by their indices or names.
                    Default: 40
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: A class is unknown.
    """
    shared = class_filters.overlap().count.double().fill_diagonal_(float("nan"))
    most = shared.nan_to_num(nan=-1.0).amax(1)
    rows = chosen(classes, most, "classes", class_filters.class_names)
    shown = shared[rows][:, rows]
    num_rows = len(rows)
    side = min(12.0, 3.0 + 0.3 * num_rows)
    figure, axes = axes_of(plt_fig_axis, (side + 0.8, side))
    top = float(shown.nan_to_num().max()) or 1.0
    axes.set_facecolor(MISSING)
    image = axes.imshow(shown.numpy(), cmap=UNSIGNED, vmin=0, vmax=top, interpolation="nearest")
    if num_rows <= 20:
        write_cells(axes, shown, "{:.0f}", top)
    names = short_names(class_filters.class_names)
    set_ticks(axes, "x", [names[row] for row in rows.tolist()], rotation=90)
    set_ticks(axes, "y", [names[row] for row in rows.tolist()])
    axes.tick_params(labelsize=8)
    empty = "no filters are selected" if not class_filters.selected.any() else ""
    told = ["filters that two classes share", out_of(num_rows, len(shared), "classes"), empty]
    axes.set_title(title or "; ".join(filter(None, told)), loc="left")
    ticks = drawing("ticker").MaxNLocator(integer=True)
    figure.colorbar(image, ax=axes, label="number of filters", ticks=ticks)
    return figure, axes


def write_cells(axes: "Axes", values: Tensor, form: str, top: float) -> None:
    """Write what is known of a square of numbers into its cells, dark on bright."""
    for row, column in (~values.isnan()).nonzero().tolist():
        value = float(values[row, column])
        color = "black" if value > 0.6 * top else "white"
        axes.text(column, row, form.format(value), ha="center", va="center", size=7, c=color)


def check_order(order: str) -> None:
    """Raise if filters cannot be put in this order."""
    if order not in ("class", "index"):
        raise ValueError(f"order={order!r}; choose 'class' or 'index'.")


def _largest(scores: Tensor, axis: int) -> Tensor:
    """The largest size of the scores along an axis; unknown ones are smallest."""
    return scores.abs().nan_to_num(nan=-1.0).amax(axis)


def _unit(class_filters: ClassFilters) -> str:
    """What a score is in, for the methods of this package."""
    units = {
        "LayerFilterFrequency": "share of the class's images",
        "LayerFilterContribution": "mean contribution to the logit",
        "LayerFilterAblation": "mean drop of the score",
    }
    return units.get(class_filters.method, "score")
