"""How large networks and their layers are: their parameters, or what they multiply for an image."""

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from captum_classfilters._core.layers import named_layers
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import ModelInputs
from captum_classfilters.pruning.compare_networks import multiply_adds

Unit = Literal["parameters", "multiply_adds"]
UNITS: tuple[Unit, ...] = ("parameters", "multiply_adds")


class Ranks(NamedTuple):
    """How many numbers a split layer's kernel reads and makes at each position."""

    inputs: int
    outputs: int


class Shape(NamedTuple):
    """Outputs and inputs of a layer, and positions of its kernel; 1 of a linear layer."""

    outputs: int
    inputs: int
    positions: int

    @property
    def least(self) -> Ranks:
        """The smallest ranks. A kernel of one position is narrowed by what it makes alone."""
        return Ranks(1 if self.positions > 1 else self.inputs, 1)


class NetworkSize:
    r"""
    Sizes of a network, of smaller ones made of it, and of their layers.

    A weight is one parameter and, for an image, as many multiply-adds as its layer has positions.
    Biases and normalizations are parameters, and count no multiply-adds.

    Args:

        model (nn.Module): The network.
        inputs (tuple): A few inputs.
        unit (str): ``"parameters"`` or ``"multiply_adds"``.
    """

    def __init__(
        self, model: nn.Module, inputs: ModelInputs = (), unit: Unit = "parameters"
    ) -> None:
        self.inputs, self.unit = inputs, unit
        self._positions = {} if self.counts_parameters else _positions(model, inputs)

    @property
    def counts_parameters(self) -> bool:
        """Whether sizes are numbers of parameters."""
        return self.unit == "parameters"

    def of(self, model: nn.Module) -> int:
        """The size of the network, or of a smaller one made of it."""
        if self.counts_parameters:
            return sum(parameter.numel() for parameter in model.parameters())
        return multiply_adds(model, self.inputs)

    def of_parameter(self, name: str, parameter: Tensor) -> int:
        """What a parameter of a module counts."""
        if self.counts_parameters:
            return parameter.numel()
        return (
            0 if parameter.dim() == 1 else parameter.numel() * self._positions.get(name, (0, 0))[1]
        )

    def of_layer(self, name: str, module: nn.Module) -> int:
        """What a layer counts."""
        return sum(self.of_parameter(name, parameter) for parameter in module.parameters())

    def of_split(self, name: str, shape: Shape, ranks: Ranks) -> float:
        """What a layer counts once it is split; a part that would not narrow it is left out."""
        first = shape.inputs * ranks.inputs * (ranks.inputs < shape.inputs)
        kernel = ranks.inputs * ranks.outputs * shape.positions
        last = shape.outputs * ranks.outputs * (ranks.outputs < shape.outputs)
        if self.counts_parameters:
            return first + kernel + last + shape.outputs  # the last part has a bias
        read, made = self._positions.get(name, (0, 0))
        return first * read + (kernel + last) * made


def _positions(model: nn.Module, inputs: ModelInputs) -> dict[str, tuple[int, int]]:
    """How many positions of an image each convolution or linear layer reads and makes, all runs
    together."""
    layers: dict[nn.Module, str] = {
        module: name
        for name, module in reversed(named_layers(model).items())  # the first name of several stays
        if isinstance(module, (nn.Linear, _ConvNd))
    }
    found = dict.fromkeys(layers.values(), (0, 0))

    def hook(module: nn.Module, read: ModelInputs, output: Tensor) -> None:
        axis = -1 if isinstance(module, nn.Linear) else 1
        entered, left = found[layers[module]]
        entered += read[0].numel() // (len(read[0]) * read[0].shape[axis])
        left += output.numel() // (len(output) * output.shape[axis])
        found[layers[module]] = entered, left

    with hooked(layers, hook):
        model(*inputs)
    return found
