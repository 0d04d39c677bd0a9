"""What happens to every class when one class's filters are masked, or kept alone."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.layers import find_layer
from captum_classfilters._core.ranking import random_sets
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.removals import at_input_of
from captum_classfilters.metrics.replayed_batches import confusion_without


@short_repr
@dataclass(frozen=True)
class MaskingResult(Tabular):
    r"""
    Recall of every class under each mask; prints as a table.

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
        class_names (tuple of str): C names.
    """

    recall: Tensor
    control: Tensor
    clean: Tensor
    confusion: Tensor
    predicted: Tensor
    class_names: tuple[str, ...] = ()

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

    def _tables(self) -> list[Table]:
        others = ~torch.eye(len(self.recall), dtype=torch.bool)
        rows = [
            {
                "class": name,
                "clean": self.clean[row],
                "own mask": self.recall[row, row],
                "other classes": self.recall[row][others[row]].nanmean(),
                "random mask": self.control[row, row],
            }
            for row, name in enumerate(self.class_names or map(str, range(len(self.recall))))
        ]
        return [Table(rows, title="recall")]


@arguments_checked
def masking_test(
    model: nn.Module,
    layer: nn.Module | str,
    class_filters: ClassFilters,
    dataloader: Dataloader,
    *,
    mode: Literal["mask", "keep"] = "mask",
    repetitions: int = 1,
    seed: int = 0,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> MaskingResult:
    r"""
    Mask the filters of one class at a time, and measure every class.

    In a network with class-specific filters a masked class is no longer recognized while the others
    stay as they were (Liang et al.'s masking test). Masked filters are set to zero at the layer;
    random sets of the same sizes are the control.
    :func:`~captum_classfilters.metrics.collateral_damage` removes the same sets, beside further
    controls.

    Args:

        model (nn.Module): The model, with scores (N, C) or one logit.
        layer (nn.Module or str): The layer that ``class_filters`` was found at; if at its input,
                    filters are masked there.
        class_filters (ClassFilters): A table with a selection.
        dataloader (iterable): Batches of (images, labels), other ones than the table was found on.
        mode (str): ``"mask"`` removes a class's filters, ``"keep"`` removes all the others.
                    Default: "mask"
        repetitions (int): Random sets for each class to average the control over.
                    Default: 1
        seed (int): Seed of the random sets.
                    Default: 0
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        device (torch.device or str, optional): Where the batches go; by default where the model is.
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
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions} must be at least 1: the test has a control.")
    selected = class_filters.selected
    if not bool(selected.any()):
        raise ValueError("The table selects no filters; call table.select(num_filters=...) first.")
    sets = torch.cat([selected[None], random_sets(selected, repetitions, seed)])
    module = find_layer(model, layer) if isinstance(layer, str) else layer
    clean, without = confusion_without(
        LayerFilterAblation(model, module, channel_dim=channel_dim),
        module,
        (~sets if mode == "keep" else sets).flatten(0, 1),
        class_filters.num_classes,
        dataloader,
        unpack=unpack,
        device=device,
        show_progress=show_progress,
        at_input=at_input_of(model, module, {"": class_filters}),
    )
    counts, every = clean.sum(1).double(), torch.arange(class_filters.num_classes)
    without = without.unflatten(0, sets.shape[:2])  # (1 + repetitions, C, C, C)
    recall = without.diagonal(dim1=2, dim2=3) / counts
    return MaskingResult(
        recall=recall[0],
        control=recall[1:].mean(0),
        clean=clean.diagonal() / counts,
        confusion=without[0, every, every],
        predicted=without[0].sum(1),
        class_names=class_filters.class_names,
    )
