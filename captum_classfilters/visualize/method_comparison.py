"""Methods against methods: agreement as heat maps, worth and cost beside them."""

from typing import Any

import numpy as np

from captum_classfilters.metrics import MethodComparison
from captum_classfilters.visualize.figures import COLOURS, GREY, new_figure, quiet


def plot_method_comparison(
    comparison: MethodComparison, *, title: str | None = None
) -> tuple[Any, Any]:
    r"""
    Overlap and rank correlation of all pairs of methods, sufficiency with intervals, and cost.

    Args:

        comparison (MethodComparison): From :func:`captum_classfilters.metrics.compare_methods`.
        title (str, optional): Title.

    Returns:
        *tuple* of figure and its four axes.
    """
    number = len(comparison.names)
    figure = new_figure((13.5, 2.2 + 0.42 * number))
    axes = figure.subplots(1, 4, width_ratios=[1.15, 1.15, 1, 0.6], sharey=True)
    k = comparison.num_filters
    _matrix(
        axes[0],
        comparison.overlap.numpy(),
        comparison.names,
        f"overlap@{k}, by chance {comparison.chance:.2f}",
        (0, 1),
        "viridis",
    )
    axes[0].set_yticks(range(number), comparison.names)
    _matrix(
        axes[1],
        comparison.rank_correlation.numpy(),
        comparison.names,
        "rank correlation of scores",
        (-1, 1),
        "RdBu_r",
    )
    _worth(axes[2], comparison)
    _cost(axes[3], comparison)
    layer = next(iter(comparison.tables.values())).layer
    figure.suptitle(title or f"methods at {layer}, {k} filters for each class", x=0.01, ha="left")
    return figure, axes


def _matrix(
    axes: Any,
    values: Any,
    names: tuple[str, ...],
    title: str,
    limits: tuple[int, int],
    colours: str,
) -> None:
    axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto")
    low, high = limits
    for row in range(len(values)):
        for column in range(len(values)):
            value = values[row, column]
            if np.isnan(value):
                continue
            dark = abs(value) > 0.6 * high if low < 0 else value < 0.6 * high
            colour = "white" if dark else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=7, c=colour)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title(title, loc="left", fontsize=10)


def _worth(axes: Any, comparison: MethodComparison) -> None:
    rows = np.arange(len(comparison.names))
    share = 100 * comparison.sufficiency.numpy()
    interval = 100 * comparison.sufficiency_interval().numpy()
    spread = np.stack([share - interval[:, 0], interval[:, 1] - share])
    axes.errorbar(share, rows, xerr=spread, fmt="o", color=COLOURS[0])
    lines = [(100 * comparison.accuracy, "all filters", "black", "--")]
    if len(comparison.random_hits):
        lines.append((100 * comparison.random_sufficiency, "random", GREY, ":"))
    for place, name, colour, style in lines:
        axes.axvline(place, color=colour, linestyle=style, linewidth=1.2, label=name)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("accuracy, each class by its filters alone, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes.set_title("sufficiency", loc="left", fontsize=10)
    axes.grid(axis="x", color="0.9")
    quiet(axes)


def _cost(axes: Any, comparison: MethodComparison) -> None:
    seconds = [comparison.seconds[name] for name in comparison.names]
    known = [value for value in seconds if value == value]
    axes.barh(
        range(len(seconds)), [0 if value != value else value for value in seconds], color=GREY
    )
    for row, value in enumerate(seconds):
        shown = "given" if value != value else f"{value:.3g}"
        axes.text(value if value == value else 0, row, f" {shown}", va="center", size=7)
    axes.set_xlim(0, 1.3 * max(known, default=1.0))
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title("cost", loc="left", fontsize=10)
    quiet(axes)
