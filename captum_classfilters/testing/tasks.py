"""The tasks that networks are trained for: circuits by axis of difficulty, and their images."""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from captum_classfilters.testing.circuits import Circuit, Gates, Groups

AXES = ("shared", "redundancy", "backup", "superposition", "shortcut", "depth")
LEVELS = {axis: (1,) if axis == "backup" else (1, 2) for axis in AXES}
CELL = 4  # side of a pattern, and stride of the first convolution
CELLS = 3  # cells along a side of an image
_OWN_CELLS = 2
_LOUD_CELLS = 3
_LOUD_GAIN, _ECHO_GAIN = 3.0, 2.0
_HIDDEN, _STEPS = (16, 48), (260, 600)  # with backups more is to be computed, and learned
_FREE = 2  # filters of every layer that stand for nothing


@dataclass(frozen=True)
class Plan:
    r"""
    What a network is to compute, before its filters are put in an order.

    Args:

        circuit (Circuit): Of layers and classes.
        kinds (tuple): For each layer, K strings.
        gains (tuple): For each layer, K numbers: what a filter is to answer where its gate is on.
        layer (int): The layer at which the axis acts.
        codes (tuple): For each class the concepts of its images.
        marks (tuple): The concepts of the mark that decides and of the one that does not, if any.
        mark_rate (float): Share of the class's images with its mark.
        loud (int): The concept that every image has.
        hidden (int): Width between two layers.
        steps (int): Steps of training for each layer.
    """

    circuit: Circuit
    kinds: tuple[tuple[str, ...], ...]
    gains: tuple[tuple[float, ...], ...]
    layer: int
    codes: tuple[tuple[int, ...], ...]
    marks: tuple[int, ...]
    mark_rate: float
    loud: int
    hidden: int
    steps: int

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.codes)

    @property
    def num_concepts(self) -> int:
        """F."""
        return self.circuit.layers[0].num_inputs

    def situations(self) -> list[Tensor]:
        """Every kind of image, as concepts (cells, F): each class, with marks and without."""
        found = []
        for class_, code in enumerate(self.codes):
            own = torch.zeros(3, self.num_concepts, dtype=torch.bool)
            own[0, list(code)] = True
            own[1, self.loud] = True
            possible = [mark for number, mark in enumerate(self.marks) if number or class_ == 0]
            for size in range(len(possible) + 1):
                for shown in combinations(possible, size):
                    marked = own.clone()
                    marked[2, list(shown)] = True
                    found.append(marked)
        return found


class _Draft:
    """A layer in the making."""

    def __init__(self) -> None:
        self.groups: list[Groups] = []
        self.unless: list[tuple[int, ...]] = []
        self.kinds: list[str] = []
        self.gains: list[float] = []

    def add(
        self, kind: str, groups: Groups, gain: float = 1.0, unless: tuple[int, ...] = ()
    ) -> int:
        """A filter; returns its index."""
        self.groups.append(groups)
        self.unless.append(unless)
        self.kinds.append(kind)
        self.gains.append(gain)
        return len(self.groups) - 1

    def gates(self, num_inputs: int) -> Gates:
        """Its gates."""
        return Gates(tuple(self.groups), num_inputs, tuple(self.unless))


def plan(axis: str, level: int) -> Plan:
    """The plan of an axis and level; both are checked already."""
    num_classes, codes, num_own = _codes(axis, level)
    marks = (num_own, num_own + 1) if axis == "shortcut" else ()
    loud = num_own + len(marks)
    depth = level + 3 if axis == "depth" else 3
    drafts: list[_Draft] = []
    # What of the layer before stands for each concept: concept -> groups that tell it.
    tells: dict[int, Groups] = {concept: ((concept,),) for concept in range(loud + 1)}
    echoes: dict[int, Groups] = {
        c: tuple((concept,) for concept in codes[c]) for c in range(num_classes)
    }
    for place in range(depth - 1):
        draft = _Draft()
        new = _own_filters(draft, axis, level, place, num_own, tells)
        for number, mark in enumerate(marks):
            new[mark] = ((draft.add(("mark", "idle mark")[number], tells[mark]),),)
        new[loud] = ((draft.add("loud", tells[loud], _LOUD_GAIN),),)
        if axis != "superposition":
            echoes = {c: ((draft.add("echo", by, _ECHO_GAIN),),) for c, by in echoes.items()}
            for _ in range(_FREE):
                draft.add("free", ())
        drafts.append(draft)
        tells = new
    drafts.append(_last(codes, tells, marks, loud, echoes if axis != "superposition" else {}))
    classes = Gates(tuple(((c,),) for c in range(num_classes)), len(drafts[-1].groups))
    widths = [loud + 1, *(len(draft.groups) for draft in drafts)]
    layers = [draft.gates(width) for draft, width in zip(drafts, widths, strict=False)]
    return Plan(
        circuit=Circuit((*layers, classes)),
        kinds=tuple(tuple(draft.kinds) for draft in drafts),
        gains=tuple(tuple(draft.gains) for draft in drafts),
        layer=0 if axis in ("depth", "backup") else 1,
        codes=codes,
        marks=marks,
        mark_rate=(0.6, 0.9)[level - 1],
        loud=loud,
        hidden=_HIDDEN[axis == "backup"],
        steps=_STEPS[axis == "backup"],
    )


