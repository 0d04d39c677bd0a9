"""Pictures of pruning: filters in the order of their removal, curves, classes of a filter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_classfilters.pruning import (
    ClassEffect,
    FilterInterpretation,
    PruningOrder,
    RemovalCurves,
)
from captum_classfilters.visualize.figures import COLOURS, GREY, axes_of, new_figure, quiet

_KEPT, _REMOVED = COLOURS[0], COLOURS[1]
_STYLES = ("-", "--", "-.", ":")


def plot_filter_grid(
    filters: Tensor,
    order: PruningOrder | Tensor | Sequence[int],
    *,
    columns: int | None = None,
    marked: Tensor | None = None,
    mark_label: str = "marked",
    title: str | None = None,
) -> tuple[Any, Any]:
    r"""
    A layer's filters in the order of their removal, the removed ones framed and numbered.

    Filters that stay follow in the order of their indices. Weights of three channels are shown as
    colours around grey, others by their mean over the channels, red positive and blue negative;
    each filter is scaled by itself.

    Args:

        filters (Tensor): Shape (K, channels, h, w): the weights of a convolution, or a picture for
                    each filter.
        order (PruningOrder, Tensor or sequence): Filters in the order of their removal.
        columns (int, optional): Pictures in a row. By default about twice as many as rows.
        marked (Tensor, optional): Shape (K,), bool; these get a dot, colour filters say.
                    Default: None
        mark_label (str): What the dot means.
                    Default: "marked"
        title (str, optional): Title.

    Returns:
        *tuple* of figure and array of K axes, in the order of the picture.

    Raises:
        ValueError: Shapes do not fit, or the order names a filter twice or one that is not there.
    """
    if filters.dim() != 4 or filters.shape[-1] * filters.shape[-2] < 2:
        raise ValueError(
            f"filters have shape {tuple(filters.shape)}; expected (K, channels, h, w) with more "
            "than one place."
        )
    number = len(filters)
    removed = [int(one) for one in (order.order if isinstance(order, PruningOrder) else order)]
    if len(set(removed)) != len(removed) or not set(removed) <= set(range(number)):
        raise ValueError(f"The order must name each of the {number} filters at most once.")
    if marked is not None and marked.shape != (number,):
        raise ValueError(f"marked has shape {tuple(marked.shape)}; expected ({number},).")
    shown = removed + [one for one in range(number) if one not in set(removed)]
    wide = columns or max(1, min(number, round((2 * number) ** 0.5)))
    rows = -(-number // wide)
    figure = new_figure((0.72 * wide + 0.3, 0.92 * rows + 0.9))
    grid = figure.subplots(rows, wide, squeeze=False).flatten()
    for place, (axes, one) in enumerate(zip(grid, shown, strict=False)):
        _draw_filter(axes, filters[one])
        gone = place < len(removed)
        axes.set_title(f"{one}" + (f" ✕{place + 1}" if gone else ""), size=7, pad=2)
        for side in axes.spines.values():
            side.set_color(_REMOVED if gone else _KEPT)
            side.set_linewidth(1.8)
        if marked is not None and bool(marked[one]):
            axes.plot(
                0.12, 0.88, "o", transform=axes.transAxes, color="white", markeredgecolor="black",
                markersize=4.5,
            )  # fmt: skip
    for axes in grid[number:]:
        axes.set_axis_off()
    told = f"orange: removed, ✕ its place ({len(removed)}); blue: kept ({number - len(removed)})"
    told += "" if marked is None else f"; dot: {mark_label}"
    figure.suptitle(f"{title}\n{told}" if title else told, size=9, x=0.01, ha="left")
    return figure, grid[:number]


def plot_removal_curves(
    curves: RemovalCurves,
    *,
    random: str | None = "random",
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    Accuracy against the share of filters removed, one line for each order.

    Args:

        curves (RemovalCurves): From :func:`captum_classfilters.pruning.accuracy_after_removal`.
        random (str, optional): Name of the control, drawn grey with a band of one standard
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
    for name, values in curves.accuracy.items():
        share = 100 * torch.arange(values.shape[1]) / curves.num_filters
        middle = 100 * values.mean(0)
        spread = 100 * values.std(0) if len(values) > 1 else torch.zeros_like(middle)
        if name == random:
            colour, style, width = GREY, ":", 1.6
        else:
            colour = COLOURS[index % len(COLOURS)]
            style, width = _STYLES[index // len(COLOURS) % len(_STYLES)], 1.6
            index += 1
        label = f"{name}, mean of {len(values)}" if len(values) > 1 else name
        axes.plot(share, middle, color=colour, linestyle=style, linewidth=width, label=label)
        if len(values) > 1:
            axes.fill_between(
                share, middle - spread, middle + spread, color=colour, alpha=0.2, linewidth=0
            )
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"filters of {curves.layer} removed, % of {curves.num_filters}")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title or f"accuracy on {curves.num_images:,} images", loc="left")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.grid(axis="y", color="0.9")
    quiet(axes)
    return figure, axes


def plot_class_bars(
    interpretations: FilterInterpretation | Sequence[FilterInterpretation],
    pictures: Tensor | None = None,
    *,
    title: str | None = None,
) -> tuple[Any, Any]:
    r"""
    For each filter the classes that lose most and least without it, beside the filter.

    Bars are accuracy reductions, whiskers their intervals: a whisker that crosses zero says that
    the images do not show an effect.

    Args:

        interpretations (FilterInterpretation or sequence): From
                    :func:`captum_classfilters.pruning.class_interpretation`.
        pictures (Tensor, optional): A picture for each of them, (number, channels, h, w): weights,
                    or the images that excite the filter most.
                    Default: None
        title (str, optional): Title.

    Returns:
        *tuple* of figure and array of axes (number, 1 or 2), bars last.

    Raises:
        ValueError: Nothing is given, or there is not one picture for each filter.
    """
    chosen = (
        [interpretations]
        if isinstance(interpretations, FilterInterpretation)
        else list(interpretations)
    )
    if not chosen or (pictures is not None and len(pictures) != len(chosen)):
        given = "no" if pictures is None else len(pictures)
        raise ValueError(f"{len(chosen)} filters and {given} pictures: expected one for each.")
    lengths = [len(_effects(one)) for one in chosen]
    figure = new_figure((6.4, 0.5 + sum(0.6 + 0.22 * length for length in lengths)))
    width = 1 if pictures is None else 2
    grid = figure.subplots(
        len(chosen),
        width,
        squeeze=False,
        width_ratios=[1] if width == 1 else [1, 3],
        height_ratios=[1.5 + 0.5 * length for length in lengths],
    )
    for row, one in enumerate(chosen):
        if pictures is not None:
            _draw_filter(grid[row, 0], pictures[row])
        _draw_bars(grid[row, -1], one)
    grid[-1, -1].set_xlabel("accuracy lost without the filter, points")
    if title:
        figure.suptitle(title, size=10, x=0.01, ha="left")
    return figure, grid


def _effects(one: FilterInterpretation) -> list[ClassEffect]:
    """Classes from most to least, none twice."""
    names = {effect.name for effect in one.top}
    return [*one.top, *(effect for effect in one.bottom[::-1] if effect.name not in names)]


def _draw_bars(axes: Any, one: FilterInterpretation) -> None:
    effects = _effects(one)
    values = [100 * effect.reduction for effect in effects]
    places = list(range(len(effects)))
    low = [value - 100 * effect.low for value, effect in zip(values, effects, strict=True)]
    high = [100 * effect.high - value for value, effect in zip(values, effects, strict=True)]
    colours = [_REMOVED if value > 0 else _KEPT for value in values]
    axes.barh(places, values, color=colours, height=0.7)
    axes.errorbar(
        values, places, xerr=[low, high], fmt="none", ecolor="0.3", elinewidth=1, capsize=2
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [effect.name for effect in effects], size=8)
    axes.invert_yaxis()
    if len(one.top) < len(effects):
        axes.axhline(len(one.top) - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_title(
        f"filter {one.filter}: {100 * one.reduction:+.2f} points over all images",
        loc="left",
        size=9,
    )
    quiet(axes)


def _draw_filter(axes: Any, filter_: Tensor) -> None:
    """Weights, or a picture with values in [0, 1] alone."""
    values = filter_.detach().double().cpu()
    size = float(values.abs().max()) or 1.0
    picture = float(values.min()) >= 0 and float(values.max()) <= 1
    if len(values) == 3:
        shown = values if picture else 0.5 + values / (2 * size)
        axes.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
    elif len(values) == 1 and picture:
        axes.imshow(values[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        mean = values.mean(0)
        limit = float(mean.abs().max()) or 1.0
        axes.imshow(mean.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
