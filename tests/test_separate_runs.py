"""Each run of a shared layer is a layer, for every method and head."""

import copy

import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation
from torch import Tensor, nn

from captum_classfilters import (
    ClassScores,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    SeparateRuns,
    decompose,
    list_filter_layers,
)
from tests.models import QUIET


class Block(nn.Module):
    """A convolution and a ReLU that is used twice."""

    def __init__(self, width: int, relu: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(self.relu(x)))) + x


class Shared(nn.Module):
    """One ReLU everywhere, and a block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stem, self.block = nn.Conv2d(3, 5, 3), Block(5, self.relu)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert self.block.conv.weight.shape[0] == 5  # what a model may look at
        x = self.block(self.block(self.relu(self.stem(x))))
        return self.head(self.relu(x).mean((2, 3)))


class Apart(nn.Module):
    """The same, written out."""

    def __init__(self, model: Shared) -> None:
        super().__init__()
        self.stem, self.relus = model.stem, nn.ModuleList(nn.ReLU() for _ in range(2))
        self.first = self._block(model.block)
        self.second = self._block(model.block)
        self.head = model.head

    @staticmethod
    def _block(block: Block) -> nn.ModuleDict:
        parts = {"before": nn.ReLU(), "conv": block.conv, "norm": block.norm, "after": nn.ReLU()}
        return nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.relus[0](self.stem(x))
        for block in (self.first, self.second):
            x = block["after"](block["norm"](block["conv"](block["before"](x)))) + x
        return self.head(self.relus[1](x).mean((2, 3)))


@pytest.fixture
def networks() -> tuple[Shared, nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.rand(6, 3, 5, 4)
    return model, SeparateRuns(model, x[:2]), Apart(model).eval(), x


def test_every_run_has_a_name_in_the_order_of_the_runs(networks):
    _, separate, _, x = networks
    rows = list_filter_layers(separate, x)
    assert {layer.runs for layer in rows if layer.qualifies} == {1}
    ran = [layer.name for layer in rows if layer.type == "ReLU"]
    assert ran == [f"relu.{run}" for run in range(6)]
    assert rows["relu.5"].feeds_head == "mean"
    assert rows["block.0.conv"].qualifies
    assert rows["block.1.conv"].qualifies


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("stem", "stem"),
        ("block.0.conv", "first.conv"),
        ("block.1.conv", "second.conv"),
        ("block.1.norm", "second.norm"),
        ("relu.0", "relus.0"),
        ("relu.1", "first.before"),
        ("relu.4", "second.after"),
        ("relu.5", "relus.1"),
    ],
)
def test_methods_say_of_a_run_what_they_say_of_a_layer_of_its_own(networks, ours, theirs):
    _, separate, apart, x = networks
    data = [(x, torch.tensor([0, 1, 2, 3, 1, 2]))]
    for method in (LayerFilterContribution, LayerFilterFrequency, LayerFilterAblation):
        table = method(separate, ours).identify(data, num_filters=2, **QUIET)
        expected = method(apart, theirs).identify(data, num_filters=2, **QUIET)
        assert table.layer == ours
        torch.testing.assert_close(table.scores, expected.scores)
    layer, other = separate.get_submodule(f"wrapped_model.{ours}"), apart.get_submodule(theirs)
    for captum in (LayerGradientXActivation, LayerGradCam):
        torch.testing.assert_close(
            captum(separate, layer).attribute(x, target=1),
            captum(apart, other).attribute(x, target=1),
        )
    gates = torch.rand(6, 5)
    torch.testing.assert_close(
        FilterGate(separate, ours)(gates, x), FilterGate(apart, theirs)(gates, x)
    )


def test_all_runs_at_once(networks):
    _, separate, apart, x = networks
    runs = LayerFilterContribution(separate, ["relu.0", "relu.5"]).attribute(x, target=2)
    layers = LayerFilterContribution(apart, ["relus.0", "relus.1"]).attribute(x, target=2)
    for run, layer in zip(runs, layers, strict=True):
        torch.testing.assert_close(run, layer)


def test_the_model_is_left_as_found_and_its_tensors_are_shared(networks):
    model, separate, _, x = networks
    names = [name for name, _ in model.named_modules()]
    assert torch.equal(separate(x), model(x))
    assert {id(p) for p in separate.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in separate.buffers()} == {id(b) for b in model.buffers()}
    separate.train()
    assert not model.training
    separate(x).sum().backward()
    assert model.block.conv.weight.grad is not None  # the sum over both runs
    assert [name for name, _ in model.named_modules()] == names


def test_heads_and_other_wrappers(networks):
    model, separate, _, x = networks
    data = [(x, torch.tensor([0, 1, 2, 3, 1, 2]))]
    table = LayerFilterContribution(separate, "relu.5").identify(data, num_filters=2, **QUIET)
    small = decompose(separate, table, example_inputs=x)
    mask = torch.where(table.selected, model.head.weight, 0.0)
    with torch.no_grad():
        model.head.weight.copy_(mask)
    torch.testing.assert_close(small(x), model(x))
    halved = ClassScores(SeparateRuns(model, x), lambda scores: scores / 2)
    torch.testing.assert_close(halved(x), model(x) / 2)
    inside = SeparateRuns(ClassScores(model, lambda scores: scores / 2), x)
    torch.testing.assert_close(inside(x), model(x) / 2)
    assert LayerFilterContribution(inside, "relu.5").identify(data, **QUIET).layer == "relu.5"


def test_one_module_at_several_places():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 5, 1), relu, nn.Flatten())
    separate = SeparateRuns(net, torch.rand(2, 3, 3, 2))
    rows = list_filter_layers(separate, torch.rand(2, 3, 3, 2))
    assert rows["1.0"].shape == (2, 4, 3, 2)
    assert rows["1.1"].shape == (2, 5, 3, 2)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_sequential_whose_children_are_called_as_its_runs(number):
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            parts = [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Tanh()]
            self.stem, self.block = nn.Conv2d(3, 6, 3), nn.Sequential(*parts[:number])

        def forward(self, x):
            x = self.stem(x)
            for _ in range(3):
                x = self.block(x)
            return x.mean((2, 3)) + self.block[0].bias

    model, x = Repeated().eval(), torch.rand(4, 3, 5, 7)
    separate = SeparateRuns(model, x)
    assert torch.equal(separate(x), model(x))
    names = [f"block.{run}.0" for run in range(3)]
    assert all(list_filter_layers(separate, x)[name].shape == (4, 6, 3, 5) for name in names)
    assert len({separate.get_submodule(f"wrapped_model.block.{run}") for run in range(3)}) == 3


def test_the_refusal_leads_here(networks):
    model, _, _, x = networks
    with pytest.raises(ValueError, match=r"SeparateRuns\(model, example_inputs\).*'relu.0'"):
        LayerFilterContribution(model, "relu").attribute(x, target=0)
    separate = SeparateRuns(model, x)
    LayerFilterContribution(separate, "relu.0").attribute(x, target=0)


def test_bad_input(networks):
    _, _, apart, x = networks
    with pytest.raises(ValueError, match="No layer of Apart runs more than once"):
        SeparateRuns(apart, x)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(len(x)):
                x = self.conv(x)
            return x.mean((2, 3))

    looped = SeparateRuns(Loop(), x[:2])
    with pytest.raises(ValueError, match="ran 2 times on the example inputs"):
        looped(x)
    assert looped(x[:2]).shape == (2, 3)  # an exception in between changes nothing
    assert looped(x[:1]).shape == (1, 3)
