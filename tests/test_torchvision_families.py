"""Every method on a member of every torchvision classifier family, against explicit computation.

The layers are chosen by ``list_filter_layers``, not by their names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_classfilters import (
    FilterGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    identify_class_filters,
    list_filter_layers,
)
from captum_classfilters._core.layers import find_layer
from captum_classfilters.layers import FilterLayer, FilterLayers
from docs.generate_layer_table import (
    FAMILIES,
    NUM_CLASSES,
    chosen_layers,
    committed,
    generate,
    masked_model,
)
from tests.models import known, tensor_of

LABELS = torch.tensor([0, 1, 1, 5])

# How the last layer with maps feeds the head, and why the others do not.
FEEDS = {
    "AlexNet": None,  # two hidden linear layers
    "VGG": None,  # two hidden linear layers
    "ResNet": "mean",
    "ResNeXt": "mean",
    "DenseNet": None,  # a functional ReLU in between
    "Inception v3": "mean",
    "GoogLeNet": "mean",
    "SqueezeNet": "identical",  # a convolution for a head, then ReLU and pooling
    "MobileNet V2": "mean",
    "MobileNet V3": None,  # a hidden linear layer
    "ShuffleNet V2": "mean",
    "MNASNet": "mean",
    "EfficientNet": "mean",
    "EfficientNet V2": "mean",
    "RegNet": "mean",
    "ConvNeXt": None,  # layer normalization after pooling
    "ViT": None,  # the class token alone
    "Swin": "mean",
    "Swin V2": "mean",
    "MaxViT": None,  # layer normalization and a hidden linear layer
}
CHANNELS_LAST = {"ViT", "Swin", "Swin V2"}


@dataclass
class _Case:
    family: str
    model: nn.Module
    images: Tensor
    layers: FilterLayers
    inner: FilterLayer
    last: FilterLayer

    @property
    def rows(self) -> list[FilterLayer]:
        return [self.inner, self.last]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> _Case:
    member = FAMILIES[request.param]
    model, images = member.model(), member.images()
    layers = list_filter_layers(model, images)
    return _Case(request.param, model, images, layers, *chosen_layers(model, layers))


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[[Tensor], Any]) -> Iterator[None]:
    def call(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # of ViT's attention, without weights
            return (hook(output[0]), *output[1:])
        return hook(output)

    handle = layer.register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()


def _activation_times_gradient(case: _Case, row: FilterLayer) -> tuple[Tensor, Tensor]:
    """Mean activations and contributions (N, K) of each image's own logit, spelt out."""
    kept: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # in-place successors

    with _hooked(find_layer(case.model, row.name), keep):
        logits = case.model(case.images)
    gradient = torch.autograd.grad(logits[range(4), LABELS].sum(), kept[0])[0]
    axes = [axis for axis in range(1, kept[0].dim()) if axis != row.channel_dim]
    activation = kept[0].detach()
    return activation.mean(axes), (activation * gradient).sum(axes)


def _per_class(values: Tensor) -> Tensor:
    """Means over each class's images; classes without images are left out."""
    return torch.stack([values[label == LABELS].double().mean(0) for label in (0, 1, 5)])


def _close(left: Tensor, right: Tensor, tolerance: float = 1e-4) -> None:
    scale = float(right.abs().max())
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * scale)


def test_the_chosen_layers(case: _Case) -> None:
    assert case.inner.name != case.last.name
    assert case.last.feeds_head == FEEDS[case.family]
    assert "axis" not in case.inner.reason
    for row in case.rows:
        assert row.shape is not None
        assert row.shape[0] == 4
        on_last = row.channel_dim == len(row.shape) - 1
        assert on_last == (case.family in CHANNELS_LAST), row


def test_the_rows_that_do_not_qualify_say_why(case: _Case) -> None:
    reasons = ("never called", "called ", "puts out a ", "axis", "no channel dimension")
    for row in case.layers:
        assert row.qualifies or row.reason.startswith(reasons), row
    assert case.layers.head is not None
    assert find_layer(case.model, case.layers.head).get_parameter("weight").shape[0] == NUM_CLASSES


def test_identification_at_two_layers_by_two_methods_in_one_pass(case: _Case) -> None:
    kinds: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (LayerFilterFrequency, {"top_k": 3}),
        (LayerFilterContribution, {}),
    ]
    methods = [
        kind(case.model, row.name, channel_dim=row.channel_dim, **options)
        for row in case.rows
        for kind, options in kinds
    ]
    tables = identify_class_filters(
        methods,
        [(case.images, LABELS)],
        num_filters=3,
        num_classes=NUM_CLASSES,
        show_progress=False,
    )
    for row, votes, contributions in zip(case.rows, tables[::2], tables[1::2], strict=True):
        means, expected = _activation_times_gradient(case, row)
        order = means.sort(dim=1, descending=True, stable=True).indices[:, :3]
        by_hand = torch.zeros_like(means).scatter_(1, order, 1.0)
        assert votes.scores.shape == (NUM_CLASSES, row.num_filters)
        assert votes.counts.tolist() == [1, 2, 0, 0, 0, 1]
        torch.testing.assert_close(votes.scores[[0, 1, 5]], _per_class(by_hand))
        _close(contributions.scores[[0, 1, 5]], _per_class(expected), 1e-3)
        assert bool(contributions.scores[[0, 1, 5]].any(1).all())


