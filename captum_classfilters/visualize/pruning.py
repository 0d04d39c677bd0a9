"""Pictures of pruning: filters in the order of their removal, curves, classes of a filter."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, indices_of
from captum_classfilters._core.names import counted
from captum_classfilters.pruning import PruningOrder
from captum_classfilters.pruning.class_interpretation import ClassEffect, FilterInterpretation
from captum_classfilters.pruning.removal_curve import RemovalCurves
from captum_classfilters.visualize.arrays import (
    Channels,
    check_channels,
    chosen,
    out_of,
    picture_of,
    pixels_of,
    show_picture,
    tensor_of,
)
from captum_classfilters.visualize.figures import (
    COLORS,
    GRAY,
    NEGATIVE,
    POSITIVE,
    SIGNED,
    FigureAndAxes,
    FigureAndGrid,
    axes_of,
    bare,
    grid_of,
    headline,
    quiet,
    sheet_of,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _REMOVED = COLORS[0], COLORS[1]
_STYLES = ("-", "--", "-.", ":")


@arguments_checked
def plot_filter_grid(
    filters: Tensor | ArrayLike,
    order: PruningOrder | Tensor | Sequence[int],
    *,
    columns: int | None = None,
    marked: Tensor | ArrayLike | None = None,
    mark_label: str = "marked",
    most: int = 128,
    channels: Channels = None,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    A layer's filters in the order of their removal, the removed ones framed and numbered.

    Filters that stay follow in the order of their indices. Weights of three channels are shown as
    colors around gray, others by their mean over the channels, red positive and blue negative;
    each filter is scaled by itself. Bytes, and values that all lie in [0, 1], are taken for pictures.

    Args:

        filters (Tensor or ndarray): Shape (K, channels, h, w): the weights of a convolution, or a picture for
                    each filter.
        order (PruningOrder, Tensor or sequence): Filters in the order of their removal.
        columns (int, optional): Pictures in a row. By default about twice as many as rows.
        marked (Tensor or sequence, optional): Shape (K,), bool; these get a dot, color filters for example.
                    Default: None
        mark_label (str): What the dot means.
                    Default: "marked"
        most (int): Draw at most so many filters, the first of the order.
                    Default: 128
        channels (tuple of int, optional): Channels to draw as red, green and blue.
                    Default: None
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on, one for each filter drawn; new
                    ones by default.

    Returns:
        *tuple* of figure and array of the axes drawn on, in the order of the picture.

    Raises:
        ValueError: Shapes do not fit, the order names a filter twice or one that is not there, or a
                    number is NaN or infinite.
    """
    values = pixels_of(filters, "The filters")
    if values.dim() != 4 or values.shape[-1] * values.shape[-2] < 2:
        raise ValueError(
            f"filters have shape {tuple(values.shape)}; expected (K, channels, h, w) with more "
            "than one place."
        )
    check_channels(channels, values.shape[1])
    num_filters = len(values)
    removed = indices_of("order", order.order if isinstance(order, PruningOrder) else order)
    if len(set(removed)) != len(removed) or not set(removed) <= set(range(num_filters)):
        raise ValueError(f"The order must name each of the {num_filters} filters at most once.")
    marked = None if marked is None else tensor_of(marked, "The marks").cpu()
    if marked is not None and marked.shape != (num_filters,):
        raise ValueError(f"marked has shape {tuple(marked.shape)}; expected ({num_filters},).")
    for name, number in (("most", most), ("columns", columns)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}; expected a positive number.")
    shown = (removed + [index for index in range(num_filters) if index not in set(removed)])[:most]
    wide = columns or max(1, min(len(shown), round((2 * len(shown)) ** 0.5)))
    rows = -(-len(shown) // wide)
    size = (max(0.72 * wide + 0.3, 4.6), 0.92 * rows + 0.9)
    figure, grid = sheet_of(plt_fig_axis, len(shown), wide, size)
    pictures = _are_pictures(values)
    for place, (axes, index) in enumerate(zip(grid, shown, strict=True)):
        _draw_filter(axes, values[index], pictures, channels)
        gone = place < len(removed)
        axes.set_title(f"{index}" + (f" ✕{place + 1}" if gone else ""), size=7, pad=2)
        for side in axes.spines.values():
            side.set_color(_REMOVED if gone else _KEPT)
            side.set_linewidth(1.8)
        if marked is not None and bool(marked[index]):
            axes.plot(
                0.12, 0.88, "o", transform=axes.transAxes, color="white", markeredgecolor="black",
                markersize=4.5,
            )  # fmt: skip
    told = [
        f"orange: removed, ✕ its place ({len(removed)}); blue: kept ({num_filters - len(removed)})",
        "" if marked is None else f"dot: {mark_label}",
        out_of(len(shown), num_filters, "filters"),
    ]
    legend = "; ".join(filter(None, told))
    headline(figure, f"{title}\n{legend}" if title else None, legend, size=9, x=0.01, ha="left")
    return figure, grid


@arguments_checked
def plot_removal_curves(
    curves: RemovalCurves,
    *,
    random: str | None = "random",
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Accuracy against the share of filters removed, one line for each order.

    Args:

        curves (RemovalCurves): From :func:`captum_classfilters.pruning.accuracy_after_removal`.
        random (str, optional): Name of the control, drawn gray with a band of one standard
                    deviation over its seeds.
                    Default: "random"
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.
    """
    figure, axes = axes_of(plt_fig_axis, (8.2, 4.2))
    full = 100 * curves.full_accuracy
    axes.axhline(full, color="black", linestyle="--", linewidth=0.8, label="all filters")
    index = 0
    labels = dict(zip(curves.accuracy, short_names(curves.accuracy, synonyms=False), strict=True))
    for name, values in curves.accuracy.items():
        share = 100 * torch.arange(values.shape[1]) / curves.num_filters
        middle = 100 * values.mean(0)
        spread = 100 * values.std(0) if len(values) > 1 else torch.zeros_like(middle)
        if name == random:
            color, style, width = GRAY, ":", 1.6
        else:
            color = COLORS[index % len(COLORS)]
            style, width = _STYLES[index // len(COLORS) % len(_STYLES)], 1.6
            index += 1
        label = f"{labels[name]}, mean of {len(values)}" if len(values) > 1 else labels[name]
        axes.plot(share, middle, color=color, linestyle=style, linewidth=width, label=label)
        if len(values) > 1:
            axes.fill_between(
                share,
                (middle - spread).clamp(min=0),
                (middle + spread).clamp(max=100),
                color=color,
                alpha=0.2,
                linewidth=0,
            )
    steps = max(values.shape[1] for values in curves.accuracy.values()) - 1
    axes.set_xlim(0, 100 * max(steps, 1) / curves.num_filters)
    axes.set_xlabel(f"filters of {curves.layer} removed, % of {curves.num_filters}")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title or f"accuracy on {counted(curves.num_images, 'image')}", loc="left")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.grid(axis="y", color="0.9")
    quiet(axes)
    return figure, axes


@arguments_checked
def plot_class_bars(
    interpretations: FilterInterpretation | Sequence[FilterInterpretation],
    pictures: Tensor | ArrayLike | None = None,
    *,
    most: int = 12,
    channels: Channels = None,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    For each filter the classes that lose most and least without it, beside the filter.

    Bars are accuracy reductions, whiskers their intervals: a whisker that crosses zero says that
    the images do not show an effect.

    Args:

        interpretations (FilterInterpretation or sequence): From
                    :func:`captum_classfilters.pruning.class_interpretation`.
        pictures (Tensor or ndarray, optional): A picture for each of them, (number, channels, h, w):
                    weights, or the images that excite the filter most, bytes or in [0, 1].
                    Default: None
        most (int): Draw at most so many filters, those without which the accuracy over all images
                    changes most.
                    Default: 12
        channels (tuple of int, optional): Channels of the pictures to draw as red, green and blue.
                    Default: None
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes (number, 1 or 2) to draw on; new ones by
                    default.

    Returns:
        *tuple* of figure and array of axes (number, 1 or 2), bars last.

    Raises:
        ValueError: Nothing is given, there is not one picture for each filter, or one cannot be
                    drawn.
    """
    filters = (
        [interpretations]
        if isinstance(interpretations, FilterInterpretation)
        else list(interpretations)
    )
    drawn = None if pictures is None else pixels_of(pictures, "The pictures")
    if not filters or (drawn is not None and len(drawn) != len(filters)):
        count = "no" if drawn is None else len(drawn)
        raise ValueError(f"{len(filters)} filters and {count} pictures: expected one for each.")
    if drawn is not None:
        if drawn.dim() != 4:
            raise ValueError(
                f"pictures have shape {tuple(drawn.shape)}; expected (number, channels, h, w)."
            )
        check_channels(channels, drawn.shape[1])
    changes = torch.tensor([abs(filter_.reduction) for filter_ in filters])
    rows = chosen(most, changes, "most").tolist()
    lengths = [len(_effects(filters[row])) for row in rows]
    width = 1 if drawn is None else 2
    figure, grid = grid_of(
        plt_fig_axis,
        len(rows),
        width,
        (6.4, 0.5 + sum(0.6 + 0.22 * length for length in lengths)),
        width_ratios=[1] if width == 1 else [1, 3],
        height_ratios=[1.5 + 0.5 * length for length in lengths],
    )
    are_pictures = drawn is not None and _are_pictures(drawn)
    for axes, row in zip(grid, rows, strict=True):
        if drawn is not None:
            _draw_filter(axes[0], drawn[row], are_pictures, channels)
        _draw_bars(axes[-1], filters[row])
    told = ["accuracy lost without the filter, points", out_of(len(rows), len(filters), "filters")]
    grid[-1, -1].set_xlabel("\n".join(filter(None, told)))
    headline(figure, title, size=10, x=0.01, ha="left")
    return figure, grid


def _effects(filter_: FilterInterpretation) -> list[ClassEffect]:
    """Classes from most to least, none twice."""
    names = {effect.name for effect in filter_.top}
    return [*filter_.top, *(effect for effect in filter_.bottom[::-1] if effect.name not in names)]


def _draw_bars(axes: "Axes", filter_: FilterInterpretation) -> None:
    effects = _effects(filter_)
    values = [100 * effect.reduction for effect in effects]
    places = list(range(len(effects)))
    low = [value - 100 * effect.low for value, effect in zip(values, effects, strict=True)]
    high = [100 * effect.high - value for value, effect in zip(values, effects, strict=True)]
    colors = [POSITIVE if value > 0 else NEGATIVE for value in values]
    axes.barh(places, values, color=colors, height=0.7)
    axes.errorbar(
        values, places, xerr=[low, high], fmt="none", ecolor="0.3", elinewidth=1, capsize=2
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, short_names(effect.name for effect in effects), size=8)
    axes.invert_yaxis()
    if len(filter_.top) < len(effects):
        axes.axhline(len(filter_.top) - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_title(
        f"filter {filter_.filter}: {100 * filter_.reduction:+.2f} points over all images",
        loc="left",
        size=9,
    )
    quiet(axes)


def _are_pictures(values: Tensor) -> bool:
    """Whether numbers lie in [0, 1], as those of images do and those of weights hardly ever."""
    return not values.numel() or (float(values.min()) >= 0 and float(values.max()) <= 1)


def _draw_filter(axes: "Axes", values: Tensor, picture: bool, channels: Channels) -> None:
    """A picture, or weights: three channels as colors around gray, else their signed mean."""
    bare(axes)
    if picture:
        show_picture(axes, picture_of(values, channels), interpolation="nearest")
        return
    if channels is not None or len(values) == 3:
        shown = values[list(channels or range(3))]
        limit = float(shown.abs().max()) or 1.0
        axes.imshow((0.5 + shown / (2 * limit)).movedim(0, -1).numpy(), interpolation="nearest")
        return
    mean = values.mean(0)
    limit = float(mean.abs().max()) or 1.0
    axes.imshow(mean.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
