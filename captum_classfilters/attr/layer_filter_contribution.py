"""The signed contribution of each filter to the target's logit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import GradientAttribution
from torch import Tensor, nn

from captum_classfilters._core.captum import (
    TargetType,
    _format_tensor_into_tuples,
    _forward_layer_eval,
    _run_forward,
    approximation_parameters,
    compute_layer_gradients_and_eval,
    log_usage,
)
from captum_classfilters._core.heads import HeadRecord, how_layer_feeds, record_head
from captum_classfilters._core.layers import (
    along_filters,
    filter_axis,
    module_of,
    positions_last,
    runs_once,
)
from captum_classfilters.attr.base import LayerFilterAttribution, Layers, class_indices


class LayerFilterContribution(LayerFilterAttribution, GradientAttribution):
    r"""
    How much each filter adds to the target's logit.

    The contribution of filter *k* is its activation times the gradient of the target's score
    :math:`F_c` with respect to it, summed over positions,

    .. math:: \phi_k = \sum_{h, w} a_{khw} \, \frac{\partial F_c}{\partial a_{khw}} .

    Where the rest of the network is pooling and a linear layer with weight *W* and bias *b* this is
    :math:`\bar a_k W_{ck}`, and it is **exact**: the contributions sum to the logit minus the
    logit with every filter removed, :math:`F_c - b_c`. That case is recognised on the numbers of
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

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        LayerFilterAttribution.__init__(self, forward_func, layer, device_ids, channel_dim)
        GradientAttribution.__init__(self, forward_func)

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: contributions are activations times gradients."""
        return True

    def has_convergence_delta(self) -> bool:
        """True."""
        return True

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: Any = None,
        n_steps: int | None = None,
        method: str = "gausslegendre",
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
        formatted: tuple[Tensor, ...] = _format_tensor_into_tuples(inputs)
        call = _Call(self, formatted, target, additional_forward_args, attribute_to_layer_input)
        if n_steps is None:
            attributions = call.closed_form() or call.gradients(grad_kwargs)
        else:
            attributions = call.integrated(n_steps, method, grad_kwargs)
        if not return_convergence_delta:
            return self._formatted(attributions)
        deltas = [
            call.total(parts) - call.output_change(layer)
            for layer, parts in zip(self._layers(), attributions, strict=True)
        ]
        several = isinstance(self.layer, (list, tuple))
        return self._formatted(attributions), deltas if several else deltas[0]


class _Call:
    """One call of ``attribute``: its arguments, and the three ways to the contributions."""

    def __init__(
        self,
        method: LayerFilterContribution,
        inputs: tuple[Tensor, ...],
        target: TargetType,
        additional_forward_args: Any,
        at_input: bool,
    ) -> None:
        self.method = method
        self.layers = method._layers()
        self.inputs = inputs
        self.target = target
        self.additional_forward_args = additional_forward_args
        self.at_input = at_input

    def output(self) -> Tensor:
        """The target's score (N,)."""
        output: Tensor = _run_forward(
            self.method.forward_func, self.inputs, self.target, self.additional_forward_args
        )
        return output

    def closed_form(self) -> list[tuple[Tensor, ...]] | None:
        """Exact contributions where the head is linear in every layer asked for, else None."""
        model = module_of(self.method.forward_func)
        devices = self.method.device_ids or getattr(model, "device_ids", None) or []
        if model is None or len(devices) > 1:
            return None
        captured: dict[int, Any] = {}
        with (
            torch.no_grad(),
            _keep(self.layers, captured, self.at_input),
            record_head(model) as head,
        ):
            with runs_once(self.layers, self.method._layer_names):
                output = _run_forward(
                    self.method.forward_func, self.inputs, None, self.additional_forward_args
                )
            if not head.is_output(output):
                return None
            rows = class_indices(output.shape[1], self.target, len(output)).to(output.device)
            weight = head.weight[rows]
            parts = [
                self._linear_contribution(layer, captured.get(id(layer)), head, weight)
                for layer in self.layers
            ]
        return None if any(part is None for part in parts) else [(part,) for part in parts]  # type: ignore[misc]

    def _linear_contribution(
        self, layer: nn.Module, activation: Any, head: HeadRecord, weight: Tensor
    ) -> Tensor | None:
        if not isinstance(activation, Tensor) or activation.dim() < 2 or head.features is None:
            return None
        own_layer = None if self.at_input else layer
        axis = filter_axis(own_layer, activation, self.method.channel_dim)
        feed = how_layer_feeds(head.features, activation, axis)
        if feed is None:
            return None
        if feed == "flatten":
            maps = positions_last(activation, axis)
            moved = weight.reshape(maps.shape)
            shape = activation.movedim(axis, 1).shape
            return activation * moved.reshape(shape).movedim(1, axis)
        num_positions = activation[0].numel() // activation.shape[axis]
        return activation * along_filters(weight / num_positions, activation, axis)

    def gradients(
        self, grad_kwargs: dict[str, Any] | None, layers: list[nn.Module] | None = None
    ) -> list[tuple[Tensor, ...]]:
        """Activation times gradient, for any network."""
        gradients, activations = self._gradients_and_activations(
            self.layers if layers is None else layers, grad_kwargs
        )
        return [
            tuple(gradient * activation for gradient, activation in zip(*parts, strict=True))
            for parts in zip(gradients, activations, strict=True)
        ]

    def integrated(
        self, n_steps: int, method: str, grad_kwargs: dict[str, Any] | None
    ) -> list[tuple[Tensor, ...]]:
        """Contributions integrated along the gate path, one step and one layer at a time."""
        if n_steps < 1:
            raise ValueError(f"n_steps={n_steps} must be at least 1.")
        step_sizes, alphas = approximation_parameters(method)
        path = list(zip(step_sizes(n_steps), alphas(n_steps), strict=True))
        return [self._integrated_layer(layer, path, grad_kwargs) for layer in self.layers]

    def _integrated_layer(
        self, layer: nn.Module, path: list[tuple[float, float]], grad_kwargs: dict[str, Any] | None
    ) -> tuple[Tensor, ...]:
        (activations,) = _forward_layer_eval(
            self.method.forward_func,
            self.inputs,
            [layer],
            self.additional_forward_args,
            device_ids=self.method.device_ids,
            attribute_to_layer_input=self.at_input,
        )
        average = [torch.zeros_like(activation) for activation in activations]
        for step_size, alpha in path:
            with _scaled(layer, alpha, self.at_input):
                gradients, _ = self._gradients_and_activations([layer], grad_kwargs)
            for total, gradient in zip(average, gradients[0], strict=True):
                total.add_(gradient, alpha=step_size)
        return tuple(a * b for a, b in zip(activations, average, strict=True))

    def _gradients_and_activations(
        self, layers: list[nn.Module], grad_kwargs: dict[str, Any] | None
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        def names() -> list[str]:
            known = dict(zip(map(id, self.layers), self.method._layer_names(), strict=True))
            return [known[id(layer)] for layer in layers]

        with runs_once(layers, names):
            gradients, activations = compute_layer_gradients_and_eval(
                self.method.forward_func,
                layers,
                self.inputs,
                self.target,
                self.additional_forward_args,
                device_ids=self.method.device_ids,
                attribute_to_layer_input=self.at_input,
                grad_kwargs=grad_kwargs,
            )
        return gradients, [tuple(one.detach() for one in layer) for layer in activations]

    def total(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The sum of all contributions of each image (N,)."""
        sums = [part.detach().flatten(1).sum(1) for part in parts]
        return torch.stack(sums).sum(0)

    def output_change(self, layer: nn.Module) -> Tensor:
        """The output's change between all filters of a layer removed and none (N,)."""
        with torch.no_grad():
            full = self.output()
            with _scaled(layer, 0.0, self.at_input):
                removed = self.output()
        return full - removed


@contextmanager
def _keep(layers: list[nn.Module], kept: dict[int, Any], at_input: bool) -> Iterator[None]:
    """Keep a copy of each layer's tensor: in-place successors would overwrite the original."""

    def hook(module: nn.Module, inputs: Any, output: Any = None) -> None:
        tensor = inputs if at_input else output
        if isinstance(tensor, (tuple, list)) and len(tensor) == 1:
            tensor = tensor[0]
        kept[id(module)] = tensor.clone() if isinstance(tensor, Tensor) else None

    handles = [
        layer.register_forward_pre_hook(hook) if at_input else layer.register_forward_hook(hook)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _scaled(layer: nn.Module, alpha: float, at_input: bool) -> Iterator[None]:
    """Scale a layer's tensors by alpha; a scale of zero removes even what is not finite."""

    def scale(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            parts = [scale(one) for one in value]
            return parts if isinstance(value, list) else tuple(parts)
        return value * alpha if alpha else torch.zeros_like(value)

    handle = (
        layer.register_forward_pre_hook(lambda _module, inputs: scale(inputs))
        if at_input
        else layer.register_forward_hook(lambda _module, _inputs, output: scale(output))
    )
    try:
        yield
    finally:
        handle.remove()
