"""Accuracy of the decomposed head against the number of filters kept for each class."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, Batches, read_batches
from captum_classfilters._core.names import counted
from captum_classfilters._core.outputs import two_classes
from captum_classfilters._core.ranking import random_orders, ranks
from captum_classfilters._core.replay.recorded_batch import plain_mode
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import Dataloader, ModelInputs, Unpack
from captum_classfilters.class_filters import ClassFilters, check_selection
from captum_classfilters.heads.decompose import HeadFit, fit_to_head
from captum_classfilters.heads.linear_head import LinearHead, check_scores_follow, run_head
from captum_classfilters.metrics.removals import one_or_several

if TYPE_CHECKING:
    from captum_classfilters.heads.hits import Hits

logger = logging.getLogger("captum_classfilters")


@short_repr
@dataclass(frozen=True)
class AccuracyCurve(Tabular):
    r"""
    Accuracy against the number of filters a class keeps, with its controls; prints as a table.

    Args:

        num_filters (list of int): The numbers of filters.
        accuracy (dict): For each table its accuracies, shares in [0, 1].
        recall (dict): For each table the accuracy on each class, a Tensor (len(num_filters), C).
        full_accuracy (float): Accuracy with every filter.
        random_mean, random_standard_deviation (list of float): The same for random filters, over
                    repetitions; empty without any.
        num_images (int): N.
    """

    num_filters: list[int]
    accuracy: dict[str, list[float]]
    recall: dict[str, Tensor]
    full_accuracy: float
    random_mean: list[float]
    random_standard_deviation: list[float]
    num_images: int

    @arguments_checked
    def smallest(self, keep: float, name: str | None = None) -> int | None:
        """The smallest number of filters that keeps a share of the full accuracy.

        Args:

            keep (float): Share of the full accuracy, in (0, 1].
            name (str, optional): Which table; may be left out if there is one.

        Returns:
            *int*, or *None* if no number on the curve does.
        """
        values = self.accuracy[name if name is not None else next(iter(self.accuracy))]
        points = zip(self.num_filters, values, strict=True)
        enough = [number for number, value in points if value >= keep * self.full_accuracy]
        return min(enough, default=None)

    def _tables(self) -> list[Table]:
        columns = {**self.accuracy, "random": self.random_mean}
        rows = [
            {
                "filters": number,
                **{name: values[place] for name, values in columns.items() if values},
            }
            for place, number in enumerate(self.num_filters)
        ]
        title = f"accuracy on {counted(self.num_images, 'image')}, {self.full_accuracy:.3f} with every filter"
        return [Table(rows, title=title)]


@arguments_checked
def accuracy_curve(
    model: nn.Module,
    class_filters: ClassFilters | Mapping[str, ClassFilters],
    dataloader: Dataloader,
    *,
    num_filters: Sequence[int] | None = None,
    repetitions: int = 5,
    seed: int = 0,
    head: nn.Module | str | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> AccuracyCurve:
    r"""
    Accuracy of the decomposed head for several tables and several numbers of filters.

    The result equals :func:`~captum_classfilters.metrics.evaluate_classifier` of
    ``decompose(model, table.select(k), missing="bias")`` for every k. The data are read once. Where
    a batch's scores are seen to be the head's own, each point is one masked matrix product more in
    the same forward pass; otherwise what follows the head, or the model where that cannot run by
    itself, runs once for each point, and the log says so.

    Args:

        model (nn.Module): The model.
        class_filters (ClassFilters or mapping of them): Tables, found on *other* images.
        dataloader (iterable): Batches of (inputs, labels).
        num_filters (sequence of int, optional): Numbers of filters for each class; by default 1, 2,
                    3, 5, 8, ... up to K.
        repetitions (int): Number of random sets of filters in the control. Classes for which no table
                    has filters, those without images say, have none there either.
                    Default: 5
        seed (int): Seed of the random sets; the global random state is not touched.
                    Default: 0
        head (nn.Module or str, optional): The head, or its dotted name, as for :func:`decompose`.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *AccuracyCurve*.

    Raises:
        ValueError: A table does not fit the head, a number of filters exceeds K, the head is not
                    linear, or the scores do not follow from it alone.
    """
    tables = (
        dict(class_filters)
        if isinstance(class_filters, Mapping)
        else {class_filters.method or "class filters": class_filters}
    )
    if not tables:
        raise ValueError("class_filters is empty; pass at least one table.")
    numbers = _numbers(num_filters, min(table.num_filters for table in tables.values()))
    fits = [fit_to_head(model, table, head) for table in tables.values()]
    if len({id(fit.head.module) for fit in fits}) > 1:
        raise ValueError("The tables belong to different heads; name one with head=.")
    selections = [_selections(table, numbers) for table in tables.values()]
    trials = [
        trial
        for fit, comes_in in zip(fits, selections, strict=True)
        for trial in _trials(fit, comes_in, numbers)
    ]
    first = selections[0]
    nothing = torch.stack([(comes_in > first.shape[1]).all(1) for comes_in in selections]).all(0)
    generator = torch.Generator().manual_seed(seed)
    if repetitions:
        for order in random_orders(first.shape, repetitions, generator):
            drawn = (1 + ranks(order)).masked_fill(nothing[:, None], first.shape[1] + 1)
            trials += _trials(fits[0], drawn, numbers)
    hits = _count(model, fits[0].head, trials, dataloader, unpack, show_progress)
    return _curve(hits, list(tables), numbers)


@arguments_checked
def select_by_accuracy(
    model: nn.Module,
    class_filters: ClassFilters,
    dataloader: Dataloader,
    *,
    keep: float = 0.99,
    head: nn.Module | str | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> ClassFilters:
    r"""
    Select the smallest number of filters that keeps a share of the model's accuracy.

    Every number from 1 to K is tried, the same for all classes. Use images that the table was not
    found on.

    Args:

        model (nn.Module): The model.
        class_filters (ClassFilters): The table.
        dataloader (iterable): Batches of (inputs, labels) to measure accuracy on.
        keep (float): Share of the full accuracy to keep, in (0, 1].
                    Default: 0.99
        head (nn.Module or str, optional): The head, or its dotted name.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
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
        repetitions=0,
        head=head,
        unpack=unpack,
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


