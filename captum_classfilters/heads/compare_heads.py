"""What a decomposed head saves: parameters, multiply-adds, bytes, measured time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.timing import interleaved_seconds, median_and_interquartile
from captum_classfilters.heads.decompose import find_head


@dataclass(frozen=True)
class HeadCost:
    r"""
    The cost of one model's head, and of the whole model.

    Args:

        head_parameters (int): Weights and biases of the head.
        head_multiply_adds (int): Multiplications that the head needs for one image and position:
                    its weights. (The decomposed forward pass multiplies densely all the same.)
        head_bytes (int): Bytes of its parameters and of its indices.
        parameters (int): Parameters of the whole model.
        seconds (float): Median time of a forward pass of the example inputs through the model.
        seconds_interquartile (float): Its interquartile range.
    """

    head_parameters: int
    head_multiply_adds: int
    head_bytes: int
    parameters: int
    seconds: float
    seconds_interquartile: float


@dataclass(frozen=True)
class HeadComparison:
    """A model's head before and after; prints as a table.

    Args:

        before (HeadCost): The first model.
        after (HeadCost): The second.
    """

    before: HeadCost
    after: HeadCost

    def __str__(self) -> str:
        rows = [
            ("head parameters", "head_parameters", 1, ""),
            ("head multiply-adds", "head_multiply_adds", 1, ""),
            ("head bytes", "head_bytes", 1, ""),
            ("model parameters", "parameters", 1, ""),
            ("forward pass", "seconds", 1000, " ms"),
        ]
        lines = [f"{'':20s}{'before':>14s}{'after':>14s}{'ratio':>9s}"]
        for title, name, scale, unit in rows:
            before, after = (scale * getattr(one, name) for one in (self.before, self.after))
            shown = (
                (f"{before:,.2f}{unit}", f"{after:,.2f}{unit}")
                if unit
                else (
                    f"{before:,}",
                    f"{after:,}",
                )
            )
            lines.append(f"{title:20s}{shown[0]:>14s}{shown[1]:>14s}{before / after:>8.2f}x")
        return "\n".join(lines)


def compare_heads(
    before: nn.Module, after: nn.Module, example_inputs: Any, *, repetitions: int = 30
) -> HeadComparison:
    r"""
    Compare two models' heads, and measure both models' forward passes in turn.

    Args:

        before (nn.Module): The full model.
        after (nn.Module): The decomposed one.
        example_inputs (Tensor or tuple): A batch.
        repetitions (int): Number of timed passes of each.
                    Default: 30

    Returns:
        *HeadComparison*.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with (
        model_left_as_found(before, evaluation=True),
        model_left_as_found(after, evaluation=True),
    ):
        times = interleaved_seconds((before, after), (inputs, inputs), repetitions)
    return HeadComparison(_cost(before, times[0]), _cost(after, times[1]))


def _cost(model: nn.Module, times: Sequence[float]) -> HeadCost:
    _, head = find_head(model)
    tensors = [*head.parameters(), *head.buffers()]
    weights = head.weight.numel()  # type: ignore[operator]
    seconds, spread = median_and_interquartile(times)
    return HeadCost(
        head_parameters=sum(parameter.numel() for parameter in head.parameters()),
        head_multiply_adds=int(weights),
        head_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
        seconds_interquartile=spread,
    )
