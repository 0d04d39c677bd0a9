"""The signed contribution of each filter to the target's logit."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from captum.attr import GradientAttribution
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType, approximation_parameters, log_usage
from captum_classfilters._core.forward import BatchReading, FilterMaps
from captum_classfilters._core.outputs import at_least_float32, class_scores
from captum_classfilters._core.targets import own_scores
from captum_classfilters._core.types import Attributions, Keywords
from captum_classfilters.attr.base import LayerFilterAttribution, Layers, WeightedFilterAttribution


class LayerFilterContribution(WeightedFilterAttribution, GradientAttribution):
    r"""
    How much each filter adds to the target's logit.

    The contribution of filter *k* is its activation times the gradient of the target's score
    :math:`F_c` with respect to it, summed over positions,

    .. math:: \phi_k = \sum_{h, w} a_{khw} \, \frac{\partial F_c}{\partial a_{khw}} .

    Where the rest of the network is pooling and a linear layer with weight *W* and bias *b* this is
    :math:`\bar a_k W_{ck}`, and it is **exact**: the contributions sum to the logit minus the
    logit with every filter removed, :math:`F_c - b_c`. That case is recognized on the numbers of
    the batch and needs neither a backward pass nor a graph: the explanation costs one forward
    pass.

    Elsewhere the sum misses something; ``return_convergence_delta`` says how much. With ``n_steps``
    the contributions are integrated along the straight path in gate space from all filters removed
    (:math:`\alpha = 0`) to the model as it is (:math:`\alpha = 1`),

    .. math:: \phi_k = \sum_{h, w} a_{khw} \int_0^1
              \frac{\partial F_c(\alpha a)}{\partial (\alpha a_{khw})} \, d\alpha ,

    which closes the gap as ``n_steps`` grows: Integrated Gradients (Sundararajan et al. 2017,
    https://arxiv.org/abs/1703.01365) with filters' gates for inputs.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> contribution = LayerFilterContribution(net, net[1])
        >>> images = torch.rand(4, 3, 6, 6)
        >>> attributions, delta = contribution.attribute(
        ...     images, target=1, return_convergence_delta=True)
        >>> scores = contribution.filter_scores(attributions)  # (4, 8)
        >>> torch.allclose(scores.sum(1), net(images)[:, 1] - net[4].bias[1], atol=1e-5)
        True
    """

    @arguments_checked
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        LayerFilterAttribution.__init__(self, forward_func, layer, device_ids, channel_dim)
        GradientAttribution.__init__(self, forward_func)

    needs_derivative = True

    def weights_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        """The rule: the derivative of the target's score."""
        return maps.derivative(target)

    def has_convergence_delta(self) -> bool:
        """True."""
        return True

    @arguments_checked
    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        n_steps: int | None = None,
        method: str = "gausslegendre",
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Keywords | None = None,
    ) -> Attributions:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            target (int, tuple, Tensor or list, optional): The output to explain, in any of
                        Captum's forms.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of the forward function.
                        Default: None
            n_steps (int, optional): Integrate along the gate path with this many steps; by default
                        one gradient at the activations themselves.
                        Default: None
            method (str): Quadrature of the path, as for Captum's Integrated Gradients.
                        Default: "gausslegendre"
            return_convergence_delta (bool): Also return what the contributions miss.
                        Default: False
            attribute_to_layer_input (bool): Explain by the layer's input instead of its output.
                        Default: False
            grad_kwargs (dict, optional): Passed on to ``torch.autograd.grad``.
                        Default: None

        Returns:
            **attributions**, or the 2-element tuple **attributions**, **delta**:
            - **attributions** (*Tensor*, *tuple[Tensor, ...]* or *list*):
                        Contributions shaped like the layer, in units of the output; their sum over
                        a filter's positions is the filter's contribution. A tuple for layers of
                        several tensors, a list for several layers.
            - **delta** (*Tensor* of shape (N,), a list of them for several layers):
                        The sum of all contributions, minus the output's change between all filters
                        removed and none.

        Raises:
            ValueError: The layer has no channel dimension, or does not run exactly once.
            AssertionError: The target does not fit the output, as everywhere in Captum.
        """
        if n_steps is not None and n_steps < 1:
            raise ValueError(f"n_steps={n_steps} must be at least 1.")
        run = partial(
            self._forward,
            inputs,
            additional_forward_args,
            attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
        )
        with run() as reading:
            scores = self._own_scores(reading, target) if return_convergence_delta else None
            if n_steps is None:
                maps = self._like_layers(reading, lambda maps, _: self.maps_from(maps, target))
        if n_steps is not None:
            step_sizes, alphas = approximation_parameters(method)
            path = list(zip(step_sizes(n_steps), alphas(n_steps), strict=True))
            maps = [self._integrated(layer, path, target, run) for layer in self._layers()]
        if scores is None:
            return self._formatted(maps)
        deltas = [
            _total(parts) - (scores - self._without(layer, target, run))
            for layer, parts in zip(self._layers(), maps, strict=True)
        ]
        several = isinstance(self.layer, (list, tuple))
        return self._formatted(maps), deltas if several else deltas[0]

    def _integrated(
        self,
        layer: nn.Module,
        path: list[tuple[float, float]],
        target: TargetType,
        run: Callable[..., AbstractContextManager[BatchReading]],
    ) -> tuple[Tensor, ...]:
        """Contributions integrated along the gate path, one step at a time."""
        average: list[Tensor] = []
        for step_size, alpha in path:
            with run(layers=[layer], scale=alpha) as reading:
                slopes = [step_size * maps.derivative(target) for maps in reading.layers[0]]
            average = [a + b for a, b in zip(average, slopes, strict=True)] if average else slopes
        with run(layers=[layer]) as reading:
            return tuple(
                layout.restored(maps.maps * slope)
                for maps, layout, slope in zip(
                    reading.layers[0], reading.layouts[0], average, strict=True
                )
            )

    def _own_scores(self, reading: BatchReading, target: TargetType) -> Tensor:
        """The target's score (N,)."""
        scores = own_scores(class_scores(reading.output), target, len(reading.layers[0][0].means))
        return scores.detach()

    def _without(
        self,
        layer: nn.Module,
        target: TargetType,
        run: Callable[..., AbstractContextManager[BatchReading]],
    ) -> Tensor:
        """The target's score (N,) with all filters of a layer removed."""
        with torch.no_grad(), run(layers=[layer], scale=0.0, scores_alone=True) as reading:
            return self._own_scores(reading, target)


def _total(parts: tuple[Tensor, ...]) -> Tensor:
    """The sum of all contributions of each image (N,)."""
    return torch.stack([at_least_float32(part.detach()).flatten(1).sum(1) for part in parts]).sum(0)
