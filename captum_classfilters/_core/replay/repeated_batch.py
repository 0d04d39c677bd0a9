"""A batch that stands for several copies of itself, so that shared work is done once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

_aten = torch.ops.aten
# Operations that treat the images of a batch alike, one by one, with axis 0 the batch throughout.
# With weights as the only other tensors they may run on one copy for all.
_IMAGE_BY_IMAGE = {
    _aten.convolution,
    _aten.native_batch_norm,
    _aten._native_batch_norm_legit_no_training,
    _aten.cudnn_batch_norm,
    _aten.max_pool2d_with_indices,
    _aten.avg_pool2d,
    _aten._adaptive_avg_pool2d,
}
POINTWISE = {
    _aten.relu,
    _aten.relu_,
    _aten.sigmoid,
    _aten.tanh,
    _aten.silu,
    _aten.silu_,
    _aten.gelu,
    _aten.leaky_relu,
    _aten.leaky_relu_,
    _aten.hardtanh,
    _aten.hardtanh_,
    _aten.hardswish,
    _aten.hardswish_,
    _aten.clone,
    _aten.detach,
    _aten.add,
    _aten.add_,
    _aten.sub,
    _aten.mul,
    _aten.mul_,
    _aten.div,
    _aten.threshold,
}


class CannotReplayError(RuntimeError):
    """The model does something that a replay cannot follow; run the whole model instead."""


class RepeatedBatch(Tensor):
    r"""
    ``copies`` times the same N rows, kept once.

    To the model it is a tensor of ``copies * N`` rows. Operations on such batches alone stay on the
    N rows where the result cannot differ; any other operation sees all rows.

    Args:

        rows (Tensor): The N rows, shape (N, ...).
        copies (int): How often they count.
    """

    rows: Tensor
    copies: int
    is_view: bool

    @staticmethod
    def __new__(cls, rows: Tensor, copies: int, is_view: bool = False) -> "RepeatedBatch":
        shape = (rows.shape[0] * copies, *rows.shape[1:])
        batch: RepeatedBatch = Tensor._make_wrapper_subclass(
            cls, shape, dtype=rows.dtype, device=rows.device, requires_grad=False
        )
        batch.rows, batch.copies, batch.is_view = rows, copies, is_view
        return batch

    def all_rows(self) -> Tensor:
        """All ``copies * N`` rows, copy after copy."""
        if self.copies == 1:
            return self.rows
        return self.rows.repeat(self.copies, *[1] * (self.rows.dim() - 1))

    def overwrite(self, rows: Tensor, copies: int) -> None:
        """Take other values in place."""
        if self.is_view:
            raise CannotReplayError("an in-place operation on a view of a shared tensor")
        self.rows, self.copies = rows, copies

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on one copy where that is exact, on all rows elsewhere."""
        if any(one is not RepeatedBatch for one in types):
            return NotImplemented  # the other kind knows what to do with both
        kwargs = kwargs or {}
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        batches = [one for one in tensors if isinstance(one, RepeatedBatch)]
        copies = batches[0].copies
        shared = _stays_shared(func, args, kwargs, tensors, batches)
        written = written_argument(func, args)
        if not shared and _broadcasts(func, tensors, batches, written):
            apart = tree_map(lambda one: _apart(one, copies), (args, kwargs))
            result = func(*apart[0], **apart[1])  # writes through a view, where it writes
            return result.reshape(batches[0].shape) if written is None else written
        operands = tree_map(_rows if shared else _all_rows, (args, kwargs))
        if isinstance(written, RepeatedBatch):
            # The rows may be a record, or shared with another batch: never write into them.
            target = operands[0][0].clone() if operands[0][0] is written.rows else operands[0][0]
            result = func(target, *operands[0][1:], **operands[1])
            written.overwrite(result, copies if shared else 1)
            return written
        result = func(*operands[0], **operands[1])
        if not shared:
            return result
        is_view = func.is_view
        return tree_map(
            lambda one: _repeat(one, copies, is_view) if isinstance(one, Tensor) else one, result
        )


def all_rows(value: Any) -> Any:
    """The value with every shared batch written out."""
    return tree_map(_all_rows, value)


def _repeat(rows: Tensor, copies: int, is_view: bool) -> Any:
    # Batch normalisation also hands out empty tensors that nobody reads.
    return RepeatedBatch(rows, copies, is_view) if rows.numel() else rows


def _rows(value: Any) -> Any:
    return value.rows if isinstance(value, RepeatedBatch) else value


def _all_rows(value: Any) -> Any:
    return value.all_rows() if hasattr(value, "all_rows") else value


def _broadcasts(
    func: Any, tensors: list[Tensor], batches: list[RepeatedBatch], written: Any
) -> bool:
    """Whether full tensors can be computed with the one copy, without writing it out."""
    full = [one for one in tensors if one.dim()]
    return (
        func.overloadpacket in POINTWISE
        and not isinstance(written, RepeatedBatch)
        and len({(one.copies, len(one.rows)) for one in batches}) == 1
        and all(one.shape == batches[0].shape for one in full)
        and all(one.is_contiguous() for one in full if not isinstance(one, RepeatedBatch))
    )


def _apart(value: Any, copies: int) -> Any:
    """Copies on an axis of their own, or one copy that broadcasts over it."""
    if isinstance(value, RepeatedBatch):
        return value.rows
    if isinstance(value, Tensor) and value.dim():
        return value.unflatten(0, (copies, -1))
    return value


def written_argument(func: Any, args: tuple[Any, ...]) -> Any:
    """The tensor that an operation writes into, if it does; of ours, only the first may be one."""
    if not func._schema.is_mutable:
        return None
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else None
        if position and hasattr(value, "all_rows"):
            raise CannotReplayError(f"{func} writes into a shared tensor")
        if not position:
            return value
    return None


def _stays_shared(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    batches: list[RepeatedBatch],
) -> bool:
    """Whether an operation may run on one copy of its batches."""
    if len({(batch.copies, len(batch.rows)) for batch in batches}) != 1 or "out" in kwargs:
        return False
    others = len(tensors) - len(batches)
    packet = func.overloadpacket
    rule: Callable[..., bool] | None = _RULES.get(packet)
    if rule is not None:
        return others == 0 and rule(args)
    if packet in POINTWISE:
        same_rank = len({batch.dim() for batch in batches}) == 1
        return same_rank and all(
            isinstance(one, RepeatedBatch) or one.dim() == 0 for one in tensors
        )
    if packet in _IMAGE_BY_IMAGE:
        training = packet is _aten.native_batch_norm and bool(args[5])
        first = isinstance(args[0], RepeatedBatch) and args[0].dim() == 4
        return first and len(batches) == 1 and not training
    if packet is _aten.addmm:
        return isinstance(args[1], RepeatedBatch) and len(batches) == 1 and args[0].dim() == 1
    return False


def _not_the_batch(dim: int, rank: int) -> bool:
    return dim % rank != 0


_RULES: dict[Any, Callable[..., bool]] = {
    _aten.cat: lambda args: _not_the_batch(args[1] if len(args) > 1 else 0, args[0][0].dim()),
    _aten.mean: lambda args: (
        len(args) > 1
        and isinstance(args[1], (list, tuple))
        and len(args[1]) > 0
        and all(_not_the_batch(dim, args[0].dim()) for dim in args[1])
    ),
    _aten.slice: lambda args: _not_the_batch(args[1] if len(args) > 1 else 0, args[0].dim()),
    _aten.constant_pad_nd: lambda args: len(args[1]) < 2 * args[0].dim(),
}
