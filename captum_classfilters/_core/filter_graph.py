"""Where a layer's filters come from, who reads them, and what would have to go with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from captum_classfilters._core.filter_operations import Numbers, axes_of
from captum_classfilters._core.filter_ties import Gone, Ties
from captum_classfilters._core.filter_trace import KINDS, PER_FILTER, WEIGHTED, FilterTrace, Use
from captum_classfilters._core.guard import check_sizes, model_left_as_found
from captum_classfilters._core.layers import (
    check_module,
    check_runs,
    find_layer,
    layer_axis,
)
from captum_classfilters._core.stand_ins import StandIn
from captum_classfilters._core.types import ModelInputs


@dataclass
class Source:
    """A weighted layer that makes some of a layer's filters.

    Args:

        module (nn.Module): The convolution or linear layer.
        name (str): Its dotted name.
        filters (list of int): Its own filters ...
        places (list of int): ... and where each stands in the layer.
    """

    module: nn.Module
    name: str
    filters: list[int]
    places: list[int]


@dataclass
class Reach:
    """What loses filters together with a weighted layer.

    Args:

        consumers (dict): For each layer that reads the filters, which of its inputs they are ...
        read_filters (dict): ... and which filter each of these inputs is.
        removed (dict): For each layer that loses filters, this one among them, which.
        parameters (dict): For each parameter or buffer of no layer, the axis and its places.
        removed_with (list of str): Normalizations, depthwise convolutions, gates and parameters
                    that lose them as well.
        tied_to (list of str): Layers whose filters are added to these.
        reason (str): Why the filters cannot be removed; empty if they can.
    """

    consumers: dict[str, list[int]] = field(default_factory=dict)
    read_filters: dict[str, list[int]] = field(default_factory=dict)
    removed: dict[str, list[int]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    removed_with: list[str] = field(default_factory=list)
    tied_to: list[str] = field(default_factory=list)
    reason: str = ""


class FilterGraph:
    r"""
    Which layers make, change and read filters, from one forward pass in evaluation mode.

    Args:

        model (nn.Module): The model; it is left as found.
        inputs (tuple): Inputs of the model.
    """

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        check_model(model)
        self.model = model
        self.trace = FilterTrace(model)
        with model_left_as_found(model, evaluation=True):
            self.trace.run(inputs)
        self.names = self.trace.names
        self.runs = self.trace.runs
        self._modules = {name: module for module, name in self.names.items()}
        self._ties = Ties(self.trace.meetings)
        self._reached: dict[tuple[nn.Module, tuple[int, ...]], Reach] = {}
        self._holders: dict[int, list[str]] = {}
        for module, name in self.names.items():
            for parameter in module._parameters.values():
                self._holders.setdefault(id(parameter), []).append(name)
        self._holders.pop(id(None), None)

    # -- weighted layers -------------------------------------------------------------------------

    def weighted_layers(self) -> list[nn.Module]:
        """Convolutions that are not depthwise and linear layers, in the order of registration."""
        return [module for module in self.names if module in self.trace.sources]

    def num_filters(self, module: nn.Module) -> int:
        """K of a weighted layer."""
        place = self.trace.sources.index(module)
        return self.trace.starts[place + 1] - self.trace.starts[place]

    def reach(self, module: nn.Module, filters: Iterable[int] | None = None) -> Reach:
        """What loses inputs or filters together with a weighted layer, and why it cannot, if so."""
        filters = tuple(range(self.num_filters(module)) if filters is None else filters)
        known = self._reached.get((module, filters))
        if known is None:
            known = self._reached[module, filters] = self._follow(module, filters)
        return known

    def _follow(self, module: nn.Module, filters: Sequence[int]) -> Reach:
        start = self.trace.starts[self.trace.sources.index(module)]
        own = start + np.array(filters, np.int64)
        numbers, which, summed = self._ties.with_them(own, filters)
        gone = Gone(numbers, which, self.trace.owners_of(numbers))
        reach = Reach()
        others = self._lose_filters(reach, gone, module)
        self._lose_inputs(reach, gone)
        reach.tied_to = others if summed else []
        reach.reason = (
            self._reason(reach, gone)
            or self._gate_of(module, others)
            or self._lose_parameters(reach, gone)
            or self._meet_themselves(reach.removed[self.names[module]], filters)
        )
        return reach

    def _lose_filters(self, reach: Reach, gone: Gone, module: nn.Module) -> list[str]:
        """Note the layers that lose filters; the names of the weighted ones beside this one."""
        for owner in sorted(gone.owners):
            start, end = self.trace.starts[owner : owner + 2]
            own = gone.between(start, end) - start
            reach.removed[self.names[self.trace.sources[owner]]] = own.tolist()
        others = [name for name in reach.removed if name != self.names[module]]
        for follower, record in self.trace.followed.items():
            places = gone.places(record)
            if places:
                reach.removed[self.names[follower]] = places
        reach.removed_with = [name for name in reach.removed if name != self.names[module]]
        return others

    def _lose_inputs(self, reach: Reach, gone: Gone) -> None:
        """Note the layers that lose inputs."""
        for reader, record in self.trace.read.items():
            places = gone.places(record)
            if places:
                name = self.names[reader]
                reach.consumers[name] = places
                reach.read_filters[name] = gone.goes_with(record.numbers[places])

    def _lose_parameters(self, reach: Reach, gone: Gone) -> str:
        """Note the parameters of no layer that lose filters; why they cannot, if so."""
        for name, (start, shape) in self.trace.parameters.items():
            own = gone.between(start, start + prod(shape)) - start
            if not len(own):
                continue
            lost = np.zeros(prod(shape), bool)
            lost[own] = True
            axis = _axis_of(lost.reshape(shape))
            if axis is None:
                return f"its filters do not lie along one axis of {name!r}, which they meet"
            places = np.moveaxis(lost.reshape(shape), axis, 0).reshape(shape[axis], -1)[:, 0]
            reach.parameters[name] = axis, places.nonzero()[0].tolist()
            reach.removed_with.append(name)
        return ""

    @staticmethod
    def _meet_themselves(removed: Sequence[int], filters: Iterable[int]) -> str:
        more = sorted(set(removed) - set(filters))
        if not more:
            return ""
        return (
            f"they are combined with other filters of the layer, {more}, which would have to go too"
        )

    def _reason(self, reach: Reach, gone: Gone) -> str:
        """Why filters cannot be removed; empty if they can."""
        if reach.tied_to:
            return (
                f"tied by a sum to {listed(reach.tied_to)}, whose filters would have to go as well"
            )
        lost = [record for record in self.trace.lost if gone.meet(record)]
        where = {kind: [one.text for one in lost if one.kind == kind] for kind in KINDS}
        touched = [*reach.removed, *reach.consumers]
        repeated = [name for name in touched if self.runs[self._modules[name]] > 1]
        if where["outputs"]:
            return "its filters are the model's outputs"
        if where["groups"]:
            return f"its filters belong to the groups of {listed(where['groups'])}, which must stay equal"
        if where["mixes"]:
            return f"{listed(where['mixes'])} mixes its filters with the others"
        if where["operation"]:
            return f"its filters cannot be followed through {_joined(where['operation'])}"
        if where["repeats"] or repeated:
            return f"{listed([*where['repeats'], *repeated])} runs more than once in a forward pass"
        if not reach.consumers and not any(map(gone.meet, self.trace.summed)):
            return "no weighted layer reads its filters"
        return self.not_plain(touched)

    def _gate_of(self, module: nn.Module, others: Sequence[str]) -> str:
        """A layer whose filters multiply those that it is computed from is their gate."""
        before = self.trace.before[self.trace.sources.index(module)]
        earlier = {self.names[self.trace.sources[owner]] for owner in before}
        gated = [name for name in others if name in earlier]
        return f"it is a gate of {listed(gated)}; remove the filters there" if gated else ""

    def not_plain(self, touched: Sequence[str]) -> str:
        """Why a weight cannot be made smaller; empty if all can."""
        for name in touched:
            module = self._modules[name]
            reason = computed_weight(self.model, module, name)
            if reason:
                return reason
            for parameter in module._parameters.values():
                for other in self._holders.get(id(parameter), ()):
                    if other != name:
                        return f"{name!r} shares a parameter with {other!r}"
        return ""

    # -- any layer -------------------------------------------------------------------------------

    def layer(self, name: str) -> nn.Module:
        """The module of this name, checked to run once and to put out one tensor."""
        module = (name and self._modules.get(name)) or find_layer(self.model, name)
        check_runs(name, self.runs.get(module, 0))
        if module not in self.trace.outputs:
            raise ValueError(
                f"The layer {name!r} ({type(module).__name__}) does not put out one tensor whose "
                "filters can be followed from a convolution or linear layer."
            )
        return module

    def width(self, module: nn.Module, channel_dim: int | None = None) -> tuple[int, int]:
        """Axis and number of a layer's filters."""
        shape = self.trace.outputs[module].shape
        axis = layer_axis(self.model, module, torch.empty(shape, device="meta"), channel_dim)
        return axis, shape[axis]

    def sources(self, module: nn.Module, channel_dim: int | None = None) -> list[Source]:
        """The weighted layers that make a layer's filters; several where it concatenates."""
        axis, number = self.width(module, channel_dim)
        numbered = self.trace.outputs[module]
        numbers = np.zeros(number, np.int64)
        if not set(axes_of(numbered.numbers)) - {axis}:
            numbers = np.broadcast_to(numbered.numbers.ravel(), number)
        owners = sorted(self.trace.owners_of(numbers))
        if not numbers.all() or len(np.unique(numbers)) < number:
            makers = [self.names[self.trace.sources[owner]] for owner in owners]
            raise ValueError(
                f"The {number} filters of {self.names[module]!r} cannot be told from those of "
                f"{listed(makers) or 'single weighted layers'}; name the convolution or linear "
                "layer whose filters are to go."
            )
        return [self._source(owner, numbers) for owner in owners]

    def _source(self, owner: int, numbers: Numbers) -> Source:
        start, end = self.trace.starts[owner : owner + 2]
        places = ((numbers >= start) & (numbers < end)).nonzero()[0]
        module = self.trace.sources[owner]
        filters = (numbers[places] - start).tolist()
        return Source(module, self.names[module], filters, places.tolist())

    def mask_point(self, module: nn.Module) -> nn.Module:
        """Where removing filters of a weighted layer means zero: behind the last of the normalization
        and activation modules that follow it, with no more than functions of single filters between.
        Any other layer is its own mask point."""
        point, here = module, self.trace.outputs[module]
        if not isinstance(module, WEIGHTED):
            return module
        while len(users := {id(use): use for use in here.uses}) == 1:
            (use,) = users.values()
            after = use.output
            if after is None or use.inputs != 1 or after.shape != here.shape:
                break
            if not np.array_equal(after.numbers, here.numbers):
                break
            if not _changes_each(use):
                break
            if use.module is not None and self.runs[use.module] == 1:
                point = use.module
            here = after
        return point

    def between(self, names: Sequence[str]) -> str:
        """What moves the filters of some weighted layers, in words."""
        owners = {
            place for place, source in enumerate(self.trace.sources) if self.names[source] in names
        }
        texts = [record.text for record in self.trace.moved if record.owners & owners]
        return _joined(texts)


