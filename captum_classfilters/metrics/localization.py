"""Do maps find the object? Overlap with boxes or masks, precision at an overlap, pointing game."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou, masks_to_boxes

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import counted
from captum_classfilters._core.tables import Table, Tabular, short_repr

Rule = Literal["share", "level", "value"]
SHARES = tuple(round(0.05 * step, 2) for step in range(1, 20))


@short_repr
@dataclass(frozen=True)
class Localization(Tabular):
    r"""
    How well each image's map finds its object.

    Args:

        iou (Tensor): Shape (N,). Overlap (intersection over union) of the map above its threshold
                    with the object; for several maps of an image, their mean.
        box_iou (Tensor): Shape (N,). Overlap of the tight boxes around the map's largest connected
                    part and around the object, for several parts of that size their mean; 0 where
                    the map has nothing above its threshold.
        hit (Tensor): Shape (N,). Pointing game: 1 if the map's maximum lies on the object. Of
                    several equal maxima it is the share that does, so that a constant map scores as
                    a random point would.
        labels (Tensor or None): Shape (N,), classes for :meth:`by_class`.
    """

    iou: Tensor
    box_iou: Tensor
    hit: Tensor
    labels: Tensor | None = None

    def _tables(self) -> list[Table]:
        rows = [
            {
                "image": index,
                "class": None if self.labels is None else self.labels[index],
                "overlap": self.iou[index],
                "overlap of boxes": self.box_iou[index],
                "hit": self.hit[index],
            }
            for index in range(len(self.iou))
        ]
        title = (
            f"{counted(len(rows), 'image')}: mean overlap {self.average_iou:.3f}, of boxes "
            f"{float(self.box_iou.mean()):.3f}, pointing game {self.pointing_game:.3f}"
        )
        return [Table(rows, title=title)]

    @property
    def average_iou(self) -> float:
        """Mean overlap over images (Avg-IoU)."""
        return float(self.iou.mean())

    @property
    def pointing_game(self) -> float:
        """Share of images whose maximum lies on the object."""
        return float(self.hit.mean())

    @arguments_checked
    def average_precision(self, threshold: float, *, boxes: bool = False) -> float:
        r"""
        Share of images whose overlap reaches a threshold: Liang et al.'s AP20 at 0.2, and so on.

        Args:

            threshold (float): Between 0 and 1.
            boxes (bool): Overlap of boxes instead; at 0.5 this is the usual measure of weakly
                        supervised localization.
                        Default: False

        Returns:
            *float*.

        Raises:
            ValueError: The threshold is out of range.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie between 0 and 1.")
        return float(((self.box_iou if boxes else self.iou) >= threshold).double().mean())

    def by_class(self) -> dict[int, "Localization"]:
        """The same for each class with images.

        Returns:
            *dict* from class to *Localization*.

        Raises:
            ValueError: There are no labels.
        """
        if self.labels is None:
            raise ValueError("There are no labels; pass labels= to localization().")
        parts = {}
        for class_ in self.labels.unique().tolist():
            own = self.labels == class_
            parts[class_] = Localization(
                self.iou[own], self.box_iou[own], self.hit[own], self.labels[own]
            )
        return parts


@arguments_checked
def localization(
    maps: Tensor,
    objects: Tensor,
    *,
    rule: Rule = "share",
    value: float | Tensor = 0.3,
    tolerance: float = 0.0,
    labels: Tensor | None = None,
) -> Localization:
    r"""
    Compare maps, cut off at a threshold, with the objects' boxes or masks.

    Choose the threshold with :func:`choose_threshold` on *other* images than those that are scored
    here: its best value differs by method, and chosen on the scored images it flatters all of them.

    Args:

        maps (Tensor): Shape (N, H, W), higher where the object is thought to be; or (N, n, H, W),
                    n maps for each image, whose figures are averaged.
        objects (Tensor): Masks (N, H, W), bool; or boxes (N, 4), x_min, y_min, x_max, y_max in pixels
                    of the maps, from edge to edge: a box of one pixel is (x, y, x + 1, y + 1).
        rule (str): What of a map is kept: ``"share"`` this share of the image's pixels, the highest
                    ones; ``"level"`` what is above this level between the map's minimum and
                    maximum; ``"value"`` what is above this value, a number or (n,) numbers, one for
                    each of the n maps. A share is one to a pixel: of equal pixels at its end, some
                    are kept, drawn by a fixed seed. Of a level or value, pixels equal to it are
                    kept, so that a level keeps all of a constant map.
                    Default: "share"
        value (float or Tensor): The share, level or value.
                    Default: 0.3
        tolerance (float): Distance in pixels at which the pointing game still counts a hit.
                    Default: 0.0
        labels (Tensor, optional): Shape (N,), for figures by class.
                    Default: None

    Returns:
        *Localization*.

    Raises:
        ValueError: Shapes do not fit, an object is empty, or the threshold is out of range or NaN.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import localization
        >>> maps = torch.zeros(1, 4, 4)
        >>> maps[0, :2, :2] = torch.tensor([[4., 3.], [2., 1.]])
        >>> result = localization(maps, torch.tensor([[0, 0, 2, 2]]), value=2 / 16)
        >>> result.average_iou, result.pointing_game, result.average_precision(0.3)
        (0.5, 1.0, 1.0)
    """
    stacked, masks = _checked(maps, objects)
    if labels is not None and labels.shape != (len(masks),):
        raise ValueError(f"labels have shape {tuple(labels.shape)} for {len(masks)} images.")
    ious, boxes, hits = [], [], []
    object_boxes = masks_to_boxes(masks).double()
    for image, (own, mask) in enumerate(zip(stacked, masks, strict=True)):
        kept = _kept(own, rule, value)
        ious.append(_overlap(kept, mask))
        boxes.append(_box_overlap(kept, object_boxes[image]))
        hits.append(_hits(own, mask, tolerance))
    return Localization(
        iou=torch.tensor(ious, dtype=torch.float64),
        box_iou=torch.tensor(boxes, dtype=torch.float64),
        hit=torch.tensor(hits, dtype=torch.float64),
        labels=None if labels is None else labels.detach().cpu().clone(),
    )


