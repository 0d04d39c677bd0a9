"""Finding layers, their names and the axis that holds their filters."""

import dataclasses
import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from captum_classfilters._core.arguments import whole_number
from captum_classfilters._core.names import hint, kind_of
from captum_classfilters._core.types import ForwardFunc

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding)


def module_of(forward_func: ForwardFunc | None, layers: Sequence[object] = ()) -> nn.Module | None:
    r"""
    The model behind a forward function: itself, the owner of a bound method, or, for any other
    function, the module it refers to (in its closure, its globals or as a bound argument) that
    contains the layers.
    """
    if forward_func is None or isinstance(forward_func, nn.Module):
        return forward_func
    _check_not_exported(forward_func)
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]
    for value in _referred_to(forward_func):
        if isinstance(value, nn.Module) and _contains(value, modules):
            return value
    return None


def check_module(model: object) -> None:
    """Raise if a model is a function around a module, or compiled to what has no layers any more."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"The model is compiled by TorchScript ({type(model).__name__}), whose layers cannot be "
            "followed; give the module that it was made from."
        )
    if not isinstance(model, nn.Module):
        _check_not_exported(model)
        raise ValueError(
            f"The model is {kind_of(model)}, in which layers cannot be listed, replaced or cut; "
            "give the module inside it. A module for another output is ClassScores(model, scores)."
        )


def _check_not_exported(model: object) -> None:
    if type(model).__name__ == "ExportedProgram":
        raise ValueError(
            "An ExportedProgram has no layers any more; give the module that it was exported from."
        )


def _referred_to(function: Any) -> Iterator[Any]:
    """What a function has at hand when it is called."""
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        yield from ([function.func] if isinstance(function.func, nn.Module) else ())
        yield from _referred_to(function.func)
        return
    owner = getattr(function, "__self__", None)
    if owner is not None:
        yield owner
        yield from vars(owner).values() if hasattr(owner, "__dict__") else ()
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__"):  # an object with __call__
        yield from vars(function).values() if hasattr(function, "__dict__") else ()
        return
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a cell that is still empty
            yield cell.cell_contents
            if isinstance(cell.cell_contents, _FUNCTIONS):
                yield from _referred_to(cell.cell_contents)
    yield from (
        function.__globals__[name]
        for name in function.__code__.co_names
        if name in function.__globals__
    )
    yield from function.__defaults__ or ()


def _contains(model: nn.Module, layers: list[nn.Module]) -> bool:
    inside = {id(module) for module in model.modules()}
    return all(id(layer) in inside for layer in layers)


class ModelWrapper(nn.Module):
    """A module around a model whose layers keep the model's names."""

    wrapped_model: nn.Module


_WRAPPED = {"_orig_mod"}  # what torch.compile calls the module it wraps


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DataParallel``, ``DistributedDataParallel``, ``torch.compile`` and this
    package's own wrappers, whose layer names are everybody's."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, ModelWrapper):
            model = model.wrapped_model
        else:
            return model


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their plain names, those without the names of wrappers; the model
    itself is ``""``. A module that has several names is there under each."""
    named = unwrapped(model).named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in named}


def plain_name(name: str) -> str:
    """A dotted name without the parts that ``torch.compile`` adds."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def module_named(model: nn.Module, name: str) -> Any:
    """The module of a plain name that is known to be one; the model itself is ``""``."""
    return _walked(unwrapped(model), name, past_wrappers=True)


def _walked(model: nn.Module, name: str, past_wrappers: bool = False) -> nn.Module | None:
    """The module at a dotted name if there is one; wrappers on the way may have no name."""
    module: Any = model
    for part in name.split(".") if name else ():
        if module is None or part not in module._modules:  # of a scripted module, no dictionary
            return None
        module = module._modules[part]
        while past_wrappers and module is not None and "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
    return module


