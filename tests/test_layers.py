"""Which layers qualify, which axis holds their filters, and what is said of the others."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from captum.attr import (
    LayerActivation,
    LayerAttribution,
    LayerConductance,
    LayerFeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_classfilters import (
    ClassScores,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
    list_filter_layers,
)
from captum_classfilters._core.layers import (
    UnknownAxisError,
    filter_axis,
    find_layer,
    layer_tensors,
    named_layers,
    only_tensor,
)
from captum_classfilters.identify import collect_features, contrast_classes
from captum_classfilters.metrics import (
    cascading_randomization,
    compare_attributions,
    compare_methods,
    filter_max_sensitivity,
    quantus_explanation,
)
from captum_classfilters.metrics.filter_sensitivity import filter_scores_of
from captum_classfilters.pruning import masked_filters
from tests.models import deep


class _Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order)


class _FastNorm(nn.LayerNorm):
    """A forward of its own over the last axis, as timm's."""

    def forward(self, tensor: Tensor) -> Tensor:
        return torch.layer_norm(tensor, self.normalized_shape, self.weight, self.bias, self.eps)


class _EitherNorm(_FastNorm):
    """Takes channels first and last, whichever fits."""

    def forward(self, tensor: Tensor) -> Tensor:
        if tensor.shape[-1] == len(self.weight):
            return super().forward(tensor)
        return super().forward(tensor.movedim(1, -1)).movedim(-1, 1)


class _ChannelsFirstNorm(nn.LayerNorm):
    """Normalizes axis 1 of (N, K, H, W), as ConvNeXt's does."""

    def forward(self, tensor: Tensor) -> Tensor:
        return super().forward(tensor.movedim(1, -1)).movedim(-1, 1)


class _Branches(nn.Module):
    """Two branches, concatenated; the last is as narrow as a map may by chance be."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, first, 1)
        self.second = nn.Conv2d(3, second, 1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.first(images), self.second(images)], 1)


class _Tokens(nn.Module):
    """A patch embedding: a convolution whose maps become tokens (N, L, K)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, 2, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images).flatten(2).transpose(1, 2)


class _Windows(nn.Module):
    """Cuts (N, K, H, W) in windows of two by two: (N windows, 4, K)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        windows = images.unfold(2, 2, 2).unfold(3, 2, 2)
        tokens = self.norm(windows.permute(0, 2, 3, 4, 5, 1).flatten(0, 2).flatten(1, 2))
        return tokens.reshape(len(images), -1, tokens.shape[-1]).transpose(1, 2)


class _Merging(nn.Module):
    """Registers its widths in another order than it uses them, as Swin's patch merging."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, tensor: Tensor) -> Tensor:
        return self.reduction(self.norm(torch.cat([tensor] * 4, -1)))


def _axis(layer: nn.Module, tensor: Tensor) -> int:
    return filter_axis(layer, layer(tensor))


def _convnext_block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        _Permute(0, 2, 3, 1),
        nn.LayerNorm(width),
        nn.Linear(width, 2 * width),
        nn.GELU(),
        nn.Linear(2 * width, width),
        _Permute(0, 3, 1, 2),
    )


# -- the axis --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (6, 6), (5, 6), (6, 5)])  # 6 filters, maps of 6 included
def test_convolutions_are_read_on_axis_1_whatever_the_size_of_the_maps(size: tuple) -> None:
    images = torch.rand(2, 3, *size)
    assert _axis(nn.Conv2d(3, 6, 1), images) == 1
    assert _axis(nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.ReLU()), images) == 1
    assert _axis(nn.ReLU(), images) == 1


@pytest.mark.parametrize("size", [(5, 6), (6, 5), (6, 6)])
def test_concatenated_branches_are_read_on_axis_1(size: tuple) -> None:
    # A map as wide as the last branch's 6 filters is not taken for the filters.
    assert _axis(_Branches(4, 6), torch.rand(2, 3, *size)) == 1


class _Swish(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * tensor.sigmoid()


@pytest.mark.parametrize(
    ("module", "axis"),
    [
        (nn.GELU(), 1),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), 1),
        (_Swish(), 1),
        (_Permute(0, 2, 3, 1), None),
        (nn.Sequential(nn.ReLU(), _Permute(0, 3, 1, 2)), None),
    ],
)
def test_behind_maps_as_wide_as_there_are_filters_axes_are_kept_or_asked_for(
    module: nn.Module, axis: int | None
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), module).eval()
    images = torch.rand(2, 3, 6, 6)
    votes = LayerFilterFrequency(model, "1", top_k=1)
    data = [(images, torch.tensor([0, 1]))]
    row = list_filter_layers(model, images)["1"]
    if axis is None:
        assert "needs channel_dim" in row.reason or "filters on axis 1 or" in row.reason
        with pytest.raises(ValueError, match="channel_dim=1 or channel_dim=-1"):
            votes.identify(data, num_classes=6, show_progress=False)
    else:
        assert row.reason in ("", "puts out the logits")
        assert row.channel_dim == axis
        votes.identify(data, num_classes=6, show_progress=False)


@pytest.mark.parametrize("size", [(4, 4), (6, 6), (6, 5), (8, 16)])
def test_linear_and_layer_norm_are_read_on_the_last_axis(size: tuple) -> None:
    tensor = torch.rand(2, *size, 6)
    assert _axis(nn.Linear(6, 6), tensor) == 3
    assert _axis(nn.LayerNorm(6), tensor) == 3


