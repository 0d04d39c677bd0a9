"""Tiny models that can be computed by hand, and small data."""

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

#: For functions that show a progress bar.
QUIET: dict[str, Any] = {"show_progress": False}


if TYPE_CHECKING:

    class Deep(nn.Sequential):
        """What `deep` makes, with its layers by name."""

        stage1: nn.Sequential
        stage2: nn.Sequential
        pool: nn.AdaptiveAvgPool2d
        flatten: nn.Flatten
        head: nn.Linear
else:
    Deep = nn.Sequential

Layer = TypeVar("Layer", bound=nn.Module)
Value = TypeVar("Value")


def layer_at(model: nn.Module, name: str, kind: type[Layer]) -> Layer:
    """A layer of a model by its name, which is of the kind named."""
    found = model.get_submodule(name)
    assert isinstance(found, kind)
    return found


def conv_at(model: nn.Module, name: str) -> nn.Conv2d:
    """A convolution of a model by its name."""
    return layer_at(model, name, nn.Conv2d)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A tensor of a model by its name, which need be neither a parameter nor a buffer."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(owner), attribute)
    assert isinstance(value, Tensor)
    return value


def known(value: Value | None) -> Value:
    """What a table or a result need not hold, but does hold here."""
    assert value is not None
    return value


@torch.inference_mode()
def made_in_inference_mode(value: Value) -> Value:
    """A value with every tensor in it as inference mode makes them, which autograd does not keep."""
    return tree_map_only(Tensor, torch.clone, value)


def pool_linear(
    filters: int = 6, classes: int = 3, bias: bool = True, seed: int = 0
) -> nn.Sequential:
    """Convolution, ReLU, average, linear: contributions are exact at layer "1"."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, filters, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(filters, classes, bias=bias),
    ).eval()


class TwoScores(nn.Module):
    """A binary classifier's one output z as scores of two classes, -z and z, by hand."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x).reshape(-1)
        return torch.stack([-z, z], 1)


ONE_OUTPUT = {
    "logit": nn.Identity(),
    "row of logits": nn.Flatten(0),
    "probability": nn.Sigmoid(),
}


def one_output(kind: str) -> nn.Sequential:
    """A binary classifier with an output of one of these kinds, (N, 1) or (N,)."""
    return nn.Sequential(*pool_linear(classes=1), ONE_OUTPUT[kind]).eval()


def deep(seed: int = 0) -> Deep:
    """Two stages with batch normalization and in-place ReLU; "stage1" is an inner layer."""
    torch.manual_seed(seed)
    model = Deep()
    model.add_module(
        "stage1", nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
    )
    model.add_module(
        "stage2", nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True))
    )
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(6, 3))
    return model.eval()


class Checkpointed(Deep):
    """`deep()` whose stages run again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self)
        x = checkpoint(nn.Sequential(*parts[:2]), x, use_reentrant=self.reentrant)
        return nn.Sequential(*parts[2:])(x)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


def checkpointed(reentrant: bool = False) -> Checkpointed:
    """`deep()` under activation checkpointing."""
    model: nn.Sequential = deep()
    model.__class__ = CheckpointedReentrant if reentrant else Checkpointed
    return model  # type: ignore[return-value]


class TwoInputs(nn.Module):
    """Two images in, logits out, with an additional scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.relu(self.conv(left + right)).mean((2, 3)) * scale)


class TwoTensors(nn.Module):
    """A layer that puts out a tuple."""

    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :2], x[:, 2:]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 5, 3)
        self.split = self.Split()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.split(torch.relu(self.conv(x)))
        return self.head(torch.cat([left, right], 1).mean((2, 3)))


class ChannelsLast(nn.Module):
    """`pool_linear` with its maps as (N, H, W, K)."""

    class Transpose(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    def __init__(self, twin: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.relu, self.head = twin[0], nn.ReLU(), twin[4]
        self.transpose = self.Transpose()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transpose(self.relu(self.conv(x))).mean((1, 2)))


class Reused(nn.Module):
    """A ReLU that runs twice and a convolution that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.unused = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.relu(self.conv(x)).mean((2, 3))))


def images(number: int = 8, size: int = 6, seed: int = 1) -> Tensor:
    """Images (N, 2, size, size)."""
    return torch.randn(number, 2, size, size, generator=torch.Generator().manual_seed(seed))


def batches(number: int = 24, classes: int = 3, batch_size: int = 5, size: int = 6):
    """Batches of images and labels, the last one smaller."""
    x = images(number, size)
    y = torch.arange(number) * 7 % classes
    return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, number, batch_size)]


def joined(data):
    """All images and labels of some batches."""
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def hooks_of(model: nn.Module) -> int:
    """Number of hooks registered anywhere in a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )
