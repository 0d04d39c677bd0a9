"""The images, and the places in them, that drive a filter or a direction furthest, up and down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, Batches
from captum_classfilters._core.devices import on_device
from captum_classfilters._core.files import AnyPath
from captum_classfilters._core.names import counted
from captum_classfilters._core.progress import Count, Progress, described_options
from captum_classfilters._core.provenance import provenance
from captum_classfilters._core.tables import Row, Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, DatasetLike, Directions, JsonDict, Unpack
from captum_classfilters._core.units import (
    Aggregate,
    Seen,
    UnitTap,
    aggregated,
    check_aggregate,
    given_classes,
    read_units,
    units_of,
)
from captum_classfilters._core.warnings import warn
from captum_classfilters.identify.receptive_field import receptive_field

Side = Literal["highest", "lowest"]


@short_repr
@dataclass(frozen=True)
class ExemplarSide:
    r"""
    One side of every unit's exemplars, the furthest first.

    Args:

        image (Tensor): Shape (U, n), int64: the images, counted in the loader's order; -1 where the
                    data set has fewer than n images.
        score (Tensor): Shape (U, n): the images' aggregates; NaN where there is no image.
        position (Tensor): Shape (U, n, dimensions), int64: the unit's furthest position in the
                    layer's map, (row, column) for a convolution.
        box (Tensor or None): Shape (U, n, 4), int64: left, top, right, bottom of the input pixels
                    that this position can depend on, right and bottom being the first outside. Of
                    signals (U, n, 2): start and end. Of volumes (U, n, 6): left, top, front, right,
                    bottom, back.
        label (Tensor or None): Shape (U, n), int64: the images' classes, if the loader gives one
                    class index for each.
    """

    image: Tensor
    score: Tensor
    position: Tensor
    box: Tensor | None
    label: Tensor | None


@short_repr
@dataclass(frozen=True)
class Exemplars(Tabular):
    r"""
    A layer's exemplars; U units are its filters, or directions in the space of its filters.

    Args:

        layer (str): The layer's name.
        aggregate (str): How an image's map became one number.
        highest (ExemplarSide): Images with the highest aggregates.
        lowest (ExemplarSide): Images with the lowest aggregates.
        num_images (int): Images that were read.
        directions (bool): The units are directions, not filters.
        positions (tuple of int): Shape of a unit's map; empty where images of several sizes were read.
    """

    layer: str
    aggregate: str
    highest: ExemplarSide
    lowest: ExemplarSide
    num_images: int
    directions: bool
    positions: tuple[int, ...] = ()

    def _tables(self) -> list[Table]:
        rows: list[Row] = []
        unit_name = "direction" if self.directions else "filter"
        sides = {name: self.side(name) for name in get_args(Side)}
        for unit in range(self.num_units):
            for name, side in sides.items():
                for place, image in enumerate(side.image[unit].tolist()):
                    row = {unit_name: unit, "side": name, "place": place + 1, "image": image}
                    row["score"] = side.score[unit, place]
                    if side.label is not None:
                        row["label"] = side.label[unit, place]
                    rows += [row] if image >= 0 else []
        return [Table(rows, {"score": ".4g"}, f"{self.layer}, {counted(self.num_images, 'image')}")]

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.highest.image)

    def side(self, side: Side) -> ExemplarSide:
        """One side by its name.

        Args:

            side (str): ``"highest"`` or ``"lowest"``.

        Returns:
            *ExemplarSide*.

        Raises:
            ValueError: There is no such side.
        """
        if side not in get_args(Side):
            raise ValueError(f"side={side!r}; choose 'highest' or 'lowest'.")
        return self.highest if side == "highest" else self.lowest

    @arguments_checked
    def patches(self, dataset: DatasetLike, unit: int, side: Side = "highest") -> list[Tensor]:
        r"""
        Cut a unit's patches out of the images.

        Args:

            dataset (sequence): ``dataset[i]`` is image i of the loader's order, or a pair that
                        starts with it, as in the loader's own data set.
            unit (int): The filter, or direction.
            side (str): ``"highest"`` or ``"lowest"``.
                        Default: "highest"

        Returns:
            *list* of Tensors (C, height, width), at most n; whole images where boxes were not
            measured.

        Raises:
            ValueError: There is no such unit or side.
        """
        chosen = self.side(side)
        if not 0 <= unit < self.num_units:
            raise ValueError(f"unit={unit}; {self.layer!r} has units 0 to {self.num_units - 1}.")
        cut = []
        for place, index in enumerate(chosen.image[unit].tolist()):
            if index < 0:
                break
            item = dataset[index]
            image = item[0] if isinstance(item, (tuple, list)) else item
            if chosen.box is not None:
                where = (..., *slices_of(chosen.box[unit, place]))
                image = image[where]
            cut.append(image)
        return cut


def slices_of(box: Tensor) -> tuple[slice, ...]:
    """Where a box lies along an image's last axes, (D,) H, W."""
    first, end = box.reshape(2, -1).flip(1).tolist()
    return tuple(slice(start, stop) for start, stop in zip(first, end, strict=True))


