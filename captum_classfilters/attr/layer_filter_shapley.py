"""Shapley values of a layer's filters, from what the model returns with sets of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType, format_tensor_into_tuples, log_usage
from captum_classfilters._core.image_keys import generators_of_images
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.types import Attributions, JsonDict
from captum_classfilters._core.warnings import warn
from captum_classfilters.attr.base import Layers
from captum_classfilters.attr.filter_removal import (
    FilterRemovalAttribution,
    Replacement,
    Score,
    score_reader,
)

_MOST_EXACT = 1024  # runs; up to 10 filters
_NORMAL_QUANTILE = 1.96  # of 95 %


@dataclass
class _Sets:
    """Sets of filters that stay, each with its complement.

    Args:

        stays (Tensor): Shape (P, N, K), bool: P sets for each of N images.
        weights (Tensor): Shape (P, N). Of each pair in the least squares.
        gaps (Tensor): Shape (P, N). The score with the set minus that with its complement.
    """

    stays: Tensor
    weights: Tensor
    gaps: Tensor

    def and_those(self, other: "_Sets") -> "_Sets":
        """These sets and others."""
        return _Sets(
            torch.cat([self.stays, other.stays]),
            torch.cat([self.weights, other.weights]),
            torch.cat([self.gaps, other.gaps]),
        )


class LayerFilterShapley(FilterRemovalAttribution):
    r"""
    The Shapley value of each filter of a layer: its share of the target's score.

    Filters are players, and a set *S* of them is worth :math:`v(S)`, the score of the target where
    all other filters of the layer are replaced. Filter *k* of K gets its mean gain over all orders
    in which filters may come,

    .. math:: \phi_k = \sum_{S \not\ni k} \frac{|S|! \, (K - |S| - 1)!}{K!}
        \left( v(S \cup \{k\}) - v(S) \right),

    so that twins share what neither would lose alone (an ablation gives both nothing), and the values
    add up to what all filters together are worth. Source: Shapley: *A value for n-person games*, 1953;
    of filters: Ghorbani and Zou: *Neuron Shapley*, NeurIPS 2020, https://arxiv.org/abs/2002.09815.

    Where the model ends in a linear head fed by the layer, logits need no further run: there the
    value is the filter's contribution. Up to ten filters all sets are run. Elsewhere values are the least
    squares over random sets, each with its complement; other sets for each image, which depend on its
    bytes and the seed alone, so that errors average out over a data set, in batches of any size. After
    Musco and Witter: *Provably accurate Shapley value estimation via leverage score sampling*, ICLR
    2025, https://arxiv.org/abs/2410.01917; sizes are drawn with chances between theirs, which are
    all alike, and those of the Shapley kernel. What comes before the layer runs once.

    Args:

        forward_func (Callable): The forward function of the model.
        layer (nn.Module, str or list of these): The layer, its dotted name, or several layers.
        device_ids (list of int, optional): Devices of a hidden ``DataParallel`` model.
                    Default: None
        score (str): ``"logit"``, the model's output as it is; ``"probability"`` or
                    ``"log_probability"``.
                    Default: "logit"
        replacement (str): What stands in for a filter that is not there: ``"zero"``; ``"mean"``,
                    the filter's mean over all images and positions of the batch; ``"resample"``,
                    the filter's map of another image of the batch.
                    Default: "zero"
        tolerance (float, optional): Sets are added until the half width of every value's 95 % interval
                    is at most this share of the image's largest value. None: as many sets as
                    ``max_evaluations`` allows, which is the way for data sets, where errors of
                    images average out.
                    Default: 0.05
        max_evaluations (int): Sets that are run for each image at most, with their complements.
                    Default: 4096
        seed (int): Seed of the sets; the global random state is not touched.
                    Default: 0
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None

    Raises:
        ValueError: ``score`` or ``replacement`` is none of the above, or ``tolerance`` is not positive.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterShapley
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3),
        ...     torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> shapley = LayerFilterShapley(net, net[1])
        >>> images = torch.rand(4, 3, 6, 6)
        >>> values, half_widths = shapley.attribute(images, target=1, return_half_widths=True)
        >>> values.shape, half_widths.shape
        (torch.Size([4, 8, 4, 4]), torch.Size([4, 8]))
        >>> shapley.filter_scores(values).shape
        torch.Size([4, 8])
    """

    @arguments_checked
    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: Layers | str | list[str] | None,
        device_ids: list[int] | None = None,
        score: Score = "logit",
        replacement: Replacement = "zero",
        tolerance: float | None = 0.05,
        max_evaluations: int = 4096,
        seed: int = 0,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, score, replacement, seed, channel_dim)
        if tolerance is not None and not tolerance > 0:
            raise ValueError(
                f"tolerance={tolerance}: expected a positive share of the largest value, or None."
            )
        self.tolerance = tolerance
        self.max_evaluations = max_evaluations

    @property
    def options(self) -> JsonDict:
        """The method's own options, for the record."""
        own = {"tolerance": self.tolerance, "max_evaluations": self.max_evaluations}
        return {**super().options, **own, "seed": self.seed}

    @arguments_checked
    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        layer_baselines: Tensor | float | None = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        return_half_widths: bool = False,
        show_progress: bool = False,
    ) -> Attributions:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
            layer_baselines (Tensor or float, optional): What stands in for a filter that is not there,
                        broadcastable to the layer's tensor. It overrules ``replacement``.
                        Default: None
            target (int, tuple, Tensor or list, optional): Index of the output, in any of Captum's
                        forms.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of the forward function;
                        tensors with N rows belong to the examples.
                        Default: None
            attribute_to_layer_input (bool): Of the filters of the layer's input.
                        Default: False
            perturbations_per_eval (int, optional): Sets per replay. By default as many as a memory
                        budget allows.
            return_half_widths (bool): Also return half the width of each value's 95 % interval, zero
                        where values are exact.
                        Default: False
            show_progress (bool): Show a progress bar over the sets.
                        Default: False

        Returns:
            *Tensor*, *list* or *tuple* of **attributions** (and **half_widths**):
            - **attributions** (*Tensor* or *list*):
                        Values shaped like the layer. A filter's is spread evenly over its positions,
                        so their sum is the value. A list for several layers.
            - **half_widths** (*Tensor* or *list*):
                        Shape (N, K), on the CPU; in a list for several layers.

        Raises:
            ValueError: The layer handles several tensors, has no channel dimension or does not run
                        exactly once; ``layer_baselines`` do not fit its tensor; ``max_evaluations`` is
                        below four times the number of filters, or for up to three filters below the
                        2, 4 or 8 sets that there are; ``"resample"`` is asked of a single image; the
                        score is NaN without some filters.
            AssertionError: The target does not pick one output of each image.
        """
        widths: list[Tensor] = []

        def values_of(replay: SuffixReplay) -> Tensor:
            drawn = partial(generators_of_images, format_tensor_into_tuples(inputs), self.seed)
            values, half = self._values(
                replay, target, perturbations_per_eval, drawn, show_progress
            )
            widths.append(half)
            return values

        attributions = self._scored(
            inputs,
            layer_baselines,
            additional_forward_args,
            attribute_to_layer_input,
            perturbations_per_eval,
            values_of,
        )
        if not return_half_widths:
            return attributions
        return attributions, widths if isinstance(self.layer, (list, tuple)) else widths[0]

    # -- one layer -------------------------------------------------------------------------------

    def _values(
        self,
        replay: SuffixReplay,
        target: TargetType,
        perturbations_per_eval: int | None,
        generators: Callable[[], list[torch.Generator]],
        show_progress: bool,
    ) -> tuple[Tensor, Tensor]:
        """Values of each image's filters and half the widths of their intervals, (N, K) each."""
        images, filters = replay.num_images, replay.num_filters
        by_weights = self._from_weights(replay, target)
        if by_weights is not None:
            return by_weights, torch.zeros(images, filters)
        read = score_reader(replay, target, self.score)

        def worth(stays: Tensor) -> Tensor:
            parts = replay.in_parts(~stays, perturbations_per_eval)
            found = [read(output) for _, outputs in parts for output in outputs]
            values = torch.stack(found).cpu().double()
            for row in values.isnan().any(1).nonzero()[:1, 0].tolist():
                removed = ~stays[row : row + 1]
                replay.check_no_nan(removed, replay.outputs(removed))
            return values

        none = torch.zeros(1, filters, dtype=torch.bool)
        total = read(replay.output).cpu().double() - worth(none)[0]
        exact = 2**filters <= min(_MOST_EXACT, self.max_evaluations)
        if exact:
            values, half = _solved(_all_sets(filters, images, worth), total, exact)
        else:
            values, half = self._sampled(filters, generators(), total, worth, show_progress)
        return values.to(replay.output), half.float()

    def _sampled(
        self,
        filters: int,
        generators: list[torch.Generator],
        total: Tensor,
        worth: Callable[[Tensor], Tensor],
        show_progress: bool,
    ) -> tuple[Tensor, Tensor]:
        """Values from random sets, until they are close enough or there are enough sets."""
        most = self.max_evaluations // 2
        if most < 2 * filters:
            raise ValueError(
                f"max_evaluations={self.max_evaluations} are too few for {filters} filters; give at "
                f"least {min(4 * filters, 2**filters)}."
            )
        bar = tqdm(total=2 * most, desc=f"{self.get_name()} attribution", disable=not show_progress)
        number = most if self.tolerance is None else min(most, 4 * filters)
        sets: _Sets | None = None
        with bar:
            while True:
                drawn = _random_sets(filters, number, generators, worth)
                sets = drawn if sets is None else sets.and_those(drawn)
                bar.update(2 * number)
                values, half = _solved(sets, total)
                if self.tolerance is None:
                    return values, half
                reached = float((half.amax(1) / values.abs().amax(1).clamp(min=1e-300)).max())
                # What is NaN with all filters gets no closer.
                done, left = not reached > self.tolerance, most - len(sets.stays)
                if done or not left:
                    break
                wanted = len(sets.stays) * ((reached / self.tolerance) ** 2 - 1)
                # At most as many again: the first intervals are the least certain ones.
                number = min(left, len(sets.stays), max(filters, math.ceil(min(wanted, most))))
        if not done:
            warn(
                f"{self.get_name()}: with max_evaluations={self.max_evaluations} half of an interval is "
                f"{reached:.1g} of an image's largest value, more than tolerance={self.tolerance:g}; "
                "give more evaluations, or tolerance=None where an average over images is what counts."
            )
        return values, half


