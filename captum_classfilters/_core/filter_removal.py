r"""
Filters cut out of a network, and the network seen to be its own masked self.

A removal is planned on a traced network and cut; then the smaller network is compared with the
masked one: what they put out, what the layers that lose inputs read, and what these make of it, on
the example inputs and on random ones. A network that differs is refused.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, is_tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from captum_classfilters._core.filter_graph import FilterGraph, listed
from captum_classfilters._core.filter_trace import PER_FILTER, WEIGHTED, is_depthwise
from captum_classfilters._core.taps import tapped

Constants = Literal["fold", "drop"]

# What modules call the numbers of their filters and inputs.
_SIZES = {
    *("in_channels", "out_channels", "groups", "in_features", "out_features"),
    *("num_features", "num_parameters"),
}
_MOST_POSITIONS = 512  # of what a layer reads or makes that are kept to be compared
_FLOOR = 1e-3  # where all values are smaller, differences are measured by this instead


class NotRemovableError(ValueError):
    """Filters cannot be removed; the reason goes on from "cannot be removed: "."""

    def __init__(self, layers: Sequence[str], reason: str, made_by: str = "") -> None:
        of = f" (made by {made_by!r})" if made_by and [made_by] != list(layers) else ""
        super().__init__(f"Filters of {listed(layers)}{of} cannot be removed: {reason}.")
        self.reason = reason


@dataclass
class Mask:
    """Where filters are zero in the network that the smaller one equals."""

    module: str
    axis: int
    places: list[int]
    at_input: bool = False


@dataclass
class Removal:
    r"""
    Some filters of one or several layers, and what goes with them.

    Args:

        masks (dict): For each layer, where its filters are zero in the masked network.
        removed (dict): For each module that loses filters, which.
        read (dict): For each module that loses inputs, which.
        parameters (dict): For each parameter or buffer of no layer, the axis and its places.
        sources (list of str): The weighted layers whose filters they are.
    """

    masks: dict[str, Mask] = field(default_factory=dict)
    removed: dict[str, set[int]] = field(default_factory=dict)
    read: dict[str, set[int]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, set[int]]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)

    def join(self, other: "Removal") -> None:
        """Add another layer's removal to this one."""
        points = {mask.module for mask in self.masks.values()}
        for name, mask in other.masks.items():
            if set(other.sources) & set(self.sources) or mask.module in points:
                raise ValueError(
                    f"{name!r} is given twice, also as another layer with the same filters."
                )
        self.masks.update(other.masks)
        self.sources.extend(other.sources)
        for own, others in ((self.removed, other.removed), (self.read, other.read)):
            for module, places in others.items():
                own[module] = own.get(module, set()) | places
        for name, (axis, places) in other.parameters.items():
            known, own_places = self.parameters.get(name, (axis, set()))
            if known != axis:
                raise NotRemovableError(list(self.masks), f"{name!r} holds them along several axes")
            self.parameters[name] = axis, own_places | places

    def losses(self) -> list[tuple[str, int]]:
        """Each filter that goes, with its module."""
        return [(module, place) for module, places in self.removed.items() for place in places]

    def check(self, model: nn.Module) -> None:
        """Raise if a layer would lose every filter."""
        for module, places in self.removed.items():
            number = _filters_of(model.get_submodule(module))
            if len(places) == number:
                raise ValueError(
                    f"Every one of the {number} filters of {module!r} would go; keep at least one."
                )

    def all_masks(self, model: nn.Module, constants: Constants) -> list[Mask]:
        """The masks behind the layers and, if constants are dropped, before their readers."""
        masks = list(self.masks.values())
        if constants == "drop":
            for name, places in self.read.items():
                axis = _input_axis(model.get_submodule(name))
                masks.append(Mask(name, axis, sorted(places), at_input=True))
        return masks


