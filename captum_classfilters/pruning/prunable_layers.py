"""Which layers' filters can be removed, who reads them, and what ties the others."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from captum_classfilters._core.costs import inputs_of
from captum_classfilters._core.filter_graph import FilterGraph, check_model
from captum_classfilters._core.filter_removal import refused
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.named_layers import NamedLayers
from captum_classfilters._core.tables import Row, short_repr
from captum_classfilters._core.types import ExampleInputs


@short_repr
@dataclass(frozen=True)
class PrunableLayer:
    r"""
    One convolution or linear layer, as :func:`prunable_layers` found it.

    Args:

        name (str): Dotted name.
        type (str): Class of the module.
        num_filters (int): K.
        groups (int): Groups of the convolution; 1 for a linear layer.
        consumers (tuple of str): Layers that read its filters and would lose inputs.
        removed_with (tuple of str): Normalizations, depthwise convolutions, gates and parameters
                    that lose the same filters.
        tied_to (tuple of str): Layers whose filters are added to these, by a shortcut say.
        reason (str): Why filters cannot be removed; empty if they can.
    """

    name: str
    type: str
    num_filters: int
    groups: int
    consumers: tuple[str, ...]
    removed_with: tuple[str, ...]
    tied_to: tuple[str, ...]
    reason: str

    @property
    def prunable(self) -> bool:
        """Whether filters can be removed."""
        return not self.reason


class PrunableLayers(NamedLayers[PrunableLayer]):
    """The weighted layers of a model in the order of their registration; prints as a table.

    Args:

        layers (sequence of PrunableLayer): The layers.
    """

    @property
    def prunable(self) -> list[PrunableLayer]:
        """The layers whose filters can be removed."""
        return [layer for layer in self._layers if layer.prunable]

    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        for layer in self._layers:
            readers = ", ".join(layer.consumers[:2])
            more = len(layer.consumers) - 2
            readers += f" and {more} more" if more > 0 else ""
            rows.append(
                {
                    "layer": layer.name,
                    "type": layer.type,
                    "filters": str(layer.num_filters),
                    "read by": readers,
                    "remark": layer.reason,
                }
            )
        return rows


@torch.inference_mode(False)
def prunable_layers(
    model: nn.Module, example_inputs: ExampleInputs, *, show_progress: bool = True
) -> PrunableLayers:
    r"""
    List the layers whose filters :func:`prune_filters` can remove, and why not the others.

    The filters are followed through one forward pass in evaluation mode. Filters that a shortcut
    adds to other layers' are tied to these; filters of grouped convolutions, those that layer or
    group normalization mixes with others, and those that go through an operation that would do
    something else with fewer of them, a channel shuffle for example, cannot go either. About half of
    the filters of all other layers are then zero for a moment, and then the other half: a layer is
    listed if what each of its filters leaves behind is a constant that a bias can hold. One half is
    removed as well, and the network is compared with the masked one. Depthwise convolutions are not
    listed: their filters go with those they read.

    Args:

        model (nn.Module): The model; it is left as found.
        example_inputs (Tensor or tuple): Inputs of the model.
        show_progress (bool): Show a progress bar; layers may have to be tried one by one.
                    Default: True

    Returns:
        *PrunableLayers*: A sequence of :class:`PrunableLayer` that prints as a table.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import prunable_layers
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> print(prunable_layers(net, torch.rand(2, 3, 6, 6)))
        layer  type    filters  read by  remark
        0      Conv2d  8        4
        4      Linear  2                 its filters are the model's outputs
    """
    check_model(model)
    inputs = inputs_of(model, example_inputs)
    with (
        model_left_as_found(model, evaluation=True),
        tqdm(desc="layers", unit="layer", disable=not show_progress) as progress,
    ):
        graph = FilterGraph(model, inputs)
        layers = [_followed(graph, module) for module in graph.weighted_layers()]
        parts = {layer.name: _parts(layer.num_filters) for layer in layers if layer.prunable}
        progress.reset(len(parts))
        reasons = refused(graph, parts, inputs, progress.update)
    return PrunableLayers(
        [replace(layer, reason=reasons.get(layer.name, layer.reason)) for layer in layers]
    )


def _followed(graph: FilterGraph, module: nn.Module) -> PrunableLayer:
    """A layer as the forward pass shows it."""
    number = graph.num_filters(module)
    reach = graph.reach(module)
    alone = (graph.reach(module, part).reason for part in _parts(number))
    return PrunableLayer(
        name=graph.names[module],
        type=type(module).__name__,
        num_filters=number,
        groups=int(getattr(module, "groups", 1)),
        consumers=tuple(reach.consumers),
        removed_with=tuple(reach.removed_with),
        tied_to=tuple(reach.tied_to),
        reason=reach.reason or next(filter(None, alone), "") or _too_few(number),
    )


def _too_few(number: int) -> str:
    return "it has a single filter" if number == 1 else ""


def _parts(number: int) -> list[list[int]]:
    """All filters in two parts that no rule describes; an even number becomes two odd ones, which
    filters that go in pairs cannot fill."""
    if number < 2:
        return []
    first = number // 2 - (number % 4 == 0)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(number)).tolist()
    return [sorted(order[:first]), sorted(order[first:])]
