"""What models still know of a class."""

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters.answers.audit_forgetting import ForgettingAudit
from captum_classfilters.visualize.figures import (
    COLORS,
    FigureAndAxes,
    axes_of,
    quiet,
    short_names,
)

_MEASURES = {
    "forget_accuracy": "class,\nnamed",
    "retain_accuracy": "others,\nright",
    "linear_probe": "linear\nprobe",
    "neighbor_probe": "nearest\nneighbors",
    "other_classes_probe": "by others'\nscores",
}


@arguments_checked
def plot_forgetting(
    audit: ForgettingAudit,
    *,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    What models know of a class that should be forgotten, and what probes still find, as bars.

    Bars of a group are models. The dashed line is what a probe has by chance.

    Args:

        audit (ForgettingAudit): From :func:`captum_classfilters.answers.audit_forgetting`.
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.
    """
    names = short_names(audit.models, synonyms=False)
    figure, axes = axes_of(plt_fig_axis, (8.0, max(3.0, 0.2 * len(names))))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [float(getattr(audit, measure)[place]) for measure in _MEASURES]
        left = [group - 0.4 + width * (place + 0.5) for group in range(len(values))]
        color, faint = COLORS[place % len(COLORS)], 1 - 0.3 * (place // len(COLORS) % 3)
        axes.bar(left, values, 0.92 * width, color=color, alpha=faint, label=name)
    axes.hlines(0.5, 1.5, 4.5, color="black", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(_MEASURES)), list(_MEASURES.values()), fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy; of probes balanced")
    axes.set_title(title or "What is still known of the class", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    quiet(axes)
    return figure, axes
