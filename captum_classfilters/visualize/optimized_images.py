"""Sheets of optimized images."""

from collections.abc import Sequence

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.types import Keywords
from captum_classfilters.visualize.arrays import Channels, picture_of, show_picture
from captum_classfilters.visualize.feature_visualization import FeatureVisualization
from captum_classfilters.visualize.figures import (
    FigureAndGrid,
    headline,
    sheet_of,
    short_names,
    short_number,
)

# Dark on bright, whatever is below.
_NOTICE: Keywords = {
    "ha": "center",
    "va": "center",
    "size": 8,
    "color": "black",
    "bbox": {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2},
}


@arguments_checked
def plot_features(
    features: FeatureVisualization,
    names: Sequence[str] | None = None,
    *,
    columns: int = 8,
    channels: Channels = None,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    Draw optimized images, each under its name and the value that its objective reaches.

    An image whose objective had no gradient, of a dead filter for example, is the noise that it
    started from, and says that nothing was optimized.

    Args:

        features (FeatureVisualization): From
                    :func:`captum_classfilters.visualize.visualize_features`.
        names (sequence of str, optional): Of the B objectives; by default their numbers.
                    Default: None
        columns (int): Images in a row.
                    Default: 8
        channels (tuple of int, optional): Channels of the images to draw as red, green and blue; by
                    default one is gray, three are colors, and of other numbers the mean is drawn.
                    Default: None
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and B axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and array of B axes.

    Raises:
        ValueError: The names are not B, or there is no column.
    """
    num_images = len(features.images)
    names = [str(name) for name in (range(num_images) if names is None else names)]
    if len(names) != num_images or columns < 1:
        raise ValueError(
            f"{len(names)} names and {columns} columns for {num_images} images; expected a name for each "
            "image and a column at least."
        )
    labels = short_names(names, 17)
    wide = min(columns, num_images)
    size = (1.25 * wide + 0.3, 1.55 * -(-num_images // wide) + (0.4 if title else 0))
    figure, grid = sheet_of(plt_fig_axis, num_images, wide, size)
    for index, axes in enumerate(grid):
        axes.set_axis_off()
        show_picture(axes, picture_of(features.images[index], channels, f"image {index}"))
        value, optimized = float(features.values[index]) + 0.0, bool(features.optimized[index])
        reached = short_number(value) if optimized else "not optimized"
        axes.set_title(f"{labels[index]}\n{reached}", size=8, pad=2)
        if not optimized:
            axes.text(0.5, 0.5, "nothing was\noptimized", transform=axes.transAxes, **_NOTICE)
    headline(figure, title, size=10)
    return figure, grid
