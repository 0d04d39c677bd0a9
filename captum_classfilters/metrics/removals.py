"""Filters removed in order of a score: what the metrics over filters share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters._core.layers import find_layer, layer_name, module_of
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters.class_filters import _descending

RANDOM, MAGNITUDE = "random", "weight magnitude"


def reversed_name(name: str) -> str:
    """What a method's order is called when the filter it ranks last goes first."""
    return f"{name}, reversed"


def named_scores(
    scores: Tensor | Mapping[str, Tensor], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Scores by name, each checked to be finite and of the shape (N, K), in float64."""
    named = dict(scores) if isinstance(scores, Mapping) else {"scores": scores}
    if not named:
        raise ValueError("scores is empty; pass at least one Tensor (N, K).")
    taken = {RANDOM, MAGNITUDE} & set(named)
    if taken:
        raise ValueError(f"The name {taken.pop()!r} is the control's own; choose another one.")
    for name, values in named.items():
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"The scores {name!r} are {found}; expected one for each image and filter, {shape}. "
                "The method's `filter_scores` sums attributions over positions."
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"The scores {name!r} hold NaN or Inf.")
    return {name: values.detach().cpu().double() for name, values in named.items()}


def order_of(scores: Tensor) -> Tensor:
    """Filters (..., K) by falling score; ties in the order of the filters."""
    return _descending(scores)


def places(order: Tensor) -> Tensor:
    """The place of each filter in an order of filters, (..., K)."""
    return order.argsort(-1)


def random_orders(shape: Sequence[int], seeds: int) -> list[Tensor]:
    """Random orders of filters, (..., K) for each seed, that leave the global state alone."""
    return [
        torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        for seed in range(seeds)
    ]


def curve_points(num_filters: Sequence[int] | None, most: int, default: int = 16) -> list[int]:
    """Numbers of filters from 0 to K; with every number j also K - j, so that orders can turn."""
    if num_filters is None:
        steps = min(default, most)
        chosen = {round(step * most / steps) for step in range(steps + 1)}
    else:
        chosen = {int(number) for number in num_filters}
        if not chosen or min(chosen) < 0 or max(chosen) > most:
            raise ValueError(
                f"num_filters={list(num_filters)} must be numbers from 0 to {most}, the layer's."
            )
    return sorted({0, most} | chosen | {most - number for number in chosen})


def first_of(order: Tensor, numbers: Sequence[int]) -> Tensor:
    """Masks (P, ..., K) of the first so many filters of an order, for each number."""
    limits = torch.tensor(numbers).reshape(-1, *[1] * order.dim())
    return places(order)[None] < limits


class OrderedRemoval:
    r"""
    What a batch's outputs are worth with the first, or the last, filters of an order removed.

    Args:

        replay (SuffixReplay): The batch.
        value (Callable): From outputs (P, N, C) to what is measured, (P, N).
        numbers (list of int): Numbers of filters, from 0 to K, symmetric about K / 2.
    """

    def __init__(
        self, replay: SuffixReplay, value: Callable[[Tensor], Tensor], numbers: Sequence[int]
    ) -> None:
        self.replay, self.value, self.numbers = replay, value, list(numbers)
        self.ends = value(torch.stack([replay.output, self._outputs_without_all()]))

    def removing(self, order: Tensor) -> Tensor:
        """Values (P, N) with the first 0, ..., K filters of each image's order (N, K) removed."""
        inner = self.numbers[1:-1]
        first, last = self.ends[:1], self.ends[1:]
        if not inner:
            return torch.cat([first, last]).double().cpu()
        outputs = self.replay.outputs(first_of(order, inner))
        return torch.cat([first, self.value(outputs), last]).double().cpu()

    def _outputs_without_all(self) -> Tensor:
        everything = torch.ones(1, self.replay.num_filters, dtype=torch.bool)
        return self.replay.outputs(everything)[0]


def area(values: Tensor, shares: Tensor, dim: int = -1) -> Tensor:
    """Area under curves along an axis, the shares from 0 to 1."""
    return torch.trapezoid(values.movedim(dim, -1), shares.to(values), dim=-1)


def weight_magnitudes(forward_func: Any, layer: nn.Module, num_filters: int) -> Tensor | None:
    r"""
    Norm of each filter's weights: of the last convolution or linear layer that makes the filters.

    It is looked for inside the layer, last one first, and then among the modules registered before
    it, nearest first. `networks.incoming_weight_scores` follows the model's graph instead, and needs
    an extra for it; a control has to be there always. None where the layer's filters come from several
    convolutions, so that no weight has as many.
    """
    model = module_of(forward_func)
    before: list[nn.Module] = []
    for module in model.modules() if model is not None else ():
        if module is layer:
            break
        before.append(module)
    for module in [*reversed(list(layer.modules())), *reversed(before)]:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        if getattr(module, "transposed", False):
            weight = weight.transpose(0, 1)
        if len(weight) == num_filters:
            return weight.detach().flatten(1).double().norm(dim=1).cpu()
    return None


def magnitude_control(
    forward_func: Any, layer: nn.Module, num_filters: int, given: Tensor | None
) -> Tensor:
    """The magnitudes (K,) that the caller gave, or those of the layer's weights."""
    if given is None:
        found = weight_magnitudes(forward_func, layer, num_filters)
        if found is not None:
            return found
        name = layer_name(module_of(forward_func), layer)
        raise ValueError(
            f"No weights of {num_filters} filters are found in or before the layer {name!r}. If it is "
            f"the layer that was scored, pass weight_magnitude, a Tensor ({num_filters},)."
        )
    if tuple(given.shape) != (num_filters,):
        raise ValueError(
            f"weight_magnitude has shape {tuple(given.shape)}; expected ({num_filters},)."
        )
    return given.detach().cpu().double()


def resolved_layer(forward_func: Any, layer: nn.Module | str) -> nn.Module:
    """The layer itself, also where its dotted name is given."""
    return find_layer(module_of(forward_func), layer) if isinstance(layer, str) else layer
