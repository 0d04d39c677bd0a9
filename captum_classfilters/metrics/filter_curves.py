"""Deletion and insertion of an image's filters, in order of their scores."""

from collections.abc import Callable, Mapping, Sequence
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
from captum_classfilters.attr.layer_filter_ablation import Replacement, Score, score_reader
from captum_classfilters.metrics.removals import (
    MAGNITUDE,
    RANDOM,
    OrderedRemoval,
    area,
    curve_points,
    magnitude_control,
    named_scores,
    order_of,
    random_orders,
    resolved_layer,
    reversed_name,
)


@dataclass(frozen=True)
class FilterCurves:
    r"""
    What an image's score becomes as its filters go, or come, in order.

    Every table holds the scores that were given, each of them ``"..., reversed"``, and the controls
    ``"random"`` and ``"weight magnitude"``.

    Args:

        num_filters (list of int): P numbers of filters, from 0 to K.
        deletion (dict): For each name a Tensor (N, P): the score with the first so many filters
                    removed.
        insertion (dict): The score with *only* the first so many filters left.
        score (str): What is measured, ``"probability"`` say.
    """

    num_filters: list[int]
    deletion: dict[str, Tensor]
    insertion: dict[str, Tensor]
    score: str

    @property
    def deletion_area(self) -> dict[str, Tensor]:
        """Area under each image's deletion curve (N,), the share of filters from 0 to 1. Low: the
        filters that were named first are needed."""
        return {name: area(curve, self._shares()) for name, curve in self.deletion.items()}

    @property
    def insertion_area(self) -> dict[str, Tensor]:
        """Area under each image's insertion curve (N,). High: the first filters suffice."""
        return {name: area(curve, self._shares()) for name, curve in self.insertion.items()}

    def _shares(self) -> Tensor:
        return torch.tensor(self.num_filters, dtype=torch.float64) / self.num_filters[-1]

    def __str__(self) -> str:
        deletion, insertion = self.deletion_area, self.insertion_area
        lines = [f"{f'area, {self.score}':36s} deletion  insertion"]
        lines += [
            f"{name:36s} {float(deletion[name].mean()):8.4f}  {float(insertion[name].mean()):9.4f}"
            for name in deletion
        ]
        return "\n".join(lines)


def filter_curves(
    forward_func: Callable[..., Tensor],
    layer: nn.Module | str,
    inputs: Tensor | tuple[Tensor, ...],
    scores: Tensor | Mapping[str, Tensor],
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    num_filters: Sequence[int] | None = None,
    score: Score = "probability",
    replacement: Replacement = "zero",
    random_seeds: int = 5,
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

        forward_func (Callable): The forward function of the model.
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
        random_seeds (int): Random orders to average over.
                    Default: 5
        weight_magnitude (Tensor, optional): Shape (K,), the norm of each filter's weights, where it
                    cannot be found in the layer.
        channel_dim (int, optional): Axis of the filters, where it cannot be told from the layer.
                    Default: None
        seed (int): Seed of ``replacement="resample"``.
                    Default: 0

    Returns:
        *FilterCurves*.

    Raises:
        ValueError: Scores or numbers do not fit, or the layer's weights cannot be found.

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
    if random_seeds < 1:
        raise ValueError("random_seeds must be at least 1: a curve needs its control.")
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
    with model_left_as_found(module_of(forward_func)), torch.no_grad():
        extra = format_additional_forward_args(additional_forward_args)
        replay = ablation.replay(layer, images, additional_forward_args=extra)
        shape = (replay.num_images, replay.num_filters)
        named = named_scores(scores, shape)
        magnitude = magnitude_control(forward_func, layer, shape[1], weight_magnitude)
        named[MAGNITUDE] = magnitude.expand(shape)
        points = curve_points(num_filters, shape[1])

        read = score_reader(replay.output, target, shape[0], score)

        def value(outputs: Tensor) -> Tensor:
            return torch.stack([read(output) for output in outputs])

        removal = OrderedRemoval(replay, value, points)
        deletion, insertion = both_ways(removal, {name: order_of(s) for name, s in named.items()})
        random = [removal.removing(order) for order in random_orders(shape, random_seeds)]
    deletion[RANDOM] = torch.stack(random).mean(0)
    insertion[RANDOM] = deletion[RANDOM].flip(0)
    return FilterCurves(
        points,
        {name: curve.T.contiguous() for name, curve in deletion.items()},
        {name: curve.T.contiguous() for name, curve in insertion.items()},
        score,
    )


def both_ways(
    removal: OrderedRemoval, orders: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Deletion and insertion (P, N) of orders (N, K) and of their reverses."""
    deletion: dict[str, Tensor] = {}
    insertion: dict[str, Tensor] = {}
    for name, order in orders.items():
        forwards, backwards = removal.removing(order), removal.removing(order.flip(-1))
        deletion[name], deletion[reversed_name(name)] = forwards, backwards
        # Keeping the first j is removing the last K - j.
        insertion[name], insertion[reversed_name(name)] = backwards.flip(0), forwards.flip(0)
    return deletion, insertion
