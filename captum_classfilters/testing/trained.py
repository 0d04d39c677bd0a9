"""Networks trained so that it is known which filters decide, and measured to be so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.devices import without_autocast
from captum_classfilters._core.guard import weights_change
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.tensor_files import Schema, read_tensors
from captum_classfilters.testing.tasks import (
    AXES,
    LEVELS,
    Plan,
    draw_concepts,
    draw_patterns,
    paint,
    plan,
)
from captum_classfilters.testing.training import Ordered, put_in_order, skeleton, train
from captum_classfilters.testing.verification import Verification, verify

_SHIPPED = Path(__file__).with_name("trained_networks.safetensors")
SCHEMA = Schema(
    "trained_networks", "captum_classfilters.TrainedNetworks", 1, "trained networks", "set"
)


@contextmanager
def _single_precision() -> Iterator[None]:
    """Whatever PyTorch's default type is, the same numbers are drawn: each type draws others."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@short_repr
@dataclass(frozen=True)
class TrainedNetwork:
    r"""
    A trained network with known class filters at every layer, and its images.

    Args:

        model (nn.Sequential): Logits (N, C) of images (N, 1, 12, 12).
        axis (str): What makes its filters hard to find.
        level (int): How hard.
        seed (int): Seed of patterns, order of filters, and training.
        layers (tuple of str): Names of its layers, from the first to the one that feeds the head.
        layer (str): The one at which the axis acts.
        truth (dict): For each layer a bool Tensor (C, K), the filters that decide each class.
        edges (dict): For each layer but the first a bool Tensor (K, K before), the filters of the
                    layer before that decide each filter which decides a class; the rows of others
                    are empty, for theirs are not known.
        kinds (dict): For each layer the kind of each filter, K strings.
        patterns (Tensor): Shape (F, 4, 4), what images are made of.
    """

    model: nn.Sequential
    axis: str
    level: int
    seed: int
    layers: tuple[str, ...]
    layer: str
    truth: dict[str, Tensor]
    edges: dict[str, Tensor]
    kinds: dict[str, tuple[str, ...]]
    patterns: Tensor
    _plan: Plan = field(repr=False)
    _ordered: Ordered = field(repr=False)

    @property
    def num_classes(self) -> int:
        """C."""
        return self._plan.num_classes

    @_single_precision()
    def images(self, number: int, seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
        r"""
        Images and their labels, classes in turn.

        Every image is made of 3 x 3 cells with, in random places, twice the pattern or patterns of its
        class, three times one that all images have and, on the axis ``"shortcut"``, marks; all of them
        in random strength, with faint patterns of others and normal noise.

        Args:

            number (int): N.
            seed (int): Seed; the global random state is not touched.
                        Default: 0
            noise (float): Standard deviation of the noise of a pixel.
                        Default: 0.1

        Returns:
            *tuple* of images (N, 1, 12, 12) and labels (N,).
        """
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(number) % self.num_classes
        concepts, _ = draw_concepts(self._plan, labels, generator)
        return paint(concepts, self.patterns, generator, noise), labels

    def loader(
        self, number: int, seed: int = 0, noise: float = 0.1, batch_size: int = 100
    ) -> DataLoader:
        """The same in batches of (images, labels)."""
        dataset = TensorDataset(*self.images(number, seed, noise))
        return DataLoader(dataset, batch_size=batch_size)

    @_single_precision()
    def verify(self, number: int = 400, seed: int = 1) -> Verification:
        r"""
        Measure, by interventions at every layer, whether ``truth`` and ``edges`` hold.

        Args:

            number (int): Images, of all classes together.
                        Default: 400
            seed (int): Their seed.
                        Default: 1

        Returns:
            *Verification*, whose ``holds`` says whether every share is at least 0.95.

        Raises:
            ValueError: There are not ten images for each class.
        """
        if number < 10 * self.num_classes:
            raise ValueError(
                f"number={number}; at least {10 * self.num_classes} images are needed."
            )
        return verify(self.model, self._plan, self._ordered, self.patterns, number, seed)


@arguments_checked
@torch.inference_mode(False)
@_single_precision()
def trained_network(
    axis: str, level: int = 1, seed: int = 0, *, shipped: bool = True
) -> TrainedNetwork:
    r"""
    A small network that was trained, and measured, to have known class filters and edges.

    An image shows concepts. Each filter of a layer stands for a gate that is on where certain filters
    of the layer before are (an AND of ORs; on ``"backup"`` unless another is, too), and the classes are
    the gates of the last filters. Training
    makes it so by interchange interventions (Geiger et al.: *Inducing Causal Structure for
    Interpretable Neural Networks*, ICML 2022, https://arxiv.org/abs/2112.00826): some filters of a
    layer are given what they answer to another image, or zero, and what follows is taught to answer as
    the gates do. All weights are free, so that every filter has some influence on every other.

    **What is known.** A *knockout* of a class is a set of filters of a layer without which (at zero)
    an image of the class has its probability at one half or less, and no smaller set of which does
    the same: the network no longer tells the class, though it may still guess it. A filter
    **decides** a class if it is in one of its knockouts. If each of several filters is enough, they
    are one knockout, and removing any one of them changes nothing: all of them decide. If there are
    fewer filters than classes, a class is where *two* filters are on: each of the two is a knockout,
    and each filter decides several classes. Likewise an **edge** leads to a deciding filter from
    those of the layer before that are in *its* knockouts, without which it answers less than half.
    ``verify()`` measures all of it on the network itself.

    Axes, with two levels each but for ``"backup"``:

    - ``"shared"``: a class is where two concepts are. Level 1: four classes, each filter serves two;
      level 2: six classes, each serves three.
    - ``"redundancy"``: two (level 1) or three filters of ``layer2`` for each class, each enough.
    - ``"backup"``: two filters of ``layer1`` for each class, each enough, of which ``layer2`` hears only
      the first: the filter there that hears the second is silent while the first is on, and steps in
      when it is gone (the Hydra effect: McGrath et al., https://arxiv.org/abs/2307.15771).
    - ``"superposition"``: four filters of ``layer2`` for six classes, or five for ten.
    - ``"shortcut"``: 60 % (level 1) or 90 % of class 0's images have a mark that decides as the class's
      pattern does, and as many of class 1's have one that decides nothing.
    - ``"depth"``: four (level 1) or five layers, and the first is asked.

    In all but ``"superposition"``, layers also have *echo* filters, which answer to a class twice as
    strongly as its own filters and have no path to any class, a *loud* one, which answers to every image,
    and *free* ones, which were taught nothing but to have no influence.

    Args:

        axis (str): One of the above.
        level (int): 1 or 2; of ``"backup"`` 1.
                    Default: 1
        seed (int): Seed; the global random state is not touched. The package has three seeds
                    of every axis and level: see :func:`shipped_networks`.
                    Default: 0
        shipped (bool): Read the network from the package if it is there, the same on every machine.
                    Otherwise it is trained, in 15 to 60 seconds, and differs where PyTorch rounds
                    differently; whether it is as it should be is for ``verify()`` to say.
                    Default: True

    Returns:
        *TrainedNetwork*.

    Raises:
        ValueError: There is no such axis or level, or the seed is no whole number from 0.

    Examples::

        >>> from captum_classfilters import LayerFilterAblation
        >>> from captum_classfilters.testing import recovery, trained_network
        >>> network = trained_network("shared")
        >>> network.layers, network.truth["layer2"].sum(1).tolist()
        (('layer1', 'layer2', 'layer3'), [2, 2, 2, 2])
        >>> table = LayerFilterAblation(network.model, "layer2").identify(
        ...     network.loader(80), show_progress=False)
        >>> recovery(table, network.truth["layer2"], as_many=True).precision
        1.0
        >>> network.verify().holds
        True
    """
    _check(axis, level, seed)
    task = plan(axis, level)
    generator = torch.Generator().manual_seed(seed)
    patterns = draw_patterns(task.num_concepts, generator)
    ordered = put_in_order(task, generator)
    weights = weights_of(axis, level, seed) if shipped else None
    plain = without_autocast(torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), weights_change(), plain:
        torch.default_generator.manual_seed(seed)
        model = skeleton([len(kinds) for kinds in ordered.kinds], task)
        weights = weights or train(task, ordered, patterns, generator)
    model.load_state_dict({name: value.half().float() for name, value in weights.items()})
    return _described(
        model.eval().requires_grad_(False), axis, level, seed, patterns, task, ordered
    )


def _check(axis: str, level: int, seed: int) -> None:
    if axis not in AXES:
        raise ValueError(f"axis={axis!r}; choose one of {', '.join(AXES)}.")
    if level not in LEVELS[axis]:
        levels = ", ".join(map(str, LEVELS[axis]))
        raise ValueError(f"level={level}; choose one of {levels}, the levels of {axis!r}.")
    if seed < 0:
        raise ValueError(f"seed={seed}; expected a whole number from 0.")


def _described(
    model: nn.Sequential,
    axis: str,
    level: int,
    seed: int,
    patterns: Tensor,
    task: Plan,
    ordered: Ordered,
) -> TrainedNetwork:
    circuit, situations = ordered.circuit, task.situations()
    layers = tuple(f"layer{index + 1}" for index in range(len(ordered.kinds)))
    end = len(layers)
    truth = {name: circuit.deciding(situations, i, end) for i, name in enumerate(layers)}
    edges = {
        name: circuit.deciding(situations, i, i + 1) & truth[name].any(0)[:, None]
        for i, name in enumerate(layers[1:])
    }
    return TrainedNetwork(
        model=model,
        axis=axis,
        level=level,
        seed=seed,
        layers=layers,
        layer=layers[task.layer],
        truth=truth,
        edges=edges,
        kinds=dict(zip(layers, ordered.kinds, strict=True)),
        patterns=patterns,
        _plan=task,
        _ordered=ordered,
    )


@cache
def _shipped() -> dict[str, Tensor]:
    """All weights that the package has, in half precision."""
    return read_tensors(_SHIPPED, SCHEMA).all_tensors() if _SHIPPED.exists() else {}


def shipped_networks() -> list[tuple[str, int, int]]:
    r"""
    Axis, level and seed of every network that the package has, measured to hold.

    Returns:
        *list* of what :func:`trained_network` takes.

    Examples::

        >>> from captum_classfilters.testing import shipped_networks, trained_network
        >>> names = shipped_networks()
        >>> len(names), names[0]
        (33, ('backup', 1, 0))
        >>> networks = [trained_network(*name) for name in names if name[0] == "depth"]
    """
    starts = {tuple(name.split("/")[0].split("-")) for name in _shipped()}
    return sorted((axis, int(level), int(seed)) for axis, level, seed in starts)


def weights_of(axis: str, level: int, seed: int) -> dict[str, Tensor] | None:
    """The weights of a shipped network, or None."""
    start = f"{axis}-{level}-{seed}/"
    found = {
        name.removeprefix(start): tensor
        for name, tensor in _shipped().items()
        if name.startswith(start)
    }
    return found or None
