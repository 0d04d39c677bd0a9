"""What a decomposed head saves: parameters, multiply-adds, bytes, measured time."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.timing import interleaved_seconds, median_and_interquartile
from captum_classfilters._core.types import ExampleInputs
from captum_classfilters.heads.linear_head import example_batch, find_head


@short_repr
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


@short_repr
@dataclass(frozen=True)
class HeadComparison(Tabular):
    """A model's head before and after; prints as a table.

    Args:

        before (HeadCost): The first model.
        after (HeadCost): The second.
    """

    before: HeadCost
    after: HeadCost

    def _tables(self) -> list[Table]:
        quantities = {
            "head parameters": "head_parameters",
            "head multiply-adds": "head_multiply_adds",
            "head bytes": "head_bytes",
            "model parameters": "parameters",
            "forward pass, ms": "seconds",
        }
        rows = []
        for title, name in quantities.items():
            scale = 1000 if name == "seconds" else 1
            before, after = (scale * getattr(cost, name) for cost in (self.before, self.after))
            rows.append({"": title, "before": before, "after": after, "ratio": before / after})
        return [Table(rows, {"ratio": ".2f"}, bars=("ratio",))]


@arguments_checked
def compare_heads(
    before: nn.Module, after: nn.Module, example_inputs: ExampleInputs, *, repetitions: int = 30
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
        *HeadComparison*: What the heads cost ``before`` and ``after``, each with
        ``head_parameters``, ``head_multiply_adds``, ``head_bytes``, ``parameters`` of the whole
        model, and ``seconds``; prints as a table.

    Raises:
        ValueError: A model has no linear head, or ``repetitions`` is not positive.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions} must be at least 1.")
    heads = [find_head(model, example_inputs)[1] for model in (before, after)]
    with example_batch([before, after], example_inputs) as batch:
        times = interleaved_seconds((before, after), (batch.inputs, batch.inputs), repetitions)
        # Inside, since a parametrization may change by being read in training mode.
        costs = [
            _cost(model, head, own)
            for model, head, own in zip((before, after), heads, times, strict=True)
        ]
    return HeadComparison(*costs)


def _cost(model: nn.Module, head: nn.Module, times: Sequence[float]) -> HeadCost:
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
