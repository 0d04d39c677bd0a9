"""Remove a class from a model's head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters.heads.decompose import DecomposedLinear


@dataclass(frozen=True)
class RemovedClass:
    r"""
    A head without one class.

    Args:

        head (nn.Module): The head, with C - 1 outputs; the others keep their order.
        unused_features (Tensor): int64. Features that only the removed class used, free to be
                    pruned; always empty for a dense head, in which every class uses all.
    """

    head: nn.Module
    unused_features: Tensor


def remove_class(head: nn.Linear | DecomposedLinear, class_index: int) -> RemovedClass:
    r"""
    Remove one class from a linear or decomposed head.

    In a decomposed head a class is a row with its own filters: without it the other classes' logits
    do not change, and the filters that it alone used can go. (The use that Badola et al. name in
    their abstract.)

    Args:

        head (nn.Linear or DecomposedLinear): The head; it is not changed.
        class_index (int): The class.

    Returns:
        *RemovedClass*.

    Raises:
        ValueError: There is no such class, or it is the last one.

    Examples::

        >>> import torch
        >>> from captum_classfilters.heads import DecomposedLinear, remove_class
        >>> head = DecomposedLinear(torch.ones(2, 3), torch.zeros(2), mask=torch.tensor(
        ...     [[True, True, False], [False, True, True]]))
        >>> remove_class(head, 0).unused_features
        tensor([0])
    """
    if not 0 <= class_index < head.out_features:
        raise ValueError(f"Class {class_index} is out of range: the head has {head.out_features}.")
    if head.out_features == 1:
        raise ValueError("The head's only class cannot be removed.")
    keep = torch.arange(head.out_features) != class_index
    weight = head.dense_weight() if isinstance(head, DecomposedLinear) else head.weight
    weight = weight.detach()[keep]
    bias = None if head.bias is None else head.bias.detach()[keep]
    if isinstance(head, DecomposedLinear):
        mask = head.mask
        smaller: nn.Module = DecomposedLinear(weight, bias, mask[keep], head.convolution_dims)
        unused = mask[class_index] & ~mask[keep].any(0)
        return RemovedClass(smaller.train(head.training), unused.nonzero()[:, 0])
    dense = nn.Linear(head.in_features, len(weight), bias=bias is not None).to(weight)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if bias is not None:
            dense.bias.copy_(bias)
    return RemovedClass(dense.train(head.training), torch.empty(0, dtype=torch.int64))
