"""Where a layer's filters come from and who reads them, by Torch-Pruning's dependency graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import check_runs, filter_axis, find_layer, layer_name

# Normalisations that mix filters: with one of them deleted, the others' values change.
_MIXING = (nn.LayerNorm, nn.GroupNorm)


def torch_pruning() -> Any:
    """The library, or an error that names the extra."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "Removing filters needs Torch-Pruning: pip install 'captum-classfilters[prune]'."
        ) from error
    return torch_pruning


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
        removed_with (list of str): Normalisations, depthwise convolutions and gates that lose them
                    as well.
        tied_to (list of str): Layers whose filters are added to these.
        reason (str): Why the filters cannot be removed; empty if they can.
    """

    consumers: dict[str, list[int]] = field(default_factory=dict)
    read_filters: dict[str, list[int]] = field(default_factory=dict)
    removed_with: list[str] = field(default_factory=list)
    tied_to: list[str] = field(default_factory=list)
    reason: str = ""


class FilterGraph:
    r"""
    A model's dependency graph with the names of its layers, from one traced forward pass.

    The graph is Torch-Pruning's. What is added is which module put out which node, so that a layer
    may be named by any module whose filters are those of a convolution: its batch normalisation,
    its activation, or the block around them.

    Args:

        model (nn.Module): The model; it is left as found.
        inputs (tuple): Inputs of the model.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.model = model
        self.library = torch_pruning()
        self.names = {module: name for name, module in model.named_modules()}
        self.runs: dict[nn.Module, int] = {}
        self._shapes: dict[nn.Module, Tensor] = {}
        self._grad_fns: dict[nn.Module, Any] = {}
        self._hooked: dict[Any, list[nn.Module]] = {}
        with self._traceable():
            self.graph = self._built(inputs)
        self._nodes = {id(node.grad_fn): node for node in self.graph.module2node.values()}

    @contextmanager
    def _traceable(self) -> Iterator[None]:
        """Gradients on for every parameter: the graph is read from autograd's."""
        with model_left_as_found(self.model, evaluation=True), torch.enable_grad():
            for parameter in self.model.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            yield

    def _built(self, inputs: tuple[Any, ...]) -> Any:
        """The dependency graph; the model's own errors pass, Torch-Pruning's are named as such."""
        ran: list[bool] = []
        hooks = {module: set(module._forward_hooks) for module in self.names}

        def forward(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
            output = self._forward(model, arguments)
            ran.append(True)
            return output

        try:
            return self.library.DependencyGraph().build_dependency(
                self.model, inputs, forward_fn=forward, verbose=False
            )
        except Exception as error:
            # Torch-Pruning removes its hooks only if the forward pass succeeds.
            for module, known in hooks.items():
                for key in set(module._forward_hooks) - known:
                    del module._forward_hooks[key]
            if not ran:
                raise
            raise ValueError(
                f"Torch-Pruning cannot follow how {type(self.model).__name__} moves its filters "
                f"about ({type(error).__name__}: {error})."
            ) from error

    def _forward(self, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            self.runs[module] = self.runs.get(module, 0) + 1
            if isinstance(output, Tensor) and output.grad_fn is not None:
                self._shapes[module] = output.detach()
                self._grad_fns[module] = output.grad_fn
                self._hooked.setdefault(output.grad_fn, []).append(module)

        handles = [module.register_forward_hook(hook) for module in self.names]
        try:
            return model(*inputs)
        finally:
            for handle in handles:
                handle.remove()

    # -- weighted layers -------------------------------------------------------------------------

    def weighted_layers(self) -> list[nn.Module]:
        """Convolutions that are not depthwise and linear layers, in the order of registration."""
        return [
            module
            for module in self.names
            if module in self.graph.module2node and self._is_root(self.graph.module2node[module])
        ]

    def _is_root(self, node: Any) -> bool:
        types = self.library.ops.OPTYPE
        return node.type in (types.CONV, types.LINEAR)

    def num_filters(self, module: nn.Module) -> int:
        """K of a weighted layer."""
        return int(self.graph.get_out_channels(module))

    def group(self, module: nn.Module, filters: Sequence[int]) -> Any:
        """Torch-Pruning's group of a weighted layer's filters."""
        remove = self.graph.get_pruner_of_module(module).prune_out_channels
        return self.graph.get_pruning_group(module, remove, list(filters))

    def reach(self, module: nn.Module, filters: Sequence[int] | None = None) -> Reach:
        """What loses inputs or filters together with a weighted layer, and why it cannot, if so."""
        filters = range(self.num_filters(module)) if filters is None else filters
        types = self.library.ops.OPTYPE
        group = self.group(module, filters)
        reach, ends = Reach(), False
        others: list[str] = []
        mixing: list[str] = []
        grouped: list[str] = []
        repeated: list[str] = []
        for item in group.items:
            dependency, places = item
            node = dependency.target
            reads = self._reads(dependency)
            ends = ends or not (reads or node.outputs)
            if not isinstance(node.module, nn.Module) or node.module not in self.names:
                continue
            name, own = self.names[node.module], node.module is module
            if self.runs.get(node.module, 0) > 1:
                repeated.append(name)
            if isinstance(node.module, _MIXING):
                mixing.append(name)
            if node.type == types.CONV and int(getattr(node.module, "groups", 1)) > 1:
                grouped.append(name)
            if node.type in (types.MHA, types.LSTM):
                mixing.append(name)
            if reads:
                reach.consumers[name] = list(places)
                reach.read_filters[name] = list(item.root_idxs)
            elif not own:
                reach.removed_with.append(name)
                if self._is_root(node):
                    others.append(name)
        if others and self._added(group):
            reach.tied_to = others
        reach.reason = _reason(reach, ends, mixing, grouped, repeated)
        if others and not reach.reason:
            start = self.graph.module2node[module].inputs
            before = [self.names.get(one.module) for one in self._walk(start, lambda _one: True)]
            gated = [name for name in others if name in before]
            if gated:
                reach.reason = f"it is a gate of {_listed(gated)}; remove the filters there"
        return reach

    def _reads(self, dependency: Any) -> bool:
        """Whether a layer loses inputs but no filters of its own."""
        node = dependency.target
        return self._is_root(node) and not self.graph.is_out_channel_pruning_fn(dependency.handler)

    def _added(self, group: Any) -> bool:
        """Whether filters meet in anything but a product, a shortcut's sum say."""
        nodes = {dependency.target for dependency, _ in group}
        for node in nodes:
            if node.type != self.library.ops.OPTYPE.ELEMENTWISE:
                continue
            operation = str(getattr(node.module, "_grad_fn", "")).lower()
            inside = [
                one for one in node.inputs if one in nodes and isinstance(one.module, nn.Module)
            ]
            if len(inside) > 1 and not operation.startswith("mul"):
                return True
        return False

    # -- any layer -------------------------------------------------------------------------------

    def layer(self, name: str) -> nn.Module:
        """The module of this name, checked to run once and to put out one tensor."""
        module = find_layer(self.model, name)
        check_runs(name, self.runs.get(module, 0))
        if module not in self._grad_fns or id(self._grad_fns[module]) not in self._nodes:
            raise ValueError(
                f"The layer {name!r} ({type(module).__name__}) does not put out one tensor that the "
                "model computes from its weights, so it has no filters to remove."
            )
        return module

    def width(self, module: nn.Module, channel_dim: int | None = None) -> tuple[int, int]:
        """Axis and number of a layer's filters."""
        output = self._shapes[module]
        axis = filter_axis(module, output, channel_dim)
        return axis, output.shape[axis]

    def sources(self, module: nn.Module, channel_dim: int | None = None) -> list[Source]:
        """The weighted layers that make a layer's filters; several where it concatenates."""
        name, node = self.names[module], self._nodes[id(self._grad_fns[module])]
        number = self.width(module, channel_dim)[1]
        found: list[Source] = []
        followers: set[str] = set()
        roots = self._roots_before(node)
        for root in sorted(roots, key=list(self.names).index):
            if self.names[root] in followers:  # a gate, or the other end of a shortcut
                continue
            filters, places = self._places(root, node)
            found.append(Source(root, self.names[root], filters, places))
            reach = self.reach(root)
            followers.update([*reach.removed_with, *reach.tied_to])
        covered = sorted(place for source in found for place in source.places)
        if covered != list(range(number)):
            makers = ", ".join(repr(self.names[root]) for root in roots) or "no weighted layer"
            raise ValueError(
                f"The {number} filters of {name!r} cannot be told from {makers}; name the "
                "convolution or linear layer whose filters are to go."
            )
        return found

    def _roots_before(self, node: Any) -> list[nn.Module]:
        """The weighted layers that a node's tensor comes from with no other between."""
        roots: list[nn.Module] = []
        for one in self._walk([node], lambda one: not self._is_root(one)):
            if self._is_root(one):
                roots.append(one.module)
        return roots

    def _walk(self, start: list[Any], on: Callable[[Any], bool]) -> Iterator[Any]:
        """Nodes backwards from some, on through those that a test lets pass."""
        stack, seen = list(start), set()
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen.add(one)
            yield one
            if on(one):
                stack.extend(one.inputs)

    def _places(self, root: nn.Module, node: Any) -> tuple[list[int], list[int]]:
        every = list(range(self.num_filters(root)))
        if self.graph.module2node[root] is node:
            return every, every
        group = self.group(root, every)
        for item in group.items:
            if item.dep.target is node:
                return list(item.root_idxs), list(item.idxs)
        return [], []

    def mask_point(self, module: nn.Module) -> nn.Module:
        """Where removing filters of a weighted layer means zero: behind the normalisation and
        activation modules that directly follow it. Any other layer is its own mask point."""
        node = self.graph.module2node.get(module)
        types = self.library.ops.OPTYPE
        if node is None or node.type not in (types.CONV, types.DEPTHWISE_CONV, types.LINEAR):
            return module
        point, here = module, node
        while len(here.outputs) == 1 and self.runs[point] == 1:
            here = here.outputs[0]
            if here.type not in (types.BN, types.IN, types.PRELU, types.ELEMENTWISE):
                break
            if len(here.inputs) != 1:
                break
            hooked = [one for one in self._hooked.get(here.grad_fn, []) if not list(one.children())]
            if not hooked and here.type == types.ELEMENTWISE:
                continue  # a function between two modules
            if not hooked or not self._keeps_shape(point, hooked[0]):
                break
            if self.runs[hooked[0]] == 1:
                point = hooked[0]
        return point

    def _keeps_shape(self, one: nn.Module, other: nn.Module) -> bool:
        return self._shapes[one].shape == self._shapes[other].shape


def _reason(
    reach: Reach, ends: bool, mixing: list[str], grouped: list[str], repeated: list[str]
) -> str:
    """Why filters cannot be removed; empty if they can."""
    if reach.tied_to:
        return f"tied by a sum to {_listed(reach.tied_to)}, whose filters would have to go as well"
    if ends:
        return "its filters are the model's outputs"
    if grouped:
        return f"its filters belong to the groups of {_listed(grouped)}, which must stay equal"
    if mixing:
        return f"{_listed(mixing)} mixes its filters with the others"
    if repeated:
        return f"{_listed(repeated)} runs more than once in a forward pass"
    return "" if reach.consumers else "no weighted layer reads its filters"


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """Inputs of a model as a tuple."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def name_of(model: nn.Module, layer: nn.Module | str) -> str:
    """The dotted name of a layer given by itself or by its name, which must be the model's."""
    if isinstance(layer, str):
        find_layer(model, layer)
        return layer
    if not any(module is layer for module in model.modules()):
        raise ValueError(f"The given {type(layer).__name__} is not a layer of this model.")
    return layer_name(model, layer)
