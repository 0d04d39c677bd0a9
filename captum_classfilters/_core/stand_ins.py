"""Layers in a row in the place of one, which answer when a model looks at what that was."""

import inspect
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from captum_classfilters._core.devices import without_autocast

_OF_THE_WHOLE = ("weight", "bias", "groups")
_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
_SETTINGS = (bool, int, float, str, tuple, torch.dtype, type(None))


class StandIn(nn.Sequential):
    r"""
    Layers in a row in the place of one layer, with what a model may read of that.

    A model asks its layers for more than their outputs: Hugging Face's vision transformers for the
    weight's type, its MobileNets for the stride. ``weight``, ``bias`` and ``groups`` are those of the
    one convolution or linear layer that the row equals, never those of a convolution or linear layer
    that is only part of it. What else the row has not is asked of the layer, if that is one of the
    parts; else the row has the layer's settings.

    Args:

        parts (mapping): The layers by their names.
        layer (nn.Module, optional): What they stand for, which may be among them.
    """

    __jit_unused_properties__ = list(_OF_THE_WHOLE)  # noqa: RUF012 - as TorchScript reads it
    _own = ""

    def __init__(self, parts: Mapping[str, nn.Module], layer: nn.Module | None = None) -> None:
        super().__init__(OrderedDict(parts))
        if layer is not None:
            self._own = next((name for name, part in parts.items() if part is layer), "")
            if not self._own:
                take_settings(self, layer)
            self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """That of the one layer that the row equals."""
        return self._as_one()[0]

    @property
    def bias(self) -> Tensor | None:
        """That of the one layer that the row equals."""
        return self._as_one()[1]

    @property
    def groups(self) -> int:
        """Those of the one convolution that the row equals: one, where the parts have not the same."""
        groups = {part.groups for part in self._linear() if not isinstance(part, nn.Linear)}
        if not groups:
            raise AttributeError(f"{type(self).__name__} has no groups")
        return groups.pop() if len(groups) == 1 else 1

    def _linear(self) -> list[nn.Linear | nn.modules.conv._ConvNd]:
        """The parts, if the row equals one convolution or linear layer."""
        parts = [part for part in self if isinstance(part, _LINEAR)]
        if len(parts) < len(self):
            raise AttributeError(f"{type(self).__name__} equals no single layer")
        return parts

    def _as_one(self) -> tuple[Tensor, Tensor | None]:
        parts = self._linear()
        groups = {getattr(part, "groups", 1) for part in parts}
        common = groups.pop() if len(groups) == 1 else 1
        weight, bias = parts[0].weight, parts[0].bias
        transposed = getattr(parts[0], "transposed", False)
        with without_autocast(weight.device):  # most models ask for the weight's type
            weight = weight if common > 1 else _ungrouped(parts[0])
            for part in parts[1:]:
                whole = _ungrouped(part)
                if bias is not None:
                    bias = whole.reshape(*whole.shape[:2], -1).sum(2) @ bias
                added = [one for one in (bias, part.bias) if one is not None]
                bias = torch.stack(added).sum(0) if added else None
                weight = _followed(weight, part.weight if common > 1 else whole, common, transposed)
        return weight, bias

    def __getattr__(self, name: str) -> Tensor | nn.Module:  # or whatever the layer has
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = self.__dict__.get("_modules", {}).get(self._own)
            # Not its methods, which would leave out the other parts, nor what torch notes of modules.
            if own is None or name.startswith("_") or name == "parametrizations":
                raise
            if name in _OF_THE_WHOLE and isinstance(own, _LINEAR):
                raise
            if inspect.ismethod(getattr(own, name)):
                raise
            return getattr(own, name)


def take_settings(module: nn.Module, layer: nn.Module) -> None:
    """Give a module the numbers and texts that a layer has as attributes, where it has none."""
    for name, value in vars(layer).items():
        plain = isinstance(value, _SETTINGS) and not name.startswith("_")
        own = isinstance(getattr(type(module), name, None), property)
        if plain and not own and not hasattr(module, name):
            setattr(module, name, value)


def _ungrouped(part: nn.Module) -> Tensor:
    """The weight of a convolution or linear layer with zeros between its groups."""
    weight: Tensor = part.weight  # type: ignore[assignment]
    groups: int = getattr(part, "groups", 1)
    if groups == 1:
        return weight
    blocks = weight.flatten(1).chunk(groups)
    return torch.block_diag(*blocks).reshape(len(weight), -1, *weight.shape[2:])


def _followed(weight: Tensor, by: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weight of a convolution or linear layer that another follows, either with a kernel of size
    1."""
    own, other = (
        part.reshape(groups, len(part) // groups, part.shape[1], -1) for part in (weight, by)
    )
    kernel = weight.shape[2:] if other.shape[3] == 1 else by.shape[2:]
    if transposed:  # inputs lie on the first axis
        found = torch.einsum("girk,gcrq->gickq", own, other)
        return found.reshape(len(weight), -1, *kernel)
    return torch.einsum("grik,gcrq->gcikq", own, other).reshape(len(by), -1, *kernel)
