"""Six operations on one small member of every family of torchvision and timm, against hooks and autograd.

python -m benchmarks.zoo --results zoo.jsonl --page    # goes on where it stopped; writes docs/zoo.md

The layers are chosen by `list_filter_layers`: the one that feeds the head, or the head's input where none
does, and a block in the middle. Weights are random.

- list: every module with its runs and shape as hooks saw them; axes hold for images of another size; the
  way to the head is in the numbers; every layer can be identified as listed
- identify: votes and contributions, in one pass over two batches
- gate space: open gates, a closed gate, gradients of the gates
- ablation: the drop of each image's own score without a filter
- decompose: the head with masked weights
- prune: layers that `prunable_layers` lists give the masked network, the others are refused
"""

import copy
import gc
import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import captum_classfilters
from benchmarks.shared import Results, Table, count_processor_time, medians, parsed, parser, timed
from benchmarks.whole_models import (
    LABELS,
    NUM_CLASSES,
    NothingToCompareError,
    Place,
    calibrated,
    check_decomposed,
    check_gates,
    check_identification,
    check_pruned,
    images_of,
    part_of,
    per_class,
    votes_of,
)
from benchmarks.zoo_members import DETECTION, MEMBERS, Member
from captum_classfilters import (
    LayerFilterFrequency,
    identify_class_filters,
    list_filter_layers,
)
from captum_classfilters.layers import FilterLayer, FilterLayers
from captum_classfilters.pruning import prunable_layers

OPERATIONS = ("list", "identify", "gate space", "ablation", "decompose", "prune")
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
FEWEST = 4  # filters of a layer that is explained
OK = "ok"
WRONG, CRASH = "WRONG: ", "CRASH: "

