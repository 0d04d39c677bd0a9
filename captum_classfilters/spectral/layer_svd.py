"""The singular directions of one layer's weight."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.linear_maps import run_with_weight
from captum_classfilters._core.tables import short_repr
from captum_classfilters.spectral.routes import Method, choose_route, decompose
from captum_classfilters.spectral.weight_matrix import WeightMatrix, weight_matrix

_METHODS = ("auto", "direct", "gram", "randomized")


@short_repr
@dataclass(frozen=True)
class LayerSVD:
    r"""
    Singular value decomposition of a layer's unfolded weight, :math:`\bar W = U S V^\top`.

    Direction *a* pairs a left vector, a combination of the layer's d output filters, with a right
    vector, a filter over its input. With G groups there is one decomposition for each group, of r
    directions; the R = G r directions are ordered by group, and by falling value inside a group.

    Args:

        blocks (Tensor): Left vectors, shape (G, d / G, r): each group's over its own filters.
        values (Tensor): Singular values, shape (R,), in the units of the weight.
        right (Tensor, optional): Right vectors, shape (R, c / G, kh, kw) for a convolution (with
                    as many kernel axes as it has) and (R, in) for a linear layer.
        kind (str): ``"convolution"``, ``"transposed convolution"`` or ``"linear"``.
        columns (int): Entries of one unfolded filter, n = (c / G) kh kw.
        route (str): How it was found: ``"direct"``, ``"gram"`` or ``"randomized"``.
    """

    blocks: Tensor
    values: Tensor
    right: Tensor | None
    kind: str
    columns: int
    route: str

    def __len__(self) -> int:
        return len(self.values)

    @property
    def groups(self) -> int:
        """G."""
        return int(self.blocks.shape[0])

    @property
    def num_filters(self) -> int:
        """The layer's output filters, d."""
        return int(self.blocks.shape[0] * self.blocks.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one group's matrix, (d / G, n)."""
        return int(self.blocks.shape[1]), self.columns

    @property
    def complete(self) -> bool:
        """Whether all directions are here, none cut off by ``rank``."""
        return self.blocks.shape[2] == min(self.shape)

    @cached_property
    def left(self) -> Tensor:
        """All left vectors over all filters, shape (d, R): block by block on the diagonal."""
        return self.blocks[0] if self.groups == 1 else torch.block_diag(*self.blocks)

    @property
    def channel_axis(self) -> int:
        """Axis of the filters in the layer's output: 1 for convolutions, -1 for linear layers."""
        return -1 if self.kind == "linear" else 1

    def signals(self, output_minus_bias: Tensor) -> Tensor:
        r"""
        Project a layer's output on the left vectors, :math:`P = U^\top (y - b)`.

        Args:

            output_minus_bias (Tensor): The layer's output without its bias, (N, d, ...) for a
                        convolution and (N, ..., d) for a linear layer.

        Returns:
            *Tensor* of the same shape with R directions in place of d filters.

        Raises:
            ValueError: The output does not have d filters.
        """
        axis = self.channel_axis
        if output_minus_bias.dim() < 2 or output_minus_bias.shape[axis] != self.num_filters:
            raise ValueError(
                f"The decomposition is of a {self.kind} of {self.num_filters} filters; an output "
                f"of shape {tuple(output_minus_bias.shape)} does not have them on axis {axis}."
            )
        blocks = self.blocks.to(output_minus_bias)
        if self.groups == 1 and axis == -1:
            return output_minus_bias @ blocks[0]
        # (N, G, d / G, P): a batched matrix product without moving the maps in memory.
        outputs = output_minus_bias.movedim(axis, 1)
        grouped = outputs.reshape(len(outputs), self.groups, -1, outputs[0, 0].numel())
        signals = torch.matmul(blocks.mT, grouped)
        return signals.reshape(len(outputs), len(self), *outputs.shape[2:]).movedim(1, axis)

    def signals_from_input(self, module: nn.Module, inputs: Tensor) -> Tensor:
        r"""
        The same signals from the layer's input, :math:`P = S \, \mathrm{conv}(x, V)`.

        Args:

            module (nn.Module): The layer, for its stride, padding and dilation.
            inputs (Tensor): Its input.

        Returns:
            *Tensor* as :meth:`signals` returns.

        Raises:
            ValueError: The right vectors were not asked for.
        """
        return run_with_weight(module, self.input_weight().to(inputs), inputs)

    def input_weight(self) -> Tensor:
        r"""
        :math:`S V^\top` as the weight of a layer of the same kind with R filters.

        Returns:
            *Tensor* of shape (R, c / G, kh, kw), (R, in), or (c, R / G, kh, kw) for a transposed
            convolution.

        Raises:
            ValueError: The right vectors were not asked for.
        """
        right = self._right()
        weight = self.values.reshape(-1, *[1] * (right.dim() - 1)) * right
        if self.kind == "transposed convolution":
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight

    def truncate(self, rank: int) -> "LayerSVD":
        """The first ``rank`` directions of each group.

        Args:

            rank (int): How many to keep.

        Returns:
            *LayerSVD*.

        Raises:
            ValueError: There are fewer.
        """
        held = self.blocks.shape[2]
        check_rank(rank, held, f"the decomposition of {held} directions")
        keep = torch.arange(len(self), device=self.values.device).reshape(self.groups, held)
        kept = keep[:, :rank].flatten()
        right = None if self.right is None else self.right[kept]
        return replace(self, blocks=self.blocks[..., :rank], values=self.values[kept], right=right)

    def to(self, device: torch.device | str) -> "LayerSVD":
        """The same on another device.

        Args:

            device (torch.device or str): Where to.

        Returns:
            *LayerSVD*.
        """
        right = None if self.right is None else self.right.to(device)
        return replace(
            self, blocks=self.blocks.to(device), values=self.values.to(device), right=right
        )

    def _right(self) -> Tensor:
        if self.right is None:
            raise ValueError("The right vectors were not kept; decompose with right=True.")
        return self.right


@arguments_checked
def layer_svd(
    module: nn.Module, *, rank: int | None = None, method: Method = "auto", right: bool = True
) -> LayerSVD:
    r"""
    Decompose the weight of a convolution or linear layer into singular directions.

    Every filter is one row of :math:`\bar W` (d, c kh kw); :math:`\bar W = U S V^\top` is its thin
    singular value decomposition, and for the layer's output *y* with bias *b*

    .. math:: U^\top (y - b) = S \; \mathrm{conv}(x, V)

    holds exactly, for any stride, padding and dilation. Signs are fixed: the entry of each left
    vector that is largest in size is positive.

    Source: Praggastis et al.: *The SVD of Convolutional Weights: A CNN Interpretability Framework*
    (2022), https://arxiv.org/abs/2208.06894. Groups, which a single decomposition of the whole
    weight would mix, have one decomposition each.

    Args:

        module (nn.Module): A ``Conv1d``, ``Conv2d``, ``Conv3d``, their transposed forms, or a
                    ``Linear``; also pruned or parametrized ones. The weight is the one that the
                    layer computes with; a layer that computes another map is refused.
        rank (int, optional): Keep this many directions (of each group); by default all.
                    Default: None
        method (str): ``"direct"`` (LAPACK), ``"gram"`` (eigenvectors of the smaller Gram matrix, in
                    float64), ``"randomized"`` (a sketch, for few directions of a large weight; its
                    values are lower bounds) or ``"auto"``, which chooses by size. The result's
                    ``route`` says which one it was.
                    Default: "auto"
        right (bool): Also return the right vectors, which need as much memory as the weight.
                    Default: True

    Returns:
        *LayerSVD*.

    Raises:
        ValueError: The module has no weight that is a matrix from channels to channels, the weight
                    is quantized, NaN or infinite, or not what the layer computes, or ``rank`` exceeds
                    the number of directions.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import layer_svd
        >>> layer = torch.nn.Conv2d(3, 8, 3, stride=2)
        >>> svd = layer_svd(layer)
        >>> svd.left.shape, svd.values.shape, svd.right.shape
        (torch.Size([8, 8]), torch.Size([8]), torch.Size([8, 3, 3, 3]))
        >>> images = torch.rand(4, 3, 9, 9)
        >>> signals = svd.signals(layer(images) - layer.bias[:, None, None])
        >>> torch.allclose(signals, svd.signals_from_input(layer, images), atol=1e-5)
        True
    """
    return matrix_svd(weight_matrix(module), type(module).__name__, rank, method, right)


def matrix_svd(
    weight: WeightMatrix, called: str, rank: int | None, method: Method, right: bool
) -> LayerSVD:
    """The decomposition of an unfolded weight."""
    check_method(method)
    groups, rows, columns = weight.matrices.shape
    possible = min(rows, columns)
    if rank is not None:
        each = f"{called}, whose {'groups have matrices' if groups > 1 else 'weight is a matrix'}"
        check_rank(rank, possible, f"{each} of {rows} rows and {columns} columns")
    route = choose_route(rows, columns, rank, method)
    with torch.no_grad():
        left, values, rows_right, route = decompose(weight.matrices, rank, route, right)
    folded = None if rows_right is None else rows_right.reshape(-1, *weight.folded)
    return LayerSVD(left, values.flatten(), folded, weight.kind, columns, route)


def check_method(method: str) -> None:
    """Raise if there is no such route."""
    if method not in _METHODS:
        raise ValueError(f"method={method!r}; choose one of {', '.join(_METHODS)}.")


def check_rank(rank: int, possible: int | None, what: str) -> None:
    """Raise if there are not that many directions, of any number if ``possible`` is None."""
    if rank < 1 or (possible is not None and rank > possible):
        end = "up" if possible is None else f"to {possible}"
        raise ValueError(f"rank={rank} is not possible for {what}; choose one from 1 {end}.")
