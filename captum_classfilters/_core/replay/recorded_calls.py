"""What the modules before a layer returned in one run, so that later runs begin at the layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from captum_classfilters._core.replay.repeated_batch import CannotReplayError, RepeatedBatch
from captum_classfilters._core.types import Arguments, ForwardFunc, Keywords

_MISSING = object()


@dataclass
class ModuleCall:
    """One call of a module: the calls inside it and, if it ended before the layer, its result."""

    module: nn.Module | None = None
    calls: list["ModuleCall"] = field(default_factory=list)
    ended: bool = False
    result: object = None
    returned: int | None = None  # the argument that is itself the result, as of an in-place ReLU
    overwritten: list[tuple[int, Tensor]] = field(default_factory=list)

    def end(
        self, result: object, arguments: object, before: list[Tensor], versions: list[int]
    ) -> None:
        """Keep what the module returned, and which of its arguments it wrote into.

        A module that fills a list among its arguments is not over: a replay runs it again.
        """
        tensors = _tensors(arguments)
        if [id(tensor) for tensor in tensors] != [id(tensor) for tensor in before]:
            return
        same = [tensor is result for tensor in tensors]
        self.ended, self.calls = True, []
        self.result = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), result)
        self.returned = same.index(True) if True in same else None
        self.overwritten = [
            (position, tensor.detach().clone())
            for position, tensor in enumerate(tensors)
            if _version(tensor) != versions[position]
        ]

    def again(self, arguments: object, copies: int | None) -> object:
        """What the module would return, and write, for so many copies of the batch; plain tensors
        for None."""
        tensors = _tensors(arguments)
        for position, rows in self.overwritten:
            batch = tensors[position]
            if copies is None:
                batch.copy_(rows)
            elif isinstance(batch, RepeatedBatch):
                batch.overwrite(rows, copies)
            else:
                raise CannotReplayError("a module before the layer changes a tensor in place")
        if self.returned is not None:
            return tensors[self.returned]
        return tree_map_only(
            Tensor,
            lambda rows: rows.clone() if copies is None else RepeatedBatch(rows, copies),
            self.result,
        )


class RecordedCalls:
    r"""
    The calls of a model's modules in one run, down to where the layer ran.

    Only modules around the layer and beside it are watched; what these call inside is not called
    again in a replay, so it needs no record.

    Args:

        model (nn.Module, optional): The model. Without one nothing is recorded, and a replay runs
                    everything.
        layer (nn.Module): The layer.
    """

    def __init__(self, model: nn.Module | None, layer: nn.Module) -> None:
        self._layer = layer
        self._watched = [] if model is None else _around(model, layer)
        self._root = ModuleCall()

    @contextmanager
    def recording(self, layer_has_run: Callable[[], object]) -> Iterator[None]:
        """Record the run in the block."""
        stack = [self._root]

        def run(
            module: nn.Module, forward: ForwardFunc, args: Arguments, kwargs: Keywords
        ) -> object:
            call = ModuleCall(module)
            stack[-1].calls.append(call)
            stack.append(call)
            before = _tensors((args, kwargs))
            versions = [_version(tensor) for tensor in before]
            try:
                result = forward(*args, **kwargs)
            finally:
                stack.pop()
            # The layer itself ends before its hooks run, in which filters are replaced.
            if not layer_has_run():
                call.end(result, (args, kwargs), before, versions)
            return result

        with _instead(self._watched, run):
            yield

    @contextmanager
    def replaying(self, copies: int | None) -> Iterator[None]:
        """Let modules that ended before the layer return their record in the block.

        With copies, those after it are checked to run in the recorded order.
        """
        stack = [(self._root, iter(self._root.calls))]
        reached = False

        def run(
            module: nn.Module, forward: ForwardFunc, args: Arguments, kwargs: Keywords
        ) -> object:
            nonlocal reached
            if reached and copies is None:
                return forward(*args, **kwargs)
            reached |= module is self._layer
            call = next(stack[-1][1], None)
            if call is None or call.module is not module:
                raise CannotReplayError("modules ran in another order than before")
            if call.ended:
                return call.again((args, kwargs), copies)
            stack.append((call, iter(call.calls)))
            try:
                return forward(*args, **kwargs)
            finally:
                stack.pop()

        with _instead(self._watched, run):
            yield

    def ended_modules(self) -> Iterator[nn.Module]:
        """The modules that a replay does not run."""
        for call in self._all_calls():
            if call.ended and call.module is not None:
                yield call.module

    def num_bytes(self) -> int:
        """Bytes of what is recorded."""
        kept = ((call.result, call.overwritten) for call in self._all_calls())
        return sum(t.numel() * t.element_size() for value in kept for t in _tensors(value))

    def replaced(self, module: nn.Module, other: nn.Module) -> None:
        """Have another module stand where this one stood."""
        self._layer = other if self._layer is module else self._layer
        self._watched = [other if watched is module else watched for watched in self._watched]
        for call in self._all_calls():
            if call.module is module:
                call.module = other

    def _all_calls(self) -> Iterator[ModuleCall]:
        pending = [self._root]
        while pending:
            call = pending.pop()
            pending.extend(call.calls)
            yield call


def _around(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The layer, the modules that contain it, and those beside one of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [name.split(".") for name, module in modules.items() if module is layer]
    containing = {".".join(path[:end]) for path in paths for end in range(len(path) + 1)}
    watched = {id(modules[name]): modules[name] for name in containing}
    beside = [
        child
        for module in list(watched.values())
        if module is not layer
        for child in module.children()
    ]
    while beside:
        module = beside.pop()
        watched[id(module)] = module
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # never called themselves
            beside.extend(module.children())
    return list(watched.values())


@contextmanager
def _instead(
    modules: Sequence[nn.Module],
    run: Callable[[nn.Module, ForwardFunc, Arguments, Keywords], object],
) -> Iterator[None]:
    """Let a function stand in for the forward of some modules."""
    before = [vars(module).get("forward", _MISSING) for module in modules]

    def stand_in(module: nn.Module) -> ForwardFunc:
        forward = module.forward
        return lambda *args, **kwargs: run(module, forward, args, kwargs)

    try:
        for module in modules:
            vars(module)["forward"] = stand_in(module)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is _MISSING:
                with suppress(KeyError):
                    del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version