def planned(
    graph: FilterGraph, name: str, places: list[int], channel_dim: int | None = None
) -> Removal:
    """The removal of some filters of one layer."""
    layer = graph.layer(name)
    axis, _ = graph.width(layer, channel_dim)
    removal = Removal(masks={name: Mask(graph.names[graph.mask_point(layer)], axis, places)})
    gone = set(places)
    for source in graph.sources(layer, channel_dim):
        pairs = zip(source.filters, source.places, strict=True)
        own = sorted(filter_ for filter_, place in pairs if place in gone)
        if not own:
            continue
        reach = graph.reach(source.module, own)
        if reach.reason:
            raise NotRemovableError([name], reach.reason, source.name)
        parameters = {key: (at, set(lost)) for key, (at, lost) in reach.parameters.items()}
        removed, read = (
            {module: set(lost) for module, lost in each.items()}
            for each in (reach.removed, reach.consumers)
        )
        removal.join(Removal({}, removed, read, parameters, [source.name]))
    removal.check(graph.model)
    return removal


def remove_filters(
    model: nn.Module,
    graph: FilterGraph,
    removal: Removal,
    inputs: tuple[Any, ...],
    constants: Constants,
) -> None:
    """Cut filters out of a model, in place, or raise; it must be in evaluation mode."""
    masked = observe(model, [inputs, _random_like(inputs)], removal, constants)
    changes: dict[str, Tensor] = {}
    if constants == "fold":
        changes, unfolded = folded_constants(model, removal, masked)
        if unfolded:
            advice = _advice(model, graph, removal, inputs)
            raise NotRemovableError(list(removal.masks), _why_not_folded(unfolded) + advice)
    cut(model, removal, changes)
    difference = compare(model, removal, masked)
    if difference:
        between = graph.between(removal.sources)
        on_their_way = f"; on the way of the filters: {between}" if between else ""
        raise NotRemovableError(list(removal.masks), difference + on_their_way)


def _why_not_folded(readers: Sequence[str]) -> str:
    return (
        f"with them zero, {listed(readers)} still reads values from them that no bias can stand for: "
        "they vary over images or positions, or zero padding cuts them at the border"
    )


def _advice(model: nn.Module, graph: FilterGraph, removal: Removal, inputs: tuple[Any, ...]) -> str:
    """What to do about constants, if it works."""
    try:
        with restored(model, removal):
            remove_filters(model, graph, removal, inputs, "drop")
    except NotRemovableError:
        return ""
    return (
        ". constants='drop' removes the filters all the same; the result then equals zeroing them in "
        "the inputs of the layers that read them, too"
    )


def refused(
    model: nn.Module,
    graph: FilterGraph,
    filters: Mapping[str, list[int]],
    inputs: tuple[Any, ...],
    show_progress: bool,
) -> dict[str, str]:
    r"""
    The layers of which some filters cannot be removed by themselves, and why.

    All layers lose their filters at once; only if that is not the masked network, or where layers
    lose filters of each other or constants cannot be folded, is a layer tried alone.
    """
    plans = {name: planned(graph, name, places) for name, places in filters.items()}
    together = _equal_together(model, plans, inputs)
    alone = [name for name in plans if name not in together]
    reasons = {}
    for name in tqdm(alone, desc="layers", unit="layer", disable=not (show_progress and alone)):
        try:
            with restored(model, plans[name]):
                remove_filters(model, graph, plans[name], inputs, "fold")
        except NotRemovableError as error:
            reasons[name] = error.reason
    return reasons


def _equal_together(
    model: nn.Module, plans: Mapping[str, Removal], inputs: tuple[Any, ...]
) -> list[str]:
    """Layers that can lose their filters at once; the network is then the masked one."""
    losses = Counter(loss for plan in plans.values() for loss in plan.losses())
    names = [
        name for name, plan in plans.items() if all(losses[loss] == 1 for loss in plan.losses())
    ]
    random = _random_like(inputs)
    batches = [random] if _several_images(random) else [inputs, random]
    while names:
        removal = Removal()
        for name in names:
            removal.join(plans[name])
        try:
            seen = observe(model, batches, removal, "fold")
        except Exception:  # random inputs are not the model's
            batches = [inputs]
            seen = observe(model, batches, removal, "fold")
        changes, unfolded = folded_constants(model, removal, seen)
        if not unfolded:
            with restored(model, removal):
                cut(model, removal, changes)
                return [] if compare(model, removal, seen) else names
        names = [name for name in names if not plans[name].read.keys() & set(unfolded)]
    return []


