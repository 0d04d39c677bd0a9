"""Explanations of images beside each other, through Captum's own visualizer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from captum.attr import visualization
from numpy.typing import NDArray
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import kind_of
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.visualize.arrays import (
    Channels,
    numbers_of,
    picture_of,
    show_picture,
    tensor_of,
)
from captum_classfilters.visualize.figures import (
    SIGNED,
    FigureAndGrid,
    bare,
    exactness,
    grid_of,
    headline,
    lines_of,
    no_mathematics,
    short_name,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Warm is positive and cold negative, whichever of the signs are drawn.
_COLOR_MAPS = {"all": SIGNED, "positive": "Reds", "negative": "Blues", "absolute_value": "viridis"}
_METHODS = ("heat_map", "blended_heat_map")


@arguments_checked
def plot_explanations(
    images: Tensor | NDArray[np.generic],
    attributions: Mapping[str, Tensor | NDArray[np.generic] | tuple[Tensor, ...]],
    *,
    titles: Sequence[str] | None = None,
    method: str = "heat_map",
    sign: str = "all",
    outlier_perc: float = 2,
    cmap: "str | Colormap | None" = None,
    channels: Channels = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    A grid: one row for each image, the image first, then one column for each explanation.

    Every map is drawn by ``captum.attr.visualization.visualize_image_attr``, as the sum over its
    channels, and scaled by itself, so colors show *where*, not how much. A map without values of
    the sign that is drawn, which Captum refuses, is drawn blank and says so.

    Args:

        images (Tensor or ndarray): Shape (N, C, H, W), of any type. One channel is gray, three are
                    colors, and of other numbers the mean is drawn, unless ``channels`` are given.
                    Values outside [0, 1] are rescaled for display.
        attributions (mapping): Titles and attributions (N, channels, h, w), Tensors or ndarrays, or a
                    tuple of one Tensor.
        titles (sequence of str, optional): N titles, for the rows.
        method (str): Captum's, ``"heat_map"`` or ``"blended_heat_map"``, which needs maps of the
                    images' size.
                    Default: "heat_map"
        sign (str): Captum's, ``"all"``, ``"positive"``, ``"absolute_value"`` or ``"negative"``.
                    Default: "all"
        outlier_perc (float): Captum's: share of outliers, in per cent, that do not set the scale.
                    Default: 2
        cmap (str or Colormap, optional): Captum's; by default red is positive and blue negative.
                    Default: None
        channels (tuple of int, optional): Channels of the images to draw as red, green and blue.
                    Default: None
        plt_fig_axis (tuple, optional): Figure and N (1 + number of explanations) axes to draw on;
                    new ones by default.

    Returns:
        *tuple* of figure and array of axes (N, 1 + number of explanations).

    Raises:
        ValueError: Shapes do not fit, an option is unknown, or something drawn is NaN or infinite.
    """
    if method not in _METHODS or sign not in _COLOR_MAPS or not 0 <= outlier_perc < 100:
        raise ValueError(
            f"method={method!r}, sign={sign!r}, outlier_perc={outlier_perc}; expected one of "
            f"{list(_METHODS)}, one of {list(_COLOR_MAPS)}, and a number in [0, 100)."
        )
    images = tensor_of(images, "The images")
    maps = _checked_maps(images, attributions, method)
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images.")
    pictures = [picture_of(image, channels, f"image {n}") for n, image in enumerate(images)]
    size = (2.1 * (1 + len(maps)), 2.1 * len(images) + 0.3)
    figure, grid = grid_of(plt_fig_axis, len(images), 1 + len(maps), size)
    row_titles = None if titles is None else short_names(titles)
    color_map = _COLOR_MAPS[sign] if cmap is None else cmap
    for row, (axes, picture) in enumerate(zip(grid, pictures, strict=True)):
        show_picture(axes[0], picture)
        if row_titles is not None:
            axes[0].set_ylabel(row_titles[row], size=9)
        for place, (name, values) in zip(axes[1:], maps.items(), strict=True):
            _draw_map(figure, place, values[row], picture, method, sign, outlier_perc, color_map)
            if row == 0:
                place.set_title(lines_of(no_mathematics(name), 24), size=9)
    grid[0, 0].set_title("image", size=9)
    for axes in grid.flat:
        bare(axes)
    return figure, grid


