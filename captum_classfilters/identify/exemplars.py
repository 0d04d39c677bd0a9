"""The images, and the places in them, that drive a filter or a direction furthest, up and down."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from tqdm.auto import tqdm

from captum_classfilters._core.batches import split_batch
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import check_runs
from captum_classfilters._core.units import UnitMaps, aggregated, units_of
from captum_classfilters.identify.receptive_field import receptive_field

Aggregate = Literal["extreme", "mean", "max", "min", "abs_mean", "l2"]
Side = Literal["highest", "lowest"]


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
                    that this position can depend on, right and bottom being the first outside.
        label (Tensor or None): Shape (U, n), int64: the images' labels.
    """

    image: Tensor
    score: Tensor
    position: Tensor
    box: Tensor | None
    label: Tensor | None


@dataclass(frozen=True)
class Exemplars:
    r"""
    A layer's exemplars; U units are its filters, or directions in the space of its filters.

    Args:

        layer (str): The layer's name.
        aggregate (str): How an image's map became one number.
        highest (ExemplarSide): Images with the highest aggregates.
        lowest (ExemplarSide): Images with the lowest aggregates.
        num_images (int): Images that were read.
        directions (bool): The units are directions, not filters.
    """

    layer: str
    aggregate: str
    highest: ExemplarSide
    lowest: ExemplarSide
    num_images: int
    directions: bool

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

    def patches(self, dataset: Any, unit: int, side: Side = "highest") -> list[Tensor]:
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
                left, top, right, bottom = chosen.box[unit, place].tolist()
                image = image[..., top:bottom, left:right]
            cut.append(image)
        return cut


def exemplars(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    dataloader: Iterable[Any],
    *,
    num_exemplars: int = 9,
    aggregate: Aggregate = "extreme",
    directions: Mapping[str, Any] | None = None,
    subtract_bias: bool = True,
    boxes: bool | Mapping[str, Tensor] = True,
    channel_dim: int | Mapping[str, int] | None = None,
    show_progress: bool = True,
) -> dict[str, Exemplars]:
    r"""
    Find the images, and their patches, that drive each filter or direction furthest on both sides.

    One pass over the loader serves all layers. Only the n best images of every unit and side are
    kept, O(U n) numbers whatever the size of the data set. A unit that is negative everywhere has
    highest images like any other: those where it is least negative.

    An image's map :math:`p` becomes one number by its maximum, for the highest side, and minimum,
    for the lowest side (``"extreme"``), or on both sides by its ``"mean"``, ``"max"``, ``"min"``,
    mean absolute value (``"abs_mean"``) or Euclidean norm (``"l2"``). **Ties** go to the image that
    comes first in the loader, and within an image to the first position in row-major order. The
    patch of an image is where the unit is highest (for the highest side, or ``"max"``), lowest (for
    the lowest side, or ``"min"``) or furthest from zero (``"abs_mean"``, ``"l2"``).

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (str, nn.Module or sequence): Layers, or their dotted names.
        dataloader (iterable): Batches of (inputs, labels), not shuffled.
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
                    of single images for each image size, or take what it returned before.
                    Default: True
        channel_dim (int or mapping, optional): Axis of the filters where it cannot be told from the
                    layer, for all layers or by name.
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *dict*: :class:`Exemplars` by layer name.

    Raises:
        ValueError: The loader is empty or shuffles, a layer puts out NaN or does not run exactly
            once, the directions do not fit a layer, or an option is unknown.

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
    if aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate={aggregate!r}; choose one of {list(get_args(Aggregate))}.")
    if not isinstance(num_exemplars, int) or num_exemplars < 1:
        raise ValueError(f"num_exemplars={num_exemplars}; expected a positive whole number.")
    if isinstance(getattr(dataloader, "sampler", None), RandomSampler):
        raise ValueError(
            "The loader shuffles, so counting images would not find them again; pass one made "
            "with shuffle=False."
        )
    units = units_of(model, layers, directions, subtract_bias, channel_dim)
    taps = [_Tap(one, aggregate, num_exemplars) for one in units]
    number = _read(model, taps, dataloader, boxes, show_progress)
    return {tap.name: tap.result(number) for tap in taps}


def _read(
    model: nn.Module,
    taps: "list[_Tap]",
    dataloader: Iterable[Any],
    boxes: bool | Mapping[str, Tensor],
    show_progress: bool,
) -> int:
    """Run the model over the loader; returns the number of images."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else None
    handles = [tap.module.register_forward_hook(tap.hook) for tap in taps]
    bar = tqdm(dataloader, desc="exemplars", unit="batch", disable=not show_progress)
    number, measured = 0, dict[tuple[int, ...], Mapping[str, Tensor]]()
    try:
        with model_left_as_found(model, evaluation=True), torch.no_grad():
            for index, batch in enumerate(bar):
                inputs, labels = split_batch(batch, index, device)
                if len(inputs[0]) == 0:
                    continue
                for tap in taps:
                    tap.units.runs = 0
                model(*inputs)
                size = tuple(inputs[0].shape[1:])
                for tap in taps:
                    tap.check(len(inputs[0]), number)
                if boxes is not False and size not in measured:
                    measured[size] = _boxes(model, taps, inputs, boxes, handles)
                for tap in taps:
                    field = measured[size][tap.name] if boxes is not False else None
                    tap.merge(number, labels, field)
                number += len(inputs[0])
    finally:
        for handle in handles:
            handle.remove()
    if number == 0:
        raise ValueError("The data loader is empty.")
    return number


