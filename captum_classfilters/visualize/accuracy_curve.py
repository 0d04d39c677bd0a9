"""Accuracy against the number of filters kept, with controls."""

from typing import Any

from captum_classfilters.heads import AccuracyCurve
from captum_classfilters.visualize.figures import COLOURS, GREY, axes_of, quiet


def plot_accuracy_curve(
    curve: AccuracyCurve,
    *,
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    Accuracy of the decomposed head against the number of filters each class keeps.

    Args:

        curve (AccuracyCurve): From :func:`captum_classfilters.accuracy_curve`.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.
    """
    figure, axes = axes_of(plt_fig_axis, (6.4, 4.0))
    x = curve.num_filters
    axes.axhline(
        100 * curve.full_accuracy, color="black", linestyle="--", linewidth=1, label="all filters"
    )
    for index, (name, values) in enumerate(curve.accuracy.items()):
        axes.plot(
            x,
            [100 * value for value in values],
            marker="os^Dv"[index % 5],
            markersize=5,
            color=COLOURS[index % len(COLOURS)],
            label=name,
        )
    if curve.random_mean:
        middle = [100 * value for value in curve.random_mean]
        axes.plot(x, middle, color=GREY, linestyle=":", label="random filters")
        if curve.random_standard_deviation:
            spread = [100 * value for value in curve.random_standard_deviation]
            low = [a - b for a, b in zip(middle, spread, strict=True)]
            high = [a + b for a, b in zip(middle, spread, strict=True)]
            axes.fill_between(x, low, high, color=GREY, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    axes.set_xlabel("filters kept for each class")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title or f"decomposed head on {curve.num_images:,} images", loc="left")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(axis="y", color="0.9")
    quiet(axes)
    return figure, axes
