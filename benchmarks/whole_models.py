"""Whole models of other libraries: small, calibrated, and what plain hooks and autograd say of them."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import InputXGradient
from torch import Tensor, nn

from captum_classfilters import (
    ClassScores,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    identify_class_filters,
    list_filter_layers,
)
from captum_classfilters.attr import LayerFilterAttribution
from captum_classfilters.layers import FilterLayers
from captum_classfilters.pruning import prune_filters

NUM_CLASSES = 3
LABELS = torch.tensor([0, 1, 2, 1, 0, 1])  # no two classes alike


def images_of(*size: int, number: int = 6) -> Tensor:
    """Images (6, 3, size, size), or (6, 3, ...) of several sizes; fewer have their first labels."""
    size = size * 2 if len(size) == 1 else size
    return torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(1))


def batches(images: Tensor) -> list[dict[str, Tensor]]:
    """The images and their labels as two batches, as Hugging Face's collators make them."""
    number = len(images)
    cut = max(number - 2, 2)
    return [
        {"pixel_values": images[part], "labels": LABELS[:number][part]}
        for part in (slice(cut), slice(cut, None))
    ]


def part_of(model: nn.Module, name: str) -> nn.Module:
    """A module by its name in the model, also inside `ClassScores`."""
    inner = model.wrapped_model if isinstance(model, ClassScores) else model
    return inner.get_submodule(name)


def scores_of(output: Any) -> Tensor:
    """The logits in what a model returned."""
    return output if isinstance(output, Tensor) else output.logits


def calibrated(model: nn.Module, images: Tensor, weights: bool = True) -> nn.Module:
    """A fresh model in evaluation mode as a trained one would be: running statistics of the images,
    no bias at zero and, unless weights stay, no weight at zero and no layer that the next one hardly
    sees."""
    torch.manual_seed(0)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, 0.1, 0.5)
        elif not weights:
            continue
        elif parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.uniform_(parameter, 0.6, 1.4)
    with torch.no_grad():
        model(images)
    return model.eval()


@dataclass(frozen=True)
class Place:
    """A layer's output or input, and the axis of its filters."""

    layer: str
    axis: int
    at_input: bool = False


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


def _with(value: Any, tensor: Tensor) -> Any:
    if isinstance(value, tuple):
        return (tensor, *value[1:])
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        changed[next(iter(value))] = tensor
        return changed
    return tensor


