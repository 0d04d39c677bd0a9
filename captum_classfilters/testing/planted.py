"""A network written by hand: for every layer and class it is known which filters decide."""

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import short_repr
from captum_classfilters.class_filters import ClassFilters

_CELL = 3  # side of a pattern, and stride of the first convolution
_CELLS = 6  # cells along a side of an image
_OWN = 2  # planted filters that serve one class
_LOUD = 2
_SILENT = 2
_INHIBITION = 0.25


@short_repr
@dataclass(frozen=True)
class PlantedNetwork:
    r"""
    A network with known class filters at three depths, and its images.

    Args:

        model (nn.Sequential): Logits (N, C) of images (N, 1, 18, 18).
        layers (tuple of str): Names of its layers from the first to the one that feeds the head:
                    ``"shallow"``, ``"middle"``, ``"deep"``.
        truth (dict): For each layer a bool Tensor (C, K), the filters that decide each class.
        kinds (dict): For each layer the kind of each filter, K strings: ``"own"``, ``"shared"``,
                    ``"loud"``, ``"echo"`` or ``"silent"``.
        templates (Tensor): Shape (C + 1, 3, 3), the classes' patterns and the one on every image.
    """

    model: nn.Sequential
    layers: tuple[str, ...]
    truth: dict[str, Tensor]
    kinds: dict[str, tuple[str, ...]]
    templates: Tensor

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.templates) - 1

    def images(self, number: int, seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
        r"""
        Images and their labels, classes in turn.

        Every image is made of 6 x 6 cells with, in random places, three times the pattern of its
        class, twice at half strength that of another class, and six times, in random strength, a
        pattern that all classes have; over all of it normal noise.

        Args:

            number (int): N.
            seed (int): Seed; the global random state is not touched.
                        Default: 0
            noise (float): Standard deviation of the noise of a pixel.
                        Default: 0.1

        Returns:
            *tuple* of images (N, 1, 18, 18) and labels (N,).
        """
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(number) % self.num_classes
        step = torch.randint(1, self.num_classes, (number,), generator=generator)
        others = (labels + step) % self.num_classes
        cells = torch.zeros(number, _CELLS**2, _CELL, _CELL)
        place = torch.rand(number, _CELLS**2, generator=generator).argsort(1)
        loudness = 1 + torch.rand(number, 6, generator=generator)
        everywhere = torch.full((number,), self.num_classes)
        stamps = [(labels, torch.ones(number, 3)), (others, torch.full((number, 2), 0.5))]
        start = 0
        for pattern, strength in [*stamps, (everywhere, loudness)]:
            for column in range(strength.shape[1]):
                stamp = strength[:, column, None, None] * self.templates[pattern]
                cells[torch.arange(number), place[:, start]] += stamp
                start += 1
        side = _CELL * _CELLS
        images = cells.reshape(number, _CELLS, _CELLS, _CELL, _CELL).permute(0, 1, 3, 2, 4)
        images = images.reshape(number, 1, side, side)
        return images + noise * torch.randn(images.shape, generator=generator), labels

    def loader(
        self, number: int, seed: int = 0, noise: float = 0.1, batch_size: int = 100
    ) -> DataLoader:
        """The same in batches of (images, labels)."""
        dataset = TensorDataset(*self.images(number, seed, noise))
        return DataLoader(dataset, batch_size=batch_size)


@short_repr
@dataclass(frozen=True)
class Recovery:
    r"""
    How far a selection is the planted one.

    Args:

        precision (float): Share of the selected cells that were planted; NaN if none is selected.
        recall (float): Share of the planted cells that are selected; NaN if none was planted.
        num_selected (int): Number of selected cells.
    """

    precision: float
    recall: float
    num_selected: int


@arguments_checked
@torch.inference_mode(False)
def planted_network(num_classes: int = 4, leak: float = 0.0, seed: int = 0) -> PlantedNetwork:
    r"""
    Write a network whose class filters are known at every layer.

    Three convolutions with ReLUs, an average over positions and a linear head. The first one
    matches patterns, the others hand on what their predecessors found. Each layer has, in an order
    drawn with ``seed``:

    - two **own** filters for each class, which fire on its pattern and raise its logit;
    - one **shared** filter, which fires for classes 0 and 1 and raises both logits;
    - one **echo** for each class, which fires on its pattern more than its own filters do and which
      nothing listens to: it knows the class, and decides nothing;
    - two **loud** filters, which fire hardest, on every image, and decide nothing;
    - two **silent** filters, which never fire.

    Own filters of a class also lower the logits of the other classes. The planted filters of a
    class are its own and the shared ones: those through which its pattern reaches and raises its
    logit. Whether a method finds them and nothing else is a fact, not an opinion.

    Args:

        num_classes (int): C, from 2 to 7.
                    Default: 4
        leak (float): Standard deviation of the weights that are zero otherwise, between filters that
                    have nothing to do with each other and between these and the head; planted
                    weights are between 0.4 and 1. With a leak every filter decides a little.
                    Default: 0.0
        seed (int): Seed of the order, of the planted weights and of the leak.
                    Default: 0

    Returns:
        *PlantedNetwork*.

    Raises:
        ValueError: ``num_classes`` is out of range, or the leak is negative.

    Examples::

        >>> from captum_classfilters import LayerFilterContribution
        >>> from captum_classfilters.testing import planted_network, recovery
        >>> planted = planted_network()
        >>> table = LayerFilterContribution(planted.model, "deep").identify(
        ...     planted.loader(80), show_progress=False)
        >>> recovery(table, planted.truth["deep"], as_many=True)
        Recovery(precision=1, recall=1, num_selected=10)
    """
    if not 2 <= num_classes <= 7:
        raise ValueError(f"num_classes={num_classes} is out of range; choose 2 to 7.")
    if leak < 0:
        raise ValueError(f"leak={leak} is negative.")
    generator = torch.Generator().manual_seed(seed)
    templates = _templates(num_classes + 1)
    kinds, classes = _plan(num_classes)
    number = len(kinds)
    names = ("shallow", "middle", "deep")
    order = {name: torch.randperm(number, generator=generator) for name in names}
    model = _skeleton(number, num_classes)
    _write_matching(_convolution(model, "shallow"), templates, kinds, classes, order["shallow"])
    for name, before in (("middle", "shallow"), ("deep", "middle")):
        relay = _relay(kinds, classes, leak, generator)
        weight = _convolution(model, name).weight.data
        center = weight.shape[2] // 2
        weight[order[name][:, None], order[before][None], center, center] = relay
    head = _head(num_classes, kinds, classes, leak, generator)
    model.get_parameter("head.weight").data[:, order["deep"]] = head
    member = torch.tensor([[c in served for served in classes] for c in range(num_classes)])
    planted = torch.tensor([kind in ("own", "shared") for kind in kinds])
    truth, placed_kinds = {}, {}
    for name in names:
        table = torch.zeros(num_classes, number, dtype=torch.bool)
        table[:, order[name]] = member & planted
        truth[name] = table
        back = order[name].argsort()
        placed_kinds[name] = tuple(kinds[index] for index in back.tolist())
    return PlantedNetwork(model.eval(), names, truth, placed_kinds, templates)


@arguments_checked
def recovery(
    class_filters: ClassFilters, truth: Tensor | ArrayLike, as_many: bool = False
) -> Recovery:
    r"""
    Compare a table's selection with the planted filters, over all classes.

    Args:

        class_filters (ClassFilters): The table.
        truth (Tensor or array): Shape (C, K), bool.
        as_many (bool): Select as many filters for each class as were planted, instead of taking
                    the table's selection; precision and recall are then equal, unless the table
                    has fewer filters to select: a score of zero is no evidence.
                    Default: False

    Returns:
        *Recovery*.

    Raises:
        ValueError: The shapes differ.
    """
    truth = torch.as_tensor(truth, device="cpu")
    if truth.shape != class_filters.scores.shape:
        raise ValueError(
            f"truth has shape {tuple(truth.shape)}, the table {tuple(class_filters.scores.shape)}."
        )
    selected = class_filters.selected
    if as_many:
        for row, number in enumerate(truth.sum(1).tolist()):
            best = class_filters.select(num_filters=number).selected[row] if number else False
            selected[row] = best
    found = int((selected & truth).sum())
    number, planted = int(selected.sum()), int(truth.sum())
    return Recovery(
        precision=found / number if number else float("nan"),
        recall=found / planted if planted else float("nan"),
        num_selected=number,
    )


def _templates(number: int) -> Tensor:
    """Orthonormal 3x3 patterns without a mean (discrete cosines)."""
    position = torch.arange(_CELL) + 0.5
    waves = torch.stack([torch.cos(torch.pi * k * position / _CELL) for k in range(_CELL)])
    waves /= waves.norm(dim=1, keepdim=True)
    patterns = torch.einsum("iy,jx->ijyx", waves, waves).reshape(-1, _CELL, _CELL)
    return patterns[1 : number + 1]


def _plan(num_classes: int) -> tuple[list[str], list[tuple[int, ...]]]:
    """Kind of each filter, and the classes whose pattern it fires on."""
    every = range(num_classes)
    kinds = ["own"] * _OWN * num_classes + ["shared"] + ["echo"] * num_classes
    classes: list[tuple[int, ...]] = [(c,) for c in every for _ in range(_OWN)]
    classes += [(0, 1), *((c,) for c in every)]
    kinds += ["loud"] * _LOUD + ["silent"] * _SILENT
    classes += [()] * (_LOUD + _SILENT)
    return kinds, classes


def _skeleton(number: int, num_classes: int) -> nn.Sequential:
    model = nn.Sequential()
    first = nn.Conv2d(1, number, _CELL, stride=_CELL)
    model.add_module("shallow", nn.Sequential(first, nn.ReLU()))
    middle = nn.Conv2d(number, number, 3, padding=1)
    model.add_module("middle", nn.Sequential(middle, nn.ReLU()))
    model.add_module("deep", nn.Sequential(nn.Conv2d(number, number, 1), nn.ReLU()))
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(number, num_classes))
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def _convolution(model: nn.Sequential, name: str) -> nn.Conv2d:
    module = model.get_submodule(f"{name}.0")
    assert isinstance(module, nn.Conv2d)
    return module


