"""Which classes' objects does each filter find?"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_classfilters.gates.gate_measures import assign_filters
from captum_classfilters.metrics.localization import boxes_to_masks


@dataclass(frozen=True)
class FilterLocalization:
    r"""
    Overlap of each filter's activation with the objects of each class.

    Args:

        iou (Tensor): Shape (K, C). Mean overlap over the class's images; NaN without any.
        precision (Tensor): Shape (K, C). Share of them whose overlap exceeds the threshold.
        filter_class (Tensor): Shape (K,). The class that a filter is related to.
        thresholds (Tensor): Shape (K,). Activation above which a filter counts as active.
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
            overlap = float(self.iou[own, class_].mean())
            table[class_] = (int(own.sum()), overlap, float(self.precision[own, class_].mean()))
        return table

    def _own(self, table: Tensor) -> Tensor:
        return table.gather(1, self.filter_class[:, None])[:, 0]


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
    above its minimum. Maps are interpolated to the object's size before the threshold. A filter is
    related to the class for which it reaches the largest precision (Liang et al.'s *ActivMap*
    table, https://arxiv.org/abs/2007.08194).

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
        thresholds (Tensor, optional): Shape (K,), instead of ``share``.
                    Default: None
        filter_class (Tensor, optional): Shape (K,), instead of the best class.
                    Default: None

    Returns:
        *FilterLocalization*.

    Raises:
        ValueError: Shapes do not fit, or ``share`` is out of range.
    """
    masks = _checked(activations, objects, labels, size)
    number, width = activations.shape[:2]
    columns = activations.detach().cpu().float().transpose(0, 1).flatten(1)
    if thresholds is None:
        if not 0 < share < 1:
            raise ValueError(f"share={share} must lie between 0 and 1.")
        above = max(1, round(share * columns.shape[1]))
        thresholds = columns.kthvalue(columns.shape[1] - above + 1, dim=1).values
    elif thresholds.shape != (width,):
        raise ValueError(f"thresholds have shape {tuple(thresholds.shape)} for {width} filters.")
    floor = columns.min(1).values[:, None, None]
    overlaps = torch.zeros(number, width, dtype=torch.float64)
    for image, (own, mask) in enumerate(
        zip(activations.detach().cpu().float(), masks, strict=True)
    ):
        maps = F.interpolate(own[None], size=mask.shape, mode="bilinear", align_corners=False)[0]
        active = (maps >= thresholds[:, None, None]) & (maps > floor)
        both = (active & mask).flatten(1).sum(1).double()
        overlaps[image] = both / (active | mask).flatten(1).sum(1)
    classes = labels.detach().cpu().long()
    total = int(classes.max()) + 1 if num_classes is None else num_classes
    member = F.one_hot(classes, total).double()
    count = member.sum(0)
    iou = overlaps.T @ member / count
    precision = (overlaps > iou_threshold).double().T @ member / count
    if filter_class is None:
        filter_class = assign_filters(precision.T)
    elif filter_class.shape != (width,):
        raise ValueError(f"filter_class has shape {tuple(filter_class.shape)} for {width} filters.")
    return FilterLocalization(iou, precision, filter_class, thresholds)


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
