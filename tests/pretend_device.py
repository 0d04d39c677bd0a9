"""A device for tests on machines without an accelerator: it computes on the CPU, and refuses what an
accelerator refuses.

``with pretend("cuda") as device:`` moves models and tensors there as usual. Operations that mix
tensors of the device with tensors of the CPU raise, and so do conversions to NumPy. Whenever a value
travels from the device to the host, which on an accelerator waits for all work in flight, a line is
added to :data:`host_reads`, so that a test can count them. Backward passes need
``pretend("meta")``: on a machine without CUDA, autograd has no thread for a CUDA device.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = {"cuda": torch.device("cuda", 0), "meta": torch.device("meta")}
# What the host has read since the last block began: the operation, and the line of code it is in.
host_reads: list[str] = []

_aten = torch.ops.aten
# Operations after which the host knows a value, or a size that depends on values.
_READS = {
    _aten._local_scalar_dense: "item",  # bool(), int(), float() and `if` end here, too
    _aten.equal: "equal",
    _aten.allclose: "allclose",
    _aten.nonzero: "nonzero",
    _aten.masked_select: "masked_select",
    _aten.bincount: "bincount",
    _aten._unique2: "unique",
    _aten.unique_dim: "unique",
    _aten.unique_consecutive: "unique_consecutive",
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_COPIES = {_aten._to_copy, _aten.copy_, _aten.set_}


class DeviceTensor(Tensor):
    """A tensor of the pretended device; its values lie in a tensor of the host."""

    on_host: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> "DeviceTensor":
        tensor: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
            requires_grad=False,
        )
        tensor.on_host = values
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The device's tensors stay its own after the block, too."""
        return _run(func, args, kwargs or {}) if _is_ours(types) else NotImplemented

    def data_ptr(self) -> int:
        """Where the values lie."""
        return self.on_host.data_ptr()

    def tolist(self) -> Any:
        """The values as Python numbers."""
        _note("tolist")
        return self.on_host.tolist()

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused, as by every accelerator."""
        raise TypeError(f"A tensor of {self.device} has no NumPy form; copy it with Tensor.cpu().")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceTensor":
        if id(self) not in memo:
            copied: Any = self.detach().clone().requires_grad_(self.requires_grad)
            # What else it carries: that it is a parameter, for example.
            copied.__dict__.update({**self.__dict__, "on_host": copied.on_host})
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.on_host!r}, device={self.device})"


class _Pretending(TorchDispatchMode):
    """Sees the operations that no tensor of the device takes part in, such as copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}) if _is_ours(types) else NotImplemented


def _is_ours(types: Any) -> bool:
    """Whether no class of the code under test takes part, which may hold tensors of ours."""
    return all(kind in (Tensor, nn.Parameter, DeviceTensor) for kind in types)


def _from_numbers(make: Callable[..., Tensor], in_method: bool = False) -> Callable[..., Tensor]:
    """What makes tensors of Python numbers, which PyTorch copies to a device by itself."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device", args[0].device if in_method else None)
        source = args[0] if args and not in_method else None
        if device is None or torch.device(device).type == "cpu" or isinstance(source, Tensor):
            return make(*args, **kwargs)
        return make(*args, **{**kwargs, "device": "cpu"}).to(device)

    return made


@contextmanager
def pretend(kind: str = "cuda") -> Iterator[torch.device]:
    """A device that is called "cuda" or, for backward passes, "meta" exists in the block."""
    future = torch.__future__
    overwrite = future.get_overwrite_module_params_on_conversion()
    if not torch.cuda.is_available():
        if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
            pytest.skip(f"PyTorch {torch.__version__} can pretend no device; 2.4 can.")
        torch._C._ensureCUDADeviceGuardSet()
    host_reads.clear()
    with ExitStack() as stack:
        # A parameter is of another class on the device, so it cannot be moved in place.
        future.set_overwrite_module_params_on_conversion(True)
        stack.callback(future.set_overwrite_module_params_on_conversion, overwrite)
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for name in ("tensor", "as_tensor", "asarray"):
            made = _from_numbers(getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, made))
        made = _from_numbers(Tensor.new_tensor, in_method=True)
        stack.enter_context(mock.patch.object(Tensor, "new_tensor", made))
        stack.enter_context(_Pretending())
        yield DEVICES[kind]


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; the results lie where an accelerator's would."""
    device = _device(args, kwargs)
    if device is None:  # nothing to do with the pretended device
        return func(*args, **kwargs)
    _refuse(func, args, kwargs, device)
    to_host = _goes_to_host(func, args, kwargs, device)
    _note_reads(func, args, kwargs, to_host)
    written = _written(func, args, kwargs)
    host_kwargs = {name: _on_host(value) for name, value in kwargs.items()}
    if kwargs.get("device") is not None:
        host_kwargs["device"] = torch.device("cpu")
    result = func(*map(_on_host, args), **host_kwargs)
    if written:  # as in place and with `out=`: the same objects are returned
        return written[0] if isinstance(result, Tensor) else type(result)(written)
    if to_host:
        return result
    return _on_device(result, device)


