"""What a model puts out without some filters: the part up to the layer runs once per batch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from captum_classfilters._core.heads import Feed, how_layer_feeds, record_head
from captum_classfilters._core.layers import (
    check_batch,
    check_runs,
    filter_axis,
    layer_name,
    module_of,
    only_tensor,
    positions_last,
)
from captum_classfilters._core.replay.changed_filters import ChangedFilters, UnchangedSteps
from captum_classfilters._core.replay.repeated_batch import (
    CannotReplayError,
    RepeatedBatch,
    all_rows,
)

logger = logging.getLogger("captum_classfilters")

# Bytes that one replay may take, at four tensors of the layer's size for each row. On a CPU rows
# beyond the caches cost more than they save, unless there are fewer of them than weights to read
# for them (ResNet-18 `layer3`, 8 images: 0.16 of a forward pass a filter at 1 row, 0.10 at 4, 0.13
# at 16); an accelerator wants to be filled.
_MEMORY_BUDGET = {"cpu": 8 * 2**20, "other": 512 * 2**20}
_reported: set[str] = set()


@dataclass
class _Call:
    """One call of a module: the calls inside it and, if it ended before the layer, its result."""

    module: nn.Module | None = None
    calls: list["_Call"] = field(default_factory=list)
    finished: bool = False
    result: Any = None
    returned: int | None = None  # the argument that is itself the result, as of an in-place ReLU
    overwritten: list[tuple[int, Tensor]] = field(default_factory=list)


class SuffixReplay:
    r"""
    A batch that has run once, ready to be run on without some of a layer's filters.

    The first run records what every module put out that ended before the layer did. A replay calls
    the model again: those modules return their record, the layer returns its tensor with filters
    replaced, and only what follows is computed, for many replacements at once. Tensors that no
    replacement has reached yet are kept as one copy (:class:`RepeatedBatch`). Where the model ends
    in pooling and a linear layer, the change follows from the weights without any replay.

    Both ways are checked on the batch itself; a model that they cannot follow (random or batch
    dependent, a state kept between modules, data-parallel) is run as a whole for each
    replacement, and the log says so once.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module): The layer whose filters are replaced.
        inputs (tuple of Tensor): The batch, N images first.
        additional_forward_args (tuple, optional): Further arguments of the forward function.
                    Default: None
        at_input (bool): Replace filters of the layer's input.
                    Default: False
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        replacement (Callable, optional): From the layer's tensor to what stands in for a removed
                    filter's part of it, broadcastable to that tensor. By default zero.
        closed_form (bool): Use the weights of a linear head where it is fed by the layer.
                    Default: True
        cut (bool): Replay; otherwise always run the whole model.
                    Default: True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module,
        inputs: tuple[Tensor, ...],
        additional_forward_args: tuple[Any, ...] | None = None,
        at_input: bool = False,
        channel_dim: int | None = None,
        replacement: Callable[[Tensor], Tensor] | None = None,
        closed_form: bool = True,
        cut: bool = True,
    ) -> None:
        self.forward_func = forward_func
        self.layer = layer
        self.arguments = (*inputs, *(additional_forward_args or ()))
        self.at_input = at_input
        self.model = module_of(forward_func)
        self.name = layer_name(self.model, layer)
        self.num_images = len(inputs[0])
        if self.num_images == 0:
            raise ValueError("There are no images: the inputs have no rows.")
        self._root = _Call()
        self._weight: Tensor | None = None
        self._feed: Feed | None = None
        several = len(getattr(forward_func, "device_ids", None) or []) > 1
        self._cut = cut and not several
        self._one_by_one = False
        self._steps: tuple[Tensor, UnchangedSteps] | None = None
        with torch.no_grad():
            self._record(closed_form)
            self.axis = filter_axis(None if at_input else layer, self.activation, channel_dim)
            check_batch(self.name, len(self.activation), self.num_images)
            stands_in = replacement(self.activation) if replacement else 0 * self.activation[:1]
            self.stands_in = stands_in.to(self.activation).expand_as(self.activation)
            self._find_way(closed_form)

    @property
    def num_filters(self) -> int:
        """K."""
        return self.activation.shape[self.axis]

    @property
    def way(self) -> str:
        """How outputs are found: ``"closed form"``, ``"replay"`` or ``"whole model"``."""
        if self._feed is not None:
            return "closed form"
        return "replay" if self._cut else "whole model"

    def each_filter(self) -> Tensor:
        """Every filter removed by itself: the identity (K, K), bool."""
        return torch.eye(self.num_filters, dtype=torch.bool)

    def rows_per_replay(self, perturbations_per_eval: int | None = None) -> int:
        """How many replacements to run at once: as told, or as many as the memory budget holds."""
        if perturbations_per_eval is not None:
            return perturbations_per_eval
        size = max(1, self.activation.numel() * self.activation.element_size())
        budget = _MEMORY_BUDGET.get(self.activation.device.type, _MEMORY_BUDGET["other"])
        return max(1, max(budget, self._bytes_of_weights) // (4 * size))

    def outputs(self, removed: Tensor, perturbations_per_eval: int | None = None) -> Tensor:
        r"""
        The model's outputs without some filters.

        Args:

            removed (Tensor): Shape (P, K), bool, each row a set of filters to replace in all
                        images; or (P, N, K), a set for each image.
            perturbations_per_eval (int, optional): Rows per replay. By default sized to a memory
                        budget.

        Returns:
            *Tensor* of shape (P, N, ...): the output for each row.
        """
        return torch.cat([one for _, one in self.in_parts(removed, perturbations_per_eval)])

    def in_parts(
        self, removed: Tensor, perturbations_per_eval: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The same, one replay at a time: which rows they are, and their outputs.

        To be preferred to calling :meth:`outputs` for some rows at a time: what all rows have in
        common is then computed once.
        """
        common = removed.all(0)
        size = 1 if self.way == "whole model" else self.rows_per_replay(perturbations_per_eval)
        for start in range(0, len(removed), size):
            rows = slice(start, start + size)
            with torch.no_grad():
                yield rows, self._outputs(removed[rows], common)

    def _outputs(self, removed: Tensor, common: Tensor) -> Tensor:
        if self._feed is not None:
            return self._from_weights(removed)
        return self._replay(removed, common) if self._cut else self._whole(removed[0])[None]

    def drops_of_single_filters(self, classes: Tensor) -> Tensor | None:
        """Drop of each image's output for its class (N,) without each filter, (N, K), from the
        weights of the head; None where that is not how outputs are found."""
        if self._feed is None:
            return None
        assert self._weight is not None
        weight = self._weight[classes.to(self._weight.device)]
        return -(self._change * weight.reshape(self._change.shape)).sum(2)

    # -- the first run ---------------------------------------------------------------------------

    def _record(self, closed_form: bool) -> None:
        stack = [self._root]
        runs: list[int] = []

        def take(value: Any) -> None:
            runs.append(1)
            # In-place successors overwrite a layer's output, so what is kept is a copy.
            self.activation = only_tensor(value, self.name).clone()

        def run(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            call = _Call(module)
            stack[-1].calls.append(call)
            stack.append(call)
            before = _versions((args, kwargs))
            try:
                result = forward(*args, **kwargs)
            finally:
                stack.pop()
            # A layer's own record is needed: its hooks run on it before filters are replaced.
            if not runs and not (self.at_input and module is self.layer):
                call.finished, call.calls = True, []
                call.result = _copied(result)
                same = [one is result for one in _tensors((args, kwargs))]
                call.returned = same.index(True) if True in same else None
                call.overwritten = _overwritten((args, kwargs), before)
            return result

        with (
            record_head(self.model if closed_form else None) as head,
            self._tapped(take),
            _instead(self._watched() if self._cut else [], run),
        ):
            output = self.forward_func(*self.arguments)
        check_runs(self.name, len(runs))
        self.output = _tensor_output(output).clone()
        if head.is_output(output):
            self._features, self._weight = head.features, head.weight

    @cached_property
    def _bytes_of_weights(self) -> int:
        """Bytes of the parameters that a replay reads."""
        if self.model is None:
            return 0
        ended = {
            parameter
            for call in _ended(self._root)
            if call.module is not None
            for parameter in call.module.parameters()
        }
        rest = [one for one in self.model.parameters() if one not in ended]
        return sum(one.numel() * one.element_size() for one in rest)

    @contextmanager
    def _tapped(self, replace: Callable[[Any], Any]) -> Iterator[None]:
        """Pass the layer's tensor to a function; what it returns, if anything, takes its place."""

        def pre_hook(_module: nn.Module, inputs: Any) -> Any:
            replaced = replace(inputs)
            return None if replaced is None else (replaced,)

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            replaced = replace(output)
            single = isinstance(output, (tuple, list))
            return type(output)([replaced]) if single and replaced is not None else replaced

        handle = (
            self.layer.register_forward_pre_hook(pre_hook)
            if self.at_input
            else self.layer.register_forward_hook(hook)
        )
        try:
            yield
        finally:
            handle.remove()

    def _watched(self) -> list[nn.Module]:
        """Modules around the layer and beside it; what they call inside needs no record."""
        if self.model is None:
            return []
        everything = dict(self.model.named_modules(remove_duplicate=False))
        places = [name.split(".") for name, one in everything.items() if one is self.layer]
        above = {".".join(place[:end]) for place in places for end in range(len(place) + 1)}
        around = [everything[name] for name in above]
        watched = {id(one): one for one in around}
        beside = [child for one in around if one is not self.layer for child in one.children()]
        while beside:
            child = beside.pop()
            watched[id(child)] = child
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # never called themselves
                beside.extend(child.children())
        return list(watched.values())

    # -- three ways ------------------------------------------------------------------------------

    def _mask(self, removed: Tensor) -> Tensor:
        """(P, K) or (P, N, K) shaped to broadcast over (P, *activation)."""
        shape = [1] * (self.activation.dim() + 1)
        shape[0], shape[self.axis + 1] = removed.shape[0], removed.shape[-1]
        shape[1] = removed.shape[1] if removed.dim() == 3 else 1
        return removed.to(self.activation.device).reshape(shape)

    def _perturbed(self, removed: Tensor, common: Tensor) -> Tensor:
        """The layer's tensor without each row's filters, row after row."""
        apart = removed & ~common
        single = removed.dim() == 2 and int(apart.sum(1).max()) <= 1  # and the same for all images
        if not self._one_by_one or self.axis != 1 or not single:
            return torch.where(self._mask(removed), self.stands_in, self.activation).flatten(0, 1)
        if self._steps is None or not torch.equal(self._steps[0], common):
            self._steps = (common, UnchangedSteps())
        steps = self._steps[1].restart()
        base = steps.next(
            "layer",
            lambda: torch.where(self._mask(common[None])[0], self.stands_in, self.activation),
        )
        filters = apart.int().argmax(1).to(base.device)
        stands_in, as_it_is = (one[:, filters].movedim(1, 0) for one in (self.stands_in, base))
        is_removed = apart.any(1).to(base.device).reshape(-1, *[1] * (base.dim() - 1))
        return ChangedFilters(base, filters, torch.where(is_removed, stands_in, as_it_is), steps)

    def _replay(self, removed: Tensor, common: Tensor) -> Tensor:
        """Outputs without each row's filters, those that all rows lack given beside them."""
        copies = len(removed)
        perturbed = self._perturbed(removed, common)
        stack = [(self._root, iter(self._root.calls))]

        def run(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            # A call inside a module that began after the layer has nothing on record.
            call = next(stack[-1][1], None) if stack[-1][0] is not None else None
            if call is None or call.module is not module:
                raise CannotReplayError("modules ran in another order than before")
            if call.finished:
                _overwrite((args, kwargs), call.overwritten, copies)
                return _result_of(call, (args, kwargs), copies)
            stack.append((call, iter(call.calls)))
            try:
                return forward(*args, **kwargs)
            finally:
                stack.pop()

        arguments = [self._repeated(argument, copies) for argument in self.arguments]
        with self._tapped(lambda _value: perturbed), _instead(self._watched(), run):
            output = _tensor_output(all_rows(self.forward_func(*arguments)))
        if output.shape != (copies * self.output.shape[0], *self.output.shape[1:]):
            raise CannotReplayError("the output does not grow with the batch")
        return output.reshape(copies, *self.output.shape)

    def _repeated(self, argument: Any, copies: int) -> Any:
        aligned = isinstance(argument, Tensor) and argument.dim() > 0
        if aligned and len(argument) == self.num_images:
            return RepeatedBatch(argument.detach(), copies)
        return argument

    def _whole(self, removed: Tensor) -> Tensor:
        mask = self._mask(removed[None])[0]

        def replace(value: Any) -> Tensor:
            return torch.where(mask, self.stands_in, only_tensor(value, self.name))

        with self._tapped(replace):
            return _tensor_output(self.forward_func(*self.arguments))

    def _from_weights(self, removed: Tensor) -> Tensor:
        """Logits plus the change that the replaced filters' weights make of their change."""
        assert self._weight is not None
        rows = removed.to(self._change)
        rows = rows if rows.dim() == 3 else rows[:, None]
        change = rows[..., None] * self._change  # (P, N, K, P')
        return self.output + change.flatten(2) @ self._weight.T

    # -- which way holds -------------------------------------------------------------------------

    def _find_way(self, closed_form: bool) -> None:
        """Try a replay, and the closed form against it, on a few sets of filters.

        With nothing replaced a replay must be the recorded output. The other sets are there for
        what they might do to that one, through statistics of the batch, and for the closed form:
        what the batch shows of its head must also hold with filters replaced.
        """
        feed = self._change_at_head() if closed_form else None
        sets = torch.zeros(3, self.num_filters, dtype=torch.bool)
        sets[1] = True
        change = positions_last(self.stands_in - self.activation, self.axis)
        sets[2, int(change.abs().sum((0, 2)).argmax())] = True
        outputs = self._checked_replay(sets) if self._cut else None
        if feed:
            if outputs is None:
                outputs = torch.stack([self._whole(row) for row in sets])
            self._feed = feed if _alike(self._from_weights(sets), outputs) else None
        if outputs is not None and self._cut and self._feed is None:
            self._check_one_by_one(sets[::2], outputs[::2])

    def _checked_replay(self, sets: Tensor) -> Tensor | None:
        """A replay whose first set is empty; None, said once, if the model does not allow it."""
        try:
            outputs = self._replay(sets, sets.all(0))
            if _alike(outputs[0], self.output):
                return outputs
            reason = "a replay with nothing replaced differs from the model's output"
        except Exception as error:
            reason = str(error).split("\n")[0]
        self._cut = False
        message = f"{type(self.model or self.forward_func).__name__} at {self.name!r}"
        if message not in _reported:
            _reported.add(message)
            logger.warning("%s: the whole model runs for each filter (%s).", message, reason)
        return None

    def _check_one_by_one(self, sets: Tensor, expected: Tensor) -> None:
        """Follow each filter's change by itself where that gives the outputs of a full replay."""
        self._one_by_one = True
        try:
            self._one_by_one = _alike(self._replay(sets, sets.all(0)), expected)
        except Exception as error:
            self._one_by_one = False
            logger.debug("%s: filters are replaced in full (%s).", self.name, error)

    def _change_at_head(self) -> Feed | None:
        """How the layer seems to feed the head; keeps what changes there without each filter."""
        if self._weight is None or self._features is None or self._features.dim() != 2:
            return None
        feed = how_layer_feeds(self._features, self.activation, self.axis)
        change = positions_last(self.stands_in - self.activation, self.axis)
        self._change = change if feed == "flatten" else change.mean(2, keepdim=True)
        return feed


@contextmanager
def _instead(
    modules: list[nn.Module], run: Callable[[nn.Module, Any, Any, Any], Any]
) -> Iterator[None]:
    """Let a function stand in for the forward of some modules."""
    missing = object()
    found = [module.__dict__.get("forward", missing) for module in modules]

    def stand_in(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        return lambda *args, **kwargs: run(module, forward, args, kwargs)

    try:
        for module in modules:
            module.__dict__["forward"] = stand_in(module)
        yield
    finally:
        for module, forward in zip(modules, found, strict=True):
            if forward is missing:
                with suppress(KeyError):
                    del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _ended(call: _Call) -> Iterator[_Call]:
    """Calls that ended before the layer did."""
    for inner in call.calls:
        if inner.finished:
            yield inner
        yield from _ended(inner)


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree_flatten(value)[0] if isinstance(one, Tensor)]


def _versions(value: Any) -> list[int]:
    return [one._version for one in _tensors(value)]


def _copied(value: Any) -> Any:
    return tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, value)


def _overwritten(value: Any, before: list[int]) -> list[tuple[int, Tensor]]:
    """Arguments that a module changed in place: their position and new values."""
    return [
        (position, tensor.clone())
        for position, tensor in enumerate(_tensors(value))
        if tensor._version != before[position]
    ]


def _overwrite(value: Any, overwritten: list[tuple[int, Tensor]], copies: int) -> None:
    tensors = _tensors(value)
    for position, rows in overwritten:
        batch = tensors[position]
        if not isinstance(batch, RepeatedBatch):
            raise CannotReplayError("a module before the layer changes a tensor in place")
        batch.overwrite(rows, copies)


def _result_of(call: _Call, arguments: Any, copies: int) -> Any:
    if call.returned is not None:
        return _tensors(arguments)[call.returned]
    return tree_map(
        lambda one: RepeatedBatch(one, copies) if isinstance(one, Tensor) else one, call.result
    )


def _alike(left: Tensor, right: Tensor) -> bool:
    if not right.is_floating_point():
        return torch.equal(left, right)
    scale = max(1e-6, float(right.abs().max())) if right.numel() else 1.0
    return torch.allclose(left, right, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


def _tensor_output(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"The model puts out a {type(output).__name__}; expected one tensor, (N, C) say."
        )
    return output
