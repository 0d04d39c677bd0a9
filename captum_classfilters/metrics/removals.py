"""Filters removed in order of a score, or in sets: what the metrics over filters share."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import whole_number
from captum_classfilters._core.batches import check_now
from captum_classfilters._core.filter_weights import filter_weights
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import find_layer, layer_name, module_of
from captum_classfilters._core.names import shortened
from captum_classfilters._core.ranking import first_of
from captum_classfilters._core.types import Check, ForwardFunc, Replay
from captum_classfilters.class_filters import ClassFilters, is_of_input

RANDOM, MAGNITUDE = "random", "weight magnitude"


def resolved_layer(model: ForwardFunc, layer: nn.Module | str) -> nn.Module:
    """The layer itself, also where its dotted name is given."""
    return find_layer(module_of(model), layer) if isinstance(layer, str) else layer


# -- what is ranked ----------------------------------------------------------------------------------


def reversed_name(name: str) -> str:
    """What an order is called when the filter it ranks last goes first."""
    return f"{name}, reversed"


def check_names(names: Sequence[str]) -> None:
    """Raise if a name is that of a control, or of another name's reverse."""
    for name in names:
        if name in {RANDOM, MAGNITUDE, *map(reversed_name, (MAGNITUDE, *names))}:
            raise ValueError(f"The name {name!r} is the control's own; choose another one.")


