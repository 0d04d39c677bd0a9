"""One pass for all layers; derivatives off the head's weights only where that is seen to hold."""

import gc
import weakref
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_classfilters import (
    LayerClassGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerSingularDirection,
    identify_class_filters,
)
from captum_classfilters._core.forward import LayerRequest, MapsNeededError, SharedForward
from captum_classfilters._core.heads import HeadRecord, computes_its_weight, record_head
from captum_classfilters.attr import LayerFilterAttribution, WeightedFilterAttribution
from captum_classfilters.attr.layer_filter_frequency import strongest
from captum_classfilters.identify import LabelPermutation
from tests.models import QUIET, batches, deep, hooks_of, images, joined, pool_linear
from tests.pretend_device import pretend


class Cosine(nn.Linear):
    """A linear layer by its class, a cosine by its forward."""

    def forward(self, x):
        return 9 * nn.functional.linear(
            nn.functional.normalize(x), nn.functional.normalize(self.weight)
        )


class Adapted(nn.Linear):
    """A low-rank update beside the weight, as LoRA adds it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 2, bias=False), nn.Linear(2, sizes[1], bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Net(nn.Module):
    """Convolution, ReLU, mean, head, and something after it."""

    def __init__(self, head=None, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.head = nn.Conv2d(2, 6, 3), nn.ReLU(), head or nn.Linear(6, 3)
        self.after = after or (lambda z: z)

    def forward(self, x):
        return self.after(self.head(self.relu(self.conv(x)).mean((2, 3))))


def doubled(z):
    z *= 2
    return z


AWKWARD = {
    "plain": Net(),
    "cosine head": Net(Cosine(6, 3)),
    "low-rank update": Net(Adapted(6, 3)),
    "written into": Net(after=doubled),
    "clipped": Net(after=lambda z: z.clamp(max=0.1)),
    "clipped where nothing is": Net(after=lambda z: z.clamp(max=1e6)),
    "temperature": Net(after=lambda z: z / 3),
    "log-softmax": Net(after=lambda z: z.log_softmax(1)),
    "view": Net(after=lambda z: z.view(-1, 3)),
}


def with_hook():
    model = Net()
    model.get_submodule("head").register_forward_hook(lambda _m, _i, z: z * 2)
    return model


AWKWARD["hook on the head"] = with_hook()


@pytest.mark.parametrize("name", AWKWARD)
def test_contributions_behind_any_head_are_captums(name):
    model, data = AWKWARD[name].eval(), batches()
    x, y = joined(data)
    method = LayerFilterContribution(model, "relu")
    expected = LayerGradientXActivation(model, model.relu).attribute(x, target=y)
    assert torch.allclose(method.attribute(x, target=y), expected, atol=1e-6)
    table = method.identify(data, **QUIET)
    each = expected.sum((2, 3)).double()
    for class_index in range(3):
        mean = each[y == class_index].mean(0)
        assert torch.allclose(table.scores[class_index], mean, atol=1e-6)
    assert table.provenance["exact"] is (name in ("plain", "view"))


def test_heads_that_compute_their_weight():
    assert computes_its_weight(nn.Linear(6, 3))
    assert computes_its_weight(nn.Conv2d(6, 3, 1))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    assert computes_its_weight(normed)
    for head in (Cosine(6, 3), Adapted(6, 3), nn.Conv2d(6, 3, 3), nn.ReLU(), with_hook().head):
        assert not computes_its_weight(head)


def test_the_output_is_the_heads_own_tensor():
    head, x = nn.Linear(6, 3), torch.rand(4, 6)
    with record_head(head) as record:
        z = head(x)
    assert record.is_output(z)
    assert not record.is_output(z.clone())
    assert not record.is_output([z])
    with torch.no_grad():
        z += 1
    assert not record.is_output(z)
    assert not HeadRecord().is_output(z)
    with record_head(head) as record:
        z = head(head(x).sum(1, keepdim=True).expand(-1, 6))  # used twice
    assert not record.is_output(z)
    single = nn.Linear(6, 1)
    with record_head(single) as record:
        z = single(x).squeeze(1)
    assert record.is_output(z)


def test_one_forward_pass_and_at_most_one_backward_pass():
    model, data = deep(), batches()
    runs = []
    handle = model.get_submodule("head").register_forward_hook(lambda *_: runs.append(1))
    methods = [
        LayerFilterFrequency(model, "stage1", top_k=2),
        LayerFilterFrequency(model, "stage2", top_k=2),
        LayerFilterContribution(model, "stage1"),
        LayerFilterContribution(model, "stage2"),
        LayerFilterContribution(model, "stage2.0"),
    ]
    tables = identify_class_filters(methods, data, **QUIET)
    handle.remove()
    # The first batch shows that gradients are needed; what two layers' contributions miss takes three
    # runs of it each.
    assert len(runs) == len(data) + 1 + 2 * 3
    assert [table.provenance.get("exact") for table in tables] == [None, None, False, True, False]
    runs.clear()
    handle = model.get_submodule("head").register_forward_hook(lambda *_: runs.append(1))
    identify_class_filters(methods[:2], data, **QUIET)
    handle.remove()
    assert len(runs) == len(data) + 1  # of the first, to see whether its scores repeat
    assert hooks_of(model) == 0


def test_layers_that_feed_the_head_stay_exact_beside_others():
    model, data = deep(), batches()
    inner, last = identify_class_filters(
        [LayerFilterContribution(model, "stage1"), LayerFilterContribution(model, "stage2")],
        data,
        **QUIET,
    )
    assert inner.provenance["exact"] is False
    assert last.provenance["exact"] is True
    alone = LayerFilterContribution(model, "stage2").identify(data, **QUIET)
    assert torch.allclose(last.scores, alone.scores, atol=1e-12)


class TestRules:
    """A method's rule stands once; what changes it changes identify."""

    def table(self, method, data):
        x, y = joined(data)
        each = method.filter_scores(method.attribute(x, target=y)).double()
        return torch.stack([each[y == c].mean(0) for c in range(3)])

    def test_the_mean_of_the_votes_rule_is_a_mean(self):
        # Filter 0 has the largest mean, filter 1 the largest maximum.
        x = torch.zeros(3, 2, 2, 2)
        x[:, 0], x[:, 1, 0, 0] = 1.0, 3.0
        model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(8, 3)).eval()
        votes = LayerFilterFrequency(model, "0", top_k=1)
        table = votes.identify([(x, torch.arange(3))], **QUIET)
        assert table.scores.tolist() == [[1.0, 0.0]] * 3
        assert votes.filter_scores(votes.attribute(x)).tolist() == [[1.0, 0.0]] * 3

    @pytest.mark.parametrize("layer", ["1", "0"])
    def test_a_new_rule_is_followed_by_both(self, layer):
        class Squares(LayerFilterAttribution):
            depends_on_target = False

            def scores_from(self, maps, target):
                return maps.maps.square().mean(2)

        class Sine(WeightedFilterAttribution):
            needs_derivative = True

            def weights_from(self, maps, target):
                return maps.derivative(target).sin()

        model, data = pool_linear(), batches()
        for kind in (Squares, Sine):
            method = kind(model, layer)
            table = method.identify(data, **QUIET)
            assert torch.allclose(table.scores, self.table(method, data), atol=1e-6)

    def test_overriding_a_rule_or_only_attribute(self):
        class Halved(LayerFilterContribution):
            def weights_from(self, maps, target):
                return super().weights_from(maps, target) / 2

        class Absolute(LayerFilterContribution):
            def attribute(self, *args, **kwargs):
                return super().attribute(*args, **kwargs).abs()

        class Largest(LayerFilterContribution):
            def filter_scores(self, attributions, attribute_to_layer_input=False):
                return attributions.flatten(2).amax(2)

        model, data = pool_linear(), batches()
        plain = LayerFilterContribution(model, "1")
        for kind in (Halved, Absolute, Largest):
            method = kind(model, "1")
            table = method.identify(data, **QUIET)
            assert torch.allclose(table.scores, self.table(method, data), atol=1e-6)
            assert not torch.allclose(table.scores, self.table(plain, data), atol=1e-3)
        patched = LayerFilterContribution(model, "1")
        changed = lambda *args, **kwargs: 3 * plain.attribute(*args, **kwargs)  # noqa: E731
        patched.attribute = changed  # type: ignore[method-assign]
        table = patched.identify(data, **QUIET)
        assert torch.allclose(table.scores, 3 * self.table(plain, data), atol=1e-6)

    @pytest.mark.parametrize("changed", ["attribute", "filter_scores", "scores_from"])
    @pytest.mark.parametrize("at", ["class", "object"])
    def test_votes_with_another_rule_are_no_whole_numbers(self, changed, at):
        model, data = pool_linear(), batches()
        plain = LayerFilterFrequency(model, "1", top_k=2)
        original = getattr(plain, changed)
        quarter = lambda *args, **kwargs: original(*args, **kwargs) / 4  # noqa: E731
        if at == "class":
            members = {changed: lambda self, *args, **kwargs: quarter(*args, **kwargs)}
            kind: Any = type("Quarter", (LayerFilterFrequency,), members)
            method = kind(model, "1", top_k=2)
        else:
            method = LayerFilterFrequency(model, "1", top_k=2)
            setattr(method, changed, quarter)
        expected = plain.identify(data, **QUIET).scores / 4
        test = LabelPermutation(permutations=19)
        table = method.identify(data, significance=test, **QUIET)
        assert torch.allclose(table.scores, expected)
        assert table.p_values is not None

    def test_votes_of_another_rule_that_are_said_to_be_some(self):
        class Weakest(LayerFilterFrequency):
            counts_votes = True

            def scores_from(self, maps, target=None):
                return strongest(-maps.means, self.top_k).to(maps.means.dtype)

        class Named(LayerFilterFrequency):
            """Changes nothing."""

        model = pool_linear()
        assert Weakest(model, "1").has_whole_scores
        assert Named(model, "1").has_whole_scores

    def test_a_method_without_a_rule_says_so(self):
        class Nothing(LayerFilterAttribution):
            pass

        with pytest.raises(NotImplementedError, match="Nothing has no rule"):
            Nothing(pool_linear(), "1").attribute(images(2), target=0)

    def test_maps_are_kept_when_a_later_batch_needs_them(self):
        class Later(LayerFilterAttribution):
            depends_on_target = False

            def scores_from(self, maps, target):
                small = float(maps.means.abs().sum()) < 1e3
                return maps.means if small else maps.maps.amax(2)

        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True)).eval()
        small, large = images(4), 1e5 * images(4, seed=2)
        labels = torch.arange(4) % 2
        method = Later(model, "0")
        table = method.identify([(small, labels), (large, labels)], num_classes=2, **QUIET)
        maps = model[0](large).detach().amax((2, 3)).double()
        means = model[0](small).detach().mean((2, 3)).double()
        expected = torch.stack(
            [torch.cat([means, maps])[[c, c + 2, c + 4, c + 6]].mean(0) for c in (0, 1)]
        )
        assert torch.allclose(table.scores, expected)
        shared = SharedForward(model, [LayerRequest(model[0])])
        with shared.run((small,), 4):
            pass
        with pytest.raises(MapsNeededError), shared.run((small,), 4) as reading:
            _ = reading.layers[0][0].maps


