"""What a smaller network saves: filters, parameters, multiply-adds, bytes, measured time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from captum_classfilters._core.filter_graph import as_tuple
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.timing import interleaved_seconds, median_and_interquartile


@dataclass(frozen=True)
class NetworkCost:
    r"""
    What one network costs.

    Args:

        filters (int): Filters of all its convolutions and outputs of all its linear layers.
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


@dataclass(frozen=True)
class NetworkComparison:
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

    def __str__(self) -> str:
        rows = [
            ("filters", "filters", "{:,.0f}"),
            ("parameters", "parameters", "{:,.0f}"),
            ("multiply-adds", "multiply_adds", "{:,.0f}"),
            ("bytes", "bytes", "{:,.0f}"),
            ("forward pass, ms", "seconds", "{:,.2f}"),
        ]
        lines = [f"{'':18s}{'before':>16s}{'after':>16s}{'ratio':>9s}"]
        for title, name, form in rows:
            scale = 1000 if name == "seconds" else 1
            before, after = (scale * getattr(one, name) for one in (self.before, self.after))
            ratio = before / after if after else float("nan")
            lines.append(
                f"{title:18s}{form.format(before):>16s}{form.format(after):>16s}{ratio:>8.2f}x"
            )
        lines += [f"{name}: {before} -> {after}" for name, (before, after) in self.layers.items()]
        return "\n".join(lines)


def compare_networks(
    before: nn.Module, after: nn.Module, example_inputs: Any, *, repetitions: int = 30
) -> NetworkComparison:
    r"""
    Compare what two networks cost, a full one and its pruned form say.

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
    inputs = as_tuple(example_inputs)
    with (
        model_left_as_found(before, evaluation=True),
        model_left_as_found(after, evaluation=True),
    ):
        times = interleaved_seconds((before, after), (inputs, inputs), repetitions)
        costs = [
            _cost(model, inputs, own) for model, own in zip((before, after), times, strict=True)
        ]
    counts = _filters(after)
    return NetworkComparison(
        before=costs[0],
        after=costs[1],
        layers={
            name: (number, counts[name])
            for name, number in _filters(before).items()
            if counts.get(name, number) != number
        },
    )


def multiply_adds(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-adds of one forward pass in evaluation mode, for one example of the batch.

    Args:

        model (nn.Module): The model.
        example_inputs (Tensor or tuple): A batch, examples first.

    Returns:
        *int*.
    """
    inputs = as_tuple(example_inputs)
    counter = FlopCounterMode(display=False)
    with model_left_as_found(model, evaluation=True), torch.no_grad(), counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2 // len(inputs[0])


def _cost(model: nn.Module, inputs: tuple[Any, ...], times: Sequence[float]) -> NetworkCost:
    tensors = [*model.parameters(), *model.buffers()]
    seconds, spread = median_and_interquartile(times)
    return NetworkCost(
        filters=sum(_filters(model).values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=multiply_adds(model, inputs),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        seconds=seconds,
        seconds_interquartile=spread,
    )


def _filters(model: nn.Module) -> dict[str, int]:
    """Filters of every convolution and outputs of every linear layer, by name."""
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            counts[name] = module.out_channels
        elif isinstance(module, nn.Linear):
            counts[name] = module.out_features
    return counts