def _write_matching(
    convolution: nn.Conv2d,
    templates: Tensor,
    kinds: list[str],
    classes: list[tuple[int, ...]],
    order: Tensor,
) -> None:
    """Filters of the first layer answer to their pattern, and to nothing weaker than 0.2 of it."""
    assert convolution.bias is not None
    bias = convolution.bias.data
    gain = {"own": 1.0, "shared": 1.0, "echo": 2.0, "loud": 4.0}
    for index, place in enumerate(order.tolist()):
        kind = kinds[index]
        if kind == "silent":
            bias[place] = -1.0
            continue
        patterns = templates[list(classes[index])] if classes[index] else templates[-1:]
        convolution.weight.data[place, 0] = gain[kind] * patterns.sum(0)
        bias[place] = -0.2 * gain[kind]


def _relay(
    kinds: list[str], classes: list[tuple[int, ...]], leak: float, generator: torch.Generator
) -> Tensor:
    """Weights (K, K) that hand on: own to own, shared to shared, echo to echo, loud to loud."""
    number = len(kinds)
    weight = leak * torch.randn(number, number, generator=generator)
    strength = 0.4 + 0.6 * torch.rand(number, number, generator=generator)
    for to in range(number):
        for by in range(number):
            alike = kinds[to] == kinds[by] and classes[to] == classes[by]
            if alike and kinds[to] != "silent":
                weight[to, by] = strength[to, by]
            if kinds[to] == "silent":
                weight[to, by] = -weight[to, by].abs()
    return weight


def _head(
    num_classes: int,
    kinds: list[str],
    classes: list[tuple[int, ...]],
    leak: float,
    generator: torch.Generator,
) -> Tensor:
    """Weights (C, K) of the head."""
    weight = leak * torch.randn(num_classes, len(kinds), generator=generator)
    strength = 0.4 + 0.6 * torch.rand(num_classes, len(kinds), generator=generator)
    for index, kind in enumerate(kinds):
        if kind in ("own", "shared"):
            weight[:, index] = -_INHIBITION
            served = list(classes[index])
            weight[served, index] = strength[served, index]
    return weight
