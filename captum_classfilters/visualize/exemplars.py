"""Sheets of exemplary images, each with the box that the unit sees."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_classfilters._core.types import DatasetLike
from captum_classfilters.identify.exemplars import Exemplars
from captum_classfilters.visualize.arrays import Channels, picture_of, show_picture
from captum_classfilters.visualize.figures import (
    NEGATIVE,
    POSITIVE,
    FigureAndGrid,
    bare,
    grid_of,
    headline,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Side = Literal["highest", "lowest"]


def plot_exemplars(
    exemplars: Exemplars,
    dataset: DatasetLike,
    units: Sequence[int],
    *,
    num_images: int = 5,
    sides: Literal["highest", "lowest", "both"] = "both",
    patches: bool = False,
    to_display: Callable[[Tensor], Tensor] | None = None,
    channels: Channels = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    A row of images for each unit: its lowest, the furthest at the left, and its highest.

    The box on each image is the receptive field of the unit's furthest position. Above an image
    stands its score, and its class if names are given.

    Args:

        exemplars (Exemplars): One layer's, from :func:`captum_classfilters.identify.exemplars`.
        dataset (sequence): ``dataset[i]`` is image i of the loader's order, or a pair that starts
                    with it.
        units (sequence of int): Which filters or directions.
        num_images (int): Images for each side.
                    Default: 5
        sides (str): ``"highest"``, ``"lowest"`` or ``"both"``.
                    Default: "both"
        patches (bool): Draw what is inside the boxes only.
                    Default: False
        to_display (Callable, optional): From a data set's image (C, H, W) to one in [0, 1], the
                    inverse of its normalization for example. Without it, images beyond [0, 1] are
                    stretched one by one.
                    Default: None
        channels (tuple of int, optional): Channels of the images to draw as red, green and blue; by
                    default one is gray, three are colors, and of other numbers the mean is drawn.
                    Default: None
        class_names (sequence of str, optional): Names of the classes.
                    Default: None
        title (str, optional): Title; by default layer and aggregate.
        plt_fig_axis (tuple, optional): Figure and axes (units, images) to draw on; new ones by
                    default.

    Returns:
        *tuple* of figure and array of axes (units, images).

    Raises:
        ValueError: There is no such unit or side, patches are asked for without boxes, or an image
                    cannot be drawn.
    """
    if sides not in ("highest", "lowest", "both"):
        raise ValueError(f"sides={sides!r}; choose 'highest', 'lowest' or 'both'.")
    if patches and exemplars.highest.box is None:
        raise ValueError("Patches need boxes; find the exemplars with boxes=True.")
    num_places = min(num_images, exemplars.highest.image.shape[1])
    if not len(units) or num_places < 1:
        raise ValueError(f"Nothing to draw: units={list(units)}, num_images={num_images}.")
    for unit in units:
        if not 0 <= unit < exemplars.num_units:
            raise ValueError(
                f"units hold {unit}; {exemplars.layer!r} has units 0 to {exemplars.num_units - 1}."
            )
    cells: list[tuple[Side, int]] = []
    if sides != "highest":
        cells += [("lowest", place) for place in range(num_places)]
    if sides != "lowest":
        cells += [("highest", place) for place in reversed(range(num_places))]
    size = (1.15 * len(cells) + 0.6, 1.4 * len(units) + 0.7)
    figure, grid = grid_of(plt_fig_axis, len(units), len(cells), size)
    for row, unit in enumerate(units):
        for axes, (side, place) in zip(grid[row], cells, strict=True):
            bare(axes)
            chosen = exemplars.side(side)
            index = int(chosen.image[unit, place])
            if index < 0:
                continue
            picture = picture_of(_image(dataset, index, to_display), channels, f"image {index}")
            box = None if chosen.box is None else chosen.box[unit, place].tolist()
            color = POSITIVE if side == "highest" else NEGATIVE
            _draw(axes, picture, box, patches, color)
            shown = f"{float(chosen.score[unit, place]) + 0.0:.2g}"
            if class_names is not None and chosen.label is not None:
                name = class_names[int(chosen.label[unit, place])]
                shown = f"{short_name(name, 17)}\n{shown}"
            axes.set_title(shown, size=7, pad=2, color=color)
        grid[row, 0].set_ylabel(f"{'u' if exemplars.directions else 'filter '}{unit}", size=9)
    for axes, (side, place) in zip(grid[-1], cells, strict=True):
        if sides == "both" and place == 0:
            axes.set_xlabel(side, size=9, weight="bold")
    what = "directions" if exemplars.directions else "filters"
    by = "strongest position" if exemplars.aggregate == "extreme" else exemplars.aggregate
    headline(figure, title, f"{exemplars.layer}: {what} by {by}", size=10)
    return figure, grid


def _image(
    dataset: DatasetLike, index: int, to_display: Callable[[Tensor], Tensor] | None
) -> Tensor | NDArray[np.generic]:
    item = dataset[index]
    image = item[0] if isinstance(item, (tuple, list)) else item
    if to_display is not None:
        image = to_display(image)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ValueError(
            f"dataset[{index}] gives a {type(image).__name__}; expected a Tensor (C, H, W): give the "
            "data set a transform such as torchvision's ToTensor(), or pass it as to_display."
        )
    return image


def _draw(
    axes: "Axes", picture: NDArray[np.float64], box: list[int] | None, patches: bool, color: str
) -> None:
    if box is not None:
        left, top, right, bottom = box
        if patches:
            picture = picture[top:bottom, left:right]
        else:
            from matplotlib.patches import Rectangle

            # Pixel i is drawn from i - 0.5 to i + 0.5.
            corner, width, height = (left - 0.5, top - 0.5), right - left, bottom - top
            axes.add_patch(Rectangle(corner, width, height, fill=False, ec=color, lw=1.6))
    show_picture(axes, picture)