def _several_images(inputs: tuple[Any, ...]) -> bool:
    return any(leaf.dim() and len(leaf) > 1 for leaf in tree_leaves(inputs) if is_tensor(leaf))


# -- two networks compared ------------------------------------------------------------------------


@dataclass
class Seen:
    """What was seen of a network on one batch.

    Args:

        inputs (tuple): The batch.
        outputs (list of Tensor): What it put out.
        read (dict): For each reader, its inputs (C, ...) at some positions ...
        spread (dict): ... their lowest, highest and mean value (3, C) over all positions ...
        made (dict): ... and its outputs (K, ...).
    """

    inputs: tuple[Any, ...]
    outputs: list[Tensor] = field(default_factory=list)
    read: dict[str, Tensor] = field(default_factory=dict)
    spread: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)


def observe(
    model: nn.Module,
    batches: Sequence[tuple[Any, ...]],
    removal: Removal,
    constants: Constants | None = None,
) -> list[Seen]:
    """See a network on some batches: the masked one if constants are named, else as it is."""
    masks = removal.all_masks(model, constants) if constants is not None else []
    several: list[Seen] = []
    for batch in batches:
        seen = Seen(batch)
        with (
            masked(model, masks),
            _watched(model, removal, seen, constants == "fold"),
            torch.no_grad(),
        ):
            torch.manual_seed(0)  # the guard around this restores the random state
            try:
                outputs = model(*batch)
            except Exception:
                if not several or constants is None:
                    raise
                continue  # random inputs are not the model's, the example is
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        seen.outputs = [leaf.detach() for leaf in leaves]
        several.append(seen)
    return several


@contextmanager
def masked(model: nn.Module, masks: Sequence[Mask]) -> Iterator[None]:
    """Zero filters in the outputs, or inputs, of some layers."""

    def zeroed(mask: Mask, value: Any) -> Any:
        first = value[0] if isinstance(value, (tuple, list)) else value
        places = torch.tensor(mask.places, device=first.device)
        tensor = first.index_fill(mask.axis, places, 0)
        return (tensor, *value[1:]) if mask.at_input else tensor

    with ExitStack() as stack:
        for mask in masks:
            module = model.get_submodule(mask.module)
            stack.enter_context(tapped(module, partial(zeroed, mask), at_input=mask.at_input))
        yield


@contextmanager
def _watched(model: nn.Module, removal: Removal, seen: Seen, spreads: bool) -> Iterator[None]:
    """Keep what the readers of a removal's filters read and make."""

    def reads(name: str, axis: int, value: Any) -> None:
        tensor = value[0].detach()
        seen.read[name] = _some(tensor, axis)
        if spreads:
            others = [other for other in range(tensor.dim()) if other != axis % tensor.dim()]
            bounds = [tensor.amin(others), tensor.amax(others), tensor.mean(others)]
            seen.spread[name] = torch.stack(bounds)

    def makes(name: str, axis: int, value: Any) -> None:
        seen.made[name] = _some(value.detach(), axis)

    with ExitStack() as stack:
        for name in removal.read:
            module = model.get_submodule(name)
            axis = _input_axis(module)
            stack.enter_context(tapped(module, partial(reads, name, axis), at_input=True))
            stack.enter_context(tapped(module, partial(makes, name, axis)))
        yield


