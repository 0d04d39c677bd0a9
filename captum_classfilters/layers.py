"""Which layers of a model have filters that the methods can use, and why the others do not."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.batches import num_images
from captum_classfilters._core.devices import device_of, on_device
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.heads import how_layer_feeds, record_head
from captum_classfilters._core.layers import (
    check_module,
    declared_filters,
    filter_axis,
    layer_name,
    layer_tensors,
    named_layers,
    weighted_before_each,
)
from captum_classfilters._core.named_layers import NamedLayers
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import class_scores
from captum_classfilters._core.tables import Row, short_repr
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import ExampleInputs, ModelInputs


@short_repr
@dataclass(frozen=True)
class FilterLayer:
    r"""
    One layer of a model, as :func:`list_filter_layers` found it.

    Args:

        name (str): Dotted name.
        type (str): Class of the module.
        shape (tuple of int or None): Shape of its output, N first.
        runs (int): How often it ran in one forward pass.
        channel_dim (int or None): Axis of its filters; every method may be given it.
        num_filters (int or None): K.
        feeds_head (str or None): How its output becomes the input of the last linear layer:
                    ``"mean"`` over positions, ``"identical"`` or ``"flatten"``. Contributions are
                    exact there if nothing follows the head, and the head can be decomposed.
        qualifies (bool): Whether the methods of this package can be used.
        reason (str): Why not; for a layer that qualifies, what to mind.
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    runs: int
    channel_dim: int | None
    num_filters: int | None
    feeds_head: str | None
    qualifies: bool
    reason: str


class FilterLayers(NamedLayers[FilterLayer]):
    """The layers of a model in the order in which they first ran; prints as a table.

    Args:

        layers (sequence of FilterLayer): The layers.
        head (str or None): Name of the last linear layer that ran.
    """

    def __init__(self, layers: Sequence[FilterLayer], head: str | None) -> None:
        super().__init__(layers)
        self.head = head

    @property
    def qualifying(self) -> list[FilterLayer]:
        """The layers that the methods can use."""
        return [layer for layer in self._layers if layer.qualifies]

    @property
    def feeding_head(self) -> list[FilterLayer]:
        """The layers whose output becomes the head's input, directly, as a mean, or flattened."""
        return [layer for layer in self.qualifying if layer.feeds_head]

    def _rows(self) -> list[Row]:
        return [
            {
                "layer": layer.name,
                "type": layer.type,
                "output": "x".join(map(str, layer.shape)) if layer.shape else "-",
                "filters": str(layer.num_filters) if layer.qualifies else "no",
                "feeds head": layer.feeds_head or "",
                "remark": layer.reason,
            }
            for layer in self._layers
        ]


def list_filter_layers(
    model: nn.Module, example_inputs: ExampleInputs, leaves_only: bool = False
) -> FilterLayers:
    r"""
    List which layers of a model qualify for class filters, and why the others do not.

    The model runs in evaluation mode, with a hook on every module; if it takes images, it runs again
    on two or three of them, twice as large, because the axis of the filters is the one that keeps
    its size, and that of the batch the one that is as long as there are images. A layer qualifies if
    it runs exactly once and puts out one floating-point tensor with the images on axis 0 and a
    channel axis; None, numbers and masks beside it do not matter. Nothing here knows a model by its
    name.

    Args:

        model (nn.Module): The model.
        example_inputs (Tensor or tuple): Inputs of the model, two or more examples.
        leaves_only (bool): Leave out modules that contain others.
                    Default: False

    Returns:
        *FilterLayers*: A sequence of :class:`FilterLayer` that prints as a table.

    Raises:
        ValueError: There are no example inputs, or the model is no module.

    Examples::

        >>> import torch
        >>> from captum_classfilters import list_filter_layers
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> print(list_filter_layers(net, torch.rand(2, 3, 6, 6)))
        layer  type               output   filters  feeds head  remark
        0      Conv2d             2x8x4x4  8
        1      ReLU               2x8x4x4  8        mean
        2      AdaptiveAvgPool2d  2x8x1x1  8        identical
        3      Flatten            2x8      8        identical
        4      Linear             2x2      2                    puts out the logits
    """
    check_module(model)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if num_images(inputs) < 1:
        raise ValueError("example_inputs must hold at least one example.")
    inputs = on_device(inputs, device_of(model))
    names: dict[nn.Module, str] = {}
    for name, module in named_layers(model).items():
        if name:
            names.setdefault(module, name)  # the first, as everywhere
    seen = _Seen(model, names, inputs)
    layers = [
        seen.describe(module)
        for module in [*seen.calls, *(module for module in names if module not in seen.calls)]
        if not (leaves_only and list(module.children()))
    ]
    if any(_has_two_axes(layer) for layer in layers):
        layers = _with_another_size(seen, inputs, layers)
    return FilterLayers(layers, layer_name(model, seen.head) if seen.head else None)


