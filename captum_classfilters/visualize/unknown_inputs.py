"""Which filters make images unknown."""

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.ranking import descending
from captum_classfilters.answers.unknown_inputs import UnknownReasons
from captum_classfilters.visualize.arrays import out_of
from captum_classfilters.visualize.figures import (
    COLORS,
    FigureAndAxes,
    axes_of,
    quiet,
    short_names,
)

_NAMED = 5  # filters beside a row


@arguments_checked
def plot_unknown_reasons(
    reasons: UnknownReasons,
    *,
    most: int = 8,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    The filters that make images unknown, and how far each brings the score back.

    A row is an image, the most unknown first. A ring is its score, and each dot the score once one
    more filter has what the class predicted has of it; right of the line an image is called unknown.
    Beside the rows stand the filters, in the same order.

    Args:

        reasons (UnknownReasons): From :meth:`captum_classfilters.answers.ClassFilterOOD.reasons`.
        most (int): Draw at most so many images.
                    Default: 8
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: ``most`` is below 1.
    """
    if most < 1:
        raise ValueError(f"most={most}; expected a positive number.")
    shown = descending(reasons.scores)[:most].tolist()
    figure, axes = axes_of(plt_fig_axis, (7.2, 1.3 + 0.34 * max(1, len(shown))))
    scores, after = reasons.scores.double(), reasons.scores_after.double()
    axes.axvline(reasons.threshold, color="black", linestyle="--", linewidth=0.8)
    for row, image in enumerate(shown):
        path = [float(scores[image]), *after[image].tolist()]
        axes.plot(path, [row] * len(path), color=COLORS[0], linewidth=1, alpha=0.6)
        axes.plot(path[1:], [row] * (len(path) - 1), "o", color=COLORS[0], markersize=4)
        axes.plot(path[:1], [row], "o", color=COLORS[1], fillstyle="none")
        named = reasons.filters[image].tolist()
        filters = ", ".join(map(str, named[:_NAMED])) + (", …" if len(named) > _NAMED else "")
        axes.text(
            1.01, row, f"filters {filters}", va="center", fontsize=7,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    names = short_names(reasons.class_names)
    taken = [f"image {image}, as {names[int(reasons.predicted[image])]}" for image in shown]
    axes.set_yticks(range(len(shown)), taken, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("score, with one filter after another put back; unknown right of the line")
    unknown, flipped = int(reasons.unknown.sum()), int(reasons.flipped.sum())
    told = f"{unknown:,} of {len(scores):,} images are unknown; {flipped:,} no more with filters put back"
    if drawn := out_of(len(shown), len(scores), "images"):
        told += f"\n{drawn}, the most unknown"
    axes.set_title(title or told, loc="left", fontsize=9)
    quiet(axes)
    return figure, axes