def _some(tensor: Tensor, axis: int) -> Tensor:
    """Values (C, ...) at some positions, evenly spread over every axis."""
    rows = tensor.movedim(axis, 0)
    most = round(_MOST_POSITIONS ** (1 / max(1, rows.dim() - 1)))
    spaced = [slice(None, None, -(-size // most)) for size in rows.shape[1:]]
    return rows[tuple([slice(None), *spaced])].clone()  # noqa: C409


def _random_like(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other inputs of the same range, so that what one image shows is not taken for a rule."""
    generator = torch.Generator().manual_seed(0)

    def other(value: Tensor) -> Tensor:
        if value.dtype == torch.bool or value.is_complex() or not value.numel():
            return value
        low, high = (float(bound) for bound in torch.aminmax(value.detach().double().nan_to_num()))
        if not value.is_floating_point():
            return torch.randint(int(low), int(high) + 1, value.shape, generator=generator).to(
                value
            )
        noise = torch.rand(value.shape, generator=generator)
        return (low + noise * ((high - low) or 1.0)).to(value)

    varied: tuple[Any, ...] = tree_map_only(Tensor, other, inputs)
    return varied


def compare(model: nn.Module, removal: Removal, masked: Sequence[Seen]) -> str:
    """How a model differs from the masked one as it was seen; empty if it does not."""
    for expected in masked:
        try:
            (found,) = observe(model, [expected.inputs], removal)
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            return f"the network without them does not run ({type(error).__name__}: {first_line})"
        for name in removal.read:
            if _differ(_without(expected.read[name], removal.read[name]), found.read[name]):
                return f"without them, {name!r} would read other values than with them zero"
            own = removal.removed.get(name, set())
            if _differ(_without(expected.made[name], own), found.made[name]):
                return f"without them, {name!r} would make other values than with them zero"
        if len(expected.outputs) != len(found.outputs) or any(
            map(_differ, expected.outputs, found.outputs)
        ):
            return "without them, the model's outputs are others than with them zero"
    return ""


def _without(rows: Tensor, places: set[int]) -> Tensor:
    return rows.index_select(0, _others(len(rows), places, rows.device))


def _others(number: int, places: set[int], device: torch.device) -> Tensor:
    """The places that stay."""
    stays = torch.ones(number, dtype=torch.bool)
    stays[list(places)] = False
    return stays.nonzero()[:, 0].to(device)


def _differ(expected: Tensor, found: Tensor) -> bool:
    """Whether two tensors differ by more than rounding."""
    if expected.shape != found.shape:
        return True
    if not expected.is_floating_point():  # what is counted or chosen may change by rounding
        return False
    tolerance = _tolerance(expected)
    if expected.numel() and float((expected - found).abs().max()) <= tolerance * max(
        float(expected.abs().max()), _FLOOR
    ):
        return False
    expected, found = expected.cpu().double(), found.cpu().double()
    other = ~((expected == found) | (expected.isnan() & found.isnan()))
    if not bool(other.any()):
        return False
    finite = expected[expected.isfinite()].abs()
    size = max(float(finite.max()) if finite.numel() else 0.0, _FLOOR)
    difference = float((expected - found)[other].abs().max())
    return not difference <= tolerance * size


def _tolerance(tensor: Tensor) -> float:
    """How far rounding may go, relative to the largest value."""
    precision = torch.finfo(tensor.dtype).eps
    if precision > 1e-6:
        return float(precision**0.5)
    return 1e-4 if tensor.device.type == "cpu" else 1e-2  # products in TensorFloat32


# -- constants that masking leaves behind ---------------------------------------------------------


def folded_constants(
    model: nn.Module, removal: Removal, masked: Sequence[Seen]
) -> tuple[dict[str, Tensor], list[str]]:
    """What the removed filters, being zero, add to the outputs of the layers that read them, and
    the layers to which they add something that is no constant."""
    changes: dict[str, Tensor] = {}
    unfolded = []
    for name, gone in removal.read.items():
        module: Any = model.get_submodule(name)
        places = sorted(gone)
        spreads = torch.stack([seen.spread[name] for seen in masked])
        size = max(1.0, float(spreads.abs().max()))
        low, high = spreads[:, 0, places].amin(0), spreads[:, 1, places].amax(0)
        if float(torch.maximum(low.abs(), high.abs()).max()) <= 1e-7 * size:
            continue
        if not float((high - low).max()) <= 1e-5 * size or not _spreads_evenly(module):
            unfolded.append(name)
            continue
        constant = spreads[:, 2, places].mean(0)
        weight = module.weight.detach()[:, places]
        changes[name] = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ constant
    return changes, unfolded


def _spreads_evenly(module: Any) -> bool:
    """Whether a constant input gives a constant output."""
    if isinstance(module, nn.Linear):
        return True
    if module.transposed:
        return False
    padding: Any = module.padding
    none = padding == "valid" or (
        not isinstance(padding, str) and not any(int(size) for size in padding)
    )
    single = padding == "same" and all(int(size) == 1 for size in module.kernel_size)
    return none or single or module.padding_mode != "zeros"


# -- smaller tensors ------------------------------------------------------------------------------


def cut(model: nn.Module, removal: Removal, changes: dict[str, Tensor]) -> None:
    """Take filters and what goes with them out of a model's tensors, constants added to biases."""
    for name, change in changes.items():
        _add_to_bias(model.get_submodule(name), change)
    for name, places in removal.removed.items():
        _cut_filters(model.get_submodule(name), places)
    for name, places in removal.read.items():
        module: Any = model.get_submodule(name)
        _cut_tensor(module, "weight", 0 if getattr(module, "transposed", False) else 1, places)
        _shrink(module, ["in_features" if isinstance(module, nn.Linear) else "in_channels"], places)
    for name, (axis, places) in removal.parameters.items():
        owner, _, key = name.rpartition(".")
        _cut_tensor(model.get_submodule(owner), key, axis, places)


@contextmanager
def restored(model: nn.Module, removal: Removal) -> Iterator[None]:
    """Undo a cut when the block ends."""
    names = {
        *removal.removed,
        *removal.read,
        *(key.rpartition(".")[0] for key in removal.parameters),
    }
    before = []
    for name in names:
        module: Any = model.get_submodule(name)
        sizes = {key: value for key, value in vars(module).items() if key in _SIZES}
        before.append((module, dict(module._parameters), dict(module._buffers), sizes))
    try:
        yield
    finally:
        for module, parameters, buffers, sizes in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            vars(module).update(sizes)


def _add_to_bias(module: Any, change: Tensor) -> None:
    with torch.no_grad():
        old = module.weight if module.bias is None else module.bias
        bias = change if module.bias is None else module.bias + change
        module.bias = nn.Parameter(bias.clone(), requires_grad=old.requires_grad)


def _cut_filters(module: Any, places: set[int]) -> None:
    transposed = getattr(module, "transposed", False) and not is_depthwise(module)
    sizes = _sizes(module)
    _cut_tensor(module, "weight", 1 if transposed else 0, places)
    for key in ("bias", "running_mean", "running_var"):
        _cut_tensor(module, key, 0, places)
    _shrink(module, sizes, places)


def _sizes(module: Any) -> list[str]:
    """The attributes of a module that say how many filters it has."""
    if isinstance(module, nn.Linear):
        return ["out_features"]
    if isinstance(module, nn.PReLU):
        return ["num_parameters"]
    if isinstance(module, nn.modules.conv._ConvNd):
        return ["out_channels", *(["in_channels", "groups"] if is_depthwise(module) else [])]
    return ["num_features"]


def _filters_of(module: Any) -> int:
    return int(getattr(module, _sizes(module)[0]))


def _shrink(module: Any, sizes: Sequence[str], places: set[int]) -> None:
    for size in sizes:
        setattr(module, size, getattr(module, size) - len(places))


def _cut_tensor(module: nn.Module, key: str, axis: int, places: set[int]) -> None:
    tensor = getattr(module, key, None)
    if tensor is None:
        return
    stays = _others(tensor.shape[axis], places, tensor.device)
    smaller: Tensor = tensor.detach().index_select(axis, stays)
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        if tensor.grad is not None:
            smaller.grad = tensor.grad.index_select(axis, stays)
    setattr(module, key, smaller)


def _input_axis(module: nn.Module) -> int:
    """The axis of a reader's inputs and of its filters."""
    return -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)  # type: ignore


def replace_tensors(model: nn.Module, smaller: nn.Module) -> None:
    """Give a model the tensors and sizes of its smaller copy; what is equal stays its own."""
    for module, other in zip(model.modules(), smaller.modules(), strict=True):
        for own, new in (
            (module._parameters, other._parameters),
            (module._buffers, other._buffers),
        ):
            for key, tensor in new.items():
                known = own.get(key)
                alike = known is not None and tensor is not None and known.shape == tensor.shape
                if not alike or known is None or tensor is None or not torch.equal(known, tensor):
                    own[key] = tensor  # type: ignore[assignment]
        sizes = {key: value for key, value in vars(other).items() if key in _SIZES}
        if isinstance(module, (*WEIGHTED, *PER_FILTER)):
            vars(module).update(sizes)
