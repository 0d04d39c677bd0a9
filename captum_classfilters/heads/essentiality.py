"""Are a class's filters necessary and sufficient? Noise, zero or the mean in their place."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.layers import find_layer
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.heads import head_name
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics.features import checked_features, class_rows

Replacement = Literal["noise", "scaled_noise", "zero", "mean"]


@dataclass(frozen=True)
class Essentiality:
    r"""
    Recall of each class with part of its filters replaced.

    Args:

        clean (Tensor): Shape (C,). Recall as it is; NaN for classes without images.
        at_set (Tensor): Shape (C,). Recall with the class's own filters replaced: low if they are
                    necessary.
        at_complement (Tensor): Shape (C,). With all its other filters replaced: high if its own
                    suffice.
        random_at_set, random_at_complement (Tensor): The same for random sets of the same sizes.
    """

    clean: Tensor
    at_set: Tensor
    at_complement: Tensor
    random_at_set: Tensor
    random_at_complement: Tensor

    def __str__(self) -> str:
        names = ("clean", "at_set", "at_complement", "random_at_set", "random_at_complement")
        parts = (f"{name} {float(getattr(self, name).nanmean()):.3f}" for name in names)
        return "mean recall: " + ", ".join(parts)


def essentiality(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_filters: ClassFilters | Tensor,
    *,
    replacement: Replacement = "noise",
    repeats: int = 3,
    seed: int = 0,
) -> Essentiality:
    r"""
    Replace a class's filters, or all the others, in the features of its images, and classify.

    The images of class *c* are classified by the **full** linear head twice: with the features of
    its set :math:`S_c` replaced, and with those of the complement replaced (Badola et al.'s test
    with standard normal noise). Noise of unit scale is the authors' choice; ``"scaled_noise"`` has
    each feature's own mean and standard deviation, ``"zero"`` and ``"mean"`` are deterministic.

    Args:

        features (Tensor): Shape (N, K), the head's inputs.
        labels (Tensor): Shape (N,).
        weight (Tensor): Shape (C, K), of the head.
        bias (Tensor, optional): Shape (C,).
        class_filters (ClassFilters or Tensor): A table with a selection, or its mask (C, K).
        replacement (str): ``"noise"``, ``"scaled_noise"``, ``"zero"`` or ``"mean"``.
                    Default: "noise"
        repeats (int): Draws of noise and of random sets to average over.
                    Default: 3
        seed (int): Seed of the draws.
                    Default: 0

    Returns:
        *Essentiality*.

    Raises:
        ValueError: Shapes do not fit, or the replacement is unknown.
    """
    if replacement not in ("noise", "scaled_noise", "zero", "mean"):
        raise ValueError(
            f"replacement={replacement!r}; choose 'noise', 'scaled_noise', 'zero' or 'mean'."
        )
    mask = class_filters.selected if isinstance(class_filters, ClassFilters) else class_filters
    if mask.shape != weight.shape or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)} and filters "
            f"{tuple(mask.shape)} do not fit; expected (N, K), (C, K) and (C, K)."
        )
    features, labels, number = checked_features(features, labels, len(weight))
    trial = _Trial(features, labels, weight.detach().cpu().double(), bias, replacement, number)
    generator = torch.Generator().manual_seed(seed)
    nothing = torch.zeros_like(mask)
    runs = []
    for _ in range(max(1, repeats)):
        rank = torch.rand(mask.shape, generator=generator).argsort(1).argsort(1)
        random = rank < mask.sum(1, keepdim=True)
        runs.append(
            torch.stack([trial.recall(one, generator) for one in (mask, ~mask, random, ~random)])
        )
    mean = torch.stack(runs).mean(0)
    return Essentiality(trial.recall(nothing, generator), mean[0], mean[1], mean[2], mean[3])


def model_essentiality(
    model: nn.Module,
    class_filters: ClassFilters,
    dataloader: Iterable[Any],
    *,
    head: str | None = None,
    show_progress: bool = True,
    **options: Any,
) -> Essentiality:
    r"""
    :func:`essentiality` of a model's class filters on a data set.

    Args:

        model (nn.Module): The model, ending in a linear layer.
        class_filters (ClassFilters): Found at the layer that feeds it, on other images.
        dataloader (iterable): Batches of (images, labels).
        head (str, optional): Dotted name of the head.
        show_progress (bool): Show a progress bar.
        options: As for :func:`essentiality`.

    Returns:
        *Essentiality*.
    """
    name = head or head_name(model, class_filters)
    module: Any = find_layer(model, name)
    features, labels = collect_features(
        model, name, dataloader, attribute_to_layer_input=True, show_progress=show_progress
    )
    return essentiality(features, labels, module.weight, module.bias, class_filters, **options)


@dataclass
class _Trial:
    features: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor | None
    replacement: Replacement
    number: int

    def __post_init__(self) -> None:
        self.mean = self.features.mean(0)
        self.deviation = self.features.std(0) if len(self.features) > 1 else self.mean * 0
        self.offset = None if self.bias is None else self.bias.detach().cpu().double()
        self.rows = class_rows(self.labels, self.number)

    def recall(self, replaced: Tensor, generator: torch.Generator) -> Tensor:
        """Recall of each class with its row of ``replaced`` (C, K) replaced in its images."""
        values = []
        for class_, row in enumerate(self.rows):
            images = self.features[row]
            where = replaced[class_]
            changed = torch.where(where, self._other(images, generator), images)
            predicted = F.linear(changed, self.weight, self.offset).argmax(1)
            right = (predicted == class_).double()
            values.append(right.mean() if len(row) else torch.tensor(float("nan")).double())
        return torch.stack(values)

    def _other(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.replacement == "zero":
            return torch.zeros_like(images)
        if self.replacement == "mean":
            return self.mean.expand_as(images)
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        return noise if self.replacement == "noise" else self.mean + self.deviation * noise