@pytest.mark.parametrize("size", [(5, 5), (6, 5), (8, 7), (6, 6)])
def test_layer_norm_with_its_own_forward_is_read_where_it_normalizes(size: tuple) -> None:
    assert _axis(_ChannelsFirstNorm(6), torch.rand(2, 6, *size)) == 1
    assert _axis(_FastNorm(6), torch.rand(2, *size, 6)) == 3
    assert _axis(_FastNorm(6), torch.rand(2, size[0], 6)) == 2


def test_layer_norm_that_takes_either_form_is_read_by_size_or_not_at_all() -> None:
    norm = _EitherNorm(6)
    assert _axis(norm, torch.rand(2, 6, 5, 5)) == 1
    assert _axis(norm, torch.rand(2, 5, 5, 6)) == 3
    with pytest.raises(ValueError, match="channel_dim=1 or channel_dim=-1"):
        _axis(norm, torch.rand(2, 6, 5, 6))


def test_layer_norm_over_whole_maps_is_channels_first() -> None:
    assert _axis(nn.LayerNorm([4, 3, 5]), torch.rand(2, 4, 3, 5)) == 1


def test_blocks_that_leave_their_last_module_behind() -> None:
    assert _axis(_convnext_block(6), torch.rand(2, 6, 4, 5)) == 1
    assert _axis(_convnext_block(6)[:-1], torch.rand(2, 6, 4, 5)) == 3
    assert _axis(_Merging(5), torch.rand(2, 4, 3, 5)) == 3
    assert _axis(_Tokens(6), torch.rand(2, 3, 4, 4)) == 2  # four tokens
    assert _axis(_Tokens(6), torch.rand(2, 3, 8, 8)) == 2  # sixteen: more tokens than filters


class _NormFirst(nn.Module):
    """Maps become tokens behind a convolution, and a normalization is registered after it."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.norm = nn.Conv2d(4, 6, 2, stride=2), _ChannelsFirstNorm(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.norm(images)).flatten(2).transpose(1, 2)


def test_the_last_registered_module_is_not_the_last_that_runs() -> None:
    block = _NormFirst()
    with pytest.raises(ValueError, match="both have the size of 6 filters inside"):
        _axis(block, torch.rand(2, 4, 4, 6))  # (2, 6, 6)
    assert _axis(block, torch.rand(2, 4, 6, 6)) == 2  # (2, 9, 6)
    assert _axis(nn.Sequential(block, nn.Dropout(0.0)), torch.rand(2, 4, 6, 6)) == 2
    # Behind the normalization of four, maps of which are tokens by now, nothing tells the axis.
    with pytest.raises(ValueError, match="neither has the size of the 4 filters"):
        filter_axis(nn.Dropout(), torch.rand(2, 9, 6), before=block.norm)
    assert filter_axis(nn.Dropout(), torch.rand(2, 4, 3, 6), before=block.norm) == 1


def test_blocks_that_reshape_what_their_last_module_puts_out() -> None:
    images = torch.rand(2, 3, 2, 3)
    moved = nn.Sequential(nn.Conv2d(3, 6, 1), _Permute(0, 2, 3, 1))
    assert _axis(moved, images) == 3
    with pytest.raises(ValueError, match="both have the size of 6 filters inside"):
        _axis(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2)), images)  # of six positions
    assert _axis(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2)), torch.rand(2, 3, 2, 4)) == 1
    doubled = nn.Sequential(nn.Linear(3, 6), nn.ZeroPad1d((0, 6)))  # wider than any module says
    assert _axis(doubled, torch.rand(2, 5, 3)) == 2


def test_the_last_weighted_module_decides_first() -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6))
    assert _axis(block, torch.rand(2, 4, 5, 3)) == 3  # axis 1 has the size of the first


class _Gating(nn.Module):
    """Tokens gated by what a linear layer makes of the tokens themselves."""

    def __init__(self, tokens: int, filters: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(filters), nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(self.norm(x).movedim(1, 2)).movedim(1, 2)


@pytest.mark.parametrize(
    ("block", "size"),
    [
        # Three linear filters say the last axis, where maps are three wide by chance.
        (nn.Sequential(_convnext_block(6), nn.Sequential(nn.Linear(3, 3))), (6, 5, 3)),
        (nn.Sequential(nn.Conv2d(6, 8, 1), nn.Linear(3, 7)), (6, 5, 3)),  # 6 and 3 are nobody's
        (_Gating(5, 6), (5, 6)),
    ],
)
def test_a_block_whose_modules_contradict_each_other_must_be_told(block, size) -> None:
    images = torch.rand(2, *size)
    with pytest.raises(ValueError, match=r"weighted module.*channel_dim=1 or channel_dim=-1"):
        filter_axis(block, images)
    assert filter_axis(block, images, channel_dim=-1) == len(size)


def test_most_modules_of_a_block_decide() -> None:
    block = nn.Sequential(_convnext_block(6), nn.Linear(3, 6), nn.Linear(3, 4))
    assert filter_axis(block, torch.rand(2, 6, 5, 5)) == 1
    assert filter_axis(nn.Sequential(_Gating(5, 6), nn.Linear(6, 6)), torch.rand(2, 5, 6)) == 2


def test_what_follows_weights_is_not_guessed() -> None:
    relu, windows = nn.ReLU(), torch.rand(2, 9, 4, 6)
    with pytest.raises(ValueError, match="the last has the size of the 6 filters of the Conv2d"):
        filter_axis(relu, windows, before=nn.Conv2d(3, 6, 1))  # windows of pixels, filters last
    assert filter_axis(relu, torch.rand(2, 9, 4, 5), before=nn.Conv2d(3, 6, 1)) == 1  # branches
    tokens = torch.rand(2, 5, 8)
    with pytest.raises(ValueError, match="axis 1 has the size of the 5 filters of the Linear"):
        filter_axis(relu, tokens, before=nn.Linear(5, 5))  # a linear layer over tokens
    with pytest.raises(
        ValueError, match="neither has the size of the 6 filters of the BatchNorm1d"
    ):
        filter_axis(relu, tokens, before=nn.BatchNorm1d(6))
    assert filter_axis(relu, tokens, before=nn.BatchNorm1d(8)) == 2
    assert filter_axis(relu, tokens, before=nn.BatchNorm1d(5)) == 1


class _Rows(nn.Module):
    """Maps (N, K, H, W) to signals (N, K, H), without weights."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.relu().mean(3)