@dataclass(frozen=True)
class _Trial:
    """A head that keeps, of each row, the features that come in with at most so many filters.

    Selections of growing numbers contain each other, so all points of a table share one matrix.
    """

    comes_in: Tensor  # (C, F), int32: the number of filters with which a feature is selected
    number: int

    def weight(self, head: LinearHead, device: torch.device) -> Tensor:
        """The head's weight, zero outside the sets."""
        dropped = self.comes_in.to(device) > self.number
        return head.weight.to(device).masked_fill(dropped, 0)


class _Trials:
    """Answers of a model with each of several heads in its own head's place."""

    def __init__(
        self, model: nn.Module, head: LinearHead, trials: Sequence[_Trial], batches: Batches
    ) -> None:
        self.model, self.head, self.trials, self.batches = model, head, trials, batches
        self.reader = ScoreReader(model, batches)
        self.tried = self.reported = False

    def add(self, batch: Batch, hits: "Hits") -> None:
        """Count the right answers to a batch."""
        answers: list[Tensor] = []
        react = None if self.reported else partial(self._answer, answers)
        run = run_head(self.model, self.head, batch.inputs, react)
        self.batches.check_repeats(self.model, batch, run.output)
        full = self.reader.scores(batch, run.output)
        labels = self.batches.class_labels(batch, full.shape[1])
        own = full.argmax(1)
        if not run.ends or len(answers) != len(self.trials):
            hits.update(torch.stack([own, *self._one_by_one(batch)]), labels)
            return
        right = run.linear
        if not self.tried:  # once for each run against the model itself
            self.tried = True
            right = right & (self._with_head(batch, self.trials[0]) == answers[0]).all()

        def then(values: list[bool]) -> None:
            found = answers if values[0] else self._one_by_one(batch)
            hits.update(torch.stack([own, *found]), labels)

        self.batches.later([right], then, kept=batch.inputs)

    def _answer(self, answers: list[Tensor], features: Tensor) -> None:
        """Answers of all heads, computed while the model runs, as its own head's are."""
        answers.clear()
        if features.dim() != 2 or self.head.convolution_dims:
            return
        for trial in self.trials:
            weight = trial.weight(self.head, features.device)
            answers.append(two_classes(self.head.outputs(features, weight)).argmax(1))

    def _one_by_one(self, batch: Batch) -> list[Tensor]:
        """Answers of the model itself, run once for each head: from the head on where that holds."""
        first = not self.reported
        if first:
            self.reported = True
            check_scores_follow(self.model, self.head, batch.inputs)
        answers = self._behind_the_head(batch)
        if first:
            logger.warning(
                "The model's scores are not the very output of its head %r: %s runs once for each of "
                "%d heads on every batch.",
                self.head.name,
                "it" if answers is None else "what follows it",
                len(self.trials),
            )
        if answers is None:
            return [self._with_head(batch, trial) for trial in self.trials]
        return answers

    def _behind_the_head(self, batch: Batch) -> list[Tensor] | None:
        """The same without running again what comes before the head; None where it cannot be left out,
        or the first answers are not those of the whole model. An accelerator, whose host would wait
        for these checks on every batch, runs the model."""
        if batch.device.type != "cpu":
            return None
        features: list[Tensor] = []

        def take(_module: nn.Module, inputs: ModelInputs, _output: object) -> None:
            if not features:
                features.append(inputs[0].clone())

        try:
            with hooked([self.head.module], take):
                replay = SuffixReplay(self.model, self.head.module, batch.inputs, closed_form=False)
            if replay.way != "replay":
                return None
            answers = []
            for trial in self.trials:
                weight = trial.weight(self.head, features[0].device)
                logits = self.head.outputs_of_few(features[0], weight)
                with plain_mode():
                    scores = replay.replay(logits.to(replay.activation), 1)[0]
                answers.append(self.reader.scores(batch, scores).argmax(1))
        except (RuntimeError, ValueError):  # the plain way raises what is the model's own
            return None
        whole = self._with_head(batch, self.trials[0])
        return answers if torch.equal(answers[0], whole) else None

    def _with_head(self, batch: Batch, trial: _Trial) -> Tensor:
        """Answers (N,) of the model with another head in the place of its own."""

        def hook(_module: nn.Module, inputs: ModelInputs, _output: object) -> Tensor:
            return self.head.outputs(inputs[0], trial.weight(self.head, inputs[0].device))

        with hooked([self.head.module], hook):
            scores = self.reader.scores(batch, self.model(*batch.inputs))
        return scores.argmax(1)


