"""What happens to every class when one class's filters are masked, or kept alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import find_layer
from captum_classfilters.attr.layer_filter_ablation import LayerFilterAblation
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.class_curves import replays


@dataclass(frozen=True)
class MaskingResult:
    r"""
    Recall of every class under each mask.

    Args:

        recall (Tensor): Shape (C, C). Entry (c, j): recall of class j when the filters of class c
                    are masked (or kept alone); NaN for classes without images.
        control (Tensor): Shape (C, C). The same with as many random filters in place of the class's.
        clean (Tensor): Shape (C,). Recall without masks.
        confusion (Tensor): Shape (C, C), int64. Entry (c, j): images of class c that are taken for
                    class j when the filters of class c are masked (or kept alone).
        predicted (Tensor): Shape (C, C), int64. Entry (c, j): images of all classes that are taken for
                    class j under the same mask; its diagonal is how often a masked class is still
                    predicted.
    """

    recall: Tensor
    control: Tensor
    clean: Tensor
    confusion: Tensor
    predicted: Tensor

    @property
    def own(self) -> Tensor:
        """Recall of each class under its own mask (C,)."""
        return self.recall.diagonal()

    @property
    def loss_of_others(self) -> float:
        """Mean loss of recall of the other classes, over all masks; a share, not per cent."""
        loss = self.clean[None, :] - self.recall
        off_diagonal = ~torch.eye(len(loss), dtype=torch.bool)
        return float(loss[off_diagonal].nanmean())


def masking_test(
    model: nn.Module,
    layer: nn.Module | str,
    class_filters: ClassFilters,
    dataloader: Iterable[Any],
    *,
    mode: Literal["mask", "keep"] = "mask",
    channel_dim: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> MaskingResult:
    r"""
    Mask the filters of one class at a time, and measure every class.

    In a network with class-specific filters a masked class is no longer recognised while the others
    stay as they were (Liang et al.'s masking test). Masked filters are multiplied by zero at the
    layer; random sets of the same sizes, drawn with ``seed``, are the control.

    Args:

        model (nn.Module): The model, with logits (N, C).
        layer (nn.Module or str): The layer that ``class_filters`` was found at.
        class_filters (ClassFilters): A table with a selection.
        dataloader (iterable): Batches of (images, labels), other ones than the table was found on.
        mode (str): ``"mask"`` removes a class's filters, ``"keep"`` removes all the others.
                    Default: "mask"
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
        seed (int): Seed of the control.
                    Default: 0
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *MaskingResult*.

    Raises:
        ValueError: The mode is unknown, nothing is selected, the loader is empty, or table, model and
                    labels do not fit each other.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.gates import masking_test
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> quiet = {"show_progress": False}
        >>> table = LayerFilterContribution(net, "1").identify(data, num_filters=3, **quiet)
        >>> result = masking_test(net, "1", table, data, **quiet)
        >>> result.recall.shape, result.confusion.sum(1).tolist()
        (torch.Size([2, 2]), [2, 2])
    """
    if mode not in ("mask", "keep"):
        raise ValueError(f"mode={mode!r}; choose 'mask' or 'keep'.")
    selected = class_filters.selected
    if not bool(selected.any()):
        raise ValueError("The table selects no filters; call table.select(num_filters=...) first.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(selected.shape, generator=generator).argsort(1).argsort(1)
    random = order < selected.sum(1, keepdim=True)
    chosen = torch.cat([selected, random])
    removed = torch.cat([~chosen if mode == "keep" else chosen, torch.zeros_like(chosen[:1])])
    number, width = class_filters.num_classes, class_filters.num_filters
    right = torch.zeros(len(removed), number, dtype=torch.int64)
    seen = torch.zeros(number, dtype=torch.int64)
    confusion, predicted = torch.zeros(2, number, number, dtype=torch.int64)
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    ablation = LayerFilterAblation(model, module, channel_dim=channel_dim)
    with model_left_as_found(model, evaluation=True):
        for replay, labels in replays(ablation, module, (number, width), dataloader, show_progress):
            seen += torch.bincount(labels, minlength=number)
            parts = [outputs.argmax(2) for _, outputs in replay.in_parts(removed)]
            answers = torch.cat(parts).cpu()
            for row, answer in enumerate(answers):
                right[row] += torch.bincount(labels[answer == labels], minlength=number)
            for class_, answer in enumerate(answers[:number]):
                confusion[class_] += torch.bincount(answer[labels == class_], minlength=number)
                predicted[class_] += torch.bincount(answer, minlength=number)
    recall = right.double() / seen.double()
    return MaskingResult(
        recall[:number], recall[number : 2 * number], recall[-1], confusion, predicted
    )