class _HeadMadeFirst(nn.Module):
    """The head is registered before what it runs behind, and is as wide as maps are high."""

    def __init__(self, *head: nn.Module) -> None:
        super().__init__()
        self.conv, self.head, self.rows = nn.Conv2d(4, 6, 3), nn.Sequential(*head), _Rows()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.rows(self.conv(images))[..., None]).mean((2, 3))


@pytest.mark.parametrize(
    "head",
    [
        [nn.Conv2d(6, 5, 1)],
        [nn.Conv2d(6, 5, (3, 1), stride=(2, 1))],
        [nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)],
    ],
    ids=["convolution", "strided", "batch normalization"],
)
def test_maps_of_a_module_that_runs_later_are_not_taken_for_those_before(head: list) -> None:
    model, images = _HeadMadeFirst(*head).eval(), torch.rand(4, 4, 7, 9)  # rows: (4, 6, 5)
    data = [(images, torch.tensor([0, 1, 2, 0]))]
    for method in (LayerFilterFrequency, LayerFilterAblation):
        with pytest.raises(UnknownAxisError, match=r"run later.*channel_dim=1 or channel_dim=-1"):
            method(model, "rows").identify(data, show_progress=False)
        told = method(model, "rows", channel_dim=1)
        assert told.identify(data, show_progress=False).num_filters == 6
    assert "needs channel_dim=1" in list_filter_layers(model, images)["rows"].reason


@pytest.mark.parametrize("size", [(2, 3), (4, 4), (3, 1)])  # as in vision transformers
def test_patches_that_a_convolution_embeds_are_tokens(size: tuple[int, int]) -> None:
    patches, tokens = nn.Conv2d(3, 8, size, stride=size), torch.rand(2, 5, 8)
    assert filter_axis(nn.Dropout(), tokens, before=patches) == 2
    with pytest.raises(UnknownAxisError, match="run later"):
        filter_axis(nn.Dropout(), tokens, before=nn.Conv2d(3, 8, size))


def test_more_axes_than_maps_have_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="no weighted module is before it"):
        filter_axis(nn.Identity(), torch.rand(2, 3, 4, 5, 6, 7))
    assert filter_axis(nn.Identity(), torch.rand(2, 3, 4, 5, 6)) == 1