_NOT_EXACT = "contributions are not exact: the model goes on after its last linear layer"
_ROWS = "axis 0 is not the batch"
_UNKNOWN = "filters on axis 1 or the last? Give channel_dim=1 or channel_dim=-1"


def _has_two_axes(layer: FilterLayer) -> bool:
    """Whether the filters may be on axis 1 or on the last."""
    several = layer.shape is not None and len(layer.shape) > 2
    return several and (layer.qualifies or layer.reason == _UNKNOWN)


def _with_another_size(
    first: "_Seen", inputs: ModelInputs, layers: list[FilterLayer]
) -> list[FilterLayer]:
    """The same, the filters' axis told by images of another size: it is the one that stays. The batch's
    axis has the size of another number of images."""
    if not any(map(_is_images, inputs)):
        return layers
    rows = torch.arange(3 if first.batch == 2 else 2) % first.batch
    few = [
        value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == first.batch
        else value
        for value in inputs
    ]
    larger = tuple(
        F.interpolate(value, scale_factor=2) if _is_images(value) else value for value in few
    )
    try:
        seen = _Seen(first.model, first.names, larger)
    except Exception:  # the model takes one size only
        return layers
    modules = {name: module for module, name in first.names.items()}
    resolved = []
    for layer in layers:
        output = next(iter(seen.calls.get(modules[layer.name], [])), None)
        may_qualify = layer.qualifies or layer.reason == _UNKNOWN
        if may_qualify and isinstance(output, Tensor) and len(output) != seen.batch:
            layer = first.found(modules[layer.name]).without_filters(_ROWS)
        elif _has_two_axes(layer) and layer.shape and isinstance(output, Tensor):
            last = len(layer.shape) - 1
            same_form = output.dim() == last + 1
            stays = [
                axis for axis in (1, last) if same_form and output.shape[axis] == layer.shape[axis]
            ]
            if len(stays) == 1 and layer.channel_dim != stays[0]:
                layer = first.describe(modules[layer.name], stays[0])
        resolved.append(layer)
    return resolved


