"""How large networks and their layers are: their parameters, or what they multiply for an image."""

from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import ModelInputs
from captum_classfilters.pruning.compare_networks import multiply_adds

Unit = Literal["parameters", "multiply_adds"]
UNITS: tuple[Unit, ...] = ("parameters", "multiply_adds")


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
        return 0 if parameter.dim() == 1 else parameter.numel() * self._positions.get(name, 0)

    def of_layer(self, name: str, module: nn.Module) -> int:
        """What a layer counts."""
        return sum(self.of_parameter(name, parameter) for parameter in module.parameters())

    def of_split(self, name: str, outputs: float, inputs: float) -> tuple[float, float]:
        """What a layer counts for each rank once it is split, and whatever its rank."""
        if self.counts_parameters:
            return inputs + outputs, outputs  # the second half has a bias
        return (inputs + outputs) * self._positions.get(name, 0), 0


def _positions(model: nn.Module, inputs: ModelInputs) -> dict[str, int]:
    """At how many positions of an image each convolution or linear layer runs, all runs together."""
    named = model.named_modules()
    layers: dict[nn.Module, str] = {
        module: name for name, module in named if isinstance(module, (nn.Linear, _ConvNd))
    }
    found = dict.fromkeys(layers.values(), 0)

    def hook(module: nn.Module, _read: ModelInputs, output: Tensor) -> None:
        filters = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        found[layers[module]] += output.numel() // (len(output) * filters)

    with hooked(layers, hook):
        model(*inputs)
    return found
