"""The model comes back exactly as found, and one thread at a time works on it."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, takewhile
from pathlib import Path
from traceback import walk_stack
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_FORWARD = nn.Module._call_impl.__code__
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()
# How deep the stack was where this thread first entered a model's lock.
_entered = threading.local()
_INSIDE = (str(Path(__file__).parent.parent), contextlib.__file__)


@contextmanager
def model_left_as_found(
    model: nn.Module | None, *, evaluation: bool = False, freeze: bool = False
) -> Iterator[None]:
    r"""Restore training flags, ``requires_grad``, ``grad``, and the random state on exit.

    Hooks are not this guard's business: whoever registers one removes it. The guard holds
    references, not copies, so it costs no memory. Another thread that wants the same model, or a
    wrapper of it, waits until the block ends; the same thread may enter again, but not from within a
    forward pass of the model: its layers are being read there.

    Args:

        model (nn.Module or None): The model to guard; ``None`` guards the random state only.
        evaluation (bool): Put every module into evaluation mode inside the block.
        freeze (bool): Switch ``requires_grad`` off for every parameter inside the block, so that
                    a backward pass stops at the layer of interest.

    Raises:
        ValueError: The block is entered in a hook of the same model's modules, while another such
                    block runs the model.
    """
    if model is None:
        with _random_state():
            yield
        return
    check_sizes(model)
    with held(model), _random_state(), flags_restored(model):
        if evaluation:
            _switch_to_evaluation(model)
        if freeze:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        yield


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """A block after which training flags, ``requires_grad`` and ``grad`` are as before; each of them,
    even if one cannot be restored."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            stack.callback(_restore, parameter, parameter.requires_grad, parameter.grad)
        yield


def _restore(parameter: nn.Parameter, requires_grad: bool, gradient: Tensor | None) -> None:
    if parameter.requires_grad != requires_grad:
        # Of a tensor made in inference mode it is switched on there alone.
        with torch.inference_mode(parameter.is_inference()):
            parameter.requires_grad_(requires_grad)
    parameter.grad = gradient


@contextmanager
def weights_change() -> Iterator[None]:
    """A block that trains, or changes weights between runs: gradients are recorded, whatever the
    caller switched off, and a surrounding ``torch.autocast`` keeps its type, but casts weights anew at
    each run. By itself it keeps casts until it ends, so that all runs would see the first weights."""
    cached = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            torch.clear_autocast_cache()  # what the caller has run there before


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """A block in which no other thread works on a model; refused inside one of its forward passes
    that this package runs, where its layers are being read."""
    lock = _lock_of(model)
    with lock, _entering(model, lock):
        try:
            yield
        except RuntimeError as error:
            if "nference tensor" in str(error):
                check_ordinary(model)
            raise


def check_ordinary(model: nn.Module) -> None:
    """Raise if a model has tensors that autograd cannot keep and training cannot change."""
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        raise ValueError(
            f"{type(model).__name__} has parameters or buffers that were made, or converted, under "
            "torch.inference_mode(): PyTorch takes no gradients through them and does not change "
            "them. Outside of that mode, copy.deepcopy(model) has ordinary ones."
        )


@contextmanager
def _entering(model: nn.Module, lock: threading.RLock) -> Iterator[None]:
    depths: dict[int, int] = vars(_entered).setdefault("depths", {})
    frames = [frame for frame, _ in walk_stack(sys._getframe(4))]
    if id(lock) in depths:
        modules = {id(module) for module in model.modules()}
        for frame in frames[: len(frames) - depths[id(lock)]]:
            if frame.f_code is _FORWARD and id(frame.f_locals["self"]) in modules:
                raise ValueError(
                    f"A forward pass of {type(model).__name__} that this package runs is not over: a "
                    f"hook of its {type(frame.f_locals['self']).__name__}, or a forward method, calls "
                    "the package again for the same model. Call it after the first call has "
                    "returned."
                )
        yield
        return
    own = takewhile(lambda frame: frame.f_code.co_filename.startswith(_INSIDE), frames)
    depths[id(lock)] = len(frames) - len(list(own))  # at the user's line
    try:
        yield
    finally:
        del depths[id(lock)]


def check_sizes(model: nn.Module) -> None:
    """Raise if a model has parameters without a size."""
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has lazy modules, which get their size from the first input; "
            "run the model once on a batch, then it can be used here."
        )


def _switch_to_evaluation(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError as error:
        raise ValueError(
            f"{type(model).__name__} is made from an exported program, which has no evaluation mode "
            "and no layers any more; give the module that it was exported from."
        ) from error


@contextmanager
def _random_state() -> Iterator[None]:
    state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _forget_locks() -> None:
    """Locks of a process that was forked, a loader's worker for example: other threads that had them
    are not in it, and would never give them back."""
    global _locks, _locks_guard
    _locks, _locks_guard = WeakKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_locks)


def _lock_of(model: nn.Module) -> threading.RLock:
    """One lock for a model and all its wrappers: that of the module that owns its first parameter."""
    owner = next((m for m in model.modules() if next(m.parameters(False), None) is not None), model)
    with _locks_guard:
        return _locks.setdefault(owner, threading.RLock())