# -- one member -------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model, its images, and the layers at which it is explained."""

    model: nn.Module
    images: Tensor
    larger: "Callable[[], tuple[nn.Module, Tensor]] | None" = None
    detector: bool = False
    layers: FilterLayers = field(default_factory=lambda: FilterLayers([], None))

    @property
    def places(self) -> list[Place]:
        """The layer that feeds the head, or the head's input, and one in the middle."""
        feeding, middle = self.feeding, self.middle
        last = [] if feeding is None else [feeding]
        return last + ([] if middle is None else [middle])

    @property
    def feeding(self) -> Place | None:
        """The last block that feeds the head; the head's own input where none does."""
        if self.detector:
            return self._in_backbone(4, 2)
        feeding = [row for row in self.layers.feeding_head if (row.num_filters or 0) >= FEWEST]
        rows = [row for row in feeding if _positions(row) > 1] or feeding
        if rows:
            return _place(rows[-1])
        return None if self.layers.head is None else Place(self.layers.head, 1, at_input=True)

    @property
    def middle(self) -> Place | None:
        """The middle one of the blocks with maps; of the other layers with maps if there is none."""
        if self.detector:
            return self._in_backbone(8, 4)
        with_maps = [row for row in self._with_maps if not row.feeds_head]
        weighted = [row for row in with_maps if any(True for _ in _part(self, row).parameters())]
        blocks = [row for row in weighted if any(True for _ in _part(self, row).children())]
        rows = blocks or weighted or with_maps
        return _place(rows[len(rows) // 2]) if rows else None

    def _in_backbone(self, first: int, last: int) -> Place:
        """A layer with few filters in a part of a detector's backbone: its last layers see parts of an
        image, and may see no box; and the whole model runs for each filter."""
        rows = [row for row in self._with_maps if row.name.startswith("backbone")]
        part = rows[len(rows) // first : len(rows) // last]
        return _place(min(part, key=lambda row: row.num_filters or 0))

    @property
    def _with_maps(self) -> list[FilterLayer]:
        rows = self.layers.qualifying
        return [row for row in rows if _positions(row) > 1 and (row.num_filters or 0) >= FEWEST]


def _part(case: Case, row: FilterLayer) -> nn.Module:
    return part_of(case.model, row.name)


def _positions(row: FilterLayer) -> int:
    assert row.shape is not None
    assert row.num_filters is not None
    return int(torch.Size(row.shape[1:]).numel()) // row.num_filters


def _place(row: FilterLayer) -> Place:
    assert row.channel_dim is not None
    return Place(row.name, row.channel_dim)


# -- list -------------------------------------------------------------------------------------------


@dataclass
class _Observed:
    """What hooks saw of one module: its runs, and of its single tensor the shape and some means."""

    runs: int = 0
    shape: tuple[int, ...] | None = None
    means: dict[int, Tensor] = field(default_factory=dict)
    flat: Tensor | None = None


def _observe(model: nn.Module, images: Tensor) -> dict[str, _Observed]:
    """Each module's runs, and the shape and means over all axes but one of what it puts out."""
    inner = part_of(model, "")
    seen = {name: _Observed() for name, _ in inner.named_modules() if name}
    handles = []
    for name, module in inner.named_modules():
        if not name:
            continue

        def see(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            seen[name].runs += 1
            tensor = _single(output)
            if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
                return
            seen[name].shape = tuple(tensor.shape)
            for axis in range(1, tensor.dim()):
                others = [other for other in range(1, tensor.dim()) if other != axis]
                seen[name].means[axis] = tensor.mean(others) if others else tensor.clone()
            seen[name].flat = tensor.flatten(1).clone() if tensor[0].numel() < 5e4 else None

        handles.append(module.register_forward_hook(see))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def _single(output: Any) -> Tensor | None:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()] or tensors
    return floating[0] if len(floating) == 1 else None


def check_list(case: Case) -> None:
    """The table of layers is what hooks see, and each row can be used as it says."""
    layers = case.layers = list_filter_layers(case.model, case.images)
    seen = _observe(case.model, case.images)
    assert {row.name for row in layers} == set(seen), "other names"
    for row in layers:
        assert row.runs == seen[row.name].runs, f"runs of {row.name}"
        if row.qualifies:
            assert row.shape == seen[row.name].shape, f"shape of {row.name}"
            assert row.num_filters == seen[row.name].means[row.channel_dim or 1].shape[1]
    _check_declared_axes(case)
    _check_axes(case)
    _check_feeds(case, seen)
    _check_usable(case, seen)


def _check_declared_axes(case: Case) -> None:
    for row in case.layers.qualifying:
        module, last = _part(case, row), len(row.shape or ()) - 1
        if isinstance(module, nn.modules.conv._ConvNd):
            assert row.channel_dim == 1, f"axis of {row.name}"
            assert row.num_filters == module.out_channels
        elif isinstance(module, nn.Linear):
            assert row.channel_dim == last, f"axis of {row.name}"
            assert row.num_filters == module.out_features


def _check_axes(case: Case) -> None:
    """The filters' axis keeps its size, whatever the size of the images."""
    if case.larger is None:
        return
    model, images = case.larger()
    other = _observe(model, images)
    widths, others = _widths(case.model), _widths(model)
    resized = {name.rpartition(".")[0] for name in widths if widths[name] != others[name]}
    for row in case.layers.qualifying:
        after = other[row.name].shape
        if row.shape is None or after is None or len(row.shape) != len(after):
            continue
        # Rows of positions or windows are those of the images where each has one of them.
        fixed = after[0] == row.shape[0] != len(images) and after[1:] != row.shape[1:]
        assert len(after) == 2 or not fixed, f"axis 0 of {row.name} is not the batch: {after}"
        if row.name in widths or {row.name, row.name.rpartition(".")[0]} & resized:
            continue  # a mixer's filters of tokens, which are another number
        axis = row.channel_dim or 0
        assert row.shape[axis] == after[axis], f"axis of {row.name}: {row.shape}, {after}"


def _widths(model: nn.Module) -> dict[str, int]:
    """The number of filters of each convolution and linear layer."""
    return {
        name: len(module.weight)
        for name, module in part_of(model, "").named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    }


def _check_feeds(case: Case, seen: dict[str, _Observed]) -> None:
    """How layers feed the head is in the numbers."""
    if case.layers.head is None:
        return
    features: list[Tensor] = []

    def see(_module: nn.Module, inputs: Any) -> None:
        features.append(inputs[0].detach().flatten(1))

    handle = part_of(case.model, case.layers.head).register_forward_pre_hook(see)
    with torch.no_grad():
        case.model(case.images)
    handle.remove()
    for row in case.layers.qualifying:
        assert row.channel_dim is not None
        means, flat = seen[row.name].means[row.channel_dim], seen[row.name].flat
        expected = means if row.feeds_head == "mean" else flat
        if row.feeds_head and expected is not None:
            assert _alike(expected, features[0]), f"{row.name} does not feed the head"
        elif not row.feeds_head and "logits" not in row.reason and _positions(row) > 1:
            assert not _alike(means, features[0]), f"{row.name} feeds the head as its mean"


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(
        left, right, rtol=1e-4, atol=1e-4 * float(right.abs().max())
    )


def _check_usable(case: Case, seen: dict[str, _Observed]) -> None:
    """Votes at every layer that asks for no axis, in one pass; refusals or warnings at others."""
    labels = LABELS[: len(case.images)]
    plain = [row for row in case.layers.qualifying if "needs channel_dim" not in row.reason]
    methods = {row.name: LayerFilterFrequency(case.model, row.name, top_k=1) for row in plain}
    tables = identify_class_filters(
        methods, [(case.images, labels)], num_classes=NUM_CLASSES, show_progress=False
    )
    for row in plain:
        assert row.channel_dim is not None
        means = seen[row.name].means[row.channel_dim]
        votes, undecided = votes_of(means, 1)
        slack = per_class(undecided.float()) + 1e-6
        table = tables[row.name].scores[labels.unique()]
        assert table.shape[1] == row.num_filters, f"{row.name} has other filters"
        assert bool(((table - per_class(votes)).abs() <= slack).all()), f"votes at {row.name}"
    asking = [row for row in case.layers.qualifying if "needs channel_dim" in row.reason]
    for row in asking[:: max(1, len(asking) // 3)]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                LayerFilterFrequency(case.model, row.name).identify(
                    [(case.images, labels)], num_classes=NUM_CLASSES, show_progress=False
                )
            except ValueError:
                continue
        told = any("channel_dim" in str(warning.message) for warning in said)
        assert told, f"{row.name} is explained by another axis without a word"


# -- the other operations ---------------------------------------------------------------------------


class DoesNotApplyError(Exception):
    """An operation has nothing to work on in this model."""


def _at_each_place(
    check: Callable[[nn.Module, Tensor, Place], None], gradients: bool = False
) -> Callable[[Case], None]:
    """A check at both layers; of gradients in double precision, as rounding may turn a ReLU."""

    def run(case: Case) -> None:
        if not case.places:
            raise DoesNotApplyError("no layer with maps qualifies")
        model, images = case.model, case.images
        if gradients:
            model, images = copy.deepcopy(model).double(), images.double()
        for place in case.places:
            check(model, images, place)

    return run


def _identify(model: nn.Module, images: Tensor, place: Place) -> None:
    check_identification(model, images, place, ("frequency", "contribution"), most_dropped=1)


def _gate(model: nn.Module, images: Tensor, place: Place) -> None:
    if not place.at_input:  # gates are those of outputs
        check_gates(model, images, place)


def _ablate(model: nn.Module, images: Tensor, place: Place) -> None:
    check_identification(model, images[:2], place, ("ablation",), most_dropped=6)


def check_decompose(case: Case) -> None:
    """The head at its input and, where a layer feeds it, by that layer."""
    if case.layers.head is None:
        raise DoesNotApplyError("no linear layer ran last")
    head = Place(case.layers.head, 1, at_input=True)
    check_decomposed(case.model, case.images, case.layers.head, head, exact=None)
    feeding = case.feeding
    if feeding is not None and not feeding.at_input and not case.detector:
        check_decomposed(case.model, case.images, case.layers.head, feeding, exact=None)


def check_prune(case: Case) -> None:
    """Three layers of those that can be pruned, and two of the others."""
    layers = prunable_layers(case.model, case.images, show_progress=False)
    rows = layers.prunable
    for row in list(dict.fromkeys(rows[place] for place in (0, len(rows) // 2, -1) if rows)):
        gone = sorted({0, row.num_filters // 2})[: row.num_filters - 1]
        place = _masked_at(case, row.name)
        check_pruned(case.model, case.images, row.name, place, None, gone)
    others = [row for row in layers if not row.prunable and row.num_filters > 1]
    for row in others[:: max(1, len(others) // 2)][:2]:
        some = re.search(r" filters \((\d+)", row.reason)
        gone = [int(some[1]) if some else 0]
        check_pruned(case.model, case.images, row.name, Place(row.name, 1), "", gone)
    if not rows:
        reasons = Counter(shortened(row.reason) for row in others)
        raise DoesNotApplyError(reasons.most_common(1)[0][0] if reasons else "no weighted layers")


_CHANGES_EACH = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def _masked_at(case: Case, layer: str) -> Place:
    """A weighted layer, or the last of the normalizations and activations that follow it and run
    once."""
    inner = part_of(case.model, "")
    names = {module: name for name, module in inner.named_modules()}
    runs = {row.name: row.runs for row in case.layers}
    seen: list[tuple[nn.Module, Any, Any]] = []  # in the order in which they ran

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((module, inputs[0] if inputs else None, output))

    handles = [module.register_forward_hook(note) for module in names]
    with torch.no_grad():
        case.model(case.images)
    for handle in handles:
        handle.remove()
    point = inner.get_submodule(layer)
    tensor = next(output for module, _, output in seen if module is point)
    while (follower := _only_reader(seen, tensor)) is not None:
        module, tensor = follower
        point = module if runs[names[module]] == 1 else point
    last = isinstance(inner.get_submodule(layer), nn.Linear)
    return Place(names[point], tensor.dim() - 1 if last else 1)


def _only_reader(
    seen: Sequence[tuple[nn.Module, Any, Any]], tensor: Tensor
) -> tuple[nn.Module, Tensor] | None:
    """The module that alone reads a tensor, with what it makes of it, if that keeps its filters."""
    readers = [(module, output) for module, given, output in seen if given is tensor]
    inner = [
        (module, output)
        for module, output in readers
        if not any(other is not module and other in set(module.modules()) for other, _ in readers)
    ]
    if len(inner) != 1:
        return None
    module, output = inner[0]
    same = isinstance(output, Tensor) and output.shape == tensor.shape
    return (module, output) if same and output is not tensor and _changes_each(module) else None


def _changes_each(module: nn.Module) -> bool:
    """Whether a module is a normalization by filter or a function of single elements."""
    if isinstance(module, _CHANGES_EACH):
        return True
    home = type(module).__module__
    plain = isinstance(module, (nn.Identity, nn.Dropout, nn.modules.dropout._DropoutNd))
    return plain or home == "torch.nn.modules.activation" or home.endswith("layers.activations")


CHECKS: dict[str, Callable[[Case], None]] = {
    "list": check_list,
    "identify": _at_each_place(_identify, gradients=True),
    "gate space": _at_each_place(_gate, gradients=True),
    "ablation": _at_each_place(_ablate),
    "decompose": check_decompose,
    "prune": check_prune,
}

# -- what comes out ---------------------------------------------------------------------------------


def outcome(check: Callable[[Case], None], case: Case) -> str:
    """``ok``, why an operation does not apply, or what is wrong."""
    try:
        check(case)
    except (DoesNotApplyError, NothingToCompareError) as reason:
        return str(reason)
    except Exception as error:
        return _told(error)
    return OK


def _told(error: Exception) -> str:
    """A refusal of this package, a number that is wrong, or a crash."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    package = str(Path(captum_classfilters.__file__).parent)
    text = f"{type(error).__name__}: {error}".splitlines()
    if isinstance(error, AssertionError) and not frame.filename.startswith(package):
        return WRONG + " ".join(text[:4])
    meant = isinstance(error, (ValueError, NotImplementedError))
    if meant and frame.filename.startswith(package) and (frame.line or "").startswith("raise"):
        return shortened(str(error))
    return f"{CRASH}{text[0]} ({Path(frame.filename).name}:{frame.lineno})"


def shortened(reason: str) -> str:
    """A refusal's first sentence without the names that it names."""
    first = re.split(r"(?<=[a-z\d)'])\. |; on the way", reason.replace("\n", " "))[0]
    first = re.sub(r"'[^']*'(, '[^']*')*( and \d+ more)?", "…", first)
    return re.sub(r"\d+", "n", first).removesuffix(".")[:200]


def run(member: Member) -> dict[str, Any]:
    """All operations on one member: the cells of its row, and times in seconds."""
    random.seed(0)
    torch.manual_seed(0)
    images = images_of(*member.size, number=member.number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = calibrated(member.build(), images, member.kind != DETECTION)
        case = Case(model, images, _larger(member, model, images), member.kind == DETECTION)
        cells, seconds = {}, {}
        for name, check in CHECKS.items():
            seconds[name], cells[name] = timed(partial(outcome, check, case))
        costs = passes(model, images)
    gc.collect()
    return {
        "member": member.name,
        "kind": member.kind,
        "cells": cells,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        **costs,
        "places": [str(place) for place in case.places],
    }


def passes(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Seconds of a forward pass and of the list of layers that can be pruned, once both are warm."""
    forward = medians({"": partial(_forward, model, images)}, 5)[""]
    listing = medians({"": partial(prunable_layers, model, images, show_progress=False)}, 2)[""]
    return {"forward": round(forward, 4), "prunable": round(listing, 4)}


def passes_again(member: Member) -> dict[str, float]:
    """The same of a member alone."""
    torch.manual_seed(0)
    images = images_of(*member.size, number=member.number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return passes(calibrated(member.build(), images, member.kind != DETECTION), images)


def _forward(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def _larger(
    member: Member, model: nn.Module, images: Tensor
) -> Callable[[], tuple[nn.Module, Tensor]] | None:
    """The model, or one built for it, with images of another size, if there is one."""
    *rest, height, width = member.size if len(member.size) > 1 else member.size * 2
    for size in ((height * 3 // 2, width * 3 // 2), (height * 2, width * 2)):
        larger = images_of(*rest, *size, number=3)  # rows of 4 windows are not 4 images
        try:
            _forward(model, larger)
        except Exception:  # whatever a model raises, it does not take this size
            continue
        return partial(_both, model, larger)
    try:
        other = member.build(img_size=2 * height).eval()
        _forward(other, larger)
    except Exception:
        return None
    return partial(_both, other, larger)


def _both(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    return model, images


# -- all of them ------------------------------------------------------------------------------------


def _rows(results: Sequence[dict[str, Any]], notes: list[str]) -> Iterator[list[str]]:
    """A row of cells for each member; reasons become numbers of notes."""
    for result in results:
        cells = []
        for name in OPERATIONS:
            cell = result["cells"][name]
            if cell != OK and cell not in notes:
                notes.append(cell)
            cells.append(cell if cell == OK else f"[{notes.index(cell) + 1}]")
        total = sum(result["seconds"].values())
        number = _passes(result)
        shown = "" if number is None else f"{number:.0f}"
        yield [f"`{result['member']}`", *cells, f"{total:.1f}", shown]


def _passes(result: dict[str, Any]) -> float | None:
    """What the list of layers that can be pruned takes, in forward passes, if that was measured."""
    return result["prunable"] / result["forward"] if "prunable" in result else None


TITLES = ("member", *OPERATIONS, "seconds", "passes")


def summary(results: Sequence[dict[str, Any]]) -> list[str]:
    """How many operations gave what the truth is, do not apply, are wrong, or crashed."""
    cells = [cell for result in results for cell in result["cells"].values()]
    wrong = sum(cell.startswith(WRONG) for cell in cells)
    crashed = sum(cell.startswith(CRASH) for cell in cells)
    right = cells.count(OK)
    numbers = sorted(number for result in results if (number := _passes(result)) is not None)
    quick = sum(number <= 10 for number in numbers)
    median = f" (median {numbers[len(numbers) // 2]:.0f})" if numbers else ""
    return [
        f"{len(results)} members, {len(cells)} operations: {right} equal the truth, "
        f"{len(cells) - right - wrong - crashed} do not apply and say why, {wrong} are silently wrong, "
        f"{crashed} crash.",
        f"`prunable_layers` takes at most 10 forward passes for {quick} of {len(numbers)} "
        f"members{median}.",
    ]


def page(results: Sequence[dict[str, Any]]) -> str:
    """The results as a page of the documentation."""
    notes: list[str] = []
    text = ["# Zoo", "", *INTRODUCTION.splitlines(), ""]
    text += [line + "\n" for line in summary(results)]
    run = {result["member"] for result in results}
    absent = [f"`{member.name}`" for member in MEMBERS if member.name not in run]
    if absent:
        text += [f"Not run yet: {', '.join(absent)}.", ""]
    for kind in dict.fromkeys(result["kind"] for result in results):
        text += [f"## {kind}", "", "| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
        of_kind = [result for result in results if result["kind"] == kind]
        text += ["| " + " | ".join(row) + " |" for row in _rows(of_kind, notes)]
        text.append("")
    text += ["## Why an operation does not apply", ""]
    text += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(text) + "\n"


INTRODUCTION = """\
Written by `python -m benchmarks.zoo --page`: a small member of each family of torchvision and timm, with
random weights and on one thread, and six operations on each, at the layer that feeds the head (the
head's input where none does) and at a block in the middle. Each is compared with plain hooks and
autograd:

- **list**: every module with the runs and shape that hooks see; the axis of the filters keeps its size
  with images of another size; how layers feed the head is in the numbers; votes at every layer are those
  of the listed axis
- **identify**: votes and contributions of two batches, per class
- **gate space**: open gates leave the output bit for bit, a closed one removes its filter, their
  gradients are the contributions
- **ablation**: what each class loses without a filter
- **decompose**: the head with masked weights
- **prune**: three layers that `prunable_layers` lists give the masked network's logits, two others are
  refused

Numbers are notes [below](#why-an-operation-does-not-apply). *Seconds* are those of all six with their
truths, many of them on a busy machine; *passes* is the processor time of `prunable_layers` in forward
passes of the same images. It runs the model four times or a few more; the rest is Python, which weighs
most where a forward pass takes a few milliseconds."""


def main(given: Sequence[str] | None = None) -> None:
    """Run the members whose results are not there yet, and print all."""
    options = parser(__doc__)
    options.add_argument("--results", type=Path, help="file to go on with; a line for each member")
    options.add_argument("--members", nargs="+", help="only these, in this order")
    options.add_argument("--passes", action="store_true", help="measure missing passes")
    options.add_argument("--page", action="store_true", help="write docs/zoo.md")
    arguments = parsed(options, given, members=["small VisionTransformer", "deepseek_vit_412m"])
    torch.set_num_threads(1)
    known = Results(arguments.results)
    results: list[dict[str, Any]] = []
    notes: list[str] = []
    table = Table(*TITLES)
    members = {member.name: member for member in MEMBERS}
    for name in arguments.members or members:
        member = members[name]
        measured: dict[str, Any] = known.get(member.name) or run(member)
        if arguments.passes and "prunable" not in measured:
            measured = {**measured, **passes_again(member)}
        if measured is not known.get(member.name):
            known.keep(member.name, measured)
        results.append(measured)
        table.row(*next(_rows(results[-1:], notes)))
    print()
    for number, note in enumerate(notes, 1):
        print(f"[{number}] {note}")
    print(*summary(results), sep="\n")
    if arguments.page:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    count_processor_time()
    main()