def find_layer(model: nn.Module | None, name: str) -> nn.Module:
    """The submodule with this dotted name; the error names the nearest ones."""
    if model is None:
        raise ValueError(
            f"The layer is given by its name, {name!r}, but the forward function is neither a "
            "module nor a function in which a module is found; pass the layer's module instead of "
            "its name."
        )
    for module in (module_named(model, name), _walked(model, name)):  # or with names of wrappers
        if name and module is not None:
            return module
    own_name = type(unwrapped(model)).__name__
    keys = [key for key in named_layers(model) if key]
    raise ValueError(f"The model {own_name} has no layer {name!r}. {hint(name, keys, 'layers')}")


def layer_name(model: nn.Module | None, layer: nn.Module | None) -> str:
    """The plain dotted name of a layer in its model, or its class name if it is not found there."""
    if model is not None:
        for name, module in unwrapped(model).named_modules():
            if module is layer:
                return plain_name(name) or type(layer).__name__
    return type(layer).__name__


def name_of(model: nn.Module, layer: nn.Module | str) -> str:
    """The dotted name of a layer given by itself or by its name, which must be the model's."""
    if isinstance(layer, str):
        find_layer(model, layer)
        return layer
    if not isinstance(layer, nn.Module):
        raise ValueError(
            f"A layer is given by itself or by its dotted name, not by {kind_of(layer)}."
        )
    if not any(module is layer for module in model.modules()):
        raise ValueError(
            f"The given {type(layer).__name__} is not a layer of this {type(model).__name__}; pass the "
            "layer's dotted name, which its copies have, too."
        )
    return layer_name(model, layer)


def find_layers(
    model: nn.Module, layers: str | nn.Module | Sequence[str | nn.Module]
) -> dict[str, nn.Module]:
    """One layer or several, given as modules or dotted names, by their names."""
    several = [layers] if isinstance(layers, (str, nn.Module)) else layers
    found = {}
    for layer in several:
        name = name_of(model, layer)
        module = layer if isinstance(layer, nn.Module) else find_layer(model, name)
        found[layer_name(model, module)] = module
    return found


def declared_filters(layer: nn.Module) -> int | None:
    """The number of filters that the last weighted module inside a layer declares, if any."""
    declared = None
    for module in layer.modules():
        width = _width(module)
        declared = width if width is not None else declared
    return declared


def weighted_before(model: nn.Module | None, layer: nn.Module | None) -> nn.Module | None:
    """The weighted leaf registered before a layer, whose filters a layer without weights has."""
    if model is None or layer is None:
        return None
    return weighted_before_each(model).get(layer)


def weighted_before_each(model: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """The same of every module of a model."""
    before: nn.Module | None = None
    known: dict[nn.Module, nn.Module | None] = {}
    for module in model.modules():
        known[module] = before
        before = module if _width(module) else before
    return known


def filters_before(model: nn.Module | None, layer: nn.Module) -> int | None:
    """The number of filters that the weighted module registered before a layer declares, if any."""
    before = weighted_before(model, layer)
    return None if before is None else _width(before)


_MOST_POSITIONS_AXES = 3  # of maps: (N, K, D, H, W)
_WIDTHS = ("num_features", "num_channels")  # of normalizations
_PUTS_OUT = ("out_channels", "out_features", *_WIDTHS)
_TAKES = ("in_channels", "in_features", *_WIDTHS)


def _width(module: nn.Module, names: Sequence[str] = _PUTS_OUT) -> int | None:
    """Filters that one weighted leaf puts out, or takes; None for anything else."""
    for attribute in names:
        if isinstance(module, _CHANNELS_FIRST + _CHANNELS_LAST) and hasattr(module, attribute):
            return int(getattr(module, attribute))
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return int(module.normalized_shape[0])
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim)
    return None


def layer_layout(module: nn.Module | None) -> Literal["first", "last"] | None:
    """Where one weighted leaf puts its channels; None where its class does not say."""
    if isinstance(module, _CHANNELS_FIRST):
        return "first"
    if isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward:
        return _tried_layout(module)  # it may well normalize axis 1 of (N, K, H, W)
    return "last" if isinstance(module, _CHANNELS_LAST) else None


