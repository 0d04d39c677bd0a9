"""Whether scores speak of the class's label: two tests, stability and purity, in one card."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from scipy import stats
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, Batches, read_batches
from captum_classfilters._core.names import counted, kind_of
from captum_classfilters._core.ranking import descending
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import Dataloader, ModelInputs, Unpack
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.metrics.features import checked_features, checked_labels

#: From a loader of pairs (inputs, labels) to a table.
Identify: TypeAlias = Callable[[Any], ClassFilters]

_FOLDS = 3  # of classes: two lose labels, the third gains as many as it has
_FALLS = 0.05  # of the score: less is not told from no change
_CONFIDENCE = 0.95
_STABLE = 0.8
_STRONGEST = 20  # images that a filter's purity is measured on


@short_repr
@dataclass(frozen=True)
class Validity(Tabular):
    r"""
    What became of the scores of the selected filters when labels changed.

    Args:

        missing (Tensor): Shape (C,). Change of the class's score, as a share of it, when half of its
                    images lose the label; NaN for a class of fewer than two images or whose score is
                    not positive.
        extra (Tensor): Shape (C,). The same, when other images gain the label, as many as have it in
                    the mean.
        extra_share (Tensor): Shape (C,). How many images gain the label, as a share of those that have
                    it. Of two classes, one has no more for the other than all but two.
        stability (Tensor): Shape (C,). Share of filters that two halves of the images both select.
        chance (float): That share for random filters.
        shuffled (Tensor): Shape (C,). Share of the filters that are selected with shuffled labels, too.
        purity (Tensor or None): Shape (C,). Share of the class among the strongest images of its
                    filters.
        num_filters (int): Filters of each class.
        method (str): What was tested.
    """

    missing: Tensor
    extra: Tensor
    extra_share: Tensor
    stability: Tensor
    chance: float
    shuffled: Tensor
    purity: Tensor | None
    num_filters: int
    method: str

    @property
    def falls_with_missing_labels(self) -> bool:
        """Whether the scores fall, in the mean over classes, when images lose the label."""
        return _falls(self.missing)

    @property
    def falls_with_extra_labels(self) -> bool:
        """Whether the scores fall, in the mean over classes, when other images gain the label."""
        return _falls(self.extra)

    @property
    def passes(self) -> bool:
        """Whether the scores fall in both tests."""
        return self.falls_with_missing_labels and self.falls_with_extra_labels

    @property
    def verdict(self) -> str:
        """What the numbers say, in a sentence or two."""
        not_measured = [
            f"{name} labels"
            for name, changes in (("missing", self.missing), ("extra", self.extra))
            if not _measured(changes)
        ]
        if not_measured:
            said = (
                f"Not measured: {' and '.join(not_measured)}. No class to test has selected filters "
                "whose scores add up to more than zero."
            )
        elif self.passes:
            said = "The scores speak of the label: they fall when images lose it and when others gain it."
        elif self.falls_with_extra_labels:
            said = (
                "The scores describe the images that have the label; images like them that lack it "
                "are not noticed."
            )
        elif self.falls_with_missing_labels:
            said = "The scores grow with the number of labels; wrong labels are not noticed."
        else:
            said = (
                "The scores do not depend on the labels as they should: they fall in neither test."
            )
        if float(self.stability.nanmean()) < _STABLE:
            said += " Other images select other filters: take more images or fewer filters."
        return said

    def _tables(self) -> list[Table]:
        known = {
            "missing labels": (self.missing, _said(self.missing)),
            "extra labels": (self.extra, _said(self.extra)),
            "filters in both halves": (self.stability, ""),
            "filters with shuffled labels": (self.shuffled, ""),
            "purity of the strongest images": (self.purity, ""),
        }
        rows = [
            {
                "check": name,
                "mean": float(values.nanmean()),
                "smallest": float(values.nanquantile(0)),
                "largest": float(values.nanquantile(1)),
                "verdict": said if _measured(values) else "not measured",
            }
            for name, (values, said) in known.items()
            if values is not None
        ]
        title = f"{self.method}, {counted(self.num_filters, 'filter')} per class"
        notes = [self.verdict]
        if not math.isnan(self.chance):
            notes.append(f"Random filters are in both halves with {self.chance:.3f}.")
        times = float(self.extra_share.nanmean())
        notes.append(f"Extra labels are {times:.2f} times as many as a class's own.")
        return [Table(rows, title=title, notes=notes, bars=())]


@arguments_checked
def validate(
    identify: Identify,
    dataloader: Dataloader,
    *,
    num_filters: int = 5,
    features: Tensor | None = None,
    unpack: Unpack | None = None,
    seed: int = 0,
) -> Validity:
    r"""
    Test whether a way to identify class filters speaks of the classes' labels.

    A filter of a class is claimed to go with the class. Oikarinen, Yan and Weng (ICML 2025) ask two
    things of any such score, here with labels that move between classes, so that every image keeps
    one:

    - **missing labels**: half of the class's images are given to other classes. The filter still
      answers to them, though they no longer count: its score must fall. A mean over the class's
      images does not see what is no longer among them.
    - **extra labels**: images of other classes are given to the class, in the mean as many as it has.
      The filter does not answer to them: its score must fall. A sum does not, since nothing is
      subtracted for them.

    The classes are divided in three at random; two thirds lose half of their images to the last, and
    so on in turn. Of two classes, each loses half of its images to the other; then it loses as many as
    the other has, or all but two if it has no more. What is compared is the mean score of the
    ``num_filters`` filters that the true labels select. Scores *fall* if the mean change over classes
    is below -.05, and below 0 with confidence .95 (Student's t, one-sided).

    Beside these: which filters two halves of the images select, which are selected with shuffled
    labels, and, with ``features``, the share of the class among the 20 images that its filters answer
    to most. Seven identifications in all (of two classes eight), of which two use half of the images;
    each passes over the data.

    Args:

        identify (Callable): From a loader to a table, a method's ``identify`` for example.
        dataloader (iterable): Batches of (inputs, labels), class indices, in the same order each
                    time.
        num_filters (int): How many filters of each class are looked at.
                    Default: 5
        features (Tensor, optional): Shape (N, K), responses in the order of the loader, for purity.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    ``identify`` is given pairs.
                    Default: None
        seed (int): Seed of all draws.
                    Default: 0

    Returns:
        *Validity*: changes, stability and purity by class; ``passes`` and ``verdict``. It prints a
        table.

    Raises:
        ValueError: The loader is empty or gives other images each time, fewer than two classes have two
            images or more, ``num_filters`` or ``features`` does not fit, or labels are no class
            indices.

    Examples::

        >>> import torch
        >>> from captum_classfilters.metrics import correlation_filters, validate
        >>> labels = torch.arange(120) % 3
        >>> features = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.rand(120, 3)
        >>> def identify(loader):
        ...     parts = zip(*((inputs, labels) for inputs, labels in loader))
        ...     return correlation_filters(*(torch.cat(part) for part in parts))
        >>> card = validate(identify, [(features, labels)], num_filters=1, features=features)
        >>> card.passes, float(card.purity.mean())
        (True, 1.0)
        >>> print(card.verdict)
        The scores speak of the label: they fall when images lose it and when others gain it.
    """
    if not callable(identify):
        raise ValueError(
            f"identify is {kind_of(identify)}; expected a function from a loader to a table, "
            "method.identify for example."
        )
    data = _Relabeled(dataloader, unpack)
    table = _identified(identify, data)
    chosen = table.select(num_filters)
    labels, _ = checked_labels(data.true, len(data.true), table.num_classes)
    if features is not None:
        features, *_ = checked_features(features, labels, table.num_classes)
    generator = torch.Generator().manual_seed(seed)
    missing, extra, extra_share = _changes(identify, data, chosen, generator)
    half = _halves(labels, generator)
    halves = [_identified(identify, data.only(part)).select(num_filters) for part in (half, ~half)]
    agreement = halves[0].agreement(halves[1])
    mixed = data.with_labels(labels[torch.randperm(len(labels), generator=generator)])
    return Validity(
        missing=missing,
        extra=extra,
        extra_share=extra_share,
        stability=agreement.overlap,
        chance=agreement.mean_chance,
        shuffled=chosen.agreement(_identified(identify, mixed).select(num_filters)).overlap,
        purity=None if features is None else _purity(features, labels, chosen),
        num_filters=num_filters,
        method=table.method,
    )


def _identified(identify: Identify, data: Dataloader) -> ClassFilters:
    table = identify(data)
    if not isinstance(table, ClassFilters):
        raise ValueError(f"identify returns {kind_of(table)}; expected ClassFilters.")
    return table


def _changes(
    identify: Identify,
    data: "_Relabeled",
    chosen: ClassFilters,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Changes of each class's score where labels are missing, and where there are extra ones; how many
    these are, as a share of the class's own."""
    if int((chosen.counts > 1).sum()) < 2:
        raise ValueError(
            "Labels can move only where two classes have images, at least two each: half of them lose "
            f"their label. The classes have {', '.join(map(str, chosen.counts.tolist()))}."
        )
    extra, share = torch.full((2, chosen.num_classes), math.nan, dtype=torch.float64)
    missing = []
    for moved, losing, gaining in _moves(data.true, chosen.counts, generator):
        change = _change(chosen, _identified(identify, data.with_labels(moved)))
        gained = moved[moved != data.true].bincount(minlength=chosen.num_classes)
        extra[gaining] = change[gaining]
        share[gaining] = (gained / chosen.counts)[gaining].double()
        missing.append(torch.full_like(change, math.nan).index_copy(0, losing, change[losing]))
    return torch.stack(missing).nanmean(0), extra, share


class _Relabeled:
    """A loader whose images have other labels, or of which some images are left out."""

    def __init__(self, dataloader: Dataloader, unpack: Unpack | None) -> None:
        self.dataloader, self.unpack = dataloader, unpack
        with self._reading() as batches:
            labels = [_labels_of(batch) for batch in batches]
        if not labels:
            raise ValueError("The data loader is empty: there are no labels to move.")
        self.true = torch.cat(labels)
        self.labels = self.true
        self.kept = torch.ones(len(self.true), dtype=torch.bool)

    def with_labels(self, labels: Tensor) -> "_Relabeled":
        """The same images with other labels."""
        other = copy(self)
        other.labels = labels
        return other

    def only(self, kept: Tensor) -> "_Relabeled":
        """A part of the images."""
        other = copy(self)
        other.kept = kept
        return other

    def __iter__(self) -> Iterator[tuple[object, Tensor]]:
        """Pairs (inputs, labels)."""
        with self._reading() as batches:
            for batch in batches:
                images = slice(batch.first_image, batch.first_image + batch.size)
                if not torch.equal(_labels_of(batch), self.true[images]):
                    raise ValueError(
                        f"Batch {batch.number} holds other labels than when the loader was read "
                        "first; labels are changed by their place, so pass a loader with "
                        "shuffle=False."
                    )
                kept = self.kept[images]
                if bool(kept.any()):
                    inputs = _rows(batch.inputs, kept, batch.size)
                    yield inputs[0] if len(inputs) == 1 else inputs, self.labels[images][kept]

    def _reading(self) -> AbstractContextManager[Batches]:
        return read_batches(
            None, self.dataloader, "labels", unpack=self.unpack, show_progress=False
        )


def _labels_of(batch: Batch) -> Tensor:
    """Labels in any form that identification takes; how many classes there are, its table says later."""
    labels = torch.as_tensor(batch.labels)
    hot = labels.dim() == 2 and labels.shape[1] > 1
    number = labels.shape[1] if hot else max(2, int(labels.max()) + 1)
    return batch.class_labels(number).cpu()


def _rows(inputs: ModelInputs, kept: Tensor, size: int) -> ModelInputs:
    """The inputs of some images of a batch."""
    return tuple(
        part[kept.to(part.device)] if isinstance(part, Tensor) and len(part) == size else part
        for part in inputs
    )


def _moves(
    labels: Tensor, counts: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Labels after a move; classes that lost half of their images; classes that gained about as many
    as they have. Of two classes, these are two moves."""
    with_images = counts.nonzero()[:, 0]
    mixed = with_images[torch.randperm(len(with_images), generator=generator)]
    for gaining in mixed.tensor_split(_FOLDS):
        if not len(gaining):  # of two classes
            continue
        losing = with_images[~torch.isin(with_images, gaining) & (counts[with_images] > 1)]
        if not len(losing):
            continue
        moving = torch.cat([_half(labels == class_, generator) for class_ in losing.tolist()])
        drawn = torch.multinomial(
            counts[gaining].double(), len(moving), replacement=True, generator=generator
        )
        moved = labels.clone()
        moved[moving] = gaining[drawn]
        if len(with_images) > 2:
            yield moved, losing, gaining[drawn.unique()]
            continue
        yield moved, losing, gaining[:0]
        own, others = int(counts[gaining]), int(counts[losing])
        number = min(own, max(others - 2, others // 2))
        moved = labels.clone()
        moved[_some(labels == losing, number, generator)] = gaining
        yield moved, losing[:0], gaining


def _half(members: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images (N,) that are marked, at random."""
    return _some(members, int(members.sum()) // 2, generator)


def _some(members: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """So many of the images (N,) that are marked, at random."""
    images = members.nonzero()[:, 0]
    return images[torch.randperm(len(images), generator=generator)[:number]]


def _halves(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Half of each class's images, (N,)."""
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for class_ in labels.unique().tolist():
        kept[_half(labels == class_, generator)] = True
    return kept


def _change(chosen: ClassFilters, other: ClassFilters) -> Tensor:
    """By how much the scores of selected filters changed, as a share of them, (C,)."""
    before, after = ((scores * chosen.selected).sum(1) for scores in (chosen.scores, other.scores))
    return (after / before - 1).masked_fill(~(before > 0), math.nan)


def _measured(values: Tensor) -> bool:
    return bool(values.isfinite().any())


def _said(changes: Tensor) -> str:
    return "falls" if _falls(changes) else "does not fall"


def _falls(changes: Tensor) -> bool:
    values = changes[changes.isfinite()]
    if not len(values) or not float(values.mean()) < -_FALLS:
        return False
    if len(values) == 1:
        return True
    bound = float(stats.t.ppf(_CONFIDENCE, len(values) - 1)) * float(values.std())
    return float(values.mean()) + bound / math.sqrt(len(values)) < 0


def _purity(features: Tensor, labels: Tensor, chosen: ClassFilters) -> Tensor:
    """Share of each class among the images that its filters answer to most, (C,)."""
    strongest = descending(features.T)[:, :_STRONGEST]  # (K, 20)
    share = torch.stack(
        [(labels[strongest] == class_).double().mean(1) for class_ in range(chosen.num_classes)]
    )
    return share.masked_fill(~chosen.selected, math.nan).nanmean(1)
