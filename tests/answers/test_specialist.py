"""Specialists: the call against networks whose answer is known, bad input, export."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_classfilters.answers import build_specialist
from captum_classfilters.answers.specialist_builder import recalibrate, tune
from captum_classfilters.pruning import least_squares, multiply_adds
from captum_classfilters.testing import planted_network
from tests.models import ONE_OUTPUT, QUIET, deep, layer_at, one_output


def doubled():
    """Eight filters of which the last four are the first four again."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip
    conv = layer_at(model, "0", nn.Conv2d)
    with torch.no_grad():
        conv.weight[4:] = conv.weight[:4]
        assert conv.bias is not None
        conv.bias[4:] = conv.bias[:4]
    return model.eval()


def labeled(model, number=160, seed=0):
    """Images, and what the model says of them as labels."""
    x = torch.randn(number, 2, 9, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        scores = model(x)
        y = torch.where(scores[:, 3] > scores[:, 1], 3, 1)
    return [(x[:70], y[:70]), (x[70:], y[70:])]


def balanced(model, head="7"):
    """The same model, its outputs 1 and 3 each the larger for half of the images."""
    x = labeled(model)[0][0]
    head = layer_at(model, head, nn.Linear)
    with torch.no_grad():
        scores = model(x)
        assert head.bias is not None
        head.bias[3] -= (scores[:, 3] - scores[:, 1]).median()
    return model


def test_filters_that_are_there_twice_go_without_a_loss():
    model = balanced(doubled())
    data = labeled(model)
    before = copy.deepcopy(model.state_dict())
    full = sum(parameter.numel() for parameter in model.parameters())
    # Half of the first layer, its inputs, and two rows of the head.
    after = full - 4 * 19 - 4 * 9 * 5 - 2 * 6
    result = build_specialist(
        model, [3, 1], data, budget=(after + 20) / full, low_rank=False, **QUIET
    )
    assert int(result.kept["0"].sum()) == 4
    assert set(result.kept) == {"0"}
    assert len({place % 4 for place in result.kept["0"].nonzero()[:, 0].tolist()}) == 4
    with torch.no_grad():
        x = torch.cat([x for x, _ in data])
        expected, found = model(x)[:, [3, 1]], result.model(x)
    gap = expected[:, 0] - expected[:, 1]
    assert torch.allclose(found[:, 0] - found[:, 1], gap, atol=0.05 * float(gap.std()))
    assert result.classes == (3, 1)
    assert result.right[0].tolist() == result.counts.tolist()
    assert result.accuracy[1] >= 0.9
    assert result.right.shape == (3, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Residual(nn.Module):
    """The second layer's outputs, tied by the sum, are two numbers in twelve combinations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 12, 3)
        self.first = nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.second = nn.Conv2d(10, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)
        with torch.no_grad():
            weight = self.second.weight.flatten(1)
            self.second.weight.copy_((torch.randn(12, 2) @ weight[:2]).reshape(12, 10, 3, 3))

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Filters weighed by what two layers make of their means, as in squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up = (
            nn.Conv2d(2, 12, 3),
            nn.Conv2d(12, 3, 1),
            nn.Conv2d(3, 12, 1),
        )

    def forward(self, x):
        x = self.first(x).relu()
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Multiplied(nn.Module):
    """The product of two layers' filters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 12, 3), nn.Conv2d(2, 12, 3)

    def forward(self, x):
        return self.first(x) * self.second(x)


def tied(kind):
    """A network that begins with layers whose filters go together."""
    torch.manual_seed(0)
    model = nn.Sequential(
        kind(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(10, 4),
    )  # fmt: skip
    return balanced(model.eval(), "5")


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize(("kind", "other"), [(Gated, "0.up"), (Multiplied, "0.second")])
def test_layers_whose_filters_go_together(kind, other, low_rank):
    model = tied(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may guess
        result = build_specialist(
            model, [1, 3], labeled(model), budget=0.3, low_rank=low_rank, **QUIET
        )
    assert torch.equal(result.kept["0.first"], result.kept[other])
    assert result.parameters_kept <= 0.3
    for name, kept in result.kept.items():
        layer = result.model.get_submodule(name)
        assert (name in result.ranks) == isinstance(layer, nn.Sequential)
        last = layer[-1] if isinstance(layer, nn.Sequential) else layer
        assert len(last.get_parameter("weight")) == int(kept.sum()) < len(kept)


class SelfPadding(nn.Conv2d):
    """Pads by itself, more on one side, as EfficientNets taken over from TensorFlow do."""

    def forward(self, input):
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class OfTokens(nn.Module):
    """The layers of a network of 1x1 convolutions, on tokens."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        for name in ("0", "2"):
            layer = layer_at(network, name, nn.Conv2d)
            linear = nn.Linear(layer.in_channels, layer.out_channels)
            linear.weight.data = layer.weight.data.flatten(1).clone()
            linear.bias.data = layer.get_parameter("bias").data.clone()
            self.add_module(name, linear)
        self.head = copy.deepcopy(network[-1])

    def forward(self, x):
        x = self.get_submodule("0")(x.flatten(2).transpose(1, 2)).relu()
        return self.head(self.get_submodule("2")(x).relu().mean(1))


def test_tokens_lose_the_filters_that_positions_do():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 9, 1), nn.ReLU(), nn.Conv2d(9, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    balanced(network, "6")
    data = [
        (x[:, :, :3, :3], y) for x, y in labeled(network)
    ]  # nine positions, as there are filters
    options: Any = {"budget": 0.5, "low_rank": False, "epochs": 0, **QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may guess
        maps, tokens = (
            build_specialist(model, [1, 3], data, **options)
            for model in (network, OfTokens(network).eval())
        )
    assert maps.kept.keys() == tokens.kept.keys() == {"0", "2"}
    for name, kept in maps.kept.items():
        assert torch.equal(tokens.kept[name], kept)
    assert torch.equal(tokens.right[:2], maps.right[:2])


def test_a_head_that_runs_twice_is_not_fitted():
    """In each image, that is; the layers before it lose filters all the same."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = doubled()[:7], nn.Linear(5, 4)

        def forward(self, x):
            features = self.body(x)
            return (self.head(features) + self.head(features.square())) / 2

    torch.manual_seed(1)
    model = balanced(Twice().eval(), "head")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = build_specialist(model, [1, 3], labeled(model), budget=0.65, low_rank=False, **QUIET)
    head = layer_at(made.model, "head", nn.Linear)
    assert torch.equal(head.weight, layer_at(model, "head", nn.Linear).weight[[1, 3]])
    assert int(made.kept["body.0"].sum()) < 8


def test_a_layer_that_pads_by_itself_is_left_whole():
    """It is no matrix times what it reads; what it reads keeps its filters, what it makes may go."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), SelfPadding(6, 8, 2), nn.ReLU(), nn.Conv2d(8, 5, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    ).eval()  # fmt: skip
    model = balanced(model, "8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = build_specialist(model, [3, 1], labeled(model), budget=0.6, **QUIET)
    assert {*result.kept, *result.ranks} <= {"2", "4"}
    assert result.parameters_kept <= 0.6
    assert len(layer_at(result.model, "0", nn.Conv2d).weight) == 6


def test_layers_that_read_too_much_are_not_fitted(monkeypatch):
    """Squares of what VGG's first linear layer reads would take gigabytes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 42, 20),
        nn.ReLU(),
        nn.Linear(20, 4),
    ).eval()
    model = balanced(model, "5")
    monkeypatch.setattr(least_squares, "_MOST_READ", 6 * 42 - 1)
    result = build_specialist(model, [3, 1], labeled(model, 300), budget=0.5, **QUIET)
    assert set(result.kept) == {"3"}
    assert not {*result.ranks} & {"0", "3"}
    assert result.parameters_kept <= 0.5
    assert result.accuracy[1] > 0.75


def test_layers_that_cannot_lose_filters_are_split(tmp_path):
    model = balanced(Residual().eval(), "head")
    data = labeled(model, 300)
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"budget": 0.4, **QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filters = build_specialist(model, [1, 3], data, low_rank=False, **options)
        result = build_specialist(model, [1, 3], data, **options)
    assert filters.ranks == {}
    assert set(filters.kept) == {"first"}
    assert result.ranks["second"].outputs <= 2
    assert result.parameters_kept <= 0.4
    for name, ranks in result.ranks.items():
        parts = layer_at(result.model, name, nn.Sequential)
        shapes = [tuple(part.get_parameter("weight").shape[:2]) for part in parts]
        assert (ranks.outputs, ranks.inputs) in shapes
    own, other = (found.accuracy[1] for found in (result, filters))
    assert own >= 0.9
    assert own >= other
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    same_in_onnx(result.model, data[0][0][:3], tmp_path / "split.onnx")


@pytest.mark.filterwarnings("ignore:The specialist")
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_budget_of_multiply_adds(low_rank):
    """The first layers have most positions, the last one most parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.MaxPool2d(3),
        nn.Conv2d(6, 24, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    model, x = balanced(model.eval(), "9"), torch.rand(1, 2, 9, 8)
    small, fast = (
        build_specialist(
            model, [3, 1], labeled(model), budget=0.3, unit=unit, low_rank=low_rank, **QUIET
        )
        for unit in ("parameters", "multiply_adds")
    )
    kept = multiply_adds(fast.model, x) / multiply_adds(model, x)
    assert fast.multiply_adds_kept == pytest.approx(kept)
    assert 0.2 < kept <= 0.3 < 0.7 < small.multiply_adds_kept
    assert small.parameters_kept <= 0.3
    assert f"{kept:.1%} of the multiply-adds" in str(fast)


def test_the_least_budget_of_multiply_adds_that_the_error_names_works():
    model = balanced(doubled())
    options: dict[str, Any] = {"unit": "multiply_adds", **QUIET}
    with pytest.raises(
        ValueError, match=r"of the multiply-adds are left; give at least 0\."
    ) as said:
        build_specialist(model, [3, 1], labeled(model), budget=0.01, **options)
    least = float(str(said.value).split()[-1].rstrip("."))
    with pytest.warns(UserWarning, match="near the"):
        found = build_specialist(model, [3, 1], labeled(model), budget=least, **options)
    assert found.multiply_adds_kept <= least
    with pytest.raises(ValueError, match="unit='seconds'; choose one of parameters, multiply_adds"):
        build_specialist(model, [3, 1], labeled(model), unit="seconds", **QUIET)  # type: ignore[arg-type]


def test_normalizations_are_folded_at_last():
    model, data = balanced(doubled()), labeled(balanced(doubled()))
    folded, plain = (
        build_specialist(model, [3, 1], data, budget=0.5, fold_norms=fold, **QUIET)
        for fold in (True, False)
    )
    kinds = [
        {type(module) for module in result.model.modules()} & {nn.BatchNorm2d, nn.Identity}
        for result in (folded, plain)
    ]
    assert kinds == [{nn.Identity}, {nn.BatchNorm2d}]
    assert torch.equal(folded.right, plain.right)
    x = data[0][0]
    with torch.no_grad():
        assert torch.allclose(folded.model(x), plain.model(x), atol=1e-5)
    assert folded.parameters_kept < plain.parameters_kept
    assert isinstance(model[3], nn.BatchNorm2d)


def test_a_model_in_training_mode_gives_the_same_specialist():
    """Its normalizations keep their statistics, and its dropout is silent meanwhile."""
    model = balanced(doubled())
    model.insert(7, nn.Dropout(0.5))
    data, options = labeled(model), {"budget": 0.4, **QUIET}
    expected = build_specialist(model, [3, 1], data, **options)
    before = copy.deepcopy(model.state_dict())
    found = build_specialist(model.train(), [3, 1], data, **options)
    assert (expected.model.training, found.model.training) == (False, True)
    assert torch.equal(found.right, expected.right)
    for key, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value), key
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(module.training for module in model.modules())


def test_numbers_are_those_of_the_networks():
    planted = planted_network()
    data, other = planted.loader(200), planted.loader(100, seed=1)
    result = build_specialist(
        planted.model, [2, 0], data, other, budget=0.4, repetitions=2, **QUIET
    )
    x, y = (torch.cat(part) for part in zip(*other, strict=True))
    of = (y == 2) | (y == 0)
    x, place = x[of], (y[of] == 0).long()
    with torch.no_grad():
        full = planted.model(x)[:, [2, 0]].argmax(1) == place
        own = result.model(x).argmax(1) == place
    assert result.counts.tolist() == [int((place == 0).sum()), int((place == 1).sum())]
    assert result.right[0].sum() == full.sum()
    assert result.right[1].sum() == own.sum()
    assert result.lost == int((full & ~own).sum())
    assert result.gained == int((own & ~full).sum())
    parameters = [
        sum(parameter.numel() for parameter in network.parameters())
        for network in (planted.model, result.model)
    ]
    assert result.parameters_kept == parameters[1] / parameters[0] <= 0.4
    assert result.right.shape == (4, 2)
    assert list(result.costs) == [1, 64]
    again = build_specialist(planted.model, [2, 0], data, other, budget=0.4, repetitions=2, **QUIET)
    assert torch.equal(again.right, result.right)
    assert "together" in str(result)
    assert "<table" in result._repr_html_()
    low, high = result.interval().tolist()
    assert low <= (result.gained - result.lost) / len(x) <= high


def test_training_helps_a_very_small_one():
    planted = planted_network()
    data, other = planted.loader(300), planted.loader(150, seed=1)
    options: dict[str, Any] = {"budget": 0.12, "repetitions": 0, **QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = build_specialist(planted.model, [0, 1, 2], data, other, **options)
        tuned = build_specialist(planted.model, [0, 1, 2], data, other, epochs=5, **options)
    assert {name: int(mask.sum()) for name, mask in plain.kept.items()} == {
        name: int(mask.sum()) for name, mask in tuned.kept.items()
    }
    assert tuned.accuracy[1] >= plain.accuracy[1]
    assert not any(module.training for module in tuned.model.modules())


def test_training_starts_from_what_was_fitted():
    """Statistics of batches would undo the fit, so those of the network stay."""
    teacher = doubled()
    student = copy.deepcopy(teacher)
    head, norm = layer_at(student, "7", nn.Linear), layer_at(student, "3", nn.BatchNorm2d)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.neg_()
    x = torch.randn(96, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    data = [(x, teacher(x).argmax(1))]
    before, mean = head.weight.clone(), norm.running_mean
    assert mean is not None
    mean = mean.clone()
    tune(student, teacher, data, data, epochs=20, learning_rate=0.05, seed=0)
    assert not torch.equal(head.weight, before)
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, mean)


def test_statistics_are_those_of_the_images():
    model = deep(seed=1)
    layer_at(model, "stage2.1", nn.BatchNorm2d).eval()
    x = torch.rand(40, 2, 8, 8)
    recalibrate(model, [(x, torch.zeros(40).long())])
    norm = layer_at(model, "stage1.1", nn.BatchNorm2d)
    with torch.no_grad():
        maps = model.get_submodule("stage1.0")(x)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, maps.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(norm.running_var, maps.var((0, 2, 3)), atol=1e-6)
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_onnx(tmp_path):
    planted = planted_network()
    result = build_specialist(planted.model, [1, 2], planted.loader(200), budget=0.5, **QUIET)
    x = next(iter(planted.loader(10)))[0][:5]
    same_in_onnx(result.model, x, tmp_path / "specialist.onnx")


def same_in_onnx(model, x, path):
    """Written and run by another library, the network gives the same."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-4)


def test_one_that_guesses_is_told():
    torch.manual_seed(0)
    model = doubled()
    x = torch.randn(200, 2, 9, 8)
    y = torch.randint(0, 2, (200,))
    with pytest.warns(UserWarning, match=r"accuracy of 0\.\d+ \(95 % interval .* of a guess"):
        build_specialist(model, [0, 1], [(x, y)], budget=0.9, **QUIET)


def test_bad_input():
    model = balanced(doubled())
    data = labeled(model)
    names = ["cat", "dog", "horse", "ship"]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (["cat"], {}, "two or more different"),
        (["cat", 0], {}, "two or more different"),
        (["dog", "hors"], {}, "Did you mean 'horse'"),
        ([0, 4], {}, "Class 4 is out of range; there are 4"),
        ([0, 1], {}, "holds 0 of cat images.*0 for cat, 1 for dog"),
        ([1, 3], {"budget": 0.0}, "budget=0.0 is no share"),
        ([1, 3], {"budget": 1.5}, "budget=1.5 is no share"),
        ([1, 3], {"budget": 0.01}, "give at least 0"),
        ([1, 3], {"epochs": -1}, "epochs=-1"),
    ]
    for classes, options, message in cases:
        with pytest.raises(ValueError, match=message):
            build_specialist(model, classes, data, class_names=names, **options, **QUIET)
    few = [(data[0][0][:30], data[0][1][:30])]
    with pytest.raises(ValueError, match="at least 20 of each class"):
        build_specialist(model, [1, 3], few, **QUIET)
    two = [((x, x), y) for x, y in data]
    with pytest.raises(ValueError, match="one tensor of images"):
        build_specialist(model, [1, 3], two, **QUIET)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(144, 4)).eval()
    with pytest.raises(ValueError, match="No layer of the model can lose filters"):
        build_specialist(flat, [1, 3], data, **QUIET)
    with pytest.raises(ValueError, match="no linear head"):
        build_specialist(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()), [1, 3], data, **QUIET)


