"""What happens to filters on their way to the layers that read them: followed, or refused by name."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves

from captum_classfilters import ClassScores, prune_filters
from captum_classfilters._core import filter_trace
from captum_classfilters.pruning import prunable_layers
from tests.models import conv_at, hooks_of

CHOICES = ([0], [5], [1, 4], [0, 1, 2])


class Between(nn.Module):
    """A convolution of six filters, a ReLU, something, and what reads it."""

    def __init__(self, between, reader, **modules):
        super().__init__()
        self.conv, self.act, self.between = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), between
        for name, module in modules.items():
            setattr(self, name, module)
        self.reader = reader

    def forward(self, x):
        maps = self.act(self.conv(x))
        module = isinstance(self.between, nn.Module)
        return self.reader(self.between(maps) if module else self.between(self, maps, x))


class Both(nn.Module):
    """Logits and what they were made from."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 2)

    def forward(self, maps):
        return {"logits": self.head(maps.mean((2, 3))), "maps": maps}


class Faint(nn.Module):
    """A branch that has not learned anything yet."""

    def __init__(self):
        super().__init__()
        self.conv = conv(6)

    def forward(self, maps):
        return 5 + 1e-7 * self.conv(maps)


def conv(inputs, outputs=4, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


def of_maps(function):
    return lambda _net, maps, _x: function(maps)


def swapped(maps):
    left, right = maps.chunk(2, 1)
    return torch.cat([right, left], 1)


def assigned(maps):
    maps = maps.clone()
    maps[:, 0] = 1.0
    return maps


def gate(net, maps, _x):
    return maps * net.up(net.down(maps.mean((2, 3), keepdim=True)).relu()).sigmoid()


def shuffled(maps):
    return maps.view(len(maps), 2, -1, 5, 7).transpose(1, 2).reshape(maps.shape)


# Followed: the smaller network equals the masked one, whatever is removed.
FOLLOWED = {
    "flatten": lambda: Between(nn.Flatten(), nn.Linear(210, 2)),
    "permute and flatten": lambda: Between(
        of_maps(lambda maps: maps.permute(0, 2, 3, 1).flatten(1)), nn.Linear(210, 2)
    ),
    "transpose and flatten": lambda: Between(
        of_maps(lambda maps: maps.transpose(1, 2).flatten(1)), nn.Linear(210, 2)
    ),
    "last axis": lambda: Between(of_maps(lambda maps: maps.movedim(1, -1)), nn.Linear(6, 2)),
    "roll of positions": lambda: Between(of_maps(lambda maps: maps.roll(2, 3)), conv(6)),
    "flip of positions": lambda: Between(of_maps(lambda maps: maps.flip(2)), conv(6)),
    "positions indexed": lambda: Between(of_maps(lambda maps: maps[..., [0, 3, 1]]), conv(6)),
    "positions sliced": lambda: Between(of_maps(lambda maps: maps[:, :, 1:]), conv(6)),
    "cat with the image": lambda: Between(lambda _n, maps, x: torch.cat([x, maps], 1), conv(9)),
    "cat with itself": lambda: Between(of_maps(lambda maps: torch.cat([maps, -maps], 1)), conv(12)),
    "cat and flatten": lambda: Between(
        lambda _n, maps, x: torch.cat([maps, x, maps], 1).flatten(1), nn.Linear(525, 2)
    ),
    "repeat": lambda: Between(of_maps(lambda maps: maps.repeat_interleave(2, 1)), conv(12)),
    "padded filters": lambda: Between(
        of_maps(lambda maps: F.pad(maps, (0, 0, 0, 0, 2, 1))), conv(9)
    ),
    "gate": lambda: Between(gate, conv(6), down=nn.Conv2d(6, 3, 1), up=nn.Conv2d(3, 6, 1)),
    "one attention map": lambda: Between(
        lambda net, maps, _x: maps * net.map(maps).sigmoid(), conv(6), map=conv(6, 1)
    ),
    "product": lambda: Between(
        lambda net, maps, x: maps * net.other(x).sigmoid(), conv(6), other=conv(3, 6)
    ),
    "factors": lambda: Between(
        lambda net, maps, _x: maps * net.scale[:, None, None], conv(6), scale=weight(6)
    ),
    "sum over filters": lambda: Between(of_maps(lambda maps: maps.sum(1, keepdim=True)), conv(1)),
    "unit length": lambda: Between(of_maps(F.normalize), conv(6)),
    "norm of positions": lambda: Between(nn.LayerNorm([5, 7]), conv(6)),
    "instance norm": lambda: Between(nn.InstanceNorm2d(6), conv(6)),
    "resized": lambda: Between(nn.Upsample(scale_factor=2, mode="bilinear"), conv(6)),
    "transposed readers": lambda: Between(
        nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6, bias=False), nn.ConvTranspose2d(6, 4, 3)
    ),
    "no gradients": lambda: Between(of_maps(torch.Tensor.detach), conv(6)),
    "chosen by value": lambda: Between(
        of_maps(lambda maps: torch.where(maps > 0.3, maps, torch.zeros_like(maps))), conv(6)
    ),
}

