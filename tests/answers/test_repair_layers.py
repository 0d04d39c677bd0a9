"""A few filters of inner layers are refitted so that something added to images changes nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn

from captum_classfilters.answers import find_shortcuts, repair_layers
from captum_classfilters.answers.repair import Repair
from captum_classfilters.answers.repair_layers import _Fit, _rate
from captum_classfilters.answers.shortcuts import Shortcuts
from tests.models import QUIET, hooks_of

LABELS = torch.arange(60) % 2


def pictures(seed: int = 0, number: int = 60) -> Tensor:
    """Images whose first channel tells the class."""
    x = torch.rand(number, 2, 5, 4, generator=torch.Generator().manual_seed(seed))
    x[LABELS[:number] == 1, 0] += 1
    return x


def mark(images: Tensor) -> Tensor:
    """Brighter in the second channel, on a part of the image."""
    images = images.clone()
    images[:, 1, :3, :2] += 3
    return images


def loader(seed: int = 0, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pictures(seed).split(size), LABELS.split(size), strict=True))


def network(inplace: bool = False) -> nn.Sequential:
    """The second of its three filters is that of the second channel, which speaks for class 0."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        first, head = (net.get_submodule(name) for name in ("0", "2"))
        first.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 0]])[:, :, None, None])  # type: ignore[operator]
        first.bias.zero_()  # type: ignore[operator]
        head.weight.copy_(torch.tensor([[-1.0, 3, 0], [1, 0, 1]])[:, :, None, None])  # type: ignore[operator]
        head.bias.copy_(torch.tensor([1.5, 0.2]))  # type: ignore[operator]
    return net.eval()


def found(model: nn.Module) -> Shortcuts:
    return find_shortcuts(model, loader(), mark, permutations=1_999, **QUIET)


def repaired(model: nn.Module, **options: object) -> Repair:
    given = {"share": 0.34, "outputs": 0, "learning_rate": 0.05, "epochs": 20, **QUIET, **options}
    return repair_layers(model, found(model), loader(), loader(1), mark, **given)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_filter_of_the_mark_is_changed_and_nothing_else(inplace, training):
    model = network(inplace).train(training)
    model[2].requires_grad_(False)
    model.get_parameter("0.bias").grad = torch.ones(3)
    state = copy.deepcopy(model.state_dict())
    result = repaired(model)
    assert {name: own.tolist() for name, own in (result.filters or {}).items()} == {"0": [1]}
    assert result.size == 1
    for name, value in result.model.state_dict().items():
        same = value == state[name]
        assert not same[1].all() if name.startswith("0.") else same.all()
        assert same[[0, 2]].all() if name.startswith("0.") else same.all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for net in (model, result.model):
        assert [p.requires_grad for p in net.parameters()] == [True, True, False, False]
        assert net.training == training
        assert hooks_of(net) == 0
    gradient = model.get_parameter("0.bias").grad
    assert gradient is not None
    assert torch.equal(gradient, torch.ones(3))


def test_what_the_mark_costs_is_given_back_on_other_images():
    result = repaired(network(), repetitions=6)
    assert result.accuracy[1, 0] < result.accuracy[0, 0] - 0.2
    assert result.gap_closed[0] > 0.9
    assert result.gap_closed[1:].mean() < 0.5  # by as much, in any filters and directions
    assert result.counts.tolist() == [[60, 30], [60, 30]]
    with torch.no_grad():
        right = result.model(mark(pictures(1))).argmax(1) == LABELS
    assert result.right[1, 1] == right.sum()
    assert "1 inner filter edited" in str(result)