def _leaves(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The single arguments of an operation; some are lists, none are nested deeper."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _on_host(value: Any) -> Any:
    """An argument with the values of the device's tensors."""
    if isinstance(value, DeviceTensor):
        return value.on_host
    return [*map(_on_host, value)] if isinstance(value, (list, tuple)) else value


def _on_device(result: Any, device: torch.device) -> Any:
    """A result with tensors of the device."""
    if isinstance(result, (list, tuple)):
        return type(result)(_on_device(value, device) for value in result)
    return DeviceTensor(result, device) if isinstance(result, Tensor) else result


def _device(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The pretended device, if an operation has to do with it."""
    for leaf in _leaves(args, kwargs):
        if isinstance(leaf, DeviceTensor):
            return leaf.device
    asked = kwargs.get("device")
    return None if asked is None else DEVICES.get(torch.device(asked).type)


def _goes_to_host(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> bool:
    """Whether the result of an operation that has to do with the device lies on the CPU."""
    asked = kwargs.get("device")
    if asked is not None:
        return torch.device(asked).type != device.type
    return func.overloadpacket in _COPIES and not isinstance(args[0], DeviceTensor)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes into and returns."""
    written = []
    for returned in func._schema.returns:
        if returned.alias_info is None or not returned.alias_info.is_write:
            continue
        for position, argument in enumerate(func._schema.arguments):
            alias = argument.alias_info
            if alias is not None and alias.before_set == returned.alias_info.before_set:
                inside = position < len(args)
                written.append(args[position] if inside else kwargs[argument.name])
    return written


def _refuse(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> None:
    """Raise where an accelerator would: mixed devices, a generator of the CPU."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"{func}: the generator is on {generator.device}, not on {device}.")
    if func.overloadpacket in _COPIES:
        return
    if func.overloadpacket in _INDEXING and isinstance(args[0], DeviceTensor):
        args = (args[0], *args[2:])  # an index may lie on the CPU
    tensors = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor)]
    on_host = [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim()]
    if on_host and len(on_host) < len(tensors):
        raise RuntimeError(
            f"{func}: expected all tensors on the same device, but found {device} and cpu."
        )


def _note_reads(func: Any, args: Any, kwargs: dict[str, Any], to_host: bool) -> None:
    """Note what makes the host wait for the device."""
    packet = func.overloadpacket
    if packet in _READS:
        _note(_READS[packet])
    elif to_host and any(isinstance(leaf, DeviceTensor) for leaf in _leaves(args, kwargs)):
        _note("copy to the host")
    elif packet in _INDEXING:
        indices = [t for t in args[1] if isinstance(t, DeviceTensor)]
        single = len(args) > 2 and args[2].numel() == 1  # filled in without a wait
        if not single and any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            _note("indexing with a mask")
    elif packet is _aten.repeat_interleave and kwargs.get("output_size") is None:
        _note("repeat_interleave")


def _note(operation: str) -> None:
    """Remember a read, and the nearest line outside of PyTorch that makes it."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    host_reads.append(f"{operation} in {frame.f_code.co_filename}:{frame.f_lineno}")
