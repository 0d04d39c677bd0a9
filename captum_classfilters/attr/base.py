"""The base of this package's layer attributions: subclass it to add a method."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import num_images
from captum_classfilters._core.captum import (
    TargetType,
    format_additional_forward_args,
    format_tensor_into_tuples,
    log_usage,
)
from captum_classfilters._core.devices import ordinary
from captum_classfilters._core.files import AnyPath
from captum_classfilters._core.forward import BatchReading, FilterMaps, LayerRequest, SharedForward
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    find_layer,
    layer_axis,
    layer_name,
    module_of,
    positions_last,
)
from captum_classfilters._core.rules import FilterRule
from captum_classfilters._core.tables import bound_repr
from captum_classfilters._core.types import (
    AttributeKwargs,
    Attributions,
    ClassNames,
    Dataloader,
    ForwardFunc,
    Keywords,
    Unpack,
)
from captum_classfilters._core.units import aggregated
from captum_classfilters.identify.identify_class_filters import identify_class_filters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from captum_classfilters.class_filters import ClassFilters
    from captum_classfilters.identify.significance import LabelPermutation

Layers = nn.Module | list[nn.Module]


class LayerFilterAttribution(FilterRule, LayerAttribution):
    r"""
    Base of the layer attributions whose features are filters.

    The attributions have the layer's shape, and **summing them over a filter's positions gives the
    filter's score** for the image; :meth:`filter_scores` does that for any layout.

    A subclass adds its rule once, as :meth:`scores_from`; ``attribute``, :meth:`identify` and all
    that is built on them follow it, in one forward pass shared with every other method. A rule that
    weighs activations is a subclass of :class:`WeightedFilterAttribution` instead.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum_classfilters.attr import LayerFilterAttribution
        >>> class MeanActivation(LayerFilterAttribution):
        ...     depends_on_target = False
        ...     def scores_from(self, maps, target):
        ...         return maps.means
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> method = MeanActivation(net, "1")
        >>> method.filter_scores(method.attribute(torch.rand(4, 3, 6, 6))).shape
        torch.Size([4, 8])
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> method.identify(data, num_classes=2, show_progress=False).scores.shape
        torch.Size([2, 8])
    """

    @arguments_checked
    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        LayerAttribution.__init__(self, forward_func, _resolved(forward_func, layer), device_ids)
        self.channel_dim = channel_dim

    def __repr__(self) -> str:
        return bound_repr(self, self.forward_func, self.layer)

    def scores_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        r"""
        The rule of the method: each filter's score for each image of a batch.

        Args:

            maps (FilterMaps): What the layer put out: ``means`` (N, K), ``maps`` (N, K, P) with P
                        positions, and ``derivative(target)`` (N, K, P) or (N, K, 1) of the target's
                        score, if ``needs_derivative`` is set.
            target (int, tuple, Tensor, list or None): The target, or for data sets the labels (N,).

        Returns:
            *Tensor* of shape (N, K).
        """
        return super().scores_from(maps, target)

    def maps_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        r"""
        The scores as maps, (N, K, P): by default each is spread evenly over its positions.

        Args:

            maps (FilterMaps): As for :meth:`scores_from`.
            target (int, tuple, Tensor, list or None): Likewise.

        Returns:
            *Tensor* of shape (N, K, P), whose sums over positions are the scores.
        """
        scores = self.scores_from(maps, target)[:, :, None] / maps.num_positions
        return scores.expand(-1, -1, maps.num_positions)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
    ) -> Attributions:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            target (int, tuple, Tensor or list, optional): The output to explain, in any of
                        Captum's forms; not used by methods whose evidence does not depend on it.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of the forward function.
                        Default: None
            attribute_to_layer_input (bool): Explain by the layer's input instead of its output.
                        Default: False

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list* of **attributions**:
            - **attributions** (*Tensor*, *tuple[Tensor, ...]* or *list*):
                        Shaped like the layer; the sum over a filter's positions is its score. A
                        tuple for layers of several tensors, a list for several layers. The model
                        runs in evaluation mode and is left as found.

        Raises:
            ValueError: The layer has no channel dimension, or does not run exactly once.
            AssertionError: The target does not fit the output, as everywhere in Captum.
        """
        with self._forward(inputs, additional_forward_args, attribute_to_layer_input) as reading:
            return self._formatted(
                self._like_layers(
                    reading,
                    lambda maps, module: self.maps_from(self.features_of(maps, module), target),
                )
            )

    def filter_scores(self, attributions: Tensor, attribute_to_layer_input: bool = False) -> Tensor:
        r"""
        Sum attributions over each filter's positions.

        Args:

            attributions (Tensor): What ``attribute`` returned for one layer, shape (N, K, ...), or
                        channels last.
            attribute_to_layer_input (bool): They belong to the layer's input.
                        Default: False

        Returns:
            *Tensor* of shape (N, K); of half precision in float32, which holds the sums.
        """
        layer = self.layer if isinstance(self.layer, nn.Module) else None
        model = module_of(self.forward_func, self._layers())
        axis = layer_axis(model, layer, attributions, self.channel_dim, attribute_to_layer_input)
        return aggregated(positions_last(attributions, axis), "sum")

    @arguments_checked
    def identify(
        self,
        dataloader: Dataloader,
        *,
        num_classes: int | None = None,
        class_names: ClassNames | None = None,
        target: int | None = None,
        num_filters: int | None = None,
        mass: float | None = None,
        attribute_kwargs: AttributeKwargs | None = None,
        attribute_to_layer_input: bool = False,
        significance: "bool | LabelPermutation" = False,
        state_path: AnyPath | None = None,
        save_every: float | None = None,
        unpack: Unpack | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> "ClassFilters":
        r"""
        Find each class's filters on a data set, in one pass.

        The short form of :func:`captum_classfilters.identify_class_filters` for one method.

        Args:

            dataloader (iterable): Batches of (inputs, labels).
            num_classes, class_names, target, num_filters, mass, attribute_kwargs: As for
                        :func:`captum_classfilters.identify_class_filters`.
            attribute_to_layer_input, significance, state_path, save_every: Likewise.
            unpack, device, show_progress: Likewise.

        Returns:
            *ClassFilters*: Classes by filters; a list of tables for several layers.
        """
        table: ClassFilters = identify_class_filters(
            self,
            dataloader,
            num_classes=num_classes,
            class_names=class_names,
            target=target,
            num_filters=num_filters,
            mass=mass,
            attribute_kwargs=attribute_kwargs,
            attribute_to_layer_input=attribute_to_layer_input,
            significance=significance,
            state_path=state_path,
            save_every=save_every,
            unpack=unpack,
            device=device,
            show_progress=show_progress,
        )
        return table

    # -- for subclasses --------------------------------------------------------------------------

    @contextmanager
    def _forward(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: object = None,
        at_input: bool = False,
        layers: Sequence[nn.Module] | None = None,
        grad_kwargs: Keywords | None = None,
        scale: float = 1.0,
        scores_alone: bool = False,
    ) -> "Iterator[BatchReading]":
        """One forward pass, the model in evaluation mode and left as found."""
        images = ordinary(format_tensor_into_tuples(inputs))
        extra = ordinary(format_additional_forward_args(additional_forward_args) or ())
        derivative = self.needs_derivative and not scores_alone
        shared = SharedForward(
            self.forward_func,
            [
                LayerRequest(layer, self.channel_dim, derivative)
                for layer in (self._layers() if layers is None else layers)
            ],
            at_input,
            several=True,
            device_ids=self.device_ids,
            grad_kwargs=grad_kwargs,
            scale=scale,
        )
        with ExitStack() as stack:
            stack.enter_context(model_left_as_found(shared.model, evaluation=True, freeze=True))
            stack.enter_context(torch.inference_mode(False))
            yield stack.enter_context(shared.run((*images, *extra), num_images(images)))

    def _like_layers(
        self, reading: BatchReading, maps_of: Callable[[FilterMaps, nn.Module], Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """Maps (N, K, P) of every layer and tensor, in the layers' own layouts and types."""
        return [
            tuple(
                layout.restored(maps_of(maps, module))
                for maps, layout in zip(tensors, layouts, strict=True)
            )
            for tensors, layouts, module in zip(
                reading.layers, reading.layouts, self._layers(), strict=True
            )
        ]

    def _layers(self) -> list[nn.Module]:
        layers = list(self.layer) if isinstance(self.layer, (list, tuple)) else [self.layer]
        for layer in layers:
            _check_layer(layer)
        return layers

    def _layer_names(self) -> list[str]:
        model = module_of(self.forward_func, self._layers())
        return [layer_name(model, layer) for layer in self._layers()]

    def _formatted(self, attributions: list[tuple[Tensor, ...]]) -> Attributions:
        """Captum's form: a tensor, a tuple for several tensors, a list for several layers."""
        owned = [tuple(part.detach().contiguous() for part in layer) for layer in attributions]
        shaped = [layer[0] if len(layer) == 1 else layer for layer in owned]
        return shaped if isinstance(self.layer, (list, tuple)) else shaped[0]


class WeightedFilterAttribution(LayerFilterAttribution):
    r"""
    Base of the methods whose attribution is an activation times a weight.

    A subclass adds its rule as :meth:`weights_from`. With weights that are the same at all positions
    of a filter, a data set needs the filters' mean activations alone.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
    """

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: weights times activations."""
        return True

    def weights_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        r"""
        The rule of the method: the weight of each activation.

        Args:

            maps (FilterMaps): What the layer put out; see
                        :meth:`LayerFilterAttribution.scores_from`.
            target (int, tuple, Tensor, list or None): The target, or for data sets the labels (N,).

        Returns:
            *Tensor* of shape (N, K, P), or (N, K, 1) where all positions of a filter weigh alike.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rule: define weights_from.")

    def scores_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        """Activations times weights, summed over positions (N, K)."""
        return maps.weighted_sum(self._checked_weights(maps, target))

    def maps_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        """Activations times weights (N, K, P)."""
        return maps.maps * self._checked_weights(maps, target)

    def _checked_weights(self, maps: FilterMaps, target: TargetType) -> Tensor:
        weights = self.weights_from(maps, target)
        if len(weights) not in (1, len(maps.means)):
            raise AssertionError(
                f"target has {len(weights)} classes for {len(maps.means)} images; expected one, or "
                "one for each image."
            )
        return weights


def _resolved(forward_func: ForwardFunc, layer: object) -> Any:
    if isinstance(layer, str):
        return find_layer(module_of(forward_func), layer)
    if isinstance(layer, (list, tuple)):
        return [_resolved(forward_func, part) for part in layer]
    if layer is not None:  # which Captum's TCAV sets later
        _check_layer(layer)
    return layer


def _check_layer(layer: object) -> None:
    if not isinstance(layer, nn.Module):
        raise ValueError(
            f"layer={layer!r}; expected a module of the model, or its dotted name: "
            "captum_classfilters.layers(model, inputs) lists them."
        )