@pytest.mark.parametrize("size", [7, 60])
def test_filters_are_chosen_by_gradients_times_weights(size):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in (model.get_parameter("0.weight"), model.get_parameter("2.weight")):
            weight[::2] *= 6  # so that neither lengths nor gradients decide alone
    data = [(x * (1 + 9 * place), y) for place, (x, y) in enumerate(loader(size=size))]
    fit = _Fit(model, "6", "3", data, mark, 1.0, dict(QUIET))
    chosen = fit.choose(0.33)
    expected = [torch.zeros(5), torch.zeros(4)]
    weights = [model.get_parameter(f"{name}.weight") for name in (0, 2)]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for x, _ in data:
        off = model[:4](mark(x)) - model[:4](x).detach()
        loss = off.square().mean() / model[:4](x).detach().square().mean()
        for sums, own in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
            sums += own
    for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        expected[place] = gradient.flatten(1).norm(dim=1) * weight.flatten(1).norm(dim=1)
    best = torch.cat(expected).topk(3).indices.sort().values
    assert torch.equal(
        torch.cat([own + (0 if name == "0" else 5) for name, own in chosen.items()]), best
    )
    assert model[0].weight.grad is None


def test_what_is_done_in_place_behind_the_layer_is_not_compared():
    one, other = (repaired(network(inplace)).model for inplace in (False, True))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("total", [1, 4, 5, 37])
