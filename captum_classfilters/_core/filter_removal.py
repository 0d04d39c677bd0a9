r"""
Filters taken out of a network, which is then seen to be its own masked self.

What goes with some filters is planned on a traced network and cut; then the smaller network is
compared with the masked one: what they put out, what the layers that lose inputs read, and what
these make of it, on the example inputs and on random ones. A network that differs is refused.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classfilters._core.filter_cuts import (
    add_to_bias,
    cut_filters,
    cut_inputs,
    cut_tensor,
    num_filters,
    restored,
)
from captum_classfilters._core.filter_graph import FilterGraph, listed
from captum_classfilters._core.layers import module_named
from captum_classfilters._core.masked_network import (
    Batch,
    Mask,
    Seen,
    channel_axis,
    difference,
    first_images,
    has_several_images,
    masked,
    observe,
    random_like,
)

Constants = Literal["fold", "drop"]


class NotRemovableError(ValueError):
    """Filters cannot be removed; the reason goes on from "cannot be removed: "."""

    def __init__(self, layers: Sequence[str], reason: str, made_by: str = "") -> None:
        of = f" (made by {made_by!r})" if made_by and [made_by] != list(layers) else ""
        super().__init__(f"Filters of {listed(layers)}{of} cannot be removed: {reason}.")
        self.reason = reason


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

    def check(self, model: nn.Module) -> None:
        """Raise if a layer would lose every filter."""
        for module, places in self.removed.items():
            number = num_filters(module_named(model, module))
            if len(places) == number:
                raise ValueError(
                    f"Every one of the {number} filters of {module!r} would go; keep at least one."
                )

    def masked(self, model: nn.Module, constants: Constants) -> AbstractContextManager[None]:
        """The network with these filters zero and, if constants are dropped, not read either."""
        masks = list(self.masks.values())
        if constants == "drop":
            for name, places in self.read.items():
                axis = channel_axis(module_named(model, name))
                masks.append(Mask(name, axis, sorted(places), at_input=True))
        return masked(model, masks)

    def undone(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block after which the network has these filters again."""
        owners = (name.rpartition(".")[0] for name in self.parameters)
        names = {*self.removed, *self.read, *owners}
        return restored([module_named(model, name) for name in names])

    def cut(self, model: nn.Module, changes: Mapping[str, Tensor]) -> None:
        """Take these filters, and what goes with them, out of a model, and change some biases."""
        for name, change in changes.items():
            add_to_bias(module_named(model, name), change)
        for name, places in self.removed.items():
            cut_filters(module_named(model, name), places)
        for name, places in self.read.items():
            cut_inputs(module_named(model, name), places)
        for name, (axis, places) in self.parameters.items():
            owner, _, key = name.rpartition(".")
            cut_tensor(module_named(model, owner), key, axis, places)

    def difference(self, model: nn.Module, seen: Sequence[Seen]) -> str:
        """How a model without these filters differs from the masked one; empty if it does not."""
        differences = (difference(expected, model, self.read, self.removed) for expected in seen)
        return next(filter(None, differences), "")


def planned(
    graph: FilterGraph, name: str, places: list[int], channel_dim: int | None = None
) -> Removal:
    """The removal of some filters of one layer."""
    layer, gone = graph.layer(name), set(places)
    axis, _ = graph.width(layer, channel_dim)
    removal = Removal(masks={name: Mask(graph.names[graph.mask_point(layer)], axis, places)})
    for source in graph.sources(layer, channel_dim):
        pairs = zip(source.filters, source.places, strict=True)
        filters = sorted(own for own, place in pairs if place in gone)
        if not filters:
            continue
        reach = graph.reach(source.module, filters)
        if reach.reason:
            raise NotRemovableError([name], reach.reason, source.name)
        removed = {module: set(lost) for module, lost in reach.removed.items()}
        read = {module: set(lost) for module, lost in reach.consumers.items()}
        parameters = {key: (at, set(lost)) for key, (at, lost) in reach.parameters.items()}
        removal.join(Removal({}, removed, read, parameters, [source.name]))
    removal.check(graph.model)
    return removal


