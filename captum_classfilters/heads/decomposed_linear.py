"""The linear layer in which every class uses its own filters only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked


def linear_map(
    features: Tensor, weight: Tensor, bias: Tensor | None, convolution_dims: int = 0
) -> Tensor:
    """Features (N, F) or (..., F) through a weight (C, F); (N, F, ...) as a 1x1 convolution has it."""
    if convolution_dims == 0:
        return F.linear(features, weight, bias)
    return F.linear(features.movedim(1, -1), weight, bias).movedim(-1, 1)


@torch.inference_mode(False)
def linear_layer(weight: Tensor, bias: Tensor | None, convolution_dims: int = 0) -> nn.Module:
    """An ``nn.Linear``, or an ``nn.Conv1d/2d/3d`` of kernel size 1, with this weight (C, F)."""
    kind: Any = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[convolution_dims]
    options = {"kernel_size": 1} if convolution_dims else {}
    # On "meta", where no random numbers are drawn for weights that are replaced anyway.
    layer: nn.Module = kind(
        *reversed(weight.shape), **options, bias=bias is not None, device="meta"
    )
    layer.weight = nn.Parameter(
        weight.detach().clone().reshape(*weight.shape, *[1] * convolution_dims)
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class DecomposedLinear(nn.Module):
    r"""
    A linear layer in which every class uses its own filters only.

    With :math:`S_c` the filters of class *c*,

    .. math:: y_{nc} = \sum_{k \in S_c} V_{ck} z_{nk} + b_c ,

    the decomposed softmax of Badola et al. (https://arxiv.org/abs/2112.07719). Only the weights in
    the sets are parameters. They are stored sparsely, one value, class and feature index each, and
    sets may differ in size. The forward pass lays them out as a dense matrix and multiplies, which
    is faster than a gather on every device we measured, and exports to TorchScript,
    ``torch.export`` and ONNX. :func:`captum_classfilters.heads.refit.fit_linear` fits them to features.

    Args:

        weight (Tensor): Shape (C, F). The dense weights to take from.
        bias (Tensor, optional): Shape (C,).
        mask (Tensor): Shape (C, F), bool. Which features each class keeps.
        convolution_dims (int): 0 for inputs (N, F) or (..., F); 1, 2 or 3 for a 1x1 convolution's
                    (N, F, ...).
                    Default: 0

    Raises:
        ValueError: Shapes do not fit.

    Examples::

        >>> import torch
        >>> from captum_classfilters import DecomposedLinear
        >>> head = DecomposedLinear(
        ...     torch.tensor([[1., 2.], [3., 4.]]), torch.zeros(2),
        ...     mask=torch.tensor([[True, False], [False, True]]))
        >>> head(torch.tensor([[1., 1.]]))
        tensor([[1., 4.]], grad_fn=<AddmmBackward0>)
        >>> sum(parameter.numel() for parameter in head.parameters())
        4
    """

    class_index: Tensor
    feature_index: Tensor

    @arguments_checked
    def __init__(
        self, weight: Tensor, bias: Tensor | None, mask: Tensor, convolution_dims: int = 0
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) do not "
                "fit; expected two matrices (C, F), the mask of bool."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},).")
        self.out_features, self.in_features = weight.shape
        self.convolution_dims = convolution_dims
        index = mask.to(weight.device).nonzero()
        self.register_buffer("class_index", index[:, 0].contiguous())
        self.register_buffer("feature_index", index[:, 1].contiguous())
        self.weight = nn.Parameter(weight.detach()[index[:, 0], index[:, 1]].clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def dense_weight(self) -> Tensor:
        """The weights as a matrix (C, F), zero outside the sets; differentiable."""
        dense = torch.zeros(
            self.out_features,
            self.in_features,
            dtype=self.weight.dtype,
            device=self.weight.device,
        )
        return dense.index_put((self.class_index, self.feature_index), self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Logits from features.

        Args:

            features (Tensor): Shape (N, F), or (N, F, ...) for a 1x1 convolution.

        Returns:
            *Tensor* of shape (N, C), or (N, C, ...).
        """
        return linear_map(features, self.dense_weight(), self.bias, self.convolution_dims)

    @property
    def mask(self) -> Tensor:
        """Which features each class keeps (C, F), bool."""
        mask = torch.zeros(
            self.out_features, self.in_features, dtype=torch.bool, device=self.weight.device
        )
        mask[self.class_index, self.feature_index] = True
        return mask

    def to_dense(self) -> nn.Module:
        """The same function as an ordinary layer.

        Returns:
            *nn.Linear*, or an ``nn.Conv1d/2d/3d`` with kernel size 1.
        """
        layer = linear_layer(self.dense_weight(), self.bias, self.convolution_dims)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weights={self.weight.numel()}, bias={self.bias is not None}"
        )