def check_model(model: nn.Module) -> None:
    """Raise if a model has no layers that can be cut, or parameters without a size."""
    check_module(model)
    check_sizes(model)


def check_own_weights(model: nn.Module, module: nn.Module, name: str) -> None:
    """Raise if a module's weight is computed from others, which new weights would not change."""
    reason = computed_weight(model, module, name)
    if reason:
        raise ValueError(f"The model cannot be given new weights: {reason}.")


def computed_weight(
    model: nn.Module, module: nn.Module, name: str, *, may_be_masked: bool = False
) -> str:
    """Why a module's tensors are not parameters of its own; empty if they are. Where the weight
    ``may_be_masked``, nothing else is asked about: neither masks of pruning nor the bias."""
    calls = _derivations(module)
    if may_be_masked:
        calls = [(call, key) for call, key in calls if call != _MASKED and key == "weight"]
    if calls:
        path = next(own for own, other in model.named_modules() if other is module)
        here = f"model.get_submodule({path!r})"  # which knows wrappers by their names
        ways = "; ".join(f"torch.nn.utils.{call}({here}, {key!r})" for call, key in calls)
        return (
            f"the weight of {name!r} is computed in each forward pass, by a parametrization, a norm "
            f"or a mask; make it a plain parameter first: {ways}"
        )
    plain = "weight" in module._parameters or getattr(module, "weight", None) is None
    plain = plain or isinstance(module, StandIn)  # which is told by its parts
    if plain or (may_be_masked and is_masked(module)):
        return ""
    return f"the weight of {name!r} is not a parameter of its own"


