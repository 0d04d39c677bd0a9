"""What a smaller network saves: filters, parameters, multiply-adds, bytes, measured time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.costs import (
    before_and_after,
    inputs_of,
    num_bytes,
    num_outputs,
)
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.timing import interleaved_seconds, median_and_interquartile
from captum_classfilters._core.types import ExampleInputs, ModelInputs


@short_repr
@dataclass(frozen=True)
class NetworkCost:
    r"""
    What one network costs.

    Args:

        filters (int): Filters of all its convolutions and outputs of all its linear layers,
                    decomposed heads among them.
        parameters (int): Its parameters.
        multiply_adds (int): Multiply-adds of convolutions and matrix products for one example.
        bytes (int): Bytes of its parameters and buffers.
        seconds (float): Median time of a forward pass of the example inputs.
        seconds_interquartile (float): Its interquartile range.
    """

    filters: int
    parameters: int
    multiply_adds: int
    bytes: int
    seconds: float
    seconds_interquartile: float


@short_repr
@dataclass(frozen=True)
class NetworkComparison(Tabular):
    r"""
    A network before and after; prints as a table.

    Args:

        before (NetworkCost): The full network.
        after (NetworkCost): The smaller one.
        layers (dict): For each layer that lost filters their number before and after.
    """

    before: NetworkCost
    after: NetworkCost
    layers: dict[str, tuple[int, int]]

    @property
    def speed_up(self) -> float:
        """Median time before over median time after."""
        return self.before.seconds / self.after.seconds

    def _tables(self) -> list[Table]:
        titles = {
            "filters": "filters",
            "parameters": "parameters",
            "multiply-adds": "multiply_adds",
            "bytes": "bytes",
            "forward pass, ms": "seconds",
        }
        quantities = {}
        for title, name in titles.items():
            scale = 1000 if name == "seconds" else 1
            before, after = (scale * getattr(cost, name) for cost in (self.before, self.after))
            quantities[title] = (before, after)
        lost = [f"{name}: {before} -> {after}" for name, (before, after) in self.layers.items()]
        return [before_and_after(quantities, notes=lost)]


@arguments_checked
def compare_networks(
    before: nn.Module, after: nn.Module, example_inputs: ExampleInputs, *, repetitions: int = 30
) -> NetworkComparison:
    r"""
    Compare what two networks cost, a full one and its pruned form for example.

    Forward passes of the two alternate, so that a busy machine slows both; the medians are
    compared. Multiply-adds are counted by ``torch.utils.flop_counter``, two operations each.

    Args:

        before (nn.Module): The full network.
        after (nn.Module): The smaller one.
        example_inputs (Tensor or tuple): A batch.
        repetitions (int): Number of timed passes of each.
                    Default: 30

    Returns:
        *NetworkComparison*.

    Raises:
        ValueError: ``repetitions`` is not positive.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import compare_networks
        >>> big, small = (torch.nn.Conv2d(3, filters, 3) for filters in (8, 4))
        >>> comparison = compare_networks(big, small, torch.rand(2, 3, 6, 6), repetitions=2)
        >>> comparison.before.multiply_adds  # 8 filters, 27 weights, 16 positions
        3456
        >>> comparison.layers
        {'': (8, 4)}
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions} must be at least 1.")
    inputs = inputs_of(before, example_inputs)
    with (
        model_left_as_found(before, evaluation=True),
        model_left_as_found(after, evaluation=True),
    ):
        times = interleaved_seconds((before, after), (inputs, inputs), repetitions)
        costs = [
            _cost(model, inputs, own) for model, own in zip((before, after), times, strict=True)
        ]
    counts = num_outputs(after)
    return NetworkComparison(
        before=costs[0],
        after=costs[1],
        layers={
            name: (width, counts[name])
            for name, width in num_outputs(before).items()
            if counts.get(name, width) != width
        },
    )


def multiply_adds(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Multiply-adds of one forward pass in evaluation mode, for one example of the batch.

    Args:

        model (nn.Module): The model.
        example_inputs (Tensor or tuple): A batch, examples first.

    Returns:
        *int*.
    """
    inputs = inputs_of(model, example_inputs)
    counter = FlopCounterMode(display=False)
    with model_left_as_found(model, evaluation=True), torch.no_grad(), counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2 // len(inputs[0])


def _cost(model: nn.Module, inputs: ModelInputs, times: Sequence[float]) -> NetworkCost:
    seconds, spread = median_and_interquartile(times)
    return NetworkCost(
        filters=sum(num_outputs(model).values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=multiply_adds(model, inputs),
        bytes=num_bytes(model),
        seconds=seconds,
        seconds_interquartile=spread,
    )
