"""Explanations of images beside each other, through Captum's own visualiser."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import visualization
from numpy.typing import NDArray
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.visualize.figures import new_figure


def plot_explanations(
    images: Tensor,
    attributions: Mapping[str, Tensor],
    *,
    titles: Sequence[str] | None = None,
    method: str = "heat_map",
    sign: str = "all",
    outlier_perc: float = 2,
) -> tuple[Any, Any]:
    r"""
    A grid: one row for each image, the image first, then one column for each explanation.

    Every map is drawn by ``captum.attr.visualization.visualize_image_attr`` and scaled by itself, so
    colours show *where*, not how much. A map that is zero everywhere, which Captum refuses, is
    drawn blank and says so.

    Args:

        images (Tensor): Shape (N, 1 or 3, H, W). Values outside [0, 1] are rescaled for display.
        attributions (mapping): Titles and attributions (N, channels, H, W).
        titles (sequence of str, optional): N titles, for the rows.
        method (str): Captum's, ``"heat_map"`` or ``"blended_heat_map"``.
                    Default: "heat_map"
        sign (str): Captum's, ``"all"``, ``"positive"``, ``"absolute_value"`` or ``"negative"``.
                    Default: "all"
        outlier_perc (float): Captum's: share of outliers, in per cent, that do not set the scale.
                    Default: 2

    Returns:
        *tuple* of figure and array of axes (N, 1 + number of explanations).

    Raises:
        ValueError: Shapes do not fit.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, 1 or 3, H, W).")
    for name, attribution in attributions.items():
        if attribution.dim() != 4 or attribution.shape[0] != len(images):
            raise ValueError(
                f"{name!r} has shape {tuple(attribution.shape)}; expected {len(images)} maps "
                "(N, channels, H, W)."
            )
    columns = 1 + len(attributions)
    figure = new_figure((2.1 * columns, 2.1 * len(images) + 0.3))
    grid = figure.subplots(len(images), columns, squeeze=False)
    for row, axes in enumerate(grid):
        picture = _displayed(images[row])
        axes[0].imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray")
        if titles is not None:
            axes[0].set_ylabel(titles[row], size=9)
        for one, (name, attribution) in zip(axes[1:], attributions.items(), strict=True):
            _draw_map(figure, one, attribution[row], picture, method, sign, outlier_perc)
            if row == 0:
                one.set_title(name, size=9)
    grid[0, 0].set_title("image", size=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_color("0.8")
    return figure, grid


def plot_filter_maps(
    image: Tensor,
    attributions: Tensor,
    class_filters: ClassFilters,
    class_: int | str,
    *,
    num_filters: int = 5,
    title: str | None = None,
) -> tuple[Any, Any]:
    r"""
    An image and the contribution maps of its class's filters, each with its contribution.

    Args:

        image (Tensor): Shape (1 or 3, H, W).
        attributions (Tensor): Shape (K, h, w): :class:`LayerFilterContribution` of this image.
        class_filters (ClassFilters): A table with a selection.
        class_ (int or str): The class.
        num_filters (int): How many of its filters to draw.
                    Default: 5
        title (str, optional): Title.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: Shapes do not fit.
    """
    if attributions.dim() != 3 or len(attributions) != class_filters.num_filters:
        raise ValueError(
            f"attributions have shape {tuple(attributions.shape)}; expected one image's "
            f"({class_filters.num_filters}, h, w)."
        )
    filters = class_filters.filters_of(class_)[:num_filters].tolist()
    figure = new_figure((1.9 * (1 + len(filters)), 2.4))
    grid = figure.subplots(1, 1 + len(filters), squeeze=False)[0]
    picture = _displayed(image)
    grid[0].imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray")
    grid[0].set_title(title or f"{class_filters.class_names[class_filters.class_index(class_)]}")
    limit = float(attributions[filters].abs().max()) or 1.0
    for axes, filter_ in zip(grid[1:], filters, strict=True):
        drawn = attributions[filter_].detach().cpu().numpy()
        axes.imshow(drawn, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_title(f"filter {filter_}\n{float(drawn.sum()):+.2f}", size=9)
    for axes in grid:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure, grid


def _draw_map(
    figure: Any,
    axes: Any,
    attribution: Tensor,
    picture: NDArray[Any],
    method: str,
    sign: str,
    outlier_perc: float,
) -> None:
    values = attribution.detach().cpu().permute(1, 2, 0).numpy().astype(np.float64)
    try:
        visualization.visualize_image_attr(
            values,
            np.repeat(picture, 3, axis=-1) if picture.shape[-1] == 1 else picture,
            method=method,
            sign=sign,
            outlier_perc=outlier_perc,
            plt_fig_axis=(figure, axes),
            use_pyplot=False,
        )
    except AssertionError:
        # Captum cannot scale a map without values of the asked sign.
        axes.imshow(np.ones(values.shape[:2]), cmap="gray", vmin=0, vmax=1)
        axes.text(0.5, 0.5, "zero", transform=axes.transAxes, ha="center", va="center")


def _displayed(image: Tensor) -> NDArray[Any]:
    """(C, H, W) as (H, W, C) in [0, 1]."""
    values = image.detach().cpu().float().permute(1, 2, 0)
    low, high = values.min(), values.max()
    if float(low) < 0 or float(high) > 1:
        values = (values - low) / torch.clamp(high - low, min=1e-12)
    picture: NDArray[Any] = values.numpy()
    return picture
