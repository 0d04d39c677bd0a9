"""A batch whose copies differ in one filter each, so that linear steps cost one filter's share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves, tree_map

from captum_classfilters._core.replay.repeated_batch import (
    POINTWISE,
    CannotReplayError,
    Copies,
    RepeatedBatch,
    all_rows,
    written_argument,
)
from captum_classfilters._core.types import Arguments, Keywords

T = TypeVar("T")
#: What an operation returns.
Outputs: TypeAlias = Tensor | tuple[Tensor, ...]
#: An operation, filter by filter; NotImplemented where all rows are needed.
Rule: TypeAlias = Callable[[OpOverload, Arguments, Keywords], Outputs]

_aten = torch.ops.aten
_BATCH_NORM = {
    _aten.native_batch_norm: 7,
    _aten._native_batch_norm_legit_no_training: 6,
    _aten.cudnn_batch_norm: 7,
}  # the position of epsilon
_POOLS = {_aten.max_pool2d_with_indices, _aten.avg_pool2d, _aten._adaptive_avg_pool2d}
_OVER_POSITIONS = {_aten.mean, _aten.amax}


class UnchangedSteps:
    """What the unchanged batch gives step by step, computed once for any number of replays."""

    def __init__(self) -> None:
        self._results: list[tuple[object, Any]] = []
        self._position = 0

    def restart(self) -> "UnchangedSteps":
        """Begin another replay of the same steps."""
        self._position = 0
        return self

    def next(self, name: object, step: Callable[[], T]) -> T:
        """The result of the next step."""
        if self._position == len(self._results):
            self._results.append((name, step()))
        self._position += 1
        recorded, result = self._results[self._position - 1]
        if recorded != name:
            raise CannotReplayError(f"{name} where {recorded} ran before")
        return result


class ChangedFilters(Copies):
    r"""
    P copies of a batch of N, each with another value in one filter.

    To the model it is a tensor of P * N rows with filters on axis 1. What acts on each filter alone
    (activations, batch normalization, pooling, depthwise convolutions) acts on the batch once and
    on the changed filters. The first convolution or linear layer adds each change's share to the
    unchanged batch's output. Any other operation sees all rows.

    Args:

        base (Tensor): The unchanged batch, shape (N, K, ...).
        filters (Tensor): Shape (P,). The filter that each copy changes.
        changed (Tensor): Shape (P, N, ...). That filter's values.
        steps (UnchangedSteps): What is known of the unchanged batch from earlier replays.
        flat (bool): Filters and positions have become one axis to the model.
                    Default: False
        is_view (bool): Another batch has the same values, so that they must not be written into.
                    Default: False
    """

    base: Tensor
    filters: Tensor
    changed: Tensor
    steps: UnchangedSteps
    flat: bool
    is_view: bool

    @staticmethod
    def __new__(
        cls,
        base: Tensor,
        filters: Tensor,
        changed: Tensor,
        steps: UnchangedSteps,
        flat: bool = False,
        is_view: bool = False,
    ) -> "ChangedFilters":
        each = (base[0].numel(),) if flat else base.shape[1:]
        batch: ChangedFilters = Tensor._make_wrapper_subclass(
            cls,
            (len(filters) * len(base), *each),
            dtype=base.dtype,
            device=base.device,
            requires_grad=False,
        )
        batch.base, batch.filters, batch.changed = base, filters, changed
        batch.steps, batch.flat, batch.is_view = steps, flat, is_view
        return batch

    def all_rows(self) -> Tensor:
        """All P * N rows, copy after copy, as a tensor that may be written into."""
        rows = self.base.expand(len(self.filters), *self.base.shape).clone()
        rows[self.places, :, self.filters] = self.changed
        return rows.reshape(self.shape)

    @property
    def change(self) -> Tensor:
        """What changes (P, N, ...)."""
        return self.changed - self.base[:, self.filters].movedim(1, 0)

    @property
    def places(self) -> Tensor:
        """The place of each copy, 0 to P - 1, on the batch's device."""
        return torch.ones_like(self.filters).cumsum(0) - 1

    def like(self, base: Tensor, changed: Tensor) -> "ChangedFilters":
        """The same filters with other values."""
        return ChangedFilters(base, self.filters, changed, self.steps, self.flat)

    def overwrite(self, other: "ChangedFilters") -> None:
        """Take another batch's values in place."""
        if self.is_view:
            raise CannotReplayError("an in-place operation on a view of a shared tensor")
        self.base, self.changed = other.base, other.changed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        """Run an operation filter by filter where that is exact, on all rows elsewhere."""
        kwargs = kwargs or {}
        written = written_argument(func, args, kwargs)
        rule = _rule(func.overloadpacket)
        result: Any = NotImplemented if rule is None else rule(func, args, kwargs)
        if isinstance(written, ChangedFilters):
            if not isinstance(result, ChangedFilters):
                raise CannotReplayError(f"{func} writes into a shared tensor")
            written.overwrite(result)
            return written
        if result is NotImplemented:
            return func(*_spread(args), **_spread(kwargs))
        if isinstance(written, RepeatedBatch):
            written.overwrite(all_rows(result), 1)
            return written
        return result


