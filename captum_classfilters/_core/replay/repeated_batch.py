"""A batch that stands for several copies of itself, so that shared work is done once."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from captum_classfilters._core.types import Arguments, Keywords

T = TypeVar("T")

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


class Copies(Tensor):
    """Stands for several copies of a batch; to the model, a tensor of that many rows."""

    def all_rows(self) -> Tensor:
        """All rows, copy after copy, as a tensor that may be written into."""
        raise NotImplementedError


class RepeatedBatch(Copies):
    r"""
    ``copies`` times the same N rows, kept once.

    To the model it is a tensor of ``copies * N`` rows. Operations on such batches alone stay on the
    N rows where the result cannot differ; any other operation sees all rows.

    Args:

        rows (Tensor): The N rows, shape (N, ...).
        copies (int): How often they count.
        is_view (bool): Another batch has the same rows, so that they must not be written into.
                    Default: False
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
        """All ``copies * N`` rows, copy after copy, as a tensor that may be written into."""
        return self.rows.repeat(self.copies, *[1] * (self.rows.dim() - 1))

    def overwrite(self, rows: Tensor, copies: int) -> None:
        """Take other values in place."""
        if self.is_view:
            raise CannotReplayError("an in-place operation on a view of a shared tensor")
        self.rows, self.copies = rows, copies

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        """Run an operation on one copy where that is exact, on all rows elsewhere."""
        if any(issubclass(kind, Copies) and kind is not RepeatedBatch for kind in types):
            return NotImplemented  # the other kind knows what to do with both
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        batches = [tensor for tensor in tensors if isinstance(tensor, RepeatedBatch)]
        copies = batches[0].copies
        written = written_argument(func, args, kwargs)
        shared = _stays_shared(func, args, kwargs, tensors, batches)
        if isinstance(written, RepeatedBatch):
            return _write(func, args, kwargs, shared)
        if shared:
            result = func(*_one_copy(args), **_one_copy(kwargs))
            # Batch normalization also hands out empty tensors that nobody reads.
            return tree_map_only(
                Tensor,
                lambda rows: RepeatedBatch(rows, copies, func.is_view) if rows.numel() else rows,
                result,
            )
        if _broadcasts(func, tensors, batches):
            apart, options = tree_map(lambda leaf: _apart(leaf, copies), (args, kwargs))
            result = func(*apart, **options)  # writes through a view, where it writes
            return result.reshape(batches[0].shape) if written is None else written
        return func(*all_rows(args), **all_rows(kwargs))


def all_rows(value: T) -> T:
    """The value with every batch that stands for copies written out."""
    return tree_map_only(Copies, lambda batch: batch.all_rows(), value)


def written_argument(func: OpOverload, args: Arguments, kwargs: Keywords) -> Any:
    """The tensor that an operation writes into, if it does; of ours, only the first may be one."""
    if not func._schema.is_mutable:
        return None
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if position == 0:
            return value
        if isinstance(value, Copies):
            raise CannotReplayError(f"{func} writes into a shared tensor")
    return None


def _one_copy(value: T) -> T:
    return tree_map_only(RepeatedBatch, lambda batch: batch.rows, value)


def _write(func: OpOverload, args: Arguments, kwargs: Keywords, shared: bool) -> RepeatedBatch:
    """An operation in place: the rows may be a record, or shared, so they are never written into."""
    written: RepeatedBatch = args[0]
    target = written.rows.clone() if shared else written.all_rows()
    others, options = (_one_copy if shared else all_rows)((args[1:], kwargs))
    written.overwrite(func(target, *others, **options), written.copies if shared else 1)
    return written


def _broadcasts(func: OpOverload, tensors: list[Tensor], batches: list[RepeatedBatch]) -> bool:
    """Whether full tensors can be computed with the one copy, without writing it out."""
    full = [tensor for tensor in tensors if tensor.dim()]
    return (
        func.overloadpacket in POINTWISE
        and len({(batch.copies, len(batch.rows)) for batch in batches}) == 1
        and all(tensor.shape == batches[0].shape for tensor in full)
        and all(t.is_contiguous() for t in full if not isinstance(t, RepeatedBatch))
    )


def _apart(value: T, copies: int) -> T | Tensor:
    """Copies on an axis of their own, or one copy that broadcasts over it."""
    if isinstance(value, RepeatedBatch):
        return value.rows
    if isinstance(value, Tensor) and value.dim():
        return value.unflatten(0, (copies, -1))
    return value


def _stays_shared(
    func: OpOverload,
    args: Arguments,
    kwargs: Keywords,
    tensors: list[Tensor],
    batches: list[RepeatedBatch],
) -> bool:
    """Whether an operation may run on one copy of its batches."""
    if len({(batch.copies, len(batch.rows)) for batch in batches}) != 1 or "out" in kwargs:
        return False
    packet, only_batches = func.overloadpacket, len(tensors) == len(batches)
    rule: Callable[..., bool] | None = _RULES.get(packet)
    if rule is not None:
        return only_batches and rule(args)
    if packet in POINTWISE:
        same_rank = len({batch.dim() for batch in batches}) == 1
        return same_rank and all(isinstance(t, RepeatedBatch) or t.dim() == 0 for t in tensors)
    if packet in _IMAGE_BY_IMAGE:
        training = packet in (_aten.native_batch_norm, _aten.cudnn_batch_norm) and bool(args[5])
        first = isinstance(args[0], RepeatedBatch) and args[0].dim() == 4
        return first and len(batches) == 1 and not training
    if packet is _aten.addmm:
        return isinstance(args[1], RepeatedBatch) and len(batches) == 1 and args[0].dim() == 1
    return False


def _not_the_batch(axis: int, rank: int) -> bool:
    return axis % rank != 0


_RULES: dict[OpOverloadPacket, Callable[..., bool]] = {
    _aten.cat: lambda args: _not_the_batch(args[1] if len(args) > 1 else 0, args[0][0].dim()),
    _aten.mean: lambda args: (
        len(args) > 1
        and isinstance(args[1], (list, tuple))
        and len(args[1]) > 0
        and all(_not_the_batch(axis, args[0].dim()) for axis in args[1])
    ),
    _aten.slice: lambda args: _not_the_batch(args[1] if len(args) > 1 else 0, args[0].dim()),
    _aten.constant_pad_nd: lambda args: len(args[1]) < 2 * args[0].dim(),
}
