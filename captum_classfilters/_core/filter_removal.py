r"""
Filters taken out of a network, which is then seen to be its own masked self.

What goes with some filters is planned on a traced network and cut; then the smaller network is
compared with the masked one: what they put out, what the layers that lose inputs read, and what
these make of it, on the example inputs and on random ones. A network that differs is refused.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from captum_classfilters._core.masked_network import (
    Batch,
    Mask,
    Seen,
    channel_axis,
    difference,
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

    def losses(self) -> list[tuple[str, int]]:
        """Each filter that goes, with its module."""
        return [(module, place) for module, places in self.removed.items() for place in places]

    def check(self, model: nn.Module) -> None:
        """Raise if a layer would lose every filter."""
        for module, places in self.removed.items():
            number = num_filters(model.get_submodule(module))
            if len(places) == number:
                raise ValueError(
                    f"Every one of the {number} filters of {module!r} would go; keep at least one."
                )

    def masked(self, model: nn.Module, constants: Constants) -> AbstractContextManager[None]:
        """The network with these filters zero and, if constants are dropped, not read either."""
        masks = list(self.masks.values())
        if constants == "drop":
            for name, places in self.read.items():
                axis = channel_axis(model.get_submodule(name))
                masks.append(Mask(name, axis, sorted(places), at_input=True))
        return masked(model, masks)

    def undone(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block after which the network has these filters again."""
        owners = (name.rpartition(".")[0] for name in self.parameters)
        names = {*self.removed, *self.read, *owners}
        return restored([model.get_submodule(name) for name in names])

    def cut(self, model: nn.Module, changes: Mapping[str, Tensor]) -> None:
        """Take these filters, and what goes with them, out of a model, and change some biases."""
        for name, change in changes.items():
            add_to_bias(model.get_submodule(name), change)
        for name, places in self.removed.items():
            cut_filters(model.get_submodule(name), places)
        for name, places in self.read.items():
            cut_inputs(model.get_submodule(name), places)
        for name, (axis, places) in self.parameters.items():
            owner, _, key = name.rpartition(".")
            cut_tensor(model.get_submodule(owner), key, axis, places)

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
) -> tuple[dict[str, Tensor], list[str]]:
    """What the removed filters, being zero, add to the outputs of the layers that read them, and
    the layers to which they add something that is no constant."""
    changes: dict[str, Tensor] = {}
    unfolded = []
    for name, gone in removal.read.items():
        module: Any = model.get_submodule(name)
        places = sorted(gone)
        spreads = torch.stack([one.spread[name] for one in seen])
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


def _why_not_folded(readers: Sequence[str]) -> str:
    return (
        f"with them zero, {listed(readers)} still reads values from them that no bias can stand for: "
        "they vary over images or positions, or zero padding cuts them at the border"
    )


def _advice(graph: FilterGraph, removal: Removal, inputs: Batch) -> str:
    """What to do about constants, if it works."""
    try:
        with removal.undone(graph.model):
            remove_filters(graph, removal, inputs, "drop")
    except NotRemovableError:
        return ""
    return (
        ". constants='drop' removes the filters all the same; the result then equals zeroing them in "
        "the inputs of the layers that read them, too"
    )


def refused(
    graph: FilterGraph,
    filters: Mapping[str, list[int]],
    inputs: Batch,
    tried: Callable[[int], object],
) -> dict[str, str]:
    r"""
    The layers of which some filters cannot be removed by themselves, and why.

    All layers lose their filters at once; only if that is not the masked network, or where layers
    lose filters of each other or constants cannot be folded, is a layer tried alone. The model,
    which must be in evaluation mode, is left as found. ``tried`` is told of how many it is known.
    """
    plans = {name: planned(graph, name, places) for name, places in filters.items()}
    together = _equal_together(graph.model, plans, inputs)
    alone = [name for name in plans if name not in together]
    reasons = {}
    tried(len(together))
    for name in alone:
        try:
            with plans[name].undone(graph.model):
                remove_filters(graph, plans[name], inputs, "fold")
        except NotRemovableError as error:
            reasons[name] = error.reason
        tried(1)
    return reasons


def _equal_together(model: nn.Module, plans: Mapping[str, Removal], inputs: Batch) -> list[str]:
    """Layers that can lose their filters at once; the network is then the masked one."""
    losses = Counter(loss for plan in plans.values() for loss in plan.losses())
    names = [
        name for name, plan in plans.items() if all(losses[loss] == 1 for loss in plan.losses())
    ]
    random = random_like(inputs)
    batches = [random] if has_several_images(random) else [inputs, random]
    while names:
        removal = Removal()
        for name in names:
            removal.join(plans[name])
        try:
            seen = _seen_masked(model, removal, batches, "fold")
        except Exception:  # a model need not take random inputs
            seen = _seen_masked(model, removal, [inputs], "fold")
        changes, unfolded = _folded(model, removal, seen)
        if not unfolded:
            with removal.undone(model):
                removal.cut(model, changes)
                return [] if removal.difference(model, seen) else names
        names = [name for name in names if not plans[name].read.keys() & set(unfolded)]
    return []