def _spread(value: T) -> T:
    """The value with every batch of this kind written out."""
    return tree_map(
        lambda leaf: leaf.all_rows() if isinstance(leaf, ChangedFilters) else leaf, value
    )


def _rule(packet: OpOverloadPacket) -> Rule | None:
    if packet in POINTWISE:
        return _pointwise
    if packet in _BATCH_NORM:
        return _batch_norm
    if packet in _POOLS:
        return _pool
    if packet in _OVER_POSITIONS:
        return _over_positions
    return _RULES.get(packet)


def _pointwise(func: OpOverload, args: Arguments, kwargs: Keywords) -> Outputs:
    """Activations, numbers, and sums of batches that differ in the same filters or in none."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    batches = [tensor for tensor in tensors if isinstance(tensor, ChangedFilters)]
    first = batches[0]
    full = [t for t in tensors if t.dim() and not isinstance(t, ChangedFilters)]
    if any(tensor.shape != first.shape for tensor in (*batches, *full)):
        return NotImplemented
    if any(b.filters is not first.filters or b.flat != first.flat for b in batches):
        return NotImplemented
    if all(_shared(tensor, first) for tensor in full):
        base = tree_map(lambda leaf: _base_of(leaf, func), (args, kwargs))
        values = tree_map(lambda leaf: _values_of(leaf, first, func), (args, kwargs))
        unchanged = first.steps.next(func, lambda: func(*base[0], **base[1]))
        return first.like(unchanged, func(*values[0], **values[1]))
    if func.overloadpacket in (_aten.add, _aten.add_) and len(batches) == 1 and len(args) == 2:
        return _added(func, args, kwargs)
    return NotImplemented


def _shared(tensor: Tensor, batch: ChangedFilters) -> bool:
    return isinstance(tensor, RepeatedBatch) and len(tensor.rows) == len(batch.base)


def _base_of(value: T, func: OpOverload) -> T | Tensor:
    # The rows may be a record: never write into them.
    if isinstance(value, ChangedFilters):
        return value.base.clone() if func._schema.is_mutable else value.base
    if isinstance(value, RepeatedBatch):
        return value.rows.clone() if func._schema.is_mutable else value.rows
    return value


def _values_of(value: T, batch: ChangedFilters, func: OpOverload) -> T | Tensor:
    if isinstance(value, ChangedFilters):
        return value.changed.clone() if func._schema.is_mutable else value.changed
    if isinstance(value, RepeatedBatch):
        rows = value.rows.reshape(batch.base.shape)
        return rows[:, batch.filters].movedim(1, 0).contiguous()
    return value


def _added(func: OpOverload, args: Arguments, kwargs: Keywords) -> Tensor:
    """Different rows plus a batch that differs in one filter: only that filter is spread."""
    if kwargs or isinstance(args[0], RepeatedBatch):
        return NotImplemented
    place = 0 if isinstance(args[0], ChangedFilters) else 1
    batch, rows = args[place], args[1 - place]
    if isinstance(rows, RepeatedBatch) or (place == 0 and func._schema.is_mutable):
        return NotImplemented
    several = rows.reshape(len(batch.filters), *batch.base.shape)
    changed = several[batch.places, :, batch.filters] + batch.changed
    total: Tensor = several.add_(batch.base) if func._schema.is_mutable else several + batch.base
    total[batch.places, :, batch.filters] = changed
    if not func._schema.is_mutable:
        return total.reshape(rows.shape)
    if total.data_ptr() != rows.data_ptr():  # not viewed, but copied
        rows.copy_(total.reshape(rows.shape))
    return rows


def _batch_norm(func: OpOverload, args: Arguments, _kwargs: Keywords) -> Outputs:
    batch, weight, bias, mean, variance = args[:5]
    without_training = func.overloadpacket is _aten._native_batch_norm_legit_no_training
    if not isinstance(batch, ChangedFilters) or batch.flat or mean is None:
        return NotImplemented
    if not without_training and args[5]:
        return NotImplemented
    scale = (variance + args[_BATCH_NORM[func.overloadpacket]]).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    base, *others = batch.steps.next(func, lambda: func(batch.base, *args[1:]))
    shape = (-1, *[1] * (batch.changed.dim() - 1))
    values = batch.changed * scale[batch.filters].reshape(shape)
    values = values + shift[batch.filters].reshape(shape)
    return (batch.like(base, values.to(base.dtype)), *others)


def _pool(func: OpOverload, args: Arguments, kwargs: Keywords) -> Outputs:
    batch = args[0]
    if batch.flat or batch.base.dim() != 4:
        return NotImplemented
    base = batch.steps.next(func, lambda: func(batch.base, *args[1:], **kwargs))
    values = func(batch.changed, *args[1:], **kwargs)
    if isinstance(base, tuple):
        return tuple(batch.like(*pair) for pair in zip(base, values, strict=True))
    return batch.like(base, values)


def _over_positions(func: OpOverload, args: Arguments, kwargs: Keywords) -> Outputs:
    batch = args[0]
    if batch.flat or len(args) < 2 or not isinstance(args[1], (list, tuple)) or not args[1]:
        return NotImplemented
    axes = sorted({axis % batch.dim() for axis in args[1]})
    if axes[0] < 2:
        return NotImplemented
    # The values lack the axis of the filters but have that of the copies.
    base = batch.steps.next(func, lambda: func(batch.base, axes, *args[2:], **kwargs))
    return batch.like(base, func(batch.changed, axes, *args[2:], **kwargs))


def _view(func: OpOverload, args: Arguments, _kwargs: Keywords) -> Outputs:
    """Only the steps that flatten filters and positions, or drop single positions."""
    batch, shape = args[0], list(args[1])
    if len(shape) != 2 or shape[0] not in (-1, len(batch)) or batch.flat:
        return NotImplemented
    if shape[1] not in (-1, batch.base[0].numel()) or shape == [-1, -1]:
        return NotImplemented
    return ChangedFilters(
        batch.base, batch.filters, batch.changed, batch.steps, flat=True, is_view=True
    )


def _cat(func: OpOverload, args: Arguments, kwargs: Keywords) -> Outputs:
    parts, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    changed = [part for part in parts if isinstance(part, ChangedFilters)]
    first = changed[0]
    if len(changed) > 1 or first.flat or axis % first.dim() != 1:
        return NotImplemented
    if not all(part is first or _shared(part, first) for part in parts):
        return NotImplemented
    before = 0
    for part in parts:
        if part is first:
            break
        before += part.shape[1]
    base = first.steps.next(
        func, lambda: func([part.base if part is first else part.rows for part in parts], 1)
    )
    return ChangedFilters(base, first.filters + before, first.changed, first.steps)


def _convolution(func: OpOverload, args: Arguments, _kwargs: Keywords) -> Outputs:
    batch, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if not isinstance(batch, ChangedFilters) or batch.flat or batch.base.dim() != 4 or transposed:
        return NotImplemented
    width = batch.base.shape[1]
    if groups != 1 and not groups == width == len(weight):
        return NotImplemented
    base = batch.steps.next(func, lambda: func(batch.base, *args[1:]))
    if groups != 1:
        values = F.conv2d(
            batch.changed.transpose(0, 1),
            weight[batch.filters],
            None if bias is None else bias[batch.filters],
            stride,
            padding,
            dilation,
            len(batch.filters),
        )
        return batch.like(base, values.transpose(0, 1).contiguous())
    change, kernels = batch.change, weight[:, batch.filters].movedim(1, 0)  # (P, C, kh, kw)
    if weight.shape[2:].numel() == 1 and not any(padding):
        points = change[:, :, None, :: stride[0], :: stride[1]]
        return torch.addcmul(base, kernels[:, None], points).flatten(0, 1)
    patches = F.unfold(
        change.flatten(0, 1)[:, None], weight.shape[2:], dilation, padding, stride
    )  # (P * N, kh * kw, positions)
    # As many small products as rows; each adds to the unchanged output.
    kernels = kernels.flatten(2)[:, None].expand(-1, len(base), -1, -1).flatten(0, 1)
    unchanged = base.flatten(2).repeat(len(change), 1, 1)
    return unchanged.baddbmm_(kernels, patches).unflatten(2, base.shape[2:])


def _linear(func: OpOverload, args: Arguments, kwargs: Keywords) -> Outputs:
    """``addmm`` of a bias, the batch and a transposed weight, or ``mm`` without the bias."""
    batch, weight = args[-2], args[-1]
    if not isinstance(batch, ChangedFilters) or batch.dim() != 2 or kwargs:
        return NotImplemented
    flat = batch.base.flatten(1)
    base = batch.steps.next(func, lambda: func(*args[:-2], flat, weight))
    rows = weight.unflatten(0, (batch.base.shape[1], -1))[batch.filters]  # (P, positions, C)
    change = batch.change.reshape(len(rows), len(flat), -1)
    return torch.baddbmm(base.expand(len(rows), *base.shape), change, rows).flatten(0, 1)


_RULES: dict[OpOverloadPacket, Rule] = {
    _aten.convolution: _convolution,
    _aten.addmm: _linear,
    _aten.mm: _linear,
    _aten.cat: _cat,
    _aten.view: _view,
    _aten._unsafe_view: _view,
}
