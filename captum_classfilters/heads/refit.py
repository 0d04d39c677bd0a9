"""Refit a head on cached features: seconds, the backbone untouched."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.devices import ordinary, without_autocast
from captum_classfilters._core.guard import check_ordinary, weights_change
from captum_classfilters._core.outputs import log_probabilities
from captum_classfilters._core.types import Dataloader, Unpack
from captum_classfilters.heads.decomposed_linear import DecomposedLinear
from captum_classfilters.heads.head_features import head_features
from captum_classfilters.heads.linear_head import scoring_head


@arguments_checked
def refit_head(
    model: nn.Module,
    dataloader: Dataloader,
    *,
    head: nn.Module | str | None = None,
    weight_decay: float = 1e-4,
    label_smoothing: float = 0.0,
    max_iterations: int = 200,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> list[float]:
    r"""
    Train a model's head, decomposed or dense, on cached features; nothing before it changes.

    The head's inputs are collected once in evaluation mode. The convex objective

    .. math:: \frac{1}{N} \sum_n \mathrm{CE}(y_n, V z_n + b)
              + \frac{\lambda}{2} \, \lVert V - V_0 \rVert^2

    pulls towards the weights found, and is minimized by full-batch L-BFGS, which is deterministic.
    Of a binary classifier's one logit, CE is the binary cross-entropy. The model must return the
    head's output, or its softmax or log-softmax: the logits are then those of the model.

    Args:

        model (nn.Module): The model; its head is changed in place, and nothing else.
        dataloader (iterable): Batches of (inputs, labels).
        head (nn.Module or str, optional): The head, or its dotted name. By default the last
                    linear layer.
                    Default: None
        weight_decay (float): :math:`\lambda`.
                    Default: 1e-4
        label_smoothing (float): As for ``torch.nn.functional.cross_entropy``.
                    Default: 0.0
        max_iterations (int): Iterations of L-BFGS at most.
                    Default: 200
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar while features are collected.
                    Default: True

    Returns:
        *list of float*: The objective before, and after each iteration.

    Raises:
        ValueError: The head is not linear, the model changes its output, or labels do not fit.
    """
    linear, dataloader = scoring_head(model, dataloader, head, unpack=unpack, alone=False)
    name, module = linear.name, linear.module
    if linear.convolution_dims or module._parameters.get("weight") is None:
        raise ValueError(
            f"The head {name!r} ({type(module).__name__}) is not an nn.Linear with a weight of its "
            "own (a convolution, or a weight that is computed from others); use "
            "fine_tune(..., freeze='backbone')."
        )
    collected = head_features(model, linear, dataloader, unpack=unpack, show_progress=show_progress)
    if not collected.ends and not collected.same_probabilities:
        raise ValueError(
            f"The model changes the output of its head {name!r} before it returns it, or adds to it: "
            "weights that fit the head would not fit the model. Use "
            "fine_tune(..., freeze='backbone')."
        )
    return fit_linear(
        module,  # type: ignore[arg-type]
        collected.features,
        collected.labels,
        weight_decay,
        label_smoothing,
        max_iterations,
    )


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

        module (nn.Linear or DecomposedLinear): The layer; one of a single output is fitted to two
                    classes, its output the logit of class 1.
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
        ValueError: Shapes or labels do not fit, features are not finite, or so large that the fit is
                    not.
    """
    check_ordinary(module)
    _check(module, features, labels)
    # Half precision is too coarse for a line search.
    with weights_change(), without_autocast(module.weight.device):
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        twin = copy.deepcopy(module).to(dtype).requires_grad_()
        labels = labels.to(twin.weight.device, torch.int64)
        features, labels = ordinary((features.to(twin.weight), labels))
        history = _minimize(twin, features, labels, weight_decay, label_smoothing, max_iterations)
    fitted = dict(twin.named_parameters())
    if not all(bool(parameter.isfinite().all()) for parameter in fitted.values()):
        raise ValueError(
            "The fit of the head ended in NaN or Inf, so its weights stay as they were: features "
            f"reach {float(features.abs().max()):.1e}. Normalize the images, or the features before "
            "the head, to numbers near 1."
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(fitted[name])
    return history


def _minimize(
    module: nn.Linear | DecomposedLinear,
    features: Tensor,
    labels: Tensor,
    weight_decay: float,
    label_smoothing: float,
    max_iterations: int,
) -> list[float]:
    """Fit a module by L-BFGS; the objective before, and after each iteration."""
    start = module.weight.detach().clone()
    parameters = list(module.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    history: list[float] = []

    def objective() -> Tensor:
        optimizer.zero_grad()
        predicted = log_probabilities(module(features))
        loss = F.cross_entropy(predicted, labels, label_smoothing=label_smoothing)
        loss = loss + 0.5 * weight_decay * (module.weight - start).square().sum()
        if torch.is_grad_enabled():
            loss.backward()
        value, iteration = float(loss.detach()), optimizer.state[parameters[0]]["n_iter"]
        if iteration == len(history):
            history.append(min([*history[-1:], value]))
        else:  # a line search takes the best of the points it tried
            history[iteration] = min(history[iteration], value)
        return loss

    optimizer.step(objective)
    return history


def _check(module: nn.Linear | DecomposedLinear, features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or features.shape[1] != module.in_features:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; expected (N, {module.in_features})."
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be {len(features)} class indices.")
    most = max(2, module.out_features) - 1
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) <= most:
        raise ValueError(f"labels are out of range: expected 0 to {most}.")
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or Inf.")