@arguments_checked
def choose_threshold(
    maps: Tensor,
    objects: Tensor,
    *,
    rule: Rule = "share",
    candidates: Sequence[float] = SHARES,
) -> tuple[float, float]:
    r"""
    The threshold with the largest mean overlap, on images kept for choosing it.

    Args:

        maps (Tensor): Shape (N, H, W) or (N, n, H, W).
        objects (Tensor): Masks (N, H, W) or boxes (N, 4), as in :func:`localization`.
        rule (str): As there.
                    Default: "share"
        candidates (sequence of float): Thresholds to try; the first of equals is taken.
                    Default: 0.05, 0.10, ..., 0.95

    Returns:
        *tuple* of the threshold and its mean overlap on these images.

    Raises:
        ValueError: There are no candidates, or shapes do not fit.
    """
    candidates = [float(candidate) for candidate in candidates]
    if not candidates:
        raise ValueError("candidates is empty; give at least one threshold.")
    stacked, masks = _checked(maps, objects)
    overlaps = [
        _overlaps(own, mask, rule, candidates) for own, mask in zip(stacked, masks, strict=True)
    ]
    scores = torch.stack(overlaps).mean(0)
    best = int(scores.argmax())
    return candidates[best], float(scores[best])


@arguments_checked
def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    r"""
    Boxes as filled masks: the pixels whose centers lie inside.

    Args:

        boxes (Tensor): Shape (N, 4), x_min, y_min, x_max, y_max, edge to edge.
        size (tuple of int): Height and width.

    Returns:
        *Tensor* of shape (N, H, W), bool.

    Raises:
        ValueError: The boxes have another shape.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have shape {tuple(boxes.shape)}; expected (N, 4).")
    left, top, right, bottom = boxes.detach().cpu().double().T[:, :, None]
    x, y = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    inside_x, inside_y = (x > left) & (x < right), (y > top) & (y < bottom)
    return inside_y[:, :, None] & inside_x[:, None, :]


@arguments_checked
def center_box_maps(num_images: int, size: tuple[int, int]) -> Tensor:
    r"""
    The baseline that knows nothing of the image: a box around its center.

    The maps fall with the distance from the center, so that any threshold leaves a box of the
    image's proportions.

    Args:

        num_images (int): N.
        size (tuple of int): Height and width.

    Returns:
        *Tensor* of shape (N, H, W).
    """
    y, x = ((torch.arange(side) + 0.5 - side / 2).abs() / side for side in size)
    nearness = 1 - 2 * torch.maximum(y[:, None], x[None, :])
    return nearness.expand(num_images, *size)


def _checked(maps: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, n, H, W), in floating point, and masks (N, H, W), on the CPU."""
    if maps.dim() not in (3, 4) or len(maps) == 0:
        raise ValueError(
            f"maps have shape {tuple(maps.shape)}; expected (N, H, W) or (N, n, H, W)."
        )
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps hold NaN or Inf.")
    stacked = (maps if maps.dim() == 4 else maps[:, None]).detach().cpu()
    if not stacked.is_floating_point():  # whose levels and thresholds lie between whole numbers
        stacked = stacked.double()
    size = (stacked.shape[-2], stacked.shape[-1])
    masks = boxes_to_masks(objects, size) if objects.dim() == 2 else objects.cpu()
    if masks.dtype != torch.bool or masks.shape != (len(stacked), *size):
        raise ValueError(
            f"objects are {objects.dtype} of shape {tuple(objects.shape)}; expected bool masks "
            f"{(len(stacked), *size)} or boxes {(len(stacked), 4)}."
        )
    empty = (~masks.flatten(1).any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"The object of image {empty[0]} is empty, or lies outside the image.")
    return stacked, masks


