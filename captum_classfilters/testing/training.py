"""Training of a network so that its filters are the gates of a circuit."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from captum_classfilters.testing.circuits import Circuit, Gates
from captum_classfilters.testing.tasks import CELL, Plan, draw_concepts, paint

_BATCH = 64
_NOISE = 0.1
_RATE = 0.02
_HEAD_RATE = 0.2
_LEAK = 0.2
_ON_WEIGHT = 4.0  # cells where a gate is on are few
_CLASS_WEIGHT = 4.0


@dataclass(frozen=True)
class Ordered:
    """A plan whose filters are in a random order: circuit, kinds and gains by place."""

    circuit: Circuit
    kinds: tuple[tuple[str, ...], ...]
    gains: tuple[Tensor, ...]


def put_in_order(plan: Plan, generator: torch.Generator) -> Ordered:
    """Draw where each filter of each layer is."""
    layers = plan.circuit.layers
    before = torch.arange(plan.num_concepts)
    ordered, kinds, gains = [], [], []
    for gates, kind, gain in zip(layers, plan.kinds, plan.gains, strict=False):
        own = torch.randperm(len(gates), generator=generator)
        ordered.append(gates.ordered(own, before))
        back = own.argsort().tolist()
        kinds.append(tuple(kind[i] for i in back))
        gains.append(torch.tensor([gain[i] for i in back]))
        before = own
    classes: Gates = layers[-1]
    ordered.append(classes.ordered(torch.arange(len(classes)), before))
    return Ordered(Circuit(tuple(ordered)), tuple(kinds), tuple(gains))


def skeleton(
    widths: list[int], plan: Plan, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Blocks ``layer1``, ``layer2`` ..., an average over positions and a linear head."""
    model = nn.Sequential()
    first = nn.Conv2d(1, widths[0], CELL, stride=CELL)
    model.add_module("layer1", nn.Sequential(first, activation()))
    for index, (before, width) in enumerate(pairwise(widths)):
        wide, narrow = (
            nn.Conv2d(before, plan.hidden, 3, padding=1),
            nn.Conv2d(plan.hidden, width, 1),
        )
        layer = nn.Sequential(wide, activation(), narrow, activation())
        model.add_module(f"layer{index + 2}", layer)
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(widths[-1], plan.num_classes))
    for index, width in enumerate(widths, 1):  # no filter is dead at the start
        last = 2 * min(index - 1, 1)
        model.get_parameter(f"layer{index}.{last}.bias").data = torch.full((width,), 0.5)
    return model


def train(
    plan: Plan, ordered: Ordered, patterns: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    r"""
    Train by interchange interventions.

    Activations leak at first, so that no filter stays silent for ever, and in the last third not.

    Args:

        plan (Plan): The task.
        ordered (Ordered): Its filters in their order.
        patterns (Tensor): Shape (F, 4, 4).
        generator (torch.Generator): Draws images and interventions; the weights at the start come
                    from the global random state.

    Returns:
        *dict*: The weights of the :func:`skeleton`.
    """
    circuit, depth = ordered.circuit, len(ordered.kinds)
    steps, widths = plan.steps * depth, [len(kinds) for kinds in ordered.kinds]
    model = skeleton(widths, plan, nn.LeakyReLU)
    leaky = [module for module in model.modules() if isinstance(module, nn.LeakyReLU)]
    # The head reads averages over mostly silent cells: its weights have the longest way to go.
    rates = [_RATE, _HEAD_RATE]
    groups = [{"params": list(part.parameters())} for part in (model[:depth], model[depth:])]
    optimizer = torch.optim.Adam(groups, lr=_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    for step in range(steps):
        for module in leaky:
            module.negative_slope = _LEAK * max(0.0, 1 - 1.5 * step / steps)
        labels = torch.randint(plan.num_classes, (2, _BATCH), generator=generator)
        base, place = draw_concepts(plan, labels[0], generator)
        source, _ = draw_concepts(plan, labels[1], generator, place)
        concepts = torch.cat([base, source])
        states = circuit.after(concepts, 0)
        tensor = paint(concepts, patterns, generator, _NOISE)
        maps = []
        for layer in model[:depth]:
            tensor = layer(tensor)
            maps.append(tensor)
        loss = _class_loss(model[depth:](tensor), states[-1])
        loss = loss + sum(_gate_loss(maps[i], states[i], ordered, i) for i in range(depth))
        loss = loss + _after_intervention(model, ordered, maps, states, step % depth, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def _after_intervention(
    model: nn.Sequential,
    ordered: Ordered,
    maps: list[Tensor],
    states: list[Tensor],
    place: int,
    generator: torch.Generator,
) -> Tensor:
    """Loss of what follows a layer in which some filters are another image's, or zero."""
    depth, number = len(ordered.kinds), _BATCH
    (here, there), (on, other) = maps[place].split(number), states[place].split(number)
    serving = ordered.circuit.reaching(place, depth).any(0)
    chosen, kept = choose(on.any(1), serving, generator)
    tensor = torch.where(chosen[..., None, None], there * kept[:, None, None, None], here)
    state = torch.where(chosen[:, None], other & kept[:, None, None], on)
    after = ordered.circuit.after(state, place + 1)
    loss = tensor.new_zeros(())
    for index in range(place + 1, depth):
        tensor = model[index](tensor)
        before = states[index][:number]
        loss = loss + _gate_loss(tensor, after[index - place - 1], ordered, index, before)
    return loss + _class_loss(model[depth:](tensor), after[-1])


def choose(on: Tensor, serving: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""
    Sets of filters in turn: random ones, single ones, all that are on and serve a class, and all that
    serve none with random others.

    Args:

        on (Tensor): Shape (N, K), the filters that are on in each image.
        serving (Tensor): Shape (K,), the filters that have a path to a class.
        generator (torch.Generator): Draws.

    Returns:
        *tuple* of the sets (N, K), bool, and (N,) whether others stand in for them, or zero.
    """
    number, width = on.shape
    share = torch.rand(number, 1, generator=generator)
    many = torch.rand(number, width, generator=generator) < share
    single = torch.zeros_like(many)
    # Half of them filters that are on: what is silent anyway is not missed.
    drawn = torch.rand(number, width, generator=generator) + on * (1 - 2 * share)
    single[torch.arange(number), drawn.argmax(1)] = True
    kinds = torch.stack([many, single, on & serving, many | ~serving])
    chosen = kinds[torch.arange(number) % 4, torch.arange(number)]
    return chosen, torch.rand(number, generator=generator) < 0.5


def _gate_loss(
    maps: Tensor, states: Tensor, ordered: Ordered, index: int, before: Tensor | None = None
) -> Tensor:
    """How far filters (N, K, H, W) are from their gates (N, cells, K), now and before a change."""
    named = ordered.circuit.layers[index].named
    gains = ordered.gains[index][:, None]
    matters = states if before is None else states | before
    weight = torch.where(matters, _ON_WEIGHT, 1.0).transpose(1, 2) / gains
    wrong = (maps.flatten(2) - states.transpose(1, 2) * gains).square() * weight
    return wrong[:, named].sum(1).mean()


def _class_loss(logits: Tensor, states: Tensor) -> Tensor:
    """Cross entropy with the classes that are on, alike; with all of them where none is."""
    on = states.any(1).float()
    wanted = torch.where(on.any(1, keepdim=True), on, torch.ones_like(on))
    wanted = wanted / wanted.sum(1, keepdim=True)
    return -_CLASS_WEIGHT * (wanted * log_softmax(logits, 1)).sum(1).mean()