_MASKED = "prune.remove"


def is_masked(module: nn.Module) -> bool:
    """Whether pruning masks a module's weight."""
    return (_MASKED, "weight") in _derivations(module)


def _derivations(module: nn.Module) -> list[tuple[str, str]]:
    """What computes tensors of a module: the call of ``torch.nn.utils`` that ends it, and the tensor."""
    calls: list[tuple[str, str]] = []
    if parametrize.is_parametrized(module):
        keys: Iterable[str] = module.parametrizations  # type: ignore[assignment]
        calls += [("parametrize.remove_parametrizations", key) for key in keys]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            calls.append((_MASKED, hook._tensor_name))
        elif isinstance(hook, WeightNorm):
            calls.append(("remove_weight_norm", hook.name))
        elif isinstance(hook, SpectralNorm):
            calls.append(("remove_spectral_norm", hook.name))
    return calls


def _changes_each(use: Use) -> bool:
    """Whether what uses filters may change values, but not which filter they are of: a norm, an
    activation or a pointwise operation."""
    if use.module is None:
        return use.pointwise
    if use.ruled:
        return isinstance(use.module, PER_FILTER)
    return use.pointwise and not any(True for _ in use.module.parameters())


def _axis_of(lost: NDArray[np.bool_]) -> int | None:
    """The axis of a parameter at some of whose places all elements are lost, and no others."""
    for axis, size in enumerate(lost.shape):
        rows = np.moveaxis(lost, axis, 0).reshape(size, -1)
        if (rows.all(1) == rows.any(1)).all():
            return axis
    return None


def _joined(texts: Iterable[str]) -> str:
    several = list(dict.fromkeys(texts))
    more = f" and {len(several) - 3} more" if len(several) > 3 else ""
    return ", ".join(several[:3]) + more


def listed(names: Iterable[str]) -> str:
    """Some names for a message, each once."""
    several = list(dict.fromkeys(names))
    shown = ", ".join(map(repr, several[:6]))
    return f"{shown} and {len(several) - 6} more" if len(several) > 6 else shown