def _tried_layout(norm: nn.LayerNorm) -> Literal["first", "last"] | None:
    """Where a normalization with a forward of its own has its channels: which form it takes."""
    if len(norm.normalized_shape) != 1 or list(norm.children()):  # these may be hooked
        return None
    width = int(norm.normalized_shape[0])
    other = 3 if width == 2 else 2
    like = torch.empty(0) if norm.weight is None else norm.weight
    taken: list[Literal["first", "last"]] = []
    with torch.no_grad():
        with suppress(Exception):  # whatever a foreign forward raises, it does not take this
            type(norm).forward(norm, like.new_ones(1, width, other, other))
            taken.append("first")
        with suppress(Exception):
            type(norm).forward(norm, like.new_ones(1, other, other, width))
            taken.append("last")
    return taken[0] if len(taken) == 1 else None


def layer_axis(
    model: nn.Module | None,
    layer: nn.Module | None,
    tensor: Tensor,
    channel_dim: int | None = None,
    at_input: bool = False,
) -> int:
    """Which axis of the tensor that a layer of a model puts out, or takes, holds the filters."""
    says = layer is None or (declared_filters(layer) is not None and not at_input)
    before = None if says else weighted_before(model, layer)  # a walk through the whole model
    return filter_axis(layer, tensor, channel_dim, before, at_input)


def attribution_axis(method: Any, attributions: Tensor, at_input: bool = False) -> int:
    """Which axis of what a layer attribution returned holds the filters. A method of Captum has no
    ``channel_dim``, but may be given one."""
    told: int | None = getattr(method, "channel_dim", None)
    model = module_of(method.forward_func, [method.layer])
    try:
        return layer_axis(model, method.layer, attributions, told, at_input)
    except UnknownAxisError as error:
        raise ValueError(f"{error} As an attribute: method.channel_dim = -1, say.") from None


def filter_axis(
    layer: nn.Module | None,
    tensor: Tensor,
    channel_dim: int | None = None,
    before: nn.Module | None = None,
    at_input: bool = False,
) -> int:
    r"""Which axis of a layer's tensor holds the filters: 1, or the last.

    Two-dimensional tensors are (N, K). Elsewhere a convolution or batch normalization says 1, a
    linear layer or layer normalization says the last axis. A block of convolutions says 1. A block
    with linear layers inside follows the last of its weighted modules whose number of filters is the
    size of axis 1 or of the last axis. If it is the size of both, or if convolutions are inside too and
    as many modules say the other axis, or none has such a number, the block cannot be read without
    ``channel_dim``. A layer without weights, a ReLU for example, has the filters of the weighted module
    ``before`` it, if that is known and one axis has their number; with none before it, maps are read in
    PyTorch's order (N, K, ...). The last axis is not taken for the filters of a convolution that puts
    out another number of axes, unless it embeds patches: it may run later. What a block takes has its
    filters where the first weighted module inside says, if they are as many as that takes, else where
    the module ``before`` left them.
    ``channel_dim`` overrules all.
    """
    if tensor.dim() < 2:
        raise ValueError(
            f"The layer {type(layer).__name__} puts out a tensor of shape {tuple(tensor.shape)}, "
            "which has no channel dimension; a layer needs (N, K), (N, K, L), (N, K, H, W), "
            "(N, K, D, H, W) or a channels-last form of these."
        )
    if channel_dim is not None:
        return _told_axis(channel_dim, tensor)
    last = tensor.dim() - 1
    if last == 1 or layer is None:
        return 1
    leaves = [leaf for leaf in layer.modules() if _width(leaf) is not None]
    if at_input and leaves and leaves != [layer]:
        axis = {"first": 1, "last": last}.get(layer_layout(leaves[0]) or "")
        if axis and tensor.shape[axis] == _width(leaves[0], _TAKES):
            return axis
        leaves = []
    if not leaves:
        return _axis_after(before, layer, tensor)
    layouts = {layer_layout(leaf) for leaf in leaves} - {None}
    if leaves == [layer] and layouts:
        return 1 if layouts == {"first"} else last
    if layouts == {"first"}:
        return last if _moved_last(leaves[-1], tensor) or _flattened(leaves, layer, tensor) else 1
    return _axis_of_leaves(leaves, layer, tensor, mixed=layouts != {"last"})


