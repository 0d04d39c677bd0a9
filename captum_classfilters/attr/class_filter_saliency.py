"""Where in the image the target's class filters look."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from captum.attr import Attribution, GradientAttribution
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import num_images
from captum_classfilters._core.captum import (
    BaselineType,
    TargetType,
    approximation_parameters,
    format_additional_forward_args,
    format_input_baseline,
    format_output,
    is_tuple,
    log_usage,
)
from captum_classfilters._core.devices import ordinary
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import (
    CHECKPOINTED,
    along_filters,
    find_layer,
    layer_name,
    module_of,
)
from captum_classfilters._core.outputs import at_least_float32, class_scores
from captum_classfilters._core.tables import bound_repr
from captum_classfilters._core.taps import LayerTap, tapping
from captum_classfilters._core.targets import class_indices, own_scores
from captum_classfilters._core.types import Attributions, ModelInputs
from captum_classfilters.attr.layer_filter_contribution import LayerFilterContribution
from captum_classfilters.class_filters import ClassFilters, check_of_output

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
    that summing over channels, as Captum's visualizer does, gives the map.

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

    @arguments_checked
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
        name = layer_name(module_of(forward_func, [self.layer]), self.layer)
        check_of_output(class_filters, name, "saliency passes through")
        self.class_filters = class_filters
        self.device_ids = device_ids
        self.mode = mode
        self._multiply_by_inputs = multiply_by_inputs
        self.channel_dim = channel_dim

    def __repr__(self) -> str:
        return bound_repr(self, self.forward_func, self.layer, mode=self.mode)

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are in units of the output rather than of its gradient."""
        return self._multiply_by_inputs

    @arguments_checked
    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        n_steps: int | None = None,
        method: str = "gausslegendre",
    ) -> Attributions:
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
        was_tuple = is_tuple(inputs)
        points: tuple[Tensor, ...]
        points, baselines = ordinary(format_input_baseline(inputs, baselines))
        chosen = self._chosen_filters(target, num_images(points))
        extra = ordinary(format_additional_forward_args(additional_forward_args) or ())
        if self.mode == "activation_map":
            attributions = self._maps(points, target, extra, n_steps, method, chosen)
        else:
            path = [(1.0, 1.0)]
            if n_steps is not None:
                step_sizes, alphas = approximation_parameters(method)
                path = list(zip(step_sizes(n_steps), alphas(n_steps), strict=True))
            model = module_of(self.forward_func, [self.layer])
            with (
                model_left_as_found(model, evaluation=True, freeze=True),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                attributions = self._gradients(points, baselines, target, extra, path, chosen)
            if self.multiplies_by_inputs:
                attributions = tuple(
                    gradient * (point - baseline)
                    for gradient, point, baseline in zip(
                        attributions, points, baselines, strict=True
                    )
                )
        owned = tuple(part.detach().contiguous() for part in attributions)
        return format_output(was_tuple, owned)

    def _chosen_filters(self, target: TargetType, number: int) -> Tensor:
        """Selected filters of each image's class (N, K)."""
        classes = class_indices(self.class_filters.num_classes, target, number)
        chosen = self.class_filters.selected[classes]
        empty = classes[~chosen.any(1)].unique().tolist()
        if empty:
            names = ", ".join(self.class_filters.class_names[index] for index in empty)
            raise ValueError(f"No filters are selected for the target class(es) {names}.")
        return chosen

    def _tap(self, react: Callable[[Tensor, int], Tensor] | None = None) -> LayerTap:
        model = module_of(self.forward_func, [self.layer])
        return LayerTap(model, self.layer, self.channel_dim, react=react)

    def _mask(self, chosen: Tensor, activation: Tensor, axis: int) -> Tensor:
        if activation.shape[axis] != chosen.shape[1]:
            raise ValueError(
                f"The layer has {activation.shape[axis]} filters, but class_filters was found at "
                f"{self.class_filters.layer!r} with {chosen.shape[1]}."
            )
        return along_filters(chosen.to(activation), activation, axis)

    def _gradients(
        self,
        inputs: tuple[Tensor, ...],
        baselines: ModelInputs,
        target: TargetType,
        extra: ModelInputs,
        path: list[tuple[float, float]],
        chosen: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients through the chosen filters, averaged over the path; one step at a time."""
        if not any(image.is_floating_point() for image in inputs):
            raise ValueError(
                f"The inputs are {', '.join(str(image.dtype) for image in inputs)}; integer inputs "
                "such as tokens have no gradient. Explain the layer behind the embedding instead: "
                "LayerFilterContribution gives a score for each filter and position."
            )
        total = [torch.zeros(i.shape, dtype=_real(i), device=i.device) for i in inputs]
        for step_size, alpha in path:
            points = tuple(
                (baseline + alpha * (image - baseline)).detach().requires_grad_()
                if image.is_floating_point()
                else image
                for image, baseline in zip(inputs, baselines, strict=True)
            )
            gradients = self._gradient(points, target, extra, chosen)
            for sums, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    sums.add_(gradient, alpha=step_size)
        return tuple(total)

    def _gradient(
        self, points: tuple[Tensor, ...], target: TargetType, extra: ModelInputs, chosen: Tensor
    ) -> list[Tensor | None]:
        """Gradients at the inputs through the chosen filters; None where there are none."""
        at_layer: list[tuple[Tensor, int]] = []

        def keep(tensor: Tensor, axis: int) -> Tensor:
            at_layer.append((tensor, axis))
            return tensor.clone()  # what follows may write into the layer's tensor

        tap = self._tap(keep)
        with tapping([tap]):
            output = self.forward_func(*points, *extra)
            tap.check(len(chosen))
        own = own_scores(class_scores(output), target, len(chosen)).sum()
        # Replicas of a data-parallel model have a share of the images each.
        tensors = [tensor for tensor, _ in at_layer]
        if not own.requires_grad or not all(tensor.requires_grad for tensor in tensors):
            raise ValueError(
                f"No gradient flows from the output through the layer {tap.name!r} to the inputs: a "
                f"part of the model runs under torch.no_grad() or is not differentiable; {CHECKPOINTED}."
            )
        slopes = torch.autograd.grad(own, tensors, retain_graph=True, materialize_grads=True)
        shares = chosen.split([len(tensor) for tensor in tensors])
        through = [
            slope * self._mask(share, tensor, axis)
            for (tensor, axis), slope, share in zip(at_layer, slopes, shares, strict=True)
        ]
        wanted = [point for point in points if point.requires_grad]
        found = iter(torch.autograd.grad(tensors, wanted, through, allow_unused=True))
        return [next(found) if point.requires_grad else None for point in points]

    def _maps(
        self,
        inputs: tuple[Tensor, ...],
        target: TargetType,
        extra: ModelInputs,
        n_steps: int | None,
        method: str,
        chosen: Tensor,
    ) -> tuple[Tensor, ...]:
        contribution = LayerFilterContribution(
            self.forward_func, self.layer, self.device_ids, self.channel_dim
        )
        attributions = contribution.attribute(inputs, target, extra, n_steps=n_steps, method=method)
        tap = self._tap()
        if not isinstance(attributions, Tensor):
            raise ValueError(
                f"The layer {tap.name!r} puts out {len(attributions)} tensors; expected one."
            )
        axis = tap.axis_of(attributions)
        masked = attributions * self._mask(chosen, attributions, axis)
        maps = at_least_float32(masked).sum(axis, keepdim=True).movedim(axis, 1)
        if maps.dim() < 3:
            raise ValueError(
                "mode='activation_map' needs a layer with positions, (N, K, H, W) for example; "
                f"this one puts out {tuple(attributions.shape)}."
            )
        if not any(_has_positions(image, maps) for image in inputs):
            raise ValueError(_no_positions(inputs, maps))
        return tuple(_like_input(maps, image) for image in inputs)


def _real(image: Tensor) -> torch.dtype:
    """The type of an input's attributions."""
    return image.dtype if image.is_floating_point() else torch.get_default_dtype()


def _has_positions(image: Tensor, maps: Tensor) -> bool:
    """Whether an input has the axes of the layer's maps: channels, then as many of positions."""
    return image.is_floating_point() and image.dim() == maps.dim()


def _no_positions(inputs: tuple[Tensor, ...], maps: Tensor) -> str:
    shapes = ", ".join(f"{tuple(image.shape)} ({image.dtype})" for image in inputs)
    advice = (
        "Use mode='input_gradient'."
        if any(image.is_floating_point() for image in inputs)
        else "The layer's own attributions, of LayerFilterContribution, show the positions."
    )
    return (
        f"Inputs of shape {shapes} have no positions that match the layer's "
        f"{tuple(maps.shape[2:])}. {advice}"
    )


def _like_input(maps: Tensor, image: Tensor) -> Tensor:
    """(N, 1, h, w) spread over an input's positions and channels, its total unchanged in kind;
    zeros for an input without positions, a table of numbers for example."""
    if not _has_positions(image, maps):
        return torch.zeros(image.shape, dtype=_real(image), device=image.device)
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    spread = F.interpolate(maps, size=image.shape[2:], mode=modes[maps.dim()], align_corners=False)
    return (spread.expand_as(image) / image.shape[1]).to(_real(image))
