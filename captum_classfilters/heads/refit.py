"""Refit a head on cached features: seconds, the backbone untouched."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.layers import find_layer
from captum_classfilters.heads.decompose import DecomposedLinear, find_head
from captum_classfilters.identify import collect_features


def refit_head(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    head: str | None = None,
    weight_decay: float = 1e-4,
    label_smoothing: float = 0.0,
    max_iterations: int = 200,
    show_progress: bool = True,
) -> list[float]:
    r"""
    Train a model's head, decomposed or dense, on cached features; nothing before it changes.

    The head's inputs are collected once in evaluation mode. The convex objective

    .. math:: \frac{1}{N} \sum_n \mathrm{CE}(y_n, V z_n + b)
              + \frac{\lambda}{2} \, \lVert V - V_0 \rVert^2

    pulls towards the weights found, and is minimised by full-batch L-BFGS, which is deterministic.

    Args:

        model (nn.Module): The model; its head is changed in place, and nothing else.
        dataloader (iterable): Batches of (images, labels).
        head (str, optional): Dotted name of the head. By default the last linear layer.
                    Default: None
        weight_decay (float): :math:`\lambda`.
                    Default: 1e-4
        label_smoothing (float): As for ``torch.nn.functional.cross_entropy``.
                    Default: 0.0
        max_iterations (int): Iterations of L-BFGS at most.
                    Default: 200
        show_progress (bool): Show a progress bar while features are collected.
                    Default: True

    Returns:
        *list of float*: The objective before, and after each iteration.

    Raises:
        ValueError: The head is not linear, or labels do not fit.
    """
    name, module = (head, find_layer(model, head)) if head else find_head(model)
    features, labels = collect_features(
        model,
        name,
        dataloader,
        attribute_to_layer_input=True,
        flatten=True,
        show_progress=show_progress,
    )
    if isinstance(module, DecomposedLinear) and module.convolution_dims:
        raise ValueError(
            f"The head {name!r} is a convolution whose output is not the model's; use fine_tune."
        )
    if not isinstance(module, (nn.Linear, DecomposedLinear)):
        raise ValueError(
            f"The head {name!r} is a {type(module).__name__}; expected a linear layer."
        )
    return fit_linear(module, features, labels, weight_decay, label_smoothing, max_iterations)


def fit_linear(
    module: nn.Linear | DecomposedLinear,
    features: Tensor,
    labels: Tensor,
    weight_decay: float = 1e-4,
    label_smoothing: float = 0.0,
    max_iterations: int = 200,
) -> list[float]:
    r"""
    Fit a linear layer to features and labels in place, pulled towards the weights it has.

    Args:

        module (nn.Linear or DecomposedLinear): The layer.
        features (Tensor): Shape (N, F).
        labels (Tensor): Shape (N,), class indices.
        weight_decay (float): Strength of the pull.
                    Default: 1e-4
        label_smoothing (float): Smoothing of the labels.
                    Default: 0.0
        max_iterations (int): Iterations of L-BFGS at most.
                    Default: 200

    Returns:
        *list of float*: The objective before, and after each iteration.

    Raises:
        ValueError: Shapes or labels do not fit.
    """
    if features.dim() != 2 or features.shape[1] != module.in_features:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; expected (N, {module.in_features})."
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be {len(features)} class indices.")
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < module.out_features:
        raise ValueError(f"labels are out of range: expected 0 to {module.out_features - 1}.")
    features, labels = features.to(module.weight), labels.to(module.weight.device)
    start = module.weight.detach().clone()
    parameters = [module.weight] + ([] if module.bias is None else [module.bias])
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    optimizer = torch.optim.LBFGS(
        [parameter.requires_grad_() for parameter in parameters],
        max_iter=max_iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    history: list[float] = []

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(features), labels, label_smoothing=label_smoothing)
        loss = loss + 0.5 * weight_decay * (module.weight - start).square().sum()
        if torch.is_grad_enabled():
            loss.backward()
        history.append(float(loss.detach()))
        return loss

    try:
        with torch.enable_grad():
            optimizer.step(objective)
    finally:
        for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient
    return history
