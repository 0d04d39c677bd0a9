"""Deletion and insertion of an image's filters, in order of their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.ranking import descending, random_orders
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import ForwardFunc
from captum_classfilters.attr.filter_removal import Replacement, Score, score_reader
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    OrderedRemoval,
    areas,
    curve_points,
    kept_alone,
    magnitude_control,
    named_scores,
    resolved_layer,
)
from captum_classfilters.metrics.replayed_batches import replayed_images


@short_repr
@dataclass(frozen=True)
class FilterCurves(Tabular):
    r"""
    What an image's score becomes as its filters go, or come, in order.

    Every table holds the scores that were given, each of them ``"..., reversed"``, and the controls
    ``"random"`` and ``"weight magnitude"``.

    Args:

        num_filters (list of int): P numbers of filters, from 0 to K.
        deletion (dict): For each name a Tensor (N, P): the score with the first so many filters
                    removed.
        insertion (dict): The score with *only* the first so many filters left.
        score (str): What is measured, such as ``"probability"``.
    """

    num_filters: list[int]
    deletion: dict[str, Tensor]
    insertion: dict[str, Tensor]
    score: str

    @property
    def deletion_area(self) -> dict[str, Tensor]:
        """Area under each image's deletion curve (N,), the share of filters from 0 to 1. Low: the
        filters that were named first are needed."""
        return areas(self.deletion, self.num_filters)

    @property
    def insertion_area(self) -> dict[str, Tensor]:
        """Area under each image's insertion curve (N,). High: the first filters suffice."""
        return areas(self.insertion, self.num_filters)

    def _tables(self) -> list[Table]:
        deletion, insertion = self.deletion_area, self.insertion_area
        rows = [
            {"": name, "deletion": deletion[name].mean(), "insertion": insertion[name].mean()}
            for name in deletion
        ]
        title = f"area under {self.score}, mean over images"
        return [Table(rows, {"deletion": ".4f", "insertion": ".4f"}, title)]


@arguments_checked
def filter_curves(
    model: nn.Module | ForwardFunc,
    layer: nn.Module | str,
    inputs: Tensor | tuple[Tensor, ...],
    scores: Tensor | Mapping[str, Tensor],
    *,
    target: TargetType = None,
    additional_forward_args: object = None,
    num_filters: Sequence[int] | None = None,
    score: Score = "probability",
    replacement: Replacement = "zero",
    repetitions: int = 5,
    weight_magnitude: Tensor | None = None,
    channel_dim: int | None = None,
    seed: int = 0,
) -> FilterCurves:
    r"""
    Deletion and insertion curves of each image in filter space, with their controls.

    Petsiuk et al.'s deletion and insertion (*RISE*, BMVC 2018, https://arxiv.org/abs/1806.07421)
    with filters in place of pixels: each image's filters are removed, highest score first, and the
    target's score is followed; insertion starts from none. A score can only be called good beside
    the controls, which are always part of the result: filters in random order, by the norm of their
    weights, and in the opposite order.

    Inserting an order is deleting its reverse, read backwards, so that a method and its reverse cost
    two curves and not four.

    Args:

        model (nn.Module or Callable): The model, or its forward function.
        layer (nn.Module or str): The layer whose filters were scored, or its dotted name.
        inputs (Tensor or tuple[Tensor, ...]): Input of the model, N examples first.
        scores (Tensor or mapping): Shape (N, K), or several of them by name.
        target (int, tuple, Tensor or list, optional): In any of Captum's forms.
                    Default: None
        additional_forward_args (Any, optional): Further arguments of the forward function.
                    Default: None
        num_filters (sequence of int, optional): Points of the curves; 0, K, and with every number j
                    also K - j are added. By default about 17, evenly spaced.
        score (str): ``"probability"``, ``"log_probability"`` or ``"logit"``.
                    Default: "probability"
        replacement (str): What stands in for a removed filter, as in
                    :class:`~captum_classfilters.LayerFilterAblation`.
                    Default: "zero"
        repetitions (int): Random orders to average over.
                    Default: 5
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        seed (int): Seed of the random orders and of ``replacement="resample"``; the global random
                    state is not touched.
                    Default: 0

    Returns:
        *FilterCurves*.

    Raises:
        ValueError: Scores or numbers do not fit, the layer's weights cannot be found, or the model
                    returns NaN or Inf, with filters or without.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.metrics import filter_curves
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> images = torch.rand(4, 3, 6, 6)
        >>> method = LayerFilterContribution(net, net[1])
        >>> scores = method.filter_scores(method.attribute(images, target=1))
        >>> curves = filter_curves(net, net[1], images, scores, target=1)
        >>> sorted(curves.deletion)
        ['random', 'scores', 'scores, reversed', 'weight magnitude', 'weight magnitude, reversed']
        >>> bool((curves.deletion_area["scores"] < curves.deletion_area["scores, reversed"]).all())
        True
    """
    if repetitions < 1:
        raise ValueError("repetitions must be at least 1: a curve needs its control.")
    layer = resolved_layer(model, layer)
    options = {"replacement": replacement, "seed": seed, "channel_dim": channel_dim}
    with replayed_images(model, layer, inputs, additional_forward_args, **options) as replay:
        shape = (replay.num_images, replay.num_filters)
        orders = {name: descending(values) for name, values in named_scores(scores, shape).items()}
        magnitude = magnitude_control(model, layer, shape[1], weight_magnitude)
        orders[MAGNITUDE] = descending(magnitude).expand(shape)
        sizes = curve_points(num_filters, shape[1])
        read = score_reader(replay, target, score)
        removal = OrderedRemoval(
            replay, lambda outputs: torch.stack([read(output) for output in outputs]), sizes
        )
        curves = removal.both_ways(orders)
        drawn = random_orders(shape, repetitions, torch.Generator().manual_seed(seed))
        curves[RANDOM] = removal.at_random(drawn)
    deletion = {name: curve.cpu().double() for name, curve in curves.items()}
    insertion = kept_alone(deletion)
    return FilterCurves(
        sizes,
        {name: curve.T.contiguous() for name, curve in deletion.items()},
        {name: curve.T.contiguous() for name, curve in insertion.items()},
        score,
    )
