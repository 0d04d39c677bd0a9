"""Filters removed for good: a smaller network that computes what masking them computes."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.filter_graph import FilterGraph, Source, as_tuple, name_of
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import find_layer
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.pruning.pruning_order import PruningOrder

logger = logging.getLogger("captum_classfilters")

Constants = Literal["fold", "drop"]
Keep = Tensor | Sequence[Any] | ClassFilters | PruningOrder

# What a pruned module has and a full one of the same name may have otherwise.
_SIZES = (
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "in_features",
    "out_features",
    "num_parameters",
)


def prune_filters(
    model: nn.Module,
    layer: nn.Module | str | Mapping[str, Keep] | ClassFilters | PruningOrder,
    example_inputs: Any,
    *,
    keep: Keep | None = None,
    remove: Tensor | Sequence[Any] | None = None,
    constants: Constants = "fold",
    in_place: bool = False,
    channel_dim: int | None = None,
) -> nn.Module:
    r"""
    Remove filters physically: a smaller network with the outputs of the masked one.

    Torch-Pruning's dependency graph says which weights, normalisations, depthwise convolutions and
    inputs of later layers go with a filter. The result equals the network in which the filters are
    set to zero in the layer's output; this is checked on the example inputs. A convolution or
    linear layer is masked behind the normalisation and activation modules that directly follow it
    (zeroing the weights alone would leave the bias and the shift of the batch normalisation
    alive); any other layer, a block say, in its own output.

    What later layers make of a filter that is zero may be a constant: a batch normalisation after
    a concatenation (DenseNet) or behind a depthwise convolution (MobileNet) shifts it. Such
    constants are folded into the bias of the layers that read them, which is exact in evaluation
    mode.

    Args:

        model (nn.Module): The model.
        layer (nn.Module, str, mapping, ClassFilters or PruningOrder): The layer or its dotted
                    name; the weighted layer itself or any module whose filters are those of one or,
                    concatenated, of several. A mapping from names to what to keep prunes several
                    layers. A table or an order brings its own layers; load the weights of an order
                    with fine-tuning into the model first.
        example_inputs (Tensor or tuple): A batch to trace and check the model with.
        keep (Tensor, sequence, ClassFilters or PruningOrder, optional): What stays: a bool mask
                    (K,), indices, the filters that a table selects for any class, or those that an
                    order leaves.
        remove (Tensor or sequence, optional): What goes, as a bool mask (K,) or indices, instead of
                    ``keep``.
        constants (str): ``"fold"`` as above; ``"drop"`` leaves constants out, so that the result
                    equals zeroing the filters in the inputs of the layers that read them.
                    Default: "fold"
        in_place (bool): Change the model itself. Optimisers then hold parameters it no longer has.
                    Default: False (a copy is changed)
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Returns:
        *nn.Module*: The smaller network; training flags and ``requires_grad`` are the model's.

    Raises:
        ValueError: Every filter of a layer would go; the layer is tied to a shortcut (the message
                    names the layers whose filters are added to its own), belongs to a grouped
                    convolution, or does not exist; the mask does not fit; constants cannot be
                    folded. The model has then not changed.
        ImportError: Torch-Pruning, of the extra ``prune``, is not installed.

    Examples::

        >>> import torch
        >>> from captum_classfilters import prune_filters
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> smaller = prune_filters(net, "0", torch.rand(2, 3, 6, 6), remove=[1, 4, 5])
        >>> smaller[0], smaller[4]
        (Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1)),
         Linear(in_features=5, out_features=2, bias=True))
    """
    if constants not in ("fold", "drop"):
        raise ValueError(f"constants={constants!r}; choose 'fold' or 'drop'.")
    inputs = as_tuple(example_inputs)
    pruned = copy.deepcopy(model)
    masks: list[_Mask] = []
    with model_left_as_found(model, evaluation=True):
        pruned.eval()
        for name, kept, removed in _requests(model, layer, keep, remove):
            masks.extend(
                _prune_one(pruned, name, kept, removed, inputs, constants, channel_dim, masks)
            )
        _check_equal(model, pruned, masks, inputs)
    _same_flags(model, pruned)
    if in_place:
        _move_weights(pruned, model)
        return model
    return pruned


@dataclass
class _Mask:
    """Where filters are zero in the network that the pruned one equals."""

    module: str
    axis: int
    places: list[int]
    at_input: bool = False


@dataclass
class _Reader:
    """A layer that loses inputs, and which."""

    name: str
    places: list[int]


def _requests(model: nn.Module, layer: Any, keep: Any, remove: Any) -> list[tuple[str, Any, Any]]:
    """Layer names with what to keep or to remove, exactly one of them."""
    if isinstance(layer, (Mapping, ClassFilters, PruningOrder)):
        if keep is not None or remove is not None:
            raise ValueError(f"A {type(layer).__name__} says itself what stays: no keep or remove.")
        if isinstance(layer, Mapping):
            if not layer:
                raise ValueError("The mapping of layers to prune is empty.")
            return [(name_of(model, name), kept, None) for name, kept in layer.items()]
        if isinstance(layer, PruningOrder):
            return [(name_of(model, name), mask, None) for name, mask in layer.masks().items()]
        return [(name_of(model, layer.layer), layer, None)]
    if (keep is None) == (remove is None):
        raise ValueError("Give exactly one of keep and remove.")
    return [(name_of(model, layer), keep, remove)]


def _removed(name: str, number: int, keep: Any, remove: Any) -> list[int]:
    """The filters to remove, sorted."""
    if isinstance(keep, ClassFilters):
        keep = keep.selected.any(0)
    elif isinstance(keep, PruningOrder):
        keep = keep.kept()
    mask = _as_mask(name, number, remove if keep is None else keep)
    gone = mask if keep is None else ~mask
    if bool(gone.all()):
        raise ValueError(
            f"Every one of the {number} filters of {name!r} would go; keep at least one."
        )
    return gone.nonzero()[:, 0].tolist()


def _as_mask(name: str, number: int, filters: Any) -> Tensor:
    values = torch.as_tensor(filters).cpu()
    if values.dtype == torch.bool:
        if values.shape != (number,):
            raise ValueError(
                f"The mask for {name!r} has shape {tuple(values.shape)}; expected ({number},), one "
                "entry for each filter."
            )
        return values
    if values.numel() == 0:
        return torch.zeros(number, dtype=torch.bool)
    if values.is_floating_point() or values.dim() != 1:
        raise ValueError(
            f"The filters of {name!r} are given as {values.dtype} of shape {tuple(values.shape)}; "
            f"expected a bool mask ({number},) or indices."
        )
    if int(values.min()) < 0 or int(values.max()) >= number:
        raise ValueError(
            f"Filter {int(values.max() if values.min() >= 0 else values.min())} of {name!r} is out "
            f"of range: it has {number}."
        )
    mask = torch.zeros(number, dtype=torch.bool)
    mask[values.long()] = True
    return mask


def _prune_one(
    model: nn.Module,
    name: str,
    keep: Any,
    remove: Any,
    inputs: tuple[Any, ...],
    constants: Constants,
    channel_dim: int | None,
    before: Sequence[_Mask],
) -> list[_Mask]:
    """Prune one layer in place; where the masks stand that the full network would need."""
    graph = FilterGraph(model, inputs)
    layer = graph.layer(name)
    axis, number = graph.width(layer, channel_dim)
    removed = _removed(name, number, keep, remove)
    mask = _Mask(graph.names[graph.mask_point(layer)], axis, removed)
    if any(one.module == mask.module for one in before):
        raise ValueError(f"{name!r} is given twice, also as another layer with the same filters.")
    if not removed:
        return []
    parts = [
        (source, chosen)
        for source in graph.sources(layer, channel_dim)
        if (chosen := _own_filters(source, removed))
    ]
    readers = _readers(graph, name, parts)
    masks = [mask]
    if constants == "fold":
        changes = _constants(model, mask, readers, inputs)
    else:
        masks = [
            _Mask(one.name, _input_axis(find_layer(model, one.name)), one.places, at_input=True)
            for one in readers
        ]
        changes = {}
    for source, chosen in parts:
        graph.group(source.module, chosen).prune()
    for reader, change in changes.items():
        _add_to_bias(find_layer(model, reader), change)
    return masks


def _own_filters(source: Source, removed: Sequence[int]) -> list[int]:
    """Which of a weighted layer's own filters stand at the removed places."""
    gone = set(removed)
    pairs = zip(source.filters, source.places, strict=True)
    return sorted(own for own, place in pairs if place in gone)