class _Bias(nn.Module):
    """Two heads' biases of positions, a module's output that is no image's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bias, self.head = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        biases = self.bias(torch.ones(2, maps[0, 0].numel(), 5))
        return self.head(maps.mean((2, 3)) + biases.mean())


@pytest.mark.parametrize("number", [2, 3])
def test_rows_that_are_by_chance_as_many_as_images_are_no_batch(number: int) -> None:
    row = list_filter_layers(_Bias(), torch.rand(number, 3, 4, 4))["bias"]
    assert (row.qualifies, row.reason) == (False, "axis 0 is not the batch")
    assert list_filter_layers(_Bias(), torch.rand(number, 3, 4, 4))["conv"].qualifies


def test_a_block_of_equal_axes_must_be_told() -> None:
    block, images = _convnext_block(6), torch.rand(2, 6, 6, 6)
    with pytest.raises(ValueError, match=r"both have the size.*channel_dim=1 or channel_dim=-1"):
        _axis(block, images)
    assert filter_axis(block, block(images), channel_dim=1) == 1
    net = nn.Sequential(block, nn.Flatten(), nn.Linear(216, 2))
    with pytest.raises(ValueError, match="channel_dim"):
        FilterGate(net, "0")(torch.ones(2, 6), images)
    gates = torch.ones(2, 6)
    torch.testing.assert_close(FilterGate(net, "0", channel_dim=1)(gates, images), net(images))


def _axis_taken(layer: nn.Module, tensor: Tensor, before: nn.Module | None = None) -> int:
    return filter_axis(layer, tensor, None, before, at_input=True)


@pytest.mark.parametrize("size", [(4, 5), (6, 5), (5, 6), (6, 6)])
def test_what_a_block_takes_is_read_where_its_first_weighted_module_reads(size: tuple) -> None:
    first, last = torch.rand(2, 6, *size), torch.rand(2, *size, 6)
    assert _axis_taken(_convnext_block(6), first, before=nn.Linear(3, 6)) == 1
    assert _axis_taken(nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU()), first) == 1
    mlp = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 5))
    assert _axis_taken(mlp, last, before=nn.Conv2d(3, 6, 1)) == 3


def test_what_a_block_takes_that_does_not_say_has_the_axis_of_what_is_before() -> None:
    merging = _Merging(5)  # its linear layer takes 20 of them
    tensor = torch.rand(2, 4, 3, 5)
    assert _axis_taken(merging, tensor, before=nn.Linear(2, 5)) == 3
    assert _axis_taken(merging, tensor, before=nn.Conv2d(2, 4, 1)) == 1
    assert _axis_taken(merging, tensor) == 1
    with pytest.raises(ValueError, match="axis 1 or on axis 3: neither has the size of the 7"):
        _axis_taken(merging, tensor, before=nn.Linear(2, 7))
    assert _axis_taken(nn.GELU(), tensor, before=nn.Linear(2, 5)) == 3
    either = nn.Sequential(_EitherNorm(5), nn.ReLU())
    with pytest.raises(ValueError, match="channel_dim=1 or channel_dim=-1"):
        _axis_taken(either, torch.rand(2, 5, 3, 5), before=_EitherNorm(5))


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, 2)
        self.grow, self.gelu, self.shrink = nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)
        self.mlp = nn.Sequential(self.grow, self.gelu, self.shrink)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).movedim(1, 2)
        return self.head(self.mlp(tokens).mean(1))


@pytest.mark.parametrize(("layer", "at_input"), [("gelu", False), ("gelu", True), ("mlp", True)])
def test_methods_of_captum_and_of_this_package_agree_on_the_axis(layer, at_input) -> None:
    model, images = _Transformer(), torch.rand(4, 3, 6, 4)  # six tokens
    data = [(images, torch.tensor([0, 1, 2, 1]))]
    module = dict(model.named_modules())[layer]
    ours = LayerFilterContribution(model, layer).identify(
        data, attribute_to_layer_input=at_input, show_progress=False, num_filters=2
    )
    theirs = identify_class_filters(
        LayerGradientXActivation(model, module),
        data,
        attribute_kwargs={"attribute_to_layer_input": at_input},
        show_progress=False,
        num_filters=2,
    )
    assert ours.scores.shape == theirs.scores.shape == (3, 6 if layer == "mlp" else 9)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
    if not at_input:
        method = LayerGradientXActivation(model, module)
        raw = method.attribute(images, target=0)
        torch.testing.assert_close(filter_scores_of(method, raw), raw.sum(1))


def test_a_method_of_captum_can_be_told_the_axis() -> None:
    net = nn.Sequential(_convnext_block(6), nn.Flatten(), nn.Linear(216, 2))
    data = [(torch.rand(2, 6, 6, 6), torch.tensor([0, 1]))]
    method = LayerActivation(net, net[0])
    with pytest.raises(ValueError, match=r"method.channel_dim = -1"):
        identify_class_filters(method, data, show_progress=False, num_filters=2)
    method.channel_dim = 1
    table = identify_class_filters(method, data, show_progress=False, num_filters=2)
    torch.testing.assert_close(table.scores, net[0](data[0][0]).sum((2, 3)).double())


@pytest.mark.parametrize("channel_dim", [0, -4, 4, -5])
def test_an_axis_that_is_none_is_refused(channel_dim: int) -> None:
    with pytest.raises(ValueError, match="does not name a channel axis"):
        filter_axis(None, torch.rand(2, 3, 4, 5), channel_dim)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 7),
    height=st.integers(1, 7),
    breadth=st.integers(1, 7),
    last=st.booleans(),
)
def test_leaves_never_depend_on_the_size(width: int, height: int, breadth: int, last: bool) -> None:
    if last:
        assert _axis(nn.Linear(2, width), torch.rand(1, height, breadth, 2)) == 3
    else:
        assert _axis(nn.Conv2d(2, width, 1), torch.rand(1, 2, height, breadth)) == 1


# -- the list --------------------------------------------------------------------------------------


class _Everything(nn.Module):
    """One layer for every remark."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Conv2d(3, 6, 3)
        self.windows = _Windows(6)
        self.to_last = _Permute(0, 2, 1)
        self.expand = nn.Linear(6, 12)
        self.gelu = nn.GELU()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.pool = nn.AdaptiveMaxPool1d(1, return_indices=True)
        self.argmax = _Argmax()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.relu(self.conv(images)))
        tokens = self.gelu(self.expand(self.to_last(self.windows(maps))))
        tokens, _weights = self.attention(tokens, tokens, tokens)
        pooled, _indices = self.pool(tokens.transpose(1, 2))
        self.argmax(pooled)
        return self.head(self.flatten(pooled))


