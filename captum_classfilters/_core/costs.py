"""What is counted of a network, and how two of them are told beside each other."""

from collections.abc import Mapping, Sequence

from torch import nn

from captum_classfilters._core.devices import device_of, on_device, ordinary
from captum_classfilters._core.layers import named_layers
from captum_classfilters._core.linear_maps import holds_weight
from captum_classfilters._core.stand_ins import StandIn
from captum_classfilters._core.tables import Table
from captum_classfilters._core.types import ExampleInputs, ModelInputs


def inputs_of(model: nn.Module, example_inputs: ExampleInputs) -> ModelInputs:
    """Example inputs as the arguments of a model, where it is."""
    several = isinstance(example_inputs, (tuple, list))
    inputs = tuple(example_inputs) if several else (example_inputs,)
    moved: ModelInputs = on_device(inputs, device_of(model))
    return ordinary(moved)


def num_outputs(model: nn.Module) -> dict[str, int]:
    """Filters of every convolution and outputs of every linear layer, decomposed ones too, by name."""
    outputs = {}
    seen: set[int] = set()
    for name, module in named_layers(model).items():
        width = getattr(module, "out_channels", getattr(module, "out_features", None))
        whole = isinstance(module, StandIn)  # which is told by its parts
        new = not whole and id(module) not in seen and holds_weight(module)
        if new and isinstance(width, int):
            outputs[name] = width
        seen.add(id(module))
    return outputs


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def before_and_after(
    quantities: Mapping[str, tuple[float, float]], title: str = "", notes: Sequence[str] = ()
) -> Table:
    r"""
    Quantities before and after as a table, with their ratios.

    Args:

        quantities (mapping): Title to the two values.
        title (str): What stands above the titles.
                    Default: ""
        notes (sequence of str): Lines below the table.
                    Default: ()

    Returns:
        *Table*.

    Examples::

        >>> from captum_classfilters._core.costs import before_and_after
        >>> print(before_and_after({"filters": (12, 8), "bytes": (2048, 512)}))
                 before  after  ratio
        filters      12      8   1.50
        bytes     2,048    512   4.00
    """
    rows = [
        {title: name, "before": before, "after": after, "ratio": before / after if after else None}
        for name, (before, after) in quantities.items()
    ]
    return Table(rows, {"ratio": ".2f"}, notes=notes, bars=("ratio",))
