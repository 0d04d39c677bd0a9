"""Evidence of single images, against explicit formulas and against Captum."""

import pytest
import torch
from captum.attr import (
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerFeatureAblation,
    LayerGradientXActivation,
    NoiseTunnel,
)
from captum.attr import visualization as viz
from captum.attr._utils.approximation_methods import SUPPORTED_METHODS
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_classfilters import (
    ClassFilters,
    ClassFilterSaliency,
    FilterGate,
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerSingularDirection,
)
from captum_classfilters.attr.layer_filter_frequency import strongest
from tests.models import (
    ChannelsLast,
    Reused,
    TwoInputs,
    TwoTensors,
    deep,
    hooks_of,
    images,
    made_in_inference_mode,
    pool_linear,
)


def chosen(model_filters: int, number: int, classes: int = 3) -> ClassFilters:
    scores = torch.rand(classes, model_filters, generator=torch.Generator().manual_seed(3))
    return ClassFilters(scores, counts=torch.ones(classes)).select(number)


class TestFrequency:
    def test_votes_of_an_image(self):
        layer = nn.Identity()
        maps = torch.tensor([[1.0, 5.0, 3.0, 4.0]])[:, :, None, None].expand(1, 4, 2, 3)
        votes = LayerFilterFrequency(nn.Sequential(layer), layer, top_k=2)
        attributions = votes.attribute(maps)
        assert attributions.shape == (1, 4, 2, 3)
        assert votes.filter_scores(attributions)[0].tolist() == pytest.approx([0, 1, 0, 1])
        # Each vote is spread evenly.
        assert torch.allclose(attributions[0, 1], torch.full((2, 3), 1 / 6))

    def test_ties_go_to_the_lower_filter(self):
        assert strongest(torch.tensor([[2.0, 2.0, 2.0, 1.0]]), 2).tolist() == [
            [True, True, False, False]
        ]

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10_000), st.data())
    def test_every_image_has_top_k_votes_for_its_largest(self, n, k, seed, data):
        top_k = data.draw(st.integers(1, k))
        values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
        votes = strongest(values, top_k)
        assert (votes.sum(1) == top_k).all()
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(strongest(values[:, order], top_k), votes[:, order])
        if top_k < k:
            least_chosen = values.masked_fill(~votes, float("inf")).min(1).values
            best_left = values.masked_fill(votes, -float("inf")).max(1).values
            assert (least_chosen >= best_left).all()

    def test_top_k_beyond_the_filters(self):
        model = pool_linear(filters=4)
        with pytest.raises(ValueError, match="larger than the 4 filters"):
            LayerFilterFrequency(model, "1", top_k=5).attribute(images())
        with pytest.raises(ValueError, match="at least 1"):
            LayerFilterFrequency(model, "1", top_k=0)