class _Argmax(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.argmax(1)


def test_every_layer_gets_its_row_and_its_reason() -> None:
    torch.manual_seed(0)
    layers = list_filter_layers(_Everything(), torch.rand(3, 3, 4, 8))
    assert layers.head == "head"
    # name: (shape, runs, channel_dim, num_filters, feeds_head, qualifies)
    expected: dict[str, Any] = {
        "conv": ((3, 6, 4, 8), 1, 1, 6, None, True),
        "relu": ((3, 6, 4, 8), 2, None, None, None, False),
        "windows": ((3, 6, 32), 1, 1, 6, None, True),
        "windows.norm": ((24, 4, 6), 1, None, None, None, False),
        "to_last": ((3, 32, 6), 1, 2, 6, None, True),
        "expand": ((3, 32, 12), 1, 2, 12, None, True),
        "gelu": ((3, 32, 12), 1, 2, 12, None, True),
        "attention": (None, 1, None, None, None, False),
        "pool": ((3, 12, 1), 1, 1, 12, "identical", True),
        "argmax": ((3, 1), 1, None, None, None, False),
        "flatten": ((3, 12), 1, 1, 12, "identical", True),
        "head": ((3, 4), 1, 1, 4, None, True),
        "unused": (None, 0, None, None, None, False),
    }
    for name, (shape, runs, axis, width, feed, qualifies) in expected.items():
        row = layers[name]
        assert (row.shape, row.runs, row.channel_dim) == (shape, runs, axis), name
        assert (row.num_filters, row.feeds_head, row.qualifies) == (width, feed, qualifies), name
    reasons = {
        "relu": "called 2 times",
        "windows.norm": "axis 0 is not the batch",
        "to_last": "",
        "expand": "",
        "gelu": "",
        "attention": "a tuple, not one tensor",
        "argmax": "int64",
        "unused": "never called",
        "head": "puts out the logits",
    }
    for name, reason in reasons.items():
        assert reason in layers[name].reason, name
        assert bool(reason) == bool(layers[name].reason), name
    assert [row.name for row in layers.qualifying] == [row.name for row in layers if row.qualifies]
    assert [row.name for row in layers.feeding_head] == ["pool", "flatten"]
    assert len(layers.to_pandas()) == len(layers) == len(str(layers).splitlines()) - 1


@pytest.mark.parametrize(
    ("middle", "width", "feed"),
    [(nn.AdaptiveAvgPool2d(1), 6, "mean"), (nn.Identity(), 6 * 12, "flatten")],
)
def test_how_a_layer_feeds_the_head(middle: nn.Module, width: int, feed: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), middle, nn.Flatten(), nn.Linear(width, 2))
    layers = list_filter_layers(net, torch.rand(2, 3, 3, 4))
    assert layers["0"].feeds_head == feed
    assert layers["2"].feeds_head == "identical"
    assert layers["0"].reason == ""


def test_a_model_that_goes_on_after_its_head_is_told_apart() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    layers = list_filter_layers(net, torch.rand(2, 3, 5, 5))
    assert (layers.head, layers["1"].feeds_head) == ("2", "identical")
    assert "not exact" in layers["1"].reason


def test_a_convolution_of_one_position_is_a_linear_head() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 2, 1), nn.Flatten()
    )
    images, labels = torch.rand(3, 3, 5, 5), torch.tensor([0, 1, 1])
    layers = list_filter_layers(net, images)
    assert (layers.head, layers["1"].feeds_head, layers["1"].reason) == ("3", "mean", "")
    assert layers["3"].reason == layers["4"].reason == "puts out the logits"
    table = LayerFilterContribution(net, "1").identify([(images, labels)], show_progress=False)
    assert table.provenance["exact"] is True
    with torch.no_grad():
        terms = net[:3](images).flatten(1) * net.get_parameter("3.weight").flatten(1)[labels]
    torch.testing.assert_close(table.scores[0].float(), terms[0])
    torch.testing.assert_close(table.scores[1].float(), terms[1:].mean(0))


def test_an_ambiguous_block_does_not_qualify_until_it_is_told() -> None:
    net = nn.Sequential(_convnext_block(6), nn.Flatten(), nn.Linear(216, 2))
    row = list_filter_layers(net, torch.rand(2, 6, 6, 6))["0"]
    assert not row.qualifies
    assert (row.channel_dim, row.num_filters) == (None, 6)
    assert "channel_dim=1 or channel_dim=-1" in row.reason


def test_modules_without_weights_between_equal_axes() -> None:
    # Six filters on maps of six by six, and 6 hidden units: sizes say nothing, only the order does.
    net = nn.Sequential(
        nn.Conv2d(6, 6, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(1),
        _Permute(0, 2, 3, 1),
        nn.Linear(6, 6),
        nn.GELU(),
        nn.Dropout(),
        _Permute(0, 3, 1, 2),
        nn.ReLU(),
    )
    layers = list_filter_layers(net, torch.rand(2, 6, 6, 6))
    found = [layers[str(index)].channel_dim for index in range(9)]
    # Images of another size tell: the axis that keeps its size is that of the filters.
    assert found == [1, 1, 1, 3, 3, 3, 3, 1, 1]
    reasons = [layers[str(index)].reason for index in range(9)]
    assert [reasons[index].split("; ")[0] for index in (3, 7, 8)] == [
        "needs channel_dim=-1",
        "needs channel_dim=1",
        "needs channel_dim=1",
    ]
    fixed = nn.Sequential(*net, nn.Flatten(), nn.Linear(216, 2))  # takes one size only
    layers = list_filter_layers(fixed, torch.rand(2, 6, 6, 6))
    assert all("axis 1 or the last?" in layers[str(index)].reason for index in (3, 7, 8))
    assert not any(layers[str(index)].qualifies for index in (3, 7, 8))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(), nn.Flatten(), nn.Linear(54, 2)).train()
    net[3].eval()
    state = torch.get_rng_state()
    images = torch.rand(2, 3, 4 if fails else 5, 5)
    if fails:
        with pytest.raises(RuntimeError):
            list_filter_layers(net, images)
    else:
        list_filter_layers(net, images)
    torch.set_rng_state(state)
    assert [module.training for module in net] == [True, True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_running_statistics_stay_and_the_pass_is_in_evaluation_mode() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 2))
    seen = []
    net[1].register_forward_pre_hook(lambda module, _inputs: seen.append(module.training))
    before = net.get_buffer("1.running_mean").clone()
    list_filter_layers(net.train(), torch.rand(2, 3, 5, 5))
    assert seen == [False, False]
    torch.testing.assert_close(net[1].running_mean, before, rtol=0, atol=0)


def test_one_forward_pass_and_another_on_two_larger_images() -> None:
    net = _Everything()
    calls = []
    net.register_forward_pre_hook(lambda _net, inputs: calls.append(tuple(inputs[0].shape)))
    list_filter_layers(net, torch.rand(3, 3, 4, 8))
    assert calls == [(3, 3, 4, 8), (2, 3, 8, 16)]


