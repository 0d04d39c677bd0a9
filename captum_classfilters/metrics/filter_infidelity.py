"""Infidelity over filters: do scores predict what the output loses without them?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.captum import (
    format_additional_forward_args,
    format_tensor_into_tuples,
)
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import module_of
from captum_classfilters.attr import LayerFilterAblation
from captum_classfilters.attr.layer_filter_ablation import (
    Replacement,
    Score,
    lost_scores,
    score_reader,
)
from captum_classfilters.metrics.removals import RANDOM, named_scores, resolved_layer


@dataclass(frozen=True)
class FilterInfidelity:
    r"""
    Infidelity of filter scores, with scores dealt out at random as a control.

    Args:

        infidelity (dict): For each name its infidelity, Tensor (N,), float64, in squared units of
                    the output; ``"random"`` has each image's own scores in random order.
        scale_invariant (dict): The same after the best scaling of each image's scores; it does not
                    depend on their unit.
        by_filter (dict): For each name a Tensor (N, K): the squared error of each filter's score
                    when that filter alone is removed. Empty unless asked for.
        num_perturbations (int): Sets of filters that were removed from each image.
    """

    infidelity: dict[str, Tensor]
    scale_invariant: dict[str, Tensor]
    by_filter: dict[str, Tensor]
    num_perturbations: int

    def __str__(self) -> str:
        lines = [f"{'mean over images':24s} infidelity  scale-invariant"]
        for name, values in self.infidelity.items():
            scaled = float(self.scale_invariant[name].mean())
            lines.append(f"{name:24s} {float(values.mean()):10.3e}  {scaled:15.3e}")
        return "\n".join(lines)


def filter_infidelity(
    forward_func: Callable[..., Tensor],
    layer: nn.Module | str,
    inputs: Tensor | tuple[Tensor, ...],
    scores: Tensor | Mapping[str, Tensor],
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    score: Score = "logit",
    replacement: Replacement = "zero",
    drop_probability: float = 0.5,
    n_perturb_samples: int = 20,
    each_filter: bool = False,
    random_seeds: int = 5,
    channel_dim: int | None = None,
    seed: int = 0,
) -> FilterInfidelity:
    r"""
    Infidelity in gate space, for any number of scores from the same forward passes.

    Sets of filters are drawn and removed; with :math:`I` the indicator of a set, :math:`\phi` an
    image's scores and :math:`\Delta_I` what the target's output loses,

    .. math:: \mathrm{INFD} = \mathrm{E}_I \big[ (I^\top \phi - \Delta_I)^2 \big] , \qquad
              \mathrm{INFD}_{\beta} = \mathrm{E}_I \big[ (\beta I^\top \phi - \Delta_I)^2 \big] ,
              \quad \beta = \frac{\mathrm{E} [ I^\top \phi \, \Delta_I ]}
                                 {\mathrm{E} [ (I^\top \phi)^2 ]}

    (Yeh et al.: *On the (In)fidelity and Sensitivity of Explanations*, NeurIPS 2019,
    https://arxiv.org/abs/1901.09392). It is ``captum.metrics.infidelity`` of
    :class:`~captum_classfilters.FilterGate` with the same sets, without and with ``normalize=True``;
    but what precedes the layer runs once, and the outputs serve all scores and controls.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module or str): The layer whose filters were scored, or its dotted name.
        inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
        scores (Tensor or mapping): Shape (N, K), or several of them by name; what ``filter_scores``
                    of a layer attribution returns.
        target (int, tuple, Tensor or list, optional): Index of the output, in any of Captum's forms.
                    Default: None
        additional_forward_args (Any, optional): Further arguments of the forward function.
                    Default: None
        score (str): What counts as output: ``"logit"``, ``"probability"`` or
                    ``"log_probability"``.
                    Default: "logit"
        replacement (str): What stands in for a removed filter, as in
                    :class:`~captum_classfilters.LayerFilterAblation`.
                    Default: "zero"
        drop_probability (float): Probability of each filter to be in a set.
                    Default: 0.5
        n_perturb_samples (int): Sets for each image.
                    Default: 20
        each_filter (bool): Also remove every filter alone, for ``by_filter``.
                    Default: False
        random_seeds (int): Random orders of the first scores to average over, for the control.
                    Default: 5
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        seed (int): Seed of the sets; the global random state is not touched.
                    Default: 0

    Returns:
        *FilterInfidelity*.

    Raises:
        ValueError: Scores do not fit, or a number is out of range.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import filter_infidelity
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> images = torch.rand(4, 3, 6, 6)
        >>> method = LayerFilterContribution(net, net[1])
        >>> exact = method.filter_scores(method.attribute(images, target=1))
        >>> result = filter_infidelity(net, net[1], images, exact, target=1)
        >>> bool((result.infidelity["scores"] < 1e-10).all())
        True
    """
    if not 0 < drop_probability < 1:
        raise ValueError(f"drop_probability={drop_probability} must lie between 0 and 1.")
    if n_perturb_samples < 1 or random_seeds < 1:
        raise ValueError("n_perturb_samples and random_seeds must be at least 1.")
    layer = resolved_layer(forward_func, layer)
    ablation = LayerFilterAblation(
        forward_func,
        layer,
        score=score,
        replacement=replacement,
        seed=seed,
        channel_dim=channel_dim,
    )
    images: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
    generator = torch.Generator().manual_seed(seed)
    with model_left_as_found(module_of(forward_func)), torch.no_grad():
        extra = format_additional_forward_args(additional_forward_args)
        replay = ablation.replay(layer, images, additional_forward_args=extra)
        shape = (replay.num_images, replay.num_filters)
        named = named_scores(scores, shape)
        removed = torch.rand(n_perturb_samples, *shape, generator=generator) < drop_probability
        read = score_reader(replay.output, target, shape[0], score)
        lost = lost_scores(replay, removed, read)
        alone = ablation.drops(replay, target).cpu().double() if each_filter else None
    shuffled = [_shuffled(next(iter(named.values())), seed) for seed in range(random_seeds)]
    pairs = {name: _infidelity(one, removed, lost) for name, one in named.items()}
    controls = [_infidelity(one, removed, lost) for one in shuffled]
    result = {name: plain for name, (plain, _) in pairs.items()}
    scaled = {name: scale_invariant for name, (_, scale_invariant) in pairs.items()}
    result[RANDOM] = torch.stack([plain for plain, _ in controls]).mean(0)
    scaled[RANDOM] = torch.stack([scale_invariant for _, scale_invariant in controls]).mean(0)
    by_filter: dict[str, Tensor] = {}
    if alone is not None:
        by_filter = {name: (one - alone).square() for name, one in named.items()}
        errors = [(one - alone).square() for one in shuffled]
        by_filter[RANDOM] = torch.stack(errors).mean(0)
    return FilterInfidelity(result, scaled, by_filter, n_perturb_samples)


def infidelity_of(predicted: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    Infidelity, plain and scale-invariant, of predicted losses.

    Args:

        predicted (Tensor): Shape (P, N), the sum of scores for each perturbation and image.
        lost (Tensor): Shape (P, N), what the output lost.

    Returns:
        *tuple* of two Tensors (N,).
    """
    square = predicted.square().mean(0)
    # A zero prediction stays zero, whatever its factor.
    factor = (predicted * lost).mean(0) / torch.where(square > 0, square, torch.ones_like(square))
    return (predicted - lost).square().mean(0), (factor * predicted - lost).square().mean(0)


def _infidelity(scores: Tensor, removed: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    return infidelity_of(torch.einsum("pnk,nk->pn", removed.double(), scores), lost)


def _shuffled(scores: Tensor, seed: int) -> Tensor:
    """Each image's scores in random order: the right values at the wrong filters."""
    generator = torch.Generator().manual_seed(seed)
    return scores.gather(1, torch.rand(scores.shape, generator=generator).argsort(1))
