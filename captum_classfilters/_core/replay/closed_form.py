"""Outputs without some filters from the weights of the linear head that the layer feeds."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.devices import without_autocast
from captum_classfilters._core.heads import HeadRecord, candidate_feed, linear_output
from captum_classfilters._core.layers import positions_last


@dataclass
class ClosedForm:
    r"""
    A linear head and what the layer gives it, with and without each filter.

    Args:

        weight (Tensor): Shape (C, K * P), P = 1 where the head sees the mean over positions.
        bias (Tensor): Shape (C,).
        features (Tensor): Shape (N, K, P). Each filter's part of the head's input.
        stands_in (Tensor): Shape (N, K, P). The same of what stands in for a removed filter.
        dtype (torch.dtype): That of the model's output.
        holds (Tensor): Whether the head computes its weight, and is fed in this way: a bool of no
                    axes on the model's device.
    """

    weight: Tensor
    bias: Tensor
    features: Tensor
    stands_in: Tensor
    dtype: torch.dtype
    holds: Tensor

    @classmethod
    def of(
        cls, head: HeadRecord, activation: Tensor, stands_in: Tensor, axis: int
    ) -> "ClosedForm | None":
        """From the head whose own tensor the model returned; None where the shapes do not fit."""
        if head.features is None or head.logits is None or head.features.dim() != 2:
            return None
        candidate = candidate_feed(head.features, activation, axis)
        if candidate is None:
            return None
        feed, fed = candidate
        maps, instead = (
            positions_last(tensor, axis).to(head.weight.dtype) for tensor in (activation, stands_in)
        )
        if feed != "flatten":
            maps, instead = maps.mean(2, keepdim=True), instead.mean(2, keepdim=True)
        holds = head.computes_its_weight() & fed
        if torch.finfo(head.logits.dtype).eps > 1e-5:  # where rounding hides what is nearly linear
            if not _is_plain(head.module):
                return None
            holds = holds & _equal_but_for_a_rounding(maps.flatten(1), head.features)
        return cls(head.weight, head.bias, maps, instead, head.logits.dtype, holds)

    def outputs(self, removed: Tensor) -> Tensor:
        """The head's output (P, N, C) for sets of filters (P, K), or (P, N, K) by image.

        It is computed from what is left. The full output minus the removed share would be inexact
        where that share is almost all of it.
        """
        removed = removed.to(self.features.device)
        removed = (removed if removed.dim() == 3 else removed[:, None])[..., None]
        left = torch.where(removed, self.stands_in, self.features)  # (P, N, K, positions)
        with without_autocast(left.device):
            outputs = linear_output(self.weight, self.bias, left.flatten(0, 1).flatten(1))
        return outputs.unflatten(0, left.shape[:2]).to(self.dtype)

    def drops(self, classes: Tensor) -> Tensor:
        """What each image's output for its class (N,) loses without each filter, (N, K)."""
        change = self.features - self.stands_in
        weight = self.weight[classes.to(self.weight.device)].reshape(change.shape)
        return (change * weight).sum(2).to(self.dtype)


def _is_plain(module: nn.Module | None) -> bool:
    """Whether a module's forward is that of ``nn.Linear`` and nothing is hooked to it."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _equal_but_for_a_rounding(exact: Tensor, rounded: Tensor) -> Tensor:
    """Whether tensors differ by a rounding or two of the second one's type, as a bool of no axes."""
    eps = torch.finfo(rounded.dtype).eps
    rounded = rounded.to(exact.dtype)
    allowed = 2 * eps * rounded.abs() + eps / 4 * rounded.abs().amax()
    return ((exact - rounded).abs() <= allowed).all()
