"""Methods against methods: agreement as heat maps, worth and cost beside them."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import counted
from captum_classfilters.metrics.compare_methods import MethodComparison
from captum_classfilters.visualize.figures import (
    COLORS,
    GRAY,
    MISSING,
    SIGNED,
    UNSIGNED,
    FigureAndGrid,
    drawing,
    grid_of,
    headline,
    quiet,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@arguments_checked
def plot_method_comparison(
    comparison: MethodComparison,
    *,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    Overlap and rank correlation of all pairs of methods, sufficiency with intervals, and cost.

    Args:

        comparison (MethodComparison): From :func:`captum_classfilters.metrics.compare_methods`.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and four axes in a row to draw on; new ones by
                    default.

    Returns:
        *tuple* of figure and its four axes.
    """
    names = short_names(comparison.names, synonyms=False)
    size = (13.5, 2.2 + 0.42 * len(names))
    figure, grid = grid_of(plt_fig_axis, 1, 4, size, width_ratios=[1.15, 1.15, 1, 0.6], sharey=True)
    axes, k = grid[0], comparison.num_filters
    overlap = f"overlap@{k}, by chance {comparison.chance:.2f}"
    _matrix(axes[0], comparison.overlap.numpy(), names, overlap, (0, 1), UNSIGNED)
    correlation = comparison.rank_correlation.numpy()
    _matrix(axes[1], correlation, names, "rank correlation of scores", (-1, 1), SIGNED)
    _worth(figure, axes[2], comparison)
    _cost(axes[3], comparison)
    for place, panel in enumerate(axes):
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_yticks(range(len(names)), names)
        panel.tick_params(labelsize=8, labelleft=place == 0)
    layer = next(iter(comparison.tables.values())).layer
    told = f"methods at {layer}, {counted(k, 'filter')} for each class"
    headline(figure, title, told, x=0.01, ha="left")
    return figure, axes


def _matrix(
    axes: "Axes",
    values: NDArray[np.float64],
    names: list[str],
    title: str,
    limits: tuple[int, int],
    cmap: str,
) -> None:
    low, high = limits
    axes.set_facecolor(MISSING)
    axes.imshow(values, vmin=low, vmax=high, cmap=cmap, aspect="auto")
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        dark = abs(value) > 0.6 * high if low < 0 else value < 0.6 * high
        color = "white" if dark else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=7, c=color)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)


def _worth(figure: "Figure", axes: "Axes", comparison: MethodComparison) -> None:
    rows = np.arange(len(comparison.names))
    share = 100 * comparison.sufficiency.numpy()
    interval = 100 * comparison.sufficiency_interval().numpy()
    spread = np.stack([share - interval[:, 0], interval[:, 1] - share])
    axes.errorbar(share, rows, xerr=spread, fmt="o", color=COLORS[0])
    lines = [(100 * comparison.accuracy, "all filters", "black", "--")]
    if len(comparison.random_hits):
        lines.append((100 * comparison.random_sufficiency, "random", GRAY, ":"))
    for place, name, color, style in lines:
        axes.axvline(place, color=color, linestyle=style, linewidth=1.2, label=name)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("accuracy, each class by its filters alone, %", fontsize=8)
    below = drawing("transforms").offset_copy(axes.transAxes, fig=figure, y=-32, units="points")
    axes.legend(
        frameon=False,
        fontsize=7,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
    )
    axes.set_title("sufficiency", loc="left", fontsize=10)
    axes.grid(axis="x", color="0.9")
    quiet(axes)


def _cost(axes: "Axes", comparison: MethodComparison) -> None:
    seconds = np.array([comparison.seconds[name] for name in comparison.names], dtype=float)
    known = np.nan_to_num(seconds)
    axes.barh(range(len(seconds)), known, color=GRAY)
    for row, value in enumerate(seconds):
        shown = "given" if np.isnan(value) else f"{value:.3g}"
        axes.text(known[row], row, f" {shown}", va="center", size=7)
    axes.set_xlim(0, 1.3 * known.max() or 1.0)
    axes.set_xlabel("seconds", fontsize=8)
    axes.set_title("cost", loc="left", fontsize=10)
    quiet(axes)
