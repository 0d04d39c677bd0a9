"""Are a class's filters necessary and sufficient? Noise, zero or the mean in their place."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, check_read_again, read_batches
from captum_classfilters._core.outputs import two_classes
from captum_classfilters._core.ranking import random_sets
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.taps import tapped
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.heads.decompose import fit_to_head
from captum_classfilters.heads.head_features import head_features
from captum_classfilters.heads.linear_head import LinearHead, check_scores_follow, run_head
from captum_classfilters.metrics.features import checked_features, class_rows

logger = logging.getLogger("captum_classfilters")

Replacement = Literal["noise", "scaled_noise", "zero", "mean"]


@short_repr
@dataclass(frozen=True)
class Essentiality(Tabular):
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

    def _tables(self) -> list[Table]:
        names = ("clean", "at_set", "at_complement", "random_at_set", "random_at_complement")
        columns = {name: getattr(self, name) for name in names}
        rows = [
            {"class": index} | {name: values[index] for name, values in columns.items()}
            for index in range(len(self.clean))
        ]
        means = ", ".join(
            f"{name} {float(values.nanmean()):.3f}" for name, values in columns.items()
        )
        return [Table(rows, title=f"mean recall: {means}")]


@arguments_checked
def essentiality(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_filters: ClassFilters | Tensor,
    *,
    replacement: Replacement = "noise",
    repetitions: int = 3,
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
        weight (Tensor): Shape (C, K), of the head; (1, K) for one logit and two classes.
        bias (Tensor, optional): Shape (C,).
        class_filters (ClassFilters or Tensor): A table with a selection, or its mask (C, K).
        replacement (str): ``"noise"``, ``"scaled_noise"``, ``"zero"`` or ``"mean"``.
                    Default: "noise"
        repetitions (int): Draws of noise and of random sets to average over.
                    Default: 3
        seed (int): Seed of the draws.
                    Default: 0

    Returns:
        *Essentiality*: Recall of each class (C,) ``clean``, ``at_set`` and ``at_complement`` with its
        own filters or all others replaced, and ``random_at_set``, ``random_at_complement``.

    Raises:
        ValueError: Shapes do not fit, or the replacement is unknown.
    """
    mask = class_filters.selected if isinstance(class_filters, ClassFilters) else class_filters
    num_classes = max(2, len(weight)) if weight.dim() == 2 else 0
    fits = weight.dim() == features.dim() == 2 and features.shape[1] == weight.shape[1]
    if not fits or mask.shape != (num_classes, weight.shape[1]) or mask.dtype != torch.bool:
        raise ValueError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)} and filters "
            f"{tuple(mask.shape)} ({mask.dtype}) do not fit; expected (N, K), (C, K) and a bool mask "
            "(C, K)."
        )
    features, labels, _ = checked_features(features, labels, num_classes)
    weight = weight.detach().cpu().double()
    bias = None if bias is None else bias.detach().cpu().double()
    if not all(bool(part.isfinite().all()) for part in (weight, bias) if part is not None):
        raise ValueError("The head's weight or bias holds NaN or Inf.")
    replaced = _Replaced.of(mask, features, replacement, repetitions, seed)
    rows = class_rows(labels, num_classes)

    def recall(part: int | None) -> Tensor:
        """Recall of each class, its images with a part of their features replaced."""
        values = []
        for class_index, row in enumerate(rows):
            changed = replaced.features(features[row], labels[row], part)
            predicted = two_classes(F.linear(changed, weight, bias)).argmax(1)
            values.append((predicted == class_index).double().mean())  # NaN without images
        return torch.stack(values)

    parts = torch.stack([recall(part) for part in range(len(replaced.sets))])
    return _essentiality(recall(None), parts)