@arguments_checked
def plot_filter_maps(
    image: Tensor | NDArray[np.generic],
    attributions: Tensor | NDArray[np.generic],
    class_filters: ClassFilters,
    class_: int | str,
    *,
    num_filters: int = 5,
    channels: Channels = None,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    An image and the contribution maps of its class's filters, each with its contribution.

    Args:

        image (Tensor or ndarray): Shape (C, H, W), as in :func:`plot_explanations`.
        attributions (Tensor or ndarray): Shape (K, h, w): :class:`LayerFilterContribution` of this
                    image.
        class_filters (ClassFilters): A table with a selection.
        class_ (int or str): The class.
        num_filters (int): How many of its filters to draw.
                    Default: 5
        channels (tuple of int, optional): As in :func:`plot_explanations`.
                    Default: None
        title (str, optional): Title; by default method and layer, and whether contributions are
                    exact.
        plt_fig_axis (tuple, optional): Figure and 1 + ``num_filters`` axes to draw on; new ones by
                    default.

    Returns:
        *tuple* of figure and axes.

    Raises:
        ValueError: Shapes do not fit, the class has no selected filters, or something drawn is NaN
                    or infinite.
    """
    values = numbers_of(attributions, "The attributions")
    if values.dim() != 3 or len(values) != class_filters.num_filters:
        raise ValueError(
            f"attributions have shape {tuple(values.shape)}; expected one image's "
            f"({class_filters.num_filters}, h, w)."
        )
    name = class_filters.class_names[class_filters.class_index(class_)]
    filters = class_filters.filters_of(class_)[:num_filters].tolist()
    if num_filters < 1:
        raise ValueError(f"num_filters={num_filters}; expected a positive number.")
    if not filters:
        raise ValueError(
            f"No filters to draw for the class {name!r}: choose some with "
            "`class_filters.select(num_filters)`."
        )
    picture = picture_of(image, channels)
    size = (max(1.9 * (1 + len(filters)), 4.6), 2.7)
    figure, grid = grid_of(plt_fig_axis, 1, 1 + len(filters), size)
    grid = grid[0]
    show_picture(grid[0], picture)
    grid[0].set_title(short_name(name), size=9)
    told = [f"{class_filters.method} at {class_filters.layer}"]
    told += [exactness(class_filters.provenance)]
    headline(figure, title, ", ".join(filter(None, told)), size=10, x=0.01, ha="left")
    limit = float(values[filters].abs().max()) or 1.0
    for axes, filter_ in zip(grid[1:], filters, strict=True):
        drawn = values[filter_].numpy()
        axes.imshow(drawn, cmap=SIGNED, vmin=-limit, vmax=limit)
        axes.set_title(f"filter {filter_}\n{float(drawn.sum()):+.2f}", size=9)
    for axes in grid:
        bare(axes)
    return figure, grid


def _checked_maps(
    images: Tensor,
    attributions: Mapping[str, Tensor | NDArray[np.generic] | tuple[Tensor, ...]],
    method: str,
) -> dict[str, NDArray[np.float64]]:
    """The maps to draw by name, each (N, h, w)."""
    if images.dim() != 4 or not images.numel():
        raise ValueError(
            f"images have shape {tuple(images.shape)}; expected (N, C, H, W) with an image at least."
        )
    if not isinstance(attributions, Mapping):
        raise ValueError(
            f"attributions is {kind_of(attributions)}; expected titles and attributions, "
            '{"saliency": attributions} for example.'
        )
    maps = {}
    for name, given in attributions.items():
        alone = isinstance(given, (tuple, list)) and len(given) == 1  # as Captum has of tuples
        attribution = tensor_of(given[0] if alone else given, f"The attributions {name!r}")
        if attribution.dim() != 4 or attribution.shape[0] != len(images):
            raise ValueError(
                f"{name!r} has shape {tuple(attribution.shape)}; expected {len(images)} maps "
                "(N, channels, H, W)."
            )
        if method == "blended_heat_map" and attribution.shape[2:] != images.shape[2:]:
            raise ValueError(
                f"{name!r} has maps of {tuple(attribution.shape[2:])} for images of "
                f"{tuple(images.shape[2:])}, which would lie askew on them; enlarge them with "
                "captum.attr.LayerAttribution.interpolate, or choose method='heat_map'."
            )
        maps[name] = numbers_of(attribution, f"The attributions {name!r}").sum(1).numpy()
    return maps


def _draw_map(
    figure: "Figure",
    axes: "Axes",
    values: NDArray[np.float64],
    picture: NDArray[np.float64],
    method: str,
    sign: str,
    outlier_perc: float,
    cmap: "str | Colormap | None",
) -> None:
    drawn = {"positive": np.maximum(values, 0), "negative": np.minimum(values, 0)}.get(sign, values)
    largest = np.abs(drawn).max()
    if largest == 0:  # Captum cannot scale it
        axes.imshow(np.ones(values.shape), cmap="gray", vmin=0, vmax=1)
        nothing = "zero" if not values.any() else f"no {sign} values"
        axes.text(0.5, 0.5, nothing, transform=axes.transAxes, ha="center", va="center", size=9)
        return
    visualization.visualize_image_attr(
        drawn / largest,
        picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1),
        method=method,
        sign=sign,
        outlier_perc=outlier_perc,
        cmap=cmap,
        plt_fig_axis=(figure, axes),
        use_pyplot=False,
    )
