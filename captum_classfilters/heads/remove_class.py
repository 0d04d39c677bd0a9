"""Remove a class from a model's head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import short_repr
from captum_classfilters.heads.decomposed_linear import DecomposedLinear, linear_layer
from captum_classfilters.heads.linear_head import linear_head


@short_repr
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


@arguments_checked
@torch.inference_mode(False)
def remove_class(head: nn.Module, class_index: int) -> RemovedClass:
    r"""
    Remove one class from a linear or decomposed head.

    In a decomposed head a class is a row with its own filters: without it the other classes' logits
    do not change, and the filters that it alone used can go. (The use that Badola et al. name in
    their abstract.)

    The features are as before: a linear probe on them tells the class as well as it did. To take it out of
    the features, see ``captum_classfilters.answers.forget_class``.

    Args:

        head (nn.Module): The head, an ``nn.Linear``, an ungrouped 1x1 convolution or a
                    :class:`DecomposedLinear`; it is not changed.
        class_index (int): The class.

    Returns:
        *RemovedClass*: The smaller ``head``, and ``unused_features``, which only the removed class
        used; none for a dense head.

    Raises:
        ValueError: There is no such class, or it is the last one; or the head computes something
                    else than its weight says.

    Examples::

        >>> import torch
        >>> from captum_classfilters.heads import DecomposedLinear, remove_class
        >>> head = DecomposedLinear(torch.ones(2, 3), torch.zeros(2), mask=torch.tensor(
        ...     [[True, True, False], [False, True, True]]))
        >>> remove_class(head, 0).unused_features
        tensor([0])
    """
    linear = linear_head(head)
    num_classes = len(linear.weight)
    if num_classes == 1:
        raise ValueError(
            "The head has a single output, which tells the two classes of a binary classifier apart; "
            "neither can be removed."
        )
    if not 0 <= class_index < num_classes:
        raise ValueError(f"Class {class_index} is out of range: the head has {num_classes}.")
    keep = torch.arange(num_classes, device=linear.weight.device) != class_index
    weight = linear.weight[keep]
    bias = None if linear.bias is None else linear.bias[keep]
    if isinstance(head, DecomposedLinear):
        mask = head.mask
        smaller: nn.Module = DecomposedLinear(weight, bias, mask[keep], linear.convolution_dims)
        unused = (mask[class_index] & ~mask[keep].any(0)).nonzero()[:, 0].cpu()
    else:
        smaller = linear_layer(weight, bias, linear.convolution_dims)
        unused = torch.empty(0, dtype=torch.int64)
    return RemovedClass(smaller.train(head.training), unused)
