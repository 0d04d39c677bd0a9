"""Boolean circuits whose gates are filters: what a trained network is trained, and tested, to compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

#: A gate is on if in each of its groups at least one of the inputs is on; without groups it is no gate.
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Gates:
    r"""
    The gates of one layer.

    Args:

        groups (tuple): For each of K filters its groups of inputs, an AND of ORs; () for a filter that
                    stands for nothing.
        num_inputs (int): Number of gates of the layer before, or of concepts.
        unless (tuple): For each of K filters the inputs of which any one turns it off.
    """

    groups: tuple[Groups, ...]
    num_inputs: int
    unless: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def named(self) -> Tensor:
        """Which filters stand for a gate (K,)."""
        return torch.tensor([bool(groups) for groups in self.groups])

    def __call__(self, inputs: Tensor) -> Tensor:
        """From inputs (..., num_inputs), bool, to gates (..., K)."""
        members, owners = self._matrices
        off = (inputs.float() @ members) < 0.5
        on = (off.float() @ owners < 0.5) & self.named
        return on & (inputs.float() @ self._vetoes < 0.5)

    @cached_property
    def _vetoes(self) -> Tensor:
        """Which inputs turn which gate off (inputs, K)."""
        vetoes = torch.zeros(self.num_inputs, len(self))
        for owner, inputs in enumerate(self.unless):
            vetoes[list(inputs), owner] = 1
        return vetoes

    @cached_property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Which inputs are in which group (inputs, groups), and which gate's each is (groups, K)."""
        groups = [(owner, group) for owner, gate in enumerate(self.groups) for group in gate]
        members = torch.zeros(self.num_inputs, len(groups))
        owners = torch.zeros(len(groups), len(self))
        for row, (owner, group) in enumerate(groups):
            members[list(group), row] = 1
            owners[row, owner] = 1
        return members, owners

    def ordered(self, own: Tensor, before: Tensor) -> "Gates":
        """The same gates at other places: gate i at ``own[i]``, input i at ``before[i]``."""
        groups: list[Groups] = [()] * len(self)
        unless: list[tuple[int, ...]] = [()] * len(self)
        for index, gate in enumerate(self.groups):
            groups[int(own[index])] = tuple(tuple(int(before[i]) for i in g) for g in gate)
        for index, inputs in enumerate(self.unless):
            unless[int(own[index])] = tuple(int(before[i]) for i in inputs)
        return Gates(tuple(groups), self.num_inputs, tuple(unless))


@dataclass(frozen=True)
class Circuit:
    r"""
    Gates layer by layer; those of the last layer are the classes.

    Every cell of an image is a run of the circuit of its own. A class is on where one of its cells is.

    Args:

        layers (tuple of Gates): From the layer that reads concepts to the classes.
    """

    layers: tuple[Gates, ...]

    def after(self, inputs: Tensor, start: int) -> list[Tensor]:
        """All gates from layer ``start`` on, given those before it (..., inputs)."""
        states = []
        for layer in self.layers[start:]:
            inputs = layer(inputs)
            states.append(inputs)
        return states

    def knockouts(self, concepts: Tensor, layer: int, end: int, gate: int) -> list[tuple[int, ...]]:
        r"""
        The smallest sets of filters without which a gate is off.

        Args:

            concepts (Tensor): Shape (cells, F), bool: an image that has the gate on.
            layer (int): The layer of the filters, from 0.
            end (int): The layer of the gate.
            gate (int): Its index there.

        Returns:
            *list* of tuples of filters: no set holds another one. Empty where the gate is off anyway.
        """
        states = self.after(concepts, 0)
        if not states[end][:, gate].any():
            return []
        relevant = states[layer].any(0) & self.reaching(layer, end)[gate]
        filters = relevant.nonzero()[:, 0].tolist()
        found: list[tuple[int, ...]] = []
        for size in range(1, len(filters) + 1):
            for chosen in combinations(filters, size):
                if any(set(smaller) <= set(chosen) for smaller in found):
                    continue
                left = states[layer].clone()
                left[:, list(chosen)] = False
                if not self.after(left, layer + 1)[end - layer - 1][:, gate].any():
                    found.append(chosen)
        return found

    def reaching(self, layer: int, end: int) -> Tensor:
        """Which filters of a layer have a path that turns on which gate (gates, K)."""
        paths = torch.eye(len(self.layers[layer]))
        for gates in self.layers[layer + 1 : end + 1]:
            members, owners = gates._matrices
            paths = ((paths @ members @ owners) > 0).float()
        return paths.T > 0

    def deciding(self, situations: Sequence[Tensor], layer: int, end: int) -> Tensor:
        """Which filters of a layer are in a smallest knockout of which gate (gates, K)."""
        table = torch.zeros(len(self.layers[end]), len(self.layers[layer]), dtype=torch.bool)
        for gate in range(len(table)):
            for concepts in situations:
                for chosen in self.knockouts(concepts, layer, end, gate):
                    table[gate, list(chosen)] = True
        return table
