"""Sheets of exemplary images, each with the patch that the unit sees."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, indices_of
from captum_classfilters._core.names import kind_of, names_that_cover
from captum_classfilters._core.types import ClassNames, DatasetLike, Keywords
from captum_classfilters.identify.exemplars import Exemplars, slices_of
from captum_classfilters.visualize.arrays import Channels, picture_of, pixels_of, show_picture
from captum_classfilters.visualize.figures import (
    NEGATIVE,
    POSITIVE,
    FigureAndGrid,
    bare,
    drawing,
    grid_of,
    headline,
    short_name,
    short_number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Side = Literal["highest", "lowest"]


@dataclass(frozen=True)
class _Place:
    """One exemplar: which image, and where in it."""

    index: int
    score: float
    label: int | None
    box: Tensor | None
    position: tuple[int, ...]


@arguments_checked
def plot_exemplars(
    exemplars: Exemplars,
    dataset: DatasetLike,
    units: Sequence[int] | Tensor,
    *,
    num_images: int = 5,
    sides: Literal["highest", "lowest", "both"] = "both",
    patches: bool | None = None,
    to_display: Callable[[Tensor], Tensor] | None = None,
    channels: Channels = None,
    class_names: ClassNames | None = None,
    title: str | None = None,
    plt_fig_axis: FigureAndGrid | None = None,
) -> FigureAndGrid:
    r"""
    A row of images for each unit: its lowest, the furthest at the left, and its highest.

    Of each image the patch is drawn that the unit's furthest position can depend on, or the whole
    image with a box around it. A cross marks that position where it is narrower than the patch. Above
    an image stands its score, and its class if names are given. A score of exactly zero is no evidence,
    and the images that share it are as good as any others: they are left out, and so is a side on which
    no unit has another score. Signals are drawn as curves, and of volumes the slice through the
    position.

    Args:

        exemplars (Exemplars): One layer's, from :func:`captum_classfilters.identify.exemplars`.
        dataset (sequence): ``dataset[i]`` is image i of the loader's order, or a pair that starts
                    with it.
        units (sequence of int or Tensor): Which filters or directions, or a bool mask of all.
        num_images (int): Images for each side.
                    Default: 5
        sides (str): ``"highest"``, ``"lowest"`` or ``"both"``.
                    Default: "both"
        patches (bool, optional): Draw what is inside the boxes only, or with False whole images; by
                    default patches where boxes were measured.
                    Default: None
        to_display (Callable, optional): From a data set's image (C, H, W) to one in [0, 1], the
                    inverse of its normalization for example. Without it, images beyond [0, 1] are
                    stretched one by one.
                    Default: None
        channels (tuple of int, optional): Channels of the images to draw as red, green and blue; by
                    default one is gray, three are colors, and of other numbers the mean is drawn.
                    Default: None
        class_names (sequence of str, optional): Names of all classes.
                    Default: None
        title (str, optional): Title; by default layer and aggregate.
        plt_fig_axis (tuple, optional): Figure and axes (units, images) to draw on, of both sides if
                    both are asked for; new ones by default.

    Returns:
        *tuple* of figure and array of axes (units, images).

    Raises:
        ValueError: There is no such unit or side, patches are asked for without boxes, a class has
                    no name, or an image cannot be drawn.
    """
    units = indices_of("units", units, exemplars.num_units)
    _check_size(exemplars, dataset)
    num_places = _checked(exemplars, units, num_images, sides, patches)
    names = names_that_cover(class_names, _labels(exemplars))
    patches = exemplars.highest.box is not None if patches is None else patches
    places = {
        (row, side, place): _place(exemplars, side, unit, place)
        for row, unit in enumerate(units)
        for side in (("lowest", "highest") if sides == "both" else (sides,))
        for place in range(num_places)
    }
    used = dict.fromkeys(("lowest", "highest"), 0)  # columns of each side
    for (_, side, place), found in places.items():
        used[side] = max(used[side], num_places if plt_fig_axis else place + 1 if found else 0)
    if not any(used.values()):
        used["lowest" if sides == "lowest" else "highest"] = 1
    cells: list[tuple[Side, int]] = [("lowest", place) for place in range(used["lowest"])]
    cells += [("highest", place) for place in reversed(range(used["highest"]))]
    size = (max(1.15 * len(cells) + 0.6, 3.6), 1.4 * len(units) + 0.7)
    figure, grid = grid_of(plt_fig_axis, len(units), len(cells), size)
    for row, unit in enumerate(units):
        for axes, (side, place) in zip(grid[row], cells, strict=True):
            bare(axes)
            found = places[row, side, place]
            if found is None:
                _leave_out(axes, "scores of zero" if place == 0 else "")
                continue
            color = POSITIVE if side == "highest" else NEGATIVE
            image = _image(dataset, found.index, to_display)
            _draw(axes, image, found, exemplars.positions, patches, channels, color)
            told = [short_number(found.score)]
            if names is not None and found.label is not None:
                told = [short_name(names[found.label], 17), *told]
            axes.set_title("\n".join(told), size=7, pad=2, color=color)
        grid[row, 0].set_ylabel(f"{'u' if exemplars.directions else 'filter '}{unit}", size=9)
    for axes, (side, place) in zip(grid[-1], cells, strict=True):
        if len({side for side, _ in cells}) == 2 and place == 0:
            axes.set_xlabel(side, size=9, weight="bold")
    what = "directions" if exemplars.directions else "filters"
    by = "strongest position" if exemplars.aggregate == "extreme" else exemplars.aggregate
    headline(figure, title, f"{exemplars.layer}: {what} by {by}", size=10)
    return figure, grid


def _checked(
    exemplars: Exemplars, units: Sequence[int], num_images: int, sides: str, patches: bool | None
) -> int:
    """How many images there are of a side."""
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
    return num_places


def _check_size(exemplars: Exemplars, dataset: DatasetLike) -> None:
    """Raise if a data set has too few images: it may hold batches."""
    last = int(max(exemplars.side(side).image.max() for side in ("highest", "lowest")))
    if isinstance(dataset, Sized) and len(dataset) <= last:
        raise ValueError(
            f"dataset has {len(dataset)} entries, but image {last} is an exemplar; expected one image "
            "for each entry, in the loader's order, and no batches."
        )


def _labels(exemplars: Exemplars) -> list[int]:
    """The classes of all exemplars, as far as they are known."""
    known = [exemplars.side(side).label for side in ("highest", "lowest")]
    return sorted(
        {int(label) for labels in known if labels is not None for label in labels.unique()}
    )


def _place(exemplars: Exemplars, side: Any, unit: int, place: int) -> _Place | None:
    """One exemplar; None where there is none, or where its score is zero."""
    chosen = exemplars.side(side)
    index, score = int(chosen.image[unit, place]), float(chosen.score[unit, place])
    if index < 0 or score == 0:
        return None
    box = None if chosen.box is None else chosen.box[unit, place]
    if box is not None and not bool(box.any()):  # a position that depends on no pixel
        box = None
    label = None if chosen.label is None else int(chosen.label[unit, place])
    position = tuple(chosen.position[unit, place].tolist())
    return _Place(index, score, label if label is None or label >= 0 else None, box, position)


def _leave_out(axes: "Axes", said: str) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", size=7)


def _image(
    dataset: DatasetLike, index: int, to_display: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """An image (C, ...) as numbers."""
    item = dataset[index]
    image = item[0] if isinstance(item, (tuple, list)) else item
    if to_display is not None:
        image = to_display(image)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ValueError(
            f"dataset[{index}] gives {kind_of(image)}; expected a Tensor (C, H, W): give the "
            "data set a transform such as torchvision's ToTensor(), or pass it as to_display."
        )
    values = pixels_of(image, f"The pixels of image {index}")
    if values.dim() not in (2, 3, 4) or not values.numel():
        raise ValueError(
            f"image {index} has shape {tuple(values.shape)}; expected (C, H, W), a signal (C, L) or a "
            "volume (C, D, H, W)."
        )
    return values


def _draw(
    axes: "Axes",
    image: Tensor,
    found: _Place,
    positions: tuple[int, ...],
    patches: bool,
    channels: Channels,
    color: str,
) -> None:
    size = tuple(image.shape[1:])
    box = slices_of(found.box) if found.box is not None else None
    if box is not None and len(box) != len(size):
        box = None
    middle = _middle(found.position, positions, size)
    if len(size) == 3:  # the slice through the position
        depth = round(middle[0]) if middle else _center(box[0]) if box else size[0] // 2
        image, size = image[:, depth], size[1:]
        box, middle = box and box[1:], middle and middle[1:]
        axes.text(0.03, 0.97, f"slice {depth}", transform=axes.transAxes, va="top", size=6, c=color)
    if len(size) == 1:
        _draw_signal(axes, image, box, middle, patches, color)
        return
    # The whole image sets the scale of its patches, so that a gray means the same in both.
    picture = picture_of(image, channels, f"image {found.index}")
    left = top = 0
    if box is not None and patches:
        picture, (top, left) = picture[box], (box[0].start, box[1].start)
    elif box is not None:
        # Pixel i is drawn from i - 0.5 to i + 0.5.
        corner = (box[1].start - 0.5, box[0].start - 0.5)
        width, height = box[1].stop - box[1].start, box[0].stop - box[0].start
        frame = drawing("patches").Rectangle(corner, width, height, fill=False, ec=color, lw=1.6)
        axes.add_patch(frame)
    show_picture(axes, picture)
    if middle is not None and min(picture.shape[:2]) >= _NARROW:
        mark: Keywords = {"color": color, "markersize": 7, "markeredgewidth": 1.2}
        axes.plot(middle[1] - left, middle[0] - top, "+", **mark)
        axes.set_xlim(-0.5, picture.shape[1] - 0.5)
        axes.set_ylim(picture.shape[0] - 0.5, -0.5)


_NARROW = 5  # of fewer pixels than these a cross would hide most


def _draw_signal(
    axes: "Axes",
    signal: Tensor,
    box: tuple[slice, ...] | None,
    middle: tuple[float, ...] | None,
    patches: bool,
    color: str,
) -> None:
    """The mean of a signal's channels as a curve; what the unit sees is shaded, or all that is shown."""
    curve = signal.mean(0).numpy()
    axes.plot(np.arange(len(curve)), curve, color="0.25", linewidth=1)
    if box is not None and patches:
        low, high = box[0].start - 0.5, box[0].stop - 0.5
        inside = curve[box[0]]
        margin = 0.08 * float(np.ptp(inside)) or 0.5
        axes.set_xlim(low, high)
        axes.set_ylim(float(inside.min()) - margin, float(inside.max()) + margin)
    elif box is not None:
        axes.axvspan(box[0].start - 0.5, box[0].stop - 0.5, color=color, alpha=0.25, linewidth=0)
    if middle is not None:
        axes.axvline(middle[0], color=color, linewidth=0.9, linestyle=":")


def _center(part: slice) -> int:
    return int(part.start + part.stop - 1) // 2


def _middle(
    position: tuple[int, ...], positions: tuple[int, ...], size: tuple[int, ...]
) -> tuple[float, ...] | None:
    """Where a position of the layer's map lies on the image; None where the map is no smaller image,
    as tokens are not, or where it has a single position."""
    known = len(position) == len(positions) == len(size) and any(number > 1 for number in positions)
    if not known or any(at >= number for at, number in zip(position, positions, strict=True)):
        return None
    return tuple(
        (at + 0.5) / number * extent - 0.5
        for at, number, extent in zip(position, positions, size, strict=True)
    )
