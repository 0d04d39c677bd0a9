"""What a model's head takes in, image by image, and what the model makes of its output."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import Batch, Batches, read_batches
from captum_classfilters._core.heads import alike
from captum_classfilters._core.layers import check_runs
from captum_classfilters._core.outputs import log_probabilities
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters._core.units import Rows
from captum_classfilters.heads.linear_head import HeadRun, LinearHead, run_head


@short_repr
@dataclass(frozen=True)
class HeadFeatures:
    r"""
    The head's inputs on a data set, on the CPU.

    Args:

        features (Tensor): Shape (N, F).
        labels (Tensor): Shape (N,).
        predicted (Tensor): Shape (N,). The model's answers.
        ends (bool): Whether every image's scores are the head's own output.
        same_probabilities (bool): Whether they mean the same probabilities, as log-probabilities do.
    """

    features: Tensor
    labels: Tensor
    predicted: Tensor
    ends: bool
    same_probabilities: bool


def head_features(
    model: nn.Module,
    head: LinearHead,
    dataloader: Dataloader,
    *,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> HeadFeatures:
    """Collect the inputs (N, F) of a head that runs once, and see what follows it."""
    features, labels, predicted = Rows(), Rows(), Rows()
    with read_batches(
        model, dataloader, "features", unpack=unpack, show_progress=show_progress
    ) as batches:
        seen = _Seen(model, batches)
        for batch in batches:
            run = run_head(model, head, batch.inputs)
            check_runs(head.name, run.runs)
            if run.features.dim() != 2 or len(run.features) != batch.size:
                raise ValueError(
                    f"The head {head.name!r} takes {tuple(run.features.shape)} for {batch.size} "
                    "images; expected a linear layer with one row of features for each image."
                )
            seen.add(batch, run)
            features.add(run.features)
            labels.add(seen.labels)
            predicted.add(seen.predicted)
    return HeadFeatures(
        torch.cat(features.pieces()),
        torch.cat(labels.pieces()),
        torch.cat(predicted.pieces()),
        seen.ends,
        seen.same,
    )


class _Seen:
    """What follows the head, over all batches so far."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.reader, self._batches = ScoreReader(model, batches), batches
        self.ends = self.same = True
        self.labels = self.predicted = torch.empty(0)

    def add(self, batch: Batch, run: HeadRun) -> None:
        """See one batch."""
        self._batches.check_repeats(self.reader.model, batch, run.output)
        scores = self.reader.scores(batch, run.output)
        self.labels = self._batches.class_labels(batch, scores.shape[1])
        self.predicted = scores.argmax(1)
        model_says = self.reader.log_probabilities(batch, run.output).exp()
        head_says = log_probabilities(run.logits).exp()
        same = torch.zeros_like(run.linear)
        if model_says.shape == head_says.shape:
            same = alike(model_says, head_says, run.logits.dtype)

        def then(values: list[bool]) -> None:
            self.ends = self.ends and values[0]
            self.same = self.same and values[1]

        self._batches.later([run.linear & run.ends, run.linear & same], then)
