"""The one way from what a model returns to scores of classes (N, C)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from captum_classfilters._core.names import kind_of

_KEYS = ("logits", "out")


def class_scores(output: object) -> Tensor:
    r"""
    The tensor of scores in what a model returned.

    A tensor is taken as it is; of an object with ``logits`` (Hugging Face) or a mapping with
    ``logits`` or ``out`` (torchvision's segmentation) that part.

    Raises:
        ValueError: It is anything else, a tuple for example.
    """
    if isinstance(output, Tensor):
        return output
    for key in _KEYS:
        part = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(part, Tensor):
            return part
    raise ValueError(
        f"The model returns {kind_of(output)}{_contents(output)}, not one tensor of class "
        "scores (N, C). To pick the scores, wrap the model: "
        f"ClassScores(model, lambda output: output{_place(output)}) in place of the model."
    )


def two_classes(scores: Tensor, probabilities: bool = False) -> Tensor:
    """Scores (N, C); the one output of a binary classifier, (N,) or (N, 1), as (-z, z) if it is a
    logit z, as (1 - p, p) if it is the probability p of class 1."""
    scores = as_rows(scores)
    return _both(scores, probabilities) if one_output(scores) else scores


def one_output(scores: Tensor) -> bool:
    """Whether scores (N, C) are the one output of a binary classifier."""
    return scores.dim() == 2 and scores.shape[1] == 1


def _both(scores: Tensor, probabilities: bool) -> Tensor:
    """Scores (..., 1) of class 1 as those of both classes."""
    return torch.cat([1 - scores if probabilities else -scores, scores], -1)


def as_rows(scores: Tensor) -> Tensor:
    """Scores (N, C), those of one number for each image, (N,), as (N, 1)."""
    return scores[:, None] if scores.dim() == 1 else scores


def scores_per_class(output: object, probabilities: bool = False) -> Tensor:
    """Scores (N, C), C at least 2, of what a model returned: logits, or probabilities.

    Raises:
        ValueError: The model returns something else.
    """
    return checked_rows(two_classes(class_scores(output), probabilities))


def checked_rows(scores: Tensor) -> Tensor:
    """Scores, if they are (N, C).

    Raises:
        ValueError: They have another shape.
    """
    if scores.dim() != 2:
        raise ValueError(
            f"The model returns scores of shape {tuple(scores.shape)}, not (N, C). To give each "
            "image one score per class, the mean over pixels for example, wrap the model: "
            "ClassScores(model, lambda output: output.mean((2, 3))) in place of the model."
        )
    return scores


def are_probabilities(scores: Tensor) -> bool:
    """Whether scores (N, C) are already probabilities: none negative, every row with the sum 1, up to
    the rounding of their type."""
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        return False
    allowed = max(1e-3, 2 * torch.finfo(scores.dtype).eps)
    scores = scores.detach().float()
    sums_to_one = (scores.sum(1) - 1).abs() <= allowed
    return bool(((scores >= 0).all(1) & sums_to_one).all())


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor of half precision in float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def log_probabilities(scores: Tensor, probabilities: bool = False) -> Tensor:
    r"""
    Log-probabilities of the classes, (..., C).

    Args:

        scores (Tensor): Scores (..., C), or the one output (..., 1) of a binary classifier.
        probabilities (bool): They are probabilities already, not logits.
                    Default: False
    """
    one = scores.shape[-1] == 1
    if probabilities:
        # In float16 everything below 6e-5 would be the same.
        scores = at_least_float32(scores)
        scores = _both(scores, probabilities) if one else scores
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    if one:
        return torch.nn.functional.logsigmoid(_both(scores, probabilities))
    return scores.log_softmax(-1)


def _place(output: object) -> str:
    """Where a mapping, an object or a sequence has its first matrix (N, C), the scores presumably."""
    if not isinstance(output, Mapping):
        return "[0]" if isinstance(output, (tuple, list)) else ".scores"
    matrices = [k for k, part in output.items() if isinstance(part, Tensor) and part.dim() == 2]
    return f"[{next(iter([*matrices, *output]), 'scores')!r}]"


def _contents(output: object) -> str:
    if isinstance(output, Mapping):
        return f" with {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f" of {len(output)} ({', '.join(type(part).__name__ for part in output)})"
    return ""
