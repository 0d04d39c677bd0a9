"""The one way from a batch's labels to which image counts for which class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters._core.devices import on_device, ordinary
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import checked_rows


def check_num_classes(num_classes: int | None, target: int | None = None) -> None:
    """Raise, before any data are read, for a number of classes, or one class, that cannot be meant.

    Raises:
        ValueError: It is too small.
    """
    for name, value, least in (("num_classes", num_classes, 1), ("target", target, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}; expected at least {least}.")


@dataclass(frozen=True)
class Memberships:
    r"""
    Pairs of an image and a class it counts for, M in all.

    Args:

        classes (Tensor): Shape (M,), int64.
        images (Tensor or None): Shape (M,), int64, the place of each pair's image in the batch; None
                    where every image counts for one class, in order.
        num_images (int): N; M where ``images`` is None.
    """

    classes: Tensor
    images: Tensor | None = None
    num_images: int = -1

    def __post_init__(self) -> None:
        if self.images is None:
            object.__setattr__(self, "num_images", len(self.classes))

    def to(self, device: torch.device) -> "Memberships":
        """The same on a device."""
        classes, images = on_device((self.classes, self.images), device)
        return Memberships(classes, images, self.num_images)

    def of_images(self, values: Tensor) -> Tensor:
        """Values (N, ...) of the images as values (M, ...) of the pairs."""
        return values if self.images is None else values[self.images]

    def rounds(self) -> list[tuple[Tensor, Tensor | None]]:
        """The pairs as targets (N,) of whole batches: each image's first class, its second and so
        on; beside each, which places of :attr:`classes` its rows belong to, (N,), -1 for none."""
        if self.images is None:
            return [(self.classes, None)]
        place = torch.arange(len(self.classes), device=self.classes.device)
        counts = torch.bincount(self.images, minlength=self.num_images)
        nth = place - (counts.cumsum(0) - counts)[self.images]
        rounds: list[tuple[Tensor, Tensor | None]] = []
        for number in range(max(1, int(counts.max())) if len(counts) else 1):  # one if none has any
            chosen = nth == number
            targets = torch.zeros(self.num_images, dtype=torch.int64, device=place.device)
            pairs = torch.full_like(targets, -1)
            targets[self.images[chosen]] = self.classes[chosen]
            pairs[self.images[chosen]] = place[chosen]
            rounds.append((targets, pairs))
        return rounds


def joined(parts: Sequence[Memberships]) -> Memberships:
    """The pairs of several batches, their images counted on."""
    classes = torch.cat([part.classes for part in parts])
    if all(part.images is None for part in parts):
        return Memberships(classes)
    images, before = [], 0
    for part in parts:
        own = part.images
        own = torch.arange(len(part.classes), device=classes.device) if own is None else own
        images.append(own + before)
        before += part.num_images
    return Memberships(classes, torch.cat(images), before)


def class_labels(labels: object, num_images: int, num_classes: int, batch: int) -> Tensor:
    """Labels as int64 (N,), each image of one class; checked.

    Raises:
        ValueError: They are something else; it says what and in which batch.
    """
    found = memberships(labels, num_images, num_classes, batch)
    if found.images is not None:
        raise ValueError(
            f"The labels of batch {batch} are multi-hot, several classes for one image; this "
            f"function needs one class index for each image, shape ({num_images},). With several "
            "classes for an image, use a metric of all scores and labels: "
            "LayerFilterAblation(model, layer).identify(loader, metric=function)."
        )
    return found.classes


def memberships(labels: object, num_images: int, num_classes: int, batch: int) -> Memberships:
    r"""
    Which image counts for which class.

    Labels are class indices (N,) or (N, 1); or multi-hot rows (N, C) of zeros and ones in any type,
    where an image counts for each of its classes. Of two classes, booleans and whole floats are
    indices too, as binary losses have them.

    Raises:
        ValueError: They are none of these; it says what was found and in which batch.
    """
    tensor = _as_tensor(labels, batch)
    if tensor.shape == (num_images, 1) and num_classes > 1:
        tensor = tensor[:, 0]
    if tensor.shape == (num_images, num_classes) and num_classes > 1:
        return _hot(tensor, batch)
    if tensor.shape != (num_images,):
        raise ValueError(
            f"The labels of batch {batch} have shape {tuple(tensor.shape)}; expected "
            f"({num_images},), one class index for each image, or multi-hot rows "
            f"({num_images}, {num_classes}) if an image has several classes."
        )
    if tensor.dtype == torch.bool and num_classes == 2:
        tensor = tensor.to(torch.int64)
    if tensor.is_floating_point() and num_classes == 2 and bool((tensor == tensor.round()).all()):
        tensor = tensor.to(torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(
            f"The labels of batch {batch} are {tensor.dtype}; expected whole numbers, one class "
            "index for each image. Of values make classes, bins for example: "
            "unpack=lambda batch: (batch[0], torch.bucketize(batch[1], edges))."
        )
    tensor = tensor.to(torch.int64)
    wrong = (tensor < 0) | (tensor >= num_classes)
    if bool(wrong.any()):
        raise ValueError(
            f"Batch {batch} has the label {int(tensor[wrong][0])}, but there are {num_classes} "
            f"classes: expected 0 to {num_classes - 1}."
        )
    return Memberships(tensor)


def labels_of_scores(
    scores: Tensor, labels: object, batch: int, num_classes: int | None = None
) -> Tensor:
    """The labels of a batch of class scores (N, C), both checked, where the scores are."""
    finite = checked_rows(scores).isfinite().all(1)
    if not bool(finite.all()):
        raise not_finite(finite, batch)
    checked = class_labels(labels, len(scores), num_classes or scores.shape[1], batch)
    return on_device(checked, scores.device)


def not_finite(finite: Tensor, batch: int) -> ValueError:
    """What to raise where some images' scores are not finite, (N,), since an argmax takes NaN for some
    class."""
    return ValueError(
        f"The model returns NaN or Inf for image {int((~finite).nonzero()[0, 0])} of batch {batch}; "
        "accuracy would take it for some class."
    )


def _as_tensor(labels: object, batch: int) -> Tensor:
    try:
        return ordinary(torch.as_tensor(labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The labels of batch {batch} are {kind_of(labels)} that is no tensor: {error}"
        ) from error


def _hot(tensor: Tensor, batch: int) -> Memberships:
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise ValueError(
            f"The labels of batch {batch} have shape {tuple(tensor.shape)} but are not multi-hot: "
            "they hold numbers other than 0 and 1. Soft labels have no class to count for."
        )
    images, classes = tensor.nonzero().unbind(1)
    if bool((tensor != 0).sum(1).eq(1).all()):  # one-hot: one class for each image, in order
        return Memberships(classes)
    return Memberships(classes, images, len(tensor))
