"""Can adversarial images be told from clean ones by a layer's filters?"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_classfilters._core.batches import read_batches
from captum_classfilters._core.outputs import scores_per_class
from captum_classfilters.identify import collect_features


@dataclass(frozen=True)
class AdversarialDetection:
    r"""
    How well attacked images are told from clean ones.

    Args:

        error (float): Share of images, half of them attacked, that the detector takes for the other
                    kind, over the held-out folds; 0.5 is chance.
        standard_error (float): Its standard error over the pairs of clean and attacked image.
        auc (float): Area under the detector's receiver operating characteristic.
        clean_accuracy (float): Accuracy of the model on the clean images.
        attacked_accuracy (float): On the attacked ones.
        num_images (int): Number of clean images, and of attacked ones.
    """

    error: float
    standard_error: float
    auc: float
    clean_accuracy: float
    attacked_accuracy: float
    num_images: int


def adversarial_detection(
    model: nn.Module,
    layer: nn.Module | str,
    dataloader: Iterable[Any],
    attack: Callable[[Tensor, Tensor], Tensor],
    *,
    detector: Any = None,
    folds: int = 5,
    successful_only: bool = False,
    channel_dim: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> AdversarialDetection:
    r"""
    Attack every image, and train a classifier to tell clean from attacked by the filters.

    The detector sees the mean activation of each of the layer's filters. It is cross-validated: an
    image and its attacked version are always in the same fold, so that the detector cannot know
    the image. Liang et al. (https://arxiv.org/abs/2007.08194) propose this use of class-specific
    filters; their abstract says no more, so that the protocol is our own.

    Args:

        model (nn.Module): The model, with logits (N, C).
        layer (nn.Module or str): The layer, or its dotted name.
        dataloader (iterable): Batches of (images, labels), not those that the model was trained on.
        attack (Callable): From images and labels of a batch to attacked images of the same shape;
                    one of ``captum.robust`` for example. The model is in evaluation mode.
        detector (optional): An unfitted scikit-learn classifier with ``predict_proba``. By default a
                    random forest of 100 trees.
        folds (int): Number of folds.
                    Default: 5
        successful_only (bool): Use only images that the model classifies correctly before the
                    attack and wrongly after it.
                    Default: False
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
        seed (int): Seed of the folds, of the default detector, and of attacks that draw at random.
                    Default: 0
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *AdversarialDetection*.

    Raises:
        ValueError: The loader is empty, the attack changes the images' shape or gives NaN, or
                    fewer images than folds are left.
    """
    forest = _detector(detector, seed)
    clean, attacked, right = [], [], []
    with read_batches(model, dataloader, "attack", show_progress=show_progress) as batches:
        torch.manual_seed(seed)
        for batch in batches:
            (images, *_) = batch.inputs
            scores = scores_per_class(model(images))
            labels = batch.class_labels(scores.shape[1])
            with torch.enable_grad():
                changed = _checked(attack(images, labels), images)
            clean.append((images, labels))
            attacked.append((changed, labels))
            outputs = torch.stack([scores, scores_per_class(model(changed))])
            right.append((outputs.argmax(2) == labels).cpu())
    right_before, right_after = torch.cat(right, 1)
    options: dict[str, Any] = {"channel_dim": channel_dim, "show_progress": False}
    before, _ = collect_features(model, layer, clean, **options)
    after, _ = collect_features(model, layer, attacked, **options)
    used = right_before & ~right_after if successful_only else torch.ones_like(right_before)
    if int(used.sum()) < folds:
        raise ValueError(
            f"{int(used.sum())} images are left for {folds} folds; the attack succeeds too rarely, "
            "or there are too few images."
        )
    error, deviation, auc = _cross_validated(before[used], after[used], forest, folds, seed)
    return AdversarialDetection(
        error=error,
        standard_error=deviation,
        auc=auc,
        clean_accuracy=float(right_before.double().mean()),
        attacked_accuracy=float(right_after.double().mean()),
        num_images=int(used.sum()),
    )


def _detector(detector: Any, seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(random_state=seed) if detector is None else detector


def _checked(changed: Any, images: Tensor) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != images.shape:
        shape = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(f"The attack gave {shape} for images {tuple(images.shape)}.")
    if not bool(torch.isfinite(changed).all()):
        raise ValueError("The attack gave NaN or Inf.")
    return changed.detach()


def _cross_validated(
    before: Tensor, after: Tensor, detector: Any, folds: int, seed: int
) -> tuple[float, float, float]:
    """Error, its standard error over pairs, and area under the curve."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    number = len(before)
    features = torch.cat([before, after]).double().numpy()
    kinds = np.repeat([0, 1], number)
    # Shuffled first: loaders ordered by class would make folds of classes.
    order = np.random.default_rng(seed).permutation(number)
    score = cross_val_predict(
        detector,
        features,
        kinds,
        groups=np.tile(order, 2),
        cv=GroupKFold(folds),
        method="predict_proba",
    )[:, 1]
    wrong = ((score > 0.5) != kinds).reshape(2, number).mean(0)
    deviation = float(wrong.std(ddof=1)) / math.sqrt(number)
    return float(wrong.mean()), deviation, float(roc_auc_score(kinds, score))