def _axis_of_leaves(
    leaves: Sequence[nn.Module], layer: nn.Module, tensor: Tensor, mixed: bool
) -> int:
    """The axis whose size is the number of filters of a block's last weighted module that has the
    size of one. In a block of both layouts most others must agree, as a small module may by chance be
    as wide as a map; without convolutions, none may contradict axis 1, where no module inside has its
    filters (those of a gating unit's linear layer are tokens)."""
    last = tensor.dim() - 1
    sizes = tensor.shape[1], tensor.shape[last]
    fitting = [width for width in map(_width, leaves) if width in sizes]
    if fitting and sizes[0] == sizes[1]:
        raise _unknown_axis(
            layer, tensor, f"both have the size of the {fitting[-1]} filters inside"
        )
    if mixed and not fitting:
        raise _unknown_axis(layer, tensor, "neither has the size of a weighted module inside")
    if mixed and 2 * fitting.count(fitting[-1]) <= len(fitting):
        raise _unknown_axis(layer, tensor, "weighted modules inside have the size of either")
    if not fitting or fitting[-1] == sizes[1]:
        return last
    if not mixed and sizes[1] in fitting:
        raise _unknown_axis(layer, tensor, "weighted modules inside have the size of either")
    return 1


def _told_axis(channel_dim: int, tensor: Tensor) -> int:
    if whole_number(channel_dim) is None:
        raise ValueError(
            f"channel_dim={channel_dim!r} is no axis; expected a whole number, 1 or -1."
        )
    axis = channel_dim % tensor.dim() if -tensor.dim() <= channel_dim < tensor.dim() else 0
    if axis == 0:
        raise ValueError(
            f"channel_dim={channel_dim} does not name a channel axis of a tensor of shape "
            f"{tuple(tensor.shape)}; axis 0 is the batch."
        )
    return axis


def _axis_after(before: nn.Module | None, layer: nn.Module, tensor: Tensor) -> int:
    """The axis of the filters in what a layer without weights makes of a weighted one's output."""
    last = tensor.dim() - 1
    if before is None:
        if last > _MOST_POSITIONS_AXES + 1:
            raise _unknown_axis(layer, tensor, "no weighted module is before it")
        return 1
    first_fits, last_fits = (tensor.shape[axis] == _width(before) for axis in (1, last))
    of = f"the size of the {_width(before)} filters of the {type(before).__name__} before it"
    stays = layer_layout(before) == "first" and tensor.dim() == _dimensions(before, tensor)
    # What a one-dimensional batch normalization took may have been tokens in one row.
    if stays and (first_fits or not isinstance(before, nn.BatchNorm1d)):
        if last_fits and not first_fits:
            raise _unknown_axis(layer, tensor, f"the last has {of}, or a map is as wide by chance")
        if last_fits and not _keeps_axes(layer, tensor.dim()):
            raise _unknown_axis(layer, tensor, f"both have {of}")
        return 1  # maps of a convolution stay maps; other widths come from concatenation
    if first_fits == last_fits:
        raise _unknown_axis(layer, tensor, f"{'both have' if first_fits else 'neither has'} {of}")
    if last_fits and _puts_out_maps(before) and tensor.dim() != _dimensions(before, tensor):
        # Modules are known in the order in which they were made: it may well run later.
        raise _unknown_axis(layer, tensor, f"the last has {of}, which may run later")
    if first_fits and isinstance(before, nn.Linear) and before.in_features == before.out_features:
        # It may have mixed tokens, whose number is then no number of filters.
        raise _unknown_axis(layer, tensor, f"axis 1 has {of}, which puts them on its last axis")
    return 1 if first_fits else last


def _puts_out_maps(leaf: nn.Module) -> bool:
    """Whether filters of a weighted leaf are on axis 1, and only another module moves them last; patches
    that a convolution embeds become tokens by custom."""
    if isinstance(leaf, nn.modules.conv._ConvNd):
        return leaf.kernel_size != leaf.stride or set(leaf.stride) == {1}
    return layer_layout(leaf) == "first" and not isinstance(leaf, nn.BatchNorm1d)