def _readers(
    graph: FilterGraph, name: str, parts: Sequence[tuple[Source, list[int]]]
) -> list[_Reader]:
    """The layers that lose inputs; an error where filters cannot be removed."""
    places: dict[str, set[int]] = {}
    for source, chosen in parts:
        reach = graph.reach(source.module, chosen)
        if reach.reason:
            of = "" if source.name == name else f" (made by {source.name!r})"
            raise ValueError(f"Filters of {name!r}{of} cannot be removed: {reach.reason}.")
        if len(chosen) == graph.num_filters(source.module):
            raise ValueError(
                f"Every one of the {len(chosen)} filters of {source.name!r} would go; keep at "
                "least one."
            )
        for reader, lost in reach.consumers.items():
            places.setdefault(reader, set()).update(lost)
    return [_Reader(reader, sorted(lost)) for reader, lost in places.items()]


# -- constants that masking leaves behind ---------------------------------------------------------


def _constants(
    model: nn.Module, mask: _Mask, readers: Sequence[_Reader], inputs: tuple[Any, ...]
) -> dict[str, Tensor]:
    """What the removed filters, being zero, add to the outputs of the layers that read them."""
    seen: dict[str, list[Tensor]] = {reader.name: [] for reader in readers}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[name].append(arguments[0].detach().movedim(_input_axis(module), 0).flatten(1))

        return hook

    handles = [
        find_layer(model, reader.name).register_forward_pre_hook(keep(reader.name))
        for reader in readers
    ]
    try:
        with _masked(model, [mask]), torch.no_grad():
            for batch in (inputs, _others(inputs)):
                model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    changes = {}
    for reader in readers:
        module = find_layer(model, reader.name)
        every = torch.cat(seen[reader.name], 1)
        values = every[reader.places]
        spread = float((values.amax(1) - values.amin(1)).max())
        size = max(1.0, float(every.abs().max()))
        constant = values.mean(1)
        if float(values.abs().max()) <= 1e-7 * size:
            continue
        if spread > 1e-5 * size or not _spreads_evenly(module):
            raise ValueError(
                f"With filters zero in {mask.module!r}, {reader.name!r} still reads values from "
                "them that no bias can stand for: they vary over images or positions, or zero "
                "padding cuts them at the border. constants='drop' removes the filters all the "
                "same; the result then equals zeroing them in that layer's input."
            )
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        lost = weight[:, reader.places].flatten(2) if weight.dim() > 2 else weight[:, reader.places]
        changes[reader.name] = (lost.sum(2) if lost.dim() > 2 else lost) @ constant
    return changes


