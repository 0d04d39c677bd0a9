"""Layers with a forward of their own: those that compute their weight are told from all others."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from torch.nn.utils import prune

from captum_classfilters._core.filter_weights import filter_weights, reading_weights
from captum_classfilters._core.linear_maps import run_with_weight, why_not_its_weight
from captum_classfilters.spectral import (
    FactoredLayer,
    factor_layer,
    layer_svd,
    model_svd,
    weight_matrix,
)
from tests.models import hooks_of, known
from tests.pretend_device import pretend


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 1.01 * weight, bias)


class Rectified(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Masked(nn.Conv2d):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.mask: Tensor
        self.register_buffer("mask", torch.arange(self.weight.numel()).view_as(self.weight) % 2)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight))


class Adapted(nn.Linear):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.down = nn.Parameter(0.1 * torch.randn(2, self.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(self.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.5


class Silent(nn.Linear):
    def forward(self, x):
        return 0 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Same(nn.Conv2d):
    """TensorFlow's padding: more at the end, and none that the layer declares."""

    def forward(self, x):
        for axis in (-1, -2):
            size, stride, reach = x.shape[axis], self.stride[axis], self.kernel_size[axis]
            more = max((-(-size // stride) - 1) * stride + reach - size, 0)
            around = (more // 2, more - more // 2)
            x = F.pad(x, around if axis == -1 else (0, 0, *around))
        return super().forward(x)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Dropped(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


def own(kind):
    """The same layer with a forward that is not PyTorch's."""

    class Own(kind):  # type: ignore[misc, valid-type]
        def forward(self, *inputs):
            return super().forward(*inputs)

    return Own


def quantization_aware(kind, *arguments):
    config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(*arguments, qconfig=config)


def instance_forward():
    layer = nn.Conv2d(3, 4, 3)
    vars(layer)["forward"] = lambda x: F.conv2d(x, 2 * layer.weight, layer.bias)
    return layer


OTHERS = {
    "standardized": lambda: Standardized(3, 4, 3),
    "scaled": lambda: Scaled(3, 4, 3),
    "rectified": lambda: Rectified(3, 4, 3),
    "masked": lambda: Masked(3, 4, 3),
    "cosine": lambda: Cosine(5, 3),
    "adapted": lambda: Adapted(5, 3),
    "shifted": lambda: Shifted(5, 3),
    "shifted without bias": lambda: Shifted(5, 3, bias=False),
    "silent": lambda: Silent(5, 3),
    "pair": lambda: Pair(5, 3),
    "quantized": lambda: quantization_aware(torch.ao.nn.qat.Conv2d, 3, 4, 3),
    "quantized linear": lambda: quantization_aware(torch.ao.nn.qat.Linear, 5, 3),
    "instance": instance_forward,
}
THEIR_WEIGHT = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "own": lambda: own(nn.Conv2d)(3, 4, 3, padding=1, stride=2),
    "groups": lambda: own(nn.Conv2d)(4, 6, (3, 2), groups=2, padding=(1, 0), bias=False),
    "reflect": lambda: own(nn.Conv2d)(3, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: own(nn.Conv2d)(3, 4, 5, padding=2, padding_mode="circular"),
    "replicate": lambda: own(nn.Conv2d)(3, 4, 5, padding=2, stride=3, padding_mode="replicate"),
    "same": lambda: own(nn.Conv2d)(3, 4, 5, padding="same", dilation=2),
    "volume": lambda: own(nn.Conv3d)(2, 3, (1, 2, 3), stride=(1, 2, 1)),
    "long": lambda: own(nn.Conv1d)(1, 4, 80, stride=30),
    "pointwise": lambda: own(nn.Conv2d)(1, 1, 1, stride=2, bias=False),
    "transposed": lambda: own(nn.ConvTranspose2d)(
        4, 6, 3, stride=2, padding=1, output_padding=1, groups=2
    ),
    "linear": lambda: own(nn.Linear)(5, 3),
    "dropped": lambda: Dropped(5, 3),
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 9),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "weight norm by hook": lambda: nn.utils.weight_norm(nn.ConvTranspose1d(3, 4, 3)),
    "spectral norm by hook": lambda: nn.utils.spectral_norm(nn.Linear(5, 3)),
}
OWN_PADDING = {
    "tensorflow": lambda: Same(3, 4, 3, stride=2),
    "wide": lambda: Same(3, 4, (5, 3), stride=(3, 1)),
    "causal": lambda: Causal(3, 4, 3, dilation=2),
}
TYPES = (torch.float32, torch.float64, torch.bfloat16)


def made(recipe, dtype=torch.float32):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks that PyTorch replaced by parametrizations
        return recipe().to(dtype)


@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("name", OTHERS)
def test_other_maps_are_refused(name, dtype):
    layer = made(OTHERS[name], dtype)
    assert why_not_its_weight(layer)
    with pytest.raises(ValueError, match="cannot be decomposed by its weight: "):
        layer_svd(layer)
    with pytest.raises(ValueError, match="cannot be decomposed by its weight: "):
        factor_layer(nn.Sequential(layer), "0")
    model = nn.Sequential(nn.Linear(4, 3), layer)
    svds = model_svd(model)
    assert list(svds) == ["0"]
    assert svds.skipped["1"] == why_not_its_weight(layer)
    assert "1 skipped" in repr(svds)
    with pytest.raises(KeyError, match="'1' was skipped: "):
        svds["1"]
    with pytest.raises(ValueError, match=r"'1' cannot be decomposed"):
        model_svd(model, ["0", "1"])
    with pytest.raises(ValueError, match=r"no convolution or linear layer to decompose\. '0': "):
        model_svd(nn.Sequential(layer))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("recipe", [*THEIR_WEIGHT.values(), *OWN_PADDING.values()])
def test_their_weight_is_taken(recipe, dtype):
    assert why_not_its_weight(made(recipe, dtype)) is None


def inputs_for(layer):
    sizes = {1: (97,), 2: (9, 10), 3: (4, 5, 6)}
    if isinstance(layer, nn.Linear):
        return torch.randn(4, layer.in_features)
    return torch.randn(2, layer.in_channels, *sizes[len(layer.kernel_size)])


@pytest.mark.parametrize("recipe", [*THEIR_WEIGHT.values(), *OWN_PADDING.values()])
def test_the_decomposition_is_of_what_the_layer_computes(recipe):
    layer = made(recipe).eval()
    x, svd = inputs_for(layer), layer_svd(layer)
    with torch.no_grad():
        y = layer(x)
        bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (y.dim() - 2))
        signals = svd.signals(y - bias)
        torch.testing.assert_close(svd.signals_from_input(layer, x), signals, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", THEIR_WEIGHT.values())
def test_the_factored_layer_is_equal(recipe):
    layer = made(recipe).eval()
    x = inputs_for(layer)
    with torch.no_grad():
        torch.testing.assert_close(FactoredLayer(layer)(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("recipe", OWN_PADDING.values())
def test_a_padding_of_its_own_cannot_be_factored(recipe, rank):
    with pytest.raises(ValueError, match="a padding of its own for example"):
        FactoredLayer(made(recipe), rank)


@pytest.mark.parametrize("recipe", [*OTHERS.values(), *THEIR_WEIGHT.values()])
def test_the_layer_is_left_as_found(recipe):
    layer = made(recipe).train()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x, hooks, random = inputs_for(layer), hooks_of(layer), torch.get_rng_state()
    if why_not_its_weight(layer) is None:
        svd = layer_svd(layer)
        layer.eval()
        svd.signals_from_input(layer, x)
        layer.train()
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert layer.training
    assert hooks_of(layer) == hooks
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("recipe", [OTHERS["adapted"], *THEIR_WEIGHT.values()])
def test_hooks_of_the_user_are_not_called(recipe):
    """They would record numbers that no forward pass of the user's made."""
    layer, seen = made(recipe), []
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    if "weight" not in vars(layer):  # else they run beside those that derive it
        layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    reason = why_not_its_weight(layer)
    assert (reason is None) == (recipe is not OTHERS["adapted"])
    if reason is None:
        svd = layer_svd(layer)
        svd.signals_from_input(layer, inputs_for(layer))
        FactoredLayer(layer)
        model_svd(nn.Sequential(layer))["0"]
    assert not seen


def test_a_derived_weight_of_another_type():
    for name in ("pruned", "weight norm by hook", "spectral norm by hook"):
        layer = made(THEIR_WEIGHT[name]).double()  # `.to` leaves the weight itself as it was
        assert weight_matrix(layer).matrices.dtype == torch.float64
        x = inputs_for(layer).double()
        torch.testing.assert_close(FactoredLayer(layer.eval())(x), layer(x))


def test_a_derived_weight_is_the_one_in_use():
    """Hooks renew it only when the layer runs; until then it is that of the last run."""
    layer = made(THEIR_WEIGHT["weight norm by hook"])
    with torch.no_grad():
        layer.weight_g.mul_(3)
    stale = layer.weight.detach().clone()
    values = layer_svd(layer).values
    layer(torch.randn(1, 3, 9))
    assert not torch.equal(stale, layer.weight)
    torch.testing.assert_close(layer_svd(layer).values, values)
    pruned = made(THEIR_WEIGHT["pruned"])
    pruned.load_state_dict({key: 2 * value for key, value in pruned.state_dict().items()})
    fresh = (pruned.weight_orig * pruned.weight_mask).flatten(1)
    torch.testing.assert_close(layer_svd(pruned).values, torch.linalg.svdvals(fresh.detach()))


def test_a_large_bias_does_not_hide_another_map():
    layer = made(OTHERS["scaled"])
    layer.bias.data += 100
    assert why_not_its_weight(layer)
    layer = made(THEIR_WEIGHT["own"])
    layer.bias.data += 100
    assert why_not_its_weight(layer) is None
    layer.bias.data += 1e9
    assert why_not_its_weight(layer) == (
        "what its forward makes of its weight is too small to be seen beside its bias"
    )


def test_a_forward_that_cannot_be_tried():
    class Picky(nn.Linear):
        def forward(self, x, scale):  # type: ignore[override]
            return scale * super().forward(x)

    reason = why_not_its_weight(Picky(3, 2))
    assert known(reason).startswith("its forward cannot be tried on random numbers (TypeError: ")


DERIVED = {
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 20),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm by hook": nn.utils.weight_norm,
    "spectral norm by hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", DERIVED)
def test_filters_have_the_weights_of_inference(kind, training):
    torch.manual_seed(1)
    saved, loaded = (made(lambda: DERIVED[kind](nn.Conv2d(3, 4, (3, 2)))) for _ in range(2))
    with torch.no_grad():
        for parameter in saved.parameters():  # as training would leave them
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    loaded.load_state_dict(saved.state_dict())
    loaded.train(training)
    own, read = known(filter_weights(loaded)), known(reading_weights(loaded))
    saved.eval()(torch.randn(1, 3, 5, 6))
    torch.testing.assert_close(own, saved.weight.detach())
    torch.testing.assert_close(read, saved.weight.detach().transpose(0, 1))
    assert loaded.training == training
    state = saved.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_layers_without_numbers_are_not_run():
    assert why_not_its_weight(own(nn.Conv2d)(3, 4, 3, device="meta")) is None
    lazy = nn.LazyConv2d(4, 3)
    assert why_not_its_weight(lazy) is None
    assert lazy.has_uninitialized_params()


def test_a_model_with_a_derived_weight_elsewhere_is_factored():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), made(THEIR_WEIGHT["pruned"])).eval()
    x = torch.randn(2, 2, 9, 8)
    expected = model(x)  # the derived weight is now the result of a computation
    for name in ("0", "1"):
        torch.testing.assert_close(factor_layer(model, name)(x), expected, atol=1e-5, rtol=1e-4)


def test_run_with_weight_of_another_number_of_filters():
    layer = made(THEIR_WEIGHT["transposed"])
    weight = torch.randn(4, 5, 3, 3)
    x = inputs_for(layer)
    expected = F.conv_transpose2d(x, weight, None, stride=2, padding=1, output_padding=1, groups=2)
    torch.testing.assert_close(run_with_weight(layer, weight, x), expected)


@pytest.mark.parametrize("recipe", [*OTHERS.values(), *THEIR_WEIGHT.values()])
def test_on_an_accelerator(recipe):
    plain = made(recipe).eval()
    reason, x = why_not_its_weight(plain), inputs_for(plain)
    with pretend("cuda") as device:
        layer = made(recipe).eval().to(device)
        assert (why_not_its_weight(layer) is None) == (reason is None)
        if reason is None:
            signals = layer_svd(layer).signals_from_input(layer, x.to(device)).cpu()
            expected = layer_svd(plain).signals_from_input(plain, x)
            torch.testing.assert_close(signals, expected, atol=1e-4, rtol=1e-4)
