"""The same head read on images without something and on images with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from captum_classfilters._core.batches import Batch, Batches, read_batches
from captum_classfilters._core.image_keys import image_keys
from captum_classfilters._core.layers import check_runs
from captum_classfilters._core.score_reader import ScoreReader
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.types import Dataloader, ModelInputs, Unpack
from captum_classfilters._core.units import Rows, aggregated
from captum_classfilters.heads.linear_head import HeadRun, LinearHead, run_head

#: Images with something: a loader of them, or a function from images without it to images with it.
#: None where each batch has both.
Marked = Dataloader | Callable[[Tensor], Tensor] | None


@short_repr
@dataclass(frozen=True)
class Side:
    r"""
    What the head made of one kind of images, on the CPU.

    Args:

        features (Tensor): Shape (N, F). The head's inputs, means over positions where it has some.
        log_probabilities (Tensor): Shape (N, C).
        scores (Tensor): Shape (N, C).
        labels (Tensor): Shape (N,).
        fingerprints (Tensor): Shape (N,). Numbers that tell images apart.
    """

    features: Tensor
    log_probabilities: Tensor
    scores: Tensor
    labels: Tensor
    fingerprints: Tensor

    @property
    def predicted(self) -> Tensor:
        """The class of the largest score, (N,)."""
        return self.scores.argmax(1)


@dataclass
class Kept:
    """Rows of one kind of images, batch by batch."""

    features: Rows = field(default_factory=Rows)
    log_probabilities: Rows = field(default_factory=Rows)
    scores: Rows = field(default_factory=Rows)
    labels: Rows = field(default_factory=Rows)
    fingerprints: Rows = field(default_factory=Rows)

    def add(self, seen: "SeenBatch") -> None:
        """Add a batch."""
        features = seen.run.features
        self.features.add(
            aggregated(features.flatten(2), "mean") if features.dim() > 2 else features
        )
        self.log_probabilities.add(seen.reader.log_probabilities(seen.batch, seen.run.output))
        self.scores.add(seen.scores)
        self.labels.add(seen.labels)
        self.fingerprints.add(image_keys(seen.inputs))

    def side(self) -> Side:
        """All of them."""
        parts = (self.features, self.log_probabilities, self.scores, self.labels, self.fingerprints)
        return Side(*(torch.cat(rows.pieces()) for rows in parts))


@dataclass(frozen=True)
class SeenBatch:
    """A batch of one kind of images, run once.

    Args:

        kind (int): 0 without, 1 with.
        batches (Batches): The pass.
        batch (Batch): The batch.
        inputs (tuple): What the model was given.
        run (HeadRun): What the head did.
        reader (ScoreReader): Reads scores.
        scores (Tensor): Shape (N, C), where the model is.
        labels (Tensor): Shape (N,), where the model is.
    """

    kind: int
    batches: Batches
    batch: Batch
    inputs: ModelInputs
    run: HeadRun
    reader: ScoreReader
    scores: Tensor
    labels: Tensor


def read_sides(
    model: nn.Module,
    head: LinearHead,
    dataloader: Dataloader,
    marked: Marked,
    *,
    paired: bool,
    unpack: Unpack | None,
    show_progress: bool,
) -> tuple[Side, Side]:
    """What the head makes of images without something and with it, image by image."""
    kept = (Kept(), Kept())

    def take(seen: SeenBatch) -> None:
        kept[seen.kind].add(seen)

    see_sides(
        model,
        head,
        dataloader,
        marked,
        take,
        paired=paired,
        unpack=unpack,
        show_progress=show_progress,
    )
    return kept[0].side(), kept[1].side()


def see_sides(
    model: nn.Module,
    head: LinearHead,
    dataloader: Dataloader,
    marked: Marked,
    take: Callable[[SeenBatch], None],
    *,
    paired: bool,
    unpack: Unpack | None,
    show_progress: bool,
) -> None:
    """Run every batch without something and with it, each once, and call a function with it."""
    labels: tuple[list[Tensor], list[Tensor]] = ([], [])

    def run(kind: int, batches: Batches, reader: ScoreReader, batch: Batch, *given: object) -> None:
        seen = _seen(model, head, kind, batches, reader, batch, given)
        labels[kind].append(seen.labels.cpu())
        take(seen)

    if marked is None or callable(marked):
        if not paired:
            raise ValueError(
                "paired=False needs two loaders: dataloader with images without it, and marked with "
                "images that have it."
            )
        with _reading(model, dataloader, "pairs", unpack, show_progress) as (batches, reader):
            for batch in batches:
                for kind, inputs in enumerate(both_sides(batch, marked)):
                    run(kind, batches, reader, batch, *inputs)
        return
    for kind, loader in enumerate((dataloader, marked)):
        if paired:
            check_order(loader, ("dataloader", "marked")[kind])
        name = ("without", "with")[kind]
        with _reading(model, loader, name, unpack, show_progress) as (batches, reader):
            for batch in batches:
                run(kind, batches, reader, batch, *batch.inputs)
    if paired:
        check_pairs(*map(torch.cat, labels))


def see_loader(
    model: nn.Module,
    head: LinearHead,
    dataloader: Dataloader,
    take: Callable[[SeenBatch], None],
    *,
    unpack: Unpack | None,
    show_progress: bool,
) -> None:
    """Run every batch of one loader once, and call a function with it."""
    with _reading(model, dataloader, "images", unpack, show_progress) as (batches, reader):
        for batch in batches:
            take(_seen(model, head, 0, batches, reader, batch, batch.inputs))


def check_order(dataloader: Dataloader, name: str) -> None:
    """Refuse a loader that draws another order each time, where images are compared one by one."""
    if isinstance(getattr(dataloader, "sampler", None), RandomSampler):
        raise ValueError(
            f"{name} draws its images in a random order, so that its images cannot be told from those "
            "of the other loader; make it with shuffle=False, or give one loader of pairs "
            "((without, with), labels) and no marked."
        )


def check_pairs(without: Tensor, with_: Tensor) -> None:
    """Refuse images that cannot be pairs."""
    if len(without) != len(with_):
        raise ValueError(
            f"There are {len(without)} images without it and {len(with_)} with it, so these are no "
            "pairs; give the same images in the same order, or say paired=False for two groups of "
            "different images."
        )
    differ = (without != with_).nonzero()[:, 0]
    if len(differ):
        image = int(differ[0])
        raise ValueError(
            f"Image {image} has the label {int(without[image])} without it and {int(with_[image])} "
            "with it, so these are no pairs; give the same images in the same order, or say "
            "paired=False for two groups of different images."
        )


@contextmanager
def _reading(
    model: nn.Module,
    dataloader: Dataloader,
    description: str,
    unpack: Unpack | None,
    show_progress: bool,
) -> Iterator[tuple[Batches, ScoreReader]]:
    with read_batches(
        model, dataloader, description, unpack=unpack, show_progress=show_progress
    ) as batches:
        yield batches, ScoreReader(model, batches)


def both_sides(batch: Batch, marked: Callable[[Tensor], Tensor] | None) -> list[ModelInputs]:
    """A batch's inputs without and with it."""
    if marked is None:
        if len(batch.inputs) != 2 or not all(isinstance(part, Tensor) for part in batch.inputs):
            raise ValueError(
                f"Batch {batch.number} has {len(batch.inputs)} inputs; expected pairs of images, "
                "((without, with), labels), or a second loader as marked."
            )
        pair = batch.inputs
    else:
        own = batch.inputs[0]
        changed: object = marked(own.clone())  # which may write into it
        changed = torch.as_tensor(changed) if isinstance(changed, np.ndarray) else changed
        if isinstance(changed, Tensor) and changed.is_floating_point() == own.is_floating_point():
            changed = changed.to(own)  # of NumPy numbers are float64
        pair = (own, changed)
    if not isinstance(pair[1], Tensor) or pair[0].shape != pair[1].shape:
        found = tuple(pair[1].shape) if isinstance(pair[1], Tensor) else type(pair[1]).__name__
        raise ValueError(
            f"Images {tuple(pair[0].shape)} without it and {found} with it in batch {batch.number} "
            "are no pairs; expected two tensors of one shape."
        )
    if pair[1].dtype != pair[0].dtype:
        raise ValueError(
            f"Images of {pair[0].dtype} without it and {pair[1].dtype} with it in batch {batch.number}; "
            "expected one type."
        )
    rest = batch.inputs[1:] if marked is not None else ()
    return [(part, *rest) for part in pair]


