"""The filters for one class against another, with their intervals."""

import torch

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import counted
from captum_classfilters.identify.contrastive import FilterContrast
from captum_classfilters.visualize.figures import (
    NEGATIVE,
    POSITIVE,
    FigureAndAxes,
    axes_of,
    exactness,
    lines_of,
    quiet,
    short_names,
)

_REACH = 4  # times the largest score: what an interval has room for


@arguments_checked
def plot_filter_contrast(
    contrast: FilterContrast,
    *,
    num_filters: int = 8,
    confidence: float = 0.95,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    The filters that speak most for and most against a class, as bars with intervals.

    Of few images intervals are many times as long as the bars; the picture then cuts them, and says so.

    Args:

        contrast (FilterContrast): From :func:`captum_classfilters.identify.contrast_classes`, or a
                    cell of :func:`captum_classfilters.identify.confusion_filters`.
        num_filters (int): How many of each side, at most.
                    Default: 8
        confidence (float): Coverage of the intervals, which hold for all filters at once.
                    Default: 0.95
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.
    """
    num_shown = min(num_filters, len(contrast.scores) // 2 or 1)
    shown = torch.cat([contrast.strongest(num_shown), contrast.opposing(num_shown).flip(0)])
    shown = torch.tensor(list(dict.fromkeys(shown.tolist())))
    figure, axes = axes_of(plt_fig_axis, (6.0, 1.4 + 0.24 * len(shown)))
    scores = contrast.scores[shown].numpy()
    interval = contrast.interval(confidence, simultaneous=True)[shown].numpy()
    rows = range(len(shown))
    colors = [POSITIVE if value >= 0 else NEGATIVE for value in scores]
    axes.barh(rows, scores, color=colors, alpha=0.75)
    axes.hlines(rows, interval[:, 0], interval[:, 1], color="black", linewidth=1)
    axes.axvline(0, color="black", linewidth=0.8)
    reach = _REACH * float(abs(scores).max())
    cut = reach > 0 and bool((abs(interval) > reach).any())
    if cut:
        axes.set_xlim(-reach, reach)
    axes.set_yticks(rows, [f"filter {index}" for index in shown.tolist()], fontsize=8)
    axes.invert_yaxis()
    favored, against = short_names([contrast.favored, contrast.against])
    axes.set_xlabel(lines_of(f"evidence for {favored} rather than {against}", 50))
    told = [
        f"{contrast.method} at {contrast.layer}",
        exactness(contrast.provenance),
        counted(contrast.num_images, "image"),
        "intervals cut" if cut else "",
    ]
    axes.set_title(title or ", ".join(filter(None, told)), loc="left", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    quiet(axes)
    return figure, axes