def test_contributions_and_what_they_miss(case: _Case) -> None:
    for row in case.rows:
        method = LayerFilterContribution(case.model, row.name, channel_dim=row.channel_dim)
        attributions, delta = method.attribute(
            case.images, target=LABELS, return_convergence_delta=True
        )
        assert attributions.shape == row.shape
        scores = method.filter_scores(attributions)
        _close(scores, _activation_times_gradient(case, row)[1], 1e-3)
        with torch.no_grad():
            full = case.model(case.images)[range(4), LABELS]
            with _hooked(find_layer(case.model, row.name), torch.zeros_like):
                removed = case.model(case.images)[range(4), LABELS]
        missed = scores.sum(1) - (full - removed)
        torch.testing.assert_close(delta, missed, rtol=1e-3, atol=1e-4 * float(full.abs().max()))
        if row.feeds_head and not row.reason:
            bias = find_layer(case.model, known(case.layers.head)).get_parameter("bias")[LABELS]
            torch.testing.assert_close(scores.sum(1), full - bias, rtol=1e-3, atol=1e-4)


def test_contributions_are_exact_at_the_head_where_the_model_ends_in_it(case: _Case) -> None:
    head = find_layer(case.model, known(case.layers.head))
    _, delta = LayerFilterContribution(case.model, head).attribute(
        case.images, target=LABELS, return_convergence_delta=True, attribute_to_layer_input=True
    )
    if case.family == "SqueezeNet":  # ReLU and pooling come after its convolution
        assert "not exact" in case.last.reason
        assert float(delta.abs().max()) > 1e-3
    else:
        torch.testing.assert_close(delta, torch.zeros(4), rtol=0, atol=1e-4)


def test_gate_space(case: _Case) -> None:
    for row in case.rows:
        gate = FilterGate(case.model, row.name, row.num_filters, channel_dim=row.channel_dim)
        with torch.no_grad():
            logits = case.model(case.images)
            torch.testing.assert_close(gate(gate.ones(4), case.images), logits, rtol=0, atol=0)
            strongest = int(_activation_times_gradient_sums(case, row).argmax())
            gates = gate.ones(4)
            gates[:, strongest] = 0

            def ablate(
                output: Tensor, k: int = strongest, axis: int = known(row.channel_dim)
            ) -> Tensor:
                return output.index_fill(axis, torch.tensor([k]), 0)

            with _hooked(find_layer(case.model, row.name), ablate):
                expected = case.model(case.images)
            torch.testing.assert_close(gate(gates, case.images), expected, rtol=0, atol=0)
        assert not torch.equal(expected, logits)


def _activation_times_gradient_sums(case: _Case, row: FilterLayer) -> Tensor:
    with torch.enable_grad():
        return _activation_times_gradient(case, row)[1].abs().sum(0)


def test_decomposed_head_is_the_head_with_masked_weights(case: _Case) -> None:
    data = [(case.images, LABELS)]
    head = known(case.layers.head)
    sources: list[tuple[str, int | None, bool]] = [(head, None, True)]
    if case.last.feeds_head:
        sources.append((case.last.name, case.last.channel_dim, False))
    for layer, channel_dim, at_input in sources:
        table = LayerFilterContribution(case.model, layer, channel_dim=channel_dim).identify(
            data, attribute_to_layer_input=at_input, num_filters=4, show_progress=False
        )
        decomposed = decompose(case.model, table, missing="bias")
        mask = tensor_of(decomposed, f"{head}.mask")
        assert mask.sum(1).tolist() == [4, 4, 0, 0, 0, 4]
        torch.testing.assert_close(mask, table.selected)
        with torch.no_grad():
            expected = masked_model(case.model, head, table.selected)(case.images)
            _close(decomposed(case.images), expected)
            assert not torch.allclose(expected, case.model(case.images))


def test_only_a_layer_that_feeds_the_head_can_decompose_it(case: _Case) -> None:
    row = case.last
    table = LayerFilterFrequency(case.model, row.name, channel_dim=row.channel_dim).identify(
        [(case.images, LABELS)], num_classes=NUM_CLASSES, show_progress=False
    )
    if row.feeds_head:
        decomposed = decompose(case.model, table, missing="bias", example_inputs=case.images)
        mask = tensor_of(decomposed, f"{case.layers.head}.mask")
        assert torch.equal(mask, table.selected)
    else:
        with pytest.raises(ValueError, match="does not feed the head"):
            decompose(case.model, table, missing="bias", example_inputs=case.images)


def test_the_committed_table_names_every_family_and_is_what_comes_out() -> None:
    lines = committed()
    named = [line.split("|")[1].strip() for line in lines[2:]]
    assert named == list(FAMILIES) == list(FEEDS)
    three = ["MobileNet V2", "SqueezeNet", "ViT"]
    assert generate(three)[2:] == [lines[2 + named.index(family)] for family in three]
