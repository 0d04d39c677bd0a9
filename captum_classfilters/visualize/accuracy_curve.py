"""Accuracy against the number of filters kept, with controls."""

from collections.abc import Sequence

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import counted
from captum_classfilters.heads.accuracy_curve import AccuracyCurve
from captum_classfilters.visualize.figures import (
    COLORS,
    GRAY,
    FigureAndAxes,
    axes_of,
    quiet,
    short_names,
)


@arguments_checked
def plot_accuracy_curve(
    curve: AccuracyCurve,
    *,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Accuracy of the decomposed head against the number of filters each class keeps, in rising order.

    Args:

        curve (AccuracyCurve): From :func:`captum_classfilters.accuracy_curve`.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.
    """
    figure, axes = axes_of(plt_fig_axis, (6.4, 4.0))
    order = sorted(range(len(curve.num_filters)), key=curve.num_filters.__getitem__)
    x = [curve.num_filters[place] for place in order]
    axes.axhline(
        100 * curve.full_accuracy, color="black", linestyle="--", linewidth=1, label="all filters"
    )
    labels = short_names(curve.accuracy, synonyms=False)
    for index, values in enumerate(curve.accuracy.values()):
        axes.plot(
            x,
            _percent(values, order),
            marker="os^Dv"[index % 5],
            markersize=5,
            color=COLORS[index % len(COLORS)],
            label=labels[index],
        )
    if curve.random_mean:
        middle = _percent(curve.random_mean, order)
        axes.plot(x, middle, color=GRAY, linestyle=":", label="random filters")
        if curve.random_standard_deviation:
            spread = _percent(curve.random_standard_deviation, order)
            low = [max(0.0, a - b) for a, b in zip(middle, spread, strict=True)]
            high = [min(100.0, a + b) for a, b in zip(middle, spread, strict=True)]
            axes.fill_between(x, low, high, color=GRAY, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    ticks = _apart(x)
    axes.set_xticks(ticks, [str(value) for value in ticks])
    axes.minorticks_off()
    axes.set_xlabel("filters kept for each class")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title or f"decomposed head on {counted(curve.num_images, 'image')}", loc="left")
    axes.legend(frameon=False, loc="best")
    axes.grid(axis="y", color="0.9")
    quiet(axes)
    return figure, axes


def _percent(shares: Sequence[float], order: Sequence[int]) -> list[float]:
    return [100 * shares[place] for place in order]


def _apart(numbers: list[int]) -> list[int]:
    """Those of the rising numbers whose labels do not touch on a logarithmic axis."""
    whole = numbers[-1] / numbers[0]
    kept = [numbers[-1]]
    for value in reversed(numbers[:-1]):
        if kept[-1] / value >= whole ** (1 / 14):
            kept.append(value)
    return kept[::-1]
