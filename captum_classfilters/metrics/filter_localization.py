"""Which class is a filter's own, and whose objects does it find?"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.ranking import descending
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.features import checked_labels
from captum_classfilters.metrics.localization import boxes_to_masks


def assign_filters(scores: Tensor | ClassFilters) -> Tensor:
    r"""
    The class of each filter: the one with its highest score; the lower class on a tie.

    Args:

        scores (Tensor or ClassFilters): Shape (C, K): gates, contributions, mutual information.

    Returns:
        *Tensor* of shape (K,), int64.

    Raises:
        ValueError: The scores are not a matrix.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import assign_filters
        >>> assign_filters(torch.tensor([[3., 1., 2.], [0., 5., 2.]]))
        tensor([0, 1, 0])
    """
    table = scores.scores if isinstance(scores, ClassFilters) else scores
    if table.dim() != 2:
        raise ValueError(f"scores have shape {tuple(table.shape)}; expected (C, K).")
    return descending(table.detach().cpu().T)[:, 0]


@short_repr
@dataclass(frozen=True)
class FilterLocalization(Tabular):
    r"""
    Overlap of each filter's activation with the objects of each class.

    Args:

        iou (Tensor): Shape (C, K). Mean overlap over the class's images; NaN without any.
        precision (Tensor): Shape (C, K). Share of them whose overlap exceeds the threshold.
        filter_class (Tensor): Shape (K,). The class that a filter is related to.
        thresholds (Tensor): Shape (K,). Activation from which on a filter counts as active.
    """

    iou: Tensor
    precision: Tensor
    filter_class: Tensor
    thresholds: Tensor

    @property
    def average_iou(self) -> float:
        """Mean over filters of the overlap with their own class."""
        return float(self._own(self.iou).nanmean())

    @property
    def average_precision(self) -> float:
        """Mean over filters of the precision for their own class."""
        return float(self._own(self.precision).nanmean())

    def by_class(self) -> dict[int, tuple[int, float, float]]:
        """For each class with related filters: their number, mean overlap, and mean precision.

        Returns:
            *dict* from class to *tuple*.
        """
        table = {}
        for class_ in self.filter_class.unique().tolist():
            own = self.filter_class == class_
            overlap = float(self.iou[class_, own].mean())
            table[class_] = (int(own.sum()), overlap, float(self.precision[class_, own].mean()))
        return table

    def _tables(self) -> list[Table]:
        rows = [
            {"class": class_, "filters": size, "overlap": overlap, "precision": precision}
            for class_, (size, overlap, precision) in self.by_class().items()
        ]
        return [Table(rows)]

    def _own(self, table: Tensor) -> Tensor:
        return table.gather(0, self.filter_class[None])[0]


@arguments_checked
def filter_localization(
    activations: Tensor,
    objects: Tensor,
    labels: Tensor,
    *,
    size: tuple[int, int] | None = None,
    share: float = 0.3,
    iou_threshold: float = 0.3,
    num_classes: int | None = None,
    thresholds: Tensor | None = None,
    filter_class: Tensor | None = None,
) -> FilterLocalization:
    r"""
    Compare every filter's activation maps with the objects, class by class.

    A filter is active where its activation is among the highest ``share`` over *all* images, and
    above its minimum there: one that is zero at most positions would else be active everywhere. Both
    are in the thresholds that come back. Maps are interpolated to the object's size before the
    threshold. A filter is related to the class for which it reaches the largest precision (Liang et
    al.'s *ActivMap* table, https://arxiv.org/abs/2007.08194).

    A filter's class is its best of C: on the same images its figures are too good. Pass ``thresholds``
    and ``filter_class`` of one half of the images when measuring the other.

    Args:

        activations (Tensor): Shape (N, K, h, w), of a layer.
        objects (Tensor): Masks (N, H, W), bool; or boxes (N, 4) in pixels of ``size``, edge to edge.
        labels (Tensor): Shape (N,).
        size (tuple of int, optional): Height and width of the image, for boxes.
                    Default: None
        share (float): Share of activations above the threshold.
                    Default: 0.3
        iou_threshold (float): Overlap that counts as found.
                    Default: 0.3
        num_classes (int, optional): C, where labels do not reach C - 1.
        thresholds (Tensor, optional): Shape (K,), instead of ``share``: a filter is active at each
                    activation that reaches its threshold, so that what an image scores does not
                    depend on the others.
                    Default: None
        filter_class (Tensor, optional): Shape (K,), instead of the best class.
                    Default: None

    Returns:
        *FilterLocalization*.

    Raises:
        ValueError: Shapes do not fit, ``share`` is out of range, or ``filter_class`` names a class
                    that is not there.
    """
    masks = _checked(activations, objects, labels, size)
    num_filters = activations.shape[1]
    classes, num_classes = checked_labels(labels, len(masks), num_classes)
    maps = activations.detach().cpu().float()
    if thresholds is None:
        thresholds = _thresholds(maps, share)
    elif thresholds.shape != (num_filters,):
        raise ValueError(
            f"thresholds have shape {tuple(thresholds.shape)} for {num_filters} filters."
        )
    thresholds = thresholds.detach().cpu()
    overlaps = _overlaps(maps, masks, thresholds)
    member = F.one_hot(classes, num_classes).double()
    count = member.sum(0)[:, None]
    iou = member.T @ overlaps / count
    precision = member.T @ (overlaps > iou_threshold).double() / count
    if filter_class is None:
        filter_class = assign_filters(precision)
    else:
        filter_class = _checked_classes(filter_class, num_filters, num_classes)
    return FilterLocalization(iou, precision, filter_class, thresholds)


def _checked_classes(filter_class: Tensor, num_filters: int, num_classes: int) -> Tensor:
    """Classes of filters (K,) as int64 on the CPU."""
    if filter_class.shape != (num_filters,):
        raise ValueError(
            f"filter_class has shape {tuple(filter_class.shape)} for {num_filters} filters."
        )
    classes = filter_class.detach().cpu().long()
    if not bool((classes == filter_class.cpu()).all()):
        raise ValueError(f"filter_class is {filter_class.dtype}; expected class indices.")
    if not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"filter_class runs from {int(classes.min())} to {int(classes.max())}; expected 0 to "
            f"{num_classes - 1}, or num_classes= if these images lack the last classes."
        )
    return classes


def _thresholds(maps: Tensor, share: float) -> Tensor:
    """Of each filter (K,), the activation that a share of all positions of all images reaches, and
    that is above its minimum."""
    if not 0 < share < 1:
        raise ValueError(f"share={share} must lie between 0 and 1.")
    rows = maps.transpose(0, 1).flatten(1)
    above = max(1, round(share * rows.shape[1]))
    lowest = rows.amin(1)
    # The next number; beside zero one that no mode of the processor takes for zero.
    above_lowest = lowest.nextafter(lowest.new_tensor(torch.inf))
    above_lowest = above_lowest.maximum(lowest + torch.finfo(lowest.dtype).tiny)
    return rows.kthvalue(rows.shape[1] - above + 1, dim=1).values.maximum(above_lowest)


def _overlaps(maps: Tensor, masks: Tensor, thresholds: Tensor) -> Tensor:
    """Overlap (N, K) of each image's object with what is active of each filter."""
    overlaps = torch.zeros(maps.shape[:2], dtype=torch.float64)
    for row, own, mask in zip(overlaps, maps, masks, strict=True):
        large = F.interpolate(own[None], size=mask.shape, mode="bilinear", align_corners=False)[0]
        active = large >= thresholds[:, None, None]
        both = (active & mask).flatten(1).sum(1).double()
        row.copy_(both / (active | mask).flatten(1).sum(1))
    return overlaps


def _checked(
    activations: Tensor, objects: Tensor, labels: Tensor, size: tuple[int, int] | None
) -> Tensor:
    """Masks (N, H, W)."""
    if activations.dim() != 4 or labels.shape != activations.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"activations {tuple(activations.shape)} and labels {tuple(labels.shape)} do not fit; "
            "expected (N, K, h, w) and (N,)."
        )
    if objects.dim() == 2:
        if size is None:
            raise ValueError("Boxes need size=(height, width), the image's.")
        masks = boxes_to_masks(objects, size)
    else:
        masks = objects.cpu()
    if masks.dim() != 3 or masks.dtype != torch.bool or len(masks) != len(labels):
        raise ValueError(
            f"objects are {objects.dtype} of shape {tuple(objects.shape)}; expected bool masks "
            f"({len(labels)}, H, W) or boxes ({len(labels)}, 4)."
        )
    if not bool(masks.flatten(1).any(1).all()):
        raise ValueError("An object is empty, or lies outside the image.")
    return masks