@arguments_checked
def exemplars(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    dataloader: Dataloader,
    *,
    num_exemplars: int = 9,
    aggregate: Aggregate | Literal["extreme"] = "extreme",
    directions: Mapping[str, Directions] | None = None,
    subtract_bias: bool = True,
    boxes: bool | Mapping[str, Tensor] = True,
    channel_dim: int | Mapping[str, int] | None = None,
    state_path: AnyPath | None = None,
    save_every: float | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> dict[str, Exemplars]:
    r"""
    Find the images, and their patches, that drive each filter or direction furthest on both sides.

    One pass over the loader serves all layers. Only the n best images of every unit and side are
    kept, O(U n) numbers whatever the size of the data set. A unit that is negative everywhere has
    highest images like any other: those where it is least negative.

    An image's map :math:`p` becomes one number by its maximum, for the highest side, and minimum,
    for the lowest side (``"extreme"``), or on both sides by one of the aggregates of
    :func:`unit_scores`. **Ties** go to the image that comes first in the loader, and within an image
    to the first position in row-major order. The patch of an image is where the unit is highest (for
    the highest side, or ``"max"``), lowest (for the lowest side, or ``"min"``) or furthest from zero
    (``"abs_mean"``, ``"abs_sum"``, ``"l2"``).

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (str, nn.Module or sequence): Layers, or their dotted names.
        dataloader (iterable): Batches of (inputs, labels), not shuffled; labels may be missing.
        num_exemplars (int): n, images for each unit and side.
                    Default: 9
        aggregate (str): See above.
                    Default: "extreme"
        directions (mapping, optional): By layer name, a matrix (K, r) whose columns are directions
                    in the space of the layer's K filters, or an object with such a matrix as
                    ``left``, as :func:`captum_classfilters.spectral.layer_svd` returns. The units
                    are then the r projections :math:`u^\top (y - b)`. Every layer must be named;
                    further names are ignored, so that a whole model's decompositions can be given.
                    Default: None
        subtract_bias (bool): Subtract the layer's own bias b, if it has one, before projecting.
                    Default: True
        boxes (bool or mapping): Measure :func:`receptive_field`, which costs H + W forward passes
                    of single images for each image size, or take what it returned before. There
                    are none, and a warning says so, where it fails: its images are zeros, which
                    a model may route past a layer.
                    Default: True
        channel_dim (int or mapping, optional): Axis of the filters where it cannot be told from the
                    layer, for all layers or by name.
                    Default: None
        state_path, save_every: As for :func:`identify_class_filters`.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *dict*: :class:`Exemplars` by layer name.

    Raises:
        ValueError: The loader is empty or shuffles, a layer puts out NaN or Inf or does not run
            exactly once, the directions do not fit a layer, or an option is unknown.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import exemplars
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1, bias=False), torch.nn.Flatten())
        >>> _ = net[0].weight.data.fill_(1.0)
        >>> images = torch.zeros(4, 1, 2, 2)
        >>> images[2, 0, 1, 0] = 5.0
        >>> images[3, 0, 0, 1] = -2.0
        >>> data = [(images, torch.tensor([0, 0, 1, 1]))]
        >>> found = exemplars(net, "0", data, num_exemplars=2, show_progress=False)["0"]
        >>> found.highest.image.tolist(), found.highest.box[0, 0].tolist()
        ([[2, 0]], [0, 1, 1, 2])
        >>> found.lowest.score.tolist()
        [[-2.0, 0.0]]
    """
    check_aggregate(aggregate, ("extreme", *get_args(Aggregate)))
    if num_exemplars < 1:
        raise ValueError(f"num_exemplars={num_exemplars}; expected a positive number.")
    if isinstance(getattr(dataloader, "sampler", None), RandomSampler):
        raise ValueError(
            "The loader shuffles, so counting images would not find them again; pass one made "
            "with shuffle=False."
        )
    taps = units_of(model, layers, channel_dim, directions, subtract_bias)
    for tap in taps:
        tap.reduce = partial(_sides, aggregate=aggregate)
    counted = _Counted([tap.name for tap in taps], num_exemplars)

    def take(batches: Batches, batch: Batch, _output: object) -> None:
        seen = [(tap.seen, tap.positions) for tap in taps]  # measuring boxes runs the model
        size = str(tuple(batch.inputs[0].shape[1:]))
        if boxes is not False and size not in counted.fields:
            counted.fields[size] = _boxes(model, taps, batch.inputs, boxes)
        fields = counted.fields.get(size, {})

        def then(_values: list[bool]) -> None:
            with counted.count.adding(batch.first_image, batch.size):
                counted.add(batch, seen, fields)

        # After what is known to be finite: a flag that is true waits behind those that may not be.
        true = torch.ones((), dtype=torch.bool, device=batch.device)
        batches.later([true], then, kept=batch.inputs)

    def facts() -> JsonDict:
        origin = provenance(model)
        return {
            "the call": "exemplars",
            "the layer": [tap.name for tap in taps],
            "the model": [origin["model"], origin["model_sha256"]],
            "num_exemplars": num_exemplars,
            "aggregate": aggregate,
            "directions": described_options(
                {tap.name: tap.matrix for tap in taps} if directions is not None else None
            ),
            "subtract_bias": subtract_bias,
            "boxes": described_options(boxes),
            "channel_dim": described_options(channel_dim),
        }

    def result(num_images: int) -> dict[str, Exemplars]:
        return {
            name: Exemplars(
                name,
                aggregate,
                high.result(),
                low.result(),
                num_images,
                directions is not None,
                _only(counted.shapes[name]),
            )
            for name, (high, low) in counted.best.items()
        }

    progress = Progress(
        counted, facts, lambda: result(counted.count.images), state_path, save_every
    )
    num_images = read_units(
        model,
        taps,
        dataloader,
        "exemplars",
        take,
        unpack=unpack,
        show_progress=show_progress,
        labeled=False,
        progress=progress,
    )
    results = result(num_images)
    progress.finished()
    return results


def _sides(maps: Tensor, aggregate: str) -> Seen:
    """Of the highest and of the lowest side: aggregates, and the places that stand for them; each
    (N, U)."""
    by_size = aggregate in ("abs_mean", "abs_sum", "l2")
    # torch documents that of equal values the first is found.
    highest = (maps.abs() if by_size else maps).max(2) if aggregate != "min" else maps.min(2)
    lowest = highest if by_size or aggregate == "max" else maps.min(2)
    if aggregate in ("extreme", "max", "min"):
        return (*highest, *lowest)
    scores = aggregated(maps, aggregate)
    return scores, highest.indices, scores, lowest.indices


def _boxes(
    model: nn.Module,
    taps: Sequence[UnitTap],
    inputs: tuple[Tensor, ...],
    boxes: bool | Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """Receptive fields for one image size: the caller's, or measured."""
    if isinstance(boxes, Mapping):
        for tap in taps:
            shape = tuple(boxes[tap.name].shape) if tap.name in boxes else None
            needed = (*tap.positions, 2 * (inputs[0].dim() - 2))
            if shape != needed:
                raise ValueError(
                    f"boxes for {tap.name!r} have shape {shape}; its positions need "
                    f"{needed}. Measure them for images of this size."
                )
        return on_device(dict(boxes), inputs[0].device)
    if len(inputs) != 1 or inputs[0].dim() not in (3, 4, 5):
        raise ValueError(
            "Boxes need a model of one image input (N, C, H, W), or one of signals (N, C, L) or volumes "
            "(N, C, D, H, W); pass boxes=False for others."
        )
    dims = {tap.name: tap.channel_dim for tap in taps if tap.channel_dim is not None}
    try:
        fields = receptive_field(model, [tap.module for tap in taps], inputs[0], channel_dim=dims)
    except ValueError as error:  # as where a model routes images; those of the data were read
        warn(
            "The exemplars have no boxes: images of zeros, on which receptive fields are measured, do "
            f"not go through the model as those of the data do. {error} boxes=False does without."
        )
        return {}
    return on_device(fields, inputs[0].device)


def _only(shapes: set[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a layer's maps, if it was the same for all images."""
    return next(iter(shapes)) if len(shapes) == 1 else ()


def _unraveled(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flat places (...) as indices (..., dimensions), made where the places are."""
    indices = []
    for size in reversed(shape):
        indices.append(places % size)
        places = places // size
    return torch.stack(indices[::-1], -1)


class _Counted:
    """The best images of every layer, which may go on from those of an earlier run."""

    def __init__(self, layers: Sequence[str], num_exemplars: int) -> None:
        self.best = {
            name: (_Best(num_exemplars, True), _Best(num_exemplars, False)) for name in layers
        }
        self.fields: dict[str, Mapping[str, Tensor]] = {}  # by the size of the images
        self.shapes: dict[str, set[tuple[int, ...]]] = {name: set() for name in layers}  # of maps
        self.count = Count()

    def add(
        self,
        batch: Batch,
        seen: Sequence[tuple[Seen, tuple[int, ...]]],
        fields: Mapping[str, Tensor],
    ) -> None:
        """Let a batch's images compete, by what the layers show of them."""
        for (name, sides), (parts, positions) in zip(self.best.items(), seen, strict=True):
            field = fields.get(name)
            self.shapes[name].add(positions)
            for side, scores, places in zip(sides, parts[::2], parts[1::2], strict=True):
                side.add(batch, scores, places, positions, field)

    def counts(self) -> list[Count]:
        """How far the pass is."""
        return [self.count]

    def state(self) -> tuple[dict[str, Tensor], JsonDict]:
        """The best so far, and receptive fields."""
        tensors = {
            f"{place}/{name}/{key}": value
            for name, sides in self.best.items()
            for place, side in enumerate(sides)
            for key, value in side.kept.items()
        }
        for size, fields in self.fields.items():
            tensors |= {f"{size}/{name}": field for name, field in fields.items()}
        shapes = {name: sorted(of_layer) for name, of_layer in self.shapes.items()}
        return tensors, {
            "images": self.count.images,
            "sizes": list(self.fields),
            "shapes": shapes,
        }

    def restore(self, tensors: Mapping[str, Tensor], notes: JsonDict) -> None:
        """Go on from such a state."""
        for name, sides in self.best.items():
            for place, side in enumerate(sides):
                start = f"{place}/{name}/"
                side.kept = {
                    key: tensors[start + key]
                    for key in ("score", "image", "position", "box", "label")
                    if start + key in tensors
                }
        for size in notes["sizes"]:
            self.fields[size] = {
                name: tensors[f"{size}/{name}"] for name in self.best if f"{size}/{name}" in tensors
            }
        self.shapes = {name: set(map(tuple, shapes)) for name, shapes in notes["shapes"].items()}
        self.count.restore(notes["images"])


class _Best:
    """The best images of one side so far, where the model is."""

    def __init__(self, num_exemplars: int, descending: bool) -> None:
        self.num_exemplars, self.descending = num_exemplars, descending
        self.kept: dict[str, Tensor] = {}

    def add(
        self,
        batch: Batch,
        scores: Tensor,
        places: Tensor,
        positions: tuple[int, ...],
        field: Tensor | None,
    ) -> None:
        """Let a batch's images compete with the best so far; scores and places are (N, U)."""
        num_units = scores.shape[1]
        images = batch.first_image + torch.arange(len(scores), device=scores.device)
        new = {
            "score": scores.T,
            "image": images.expand(num_units, -1),
            "position": _unraveled(places.T, positions or (1,)),
        }
        if field is not None:
            new["box"] = on_device(field, scores.device).reshape(-1, field.shape[-1])[places.T]
        labels = given_classes(batch)
        if labels is not None:
            new["label"] = on_device(labels, scores.device).expand(num_units, -1)
        if self.kept:
            kept = on_device(self.kept, scores.device)  # from a file they come to the CPU
            # Earlier images stand first, and the sort is stable: they win ties.
            new = {k: torch.cat([before, new[k]], 1) for k, before in kept.items() if k in new}
        order = new["score"].sort(dim=1, descending=self.descending, stable=True).indices
        order = order[:, : self.num_exemplars]
        rows = torch.arange(num_units, device=order.device)[:, None]
        self.kept = {key: value[rows, order] for key, value in new.items()}

    def result(self) -> ExemplarSide:
        """The best images, on the CPU."""
        filler = {"image": -1, "score": torch.nan, "position": -1, "box": 0, "label": -1}
        filled: dict[str, Any] = {"box": None, "label": None}
        for key, kept in self.kept.items():
            missing = self.num_exemplars - kept.shape[1]
            rest = kept.new_full((len(kept), missing, *kept.shape[2:]), filler[key])
            filled[key] = torch.cat([kept, rest], 1).cpu()
        return ExemplarSide(**filled)