def _falling(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Values of an image's maps (n, P) from the highest on, and their pixels; equal ones in mixed order.

    In the order of the pixels, a share of a constant map would be its upper part.
    """
    flat = maps.flatten(1)
    mixed = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
    falling, places = flat[:, mixed].sort(dim=1, descending=True, stable=True)
    return falling, mixed[places]


def _numbers_kept(falling: Tensor, rule: Rule, values: Sequence[float | Tensor]) -> Tensor:
    """How many pixels of each map are kept at each threshold (n, thresholds)."""
    if rule == "value":
        columns = [torch.as_tensor(value, dtype=falling.dtype).reshape(-1, 1) for value in values]
        for column in columns:
            if len(column) not in (1, len(falling)):
                raise ValueError(
                    f"value holds {len(column)} numbers for {len(falling)} maps an image."
                )
        limits = torch.cat([column.expand(len(falling), 1) for column in columns], 1)
        if bool(limits.isnan().any()):
            raise ValueError("value holds NaN; it must be a number for rule='value'.")
        return _at_or_above(falling, limits)
    for value in values:
        if isinstance(value, Tensor) or not 0 < value < 1:
            raise ValueError(f"value={value!r} must be a number between 0 and 1 for rule={rule!r}.")
    wanted = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if rule == "share":
        number = (wanted * falling.shape[1]).round().long().clamp(min=1)
        return number.expand(len(falling), -1)
    if rule == "level":
        low, high = falling[:, -1:], falling[:, :1]
        return _at_or_above(falling, low + wanted.to(falling.dtype) * (high - low))
    raise ValueError(f"rule={rule!r}; choose 'share', 'level' or 'value'.")


def _at_or_above(falling: Tensor, limits: Tensor) -> Tensor:
    return torch.searchsorted(-falling, -limits, right=True)


def _kept(maps: Tensor, rule: Rule, value: float | Tensor) -> Tensor:
    """What is above the threshold in each of an image's maps (n, H, W)."""
    falling, pixels = _falling(maps)
    first = torch.arange(falling.shape[1]) < _numbers_kept(falling, rule, [value])
    return torch.empty_like(first).scatter_(1, pixels, first).reshape(maps.shape)


def _overlaps(maps: Tensor, mask: Tensor, rule: Rule, values: Sequence[float]) -> Tensor:
    """Mean overlap of an image's maps (n, H, W) at each of many thresholds, from one sort."""
    falling, pixels = _falling(maps)
    inside = mask.flatten()[pixels].double().cumsum(1)
    number = _numbers_kept(falling, rule, values)
    both = torch.where(number > 0, inside.gather(1, (number - 1).clamp(min=0)), 0.0)
    return (both / (number + mask.sum() - both)).mean(0)


def _overlap(kept: Tensor, mask: Tensor) -> float:
    both = (kept & mask).flatten(1).sum(1).double()
    either = (kept | mask).flatten(1).sum(1).double()
    return float((both / either).mean())


def _box_overlap(kept: Tensor, object_box: Tensor) -> float:
    """Mean over maps (n, H, W); of several largest parts none is more the map's than another."""
    overlaps = []
    edges = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)  # from centers to edges
    for one in kept:
        parts, number = ndimage.label(one.numpy())
        if number == 0:
            overlaps.append(0.0)
            continue
        sizes = np.bincount(parts.ravel())[1:]
        places = ndimage.find_objects(parts)
        boxes = [
            [columns.start, rows.start, columns.stop, rows.stop]
            for rows, columns in (places[part] for part in np.flatnonzero(sizes == sizes.max()))
        ]
        found = torch.tensor(boxes, dtype=torch.float64)
        overlaps.append(float(box_iou(found, (object_box + edges)[None]).mean()))
    return sum(overlaps) / len(overlaps)


def _hits(maps: Tensor, mask: Tensor, tolerance: float) -> float:
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must not be negative.")
    target = mask
    if tolerance > 0:
        target = torch.from_numpy(ndimage.distance_transform_edt(~mask.numpy()) <= tolerance)
    flat = maps.flatten(1)
    highest = flat == flat.max(1, keepdim=True).values
    on_target = (highest & target.flatten()).sum(1).double() / highest.sum(1)
    return float(on_target.mean())
