"""What removing each of some sets of filters does to the accuracy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters._core.batches import Batch, Batches
from captum_classfilters._core.devices import sums_device
from captum_classfilters._core.labels import labels_of_scores
from captum_classfilters._core.outputs import (
    class_scores,
    log_probabilities,
    scores_per_class,
)
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.metrics.removals import check_finite, each_in_words

Error = Callable[[], Exception]
#: The batch of each image in its loader, and its index in that batch.
Places = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class LabeledReplay:
    r"""
    A batch that has run once, ready to run on without filters.

    Args:

        replay (SuffixReplay): The replay.
        labels (Tensor): Shape (N,), checked, where the model is.
        probabilities (bool): The model returns probabilities, not logits.
        places (list of (int, int)): Where the loader had each image: batch, and index in it.
    """

    replay: SuffixReplay
    labels: Tensor
    probabilities: bool
    places: Places

    def place(self, image: int) -> str:
        """Which image that is to the user."""
        number, index = self.places[image]
        return f"image {index} of batch {number}"


def places_of(batch: Batch) -> Places:
    """The places of a batch as the loader has it."""
    return [(batch.number, index) for index in range(batch.size)]


class Conditions:
    """What must hold on a device, read all together."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Error]] = []

    def add(self, right: Tensor, error: Error) -> None:
        """A bool of no axes that must be true, and the error if it is not."""
        self._waiting.append((right, error))

    def settle(self) -> None:
        """Raise the first error."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for right, (_, error) in zip(
            torch.stack([flag for flag, _ in waiting]).tolist(), waiting, strict=True
        ):
            if not right:
                raise error()


class Candidates:
    r"""
    Accuracy and cross-entropy without each of some sets of filters, measured batch by batch.

    Counts stay where the model is until they are asked for. With ``error_probability`` a candidate
    is dropped as soon as fewer images are right without it than without the best candidate so far,
    beyond chance: of the images that only one of the two gets right, too few are the candidate's
    (one-sided sign test). The level is shared out among candidates and batches, so the best is
    dropped with at most the stated probability. :meth:`race` drops only candidates that cannot be
    the best any more.

    Args:

        removed (Tensor): Shape (P, K), bool; the filters without which to run.
        error_probability (float, optional): By default every candidate sees every image.
                    Default: None
        looks (int): Number of batches.
                    Default: 1
    """

    def __init__(
        self, removed: Tensor, error_probability: float | None = None, looks: int = 1
    ) -> None:
        self.removed, self.error_probability, self.looks = removed, error_probability, looks
        self.evaluations = self.possible_evaluations = self.num_images = 0
        self.active = torch.ones(len(removed), dtype=torch.bool)
        self._right: Tensor | None = None
        self._loss: Tensor | None = None
        self._answers: list[Tensor] = []  # of the sequential test
        self._conditions = Conditions()

    def measure(
        self, batches: Iterable[LabeledReplay], perturbations_per_eval: int | None
    ) -> "Candidates":
        """Run all batches."""
        for batch in batches:
            self.add(batch, perturbations_per_eval)
        return self

    def race(
        self,
        batches: Sequence[LabeledReplay],
        expected: int,
        perturbations_per_eval: int | None,
    ) -> "Candidates":
        """
        Find the best candidate on all batches, and run others as far as that takes.

        What a candidate has wrong by now, and its loss, can only grow. So the one that is best so
        far runs on, and once it has seen all batches no other can be better. The earlier the images
        come that are wrong, the less is run. Those that have no more wrong than is expected of the
        best run beside it.
        """
        sizes = [len(batch.labels) for batch in batches]
        self.num_images += sum(sizes)
        self.possible_evaluations += sum(sizes) * len(self.removed)
        seen = torch.tensor([0, *sizes]).cumsum(0)
        place = torch.zeros(len(self.removed), dtype=torch.int64)  # of the next batch
        rows = torch.arange(len(self.removed))
        while len(rows):
            self._run(batches[int(place[rows[0]])], rows, perturbations_per_eval)
            place[rows] += 1
            rows = self._leading(place, seen, expected, not batches[0].probabilities)
        self.active = place == len(batches)
        return self

    def _leading(self, place: Tensor, seen: Tensor, expected: int, loss_grows: bool) -> Tensor:
        """The candidates to run on, all from the same batch; none if the best has run on all."""
        right, loss = self._counts()
        wrong, over = seen[place] - right, place == len(seen) - 1
        bound = loss if loss_grows else loss.masked_fill(~over, -torch.inf)
        rows = zip(wrong.tolist(), bound.tolist(), over.tolist(), range(len(place)), strict=True)
        least, _, finished, best = min(rows)
        rivals = (place == place[best]) & (wrong <= max(least, expected)) & ~over
        return (rivals & (not finished)).nonzero()[:, 0]

    def add(self, batch: LabeledReplay, perturbations_per_eval: int | None) -> None:
        """Run a batch without each candidate that has not been dropped."""
        num_images = len(batch.labels)
        rows = self.active.nonzero()[:, 0]
        answers = self._run(batch, rows, perturbations_per_eval)
        self.num_images += num_images
        self.possible_evaluations += num_images * len(self.removed)
        if self.error_probability is not None:
            right = torch.zeros(len(self.removed), num_images, dtype=torch.bool)
            right[rows] = torch.cat(answers).cpu()
            self._answers.append(right)
            self._drop(self.error_probability)

    def _run(
        self, batch: LabeledReplay, rows: Tensor, perturbations_per_eval: int | None
    ) -> list[Tensor]:
        """Count what a batch adds to some candidates; which images are right, in parts (P, N)."""
        device = sums_device(batch.labels.device)
        if self._right is None or self._loss is None:
            self._right = torch.zeros(len(self.removed), dtype=torch.int64, device=device)
            self._loss = self._right.double()
        answers = []
        for part, outputs in batch.replay.in_parts(self.removed[rows], perturbations_per_eval):
            without = each_in_words(self.removed[rows[part]])
            check_finite(outputs, without, self._conditions.add, batch.place)
            right, log_probability = _right_and_log_probability(outputs, batch)
            places = rows[part].to(device)
            self._right.index_add_(0, places, right.sum(1).to(device))
            self._loss.index_add_(0, places, -log_probability.sum(1))
            answers.append(right)
        self.evaluations += len(batch.labels) * len(rows)
        return answers

    @property
    def accuracy(self) -> Tensor:
        """Shape (P,); -inf for candidates that were dropped."""
        share = self._settled()[0].double() / self.num_images
        return share.masked_fill(~self.active, -torch.inf)

    @property
    def mean_loss(self) -> Tensor:
        """Mean cross-entropy (P,)."""
        return self._settled()[1] / self.num_images

    def _settled(self) -> tuple[Tensor, Tensor]:
        """Counts and sums (P,) on the CPU, once all outputs are seen to be finite."""
        if self._right is None or self._loss is None:
            nothing = torch.zeros(len(self.removed))
            return nothing.long(), nothing.double()
        self._conditions.settle()
        return self._counts()

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Counts and sums (P,) on the CPU."""
        assert self._right is not None
        assert self._loss is not None
        return self._right.cpu(), self._loss.cpu()

    def _drop(self, error_probability: float) -> None:
        if len(self._answers) >= self.looks:
            return
        right = torch.cat(self._answers, 1)
        right[~self.active] = False
        best = int(right.sum(1).argmax())
        only_best = (right[best] & ~right).sum(1)
        apart = only_best + (right & ~right[best]).sum(1)
        level = error_probability / max(1, (len(right) - 1) * (self.looks - 1))
        from scipy.stats import binom

        chance = torch.as_tensor(binom.sf(only_best.numpy() - 1, apart.numpy(), 0.5))
        self.active &= chance >= level


