"""Sheets of exemplary images, each with the box that the unit sees."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from captum_classfilters.identify import Exemplars
from captum_classfilters.visualize.explanations import _displayed
from captum_classfilters.visualize.figures import COLOURS, new_figure


def plot_exemplars(
    exemplars: Exemplars,
    dataset: Any,
    units: Sequence[int],
    *,
    num_images: int = 5,
    sides: Literal["highest", "lowest", "both"] = "both",
    patches: bool = False,
    to_display: Callable[[Tensor], Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> tuple[Any, Any]:
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
                    inverse of its normalisation say. Without it, images beyond [0, 1] are
                    stretched one by one.
                    Default: None
        class_names (sequence of str, optional): Names of the classes.
                    Default: None
        title (str, optional): Title; by default layer and aggregate.

    Returns:
        *tuple* of figure and array of axes (units, images).

    Raises:
        ValueError: There is no such unit or side, or patches are asked for without boxes.
    """
    if sides not in ("highest", "lowest", "both"):
        raise ValueError(f"sides={sides!r}; choose 'highest', 'lowest' or 'both'.")
    if patches and exemplars.highest.box is None:
        raise ValueError("Patches need boxes; find the exemplars with boxes=True.")
    number = min(num_images, exemplars.highest.image.shape[1])
    if not units or number < 1:
        raise ValueError(f"Nothing to draw: units={list(units)}, num_images={num_images}.")
    for unit in units:
        if not 0 <= unit < exemplars.num_units:
            raise ValueError(
                f"units hold {unit}; {exemplars.layer!r} has units 0 to {exemplars.num_units - 1}."
            )
    cells: list[tuple[Literal["highest", "lowest"], int]] = []
    if sides != "highest":
        cells += [("lowest", place) for place in range(number)]
    if sides != "lowest":
        cells += [("highest", place) for place in reversed(range(number))]
    figure = new_figure((1.15 * len(cells) + 0.6, 1.4 * len(units) + 0.5))
    grid = figure.subplots(len(units), len(cells), squeeze=False)
    for row, unit in enumerate(units):
        for axes, (side, place) in zip(grid[row], cells, strict=True):
            _draw(axes, exemplars, dataset, unit, side, place, patches, to_display, class_names)
        grid[row, 0].set_ylabel(f"{'u' if exemplars.directions else 'filter '}{unit}", size=9)
    if sides == "both":
        grid[0, 0].annotate("lowest", (0, 1.42), xycoords="axes fraction", size=9, weight="bold")
        grid[0, -1].annotate(
            "highest", (1, 1.42), xycoords="axes fraction", size=9, weight="bold", ha="right"
        )
    what = "directions" if exemplars.directions else "filters"
    by = "strongest position" if exemplars.aggregate == "extreme" else exemplars.aggregate
    figure.suptitle(title or f"{exemplars.layer}: {what} by {by}", size=10)
    return figure, grid


def _draw(
    axes: Any,
    exemplars: Exemplars,
    dataset: Any,
    unit: int,
    side: Literal["highest", "lowest"],
    place: int,
    patches: bool,
    to_display: Callable[[Tensor], Tensor] | None,
    class_names: Sequence[str] | None,
) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")
    chosen = exemplars.side(side)
    index = int(chosen.image[unit, place])
    if index < 0:
        return
    item = dataset[index]
    image = item[0] if isinstance(item, (tuple, list)) else item
    picture = _displayed(to_display(image) if to_display is not None else image)
    colour = COLOURS[1] if side == "highest" else COLOURS[0]
    if chosen.box is not None:
        left, top, right, bottom = chosen.box[unit, place].tolist()
        if patches:
            picture = picture[top:bottom, left:right]
        else:
            from matplotlib.patches import Rectangle

            # Pixel i is drawn from i - 0.5 to i + 0.5.
            corner, width, height = (left - 0.5, top - 0.5), right - left, bottom - top
            axes.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=1.6))
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray")
    shown = f"{float(chosen.score[unit, place]):.2g}"
    if class_names is not None and chosen.label is not None:
        shown = f"{class_names[int(chosen.label[unit, place])]}\n{shown}"
    axes.set_title(shown, size=7, pad=2, color=colour)