# Refused, with words of the message.
REFUSED: dict[str, tuple[Any, ...]] = {
    "mixed with positions": (
        lambda: Between(of_maps(lambda maps: maps.reshape(-1, 5, 6, 7)), conv(5)),
        "reshape in the forward pass of Between",
    ),
    "pairs": (
        lambda: Between(of_maps(lambda maps: maps.view(-1, 3, 2, 5, 7).mean(2)), conv(3)),
        "view",
    ),
    "shuffle": (lambda: Between(nn.ChannelShuffle(2), conv(6)), r"'between' \(ChannelShuffle\)"),
    "shuffle by views": (lambda: Between(of_maps(shuffled), conv(6)), "view"),
    "pixel shuffle": (
        lambda: Between(nn.Sequential(nn.Conv2d(6, 8, 1), nn.PixelShuffle(2)), conv(2)),
        r"'between.1' \(PixelShuffle\)",
        "between.0",
    ),
    "pixel unshuffle": (
        lambda: Between(of_maps(lambda maps: F.pixel_unshuffle(maps[..., :4, :6], 2)), conv(24)),
        "pixel_unshuffle",
    ),
    "GLU": (lambda: Between(nn.GLU(1), conv(3)), r"glu in 'between' \(GLU\)"),
    "halves added": (
        lambda: Between(of_maps(lambda maps: sum(maps.chunk(2, 1))), conv(3)),
        "chunk",
    ),
    "halves swapped": (lambda: Between(of_maps(swapped), conv(6)), "chunk"),
    "roll": (lambda: Between(of_maps(lambda maps: maps.roll(1, 1)), conv(6)), "roll"),
    "flip": (lambda: Between(of_maps(lambda maps: maps.flip(1)), conv(6)), "flip"),
    "index_select": (
        lambda: Between(
            of_maps(lambda maps: maps.index_select(1, torch.tensor([2, 0, 1, 3, 5, 4]))), conv(6)
        ),
        "index_select",
    ),
    "indexing": (lambda: Between(of_maps(lambda maps: maps[:, [0, 1, 2]]), conv(3)), "indexing"),
    "slicing": (lambda: Between(of_maps(lambda maps: maps[:, 2:]), conv(4)), "indexing"),
    "one filter as a gate": (
        lambda: Between(of_maps(lambda maps: maps * maps[:, :1].sigmoid()), conv(6)),
        "indexing",
    ),
    "assigned": (lambda: Between(of_maps(assigned), conv(6)), "assigning to parts"),
    "einsum": (
        lambda: Between(
            lambda net, maps, _x: torch.einsum("nkhw,dk->ndhw", maps, net.mix),
            conv(6),
            mix=weight(6, 6),
        ),
        "einsum",
    ),
    "matmul": (
        lambda: Between(
            lambda net, maps, _x: maps.mean((2, 3)) @ net.mix, nn.Linear(6, 2), mix=weight(6, 6)
        ),
        "matmul",
    ),
    "a kernel of its own": (
        lambda: Between(
            lambda net, maps, _x: F.conv2d(maps, net.kernel), conv(6), kernel=weight(6, 6, 1, 1)
        ),
        "conv2d",
    ),
    "maximum over filters": (
        lambda: Between(of_maps(lambda maps: maps / (1 + maps.amax(1, keepdim=True))), conv(6)),
        "amax",
    ),
    "mean over filters": (
        lambda: Between(of_maps(lambda maps: maps.mean(1, keepdim=True)), conv(1)),
        "mean",
    ),
    "softmax over filters": (lambda: Between(nn.Softmax(1), conv(6)), "softmax in 'between'"),
    "layer norm": (lambda: Between(nn.LayerNorm([6, 5, 7]), conv(6)), "'between' mixes"),
    "group norm": (lambda: Between(nn.GroupNorm(3, 6), conv(6)), "'between' mixes"),
    "response norm": (lambda: Between(nn.LocalResponseNorm(3), conv(6)), "'between' mixes"),
    "norm by a function": (
        lambda: Between(of_maps(lambda maps: F.layer_norm(maps, maps.shape[1:])), conv(6)),
        "layer_norm",
    ),
    "pooled filters": (
        lambda: Between(of_maps(lambda maps: F.max_pool3d(maps, (2, 1, 1))), conv(3)),
        "max_pool3d",
    ),
    "groups": (lambda: Between(nn.Identity(), conv(6, 4, groups=2)), "groups of 'reader'"),
    "two filters a group": (
        lambda: Between(nn.Conv2d(6, 12, 3, groups=6), conv(12)),
        "groups of 'between'",
    ),
    "read along a row": (lambda: Between(nn.Identity(), nn.Linear(7, 2)), r"'reader' \(Linear\)"),
    "maps as images": (
        lambda: Between(of_maps(lambda maps: maps.reshape(-1, 1, 5, 7)), conv(1)),
        r"'reader' \(Conv2d\)",
    ),
    "LSTM": (
        lambda: Between(
            lambda net, maps, _x: net.lstm(maps.flatten(1)[:, None])[0],
            nn.Linear(4, 2),
            lstm=nn.LSTM(210, 4, batch_first=True),
        ),
        r"'lstm' \(LSTM\)",
    ),
    "attention": (
        lambda: Between(
            lambda net, maps, _x: net.heads(*[maps.flatten(2).mT] * 3)[0],
            nn.Linear(6, 2),
            heads=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
        r"'heads' \(MultiheadAttention\)",
    ),
    "attention by a function": (
        lambda: Between(
            of_maps(lambda maps: F.scaled_dot_product_attention(*[maps.flatten(2).mT] * 3)),
            nn.Linear(6, 2),
        ),
        "scaled_dot_product_attention",
    ),
    "shared reader": (
        lambda: Between(
            lambda net, maps, _x: net.twice(net.twice(maps).relu()), conv(6), twice=conv(6, 6)
        ),
        "'twice' runs more than once",
    ),
    "shortcut": (
        lambda: Between(lambda net, maps, _x: maps + net.inner(maps), conv(6), inner=conv(6, 6)),
        "tied by a sum to 'inner'",
    ),
    "a constant of fixed size": (
        lambda: Between(
            of_maps(lambda maps: maps * torch.arange(6.0).reshape(1, 6, 1, 1)), conv(6)
        ),
        "mul",
    ),
    "among the outputs": (lambda: Between(nn.Identity(), Both()), "the model's outputs"),
    # What only the smaller network shows.
    "a size in the code": (
        lambda: Between(of_maps(lambda maps: maps.reshape(-1, 210)), nn.Linear(210, 2)),
        r"does not run .* reshape in the forward pass of Between",
    ),
    "a filter count in the code": (
        lambda: Between(of_maps(lambda maps: maps / maps.shape[1]), conv(6)),
        "'reader' would read other values",
    ),
    "a branch on the filter count": (
        lambda: Between(of_maps(lambda maps: maps if maps.shape[1] == 6 else 2 * maps), conv(6)),
        "'reader' would read other values",
    ),
    "around PyTorch": (
        lambda: Between(of_maps(lambda maps: maps * (1 + float(maps.numpy().mean()))), conv(6)),
        "'reader' would read other values",
    ),
    "what the outputs hardly show": (
        lambda: Between(of_maps(lambda maps: maps / maps.shape[1]), Faint()),
        "'reader.conv' would read other values",
    ),
}


def images(seed=0, number=2):
    return torch.randn(number, 3, 5, 7, generator=torch.Generator().manual_seed(seed))


def built(make):
    torch.manual_seed(0)
    return make().eval()


def without(model, x, places, module="act"):
    """The outputs with filters of a module zero, by a plain hook."""
    index = torch.tensor(places)
    handle = model.get_submodule(module).register_forward_hook(
        lambda _module, _inputs, output: output.index_fill(1, index, 0.0)
    )
    with torch.no_grad():
        outputs = model(x)
    handle.remove()
    return outputs


def state_of(model):
    """The tensors of a model, and what else an unsuccessful call could leave behind."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(type(m), m.training, sorted(vars(m)), list(m._parameters)) for m in model.modules()]
    parameters = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    return values, (modules, parameters, hooks_of(model))


def same(one, other):
    return one[1] == other[1] and all(torch.equal(one[0][key], other[0][key]) for key in one[0])


@pytest.mark.parametrize("way", FOLLOWED)
def test_followed(way):
    model, x, fresh = built(FOLLOWED[way]), images(), images(1, number=3)
    before = state_of(model)
    for places in CHOICES:
        expected = without(model, fresh, places)
        for constants in ("fold", "drop"):
            small = prune_filters(model, "conv", x, remove=places, constants=constants)
            with torch.no_grad():
                assert torch.allclose(small(fresh), expected, rtol=1e-5, atol=1e-5), places
            assert conv_at(small, "conv").out_channels == 6 - len(places)
        with torch.no_grad():
            assert float((expected - model(fresh)).abs().max()) > 1e-4  # the filters matter
    assert prunable_layers(model, x, show_progress=False)["conv"].prunable
    assert same(state_of(model), before)


@pytest.mark.parametrize("way", REFUSED)
def test_refused(way):
    make, words, *layers = REFUSED[way]
    model, x, layer = built(make), images(), (layers or ["conv"])[0]
    model.train().requires_grad_(False)
    model.reader.eval()
    before = state_of(model)
    for places in CHOICES:
        for constants in ("fold", "drop"):
            with pytest.raises(ValueError, match=words) as caught:
                prune_filters(model, layer, x, remove=places, constants=constants)
            assert f"'{layer}'" in str(caught.value)
            assert "constants=" not in str(caught.value)  # it would not help
    assert not prunable_layers(model, x, show_progress=False)[layer].prunable
    assert same(state_of(model), before)


# -- weights that are computed --------------------------------------------------------------------


def masked_weight(module):
    prune.random_unstructured(module, "weight", 0.3)
    prune.random_unstructured(module, "bias", 0.3)
    return module


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


WRAPS: dict[str, Callable[..., object]] = {
    "parametrized weight norm": parametrizations.weight_norm,
    "parametrized spectral norm": parametrizations.spectral_norm,
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "masks": masked_weight,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("place", [0, 1, 3, 6])
@pytest.mark.parametrize("wrap", WRAPS)
def test_computed_weights_are_refused_until_the_advice_is_followed(wrap, place):
    if place == 1 and "spectral" in wrap:
        pytest.skip("spectral norm is of matrices")
    model, x, fresh = normed(), images(), images(1)
    WRAPS[wrap](model[place])
    model.eval()
    expected = without(model, fresh, [1, 4], "2")
    before = state_of(model)
    if place == 6:  # the head is not touched
        assert torch.allclose(prune_filters(model, "0", x, remove=[1, 4])(fresh), expected)
        return
    with pytest.raises(ValueError, match=f"weight of '{place}' is computed") as caught:
        prune_filters(model, "0", x, remove=[1, 4])
    assert f"weight of '{place}' is computed" in prunable_layers(model, x)["0"].reason
    assert same(state_of(model), before)
    for call in str(caught.value).split("first: ")[1].removesuffix(".").split("; "):
        eval(call)  # what the message says
    with torch.no_grad():
        outputs = prune_filters(model, "0", x, remove=[1, 4])(fresh)
    assert torch.allclose(outputs, expected, atol=1e-6)


def test_layers_keep_their_names_in_a_wrapper():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return {"scores": self.net(x)}

    net = normed()
    model, x = ClassScores(Headed().eval(), lambda output: output["scores"]), images()
    names = [layer.name for layer in prunable_layers(model, x, show_progress=False)]
    assert names == [layer.name for layer in prunable_layers(model.wrapped_model, x)]
    smaller = prune_filters(model, "net.0", x, remove=[1, 4])
    assert conv_at(smaller, "wrapped_model.net.0").out_channels == 4
    parametrizations.weight_norm(net[0])
    with pytest.raises(ValueError, match=r"weight of 'net\.0' is computed") as caught:
        prune_filters(model, "net.0", x, remove=[1, 4])
    eval(str(caught.value).split("first: ")[1].removesuffix("."))  # what the message says
    assert prunable_layers(model, x, show_progress=False)["net.0"].prunable


def test_a_shared_weight_is_refused():
    torch.manual_seed(0)
    first, second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
    second.weight = first.weight
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), first, nn.ReLU(), second, nn.Flatten())
    with pytest.raises(ValueError, match="'2' shares a parameter with '4'"):
        prune_filters(model.eval(), "0", images(), remove=[1])


def test_quantized_and_scripted_layers_are_named():
    model, x = normed().eval(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(*model[:3], *model[4:6], nn.Linear(6, 2)), {nn.Linear}
        )
        scripted = torch.jit.script(model)
        inside = nn.Sequential(model[0], torch.jit.script(nn.Sequential(model[2], model[3])))
    for network, words in [
        (quantized, r"linear_dynamic in '5' \(Linear\)"),
        (scripted, "compiled by TorchScript"),
        (inside, "'0' cannot be removed: its filters cannot be followed"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune_filters(network, "0", x, remove=[1])


def test_a_lazy_model_is_run_first():
    model, x = nn.Sequential(nn.LazyConv2d(6, 3), nn.ReLU(), nn.LazyConv2d(2, 3)), images()
    with pytest.raises(ValueError, match="run the model once"):
        prune_filters(model, "0", x, remove=[1])
    with pytest.raises(ValueError, match="run the model once"):
        prunable_layers(model, x)
    with torch.no_grad():
        model(x)
    assert conv_at(prune_filters(model, "0", x, remove=[1]), "0").out_channels == 5


# -- constants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Between(lambda net, maps, _x: maps + net.at, conv(6), at=weight(6, 5, 7)),
        lambda: Between(nn.ConstantPad2d(1, 0.5), conv(6)),
        lambda: Between(nn.Conv2d(6, 6, 1, groups=6), conv(6)),
    ],
)
def test_dropping_constants_is_offered_where_it_works(make):
    model, x, fresh = built(make), images(), images(1)
    with pytest.raises(ValueError, match=r"'reader' still reads values .* constants='drop'"):
        prune_filters(model, "conv", x, remove=[1, 4])
    small = prune_filters(model, "conv", x, remove=[1, 4], constants="drop")
    index = torch.tensor([1, 4])
    handle = model.reader.register_forward_pre_hook(
        lambda _module, inputs: (inputs[0].index_fill(1, index, 0.0),)
    )
    expected = without(model, fresh, [1, 4])
    handle.remove()
    with torch.no_grad():
        assert torch.allclose(small(fresh), expected, atol=1e-6)
    assert "constants='drop'" in prunable_layers(model, x, show_progress=False)["conv"].reason


def test_what_one_image_shows_as_a_constant_may_vary():
    def join(net, maps, x):  # behind a mean, one image has one value at all positions
        return maps + net.flat(x) * torch.ones_like(maps)

    flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 1, 1))
    model, one = built(lambda: Between(join, nn.Conv2d(6, 4, 1), flat=flat)), images(number=1)
    with pytest.raises(ValueError, match="'reader' still reads values"):
        prune_filters(model, "conv", one, remove=[1])
    assert not prunable_layers(model, one, show_progress=False)["conv"].prunable


class Gated(nn.Module):
    """Blocks of convolution, batch normalization and ReLU that a depthwise convolution and a gate
    follow; what the normalizations make of zeros is a constant times the gate, or zero."""

    class Block(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1, groups=6)
            self.gate, self.reader = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
            self.depthwise.weight.data.fill_(1)
            self.depthwise.bias = nn.Parameter(shift)

        def forward(self, maps):
            wide = F.relu(self.depthwise(F.relu(self.conv(maps))))
            gate = torch.sigmoid(self.gate(wide.mean((2, 3), keepdim=True)))
            return maps + self.reader(wide * gate)

    def __init__(self, *shifts):
        super().__init__()
        self.blocks = nn.Sequential(*map(self.Block, shifts))
        self.head = nn.Linear(4, 3)

    def forward(self, maps):
        return self.head(self.blocks(maps).mean((2, 3)))


def test_layers_are_listed_where_all_of_their_filters_can_go():
    torch.manual_seed(0)
    one = torch.tensor([0, 0, 1.0, 0, 0, 0])
    shifts = [torch.zeros(6), one, torch.ones(6)]
    model, x = Gated(*shifts).eval(), torch.rand(4, 4, 5, 5)
    layers = prunable_layers(model, x, show_progress=False)
    assert [layers[f"blocks.{place}.conv"].prunable for place in range(3)] == [True, False, False]
    assert "with 1 of its 6 filters (2) zero, 'blocks.1.reader'" in layers["blocks.1.conv"].reason
    assert "with them zero, 'blocks.2.reader'" in layers["blocks.2.conv"].reason
    prune_filters(model, "blocks.1.conv", x, remove=[0, 1, 3, 4])
    for filters in ([2], range(5)):
        with pytest.raises(ValueError, match=r"'blocks\.1\.reader' still reads values"):
            prune_filters(model, "blocks.1.conv", x, remove=filters)
    for place in range(6):
        prune_filters(model, "blocks.0.conv", x, remove=[place])


def test_the_list_takes_few_forward_passes():
    torch.manual_seed(0)
    model, runs = Gated(*[torch.zeros(6), torch.ones(6)] * 6).eval(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    layers = prunable_layers(model, torch.rand(4, 4, 5, 5), show_progress=False)
    assert len(layers.prunable) == 6
    assert len(runs) == 4  # one to follow the filters, two masked ones and a smaller one


@pytest.mark.parametrize("images_of_each", [1, 2, 5])
def test_layers_that_do_not_equal_their_masks_are_found_among_the_others(images_of_each):
    def counted(net, maps, x):  # knows how many filters there are
        return maps * (maps.shape[1] / 6)

    torch.manual_seed(0)
    between = [nn.Identity(), nn.Identity(), counted, nn.Identity(), nn.Identity()]
    parts = [built(lambda way=way: Between(way, conv(6, 3))) for way in between]
    model, x = nn.Sequential(*parts), torch.rand(images_of_each, 3, 6, 6)
    layers = prunable_layers(model, x, show_progress=False)
    refused = [at for at in range(5) if not layers[f"{at}.conv"].prunable]
    assert refused == [2]
    assert "would" in layers["2.conv"].reason
    with pytest.raises(ValueError, match=r"would (put out|read) other values"):
        prune_filters(model, "2.conv", x, remove=[1, 4])


# -- what models put out and are given ------------------------------------------------------------


def test_outputs_that_are_not_one_tensor_are_compared():
    model, fresh = built(FOLLOWED["flatten"]), images(1)
    model.register_forward_hook(lambda _module, _inputs, output: {"logits": [output]})
    small = prune_filters(model, "conv", images(), remove=[1])
    (expected,) = tree_leaves(without(model, fresh, [1]))
    assert torch.allclose(small(fresh)["logits"][0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    model, x = built(FOLLOWED["gate"]).to(dtype), images().to(dtype)
    small = prune_filters(model, "conv", x, remove=[1, 4])
    assert small.get_parameter("conv.weight").dtype == dtype
    assert torch.allclose(small(x), without(model, x, [1, 4]), rtol=0.05, atol=0.02)


def test_other_memory_formats():
    for make in (FOLLOWED["gate"], FOLLOWED["flatten"], normed):
        model = built(make).to(memory_format=torch.channels_last)
        x = images().contiguous(memory_format=torch.channels_last)
        layer = "conv" if hasattr(model, "conv") else "0"
        small = prune_filters(model, layer, x, remove=[1, 4])
        assert torch.allclose(
            small(x), prune_filters(built(make), layer, x, remove=[1, 4])(x), atol=1e-6
        )
        assert prunable_layers(model, x, show_progress=False)[layer].prunable


def test_tokens():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.conv = nn.Embedding(20, 5), nn.Conv1d(5, 6, 3)
            self.head = nn.Linear(6, 2)

        def forward(self, tokens):
            return self.head(self.conv(self.embedding(tokens).mT).amax(2))

    model, tokens = built(Text), torch.arange(22).reshape(2, 11) % 20
    small = prune_filters(model, "conv", tokens, remove=[0, 4])
    fresh = tokens.flip(1)
    assert torch.allclose(small(fresh), without(model, fresh, [0, 4], "conv"), atol=1e-6)


def test_a_model_that_refuses_random_inputs_is_seen_on_the_example():
    def checked(_net, maps, x):
        if float(x.max()) != 1.0:
            raise RuntimeError("expected images with a maximum of 1")
        return maps

    model, x = built(lambda: Between(checked, conv(6))), images().clamp(max=1.0)
    small = prune_filters(model, "conv", x, remove=[1])
    assert torch.allclose(small(x), without(model, x, [1]), atol=1e-6)
    assert prunable_layers(model, x, show_progress=False)["conv"].prunable
    with pytest.raises(RuntimeError, match="maximum of 1"):  # the model's own error passes
        prune_filters(model, "conv", 3 * x, remove=[1])


def test_more_parameters_than_there_are_numbers(monkeypatch):
    """Pairs of numbers are kept in 64 bits; what has no number is not taken for another's."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
            self.conv = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            return self.conv(x).mean((2, 3)) * self.first * self.second

    def numbered():
        trace = filter_trace.FilterTrace(Scaled().eval())
        trace.run((torch.rand(2, 3, 4, 4),))
        return list(trace.parameters)

    assert numbered() == ["first", "second"]
    monkeypatch.setattr(filter_trace, "FIRST_PARAMETER", (1 << filter_trace.BITS) - 7)
    assert numbered() == ["first"]