def test_no_gradient_is_said_by_name():
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                maps = self.relu(self.conv(x))
            return self.head(maps.mean((2, 3)).round())

    model = Frozen().eval()
    for call in (
        lambda: LayerFilterContribution(model, "conv").attribute(images(3), target=0),
        lambda: LayerFilterContribution(model, "conv").identify(batches(), **QUIET),
    ):
        with pytest.raises(ValueError, match="no_grad"):
            call()
    rounded = Net(after=lambda z: z.argmax(1, keepdim=True).float().expand(-1, 3))
    with pytest.raises(ValueError, match=r"No gradient .* reaches the layer 'relu'"):
        LayerFilterContribution(rounded.eval(), "relu").attribute(images(3), target=0)
    assert hooks_of(model) == hooks_of(rounded) == 0


def test_a_model_that_was_read_may_run_again_without_gradients():
    model, x = Net(after=torch.tanh).eval(), images(3)
    shared = SharedForward(model, [LayerRequest(model.relu, derivative=True)])
    slopes = []
    for again in (False, True):
        with shared.run((x,), 3) as reading:
            if again:
                with torch.no_grad():
                    model(2 * x)
            slopes.append(reading.layers[0][0].derivative(0))
    assert torch.equal(*slopes)
    assert slopes[0].abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False])