class _Gated(nn.Module):
    """Channels last: what runs before the activation is a convolution of other width, and what is
    registered before it is as wide as a map by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.activation = nn.GELU()
        self.mix = nn.Conv2d(4, 6, 1)
        self.last = nn.Identity()
        self.head = nn.Linear(20, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(torch.cat([images, images.flip(1)], 1))
        parts = [maps, self.mix(maps[:, :4]), self.mix(maps[:, 4:])]
        found = self.activation(torch.cat(parts, 1).movedim(1, -1))
        return self.head(self.last(found).mean((1, 2)))


@pytest.mark.parametrize("size", [(5, 7), (6, 6), (8, 4)])
def test_images_of_another_size_tell_where_the_filters_are(size: tuple) -> None:
    layers = list_filter_layers(_Gated(), torch.rand(3, 4, *size))
    for name in ("activation", "last"):
        row = layers[name]
        assert (row.channel_dim, row.num_filters, row.feeds_head) == (3, 20, "mean")
        assert row.reason == "needs channel_dim=-1"


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        list_filter_layers(nn.Sequential(nn.Linear(3, 2)), torch.rand(0, 3))


def test_leaves_only() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 1)), nn.Flatten(), nn.Linear(24, 2))
    names = [row.name for row in list_filter_layers(net, torch.rand(2, 3, 2, 2), leaves_only=True)]
    assert names == ["0.0", "1", "2"]


# -- windows of an image are not images ------------------------------------------------------------


def test_windows_are_refused_by_every_entry() -> None:
    net, images = _Everything().eval(), torch.rand(3, 3, 4, 8)
    data = [(images, torch.tensor([0, 1, 2]))]
    message = "axis 0 is not the batch"
    for method in (LayerFilterFrequency, LayerFilterContribution):
        with pytest.raises(ValueError, match=message):
            method(net, "windows.norm").identify(data, show_progress=False)
    with pytest.raises(ValueError, match=message):
        collect_features(net, "windows.norm", data, show_progress=False)
    with pytest.raises(ValueError, match=message):
        FilterGate(net, "windows.norm")(torch.ones(3, 6), images)


# -- layers that hand on a tensor beside other things, or take it by its name -----------------------


class _Named(NamedTuple):
    maps: Tensor
    size: tuple[int, int]


FORMS = {
    "tuple": lambda maps: (maps, None),
    "list": lambda maps: [maps, 3],
    "mapping": lambda maps: {"mask": maps > 0, "maps": maps},
    "named tuple": lambda maps: _Named(maps, (3, 4)),
    "nested": lambda maps: ((None, maps), {"size": maps.shape[2:]}),
}
BACK = {
    "tuple": lambda value: value[0],
    "list": lambda value: value[0],
    "mapping": lambda value: value["maps"],
    "named tuple": lambda value: value.maps,
    "nested": lambda value: value[0][1],
}


class _Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, *, images: Tensor, scale: float) -> Any:
        return FORMS[self.form](self.conv(input=images).relu() * scale)


class _Reads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, size: int, value: Any) -> Tensor:
        return BACK[self.form](value).mean((2, 3)) * size


class _InAnyForm(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.reads, self.head = _Block(form), _Reads(form), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {
            "logits": self.head(input=self.reads(2, value=self.block(images=images, scale=0.5)))
        }


@pytest.mark.parametrize("form", FORMS)
def test_layers_in_any_form(form: str) -> None:
    net, plain = _InAnyForm(form).eval(), _InAnyForm("tuple").eval()
    images, labels = torch.rand(6, 3, 5, 5), torch.tensor([0, 1, 2, 0, 1, 1])
    layers = list_filter_layers(net, images)
    assert layers.head == "head"
    assert layers["head"].reason == "puts out the logits"
    row = layers["block"]
    assert (row.shape, row.channel_dim, row.qualifies, row.reason) == ((6, 6, 3, 3), 1, True, "")
    weight = net.head.weight[labels]
    with torch.no_grad():
        maps = net.block.conv(images).relu() / 2
        logits = net.head(2 * maps.mean((2, 3)))
    terms = 2 * maps.mean((2, 3)) * weight  # what each filter adds to its image's own logit
    means = torch.stack([terms[labels == one].double().mean(0) for one in range(3)]).float()
    quiet: dict[str, Any] = {"show_progress": False}
    data = [{"pixel_values": images, "labels": labels}]
    for layer, at_input in (("block", False), ("reads", True), ("head", True)):
        for kind in (LayerFilterContribution, LayerFilterAblation):
            method = kind(net, layer)
            table = method.identify(data, attribute_to_layer_input=at_input, **quiet)
            torch.testing.assert_close(table.scores.float(), means.detach())
            attributions = method.attribute(
                images, target=labels, attribute_to_layer_input=at_input
            )
            sums = method.filter_scores(attributions, attribute_to_layer_input=at_input)
            torch.testing.assert_close(sums, terms.detach())
    with torch.no_grad():
        gate = FilterGate(net, "block")
        assert torch.equal(gate(gate.ones(6), images)["logits"], net(images)["logits"])
        torch.testing.assert_close(net(images)["logits"], logits)
        gates = gate.ones(6)
        gates[:, 2] = 0
        closed = net.head(2 * maps.mean((2, 3)) * gates)
        torch.testing.assert_close(gate(gates, images)["logits"], closed)
        kept = torch.arange(6) != 2
        with masked_filters(net, {"block": kept}):
            torch.testing.assert_close(net(images)["logits"], closed)
    assert torch.equal(
        collect_features(net, "block", data, **quiet)[0],
        collect_features(plain, "block", data, **quiet)[0],
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [LayerGradientXActivation, LayerConductance])
def test_methods_of_captum_say_which_layers_they_do_not_read(form: str, kind: type) -> None:
    """And no comparison fails for that."""
    net = _InAnyForm(form).eval()
    data = [(torch.rand(6, 3, 5, 7), torch.tensor([0, 1, 2, 0, 1, 1]))]
    expected = rf"{kind.__name__} reads layers of one tensor; 'block' handles an? \w+\."
    with pytest.raises(ValueError, match=expected) as caught:
        identify_class_filters(kind(net, net.block), data, show_progress=False)
    assert caught.value.__cause__ is not None
    found = compare_methods(net, "block", data, data, num_filters=2, show_progress=False)
    assert list(found.skipped) == ["gradient x activation"]
    assert "gradient x activation does not apply: LayerGradientXActivation reads" in str(found)
    assert len(found.names) == 7
    model, images = ClassScores(net), data[0][0]
    with pytest.raises(ValueError, match=expected):
        compare_attributions(model, {"one": kind(model, net.block)}, images, data[0][1])
    # Where the layer has a tensor, an error is the method's own.
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        identify_class_filters(
            kind(net, net.head), data, attribute_kwargs={"steps": 3}, show_progress=False
        )


class _Otherwise(nn.Module):
    """A network that runs its layer in one of several ways that Captum's methods cannot read."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.conv, self.relu = way, nn.Conv2d(3, 6, 3), nn.ReLU()
        self.fc: nn.Module = nn.Linear(6, 4)
        if way == "quantized":
            self.fc = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(self.fc), {nn.Linear}, dtype=torch.qint8
            )

    def features(self, images: Tensor) -> Tensor:
        return self.relu(self.conv(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        if self.way == "twice":
            return self.fc(self.features(images) + self.features(images.flip(3)) / 2)
        if self.way == "in chunks":
            return torch.cat([self.fc(self.features(part)) for part in images.split(4)])
        if self.way == "crops":
            both = self.fc(self.features(torch.cat([images, images.flip(3)])))
            return both.unflatten(0, (2, len(images))).mean(0)
        if self.way == "no_grad":
            with torch.no_grad():
                features = self.features(images)
            return self.fc(features)
        if self.way == "reentrant":
            features = checkpoint(self.features, images, use_reentrant=True)
            return self.fc(features)
        return self.fc(self.features(images))


RUNS = {
    "twice": r"'relu' was reached 2 times.*SeparateRuns",
    "in chunks": r"'relu' was reached 2 times",
    "crops": r"'relu' puts out (14 rows for 7|8 rows for 4) images: axis 0 is not the batch",
    "traced": "'relu' is compiled by TorchScript.*give the module that it was made from",
}
GRADIENTS = {
    "no_grad": r"runs the layer 'relu' under torch\.no_grad\(\)",
    "reentrant": "use_reentrant=False",
    "quantized": "No gradient of the model's output reaches the layer 'relu': .*quantized",
}
CAPTUMS: dict[str, Callable[..., LayerAttribution]] = {
    "activation": LayerActivation,
    "gradient x activation": LayerGradientXActivation,
    "conductance": LayerConductance,
    "integrated gradients": LayerIntegratedGradients,
    "ablation": LayerFeatureAblation,
}


def _otherwise(way: str) -> Any:
    net = _Otherwise(way).eval()
    return torch.jit.trace(net, torch.rand(2, 3, 5, 6)) if way == "traced" else net


def _seven() -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(7, 3, 5, 6), torch.tensor([0, 1, 2, 3, 0, 1, 2]))]


