"""How many filters each layer keeps, for a size of the network."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from captum_classfilters._core.filter_graph import FilterGraph
from captum_classfilters._core.layers import find_layer
from captum_classfilters.pruning.network_size import NetworkSize


class RemainingSize:
    r"""
    What is left of a network's size once layers have lost filters.

    Args:

        model (nn.Module): The network.
        graph (FilterGraph): Which of its layers read which.
        layers (iterable of str): The layers that lose filters.
        size (NetworkSize): What is counted.
    """

    def __init__(
        self, model: nn.Module, graph: FilterGraph, layers: Iterable[str], size: NetworkSize
    ) -> None:
        self.size, self.total = size, size.of(model)
        self.widths = {name: graph.num_filters(graph.layer(name)) for name in layers}
        self._touched: dict[str, set[str]] = {}
        self._made: dict[str, dict[str, float]] = {}  # module: layer: values lost with a filter
        self._read: dict[str, dict[str, float]] = {}
        for name, width in self.widths.items():
            reach = graph.reach(graph.layer(name))
            self._touched[name] = {*reach.removed, *reach.consumers}
            for kind, places in ((self._made, reach.removed), (self._read, reach.consumers)):
                for module, lost in places.items():
                    kind.setdefault(module, {})[name] = len(lost) / width
        touched = {module for modules in self._touched.values() for module in modules}
        self._modules = {module: find_layer(model, module) for module in touched}

    def saved(self, sizes: Mapping[str, int], layer: str | None = None) -> float:
        """What keeping so many filters saves; in the modules that one layer touches only."""
        modules = self._modules if layer is None else self._touched[layer]
        return sum(self._saved_in(module, sizes) for module in modules)

    def near(self, name: str) -> list[str]:
        """Layers for which it matters how many filters a layer keeps, itself among them."""
        touched = self._touched[name]
        return [other for other, own in self._touched.items() if own & touched]

    def lost(self, name: str, sizes: Mapping[str, int]) -> tuple[float, float]:
        """Outputs and inputs that a module has lost once so many filters are kept."""
        made, read = (
            sum(
                each * (self.widths[layer] - sizes[layer])
                for layer, each in kind.get(name, {}).items()
            )
            for kind in (self._made, self._read)
        )
        return made, read

    def _saved_in(self, name: str, sizes: Mapping[str, int]) -> float:
        made, read = self.lost(name, sizes)
        module, saved = self._modules[name], 0.0
        transposed = bool(getattr(module, "transposed", False))
        for parameter in module.parameters(recurse=False):
            first, counts = parameter.shape[0], self.size.of_parameter(name, parameter)
            if parameter.dim() == 1 or parameter.shape[1] == 1:  # of a norm, or depthwise
                saved += counts * made / first
                continue
            out, into = (parameter.shape[1], first) if transposed else (first, parameter.shape[1])
            saved += counts * (1 - (1 - made / out) * (1 - read / into))
        return saved


def allocate(count: RemainingSize, damage: Mapping[str, Tensor], most: float) -> dict[str, int]:
    r"""
    The number of filters of each layer, so that at most so much is left.

    Again and again some filters go from the layer in which they cost least for what they save.

    Args:

        count (RemainingSize): What is left.
        damage (mapping): For each layer, what it costs that so many of its filters are gone, (K,).
        most (float): What may be left.

    Returns:
        *dict* from layers to numbers of filters; one in each layer where that is still too many.
    """
    sizes, left = dict(count.widths), float(count.total)
    steps = {name: _step(count, damage[name], sizes, name) for name in sizes}
    while left > most:
        known = [(name, step) for name, step in steps.items() if step is not None]
        if not known:
            break
        name, (_, fewer) = min(known, key=lambda pair: pair[1][0])
        before = count.saved(sizes, name)
        sizes[name] = fewer
        left -= count.saved(sizes, name) - before
        for other in count.near(name):
            steps[other] = _step(count, damage[other], sizes, other)
    return sizes


def _step(
    count: RemainingSize, damage: Tensor, sizes: Mapping[str, int], name: str
) -> tuple[float, int] | None:
    """The number of a layer's filters that costs least for what it saves, after what it costs."""
    size, width = sizes[name], count.widths[name]
    before, found = count.saved(sizes, name), []
    for fewer in {max(1, size - max(1, width // part)) for part in (8, 16, width)} - {size}:
        saved = count.saved({**sizes, name: fewer}, name) - before
        rise = float(damage[width - fewer] - damage[width - size])
        found.append((rise / saved, fewer))
    return min(found, default=None, key=lambda step: step[0])