def _count(
    model: nn.Module,
    head: LinearHead,
    trials: Sequence[_Trial],
    dataloader: Dataloader,
    unpack: Unpack | None,
    show_progress: bool,
) -> tuple[Tensor, Tensor]:
    """Right answers (1 + T, C), the model's own first, and images (C,)."""
    with read_batches(
        model,
        dataloader,
        "accuracy",
        unpack=unpack,
        summed=True,
        show_progress=show_progress,
    ) as batches:
        from captum_classfilters.heads.hits import Hits

        hits = Hits(len(trials), max(2, len(head.weight))).to(head.weight.device)
        answers = _Trials(model, head, trials, batches)
        for batch in batches:
            answers.add(batch, hits)
    counts: tuple[Tensor, Tensor] = hits.compute()
    return counts


def _curve(hits: tuple[Tensor, Tensor], names: Sequence[str], numbers: list[int]) -> AccuracyCurve:
    right, seen = hits
    total = int(seen.sum())
    shares = right.sum(1).double() / total
    recall = right[1:].double() / seen.double()
    own = len(names) * len(numbers)
    spread = shares[1 + own :].reshape(-1, len(numbers))
    return AccuracyCurve(
        num_filters=numbers,
        accuracy=dict(
            zip(names, shares[1 : 1 + own].reshape(-1, len(numbers)).tolist(), strict=True)
        ),
        recall=dict(zip(names, recall[:own].split(len(numbers)), strict=True)),
        full_accuracy=float(shares[0]),
        random_mean=spread.mean(0).tolist() if len(spread) else [],
        random_standard_deviation=spread.std(0).tolist() if len(spread) > 1 else [],
        num_images=total,
    )


def _trials(fit: HeadFit, comes_in: Tensor, numbers: Sequence[int]) -> list[_Trial]:
    """Trials of one order of filters: the number (C, K) with which each comes in."""
    features = fit.of_classes(comes_in.to(torch.int32))
    if len(fit.head.weight) == 1:  # of a single logit, filters of either class
        features = features.amin(0, keepdim=True)
    features = features.to(fit.head.weight.device)
    return [_Trial(features, number) for number in numbers]


def _selections(table: ClassFilters, numbers: Sequence[int]) -> Tensor:
    """With how many filters each is first selected (C, K); more than K if it never is."""
    comes_in = torch.full(table.scores.shape, table.num_filters + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once for each number would be too often
        for number in sorted(numbers, reverse=True):
            comes_in[table.select(num_filters=number).selected] = number
    return comes_in


def _numbers(num_filters: Sequence[int] | None, most: int) -> list[int]:
    if num_filters is not None:
        numbers = one_or_several(num_filters)
        if not numbers:
            raise ValueError("num_filters is empty; pass at least one number of filters.")
        for number in numbers:
            check_selection(number, None)
        return [int(number) for number in numbers]
    numbers = [number for number in (1, 2, 3, 5, 8, 12, 16, 24, 32, 48) if number < most]
    while numbers and numbers[-1] * 4 // 3 < most and numbers[-1] >= 48:
        numbers.append(numbers[-1] * 4 // 3)
    return [*numbers, most]