def accuracy_without(batches: Iterable[LabeledReplay], removed: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy without one set of filters (K,)."""
    measured = Candidates(removed[None]).measure(batches, 1)
    return float(measured.accuracy), float(measured.mean_loss)


def checked_labels(batches: Batches, batch: Batch, output: object) -> Tensor:
    """The labels of a batch, where the model is; they and what it returned are checked, soon."""
    scores = scores_per_class(output)

    def error() -> Exception:
        try:
            labels_of_scores(scores, batch.labels, batch.number)
        except ValueError as error:
            return error
        raise AssertionError("scores that are not finite")

    batches.check(scores.isfinite().all(), error)
    return batches.class_labels(batch, scores.shape[1])


def margins(batch: LabeledReplay) -> Tensor:
    """By how much the label's log-probability exceeds any other's, with every filter (N,)."""
    logs = _log_probabilities(class_scores(batch.replay.output)[None], batch)[0]
    label = batch.labels.to(logs.device)[:, None]
    others = logs.scatter(1, label, -torch.inf).amax(1)
    return logs.gather(1, label)[:, 0] - others


def _right_and_log_probability(outputs: Tensor, batch: LabeledReplay) -> tuple[Tensor, Tensor]:
    """Of outputs (P, N, C), or of one logit each, whether they are right and the label's
    log-probability, (P, N), the latter in float64 where sums are kept."""
    logs = _log_probabilities(outputs, batch)
    index = batch.labels.to(logs.device).expand(logs.shape[:2])[..., None]
    right = logs.argmax(2) == index[..., 0]
    return right, logs.gather(2, index)[..., 0]


def _log_probabilities(outputs: Tensor, batch: LabeledReplay) -> Tensor:
    """Log-probabilities (P, N, C) in float64, where sums are kept."""
    scores = outputs[..., None] if outputs.dim() == 2 else outputs
    exact = scores.to(sums_device(scores.device), torch.float64)
    return log_probabilities(exact, batch.probabilities)
