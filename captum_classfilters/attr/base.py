"""What the layer attributions of this package share."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters._core.layers import (
    filter_axis,
    find_layer,
    layer_name,
    module_of,
    positions_last,
)

if TYPE_CHECKING:
    from captum_classfilters._core.captum import TargetType
    from captum_classfilters.class_filters import ClassFilters

Layers = nn.Module | list[nn.Module]


class LayerFilterAttribution(LayerAttribution):
    r"""
    Base of the layer attributions whose features are filters.

    The attributions have the layer's shape, and **summing them over a filter's positions gives the
    filter's score** for the image; :meth:`filter_scores` does that for any layout.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
    """

    # What the features are, where they are not the layer's filters; it ends a table's layer name.
    features_name: str | None = None

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        LayerAttribution.__init__(self, forward_func, _resolved(forward_func, layer), device_ids)
        self.channel_dim = channel_dim

    def filter_scores(self, attributions: Tensor, attribute_to_layer_input: bool = False) -> Tensor:
        r"""
        Sum attributions over each filter's positions.

        Args:

            attributions (Tensor): What ``attribute`` returned for one layer, shape (N, K, ...), or
                        channels last.
            attribute_to_layer_input (bool): They belong to the layer's input.
                        Default: False

        Returns:
            *Tensor* of shape (N, K).
        """
        known = isinstance(self.layer, nn.Module) and not attribute_to_layer_input
        layer = self.layer if known else None
        axis = filter_axis(layer, attributions, self.channel_dim)
        return positions_last(attributions, axis).sum(2)

    def identify(self, dataloader: Iterable[Any], **options: Any) -> "ClassFilters":
        r"""
        Find each class's filters on a data set, in one pass.

        The short form of :func:`captum_classfilters.identify_class_filters` for one method.

        Args:

            dataloader (iterable): Batches of (inputs, labels).
            options: As for :func:`captum_classfilters.identify_class_filters`.

        Returns:
            *ClassFilters*: Classes by filters.
        """
        # The only upward import of the package: the short form that users expect on a method.
        from captum_classfilters.identify import identify_class_filters

        return identify_class_filters(self, dataloader, **options)

    # -- for identify and for `attribute` --------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, for the record."""
        return {}

    def _layers(self) -> list[nn.Module]:
        if isinstance(self.layer, (list, tuple)):
            return list(self.layer)
        return [self.layer]

    def _layer_names(self) -> list[str]:
        model = module_of(self.forward_func)
        return [layer_name(model, layer) for layer in self._layers()]

    def _formatted(self, attributions: list[tuple[Tensor, ...]]) -> Any:
        """Captum's form: a tensor, a tuple for several tensors, a list for several layers."""
        owned = [tuple(one.detach().contiguous() for one in layer) for layer in attributions]
        shaped = [layer[0] if len(layer) == 1 else layer for layer in owned]
        return shaped if isinstance(self.layer, (list, tuple)) else shaped[0]


def class_indices(num_classes: int, target: "TargetType", num_images: int) -> Tensor:
    """The class that each image's target selects of (N, C) outputs, as (N,)."""
    from captum_classfilters._core.captum import _select_targets

    table = torch.arange(num_classes).expand(num_images, num_classes)
    selected = _select_targets(table, target)
    return selected.reshape(-1).expand(num_images)


def _resolved(forward_func: Callable[..., Any], layer: Any) -> Any:
    if isinstance(layer, str):
        return find_layer(module_of(forward_func), layer)
    if isinstance(layer, (list, tuple)):
        return [_resolved(forward_func, one) for one in layer]
    return layer