def _keeps_axes(layer: nn.Module, dimensions: int) -> bool:
    """Whether a module without weights leaves filters on axis 1: PyTorch's do; a foreign one is
    tried on a few numbers."""
    if type(layer).__module__.startswith("torch.nn.modules."):
        return all(_keeps_axes(child, dimensions) for child in layer.children())
    if list(layer.children()):  # these may be hooked
        return False
    sizes = (1, 2, 3, 5, 7, 11)[:dimensions]
    with torch.no_grad(), suppress(Exception):  # whatever a foreign forward raises
        made = type(layer).forward(layer, torch.zeros(sizes))
        return isinstance(made, Tensor) and made.dim() == dimensions and made.shape[1] == sizes[1]
    return False


def _dimensions(leaf: nn.Module, tensor: Tensor) -> int:
    """Axes of what a convolution puts out; of normalizations, those of the tensor at hand."""
    if isinstance(leaf, nn.modules.conv._ConvNd):
        return len(leaf.kernel_size) + 2
    for kind, axes in ((nn.BatchNorm1d, 3), (nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5)):
        if isinstance(leaf, kind):
            return axes
    if isinstance(leaf, nn.LayerNorm) and layer_layout(leaf) == "first":
        return 4  # the form in which it was tried
    return tensor.dim()


class UnknownAxisError(ValueError):
    """Axis 1 or the last axis of a tensor may be that of the filters."""


def _unknown_axis(layer: nn.Module, tensor: Tensor, why: str) -> UnknownAxisError:
    return UnknownAxisError(
        f"The filters of the layer {type(layer).__name__}, whose tensor is {tuple(tensor.shape)}, may "
        f"be on axis 1 or on axis {tensor.dim() - 1}: {why}. Say which one holds them: channel_dim=1 "
        "or channel_dim=-1."
    )


def _moved_last(leaf: nn.Module, tensor: Tensor) -> bool:
    """Whether a block of convolutions moved its filters to the last axis, as patches become tokens.

    A block that concatenates branches is wider on axis 1 than its last convolution, and one of its
    maps may by chance be as wide as that convolution; neither is taken for a move.
    """
    width = _width(leaf)
    if width is None or tensor.shape[-1] != width or tensor.shape[1] == width:
        return False
    return tensor.shape[1] < width or tensor.dim() < _dimensions(leaf, tensor)


def _flattened(leaves: Sequence[nn.Module], layer: nn.Module, tensor: Tensor) -> bool:
    """Whether maps of a block of convolutions became tokens, whose last axis has the filters of one of
    its modules where no module has the size of axis 1."""
    if tensor.dim() >= max(_dimensions(leaf, tensor) for leaf in leaves):
        return False
    widths = {_width(leaf) for leaf in leaves}
    if tensor.shape[1] == tensor.shape[-1] and tensor.shape[1] in widths:
        raise _unknown_axis(
            layer, tensor, f"both have the size of {tensor.shape[1]} filters inside"
        )
    return tensor.shape[-1] in widths and tensor.shape[1] not in widths


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raise if a layer's tensor holds integers, booleans or quantized numbers."""
    if not tensor.is_floating_point():
        raise ValueError(
            f"The layer {name!r} handles {tensor.dtype}, not floating-point numbers; choose a layer "
            "whose activations are, one behind an embedding for example."
        )


#: What to do about activation checkpointing, for errors of missing gradients.
CHECKPOINTED = "a checkpointed part is followed with use_reentrant=False"


def not_recorded(
    name: str,
    advice: str = "choose a layer behind that part, or a method without gradients "
    "(LayerFilterAblation)",
) -> ValueError:
    """The error of a layer that the model runs without a record for gradients."""
    return ValueError(
        f"The model runs the layer {name!r} under torch.no_grad(), so no gradient reaches it; "
        f"{advice}; {CHECKPOINTED}."
    )