def _own_filters(
    draft: _Draft, axis: str, level: int, place: int, num_own: int, tells: dict[int, Groups]
) -> dict[int, Groups]:
    """Add the filters that stand for the classes' concepts; returns what tells each of these."""
    if axis == "superposition" and place == 1:
        return _crowd(draft, num_own, level, tells)
    if axis == "backup":
        return _with_backups(draft, num_own, tells)
    copies = 1 + level if axis == "redundancy" and place == 1 else 1
    kind = "copy" if copies > 1 else "shared" if axis == "shared" else "own"
    return {
        concept: (tuple(draft.add(kind, tells[concept]) for _ in range(copies)),)
        for concept in range(num_own)
    }


def _with_backups(draft: _Draft, num_own: int, tells: dict[int, Groups]) -> dict[int, Groups]:
    """A filter for each concept, and one that the next layer hears where the first is silent."""
    new: dict[int, Groups] = {}
    for concept in range(num_own):
        heard = tells[concept][0]
        first, second = (heard[0], heard[-1])  # in the first layer both see the concept
        unless = (first,) if first != second else ()
        own = draft.add("own", ((first,),))
        new[concept] = ((own, draft.add("backup", ((second,),), unless=unless)),)
    return new


def _codes(axis: str, level: int) -> tuple[int, tuple[tuple[int, ...], ...], int]:
    """Number of classes, the concepts of each, and the number of these concepts."""
    if axis == "shared":
        pairs = tuple(combinations(range(4), 2))
        codes = ((0, 1), (1, 2), (2, 3), (0, 3)) if level == 1 else pairs
        return len(codes), codes, 4
    number = (6, 10)[level - 1] if axis == "superposition" else 4
    return number, tuple((c,) for c in range(number)), number


def _crowd(draft: _Draft, num_own: int, level: int, tells: dict[int, Groups]) -> dict[int, Groups]:
    """Fewer filters than concepts: each concept is on in two filters, each filter for several."""
    pairs = list(combinations(range(3 + level), 2))[:num_own]
    for filter_ in range(3 + level):
        members = tuple(i for c, pair in enumerate(pairs) if filter_ in pair for i in tells[c][0])
        draft.add("crowded", (members,))
    return {c: ((first,), (second,)) for c, (first, second) in enumerate(pairs)}


def _last(
    codes: tuple[tuple[int, ...], ...],
    tells: dict[int, Groups],
    marks: tuple[int, ...],
    loud: int,
    echoes: dict[int, Groups],
) -> _Draft:
    """The layer that feeds the head: a filter for each class."""
    draft = _Draft()
    for class_, code in enumerate(codes):
        groups = tuple(group for concept in code for group in tells[concept])
        if marks and class_ == 0:
            groups = ((*groups[0], *tells[marks[0]][0]),)
        draft.add("own", groups)
    for mark in marks[1:]:
        draft.add("idle mark", tells[mark])
    draft.add("loud", tells[loud], _LOUD_GAIN)
    for by in echoes.values():
        draft.add("echo", by, _ECHO_GAIN)
    for _ in range(_FREE):
        draft.add("free", ())
    return draft


def draw_concepts(
    plan: Plan, labels: Tensor, generator: torch.Generator, place: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    Which concepts are in which cells.

    Args:

        plan (Plan): The task.
        labels (Tensor): Shape (N,).
        generator (torch.Generator): Draws cells and marks.
        place (Tensor, optional): Shape (N, cells), an order of cells; drawn if None.

    Returns:
        *tuple* of concepts (N, cells, F), bool, and the order of the cells.
    """
    number, cells = len(labels), CELLS**2
    if place is None:
        place = torch.rand(number, cells, generator=generator).argsort(1)
    concepts = torch.zeros(number, cells, plan.num_concepts, dtype=torch.bool)
    rows = torch.arange(number)[:, None]
    code = torch.zeros(plan.num_classes, plan.num_concepts, dtype=torch.bool)
    for class_, members in enumerate(plan.codes):
        code[class_, list(members)] = True
    concepts[rows, place[:, :_OWN_CELLS]] = code[labels][:, None]
    start = _OWN_CELLS
    concepts[rows, place[:, start : start + _LOUD_CELLS], plan.loud] = True
    start += _LOUD_CELLS
    for class_, mark in enumerate(plan.marks):
        others = 0.0 if class_ == 0 else (1 - plan.mark_rate) / 2
        rate = torch.where(labels == class_, plan.mark_rate, others)
        has = torch.rand(number, generator=generator) < rate
        span = place[:, start : start + _OWN_CELLS]
        concepts[rows, span, mark] = has[:, None].expand(-1, _OWN_CELLS)
        start += _OWN_CELLS
    return concepts, place


def paint(concepts: Tensor, patterns: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """Images (N, 1, 12, 12) of concepts (N, cells, F): patterns in cells, in random strength."""
    strength = 0.75 + 0.5 * torch.rand(concepts.shape, generator=generator)
    faint = 0.25 * torch.rand(concepts.shape, generator=generator)
    faint = faint * (torch.rand(concepts.shape, generator=generator) < 0.1)
    cells = torch.where(concepts, strength, faint) @ patterns.flatten(1)
    side = CELL * CELLS
    images = cells.reshape(-1, CELLS, CELLS, CELL, CELL).permute(0, 1, 3, 2, 4)
    images = images.reshape(-1, 1, side, side)
    return images + noise * torch.randn(images.shape, generator=generator)


def draw_patterns(number: int, generator: torch.Generator) -> Tensor:
    """Patterns (F, 4, 4) of length 2, not quite at right angles."""
    directions = torch.randn(CELL**2, CELL**2, generator=generator)
    orthogonal = torch.linalg.qr(directions).Q[:number]
    mixed = orthogonal + 0.1 * torch.randn(number, CELL**2, generator=generator)
    return (2 * mixed / mixed.norm(dim=1, keepdim=True)).reshape(number, CELL, CELL)
