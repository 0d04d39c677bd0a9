"""Sheets of optimised images."""

from collections.abc import Sequence
from typing import Any

from captum_classfilters.visualize.explanations import _displayed
from captum_classfilters.visualize.feature_visualization import FeatureVisualization
from captum_classfilters.visualize.figures import new_figure


def plot_features(
    features: FeatureVisualization,
    names: Sequence[str] | None = None,
    *,
    columns: int = 8,
    title: str | None = None,
) -> tuple[Any, Any]:
    r"""
    Draw optimised images, each under its name and the value that its objective reaches.

    Args:

        features (FeatureVisualization): From
                    :func:`captum_classfilters.visualize.visualize_features`.
        names (sequence of str, optional): Of the B objectives; by default their numbers.
                    Default: None
        columns (int): Images in a row.
                    Default: 8
        title (str, optional): Title.

    Returns:
        *tuple* of figure and array of B axes.

    Raises:
        ValueError: The names are not B, or there is no column.
    """
    number = len(features.images)
    names = [str(one) for one in (range(number) if names is None else names)]
    if len(names) != number or columns < 1:
        raise ValueError(
            f"{len(names)} names and {columns} columns for {number} images; expected a name for each "
            "image and a column at least."
        )
    wide = min(columns, number)
    rows = -(-number // wide)
    figure = new_figure((1.25 * wide + 0.3, 1.55 * rows + (0.4 if title else 0)))
    grid = figure.subplots(rows, wide, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, name, value in zip(
        grid, features.images, names, features.values.tolist(), strict=False
    ):
        picture = _displayed(image)
        picture = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{name}\n{value:.2g}", size=8, pad=2)
    figure.suptitle(title or "", size=10)
    return figure, grid[:number]