@pytest.mark.parametrize("classes", [[0, 1], ["yes", "no"], [0]])
@pytest.mark.parametrize("kind", ONE_OUTPUT)
def test_one_output_has_no_class_to_leave_out(kind, classes):
    """Whatever classes are asked for: there are not as many rows to choose from."""
    data = [(torch.rand(9, 2, 6, 6), torch.arange(9) % 2)]
    with pytest.raises(
        ValueError, match=r"one output tells its two classes apart already.*prune_f"
    ):
        build_specialist(one_output(kind), classes, data, **QUIET)


def test_the_least_budget_that_the_error_names_works():
    model = balanced(doubled())
    with pytest.raises(ValueError, match="give at least") as caught:
        build_specialist(model, [1, 3], labeled(model), budget=0.001, **QUIET)
    least = float(str(caught.value).rpartition(" ")[2].removesuffix("."))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = build_specialist(model, [1, 3], labeled(model), budget=least, **QUIET)
    assert {int(mask.sum()) for mask in result.kept.values()} == {1}


def test_a_head_that_ends_in_a_loss_of_its_own_is_fitted():
    """Cross-entropy on held images chooses the statistics; a network without norms has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 42, 4)).eval()
    x = torch.randn(200, 2, 9, 8)
    with torch.no_grad():
        y = model(x)[:, :2].argmax(1)
    result = build_specialist(model, [0, 1], [(x, y)], budget=0.4, repetitions=1, **QUIET)
    assert int(result.kept["0"].sum()) < 6
    with torch.no_grad():
        loss = F.cross_entropy(result.model(x), y)
    assert loss < 0.69


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("scale", [1e20, 1e30])  # whose squares single precision does not hold
def test_a_head_too_large_for_single_precision(scale, low_rank):
    model = balanced(doubled())
    data = labeled(model)
    layer_at(model, "7", nn.Linear).weight.data.mul_(scale)
    with pytest.raises(
        ValueError, match=r"beyond single precision\. Normalize the images, or scale"
    ):
        build_specialist(model, [1, 3], data, budget=0.6, low_rank=low_rank, **QUIET)
