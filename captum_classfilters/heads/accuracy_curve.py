"""Accuracy of the decomposed head against the number of filters kept for each class."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.layers import find_layer
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.heads.decompose import decomposed_head, head_name
from captum_classfilters.identify import collect_features


@dataclass(frozen=True)
class AccuracyCurve:
    r"""
    Accuracy against the number of filters a class keeps, with its controls.

    Args:

        num_filters (list of int): The numbers of filters.
        accuracy (dict): For each table its accuracies, shares in [0, 1].
        recall (dict): For each table the accuracy on each class, a Tensor (len(num_filters), C).
        full_accuracy (float): Accuracy with every filter.
        random_mean, random_standard_deviation (list of float): The same for random filters, over
                    seeds; empty without seeds.
        num_images (int): N.
    """

    num_filters: list[int]
    accuracy: dict[str, list[float]]
    recall: dict[str, Tensor]
    full_accuracy: float
    random_mean: list[float]
    random_standard_deviation: list[float]
    num_images: int

    def smallest(self, keep: float, name: str | None = None) -> int | None:
        """The smallest number of filters that keeps a share of the full accuracy.

        Args:

            keep (float): Share of the full accuracy, in (0, 1].
            name (str, optional): Which table; may be left out if there is one.

        Returns:
            *int*, or *None* if no number on the curve does.
        """
        values = self.accuracy[name if name is not None else next(iter(self.accuracy))]
        for number, value in zip(self.num_filters, values, strict=True):
            if value >= keep * self.full_accuracy:
                return number
        return None


def accuracy_curve(
    model: nn.Module,
    class_filters: ClassFilters | Mapping[str, ClassFilters],
    dataloader: Iterable[Any],
    *,
    num_filters: Sequence[int] | None = None,
    random_seeds: int = 5,
    head: str | None = None,
    show_progress: bool = True,
) -> AccuracyCurve:
    r"""
    Accuracy of the decomposed head for several tables and several numbers of filters.

    The data are read once: the head's inputs are kept, and each point is one masked matrix product.
    The result equals running ``decompose(model, table.select(k))`` on the data.

    Args:

        model (nn.Module): The model; its output must be its head's output.
        class_filters (ClassFilters or mapping of them): Tables, found on *other* images.
        dataloader (iterable): Batches of (images, labels).
        num_filters (sequence of int, optional): Numbers of filters; by default 1, 2, 3, 5, 8, ...
                    up to K.
        random_seeds (int): Number of random tables in the control.
                    Default: 5
        head (str, optional): Dotted name of the head, as for :func:`decompose`.
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *AccuracyCurve*.

    Raises:
        ValueError: A table does not fit the head, or a number of filters exceeds K.
    """
    tables = (
        dict(class_filters)
        if isinstance(class_filters, Mapping)
        else {class_filters.method or "class filters": class_filters}
    )
    if not tables:
        raise ValueError("class_filters is empty; pass at least one table.")
    first = next(iter(tables.values()))
    numbers = _numbers(num_filters, min(table.num_filters for table in tables.values()))
    scorer = _HeadScorer(model, head or head_name(model, first), dataloader, show_progress)
    accuracy: dict[str, list[float]] = {}
    recall: dict[str, Tensor] = {}
    for name, table in tables.items():
        points = [scorer.recall_of(model, table.select(num_filters=k), head) for k in numbers]
        recall[name] = torch.stack([point for _, point in points])
        accuracy[name] = [share for share, _ in points]
    control = [
        [scorer.recall_of(model, table.select(num_filters=k), head)[0] for k in numbers]
        for table in _random_tables(first, random_seeds)
    ]
    spread = torch.tensor(control, dtype=torch.float64)
    return AccuracyCurve(
        num_filters=numbers,
        accuracy=accuracy,
        recall=recall,
        full_accuracy=scorer.full_accuracy,
        random_mean=spread.mean(0).tolist() if control else [],
        random_standard_deviation=spread.std(0).tolist() if len(control) > 1 else [],
        num_images=len(scorer.labels),
    )


def select_by_accuracy(
    model: nn.Module,
    class_filters: ClassFilters,
    dataloader: Iterable[Any],
    *,
    keep: float = 0.99,
    head: str | None = None,
    show_progress: bool = True,
) -> ClassFilters:
    r"""
    Select the smallest number of filters that keeps a share of the model's accuracy.

    Every number from 1 to K is tried, the same for all classes. Use images that the table was not
    found on.

    Args:

        model (nn.Module): The model.
        class_filters (ClassFilters): The table.
        dataloader (iterable): Batches of (images, labels) to measure accuracy on.
        keep (float): Share of the full accuracy to keep, in (0, 1].
                    Default: 0.99
        head (str, optional): Dotted name of the head.
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ClassFilters*: The table with that selection.

    Raises:
        ValueError: ``keep`` is out of range, or even K filters do not keep it.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is out of range; choose a share in (0, 1].")
    curve = accuracy_curve(
        model,
        class_filters,
        dataloader,
        num_filters=range(1, class_filters.num_filters + 1),
        random_seeds=0,
        head=head,
        show_progress=show_progress,
    )
    number = curve.smallest(keep)
    if number is None:
        best = max(next(iter(curve.accuracy.values())))
        raise ValueError(
            f"No number of filters keeps {keep:.1%} of the accuracy {curve.full_accuracy:.4f}; the "
            f"best decomposed head reaches {best:.4f}."
        )
    return class_filters.select(num_filters=number)