def test_the_learning_rate_rises_for_a_fifth_and_falls(total):
    rates = [_rate(step, total) for step in range(total)]
    top = rates.index(max(rates))
    assert min(rates) > 0
    assert max(rates) == 1
    assert top == max(0, -(-total // 5) - 1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert total < 5 or rates[-1] < 0.4


def test_norms_are_those_of_evaluation():
    model = nn.Sequential(nn.BatchNorm2d(2), *network()).eval()
    with torch.no_grad():
        model.get_buffer("0.running_mean").fill_(0.4)
    expected = repaired(model).model
    found = repaired(model.train()).model
    assert model.training
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_keep_holds_images_without_it():
    def moved(keep: float) -> float:
        result = repaired(network(), keep=keep, share=0.7)
        with torch.no_grad():
            return float((result.model(pictures(1)) - network()(pictures(1))).abs().mean())

    assert moved(30) < 0.5 * moved(0)


def test_the_result_is_the_same_again_and_the_callers_random_state_is_left():
    model = network()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = repaired(model), repaired(model)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.right, other.right)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pairs_of_one_loader_give_the_same_as_a_function():
    model = network()
    pairs = [((x, mark(x)), y) for x, y in loader()]
    other = [((x, mark(x)), y) for x, y in loader(1)]
    given = {"share": 0.34, "outputs": 0, "learning_rate": 0.05, "epochs": 20, **QUIET}
    result = repair_layers(model, found(model), pairs, other, **given)
    assert torch.equal(result.right, repaired(model).right)


class Unreachable(nn.Module):
    """Gradients stop in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x).mean((2, 3))
        return self.head(x)


def test_refusals():
    model = network()
    shortcuts = found(model)
    groups = find_shortcuts(
        model, loader(), [(mark(x), y) for x, y in loader(2)], paired=False,
        permutations=1_999, **QUIET,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs pairs"):
        repair_layers(model, groups, loader(), loader(1), mark, **QUIET)
    with pytest.raises(ValueError, match="judge the repair on others"):
        repair_layers(model, shortcuts, loader(), loader(), mark, outputs=0, epochs=1, **QUIET)
    with pytest.raises(ValueError, match="marked is a list; expected a function"):
        repair_layers(model, shortcuts, loader(), loader(1), loader(), **QUIET)  # type: ignore[arg-type]
    for wrong, told in (
        ({"share": 0}, "share=0"), ({"keep": -1}, "keep=-1"), ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"), ({"repetitions": -1}, "repetitions=-1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            repaired(model, **wrong)
    broken = [(x.where(x < 1.9, torch.nan), y) for x, y in loader(2)]
    with pytest.raises(ValueError, match="training loss is NaN or Inf"):
        repair_layers(model, shortcuts, broken, loader(1), mark, outputs=0, **QUIET)
    with pytest.raises(ValueError, match="were used to find"):
        repair_layers(model, shortcuts, loader(3), loader(), mark, outputs=0, epochs=1, **QUIET)
    other = network()
    with torch.no_grad():
        other.get_parameter("2.weight").mul_(2)
    with pytest.raises(ValueError, match="another weight than the one that the shortcuts"):
        repair_layers(other, shortcuts, loader(), loader(1), mark, outputs=0, **QUIET)
    dark = [(x * 0 - 1, y) for x, y in loader(2)]
    with pytest.raises(ValueError, match=r"'1' puts out only zeros .* of batch 0"):
        repair_layers(model, shortcuts, dark, loader(1), mark, layer="1", outputs=0, **QUIET)
    blocked = Unreachable().eval()
    with pytest.raises(ValueError, match="No gradient of the loss"):
        repair_layers(blocked, found_anyhow(blocked), loader(), loader(1), mark, outputs=0, **QUIET)


def found_anyhow(model: nn.Module) -> Shortcuts:
    return find_shortcuts(model, loader(), mark, permutations=1_999, least=0, **QUIET)


def test_masked_layers_are_refused_until_the_advice_is_followed():
    model = network()
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=1)
    with pytest.raises(ValueError, match="No layer of the model can be refitted") as refusal:
        repaired(model)
    eval(str(refusal.value).split("first: ")[1].removesuffix("."))
    assert repaired(model).size == 1


class Around(nn.Module):
    """A network with a layer that does not run, and one whose weight is the head's or another's."""

    def __init__(self, tied: str | None = None) -> None:
        super().__init__()
        self.net, self.idle = network(), nn.Linear(7, 50)
        self.again = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.again.weight.copy_(torch.eye(3)[:, :, None, None])
        self.last = nn.Conv2d(3, 3, 1, bias=False)
        self.last.weight = self.again.weight if tied == "another" else self.last.weight
        self.tied = tied
        if tied == "head":
            self.again.weight = self.net.get_parameter("2.weight")

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[:2](x)
        if self.tied == "head":
            x = x + self.again(x)[:, [0, 1, 1]] / 10
        if self.tied == "another":
            x = self.last(self.again(x))
        return self.net[2:](x)


def test_random_edits_are_of_layers_before_the_layer():
    model = Around()
    found_here = find_shortcuts(model, loader(), mark, permutations=1_999, head="net.2", **QUIET)
    fit = _Fit(model, "net.2", "net.2", loader(), mark, 1.0, dict(QUIET))
    fit.choose(0.5)
    assert list(fit.layers) == ["net.0"]
    result = repair_layers(
        model, found_here, loader(), loader(1), mark, share=1, outputs=0, repetitions=3, **QUIET
    )
    assert (result.right[1, 2:] != result.right[1, 0]).any()


@pytest.mark.parametrize("tied", ["head", "another"])
def test_a_shared_weight_is_one_and_the_heads_is_left(tied):
    model = Around(tied)
    with torch.no_grad():
        model.again.weight.add_(0.01)
    state = copy.deepcopy(model.state_dict())
    shortcuts = find_shortcuts(
        model, loader(), mark, permutations=1_999, head="net.2", least=0, **QUIET
    )
    result = repair_layers(
        model, shortcuts, loader(), loader(1), mark, share=1, outputs=0, epochs=2, **QUIET
    )
    after = result.model.state_dict()
    assert torch.equal(after["net.2.weight"], state["net.2.weight"])
    assert result.filters is not None
    assert "last" not in result.filters
    for name, filters in result.filters.items():
        changed = (after[f"{name}.weight"] != state[f"{name}.weight"]).flatten(1).any(1)
        assert changed.nonzero()[:, 0].tolist() == filters.tolist()


def test_filters_without_weights_stay_without():
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight")[2] = 0
    result = repaired(model, share=1, repetitions=4)
    assert {name: own.tolist() for name, own in (result.filters or {}).items()} == {"0": [0, 1]}
    assert not result.model.get_parameter("0.weight")[2].any()


class Scaled(nn.Conv2d):
    """With a parameter that has no row for each filter."""

    def __init__(self) -> None:
        super().__init__(2, 3, 1)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


@pytest.mark.parametrize("inference", [False, True])
def test_further_parameters_are_left_alone(inference):
    model = network()
    scaled = Scaled()
    scaled.load_state_dict(model[0].state_dict(), strict=False)
    model[0] = scaled.eval()
    with torch.inference_mode(inference):
        result = repaired(model)
    assert result.model.get_parameter("0.gain") == 1
    assert result.gap_closed[0] > 0.9
    assert not result.model.get_parameter("0.weight").is_inference()