def remove_filters(
    graph: FilterGraph, removal: Removal, inputs: Batch, constants: Constants
) -> None:
    """Take filters out of a traced model in evaluation mode, or raise; it may then be half cut."""
    model = graph.model
    seen = _seen_masked(model, removal, [inputs, random_like(inputs)], constants)
    changes: dict[str, Tensor] = {}
    if constants == "fold":
        changes, unfolded = _folded(model, removal, seen)
        if unfolded:
            reason = _why_not_folded(unfolded) + _advice(graph, removal, inputs)
            raise NotRemovableError(list(removal.masks), reason)
    removal.cut(model, changes)
    reason = removal.difference(model, seen)
    if reason:
        between = graph.between(removal.sources)
        reason += f"; on the way of the filters: {between}" if between else ""
        raise NotRemovableError(list(removal.masks), reason)


def _seen_masked(
    model: nn.Module, removal: Removal, batches: Sequence[Batch], constants: Constants
) -> list[Seen]:
    """The masked network on a batch, and on others if the model takes them."""
    seen: list[Seen] = []
    with removal.masked(model, constants):
        for place, batch in enumerate(batches):
            try:
                seen.append(observe(model, batch, removal.read, spreads=constants == "fold"))
            except Exception:
                if place == 0:
                    raise
    return seen


def _folded(
    model: nn.Module, removal: Removal, seen: Sequence[Seen]
) -> tuple[dict[str, Tensor], dict[str, set[int]]]:
    """What the removed filters, being zero, add to the outputs of the layers that read them, and
    for each layer to which some add what is no constant, where it reads these."""
    changes: dict[str, Tensor] = {}
    unfolded: dict[str, set[int]] = {}
    for name, gone in removal.read.items():
        module: Any = module_named(model, name)
        places = sorted(gone)
        spreads = torch.stack([one.spread[name] for one in seen])
        size = max(1.0, float(spreads.abs().max()))
        low, high = spreads[:, 0, places].amin(0), spreads[:, 1, places].amax(0)
        read = torch.maximum(low.abs(), high.abs()) > 1e-7 * size
        if not bool(read.any()):
            continue
        constant = (high - low <= 1e-5 * size) & _spreads_evenly(module)
        if bool((read & ~constant).any()):
            others = (read & ~constant).tolist()
            unfolded[name] = {place for place, other in zip(places, others, strict=True) if other}
            continue
        constants = spreads[:, 2, places].mean(0)
        weight = module.weight.detach()[:, places]
        changes[name] = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ constants
    return changes, unfolded


def _spreads_evenly(module: nn.Module) -> bool:
    """Whether a constant input gives a constant output."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return True
    if module.transposed:
        return False
    padding = module.padding
    none = padding == "valid" or (
        not isinstance(padding, str) and not any(int(size) for size in padding)
    )
    single = padding == "same" and all(int(size) == 1 for size in module.kernel_size)
    return none or single or module.padding_mode != "zeros"


def _why_not_folded(readers: Iterable[str], zero: str = "them") -> str:
    return (
        f"with {zero} zero, {listed(readers)} still reads values from them that no bias can stand "
        "for: they vary over images or positions, or zero padding cuts them at the border"
    )


_ADVICE = (
    ". constants='drop' {} the filters all the same; the result then equals zeroing them in "
    "the inputs of the layers that read them, too"
)


def _advice(graph: FilterGraph, removal: Removal, inputs: Batch) -> str:
    """What to do about constants, if it works."""
    try:
        with removal.undone(graph.model):
            remove_filters(graph, removal, inputs, "drop")
    except NotRemovableError:
        return ""
    return _ADVICE.format("removes")


# -- many layers at once --------------------------------------------------------------------------


def refused(
    graph: FilterGraph,
    parts: Mapping[str, Sequence[list[int]]],
    inputs: Batch,
    tried: Callable[[int], object],
) -> dict[str, str]:
    r"""
    The layers of which some filters cannot be removed, and why.

    All layers lose a part of their filters at once, and then another; only where the network is then
    not the masked one are they tried by halves.

    Args:

        graph (FilterGraph): The traced model, in evaluation mode; it is left as found.
        parts (dict): For each layer that can be followed, its filters in parts.
        inputs (tuple): Inputs of the model.
        tried (Callable): Told of how many layers it is known.
    """
    plans = {
        name: [planned(graph, name, places) for places in of_layer]
        for name, of_layer in parts.items()
    }
    reasons: dict[str, str] = {}
    for names in _apart(plans):
        together = _Together(graph, {name: plans[name] for name in names}, inputs)
        reasons.update(together.refused())
        tried(len(names))
    return reasons


def _apart(plans: Mapping[str, Sequence[Removal]]) -> list[list[str]]:
    """The layers in as few groups as it takes for none to lose what another of its group loses."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, removals in plans.items():
        touched: set[str] = set()
        for removal in removals:
            points = {mask.module for mask in removal.masks.values()}
            touched |= points | removal.removed.keys() | removal.parameters.keys()
        free = (group for group in groups if not touched & group[1])
        group = next(free, None)
        if group is None:
            group = ([], set())
            groups.append(group)
        group[0].append(name)
        group[1].update(touched)
    return [names for names, _ in groups]