def test_checkpointed_layers(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = deep()

        def forward(self, x):
            x = checkpoint(nn.Sequential(*list(self.inner)[:2]), x, use_reentrant=reentrant)
            return self.inner.get_submodule("head")(x.mean((2, 3)))

    data = batches()
    plain = LayerFilterContribution(deep(), "stage1").identify(data, **QUIET)
    found = LayerFilterContribution(Checkpointed().eval(), "inner.stage1").identify(data, **QUIET)
    assert torch.allclose(found.scores, plain.scores, atol=1e-7)


def test_nothing_keeps_the_model_alive():
    model = deep()
    alive = weakref.ref(model)
    methods = [
        LayerFilterContribution(model, "stage1"),
        LayerFilterFrequency(model, "stage2", top_k=2),
    ]
    tables = identify_class_filters(methods, batches(), **QUIET)
    methods[0].attribute(images(3), target=0, n_steps=2)
    gc.disable()
    try:
        del model, methods
        assert alive() is None
    finally:
        gc.enable()
    assert len(tables) == 2


@pytest.mark.parametrize("sizes", [(6, 6, 9, 9, 6), (6, 9, 7, 9)])
def test_batches_of_different_image_sizes_are_not_looked_at_as_one(sizes):
    model = pool_linear()
    data = [(images(4, size, seed=i), torch.arange(4) % 3) for i, size in enumerate(sizes)]
    gate = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    for method in (
        LayerClassGate(model, "1", gate),  # depends on the number of positions
        LayerFilterContribution(model, "1"),
        LayerFilterFrequency(model, "1", top_k=2),
    ):
        each = torch.cat(
            [method.filter_scores(method.attribute(x, target=y)) for x, y in data]
        ).double()
        labels = torch.cat([y for _, y in data])
        expected = torch.stack([each[labels == c].mean(0) for c in range(3)])
        assert torch.allclose(method.identify(data, **QUIET).scores, expected, atol=1e-5)


class Clamped(nn.Module):
    """Linear in its maps' means until these are large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)).clamp(max=1.0))


@pytest.mark.parametrize("large", [{4}, {1}, {1, 4}, {10}])
def test_blocks_that_break_the_relation_lose_no_image_on_an_accelerator(large):
    data = [
        ((20 if i in large else 0.01) * images(4, seed=i), (torch.arange(4) + i) % 3)
        for i in range(11)
    ]
    x, y = joined(data)
    model = Clamped().eval()
    each = LayerGradientXActivation(model, model.conv).attribute(x, target=y).sum((2, 3)).double()
    expected = torch.stack([each[y == c].mean(0) for c in range(3)])
    with pretend("meta") as device:
        method = LayerFilterContribution(Clamped().eval().to(device), "conv")
        table = method.identify(data, **QUIET)
    assert table.counts.tolist() == torch.bincount(y).tolist()
    assert torch.allclose(table.scores, expected, atol=1e-5)
    assert table.provenance["exact"] is False


def test_directions_of_a_layers_input_are_refused_whatever_its_width():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 3)).eval()
    method = LayerSingularDirection(model, "0")
    with pytest.raises(ValueError, match=r"outputs|output"):
        method.identify(batches(), attribute_to_layer_input=True, **QUIET)


def test_a_tensor_of_a_layer_that_is_not_used_has_no_share():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.a(x), self.b(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.head = Pair(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.pair(x)[0].relu().amax((2, 3)))

    model, x = Net(), torch.rand(4, 3, 5, 2)
    used, unused = LayerFilterContribution(model, "pair").attribute(x, target=1)
    assert torch.equal(used, LayerFilterContribution(model, "pair.a").attribute(x, target=1))
    assert unused.shape == (4, 2, 5, 2)
    assert not unused.any()
