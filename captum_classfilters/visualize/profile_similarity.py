"""Similarities of profiles as a heat map."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captum_classfilters.visualize.figures import axes_of


def plot_profile_similarity(
    similarities: NDArray[Any],
    names: Sequence[str],
    *,
    label: str = "Jaccard similarity",
    title: str | None = None,
    plt_fig_axis: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    r"""
    Draw a matrix of similarities; the diagonal does not set the colours.

    Args:

        similarities (ndarray): Shape (n, n), from
                    :func:`captum_classfilters.spectral.similarity_matrix` say.
        names (sequence of str): Of the n profiles.
        label (str): Of the colour bar.
                    Default: "Jaccard similarity"
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: The matrix is not square, or the names do not fit.
    """
    values = np.array(similarities, dtype=float)
    if values.ndim != 2 or values.shape != (len(names), len(names)):
        raise ValueError(
            f"similarities have shape {values.shape} for {len(names)} names; expected (n, n)."
        )
    np.fill_diagonal(values, np.nan)
    side = min(12.0, 2.6 + 0.32 * len(values))
    figure, axes = axes_of(plt_fig_axis, (side + 0.9, side))
    axes.set_facecolor("0.85")
    image = axes.imshow(values, cmap="viridis", vmin=0, interpolation="nearest")
    if len(values) <= 20:
        top = np.nanmax(values) if np.isfinite(values).any() else 1.0
        for row, column in np.argwhere(np.isfinite(values)):
            value = values[row, column]
            colour = "black" if value > 0.6 * top else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=6, c=colour)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8)
    axes.set_title(title or "similarity of profiles", loc="left")
    figure.colorbar(image, ax=axes, label=label)
    return figure, axes