def no_gradient(name: str) -> ValueError:
    """The error of a layer that the model's output does not depend on by gradients."""
    return ValueError(
        f"No gradient of the model's output reaches the layer {name!r}: what follows it is "
        "not differentiable (it runs under torch.no_grad(), is quantized or rounds) or does "
        "not use it. LayerFilterAblation needs no gradient."
    )


def check_batch(name: str, rows: int, num_images: int) -> None:
    """Raise if axis 0 of a layer's tensor is not the batch, as where an image is cut in windows."""
    if rows != num_images:
        raise ValueError(
            f"The layer {name!r} puts out {rows} rows for {num_images} images: axis 0 is not the "
            "batch. Choose the block around it, whose output has one row for each image."
        )


def positions_last(tensor: Tensor, axis: int) -> Tensor:
    """(N, ..., K, ...) seen as (N, K, P), P the positions of a filter; P = 1 for (N, K)."""
    moved = tensor.movedim(axis, 1)
    return moved.flatten(2) if moved.dim() > 2 else moved[:, :, None]


def along_filters(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """(N, K) shaped so that it broadcasts over the positions of a layer's tensor."""
    shape = [1] * like.dim()
    shape[0], shape[axis] = values.shape
    return values.reshape(shape)


def layer_tensors(value: object) -> list[Tensor]:
    """The tensors that a layer takes or puts out, those of floating-point numbers if there are any:
    itself, or what tuples, lists, mappings and data classes that PyTorch knows hold beside None,
    numbers and masks."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point()] or tensors


def with_tensors(value: object, tensors: Sequence[Tensor]) -> object:
    """A layer's value with others in place of its tensors; see :func:`layer_tensors`."""
    places = {id(old): new for old, new in zip(layer_tensors(value), tensors, strict=True)}
    leaves, form = tree_flatten(value)
    return tree_unflatten([places.get(id(leaf), leaf) for leaf in leaves], form)


def only_tensor(value: object, name: str) -> Tensor:
    """The single tensor that a layer takes or puts out, by itself or beside what is no tensor."""
    tensors = layer_tensors(value)
    if len(tensors) != 1:
        kind = type(value).__name__
        advice = (
            f"torch.export.register_dataclass({kind}) lets PyTorch look into this data class, or "
            "choose one of the layers inside"
            if dataclasses.is_dataclass(value) and not tensors
            else "choose one of the layers inside it, or explain single images with a method whose "
            "`attribute` takes layers of several tensors"
        )
        raise ValueError(
            f"The layer {name!r} handles a {_kinds(value)}, not a single tensor; {advice}."
        )
    return tensors[0]


def _kinds(value: object) -> str:
    kind = type(value).__name__
    if not isinstance(value, (tuple, list)):
        return kind
    return f"{kind} ({', '.join(type(part).__name__ for part in value)})"


def check_hooks(name: str, module: nn.Module) -> None:
    """Raise if a module cannot be hooked."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"The layer {name!r} is compiled by TorchScript ({type(module).__name__}), where nothing "
            "can be read or replaced; give the module that it was made from."
        )


def check_runs(name: str, runs: int, module: nn.Module | None = None) -> None:
    """Raise if a layer was not reached exactly once in a forward pass."""
    if runs == 0:
        named: list[tuple[str, nn.Module]] = []
        if module is not None:
            check_hooks(name, module)
            named = list(module.named_children())
        inner = [f"{name}.{child}" for child, _ in named]
        advice = f" Of what it contains, {inner[-1]!r} may run by itself." if inner else ""
        raise ValueError(
            f"The layer {name!r} was never reached by the forward pass.{advice} "
            "list_filter_layers(model, example_inputs) shows which layers run."
        )
    if runs > 1:
        raise ValueError(
            f"The layer {name!r} was reached {runs} times in one forward pass, so it has no single "
            "output. captum_classfilters.SeparateRuns(model, example_inputs) is the model in which "
            f"its runs are the layers '{name}.0', '{name}.1', ...; or choose the block that contains "
            "one use of it."
        )