def _is_images(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


class _Seen:
    """What every module put out in one forward pass, and which weighted leaf was before it."""

    def __init__(self, model: nn.Module, names: dict[nn.Module, str], inputs: ModelInputs) -> None:
        self.model, self.names, self.batch = model, names, num_images(inputs)
        self.registered_before = weighted_before_each(model)
        self.calls: dict[nn.Module, list[object]] = {}
        self.producers: dict[nn.Module, _Producer] = {}
        producer = _Producer()

        def hook(module: nn.Module, module_inputs: object, output: object) -> None:
            nonlocal producer
            if not list(module.children()):
                producer = producer.before(module, module_inputs, output)
            self.producers[module] = replace(producer, output=None)
            # Copies, because in-place successors overwrite what a module put out.
            tensors = layer_tensors(output)
            kept = tensors[0].detach().clone() if len(tensors) == 1 else output
            self.calls.setdefault(module, []).append(kept)

        with (
            model_left_as_found(model, evaluation=True),
            torch.no_grad(),
            hooked(names, hook),
            record_head(model) as head,
        ):
            output = model(*inputs)
            head.settle(output)
            self.output: Tensor | None = None
            with suppress(ValueError):  # the list is asked for before the scores are picked
                self.output = class_scores(output)
            # Inside, since a parametrization may change by being read in training mode.
            self.ends = head.is_output(self.output) and bool(head.computes_its_weight())
        self.head = head.module
        self.features = None if head.features is None else head.features.detach()

    def describe(self, module: nn.Module, told: int | None = None) -> FilterLayer:
        """A module as a row of the table, with the axis of its filters if that is known."""
        return self.found(module).describe(self.features, self.output, self.ends, told)

    def found(self, module: nn.Module) -> "_Found":
        """What is known of a module."""
        return _Found(
            self.names[module],
            module,
            self.calls.get(module, []),
            self.producers.get(module, _Producer()),
            self.registered_before.get(module),
            self.batch,
        )


@dataclass
class _Producer:
    """The weighted leaf that ran last, and what later modules without weights made of its output."""

    module: nn.Module | None = None
    output: object = None
    kept: bool = False  # nothing but functions of single elements followed
    moved: bool = False  # the last module permuted its input's axes

    def before(self, module: nn.Module, inputs: object, output: object) -> "_Producer":
        """The producer of a leaf's output."""
        if declared_filters(module) is not None:
            return _Producer(module, output, kept=True)
        given = inputs[0] if isinstance(inputs, tuple) and inputs else None
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            return _Producer(self.module)
        same_strides = given.shape == output.shape and given.stride() == output.stride()
        kept = given is self.output and same_strides
        moved = given.data_ptr() == output.data_ptr() and not same_strides
        return _Producer(self.module, output if kept else None, kept, moved)


@dataclass
class _Found:
    """One module and what it put out."""

    name: str
    module: nn.Module
    outputs: list[Any]
    producer: _Producer
    registered_before: nn.Module | None
    batch: int

    def describe(
        self, features: Tensor | None, scores: Tensor | None, ends: bool, told: int | None
    ) -> FilterLayer:
        """The module as a row of the table; ``ends`` says that the model ends in its head."""
        output: Any = self.outputs[0] if self.outputs else None
        reason = self._reason(output)
        if reason:
            return self.without_filters(reason)
        shape = tuple(output.shape)
        try:
            axis = self._axis(output) if told is None else told
        except ValueError:
            return self._row(shape, None, output.shape[1], None, False, _UNKNOWN)
        remarks = [self._must_be_told(axis)]
        feed = None if features is None else self._feed(features, output, axis)
        if scores is not None and torch.equal(output.flatten(), scores.flatten()):
            feed = None
            remarks.append("puts out the logits")
        elif feed and not ends:
            remarks.append(_NOT_EXACT)
        remark = "; ".join(filter(None, remarks))
        return self._row(shape, axis, output.shape[axis], feed, True, remark)

    def without_filters(self, reason: str) -> FilterLayer:
        """The module as a row that says why it does not qualify."""
        output: Any = self.outputs[0] if self.outputs else None
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        return self._row(shape, None, None, None, False, reason)

    @staticmethod
    def _feed(features: Tensor, output: Tensor, axis: int) -> str | None:
        if features.dim() > 2:  # a convolution sees the layer's own maps, or none
            return how_layer_feeds(features, output, axis)
        maps = output.movedim(axis, 1).flatten(2) if output.dim() > 2 else output
        return how_layer_feeds(features, maps, 1)

    def _reason(self, output: object) -> str:
        if not self.outputs:
            return "never called as a module in the forward pass"
        if len(self.outputs) > 1:
            return f"called {len(self.outputs)} times in one forward pass"
        if not isinstance(output, Tensor):
            return f"puts out {kind_of(output)}, not one tensor"
        if not output.is_floating_point():
            return f"puts out {str(output.dtype).removeprefix('torch.')}, not numbers to weigh"
        if output.dim() < 2:
            return "no channel dimension"
        if len(output) != self.batch:
            return _ROWS
        return ""

    def _axis(self, output: Tensor) -> int:
        """The filter axis."""
        if declared_filters(self.module) is not None or output.dim() == 2:
            return filter_axis(self.module, output)
        # A module without weights keeps the layout of the last weighted module that ran before it;
        # methods go by the one that is registered before it.
        before = self.producer.module
        if self.producer.kept:
            return filter_axis(before, output)
        width = declared_filters(before) if before is not None else None
        last = output.dim() - 1
        fits = [axis for axis in (1, last) if output.shape[axis] == width]
        axis = last if fits == [last] else self._axis_after(before, output)
        if fits == [1, last] and self.producer.moved:
            axis = None
        if axis is None:
            raise ValueError("Axis 1 or the last.")
        return axis

    def _must_be_told(self, axis: int) -> str:
        """A remark where the methods would take another axis for that of the filters."""
        output = self.outputs[0]
        if output.dim() == 2 or self._axis_after(self.registered_before, output) == axis:
            return ""
        return f"needs channel_dim={'-1' if axis == output.dim() - 1 else '1'}"

    def _axis_after(self, before: nn.Module | None, output: Tensor) -> int | None:
        try:
            return filter_axis(self.module, output, None, before)
        except ValueError:
            return None

    def _row(
        self,
        shape: tuple[int, ...] | None,
        axis: int | None,
        num_filters: int | None,
        feed: str | None,
        qualifies: bool,
        reason: str,
    ) -> FilterLayer:
        kind = type(self.module).__name__
        runs = len(self.outputs)
        return FilterLayer(self.name, kind, shape, runs, axis, num_filters, feed, qualifies, reason)
