"""Infidelity over filters: do scores predict what the output loses without them?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.ranking import random_orders
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import ForwardFunc
from captum_classfilters.attr.filter_removal import (
    Replacement,
    Score,
    lost_scores,
    score_reader,
)
from captum_classfilters.metrics.removals import (
    RANDOM,
    check_finite,
    each_in_words,
    named_scores,
    resolved_layer,
)
from captum_classfilters.metrics.replayed_batches import replayed_images


@short_repr
@dataclass(frozen=True)
class FilterInfidelity(Tabular):
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

    def _tables(self) -> list[Table]:
        rows = [
            {
                "mean over images": name,
                "infidelity": values.mean(),
                "scale-invariant": self.scale_invariant[name].mean(),
            }
            for name, values in self.infidelity.items()
        ]
        return [Table(rows, {"infidelity": ".3e", "scale-invariant": ".3e"})]


@arguments_checked
def filter_infidelity(
    model: nn.Module | ForwardFunc,
    layer: nn.Module | str,
    inputs: Tensor | tuple[Tensor, ...],
    scores: Tensor | Mapping[str, Tensor],
    *,
    target: TargetType = None,
    additional_forward_args: object = None,
    score: Score = "logit",
    replacement: Replacement = "zero",
    drop_probability: float = 0.5,
    n_perturb_samples: int = 20,
    each_filter: bool = False,
    repetitions: int = 5,
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

        model (nn.Module or Callable): The model, or its forward function.
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
        repetitions (int): Random orders of the first scores to average over, for the control.
                    Default: 5
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        seed (int): Seed of the sets and of the random orders; the global random state is not
                    touched.
                    Default: 0

    Returns:
        *FilterInfidelity*.

    Raises:
        ValueError: Scores do not fit, a number is out of range, or the model returns NaN or Inf,
                    with filters or without.

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
    if n_perturb_samples < 1 or repetitions < 1:
        raise ValueError("n_perturb_samples and repetitions must be at least 1.")
    layer = resolved_layer(model, layer)
    generator = torch.Generator().manual_seed(seed)
    options = {"replacement": replacement, "seed": seed, "channel_dim": channel_dim}
    with replayed_images(model, layer, inputs, additional_forward_args, **options) as replay:
        shape = (replay.num_images, replay.num_filters)
        named = named_scores(scores, shape)
        removed = torch.rand(n_perturb_samples, *shape, generator=generator) < drop_probability
        read = score_reader(replay, target, score)
        lost = lost_scores(replay, removed, read)
        check_finite(lost, each_in_words(removed))
        each = replay.each_filter()
        alone = lost_scores(replay, each, read).T if each_filter else None
        if alone is not None:
            check_finite(alone.T, each_in_words(each))
    # The right values at the wrong filters.
    first = next(iter(named.values()))
    shuffled = [first.gather(1, order) for order in random_orders(shape, repetitions, generator)]

    def measured(measure: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        by_name = {name: measure(values) for name, values in named.items()}
        by_name[RANDOM] = torch.stack([measure(values) for values in shuffled]).mean(0)
        return by_name

    return FilterInfidelity(
        measured(lambda values: infidelity_of(values, removed, lost)),
        measured(lambda values: infidelity_of(values, removed, lost, scaled=True)),
        {} if alone is None else measured(lambda values: (values - alone).square()),
        n_perturb_samples,
    )


def infidelity_of(scores: Tensor, removed: Tensor, lost: Tensor, scaled: bool = False) -> Tensor:
    r"""
    Infidelity of scores, plain or after the best scaling of each image's scores.

    Args:

        scores (Tensor): Shape (N, K).
        removed (Tensor): Shape (P, N, K), bool, sets of filters.
        lost (Tensor): Shape (P, N), what the output lost without each set.
        scaled (bool): Scale the scores.
                    Default: False

    Returns:
        *Tensor* of shape (N,).
    """
    predicted = torch.einsum("pnk,nk->pn", removed.double(), scores)
    if scaled:
        square = predicted.square().mean(0)
        # A zero prediction stays zero, whatever its factor.
        factor = (predicted * lost).mean(0) / torch.where(square > 0, square, 1.0)
        predicted = factor * predicted
    return (predicted - lost).square().mean(0)
