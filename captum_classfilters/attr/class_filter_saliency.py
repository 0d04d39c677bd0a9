"""Where in the image the target's class filters look."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from captum.attr import Attribution, GradientAttribution
from torch import Tensor, nn

from captum_classfilters._core.captum import (
    BaselineType,
    TargetType,
    _extract_device_ids,
    _format_additional_forward_args,
    _format_input_baseline,
    _format_output,
    _forward_layer_distributed_eval,
    _is_tuple,
    _sort_key_list,
    apply_gradient_requirements,
    approximation_parameters,
    log_usage,
    undo_gradient_requirements,
)
from captum_classfilters._core.layers import (
    along_filters,
    filter_axis,
    find_layer,
    layer_name,
    module_of,
    runs_once,
)
from captum_classfilters.attr.base import class_indices
from captum_classfilters.attr.layer_filter_contribution import LayerFilterContribution
from captum_classfilters.class_filters import ClassFilters

Mode = Literal["input_gradient", "activation_map"]


class ClassFilterSaliency(GradientAttribution):
    r"""
    An explanation in the input's shape, through the target's class filters alone.

    ``mode="input_gradient"`` lets the gradient of the target's output flow back to the input
    through the selected filters of the class and through nothing else,

    .. math:: \phi_i = (x_i - x'_i) \sum_{k \in S_c} \sum_{h, w}
              \frac{\partial F_c}{\partial a_{khw}} \frac{\partial a_{khw}}{\partial x_i} ,

    with the baseline x' = 0. ``n_steps`` averages the gradients along the straight path from the
    baseline to the input. With every filter selected at a layer that all paths pass, this is
    Captum's InputXGradient and, with ``n_steps``, its IntegratedGradients; with fewer it is the
    share of that explanation which the class's filters carry.

    ``mode="activation_map"`` adds up the contribution maps of the selected filters (see
    :class:`LayerFilterContribution`), and interpolates them to the input's size: Grad-CAM
    (Selvaraju et al. 2017) for the class filters, without averaging the gradients over positions.
    It costs one forward pass at a pool + linear head. Every input channel gets an equal part, so
    that summing over channels, as Captum's visualiser does, gives the map.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module or str): The layer that ``class_filters`` was found at, or its name.
        class_filters (ClassFilters): The table with a selection of filters for each class.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        mode (str): ``"input_gradient"`` or ``"activation_map"``.
                    Default: "input_gradient"
        multiply_by_inputs (bool): Multiply gradients by input minus baseline.
                    Default: True
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Raises:
        ValueError: The table selects no filters, or the mode is unknown.

    Examples::

        >>> import torch
        >>> from captum_classfilters import ClassFilterSaliency, LayerFilterContribution
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 1, 0]))]
        >>> table = LayerFilterContribution(net, net[1]).identify(
        ...     data, num_filters=3, show_progress=False)
        >>> saliency = ClassFilterSaliency(net, net[1], table)
        >>> saliency.attribute(data[0][0], target=1).shape
        torch.Size([4, 3, 6, 6])
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str | None,
        class_filters: ClassFilters,
        device_ids: list[int] | None = None,
        mode: Mode = "input_gradient",
        multiply_by_inputs: bool = True,
        channel_dim: int | None = None,
    ) -> None:
        Attribution.__init__(self, forward_func)
        GradientAttribution.__init__(self, forward_func)
        if mode not in ("input_gradient", "activation_map"):
            raise ValueError(f"mode={mode!r}; choose 'input_gradient' or 'activation_map'.")
        if not bool(class_filters.selected.any()):
            raise ValueError(
                "class_filters selects no filters; choose some with "
                "class_filters.select(num_filters=...)."
            )
        self.layer: Any = (
            find_layer(module_of(forward_func), layer) if isinstance(layer, str) else layer
        )
        self.class_filters = class_filters
        self.device_ids = device_ids
        self.mode = mode
        self._multiply_by_inputs = multiply_by_inputs
        self.channel_dim = channel_dim

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are in units of the output rather than of its gradient."""
        return self._multiply_by_inputs

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: Any = None,
        n_steps: int | None = None,
        method: str = "gausslegendre",
    ) -> Any:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            baselines (scalar, Tensor or tuple, optional): Where the path of ``n_steps`` starts and
                        what is subtracted from the input, zero by default. Not used by
                        ``mode="activation_map"``.
                        Default: None
            target (int, tuple, Tensor or list, optional): The class to explain, in any of Captum's
                        forms for (N, C) outputs.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of the forward function.
                        Default: None
            n_steps (int, optional): Steps of the path; by default one gradient at the input. In
                        ``mode="activation_map"``, steps of the path in gate space.
                        Default: None
            method (str): Quadrature of the path.
                        Default: "gausslegendre"

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Shaped like ``inputs``.

        Raises:
            ValueError: The layer's filters do not match the table's, or the target's class has no
                        selected filters.
        """
        is_tuple = _is_tuple(inputs)
        points: tuple[Tensor, ...]
        points, baselines = _format_input_baseline(inputs, baselines)
        chosen = self._chosen_filters(target, len(points[0]))
        extra = _format_additional_forward_args(additional_forward_args)
        if self.mode == "activation_map":
            attributions = self._maps(points, target, extra, n_steps, method, chosen)
        else:
            path = [(1.0, 1.0)]
            if n_steps is not None:
                step_sizes, alphas = approximation_parameters(method)
                path = list(zip(step_sizes(n_steps), alphas(n_steps), strict=True))
            gradients = self._gradients(points, baselines, target, extra, path, chosen)
            attributions = gradients
            if self.multiplies_by_inputs:
                attributions = tuple(
                    gradient * (one - baseline)
                    for gradient, one, baseline in zip(gradients, points, baselines, strict=True)
                )
        owned = tuple(one.detach().contiguous() for one in attributions)
        return _format_output(is_tuple, owned)

    def _chosen_filters(self, target: TargetType, num_images: int) -> Tensor:
        """Selected filters of each image's class (N, K)."""
        classes = class_indices(self.class_filters.num_classes, target, num_images)
        chosen = self.class_filters.selected[classes]
        empty = classes[~chosen.any(1)].unique().tolist()
        if empty:
            names = ", ".join(self.class_filters.class_names[index] for index in empty)
            raise ValueError(f"No filters are selected for the target class(es) {names}.")
        return chosen

    def _mask(self, chosen: Tensor, activation: Tensor) -> Tensor:
        axis = filter_axis(self.layer, activation, self.channel_dim)
        if activation.shape[axis] != chosen.shape[1]:
            raise ValueError(
                f"The layer has {activation.shape[axis]} filters, but class_filters was found at "
                f"{self.class_filters.layer!r} with {chosen.shape[1]}."
            )
        return along_filters(chosen.to(activation), activation, axis)

    def _gradients(
        self,
        inputs: tuple[Tensor, ...],
        baselines: tuple[Any, ...],
        target: TargetType,
        extra: Any,
        path: list[tuple[float, float]],
        chosen: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients through the chosen filters, averaged over the path; one step at a time."""
        total = [torch.zeros_like(one) for one in inputs]
        for step_size, alpha in path:
            points = tuple(
                (baseline + alpha * (one - baseline)).detach()
                for one, baseline in zip(inputs, baselines, strict=True)
            )
            for sums, gradient in zip(
                total, self._gradient(points, target, extra, chosen), strict=True
            ):
                sums.add_(gradient, alpha=step_size)
        return tuple(total)

    def _gradient(
        self, points: tuple[Tensor, ...], target: TargetType, extra: Any, chosen: Tensor
    ) -> tuple[Tensor, ...]:
        flags = apply_gradient_requirements(points, warn=False)
        name = layer_name(module_of(self.forward_func), self.layer)
        with torch.enable_grad():
            with runs_once([self.layer], lambda: [name]):
                saved, output = _forward_layer_distributed_eval(
                    self.forward_func,
                    points,
                    self.layer,
                    target,
                    extra,
                    forward_hook_with_return=True,
                )
            device_ids = _extract_device_ids(self.forward_func, saved, self.device_ids)
            devices = _sort_key_list(list(saved[self.layer]), device_ids)
            tensors = [_single(saved[self.layer][device], name) for device in devices]
            at_layer = torch.autograd.grad(torch.unbind(output), tensors, retain_graph=True)
            through = self._through_chosen(tensors, at_layer, chosen)
            gradients = torch.autograd.grad(tensors, points, through, allow_unused=True)
        undo_gradient_requirements(points, flags)
        return tuple(
            torch.zeros_like(point) if gradient is None else gradient
            for point, gradient in zip(points, gradients, strict=True)
        )

    def _through_chosen(
        self, tensors: list[Tensor], gradients: tuple[Tensor, ...], chosen: Tensor
    ) -> list[Tensor]:
        """Gradients at the layer, those of other filters set to zero; one tensor per device."""
        shares = chosen.split([len(tensor) for tensor in tensors])
        return [
            gradient * self._mask(share, tensor)
            for tensor, gradient, share in zip(tensors, gradients, shares, strict=True)
        ]

    def _maps(
        self,
        inputs: tuple[Tensor, ...],
        target: TargetType,
        extra: Any,
        n_steps: int | None,
        method: str,
        chosen: Tensor,
    ) -> tuple[Tensor, ...]:
        contribution = LayerFilterContribution(
            self.forward_func, self.layer, self.device_ids, self.channel_dim
        )
        attributions = contribution.attribute(inputs, target, extra, n_steps=n_steps, method=method)
        attributions = _single(attributions, contribution._layer_names()[0])
        axis = filter_axis(self.layer, attributions, self.channel_dim)
        maps = (attributions * self._mask(chosen, attributions)).sum(axis, keepdim=True)
        maps = maps.movedim(axis, 1)
        if maps.dim() < 3:
            raise ValueError(
                "mode='activation_map' needs a layer with positions, (N, K, H, W) say; "
                f"this one puts out {tuple(attributions.shape)}."
            )
        return tuple(_like_input(maps, one) for one in inputs)


def _single(value: Any, name: str) -> Tensor:
    if isinstance(value, (tuple, list)):
        if len(value) != 1:
            raise ValueError(f"The layer {name!r} puts out {len(value)} tensors; expected one.")
        value = value[0]
    tensor: Tensor = value
    return tensor


def _like_input(maps: Tensor, one: Tensor) -> Tensor:
    """(N, 1, h, w) spread over an input's positions and channels, its total unchanged in kind."""
    if one.dim() != maps.dim():
        raise ValueError(
            f"An input of shape {tuple(one.shape)} has no positions that match the layer's "
            f"{tuple(maps.shape[2:])}; use mode='input_gradient'."
        )
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    spread = F.interpolate(maps, size=one.shape[2:], mode=modes[maps.dim()], align_corners=False)
    return spread.expand_as(one) / one.shape[1]