class _Together:
    """Layers that lose filters at once, each in parts, none what another loses."""

    def __init__(
        self, graph: FilterGraph, plans: Mapping[str, Sequence[Removal]], inputs: Batch
    ) -> None:
        self.graph, self.plans, self.inputs = graph, plans, inputs

    def refused(self) -> dict[str, str]:
        """The layers of which some filters cannot be removed, and why."""
        number = max(map(len, self.plans.values()))
        seen = [self._seen(self._part(place, self.plans)) for place in range(number)]
        reasons = self._unfolded(seen)
        stay = [name for name in self.plans if name not in reasons]
        if stay and not self._equal(stay, list(reasons), seen[0]):
            reasons.update(self._by_halves(stay))
        return reasons

    def _part(self, place: int, names: Iterable[str]) -> Removal:
        """One part of the filters of each layer, as far as it has as many."""
        removal = Removal()
        for name in names:
            for one in self.plans[name][place : place + 1]:
                removal.join(one)
        return removal

    def _seen(self, removal: Removal, constants: Constants = "fold") -> list[Seen]:
        """The masked network on two random images; on others if the model does not take them."""
        few = first_images(self.inputs, 2)
        random = random_like(few)
        for batches in ([random] if has_several_images(random) else [few, random], [few]):
            try:
                return _seen_masked(self.graph.model, removal, batches, constants)
            except Exception:  # a model need not take random inputs, nor fewer images
                continue
        return _seen_masked(self.graph.model, removal, [self.inputs], constants)

    def _unfolded(self, seen: Sequence[Sequence[Seen]]) -> dict[str, str]:
        """The layers of which some filters, being zero, leave what is no constant."""
        model = self.graph.model
        readers: dict[str, list[str]] = {}
        filters: dict[str, set[int]] = {}
        for place, of_part in enumerate(seen):
            unfolded = _folded(model, self._part(place, self.plans), of_part)[1]
            for name, removals in self.plans.items():
                for removal in removals[place : place + 1]:
                    for reader, places in unfolded.items():
                        own = places & removal.read.get(reader, set())
                        if own:
                            readers.setdefault(name, []).append(reader)
                            filters.setdefault(name, set()).update(self._filters(name, reader, own))
        return {
            name: _why_not_folded(of_layer, self._which(name, filters[name]))
            + _ADVICE.format("may remove")
            for name, of_layer in readers.items()
        }

    def _filters(self, name: str, reader: str, places: set[int]) -> set[int]:
        """A layer's filters that a reader reads at some places."""
        reach = self.graph.reach(self.graph.layer(name))
        pairs = zip(reach.consumers[reader], reach.read_filters[reader], strict=True)
        return {own for place, own in pairs if place in places}

    def _which(self, name: str, filters: set[int]) -> str:
        """Some filters in words."""
        number = self.graph.num_filters(self.graph.layer(name))
        if len(filters) == number:
            return "them"
        shown = ", ".join(map(str, sorted(filters)[:3])) + (", ..." if len(filters) > 3 else "")
        return f"{len(filters)} of its {number} filters ({shown})"

    def _equal(self, names: Sequence[str], masked: Sequence[str], seen: Sequence[Seen]) -> bool:
        """Whether the network without a part of some layers' filters, with that of others masked, is
        the masked one."""
        model, removal = self.graph.model, self._part(0, names)
        with removal.undone(model), self._part(0, masked).masked(model, "fold"):
            removal.cut(model, _folded(model, removal, seen)[0])
            return not removal.difference(model, seen)

    def _by_halves(self, names: Sequence[str]) -> dict[str, str]:
        """The layers among some without which the network would not be the masked one."""
        if len(names) == 1:
            removal = self.plans[names[0]][0]
            try:
                with removal.undone(self.graph.model):
                    remove_filters(self.graph, removal, self.inputs, "fold")
            except NotRemovableError as error:
                return {names[0]: error.reason}
            return {}
        reasons = {}
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            plans = {name: self.plans[name][:1] for name in half}
            reasons.update(_Together(self.graph, plans, self.inputs).refused())
        return reasons
