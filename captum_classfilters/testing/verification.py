"""Interventions on a trained network, and whether they do what its circuit says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters.testing.circuits import Circuit
from captum_classfilters.testing.tasks import Plan, draw_concepts, paint
from captum_classfilters.testing.training import Ordered, choose

_ENOUGH = 0.95 - 1e-6  # 1 - 0.05 is a little less, in single precision


@short_repr
@dataclass(frozen=True)
class Verification(Tabular):
    r"""
    Shares of images, over all layers those of the worst class, filter and kind of image.

    An image keeps its class while that has more than one half of the probability, and loses it else.

    Args:

        accuracy (float): Images whose most probable class is their own.
        lost (float): Images that lose their class without one of its knockouts.
        enough (float): Images that keep it without all of a knockout but one filter; 1 if every
                    knockout is a single filter.
        kept (float): Images that keep their class without all filters that do not decide it.
        others (float): Images that keep their class without any one filter that does not decide it.
        interchanged (float): Images with some filters of another image whose most probable class is one
                    that is then on, of those that have one; of all classes together, in the worst
                    layer.
        edges_lost (float): Images in which a filter that decides falls below half of what it answers
                    without one of its knockouts in the layer before.
        edges_kept (float): Images in which it does not, without all filters that have no edge to it.
    """

    accuracy: float
    lost: float
    enough: float
    kept: float
    others: float
    interchanged: float
    edges_lost: float
    edges_kept: float

    @property
    def holds(self) -> bool:
        """Whether all shares are at least 0.95."""
        return min(vars(self).values()) >= _ENOUGH

    def _tables(self) -> list[Table]:
        rows = [{"test": name, "share of images": value} for name, value in vars(self).items()]
        return [Table(rows, title="as the circuit says" if self.holds else "not verified")]


@torch.no_grad()
def verify(
    model: nn.Sequential, plan: Plan, ordered: Ordered, patterns: Tensor, number: int, seed: int
) -> Verification:
    """Make the interventions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % plan.num_classes
    concepts, place = draw_concepts(plan, labels, generator)
    other = labels[torch.randperm(number, generator=generator)]
    source, _ = draw_concepts(plan, other, generator, place)
    images, sources = (paint(c, patterns, generator, 0.1) for c in (concepts, source))
    run = _Run(model, plan, ordered.circuit, concepts, labels)
    shares: dict[str, list[float]] = {name: [1.0] for name in Verification.__dataclass_fields__}
    shares["accuracy"].append(float((model(images).argmax(1) == labels).float().mean()))
    for layer in range(run.depth):
        maps, others = (model[: layer + 1](x) for x in (images, sources))
        for name, value in (*run.classes(layer, maps), *run.edges(layer, maps, ordered.gains)):
            shares[name].append(value)
        value = run.interchange(layer, maps, others, source, generator)
        shares["interchanged"].append(value)
    return Verification(**{name: min(values) for name, values in shares.items()})


@dataclass(frozen=True)
class _Run:
    """A network, its circuit, and images with known concepts."""

    model: nn.Sequential
    plan: Plan
    circuit: Circuit
    concepts: Tensor
    labels: Tensor

    @property
    def depth(self) -> int:
        return len(self.circuit.layers) - 1

    def _kinds_of_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A situation, and the places of its images."""
        for situation in self.plan.situations():
            alike = (self.concepts.any(1) == situation.any(0)).all(1)
            if alike.any():
                yield situation, alike

    def _keeping(self, layer: int, maps: Tensor, without: Tensor, class_: int) -> list[float]:
        """Shares of images that are of a class without sets (S, K) of filters of a layer, each."""
        kept = maps * (~without)[:, None, :, None, None]
        logits: Tensor = self.model[layer + 1 :](kept.flatten(0, 1))
        on = logits.softmax(1)[:, class_] > 0.5
        shares: list[float] = on.unflatten(0, (len(without), len(maps))).float().mean(1).tolist()
        return shares

    def classes(self, layer: int, maps: Tensor) -> Iterator[tuple[str, float]]:
        """Removals that take a class away, and those that do not."""
        width, end = maps.shape[1], self.depth
        truth = self.circuit.deciding(self.plan.situations(), layer, end)
        for situation, alike in self._kinds_of_images():
            class_ = int(self.labels[alike][0])
            for knockout in self.circuit.knockouts(situation, layer, end, class_):
                but_one = [[k for k in knockout if k != left] for left in knockout]
                sets = [knockout, *but_one] if len(knockout) > 1 else [knockout]
                without = torch.stack([_mask(width, chosen) for chosen in sets])
                lost, *enough = self._keeping(layer, maps[alike], without, class_)
                yield "lost", 1 - lost
                yield from (("enough", share) for share in enough)
        for class_, decides in enumerate(truth):
            own = maps[self.labels == class_]
            singles = torch.eye(width, dtype=torch.bool)[~decides]
            without = torch.cat([~decides[None], singles])
            kept, *others = self._keeping(layer, own, without, class_)
            yield "kept", kept
            yield from (("others", share) for share in others)

    def edges(
        self, layer: int, maps: Tensor, gains: tuple[Tensor, ...]
    ) -> Iterator[tuple[str, float]]:
        """Removals that take a deciding filter of the next layer away, and those that do not."""
        if layer + 1 == self.depth:
            return
        width, end = maps.shape[1], layer + 1
        edges = self.circuit.deciding(self.plan.situations(), layer, end)
        serving = self.circuit.reaching(end, self.depth).any(0)
        for situation, alike in self._kinds_of_images():
            states = self.circuit.after(self.concepts[alike], 0)[end]
            for gate in (serving & states.any(1).any(0)).nonzero()[:, 0].tolist():
                sets = self.circuit.knockouts(situation, layer, end, gate)
                tests = [("edges_lost", _mask(width, chosen)) for chosen in sets]
                for name, without in [*tests, ("edges_kept", ~edges[gate])]:
                    after = self.model[end](maps[alike] * (~without)[:, None, None])
                    on, answers = states[..., gate], after[:, gate].flatten(1)
                    answer = (answers * on).sum(1) / on.sum(1)
                    share = float((answer > gains[end][gate] / 2).float().mean())
                    yield name, share if name == "edges_kept" else 1 - share

    def interchange(
        self, layer: int, maps: Tensor, others: Tensor, source: Tensor, generator: torch.Generator
    ) -> float:
        """Share of images that are of a class that is on with some filters of other images."""
        states = self.circuit.after(self.concepts, 0)[layer]
        there = self.circuit.after(source, 0)[layer]
        serving = self.circuit.reaching(layer, self.depth).any(0)
        chosen, _ = choose(states.any(1), serving, generator)
        mixed = torch.where(chosen[..., None, None], others, maps)
        state = torch.where(chosen[:, None], there, states)
        wanted = self.circuit.after(state, layer + 1)[-1].any(1)
        found = self.model[layer + 1 :](mixed).argmax(1, keepdim=True)
        return float(wanted.gather(1, found)[wanted.any(1)].float().mean())


def _mask(width: int, filters: Sequence[int]) -> Tensor:
    mask = torch.zeros(width, dtype=torch.bool)
    mask[list(filters)] = True
    return mask
