"""What happens to every class when one class's filters are masked, or kept alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._internal.guard import model_left_as_found
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.gate import FilterGate


@dataclass(frozen=True)
class MaskingResult:
    r"""
    Recall of every class under each mask.

    Args:

        recall (Tensor): Shape (C, C). Entry (c, j): recall of class j when the filters of class c
                    are masked (or kept alone); NaN for classes without images.
        control (Tensor): Shape (C, C). The same with as many random filters in place of the class's.
        clean (Tensor): Shape (C,). Recall without masks.
    """

    recall: Tensor
    control: Tensor
    clean: Tensor

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
        ValueError: The mode is unknown, or the loader is empty.
    """
    if mode not in ("mask", "keep"):
        raise ValueError(f"mode={mode!r}; choose 'mask' or 'keep'.")
    selected = class_filters.selected
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(selected.shape, generator=generator).argsort(1).argsort(1)
    random = order < selected.sum(1, keepdim=True)
    chosen = torch.cat([selected, random])
    gates = (chosen if mode == "keep" else ~chosen).float()
    gates = torch.cat([gates, torch.ones(1, gates.shape[1])])
    number = class_filters.num_classes
    right = torch.zeros(len(gates), number, dtype=torch.int64)
    seen = torch.zeros(number, dtype=torch.int64)
    gated = FilterGate(model, layer, class_filters.num_filters, channel_dim)
    device = gated.ones(1).device
    bar = tqdm(dataloader, desc="masking", unit="batch", disable=not show_progress)
    with torch.no_grad(), model_left_as_found(model, evaluation=True):
        for images, labels in bar:
            images, labels = images.to(device), labels.cpu()
            seen += torch.bincount(labels, minlength=number)
            for row, gate in enumerate(gates.to(device)):
                correct = gated(gate[None], images).argmax(1).cpu() == labels
                right[row] += torch.bincount(labels[correct], minlength=number)
    if int(seen.sum()) == 0:
        raise ValueError("The data loader is empty.")
    recall = right.double() / seen.double()
    return MaskingResult(recall[:number], recall[number : 2 * number], recall[-1])