# -- sets -------------------------------------------------------------------------------------------


def _all_sets(filters: int, images: int, worth: Callable[[Tensor], Tensor]) -> _Sets:
    """One of each set and its complement, with the weight of the Shapley kernel."""
    codes = torch.arange(1, 2 ** (filters - 1))[:, None]
    stays = (codes >> torch.arange(filters)) % 2 == 1  # without the last filter
    sizes = stays.sum(1)
    kernel = [1 / (size * (filters - size) * math.comb(filters, size)) for size in sizes.tolist()]
    weights = torch.tensor(kernel, dtype=torch.float64)[:, None].expand(-1, images)
    gaps = worth(stays) - worth(~stays) if len(stays) else torch.zeros(0, images).double()
    return _Sets(stays[:, None].expand(-1, images, -1), weights, gaps)


def _random_sets(
    filters: int,
    number: int,
    generators: list[torch.Generator],
    worth: Callable[[Tensor], Tensor],
) -> _Sets:
    """Random sets, others for each image.

    Size *s* has a chance in proportion to the root of its weight 1 / (s (K - s)) in all: of all chances
    it gives the least variance if residuals are alike.
    """
    every = torch.arange(1, filters).double()
    chances = (every * (filters - every)).rsqrt()
    sizes = [torch.multinomial(chances, number, True, generator=own) for own in generators]
    order = [torch.rand(number, filters, generator=own) for own in generators]
    drawn = torch.stack(sizes, 1)
    stays = torch.stack(order, 1).argsort(2).argsort(2) <= drawn[..., None]
    weights = chances[drawn]  # the weight of the size over its chance
    return _Sets(stays, weights, worth(stays) - worth(~stays))