def _others(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other inputs of the same range, so that what one image shows is not taken for a constant."""
    generator = torch.Generator().manual_seed(0)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=generator).to(value)
        return value.min() + noise * (value.max() - value.min()).clamp(min=1.0)

    return tuple(other(value) for value in inputs)


def _spreads_evenly(module: Any) -> bool:
    """Whether a constant input gives a constant output."""
    if isinstance(module, nn.Linear):
        return True
    if getattr(module, "transposed", False):
        return False
    padding: Any = module.padding
    none = padding == "valid" or (
        not isinstance(padding, str) and not any(int(size) for size in padding)
    )
    single = padding == "same" and all(int(size) == 1 for size in module.kernel_size)
    return none or single or module.padding_mode != "zeros"


def _add_to_bias(module: Any, change: Tensor) -> None:
    with torch.no_grad():
        if module.bias is None:
            module.bias = nn.Parameter(change.clone(), requires_grad=module.weight.requires_grad)
        else:
            module.bias += change


def _input_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


# -- the masked network ---------------------------------------------------------------------------


@contextmanager
def _masked(model: nn.Module, masks: Sequence[_Mask]) -> Iterator[None]:
    """Zero filters in the outputs, or inputs, of some layers."""
    handles = []
    for mask in masks:
        module = find_layer(model, mask.module)
        if mask.at_input:
            handles.append(module.register_forward_pre_hook(_zeroing_input(mask)))
        else:
            handles.append(module.register_forward_hook(_zeroing(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeroed(tensor: Tensor, mask: _Mask) -> Tensor:
    places = torch.tensor(mask.places, device=tensor.device)
    return tensor.index_fill(mask.axis, places, 0)


def _zeroing(mask: _Mask) -> Any:
    return lambda _module, _inputs, output: _zeroed(output, mask)


def _zeroing_input(mask: _Mask) -> Any:
    return lambda _module, inputs: (_zeroed(inputs[0], mask), *inputs[1:])


def _check_equal(
    model: nn.Module, pruned: nn.Module, masks: Sequence[_Mask], inputs: tuple[Any, ...]
) -> None:
    """Compare with the masked network; warn where deleting is not the same."""
    difference = size = 0.0
    for batch in (inputs, _others(inputs)):
        with _masked(model, masks), torch.no_grad():
            expected = model(*batch)
        try:
            with torch.no_grad():
                found = pruned(*batch)
        except RuntimeError as error:
            raise ValueError(
                "The pruned network does not run: Torch-Pruning does not follow how the model "
                f"moves these filters about ({str(error).splitlines()[0]})."
            ) from error
        if not isinstance(expected, Tensor):
            return
        size = max(size, 1e-6, float(expected.abs().max()))
        difference = max(difference, float((found - expected).abs().max()))
    logger.info("Pruned and masked network differ by %.1e of outputs up to %.1e.", difference, size)
    if not difference <= 1e-4 * size:
        warnings.warn(
            f"The pruned network differs from the masked one by {difference:.2g}, of outputs up to "
            f"{size:.2g}: something in the model mixes filters, a local response normalisation "
            "say, in which a deleted filter is not one that is zero.",
            stacklevel=3,
        )


def _same_flags(model: nn.Module, pruned: nn.Module) -> None:
    """Training flags and ``requires_grad`` as in the full model."""
    for one, other in zip(model.modules(), pruned.modules(), strict=True):
        other.training = one.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in pruned.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])


def _move_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a model the weights and sizes of its pruned copy."""
    for one, other in zip(source.modules(), target.modules(), strict=True):
        other._parameters, other._buffers = one._parameters, one._buffers
        for name in _SIZES:
            if name in one.__dict__:
                setattr(other, name, one.__dict__[name])