class _HeadScorer:
    """The head's inputs on a data set, to try masked heads on."""

    def __init__(
        self, model: nn.Module, name: str, dataloader: Iterable[Any], show_progress: bool
    ) -> None:
        self.name = name
        self.features, self.labels = collect_features(
            model,
            name,
            dataloader,
            attribute_to_layer_input=True,
            flatten=True,
            show_progress=show_progress,
        )
        head = find_layer(model, name)
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"The head {name!r} is a {type(head).__name__}; accuracy on cached features needs "
                "an nn.Linear whose output is the model's."
            )
        weight, bias = head.weight.detach().cpu(), head.bias
        self.full_accuracy = self.score(weight, None if bias is None else bias.detach().cpu())[0]

    def recall_of(
        self, model: nn.Module, table: ClassFilters, head: str | None
    ) -> tuple[float, Tensor]:
        """Accuracy and recall of each class with a table's selection."""
        _, decomposed = decomposed_head(model, table, head=head, missing="bias")
        bias = None if decomposed.bias is None else decomposed.bias.detach().cpu()
        return self.score(decomposed.dense_weight().detach().cpu(), bias)

    def score(self, weight: Tensor, bias: Tensor | None) -> tuple[float, Tensor]:
        """Accuracy and recall of each class of a linear head."""
        right = F.linear(self.features, weight, bias).argmax(1) == self.labels
        number = len(weight)
        seen = torch.bincount(self.labels, minlength=number).double()
        hits = torch.bincount(self.labels[right], minlength=number).double()
        return float(right.double().mean()), hits / seen


def _numbers(num_filters: Sequence[int] | None, most: int) -> list[int]:
    if num_filters is not None:
        return [int(number) for number in num_filters]
    numbers = [number for number in (1, 2, 3, 5, 8, 12, 16, 24, 32, 48) if number < most]
    while numbers and numbers[-1] * 4 // 3 < most and numbers[-1] >= 48:
        numbers.append(numbers[-1] * 4 // 3)
    return [*numbers, most]


def _random_tables(like: ClassFilters, seeds: int) -> list[ClassFilters]:
    """Tables with random scores, for a control."""
    tables = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(like.num_classes, like.num_filters, generator=generator)
        tables.append(
            ClassFilters(
                scores,
                counts=torch.ones(like.num_classes),
                class_names=like.class_names,
                layer=like.layer,
                method="Random",
                provenance=like.provenance,
            )
        )
    return tables
