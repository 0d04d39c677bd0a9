"""Can adversarial images be told from clean ones by a layer's filters?"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import split_batch
from captum_classfilters._core.guard import model_left_as_found
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
    filters; their abstract says no more, so that the protocol here is this package's.

    Args:

        model (nn.Module): The model, with logits (N, C).
        layer (nn.Module or str): The layer, or its dotted name.
        dataloader (iterable): Batches of (images, labels), not those that the model was trained on.
        attack (Callable): From images and labels of a batch to attacked images of the same shape;
                    one of ``captum.robust``, say. The model is in evaluation mode.
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
        ImportError: scikit-learn is missing; it comes with the extra ``demo``.
        ValueError: The loader is empty, the attack changes the images' shape or gives NaN, or
                    fewer images than folds are left.

    Examples::

        >>> import torch
        >>> from captum.robust import FGSM
        >>> from captum_classfilters.metrics import adversarial_detection
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        ...     torch.nn.Linear(64, 2))
        >>> fgsm = FGSM(net, loss_func=torch.nn.CrossEntropyLoss(reduction="none"))
        >>> data = [(torch.rand(20, 1, 6, 6), torch.arange(20) % 2)]
        >>> result = adversarial_detection(
        ...     net, "1", data, lambda x, y: fgsm.perturb(x, epsilon=0.3, target=y),
        ...     show_progress=False)
        >>> result.num_images
        20
    """
    forest = _detector(detector, seed)
    clean, attacked = [], []
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    bar = tqdm(dataloader, desc="attack", unit="batch", disable=not show_progress)
    with model_left_as_found(model, evaluation=True):
        torch.manual_seed(seed)
        for number, batch in enumerate(bar):
            (images, *_), labels = split_batch(batch, number, device)
            labels = labels.to(device)
            changed = _checked(attack(images, labels), images)
            clean.append((images, labels))
            attacked.append((changed, labels))
        right_before = _right(model, clean)
        right_after = _right(model, attacked)
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


def _detector(given: Any, seed: int) -> Any:
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise ImportError(
            "adversarial_detection needs scikit-learn: pip install 'captum-classfilters[demo]'"
        ) from error
    return RandomForestClassifier(random_state=seed) if given is None else given


def _checked(changed: Any, images: Tensor) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != images.shape:
        shape = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(f"The attack gave {shape} for images {tuple(images.shape)}.")
    if not bool(torch.isfinite(changed).all()):
        raise ValueError("The attack gave NaN or Inf.")
    return changed.detach()


@torch.no_grad()
def _right(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    if not batches:
        raise ValueError("The data loader is empty.")
    return torch.cat([(model(images).argmax(1) == labels).cpu() for images, labels in batches])


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