class TestContribution:
    def test_exact_at_pool_and_linear(self):
        model, x = pool_linear(), images()
        method = LayerFilterContribution(model, "1")
        attributions, delta = method.attribute(x, target=2, return_convergence_delta=True)
        means = model[1](model[0](x)).mean((2, 3))
        scores = method.filter_scores(attributions)
        assert torch.allclose(
            scores, (means * model.get_parameter("4.weight")[2]).detach(), atol=1e-6
        )
        logit = model(x)[:, 2] - model.get_parameter("4.bias")[2]
        assert torch.allclose(scores.sum(1), logit, atol=1e-5)
        assert delta.shape == (8,)
        assert delta.abs().max() < 1e-5

    def test_closed_form_needs_no_gradient(self, monkeypatch):
        def refuse(*_args, **_kwargs):
            raise RuntimeError("a gradient was asked for")

        monkeypatch.setattr(torch.autograd, "grad", refuse)
        LayerFilterContribution(pool_linear(), "1").attribute(images(), target=0)

    def test_equals_captums_ablation_of_each_filter(self):
        model, x = pool_linear(), images()
        target = torch.arange(8) % 3
        method = LayerFilterContribution(model, model[1])
        scores = method.filter_scores(method.attribute(x, target=target))
        mask = torch.arange(6).reshape(1, 6, 1, 1)
        ablated = LayerFeatureAblation(model, model[1]).attribute(x, target=target, layer_mask=mask)
        assert torch.allclose(scores, ablated[:, :, 0, 0], atol=1e-5)

    def test_inner_layer_is_captums_gradient_times_activation(self):
        model, x = deep(), images()
        ours = LayerFilterContribution(model, model.stage1).attribute(x, target=1)
        theirs = LayerGradientXActivation(model, model.stage1).attribute(x, target=1)
        assert torch.allclose(ours, theirs, atol=1e-6)

    def test_path_through_gate_space_closes_the_gap(self):
        model, x = deep(), images()
        method = LayerFilterContribution(model, "stage1")
        _, missing = method.attribute(x, target=1, return_convergence_delta=True)
        integrated, delta = method.attribute(
            x, target=1, n_steps=200, return_convergence_delta=True
        )
        assert missing.abs().max() > 1e-2
        assert delta.abs().max() < 0.05 * missing.abs().max()
        gate = FilterGate(model, "stage1")
        theirs = IntegratedGradients(gate).attribute(
            gate.ones(8), target=1, additional_forward_args=x, n_steps=200
        )
        assert torch.allclose(method.filter_scores(integrated), theirs.float(), atol=1e-4)

    @pytest.mark.parametrize("layer", ["stage1", "stage2"])
    @pytest.mark.parametrize("method", SUPPORTED_METHODS)
    def test_every_way_to_integrate_is_captums(self, method, layer):
        """Some begin where all filters are gone, and all need derivatives there."""
        model, x = deep(), images()
        ours = LayerFilterContribution(model, layer)
        path = {"target": 1, "n_steps": 3, "method": method}
        found = ours.filter_scores(ours.attribute(x, **path))
        gate = FilterGate(model, layer)
        theirs = IntegratedGradients(gate).attribute(
            gate.ones(8), additional_forward_args=x, **path
        )
        assert torch.allclose(found, theirs.float(), atol=1e-6)

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.insert(2, nn.Threshold(0.3, 0.0)),  # not linear, and still (N, K, H, W)
            lambda m: m.append(nn.Softmax(1)),
            lambda m: m.append(nn.Linear(3, 3)),
            lambda m: m.insert(3, nn.Sigmoid()),
        ],
    )
    def test_closed_form_is_not_used_where_it_is_wrong(self, change):
        model = pool_linear()
        change(model)
        x = images()
        ours = LayerFilterContribution(model, model[1]).attribute(x, target=0)
        theirs = LayerGradientXActivation(model, model[1]).attribute(x, target=0)
        assert torch.allclose(ours, theirs, atol=1e-6)

    def test_head_used_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 3)

            def forward(self, x):
                return self.head(self.head(self.conv(x).mean((2, 3))))

        torch.manual_seed(0)
        model, x = Twice(), images()
        ours = LayerFilterContribution(model, "conv").attribute(x, target=0)
        theirs = LayerGradientXActivation(model, model.conv).attribute(x, target=0)
        assert torch.allclose(ours, theirs, atol=1e-6)

    def test_flattening_head(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
        x = images()
        method = LayerFilterContribution(model, "1")
        attributions, delta = method.attribute(x, target=1, return_convergence_delta=True)
        theirs = LayerGradientXActivation(model, model[1]).attribute(x, target=1)
        assert torch.allclose(attributions, theirs, atol=1e-6)
        assert delta.abs().max() < 1e-5

    def test_layout_does_not_matter(self):
        model, x = pool_linear(), images()
        last = ChannelsLast(model).eval()
        first = LayerFilterContribution(model, "1")
        other = LayerFilterContribution(last, "transpose", channel_dim=-1)
        maps = other.attribute(x, target=1)
        assert maps.shape == (8, 4, 4, 6)
        expected = first.filter_scores(first.attribute(x, target=1))
        assert torch.allclose(other.filter_scores(maps), expected, atol=1e-6)


TARGETS = [
    1,
    torch.tensor(1),
    torch.tensor([1]),
    (1,),
    [0, 1, 2, 0, 1, 2, 0, 1],
    torch.arange(8) % 3,
    [(index % 3,) for index in range(8)],
]


@pytest.mark.parametrize("layer", ["stage1", "stage2"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: type(target).__name__)
def test_all_target_forms(layer, target):
    model, x = deep(), images()
    if isinstance(target, (list, torch.Tensor)) and not isinstance(target, tuple):
        each = list(target) if not isinstance(target, torch.Tensor) else target.reshape(-1).tolist()
        each = each * 8 if len(each) == 1 else each
    else:
        each = [target] * 8
    method = LayerFilterContribution(model, layer)
    together = method.attribute(x, target=target)
    for index, one in enumerate(each):
        alone = method.attribute(x[index : index + 1], target=one)
        assert torch.allclose(together[index], alone[0], atol=1e-5)


def class_saliency(model, **options):
    return ClassFilterSaliency(model, "conv", chosen(4, 2), **options)


GRADIENTS = {
    "contribution": lambda model: LayerFilterContribution(model, "conv"),
    "directions": lambda model: LayerSingularDirection(model, "conv", evidence="contribution"),
    "saliency": class_saliency,
    "saliency maps": lambda model: class_saliency(model, mode="activation_map"),
    "ablation": lambda model: LayerFilterAblation(model, "conv"),
    "class gate": lambda model: LayerClassGate(model, "conv", torch.arange(12.0).reshape(3, 4)),
}


@pytest.mark.parametrize("around", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", GRADIENTS)
def test_arguments_made_in_inference_mode(name, around):
    left, right, _ = images(24).split(8)
    arguments = {
        "inputs": (left, right),
        "target": torch.arange(8) % 3,
        "additional_forward_args": torch.linspace(1, 2, 8)[:, None],
    }
    if name.startswith("saliency"):
        arguments |= {"baselines": (right, left), "n_steps": 3}
    method = GRADIENTS[name](TwoInputs())
    expected = method.attribute(**arguments)
    for made in ([argument] for argument in arguments):
        with around():
            found = method.attribute(
                **{k: made_in_inference_mode(v) if k in made else v for k, v in arguments.items()}
            )
        for own, plain in zip(found, expected, strict=True):
            assert torch.equal(own, plain)


class TestContract:
    METHODS = (
        lambda model, layer: LayerFilterFrequency(model, layer, top_k=2),
        LayerFilterContribution,
    )

    @pytest.mark.parametrize("make", METHODS)
    @pytest.mark.parametrize("layer", ["stage1", "stage2", "head"])
    def test_output_is_shaped_like_the_layer_detached_and_contiguous(self, make, layer):
        model = deep()
        attributions = make(model, layer).attribute(images(), target=0)
        shapes = {"stage1": (8, 4, 6, 6), "stage2": (8, 6, 6, 6), "head": (8, 3)}
        assert attributions.shape == shapes[layer]
        assert not attributions.requires_grad
        assert attributions.is_contiguous()

    @pytest.mark.parametrize("make", METHODS)
    def test_hooks_go_after_success_and_after_failure(self, make):
        model = deep()
        method = make(model, "stage1")
        method.attribute(images(), target=0)
        assert hooks_of(model) == 0
        if isinstance(method, LayerFilterContribution):
            for layer in ("stage1", "stage2"):
                with pytest.raises(AssertionError):
                    LayerFilterContribution(model, layer).attribute(images(), target=(9999,) * 20)
        vars(model.stage2[0])["forward"] = None  # makes the forward pass fail
        with pytest.raises(TypeError):
            method.attribute(images(), target=0)
        assert hooks_of(model) == 0

    @pytest.mark.parametrize("make", METHODS)
    def test_layer_input(self, make):
        model, x = deep(), images()
        at_input = make(model, "stage2").attribute(x, target=1, attribute_to_layer_input=True)
        at_output = make(model, "stage1").attribute(x, target=1)
        assert torch.allclose(at_input, at_output, atol=1e-6)

    @pytest.mark.parametrize("make", METHODS)
    def test_head_input_is_exact(self, make):
        model, x = deep(), images()
        method = make(model, "head")
        attributions = method.attribute(x, target=1, attribute_to_layer_input=True)
        assert attributions.shape == (8, 6)

    @pytest.mark.parametrize("make", METHODS)
    def test_several_inputs_and_further_arguments(self, make):
        model = TwoInputs().eval()
        method = make(model, "conv")
        inputs = (images(seed=1), images(seed=2))
        attributions = method.attribute(inputs, target=0, additional_forward_args=2.0)
        assert attributions.shape == (8, 4, 4, 4)

    @pytest.mark.parametrize("make", METHODS)
    def test_layer_of_several_tensors(self, make):
        model = TwoTensors().eval()
        attributions = make(model, "split").attribute(images(), target=0)
        assert [part.shape[1] for part in attributions] == [2, 3]

    @pytest.mark.parametrize("make", METHODS)
    def test_list_of_layers(self, make):
        model, x = deep(), images()
        several = make(model, ["stage1", "stage2"]).attribute(x, target=0)
        assert isinstance(several, list)
        for one, layer in zip(several, ("stage1", "stage2"), strict=True):
            assert torch.allclose(one, make(model, layer).attribute(x, target=0), atol=1e-6)

    @pytest.mark.parametrize("make", METHODS)
    def test_forward_functions_that_are_not_modules(self, make):
        model, x = deep(), images()
        expected = make(model, model.stage2).attribute(x, target=0)
        for forward in (model.forward, lambda inputs: model(inputs), nn.DataParallel(model)):
            found = make(forward, model.stage2).attribute(x, target=0)
            assert torch.allclose(found, expected, atol=1e-6)

    @pytest.mark.parametrize("make", METHODS)
    def test_frozen_parameters_and_no_grad(self, make):
        model, x = deep(), images()
        expected = make(model, "stage1").attribute(x, target=0)
        model.requires_grad_(False)
        with torch.no_grad():
            found = make(model, "stage1").attribute(x, target=0)
        assert torch.allclose(found, expected)

    @pytest.mark.parametrize("make", METHODS)
    def test_half_precision_and_double(self, make):
        for dtype in (torch.bfloat16, torch.float64):
            model, x = deep().to(dtype), images().to(dtype)
            assert make(model, "stage2").attribute(x, target=0).dtype == dtype

    @pytest.mark.parametrize("make", METHODS)
    def test_noise_tunnel_without_noise_changes_nothing(self, make):
        model, x = deep(), images()
        method = make(model, "stage2")
        smooth = NoiseTunnel(method).attribute(x, target=[0, 1] * 4, nt_samples=3, stdevs=0.0)
        assert torch.allclose(smooth, method.attribute(x, target=[0, 1] * 4), atol=1e-6)

    def test_noise_tunnel_passes_deltas(self):
        method = LayerFilterContribution(deep(), "stage2")
        _, delta = NoiseTunnel(method).attribute(
            images(), target=1, nt_samples=2, return_convergence_delta=True
        )
        assert delta.shape == (16,)

    def test_interpolates_and_names_itself(self):
        method = LayerFilterContribution(deep(), "stage2")
        attributions = method.attribute(images(), target=0)
        assert LayerAttribution.interpolate(attributions, (12, 12)).shape == (8, 6, 12, 12)
        assert method.get_name() == "Layer Filter Contribution"
        assert method.has_convergence_delta()
        assert method.multiplies_by_inputs

    @pytest.mark.parametrize("make", METHODS)
    def test_layers_that_run_twice_or_never(self, make):
        model = Reused()
        with pytest.raises(ValueError, match=r"'relu' was reached 2 times"):
            make(model, "relu").attribute(images(), target=0)
        with pytest.raises(ValueError, match="'unused' was never reached"):
            make(model, "unused").attribute(images(), target=0)

    def test_outputs_of_more_dimensions(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
        x = images()
        ours = LayerFilterContribution(model, "1").attribute(x, target=(1, 2, 2))
        theirs = LayerGradientXActivation(model, model[1]).attribute(x, target=(1, 2, 2))
        assert torch.allclose(ours, theirs, atol=1e-6)


class TestSaliency:
    def test_with_every_filter_it_is_captums_input_explanation(self):
        model, x = deep(), images()
        everything = ClassFilterSaliency(model, "stage2", chosen(6, 6))
        target = torch.arange(8) % 3
        assert torch.allclose(
            everything.attribute(x, target=target),
            InputXGradient(model).attribute(x, target=target),
            atol=1e-6,
        )
        assert torch.allclose(
            everything.attribute(x, baselines=0.5, target=target, n_steps=40),
            IntegratedGradients(model).attribute(x, 0.5, target=target, n_steps=40).float(),
            atol=1e-5,
        )

    def test_shares_of_disjoint_sets_add_up(self):
        model, x = deep(), images()
        table = chosen(6, 2)
        rest = table.with_selection(~table.selected)
        parts = [
            ClassFilterSaliency(model, "stage2", one).attribute(x, target=1)
            for one in (table, rest)
        ]
        whole = InputXGradient(model).attribute(x, target=1)
        assert torch.allclose(parts[0] + parts[1], whole, atol=1e-6)
        assert parts[0].abs().sum() > 0
        assert not torch.allclose(parts[0], whole)

    def test_each_image_uses_its_own_classs_filters(self):
        model, x = deep(), images()
        method = ClassFilterSaliency(model, "stage2", chosen(6, 2))
        together = method.attribute(x, target=[0, 1] * 4)
        for index in range(8):
            alone = method.attribute(x[index : index + 1], target=index % 2)
            assert torch.allclose(together[index], alone[0], atol=1e-6)

    def test_map_is_the_sum_of_the_class_filters_contributions(self):
        model, x = pool_linear(), images()
        table = chosen(6, 2)
        maps = ClassFilterSaliency(model, "1", table, mode="activation_map").attribute(x, target=2)
        contributions = LayerFilterContribution(model, "1").attribute(x, target=2)
        expected = contributions[:, table.filters_of(2)].sum(1, keepdim=True)
        expected = nn.functional.interpolate(
            expected, size=(6, 6), mode="bilinear", align_corners=False
        )
        assert torch.allclose(maps.sum(1, keepdim=True), expected, atol=1e-6)

    def test_maps_are_integrated_as_the_contributions_are(self):
        model, x, table = deep(), images(), chosen(4, 2)
        path = {"n_steps": 3, "method": "riemann_left"}
        maps = ClassFilterSaliency(model, "stage1", table, mode="activation_map").attribute(
            x, target=1, **path
        )
        contribution = LayerFilterContribution(model, "stage1")
        expected, other = (
            contribution.attribute(x, target=1, **options)[:, table.filters_of(1)].sum(1)
            for options in (path, {"n_steps": 3})
        )
        assert torch.allclose(maps.sum(1), expected, atol=1e-6)
        assert not torch.allclose(expected, other, atol=1e-3)

    @pytest.mark.parametrize("mode", ["input_gradient", "activation_map"])
    def test_goes_straight_into_captums_tools(self, mode):
        model, x = deep(), images()
        method = ClassFilterSaliency(model, "stage2", chosen(6, 2), mode=mode)
        attributions = method.attribute(x, target=1)
        assert attributions.shape == x.shape
        assert attributions.is_contiguous()
        figure, _ = viz.visualize_image_attr(
            attributions[0].permute(1, 2, 0).numpy(), sign="all", use_pyplot=False
        )
        assert figure is not None

        @infidelity_perturb_func_decorator(True)
        def drop(inputs):
            return inputs * (torch.rand_like(inputs) > 0.3)

        assert infidelity(model, drop, x, attributions, target=1).shape == (8,)
        assert sensitivity_max(method.attribute, x, target=[0, 1] * 4).shape == (8,)
        smooth = NoiseTunnel(method).attribute(x, nt_type="smoothgrad_sq", target=1, nt_samples=2)
        assert smooth.shape == x.shape
        assert hooks_of(model) == 0

    def test_several_inputs(self):
        model = TwoInputs().eval()
        inputs = (images(seed=1), images(seed=2))
        method = ClassFilterSaliency(model, "conv", chosen(4, 2))
        left, right = method.attribute(inputs, target=0)
        assert left.shape == right.shape == inputs[0].shape
        plain = ClassFilterSaliency(model, "conv", chosen(4, 2), multiply_by_inputs=False)
        left, right = plain.attribute(inputs, target=0)
        assert torch.allclose(left, right, atol=1e-6)  # the model sees their sum

    def test_inputs_keep_their_requires_grad(self):
        model, x = deep(), images()
        ClassFilterSaliency(model, "stage2", chosen(6, 2)).attribute(x, target=1)
        assert not x.requires_grad
        assert x.grad is None

    def test_bad_input(self):
        model = deep()
        table = chosen(6, 2)
        with pytest.raises(ValueError, match="selects no filters"):
            ClassFilterSaliency(model, "stage2", ClassFilters(table.scores, table.counts))
        with pytest.raises(ValueError, match="mode='cam'"):
            ClassFilterSaliency(model, "stage2", table, mode="cam")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"4 filters, but .* with 6"):
            ClassFilterSaliency(model, "stage1", table).attribute(images(), target=0)
        one_class = table.with_selection(table.selected & torch.tensor([[True], [False], [True]]))
        with pytest.raises(ValueError, match=r"target class\(es\) 1"):
            ClassFilterSaliency(model, "stage2", one_class).attribute(images(), target=1)
        with pytest.raises(ValueError, match="needs a layer with positions"):
            ClassFilterSaliency(model, "flatten", table, mode="activation_map").attribute(
                images(), target=0
            )

    def test_a_layer_without_gradients_beside_a_way_that_has_some(self):
        class Beside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 3)

            def forward(self, x):
                with torch.no_grad():
                    maps = self.conv(x)
                return self.head(maps.mean((2, 3))) + x.mean((1, 2, 3))[:, None]

        method = ClassFilterSaliency(Beside(), "conv", chosen(6, 2))
        with pytest.raises(ValueError, match="No gradient flows from the output through the layer"):
            method.attribute(images(), target=1)

    def test_rows_have_no_places_for_a_map(self):
        model = nn.Sequential(nn.Unflatten(1, (2, 3, 4)), *pool_linear())
        method = ClassFilterSaliency(model, "1", chosen(6, 2), mode="activation_map")
        with pytest.raises(ValueError, match=r"shape \(2, 24\).*\(1, 2\)\. Use mode='input_grad"):
            method.attribute(torch.rand(2, 24), target=0)
