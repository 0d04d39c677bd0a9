"""Badola et al.: how often a filter is among an image's strongest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_classfilters._core.captum import (
    _format_tensor_into_tuples,
    _forward_layer_eval,
    log_usage,
)
from captum_classfilters._core.layers import along_filters, filter_axis, positions_last, runs_once
from captum_classfilters.attr.base import LayerFilterAttribution, Layers


class LayerFilterFrequency(LayerFilterAttribution):
    r"""
    Votes of an image for its strongest filters, the evidence of *Decomposing the Deep*.

    Filter *k* of image *n* gets one vote if its mean activation

    .. math:: z_{nk} = \frac{1}{HW} \sum_{h, w} a_{nkhw}

    is among the ``top_k`` largest of the image, and none otherwise. Over the images of a class the
    votes add up to the paper's activation-frequency histogram, whose rows sum to ``top_k`` times
    the number of images; the filters with the most votes are the class's filters. For activations
    after a ReLU the mean activation is the L1 norm of the map over HW, hence the title of the
    paper's first version.

    Source: Badola, Roy, Padmanabhan, Lal: *Decomposing the Deep: Finding Class Specific Filters in
    Deep CNNs*, Neural Computing & Applications 35 (2023), https://arxiv.org/abs/2112.07719. Unlike
    the authors' code, equal activations are decided in favour of the lower filter index, and maps
    need not be square.

    The target is not used: the votes depend on the image alone, the class enters with the labels
    in ``identify``.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        top_k (int): Number of votes of each image.
                    Default: 5
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterFrequency
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> frequency = LayerFilterFrequency(net, net[1], top_k=3)
        >>> votes = frequency.attribute(torch.rand(4, 3, 6, 6))
        >>> votes.shape
        torch.Size([4, 8, 4, 4])
        >>> frequency.filter_scores(votes).sum(1)
        tensor([3., 3., 3., 3.])
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        top_k: int = 5,
        channel_dim: int | None = None,
    ) -> None:
        LayerFilterAttribution.__init__(self, forward_func, layer, device_ids, channel_dim)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k={top_k!r} must be a whole number of at least 1.")
        self.top_k = top_k

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, for the record."""
        return {"top_k": self.top_k}

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            target (optional): Accepted so that callers can treat all methods alike; not used.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of the forward function.
                        Default: None
            attribute_to_layer_input (bool): Vote on the layer's input instead of its output.
                        Default: False

        Returns:
            *Tensor*, *tuple[Tensor, ...]* or *list* of **attributions**:
            - **attributions** (*Tensor*, *tuple[Tensor, ...]* or *list*):
                        Votes shaped like the layer, each vote spread evenly over the filter's
                        positions so that it sums to one. A tuple for layers of several tensors, a
                        list for several layers.

        Raises:
            ValueError: ``top_k`` exceeds the number of filters, the layer has no channel dimension,
                        or it does not run exactly once.
        """
        inputs = _format_tensor_into_tuples(inputs)
        layers = self._layers()
        with runs_once(layers, self._layer_names):
            activations = _forward_layer_eval(
                self.forward_func,
                inputs,
                layers,
                additional_forward_args,
                device_ids=self.device_ids,
                attribute_to_layer_input=attribute_to_layer_input,
            )
        votes = [
            tuple(
                self._votes_like(tensor, None if attribute_to_layer_input else layer)
                for tensor in tensors
            )
            for layer, tensors in zip(layers, activations, strict=True)
        ]
        return self._formatted(votes)

    def _votes_like(self, activation: Tensor, layer: Any) -> Tensor:
        axis = filter_axis(layer, activation, self.channel_dim)
        maps = positions_last(activation, axis)
        votes = strongest(maps.mean(2), self.top_k).to(activation.dtype) / maps.shape[2]
        return along_filters(votes, activation, axis).expand_as(activation)


def strongest(values: Tensor, top_k: int) -> Tensor:
    r"""
    Mark the ``top_k`` largest values of each row; ties go to the lower index.

    Args:

        values (Tensor): Shape (N, K).
        top_k (int): How many to mark.

    Returns:
        *Tensor* of bool, shape (N, K), with ``top_k`` entries set in every row.

    Raises:
        ValueError: ``top_k`` exceeds K.
    """
    if top_k > values.shape[1]:
        raise ValueError(
            f"top_k={top_k} is larger than the {values.shape[1]} filters of the layer."
        )
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
