"""Similarities of profiles as a heat map."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_classfilters.visualize.arrays import chosen, numbers_of, out_of
from captum_classfilters.visualize.class_filters import write_cells
from captum_classfilters.visualize.figures import (
    MISSING,
    UNSIGNED,
    FigureAndAxes,
    axes_of,
    set_ticks,
    short_names,
)


def plot_profile_similarity(
    similarities: NDArray[np.floating] | Tensor,
    names: Sequence[str],
    *,
    label: str = "Jaccard similarity",
    profiles: int | Sequence[int | str] = 40,
    title: str | None = None,
    plt_fig_axis: FigureAndAxes | None = None,
) -> FigureAndAxes:
    r"""
    Draw a matrix of similarities; the diagonal does not set the colors, and NaN is gray.

    Args:

        similarities (ndarray): Shape (n, n), from
                    :func:`captum_classfilters.spectral.similarity_matrix` for example.
        names (sequence of str): Of the n profiles.
        label (str): Of the color bar.
                    Default: "Jaccard similarity"
        profiles (int or sequence): Draw at most so many profiles, those most similar to another; or
                    these, by their indices or names.
                    Default: 40
        title (str, optional): Title.
        plt_fig_axis (tuple, optional): Figure and axes to draw on; new ones by default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: The matrix is not square, the names do not fit, or a value is infinite.
    """
    values = numbers_of(similarities, "The similarities", missing=True)
    if values.dim() != 2 or values.shape != (len(names), len(names)) or not len(names):
        raise ValueError(
            f"similarities have shape {tuple(values.shape)} for {len(names)} names; expected (n, n)."
        )
    values = values.clone().fill_diagonal_(float("nan"))
    rows = chosen(profiles, values.nan_to_num(nan=-1.0).amax(1), "profiles", list(names))
    shown = values[rows][:, rows]
    side = min(12.0, 2.6 + 0.32 * len(rows))
    figure, axes = axes_of(plt_fig_axis, (side + 0.9, side))
    axes.set_facecolor(MISSING)
    top = float(shown.nan_to_num().max()) or 1.0
    image = axes.imshow(shown.numpy(), cmap=UNSIGNED, vmin=0, vmax=top, interpolation="nearest")
    if len(rows) <= 20:
        write_cells(axes, shown, "{:.2f}", top)
    short = short_names(names)
    set_ticks(axes, "x", [short[row] for row in rows.tolist()], rotation=90)
    set_ticks(axes, "y", [short[row] for row in rows.tolist()])
    axes.tick_params(labelsize=8)
    told = ["similarity of profiles", out_of(len(rows), len(values), "profiles")]
    axes.set_title(title or "; ".join(filter(None, told)), loc="left")
    figure.colorbar(image, ax=axes, label=label)
    return figure, axes
