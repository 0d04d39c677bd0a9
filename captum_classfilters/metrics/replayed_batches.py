"""A data set run without filters, batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import Batch, read_batches
from captum_classfilters._core.devices import on_device
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.labels import class_labels
from captum_classfilters._core.layers import module_of
from captum_classfilters._core.outputs import class_scores, log_probabilities, scores_per_class
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.types import Check, Dataloader, ForwardFunc, Unpack
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.metrics.inputs import at_model
from captum_classfilters.metrics.removals import check_finite, each_in_words


@dataclass(frozen=True)
class ReplayedBatch:
    """One batch of a data set, run once and ready to run without filters.

    Args:

        batch (Batch): The batch.
        replay (SuffixReplay): The replay.
        labels (Tensor): Shape (N,), on the CPU.
        check (Callable): Raises an error, soon, unless a bool on the device is true.
        gives_probabilities (bool): The model returns probabilities, not logits.
    """

    batch: Batch
    replay: SuffixReplay
    labels: Tensor
    check: Check
    gives_probabilities: bool

    def check_finite(self, outputs: Tensor, removed: Tensor | None = None) -> None:
        """Refuse outputs (P, N, ...) without sets of filters (P, K) that are not finite."""
        place = f"image {{}} of batch {self.batch.number}".format
        check_finite(outputs, each_in_words(removed), self.check, place)

    def classes(self, outputs: Tensor) -> Tensor:
        """Class scores (P, N, C), C at least 2, of outputs (P, N, ...)."""
        return _classes(outputs, self.gives_probabilities)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Probabilities of the classes (P, N, C) of outputs (P, N, ...)."""
        if self.gives_probabilities:
            return self.classes(outputs)
        return log_probabilities(outputs.reshape(*outputs.shape[:2], -1)).exp()


@contextmanager
def replayed_images(
    model: ForwardFunc,
    layer: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: object,
    **options: Any,
) -> Iterator[SuffixReplay]:
    """Images, run once and ready to run without filters, where the model is and it left as found.

    Args:

        model (Callable): The model, or its forward function.
        layer (nn.Module): The layer.
        inputs (Tensor or tuple[Tensor, ...]): As Captum takes them.
        additional_forward_args (object): Likewise.
        options: As for :class:`~captum_classfilters.LayerFilterAblation`.
    """
    owner = module_of(model, [layer])
    images, further, _ = at_model(owner, inputs, additional_forward_args, None)
    with (
        model_left_as_found(owner, evaluation=True),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        ablation = LayerFilterAblation(model, layer, **options)
        replay = ablation.replay(layer, images, additional_forward_args=further)
        check_finite(class_scores(replay.output)[None], each_in_words(None))
        yield replay


@contextmanager
def replaying(
    ablation: LayerFilterAblation,
    layer: nn.Module,
    shape: tuple[int, int],
    dataloader: Dataloader,
    *,
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = True,
    at_input: bool = False,
) -> Iterator[Iterator[ReplayedBatch]]:
    """The batches of a loader for a model and a layer that fit tables of a shape (C, K); without
    filters of the layer's input, if so."""
    model = module_of(ablation.forward_func, [layer])
    with read_batches(
        model,
        dataloader,
        "without filters",
        device=device,
        unpack=unpack,
        show_progress=show_progress,
    ) as batches:

        def each() -> Iterator[ReplayedBatch]:
            reader = ScoreReader(ablation.forward_func, batches, [layer])
            for batch in batches:
                replay = ablation.replay(layer, batch.inputs, at_input=at_input)
                batches.check_repeats(ablation.forward_func, batch, replay.output)
                probabilities = reader.probabilities(batch, replay.output)
                num_classes = _classes(replay.output[None], probabilities).shape[2]
                if (num_classes, replay.num_filters) != shape:
                    raise ValueError(
                        f"The table has {shape[0]} classes and {shape[1]} filters; the model has "
                        f"{num_classes} classes and the layer {replay.num_filters} filters."
                    )
                labels = class_labels(
                    on_device(batch.labels, "cpu"), batch.size, num_classes, batch.number
                )
                replayed = ReplayedBatch(batch, replay, labels, batches.check, probabilities)
                replayed.check_finite(replay.output[None])
                yield replayed

        yield each()


def _classes(outputs: Tensor, probabilities: bool) -> Tensor:
    """Class scores (P, N, C) of outputs (P, N, ...)."""
    rows = scores_per_class(outputs.flatten(0, 1), probabilities)
    return rows.unflatten(0, outputs.shape[:2])


def confusion_without(
    ablation: LayerFilterAblation,
    layer: nn.Module,
    removed: Tensor,
    num_classes: int,
    dataloader: Dataloader,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    r"""
    Confusion of the model as it is, and without each of some sets of filters.

    Args:

        ablation (LayerFilterAblation): The model, and what stands in for a filter.
        layer (nn.Module): The layer.
        removed (Tensor): Shape (S, K), bool, sets of filters.
        num_classes (int): C.
        dataloader (iterable): Batches of (inputs, labels).
        options: As for :func:`replaying`.

    Returns:
        *tuple* of Tensors (C, C) and (S, C, C), int64: images of class i recognized as class j.
    """
    counts: Tensor | None = None
    with replaying(
        ablation, layer, (num_classes, removed.shape[1]), dataloader, **options
    ) as batches:
        for replayed in batches:
            if counts is None:
                size = (1 + len(removed)) * num_classes**2
                counts = torch.zeros(size, dtype=torch.int64, device=replayed.replay.output.device)
            labels = replayed.labels.to(counts.device)
            _count(counts, replayed, replayed.replay.output[None], labels, 0)
            for rows, outputs in replayed.replay.in_parts(removed):
                replayed.check_finite(outputs, removed[rows])
                _count(counts, replayed, outputs, labels, 1 + rows.start)
    assert counts is not None
    tables = counts.cpu().reshape(-1, num_classes, num_classes)
    return tables[0], tables[1:]


def _count(
    counts: Tensor, replayed: ReplayedBatch, outputs: Tensor, labels: Tensor, start: int
) -> None:
    """Add the answers of outputs (P, N, ...) to flat confusion matrices from a place on."""
    scores = replayed.classes(outputs)
    num_classes = scores.shape[2]
    place = torch.arange(start, start + len(scores), device=labels.device)[:, None]
    cells = ((place * num_classes + labels) * num_classes + scores.argmax(2)).flatten()
    counts.index_add_(0, cells, torch.ones_like(cells))