def _boxes(
    model: nn.Module,
    taps: "list[_Tap]",
    inputs: tuple[Tensor, ...],
    boxes: bool | Mapping[str, Tensor],
    handles: list[Any],
) -> Mapping[str, Tensor]:
    """Receptive fields for one image size: the caller's, or measured with our hooks at rest."""
    if isinstance(boxes, Mapping):
        for tap in taps:
            shape = tuple(boxes[tap.name].shape) if tap.name in boxes else None
            if shape != (*tap.units.positions, 4):
                raise ValueError(
                    f"boxes for {tap.name!r} have shape {shape}; its positions need "
                    f"{(*tap.units.positions, 4)}. Measure them for images of this size."
                )
        return boxes
    if len(inputs) != 1 or inputs[0].dim() != 4:
        raise ValueError(
            "Boxes need a model of one image input (N, C, H, W); pass boxes=False for others."
        )
    for tap in taps:
        tap.resting = True
    try:
        dims = {
            tap.name: tap.units.channel_dim for tap in taps if tap.units.channel_dim is not None
        }
        return receptive_field(model, [tap.module for tap in taps], inputs[0], channel_dim=dims)
    finally:
        for tap in taps:
            tap.resting = False


class _Tap:
    """One layer: what the current batch gave, and the best images so far."""

    def __init__(self, units: UnitMaps, aggregate: Aggregate, num_exemplars: int) -> None:
        self.units, self.name, self.module = units, units.name, units.module
        self.aggregate, self.number = aggregate, num_exemplars
        self.resting = False
        self.batch: dict[Side, tuple[Tensor, Tensor]] = {}  # scores and positions (N, U)
        self.kept: dict[Side, dict[str, Tensor]] = {}

    def hook(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Reduce the layer's maps to two numbers and two places for each image and unit."""
        if not self.resting:
            maps = self.units.maps(output).detach()
            self.batch = {side: self._reduced(maps, side) for side in get_args(Side)}

    def _reduced(self, maps: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        """Aggregates, and the places that stand for them, (N, U) each."""
        up = self.aggregate == "max" or (side == "highest" and self.aggregate != "min")
        by_size = self.aggregate in ("abs_mean", "l2")
        furthest, place = (
            maps.abs().max(2) if by_size else maps.max(2) if up else maps.min(2)
        )  # torch documents that of equal values the first is found
        if self.aggregate in ("mean", "abs_mean", "l2"):
            return aggregated(maps, self.aggregate), place
        return furthest, place

    def check(self, num_images: int, seen: int) -> None:
        """The batch has one row for each image, and no NaN."""
        check_runs(self.name, self.units.runs)
        for scores, _ in self.batch.values():
            self.units.check(scores, num_images, seen)

    def merge(self, seen: int, labels: Any, field: Tensor | None) -> None:
        """Let a batch's images compete with the best so far."""
        for side, (scores, place) in self.batch.items():
            new = {
                "score": scores.T,
                "image": (seen + torch.arange(len(scores), device=scores.device)).expand(
                    scores.shape[1], -1
                ),
                "position": torch.stack(
                    torch.unravel_index(place.T, self.units.positions or (1,)), -1
                ),
            }
            if field is not None:
                new["box"] = field.reshape(-1, 4).to(place.device)[place.T]
            if isinstance(labels, Tensor) and labels.shape == (len(scores),):
                new["label"] = labels.to(scores.device).expand(scores.shape[1], -1)
            kept = self.kept.get(side)
            if kept is not None:
                # Earlier images stand first, and the sort is stable: they win ties.
                new = {key: torch.cat([kept[key], new[key]], 1) for key in kept if key in new}
            order = new["score"].sort(dim=1, descending=side == "highest", stable=True).indices
            order = order[:, : self.number]
            self.kept[side] = {
                key: value.gather(
                    1,
                    order if value.dim() == 2 else order[..., None].expand(-1, -1, value.shape[2]),
                )
                for key, value in new.items()
            }
        self.batch = {}

    def result(self, num_images: int) -> Exemplars:
        """The best images of the whole pass, on the CPU."""
        highest, lowest = (self._side(self.kept[side]) for side in get_args(Side))
        directions = self.units.matrix is not None
        return Exemplars(self.name, self.aggregate, highest, lowest, num_images, directions)

    def _side(self, kept: dict[str, Tensor]) -> ExemplarSide:
        missing = self.number - kept["score"].shape[1]

        def filled(key: str, value: float) -> Tensor | None:
            if key not in kept:
                return None
            have = kept[key].cpu()
            rest = have.new_full((len(have), missing, *have.shape[2:]), value)
            return torch.cat([have, rest], 1)

        image, score, position = (
            filled("image", -1),
            filled("score", torch.nan),
            filled("position", -1),
        )
        assert image is not None
        assert score is not None
        assert position is not None
        return ExemplarSide(image, score, position, filled("box", 0), filled("label", -1))