@pytest.mark.parametrize("way", RUNS)
@pytest.mark.parametrize("kind", CAPTUMS)
def test_methods_of_captum_read_layers_that_run_once(way: str, kind: str) -> None:
    net = _otherwise(way)
    with pytest.raises(ValueError, match=RUNS[way]):
        identify_class_filters(CAPTUMS[kind](net, net.relu), _seven(), show_progress=False)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", GRADIENTS)
@pytest.mark.parametrize("kind", ["gradient x activation", "conductance", "integrated gradients"])
def test_methods_of_captum_say_where_no_gradient_leads(way: str, kind: str) -> None:
    net, data = _otherwise(way), _seven()
    method = CAPTUMS[kind](net, net.relu)
    with pytest.raises(ValueError, match=GRADIENTS[way]) as caught:
        identify_class_filters(method, data, show_progress=False)
    assert caught.value.__cause__ is not None
    for without in ("activation", "ablation"):
        found = identify_class_filters(
            CAPTUMS[without](net, net.relu), data, show_progress=False, num_filters=6
        )
        assert found.scores.shape == (4, 6)


TASKS: dict[str, Callable[[nn.Module, Any], object]] = {
    "contrast": lambda net, kind: contrast_classes(
        kind(net, net.relu), _seven(), 0, 1, show_progress=False
    ),
    "compare": lambda net, kind: compare_attributions(
        net, {"one": kind(net, net.relu)}, *_seven()[0]
    ),
    "sensitivity": lambda net, kind: filter_max_sensitivity(
        kind(net, net.relu), _seven()[0][0], target=1
    ),
    "randomization": lambda net, kind: cascading_randomization(
        net, lambda model: kind(model, model.relu), _seven()[0][0], target=1
    ),
    "quantus": lambda net, kind: quantus_explanation(lambda model: kind(model, model.relu))(
        net, _seven()[0][0].numpy(), _seven()[0][1].numpy()
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", ["twice", "crops", *GRADIENTS])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_which_layers_captum_cannot_read(way: str, task: str) -> None:
    with pytest.raises(ValueError, match={**RUNS, **GRADIENTS}[way]):
        TASKS[task](_otherwise(way), LayerGradientXActivation)


def test_comparisons_leave_gradients_out_where_none_lead() -> None:
    net, data = _otherwise("no_grad"), _seven()
    found = compare_methods(net, "relu", data, list(data), num_filters=2, show_progress=False)
    assert list(found.skipped) == ["gradient x activation"]
    assert "under torch.no_grad()" in found.skipped["gradient x activation"]
    assert "contribution" in found.names


def test_a_method_that_weighs_all_runs_itself_judges_layers_itself() -> None:
    class AllRuns(LayerAttribution):
        def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
            net: Any = self.forward_func
            both = net.features(inputs) + net.features(inputs.flip(3)) / 2
            return both * net.fc.weight[target]

    net, data = _otherwise("twice"), _seven()
    found = identify_class_filters(AllRuns(net, net.relu), data, show_progress=False)
    (images, labels) = data[0]
    with torch.no_grad():
        terms = (net.features(images) + net.features(images.flip(3)) / 2) * net.fc.weight[labels]
    torch.testing.assert_close(found.scores[1].float(), terms[labels == 1].mean(0))
    short = _otherwise("plain")
    method = AllRuns(short, short.relu)
    setattr(method, "attribute", lambda inputs, target: torch.ones(3, 6))  # noqa: B010
    with pytest.raises(ValueError, match="3 rows for 7 images: axis 0 is not the batch"):
        identify_class_filters(method, data, show_progress=False)


def test_two_tensors_are_not_one() -> None:
    net = nn.MultiheadAttention(6, 2, batch_first=True)
    tokens = torch.rand(2, 5, 6)
    assert [
        len(layer_tensors(net(*[tokens] * 3, need_weights=wanted))) for wanted in (True, False)
    ] == [
        2,
        1,
    ]
    with pytest.raises(
        ValueError, match=r"handles a tuple \(Tensor, Tensor\), not a single tensor"
    ):
        only_tensor(net(*[tokens] * 3), "attention")


@pytest.mark.parametrize("layer", ["1", "2", "3"])
def test_the_input_of_a_layer_of_tokens_has_its_filters_last(layer: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Flatten(), nn.Linear(35, 3)
    )
    tokens, labels = torch.rand(4, 7, 4), torch.tensor([0, 1, 2, 0])
    expected = 5 if layer == "3" else 6
    for kind in (LayerFilterFrequency, LayerFilterContribution, LayerFilterAblation):
        channel_dim = -1 if layer == "3" else None  # a GELU does not say where
        method = kind(net, layer, channel_dim=channel_dim)
        table = method.identify(
            [(tokens, labels)], attribute_to_layer_input=True, show_progress=False
        )
        assert table.scores.shape == (3, expected)


def test_all_methods_read_a_layer_without_weights_alike() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Flatten(), nn.Linear(42, 3))
    data = [(torch.rand(4, 7, 4), torch.tensor([0, 1, 2, 0]))]
    for replacement in ("zero", "mean"):
        method = LayerFilterAblation(net, "1", replacement=replacement)
        assert method.identify(data, show_progress=False).scores.shape == (3, 6)


def test_a_layer_is_found_by_every_name_that_it_has():
    model: Any = deep()
    model.stage1 = torch.compile(model.stage1)
    model.add_module("again", model.stage2)
    compiled: Any = torch.compile(model)
    for wrapped in (model, torch.nn.DataParallel(model), compiled):
        names = {**dict(wrapped.named_modules(remove_duplicate=False)), **named_layers(wrapped)}
        assert {"stage1.0", "stage1._orig_mod.0", "again.1"} <= {
            name.removeprefix("_orig_mod.").removeprefix("module.") for name in names
        }
        for name, module in names.items():
            if name:
                assert find_layer(wrapped, name) is module
        for wrong in ("stage1.9", "stage1.", ".stage1", "stage1..0", "", "head.weight", "forward"):
            with pytest.raises(ValueError, match="has no layer"):
                find_layer(wrapped, wrong)


@dataclasses.dataclass
class Held:
    maps: torch.Tensor
    other: object = None


class Holding(nn.ReLU):
    kind: type = Held

    def forward(self, x):
        return self.kind(super().forward(x))


def holding(kind):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(2, 5, 3), Holding(), nn.Linear(5, 3)
            self.act.kind = kind

        def forward(self, x):
            return self.head(self.act(self.conv(x)).maps.mean((2, 3)))

    torch.manual_seed(0)
    return Whole().eval()


@pytest.mark.parametrize(
    "method", [LayerFilterContribution, LayerFilterAblation, LayerFilterFrequency]
)
def test_data_classes_are_read_once_they_are_registered(method):
    data = [(torch.randn(4, 2, 5, 6), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(ValueError, match=r"torch\.export\.register_dataclass\(Held\)"):
        method(holding(Held), "act").identify(data, show_progress=False)
    known = dataclasses.make_dataclass("Known", ["maps", ("other", object, None)])
    torch.export.register_dataclass(known)
    model = holding(known)
    own = method(model, "act").identify(data, show_progress=False)
    plain = nn.Sequential(
        model.conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head
    ).eval()
    expected = method(plain, "1").identify(data, show_progress=False)
    torch.testing.assert_close(own.scores, expected.scores)
