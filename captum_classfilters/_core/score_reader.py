"""What a model's scores mean, logits or probabilities, and the scores of one batch after another."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import Batch, Batches
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.heads import alike
from captum_classfilters._core.labels import not_finite
from captum_classfilters._core.layers import module_of
from captum_classfilters._core.outputs import (
    are_probabilities,
    as_rows,
    checked_rows,
    class_scores,
    log_probabilities,
    one_output,
    scores_per_class,
)
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import Check, ForwardFunc, ModelInputs


def gives_probabilities(
    output: object, model: nn.Module | None, run_again: Callable[[], object]
) -> bool:
    r"""
    Whether a model returns probabilities, not logits.

    Rows are probabilities if none is negative and their sums are 1. The one output of a binary
    classifier is if it lies in [0, 1] and is not what the last layer with weights puts out.

    Args:

        output (Any): What the model returned.
        model (nn.Module or None): The module behind the model, if it is known.
        run_again (Callable): Runs the model on the same images.
    """
    scores = as_rows(class_scores(output))
    if not one_output(scores):
        return are_probabilities(scores)
    return bool(_in_range(scores)) and not (
        model is not None and _ends_in_weights(model, run_again)
    )


class OutputKind:
    r"""
    Whether a model returns logits or probabilities, told by its first batch.

    Args:

        forward_func (Callable): The model, or a function of it.
        layers (sequence of nn.Module): Layers that the function's model contains.
    """

    def __init__(self, forward_func: ForwardFunc, layers: Sequence[nn.Module] = ()) -> None:
        self.forward_func, self.model = forward_func, module_of(forward_func, layers)
        self._probabilities: bool | None = None

    def probabilities(self, inputs: ModelInputs, output: object, check: Check, batch: int) -> bool:
        """Whether they are probabilities; one output that contradicts the first batch is refused,
        soon."""
        if self._probabilities is None:
            self._probabilities = gives_probabilities(
                output, self.model, lambda: self.forward_func(*inputs)
            )
        if self._probabilities:
            scores = as_rows(class_scores(output))
            if one_output(scores):
                check(_in_range(scores), partial(_neither, batch))
        return self._probabilities


class ScoreReader:
    r"""
    Scores of classes of one batch after another, checked.

    Args:

        model (Callable): The model, or a function of it.
        batches (Batches): The batches that are read; checks are made when they settle.
        layers (sequence of nn.Module): Layers that the function's model contains.
    """

    def __init__(
        self, model: ForwardFunc, batches: Batches, layers: Sequence[nn.Module] = ()
    ) -> None:
        self.model, self._batches = model, batches
        self.kind = OutputKind(model, layers)

    def probabilities(self, batch: Batch, output: object) -> bool:
        """Whether the model returns probabilities, not logits."""
        return self.kind.probabilities(batch.inputs, output, self._batches.check, batch.number)

    def scores(self, batch: Batch, output: object) -> Tensor:
        """Scores (N, C), C at least 2, of what the model returned for a batch."""
        scores = as_rows(class_scores(output))
        probabilities = one_output(scores) and self.probabilities(batch, scores)
        scores = scores_per_class(scores, probabilities)
        if len(scores) != batch.size:
            raise ValueError(
                f"The model returns {len(scores)} rows of scores for the {batch.size} images of "
                f"batch {batch.number}; accuracy needs one row for each image."
            )
        self.check_finite(batch, scores)
        return scores

    def log_probabilities(self, batch: Batch, output: object) -> Tensor:
        """Log-probabilities (N, C) of what the model returned, logits or probabilities alike."""
        scores = checked_rows(as_rows(class_scores(output)))
        return log_probabilities(scores, self.probabilities(batch, scores))

    def check_finite(self, batch: Batch, scores: Tensor) -> None:
        """Refuse, soon, scores (N, C) of which an image's largest is NaN or infinite."""
        finite = scores.amax(1).isfinite()
        self._batches.check(finite.all(), partial(not_finite, finite, batch.number))


def _in_range(scores: Tensor) -> Tensor:
    return ((scores >= 0) & (scores <= 1)).all()


def _ends_in_weights(model: nn.Module, run_again: Callable[[], object]) -> bool:
    """Whether what the model returns, in evaluation mode, is what its last layer with weights puts out,
    or its mean over positions."""
    last: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        last[:] = [output] if isinstance(output, Tensor) else []

    weighted = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    with (
        model_left_as_found(model, evaluation=True),
        torch.no_grad(),
        hooked(weighted, hook),
    ):
        scores = class_scores(run_again())
    if not last:
        return False
    own = last[0].flatten(2).mean(2) if last[0].dim() > 2 else last[0]
    return own.numel() == scores.numel() and bool(alike(own.reshape(scores.shape), scores))


def _neither(batch: int) -> ValueError:
    return ValueError(
        "The model's one output looked like a probability of class 1 in the first batch, but batch "
        f"{batch} has values outside [0, 1]. If it is a logit, say so: "
        "ClassScores(model, lambda z: torch.stack([-z.flatten() / 2, z.flatten() / 2], 1)) in place of "
        "the model, with the probabilities sigmoid(-z) and sigmoid(z)."
    )
