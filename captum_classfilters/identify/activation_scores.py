"""How much a layer's filters are active, and what their activations change: pruning baselines."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, Batches
from captum_classfilters._core.devices import sums_device
from captum_classfilters._core.layers import find_layers, no_gradient
from captum_classfilters._core.names import counted
from captum_classfilters._core.outputs import (
    as_rows,
    at_least_float32,
    checked_rows,
    class_scores,
    log_probabilities,
)
from captum_classfilters._core.score_reader import OutputKind
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters._core.units import UnitTap, check_finite, read_units


@short_repr
@dataclass(frozen=True)
class ActivationScores(Tabular):
    r"""
    Activation statistics of a layer's filters over images and positions.

    Args:

        mean (Tensor): Shape (K,). Mean of the absolute activation.
        maximum (Tensor): Shape (K,). Largest activation.
        zero_share (Tensor): Shape (K,). APoZ, the share of activations that are not positive:
                    zeros, behind a ReLU.
        taylor (Tensor): Shape (K,). Mean of :math:`|a \, \partial \mathrm{CE} / \partial a|`.
        layer (str): Dotted name of the layer.
        num_images (int): N.
    """

    mean: Tensor
    maximum: Tensor
    zero_share: Tensor
    taylor: Tensor
    layer: str
    num_images: int

    def _tables(self) -> list[Table]:
        titles = {
            "mean": self.mean,
            "largest": self.maximum,
            "share of zeros": self.zero_share,
            "Taylor": self.taylor,
        }
        columns = {"filter": range(len(self.mean))} | {
            title: values.tolist() for title, values in titles.items()
        }
        rows = [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]
        title = f"activations of {self.layer} on {counted(self.num_images, 'image')}"
        return [Table(rows, dict.fromkeys(titles, ".4g"), title)]


@arguments_checked
def activation_scores(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Dataloader,
    *,
    channel_dim: int | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> ActivationScores:
    r"""
    Mean and largest activation, APoZ and the Taylor criterion of every filter, in one pass.

    Source: APoZ: Hu et al., *Network Trimming*, 2016, https://arxiv.org/abs/1607.03250. Taylor:
    Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
    2017, https://arxiv.org/abs/1611.06440; here the absolute value is taken at each position, so
    that positions of opposite sign do not cancel.

    Args:

        model (nn.Module): The model, with logits or probabilities, (N, C) or one of them.
        layer (nn.Module or str): The layer, or its dotted name; an activation, if filters are to be
                    judged by what later layers read.
        dataloader (iterable): Batches of (inputs, labels).
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *ActivationScores*, on the CPU in float64.

    Raises:
        ValueError: The loader is empty, labels are not class indices, the layer does not run exactly
                    once, or activations are NaN or infinite.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import activation_scores
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> scores = activation_scores(net, "1", data, show_progress=False)
        >>> scores.mean.shape, scores.taylor.shape
        (torch.Size([8]), torch.Size([8]))
    """
    (module,) = find_layers(model, layer).values()
    tap = UnitTap(model, module, channel_dim)
    tap.differentiable = True
    sums = _Sums(tap, OutputKind(model))
    num_images = read_units(
        model,
        [tap],
        dataloader,
        "activations",
        sums.add,
        unpack=unpack,
        show_progress=show_progress,
    )
    return sums.result(num_images)


class _Sums:
    """Sums over images and positions, where the model is."""

    def __init__(self, tap: UnitTap, kind: OutputKind) -> None:
        self.tap, self.kind = tap, kind
        self.num_values = 0
        self.sums: Tensor | None = None  # (3, K): absolute activations, zeros and changes
        self.maximum: Tensor | None = None

    def add(self, batches: Batches, batch: Batch, output: object) -> None:
        """Add what one batch showed."""
        slope = self._slope(batches, batch, output)
        maps = at_least_float32(self.tap.seen[0].detach())
        change = (maps * at_least_float32(self.tap.maps(slope))).abs()
        finite = change.isfinite().all(2).all(1)
        check_finite(batches, batch, self.tap.name, finite, "gradients")
        where = sums_device(maps.device)
        total = torch.stack(
            [
                part.to(where).sum((0, 2), dtype=torch.float64)
                for part in (maps.abs(), maps <= 0, change)
            ]
        )
        highest = maps.amax((0, 2)).to(where).double()
        self.sums = total if self.sums is None else self.sums + total
        self.maximum = highest if self.maximum is None else torch.maximum(self.maximum, highest)
        self.num_values += batch.size * maps.shape[2]

    def _slope(self, batches: Batches, batch: Batch, output: object) -> Tensor:
        """The derivative of the batch's loss at the layer, in its layout."""
        source = self.tap.source  # of this run: the next line may run the model again
        probabilities = self.kind.probabilities(batch.inputs, output, batches.check, batch.number)
        scores = checked_rows(at_least_float32(as_rows(class_scores(output))))
        logs = log_probabilities(scores, probabilities)
        labels = batches.class_labels(batch, logs.shape[1])
        loss = F.nll_loss(logs, labels, reduction="sum")
        slope = None
        if loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, source, allow_unused=True)
        if slope is None:
            raise no_gradient(self.tap.name)
        return slope

    def result(self, num_images: int) -> ActivationScores:
        """The means, on the CPU."""
        assert self.sums is not None
        assert self.maximum is not None
        mean, zero_share, taylor = (self.sums / self.num_values).cpu()
        return ActivationScores(
            mean, self.maximum.cpu(), zero_share, taylor, self.tap.name, num_images
        )