@arguments_checked
def model_essentiality(
    model: nn.Module,
    class_filters: ClassFilters,
    dataloader: Dataloader,
    *,
    head: nn.Module | str | None = None,
    replacement: Replacement = "noise",
    repetitions: int = 3,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> Essentiality:
    r"""
    :func:`essentiality` of a model's class filters on a data set.

    Where the model's scores are seen to be its head's output, the head's inputs are collected and
    classified by its weight. Otherwise the model itself runs with replaced inputs of its head, which
    takes a second pass over the data.

    Args:

        model (nn.Module): The model, ending in a linear layer.
        class_filters (ClassFilters): Found at the layer that feeds it, on other images.
        dataloader (iterable): Batches of (inputs, labels).
        head (nn.Module or str, optional): The head, or its dotted name.
                    Default: None
        replacement (str): As for :func:`essentiality`.
                    Default: "noise"
        repetitions (int): Draws of noise and of random sets to average over.
                    Default: 3
        seed (int): Seed of the draws.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *Essentiality*, as :func:`essentiality`.

    Raises:
        ValueError: The table does not fit the head, the head is not linear or runs more than once,
                    or the scores do not follow from it alone.
    """
    fit = fit_to_head(model, class_filters, head)
    mask = fit.of_classes(class_filters.selected)
    collected = head_features(
        model, fit.head, dataloader, unpack=unpack, show_progress=show_progress
    )
    if collected.ends:
        return essentiality(
            collected.features,
            collected.labels,
            fit.head.weight,
            fit.head.bias,
            mask,
            replacement=replacement,
            repetitions=repetitions,
            seed=seed,
        )
    logger.warning(
        "The model's scores are not the very output of its head %r: it runs again, with replaced "
        "inputs of the head.",
        fit.head.name,
    )
    check_read_again(dataloader)
    replaced = _Replaced.of(mask, collected.features.double(), replacement, repetitions, seed)
    hits: list[Tensor] = []
    with read_batches(
        model, dataloader, "essentiality", unpack=unpack, show_progress=show_progress
    ) as batches:
        reader = ScoreReader(model, batches)
        for batch in batches:
            labels = batches.class_labels(batch, len(mask))
            if batch.first_image == 0:
                check_scores_follow(model, fit.head, batch.inputs)
            counts = _hits(model, fit.head, replaced, reader, batch, labels)
            hits = [counts if not hits else hits[0] + counts]
    recall = hits[0].cpu() / torch.bincount(collected.labels, minlength=len(mask)).double()
    return _essentiality(recall[0], recall[1:])


@dataclass(frozen=True)
class _Replaced:
    """Features with parts of them replaced: a class's own set, its complement, random ones."""

    sets: Tensor  # (4 R, C, K): set, complement, random set, its complement, R times
    replacement: Replacement
    mean: Tensor
    deviation: Tensor
    generator: torch.Generator

    @classmethod
    def of(
        cls, mask: Tensor, features: Tensor, replacement: Replacement, repetitions: int, seed: int
    ) -> "_Replaced":
        """From the classes' sets (C, K) and all features (N, K)."""
        if replacement not in ("noise", "scaled_noise", "zero", "mean"):
            raise ValueError(
                f"replacement={replacement!r}; choose 'noise', 'scaled_noise', 'zero' or 'mean'."
            )
        if repetitions < 1:
            raise ValueError(f"repetitions={repetitions} must be at least 1.")
        sets = [
            part
            for random in random_sets(mask, repetitions, seed)
            for part in (mask, ~mask, random, ~random)
        ]
        mean = features.mean(0)
        deviation = features.std(0) if len(features) > 1 else torch.zeros_like(mean)
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.stack(sets), replacement, mean, deviation, generator)

    def features(self, features: Tensor, labels: Tensor, part: int | None) -> Tensor:
        """Features (N, K) with each image's part of its class replaced; all kept for None."""
        if part is None:
            return features
        where = self.sets[part].to(features.device)[labels]
        return torch.where(where, self._other(features), features)

    def _other(self, features: Tensor) -> Tensor:
        if self.replacement == "zero":
            return torch.zeros_like(features)
        mean = self.mean.to(features)
        if self.replacement == "mean":
            return mean.expand_as(features)
        noise = torch.randn(features.shape, generator=self.generator, dtype=self.mean.dtype)
        noise = noise.to(features)
        return noise if self.replacement == "noise" else mean + self.deviation.to(features) * noise


def _hits(
    model: nn.Module,
    head: LinearHead,
    replaced: _Replaced,
    reader: ScoreReader,
    batch: Batch,
    labels: Tensor,
) -> Tensor:
    """Right answers (1 + 4 R, C) of the model as it is, and with each part of its head's input
    replaced."""
    features = run_head(model, head, batch.inputs).features
    rows = []
    for part in (None, *range(len(replaced.sets))):
        changed = replaced.features(features, labels, part)
        with tapped(head.module, partial(_instead, changed), at_input=True):
            scores = reader.scores(batch, model(*batch.inputs))
        right = (scores.argmax(1) == labels).long()
        rows.append(right.new_zeros(scores.shape[1]).index_add(0, labels, right))
    return torch.stack(rows)


def _instead(features: Tensor, _inputs: object) -> Tensor:
    """Features in the place of a head's inputs."""
    return features


def _essentiality(clean: Tensor, parts: Tensor) -> Essentiality:
    """From recall as it is (C,) and with each part replaced (4 R, C)."""
    means = parts.reshape(-1, 4, len(clean)).mean(0)
    return Essentiality(clean, *means)