@contextmanager
def instead(model: nn.Module, place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put what a function makes of a layer's tensor in its place."""
    module = part_of(model, place.layer)

    def before(_module: nn.Module, inputs: Any, named: Any) -> Any:
        if inputs:
            return _with(inputs, change(_first(inputs))), named
        return inputs, _with(named, change(_first(named)))

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return _with(output, change(_first(output)))

    if place.at_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def own_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Each image's logit of its own class."""
    return scores_of(model(images))[range(len(images)), LABELS[: len(images)]]


def without(model: nn.Module, images: Tensor, place: Place, filters: list[int]) -> Tensor:
    """Logits with some filters of a layer zero."""

    def zero(tensor: Tensor) -> Tensor:
        return tensor.index_fill(place.axis, torch.tensor(filters), 0)

    with torch.no_grad(), instead(model, place, zero):
        return scores_of(model(images))


@dataclass
class Truth:
    """Means, contributions and drops of each image's own logit, (N, K); drops of some filters."""

    means: Tensor
    contributions: Tensor
    drops: Tensor
    dropped: list[int]


def truth(model: nn.Module, images: Tensor, place: Place, most_dropped: int = 24) -> Truth:
    """What hooks and autograd say of a layer, at most so many filters of it taken away."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[0].clone()

    with instead(model, place, leaf):
        full = own_logits(model, images)
    (gradient,) = torch.autograd.grad(full.sum(), leaves)
    tensor = leaves[0].detach()
    others = [axis for axis in range(1, tensor.dim()) if axis != place.axis]
    total = (tensor * gradient).sum(others) if others else tensor * gradient
    means = tensor.mean(others) if others else tensor
    full = full.detach()
    width = tensor.shape[place.axis]
    some = list(range(0, width, -(-width // most_dropped)))
    own = range(len(images)), LABELS[: len(images)]
    lost = [full - without(model, images, place, [k])[own] for k in some]
    return Truth(means, total, torch.stack(lost, 1), some)


def votes_of(means: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Each image's votes (N, K) for its largest means, and those that rounding may turn."""
    order = means.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    votes = torch.zeros_like(means).scatter_(1, order, 1.0) * (means != 0)
    ranked = means.sort(dim=1, descending=True).values
    edge = ranked[:, top_k - 1 : top_k], ranked[:, top_k : top_k + 1]
    near = 1e-5 * means.abs().amax(1, keepdim=True)
    undecided = edge[0] - edge[1] < near if edge[1].numel() else torch.zeros(len(means), 1) > 0
    return votes, undecided & ((means - edge[0]).abs() < 2 * near)


def per_class(values: Tensor) -> Tensor:
    """Means over the images of each class that has some (C, K)."""
    labels = LABELS[: len(values)]
    return torch.stack([values[label == labels].double().mean(0) for label in labels.unique()])


class NothingToCompareError(AssertionError):
    """The truth itself is zero but for rounding."""


def close(left: Tensor, right: Tensor, tolerance: float = 1e-3) -> None:
    """Equal up to rounding, on the scale of the largest number."""
    scale = float(right.abs().max())
    if scale <= 1e-4:
        raise NothingToCompareError("the layer says nothing: the truth itself is zero")
    torch.testing.assert_close(left.double(), right.double(), rtol=0, atol=tolerance * scale)


METHODS: dict[str, tuple[Callable[..., LayerFilterAttribution], dict[str, int]]] = {
    "frequency": (LayerFilterFrequency, {"top_k": 3}),
    "contribution": (LayerFilterContribution, {}),
    "ablation": (LayerFilterAblation, {}),
}


def check_identification(
    model: nn.Module,
    images: Tensor,
    place: Place,
    names: Sequence[str] = tuple(METHODS),
    most_dropped: int = 24,
) -> None:
    """Methods in one pass over dict batches."""
    methods = {}
    for name in names:
        kind, options = METHODS[name]
        methods[name] = kind(model, place.layer, channel_dim=place.axis, **options)
    tables = identify_class_filters(
        methods,
        batches(images),
        num_filters=2,
        num_classes=NUM_CLASSES,
        attribute_to_layer_input=place.at_input,
        show_progress=False,
    )
    known = truth(model, images, place, most_dropped)
    shown = LABELS[: len(images)].unique()
    for name, table in tables.items():
        scores = table.scores[shown]
        assert table.counts.tolist() == torch.bincount(LABELS[: len(images)], minlength=3).tolist()
        if name == "frequency":
            votes, undecided = votes_of(known.means, 3)
            slack = per_class(undecided.float())
            assert bool(((scores - per_class(votes)).abs() <= slack + 1e-6).all()), name
        elif name == "contribution":
            close(scores, per_class(known.contributions))
        else:
            close(scores[:, known.dropped], per_class(known.drops))


def check_gates(model: nn.Module, images: Tensor, place: Place) -> None:
    """Gates of one change nothing, a gate of zero removes its filter, and Captum's gradient times
    input of open gates is the contribution."""
    gate = FilterGate(model, place.layer, channel_dim=place.axis)
    with torch.no_grad():
        logits = scores_of(model(images))
        gate(
            torch.ones(1, _width(model, images, place)), images
        )  # tells how many filters there are
        ones = gate.ones(len(images))
        assert torch.equal(scores_of(gate(ones, images)), logits)
        ones[:, 1] = 0
        close(scores_of(gate(ones, images)), without(model, images, place, [1]), 1e-5)
    scores = InputXGradient(ClassScores(gate, scores_of)).attribute(
        gate.ones(len(images)).requires_grad_(),
        target=LABELS[: len(images)],
        additional_forward_args=images,
    )
    close(scores, truth(model, images, place, 1).contributions)


def _width(model: nn.Module, images: Tensor, place: Place) -> int:
    widths: list[int] = []

    def see(tensor: Tensor) -> Tensor:
        widths.append(tensor.shape[place.axis])
        return tensor

    with torch.no_grad(), instead(model, place, see):
        model(images)
    return widths[0]


def check_decomposed(
    model: nn.Module, images: Tensor, head: str, place: Place, exact: bool | None = True
) -> None:
    """The decomposed head gives the logits of masked weights."""
    table = LayerFilterContribution(model, place.layer, channel_dim=place.axis).identify(
        batches(images),
        num_classes=NUM_CLASSES,
        num_filters=3,
        attribute_to_layer_input=place.at_input,
        show_progress=False,
    )
    assert exact is None or table.provenance["exact"] is exact
    decomposed = decompose(model, table, missing="bias")
    masked = copy.deepcopy(model)
    weight = part_of(masked, head).weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.mul_(table.selected.reshape(weight.shape))
        expected = scores_of(masked(images))
        close(scores_of(decomposed(images)), expected, 1e-5)
        assert not torch.allclose(expected, scores_of(model(images)))


def check_pruned(
    model: nn.Module,
    images: Tensor,
    layer: str,
    masked_at: Place,
    refused: str | None,
    gone: Sequence[int] = (0, 2),
) -> None:
    """A pruned layer gives the logits of masked filters, or a refusal that says why."""
    gone = list(gone)
    if refused is not None:
        said = None
        try:
            prune_filters(model, layer, images, remove=gone, channel_dim=masked_at.axis)
        except ValueError as error:
            said = str(error)
        assert said is not None, f"{layer} is pruned"
        assert re.search(refused, said), said
        return
    pruned = prune_filters(model, layer, images, remove=gone, channel_dim=masked_at.axis)
    with torch.no_grad():
        close(scores_of(pruned(images)), without(model, images, masked_at, gone), 1e-4)
    numbers = [sum(p.numel() for p in one.parameters()) for one in (pruned, model)]
    assert numbers[0] < numbers[1]


def listed(model: nn.Module, images: Tensor, head: str) -> FilterLayers:
    """The list of layers, with what holds of every list."""
    layers = list_filter_layers(model, images)
    assert layers.head == head
    assert layers[head].reason == "puts out the logits"
    assert layers.qualifying
    reasons = (
        "never called",
        "called ",
        "puts out a ",
        "axis 0",
        "filters on axis 1 or",
        "no channel",
    )
    for row in layers:
        assert row.qualifies or row.reason.startswith(reasons), row
        assert "not exact" not in row.reason
    return layers