def named_scores(
    scores: Tensor | Mapping[str, Tensor], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Scores by name, each checked to be finite and of the shape (N, K), in float64 on the CPU."""
    named = dict(scores) if isinstance(scores, Mapping) else {"scores": scores}
    if not named:
        raise ValueError("scores is empty; pass at least one Tensor (N, K).")
    check_names(list(named))
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


def named_tables(
    class_filters: ClassFilters | Mapping[str, ClassFilters],
) -> dict[str, ClassFilters]:
    """Tables by name, all of one shape."""
    tables = (
        dict(class_filters)
        if isinstance(class_filters, Mapping)
        else {class_filters.method or "class filters": class_filters}
    )
    if not tables:
        raise ValueError("class_filters is empty; pass at least one table.")
    check_names(list(tables))
    shapes = {name: tuple(table.scores.shape) for name, table in tables.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The tables do not fit each other; their classes and filters: {shapes}.")
    return tables


def at_input_of(model: ForwardFunc, layer: nn.Module, tables: Mapping[str, ClassFilters]) -> bool:
    """Whether tables are of the filters of this layer's input; raises if only some are."""
    name = layer_name(module_of(model, [layer]), layer)
    found = {key: is_of_input(table, name) for key, table in tables.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"Some tables have filters of the input of {name!r} (attribute_to_layer_input=True), others "
            f"of its output: {found}; give tables of one kind at a time."
        )
    return any(found.values())


def weight_magnitudes(
    model: ForwardFunc, layer: nn.Module, num_filters: int, at_input: bool = False
) -> Tensor | None:
    r"""
    Euclidean norm of each filter's weights: of the convolution or linear layer that makes the filters.

    It is looked for inside the layer, last one first, and then among the modules registered before
    it, nearest first; no graph of the model is needed. None where the layer's filters come from
    several convolutions, so that no weight has as many. Those of the layer's input are made
    before it. Weights are those of evaluation mode, which reading them does not change.
    """
    owner = module_of(model, [layer])
    before: list[nn.Module] = []
    for module in owner.modules() if owner is not None else ():
        if module is layer:
            break
        before.append(module)
    inside = [] if at_input else list(layer.modules())
    with model_left_as_found(owner, evaluation=True):
        for module in [*reversed(inside), *reversed(before)]:
            weights = filter_weights(module)
            if weights is not None and len(weights) == num_filters:
                return weights.cpu().flatten(1).double().norm(dim=1)
    return None


def magnitude_control(
    model: ForwardFunc,
    layer: nn.Module,
    num_filters: int,
    weight_magnitude: Tensor | None,
    at_input: bool = False,
) -> Tensor:
    """The magnitudes (K,) that the caller gave, or those of the layer's weights."""
    if weight_magnitude is None:
        magnitudes = weight_magnitudes(model, layer, num_filters, at_input)
        if magnitudes is not None:
            return magnitudes
        name = layer_name(module_of(model, [layer]), layer)
        raise ValueError(
            f"No weights of {num_filters} filters are found in or before the layer {name!r}. If it is "
            f"the layer that was scored, pass weight_magnitude, a Tensor ({num_filters},)."
        )
    if tuple(weight_magnitude.shape) != (num_filters,):
        raise ValueError(
            f"weight_magnitude has shape {tuple(weight_magnitude.shape)}; expected ({num_filters},)."
        )
    return weight_magnitude.detach().cpu().double()


# -- what is not finite ---------------------------------------------------------------------------


def check_finite(
    outputs: Tensor,
    without: Callable[[int], str],
    check: Check = check_now,
    place: Callable[[int], str] = "image {}".format,
) -> None:
    """Refuse outputs (P, N, ...) of which an image's largest is NaN or infinite; ``without`` says what
    the model of row p lacks, ``place`` which image n is."""
    finite = outputs.reshape(*outputs.shape[:2], -1).amax(2).isfinite()

    def error() -> ValueError:
        row, image = (~finite).nonzero()[0].tolist()
        return ValueError(
            f"The model returns NaN or Inf for {place(image)} with {without(row)}; it would "
            "count as a wrong answer."
        )

    check(finite.all(), error)


def each_in_words(removed: Tensor | None) -> Callable[[int], str]:
    """What each row of sets (P, K) or (P, N, K) lacks, in words; None lacks nothing."""
    return lambda row: "no filter removed" if removed is None else in_words(removed[row])


def in_words(removed: Tensor) -> str:
    """A set of filters (K,), or one for each image (N, K), in words."""
    if removed.dim() > 1:
        return f"{int(removed[0].sum())} of {removed.shape[1]} filters removed"
    filters = removed.nonzero()[:, 0].tolist()
    more = f" and {len(filters) - 5} more" if len(filters) > 5 else ""
    shown = f"the filters {', '.join(map(str, filters[:5]))}{more}"
    return f"{shown if filters else 'no filter'} removed"


# -- in order ----------------------------------------------------------------------------------------


def one_or_several(num_filters: Iterable[int] | int) -> list[int]:
    """Numbers of filters as a list, also if it is one number."""
    one = whole_number(num_filters)
    if one is not None:
        return [one]
    if not isinstance(num_filters, Iterable):
        raise ValueError(
            f"num_filters={num_filters!r}; expected numbers of filters, [1, 2, 5] say."
        )
    given = list(num_filters)
    numbers = [number for item in given if (number := whole_number(item)) is not None]
    if len(numbers) != len(given):
        raise ValueError(
            f"num_filters={shortened(given)}; expected whole numbers of filters, [1, 2, 5] say."
        )
    return numbers


def curve_points(num_filters: Sequence[int] | None, most: int, default: int = 16) -> list[int]:
    """Numbers of filters from 0 to K; with every number j also K - j, so that orders can turn."""
    if num_filters is None:
        steps = min(default, most)
        chosen = {round(step * most / steps) for step in range(steps + 1)}
    else:
        num_filters = one_or_several(num_filters)
        chosen = set(num_filters)
        if not chosen or min(chosen) < 0 or max(chosen) > most:
            raise ValueError(
                f"num_filters={list(num_filters)} must be numbers from 0 to {most}, the layer's."
            )
    return sorted({0, most} | chosen | {most - size for size in chosen})


class OrderedRemoval:
    r"""
    What a batch's outputs are worth with the first, or the last, filters of an order removed.

    Args:

        replay (SuffixReplay): The batch.
        value (Callable): From outputs (P, N, ...) to what is measured, (P, N).
        sizes (list of int): Numbers of filters, from 0 to K, symmetric about K / 2.
        check (Callable): What is called with each condition on the outputs, and its error.
        of_batch (str): Names the batch in such an error.
    """

    def __init__(
        self,
        replay: Replay,
        value: Callable[[Tensor], Tensor],
        sizes: Sequence[int],
        check: Check = check_now,
        of_batch: str = "",
    ) -> None:
        self.replay, self.value, self.sizes = replay, value, list(sizes)
        self.check, self.of_batch = check, of_batch
        everything = torch.ones(1, replay.num_filters, dtype=torch.bool)
        ends = torch.cat([replay.output[None], self._outputs(everything)])
        self.ends = value(ends)

    def removing(self, order: Tensor) -> Tensor:
        """Values (P, N) with the first 0, ..., K filters of each image's order (N, K) removed."""
        inner = self.sizes[1:-1]
        first, last = self.ends[:1], self.ends[1:]
        if not inner:
            return torch.cat([first, last])
        removed = first_of(order, torch.tensor(inner)[:, None])
        return torch.cat([first, self.value(self._outputs(removed)), last])

    def both_ways(self, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values (P, N) of orders (N, K) and of their reverses, by name."""
        curves = {}
        for name, order in orders.items():
            curves[name] = self.removing(order)
            curves[reversed_name(name)] = self.removing(order.flip(-1))
        return curves

    def at_random(self, orders: Tensor) -> Tensor:
        """Mean values (P, N) of several orders (repetitions, N, K)."""
        return torch.stack([self.removing(order) for order in orders]).mean(0)

    def _outputs(self, removed: Tensor) -> Tensor:
        outputs: Tensor = self.replay.outputs(removed)
        place = f"image {{}}{self.of_batch}".format
        check_finite(outputs, each_in_words(removed), self.check, place)
        return outputs


def kept_alone(removed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Curves (P, ...) of keeping the first filters, from those of removing them: to keep the first j
    is to remove the last K - j."""
    curves = {}
    for name in removed:
        opposite = reversed_name(name)
        if opposite in removed:
            curves[name] = removed[opposite].flip(0)
            curves[opposite] = removed[name].flip(0)
        elif name not in curves:  # random orders are their own opposite
            curves[name] = removed[name].flip(0)
    return curves


def area(values: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
    """Area under curves along an axis, over the share of filters from 0 to 1."""
    shares = torch.tensor(sizes, dtype=torch.float64) / sizes[-1]
    return torch.trapezoid(values.movedim(dim, -1), shares.to(values), dim=-1)


def areas(curves: Mapping[str, Tensor], sizes: Sequence[int], dim: int = -1) -> dict[str, Tensor]:
    """The area under each curve, by name."""
    return {name: area(values, sizes, dim) for name, values in curves.items()}