def _solved(sets: _Sets, total: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
    """The least squares whose values add up to the total, and half the widths of intervals.

    The gap between a set and its complement is the sum of values in it minus that of those outside.
    Errors are those of heteroscedastic regression (HC3): each residual as if its pair were left out.
    """
    filters = sets.stays.shape[2]
    mean = (total / filters)[:, None]
    if filters == 1:
        return mean, torch.zeros_like(mean)
    ones, eye = torch.ones(filters, 1).double(), torch.eye(filters).double()
    apart = torch.linalg.qr(torch.cat([ones, eye[:, 1:]], 1))[0][:, 1:]  # sums to zero (K, K - 1)
    signs = 2 * sets.stays.double() - 1
    design, weights = signs @ apart, sets.weights
    gaps = sets.gaps - signs.sum(2) * mean[:, 0]
    weighted = design * weights[..., None]
    moments = torch.einsum("pni,pnj->nij", weighted, design)
    solution = torch.linalg.solve(moments, torch.einsum("pni,pn->ni", weighted, gaps))
    values = mean + solution @ apart.T
    if exact:
        return values, torch.zeros_like(values)
    pull = torch.linalg.solve(moments, weighted.permute(1, 2, 0))  # (N, K - 1, P)
    leverage = torch.einsum("nip,pni->pn", pull, design)
    residuals = (gaps - torch.einsum("pni,ni->pn", design, solution)) / (1 - leverage).clamp(
        min=0.05
    )
    errors = (
        torch.einsum("ki,nip->nkp", apart, pull).square() * residuals.T.square()[:, None]
    ).sum(2)
    return values, _NORMAL_QUANTILE * errors.sqrt()