def _seen(
    model: nn.Module,
    head: LinearHead,
    kind: int,
    batches: Batches,
    reader: ScoreReader,
    batch: Batch,
    inputs: ModelInputs,
) -> SeenBatch:
    run = run_head(model, head, inputs)
    check_runs(head.name, run.runs)
    if len(run.features) != batch.size or run.features.dim() != 2 + head.convolution_dims:
        raise ValueError(
            f"The head {head.name!r} takes {tuple(run.features.shape)} for {batch.size} images; "
            "expected one row of features, or maps, for each image."
        )
    batches.check(run.linear, lambda: _not_linear(head.name, run.features, batch.number))
    batches.check_repeats(model, replace(batch, inputs=inputs), run.output)
    scores = reader.scores(batch, run.output)
    labels = batches.class_labels(batch, scores.shape[1])
    return SeenBatch(kind, batches, batch, inputs, run, reader, scores, labels)


def _not_linear(name: str, features: Tensor, batch: int) -> ValueError:
    """Why a head's outputs are not what its weight makes of its inputs."""
    if not bool(features.isfinite().all()):
        return ValueError(f"NaN or Inf among the inputs of the head {name!r} in batch {batch}.")
    return ValueError(
        f"The head {name!r} put out something else than its weight times its input plus its bias, so "
        "editing its weight would not do what is measured."
    )
