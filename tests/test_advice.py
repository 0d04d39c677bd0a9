"""What a refusal advises is done, word for word where it is code, and works."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from captum_classfilters import (
    ClassFilterSaliency,
    ClassScores,
    ClassSpecificGate,
    FilterGate,
    LabelPermutation,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    SeparateRuns,
    decompose,
    fine_tune,
    identify_class_filters,
    list_filter_layers,
    prune_filters,
    refit_head,
)
from captum_classfilters.gates import GatedTrainer
from captum_classfilters.identify import collect_features, contrast_classes
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.pruning import prunable_layers

QUIET: dict[str, Any] = {"show_progress": False}
X, Y = torch.rand(6, 3, 5, 4), torch.tensor([0, 1, 2, 1, 0, 2])
DATA = [(X, Y)]


def body(width: int = 6) -> list[nn.Module]:
    return [nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def net() -> nn.Sequential:
    return nn.Sequential(*body(), nn.Linear(6, 3))


class Returns(nn.Module):
    """A network that makes something else of its scores."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = net(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


class Maps(nn.Module):
    """Scores for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu())


class Windows(nn.Module):
    """A block that cuts images in two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat(x.chunk(2, 2))
        return torch.cat(self.inner(halves).chunk(2), 2)


class Frozen(nn.Module):
    """The first layer runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.head(self.second(x).relu().amax((2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv, self.head = (
            nn.Embedding(9, 4),
            nn.Conv1d(4, 6, 2),
            nn.Linear(6, 3),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.embedding(tokens).movedim(1, 2)).relu().amax(2))


class Pair(nn.Module):
    """A layer that puts out two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(x)[0].relu().mean((2, 3)))


class Shuffled(nn.Module):
    """Filters go through an operation that would do something else with fewer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.last = nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.up(self.conv(x))).relu().mean((2, 3)))


def tables_of(model: nn.Module, layer: str, data: Any = DATA, **options: Any) -> Any:
    return LayerFilterContribution(model, layer).identify(data, num_filters=2, **options, **QUIET)


def compiled() -> Any:
    return torch.jit.script(net().eval())


def exported() -> Any:
    return torch.export.export(net().eval(), (X,))


def shared() -> nn.Sequential:
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), relu, nn.Conv2d(6, 6, 1), relu, *body()[2:], nn.Linear(6, 3)
    )


def once(data: list[Any]) -> Any:
    yield from data


def hot() -> Tensor:
    rows = torch.zeros(6, 3)
    rows[torch.arange(6), Y] = 1
    rows[0] = 1
    return rows


def unpacking(text: str) -> Callable[[Any], Any]:
    """The function that a message gives for ``unpack``."""
    found = re.search(r"unpack=(lambda batch: \(.*\))\.$", text)
    assert found, text
    function: Callable[[Any], Any] = eval(
        found[1], {"torch": torch, "edges": torch.tensor([0.3, 0.6])}
    )
    return function


def picking(text: str, model: nn.Module) -> nn.Module:
    """The wrapper that a message gives for the model."""
    found = re.search(r"wrap the model: (ClassScores\(model, .*\)) in place", text)
    assert found, text
    wrapper: nn.Module = eval(found[1], {"ClassScores": ClassScores, "model": model})
    return wrapper


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs, self.head = (
            nn.ModuleList([nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)]),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.head(x.relu().mean((2, 3)))


class Hidden:
    """A function whose model cannot be seen."""

    __slots__ = ("_model",)

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, x: Tensor) -> Any:
        return self._model(x)


hidden = Hidden
WORDS, TOKENS = Words(), torch.randint(0, 9, (6, 7))
SQUARE = torch.rand(6, 5, 5, 5)
CHANGED = Returns(lambda scores: 2 * scores)


class Permuted(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def either() -> nn.Sequential:
    return nn.Sequential(Permuted(0, 2, 3, 1), nn.Linear(5, 5), Permuted(0, 3, 1, 2))


def captum_table(channel_dim: int | None) -> Any:
    model = nn.Sequential(either(), *body(5)[2:], nn.Linear(5, 3))
    method: Any = LayerGradientXActivation(model, model[0])
    if channel_dim is not None:
        method.channel_dim = channel_dim
    return identify_class_filters(method, [(SQUARE, Y)], num_filters=2, **QUIET)


def windowed() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 2), Windows(), *body()[2:], nn.Linear(6, 3))


def bordered() -> nn.Sequential:
    """What a depthwise bias leaves of a filter is read by a convolution with zero padding."""
    parts = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 6, 3, padding=1)]
    return nn.Sequential(*parts, *body()[2:], nn.Linear(6, 3)).eval()


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(6, 3), *body()[1:], nn.Linear(6, 3))


def trainer() -> GatedTrainer:
    model, gate = net(), ClassSpecificGate(3, 6)
    return GatedTrainer(model, gate.attach(model, "1"), torch.optim.SGD(model.parameters(), lr=0.1))


def run_once(model: nn.Sequential) -> nn.Sequential:
    model(X)
    return model


class Case(NamedTuple):
    refused: Callable[[], Any]
    words: str  # of the message
    followed: Callable[[str], Any]  # from the message


TUPLE, MAPS, FLAT = Returns(lambda scores: (scores, 1)), Maps(), net()
ENTRIES: dict[str, Callable[[nn.Module, str, Any], Any]] = {
    "identify": lambda model, layer, data: tables_of(model, layer, data),
    "ablation": lambda model, layer, data: LayerFilterAblation(model, layer).identify(
        data, num_filters=2, **QUIET
    ),
    "accuracy reduction": lambda model, layer, data: LayerFilterAblation(model, layer).identify(
        data, metric="accuracy", **QUIET
    ),
    "evaluation": lambda model, _layer, data: evaluate_classifier(model, data, **QUIET),
}
CASES: dict[str, Case] = {}


def picked(model: nn.Module, layer: str, words: str, entry: Callable[..., Any]) -> Case:
    return Case(
        lambda: entry(model, layer, DATA),
        words,
        lambda text: entry(picking(text, model), layer, DATA),
    )


for entry, run in ENTRIES.items():
    first = r"ClassScores\(model, lambda output: output\[0\]\)"
    CASES[f"a tuple: {entry}"] = picked(TUPLE, "net.1", first, run)
    CASES[f"maps of scores: {entry}"] = picked(MAPS, "conv", r"mean\(\(2, 3\)\)", run)
CASES |= {
    "a batch of a class of its own": Case(
        lambda: tables_of(FLAT, "1", [{"image": X, "label": Y, "mask": X}, {"a": X, "b": X}]),
        r"unpack=lambda batch",
        lambda text: tables_of(
            FLAT, "1", [{"image": X, "label": Y, "mask": X}], unpack=unpacking(text)
        ),
    ),
    "values as labels": Case(
        lambda: tables_of(FLAT, "1", [(X, torch.rand(6))]),
        "torch.bucketize",
        lambda text: tables_of(FLAT, "1", [(X, torch.rand(6))], unpack=unpacking(text)),
    ),
    "a generator that is used up": Case(
        lambda: tables_of(FLAT, "1", once([])),
        "pass a list or a DataLoader",
        lambda _: tables_of(FLAT, "1", list(once(DATA))),
    ),
    "a generator where the data is read twice": Case(
        lambda: fine_tune(net(), once(DATA), DATA, epochs=2, **QUIET),
        "pass a list or a DataLoader",
        lambda _: fine_tune(net(), list(once(DATA)), DATA, epochs=2, **QUIET),
    ),
    "a generator for several epochs of gated training": Case(
        lambda: trainer().fit(once(DATA), epochs=2, **QUIET),
        "pass a list or a DataLoader",
        lambda _: trainer().fit(list(once(DATA)), epochs=2, **QUIET),
    ),
    "multi-hot labels where each image has one class": Case(
        lambda: evaluate_classifier(FLAT, [(X, hot())], **QUIET),
        "needs one class index for each image",
        lambda _: evaluate_classifier(FLAT, [(X, hot().argmax(1))], **QUIET),
    ),
    "multi-hot labels and significance": Case(
        lambda: tables_of(FLAT, "1", [(X, hot())], significance=LabelPermutation(9)),
        "Leave significance=False, or pass class indices",
        lambda _: (
            tables_of(FLAT, "1", [(X, hot())], significance=False),
            tables_of(FLAT, "1", [(X, Y)], significance=LabelPermutation(9)),
        ),
    ),
    "groups of an unknown number": Case(
        lambda: tables_of(FLAT, "1", target=1),
        "pass class_names or num_classes",
        lambda _: (
            tables_of(FLAT, "1", target=1, class_names=["a", "b", "c"]),
            tables_of(FLAT, "1", target=1, num_classes=3),
        ),
    ),
    "a layer that runs twice": Case(
        lambda: tables_of(shared(), "1"),
        r"SeparateRuns\(model, example_inputs\).*'1.0'",
        lambda _: tables_of(SeparateRuns(shared(), X), "1.0"),
    ),
    "SeparateRuns of a model that needs none": Case(
        lambda: SeparateRuns(FLAT, X), "use the model itself", lambda _: tables_of(FLAT, "1")
    ),
    "a layer by name, a function whose model is not found": Case(
        lambda: LayerFilterContribution(hidden(FLAT), "1"),
        "pass the layer's module instead of its name",
        lambda _: LayerFilterFrequency(hidden(FLAT), FLAT[1], top_k=2).attribute(X),
    ),
    "a layer of a similar name": Case(
        lambda: tables_of(MAPS, "conw"),
        r"Did you mean 'conv'",
        lambda text: list_filter_layers(MAPS, X)[re.findall(r"mean '(\w+)'", text)[0]],
    ),
    "a container that never runs": Case(
        lambda: tables_of(Listed(), "convs"),
        r"'convs.1' may run by itself",
        lambda text: tables_of(Listed(), re.findall(r"'([\w.]+)' may run", text)[0]),
    ),
    "a layer of windows": Case(
        lambda: tables_of(windowed(), "1.inner"),
        "Choose the block around it",
        lambda _: tables_of(windowed(), "1"),
    ),
    "a layer of two tensors": Case(
        lambda: tables_of(Paired(), "pair"),
        "choose one of the layers inside it, or explain single images",
        lambda _: (
            tables_of(Paired(), "pair.a"),
            LayerFilterContribution(Paired(), "pair").attribute(X, target=0),
        ),
    ),
    "a layer under no_grad": Case(
        lambda: tables_of(Frozen(), "first"),
        r"choose a layer behind that part, or a method without gradients \(LayerFilterAblation\)",
        lambda _: (
            tables_of(Frozen(), "second"),
            LayerFilterAblation(Frozen(), "first").identify(DATA, num_filters=2, **QUIET),
        ),
    ),
    "a score that is rounded": Case(
        lambda: tables_of(Returns(lambda scores: scores.detach() * 2), "net.1"),
        "LayerFilterAblation needs no gradient",
        lambda _: LayerFilterAblation(
            Returns(lambda scores: scores.detach() * 2), "net.1"
        ).identify(DATA, num_filters=2, **QUIET),
    ),
    "tokens and saliency": Case(
        lambda: ClassFilterSaliency(
            WORDS, "conv", tables_of(WORDS, "conv", [(TOKENS, Y)])
        ).attribute(TOKENS, target=0),
        "LayerFilterContribution gives a score for each filter and position",
        lambda _: LayerFilterContribution(WORDS, "conv").attribute(TOKENS, target=0),
    ),
    "an axis that may be either": Case(
        lambda: FilterGate(nn.Sequential(either(), *body(5)[2:], nn.Linear(5, 3)), "0")(
            torch.ones(6, 5), SQUARE
        ),
        "channel_dim=1 or channel_dim=-1",
        lambda _: FilterGate(
            nn.Sequential(either(), *body(5)[2:], nn.Linear(5, 3)), "0", channel_dim=1
        )(torch.ones(6, 5), SQUARE),
    ),
    "an axis that may be either, a method of Captum": Case(
        lambda: captum_table(None), r"method.channel_dim = -1", lambda _: captum_table(1)
    ),
    "a scripted model": Case(
        lambda: tables_of(compiled(), "1"),
        "give the module that it was made from",
        lambda _: tables_of(net(), "1"),
    ),
    "an exported program": Case(
        lambda: LayerFilterContribution(exported(), "1"),
        "give the module that it was exported from",
        lambda _: tables_of(net(), "1"),
    ),
    "a head whose output is changed": Case(
        lambda: refit_head(CHANGED, DATA, **QUIET),
        r"Use fine_tune\(..., freeze='backbone'\)",
        lambda _: fine_tune(CHANGED, DATA, DATA, epochs=1, freeze="backbone", **QUIET),
    ),
    "a method of equal evidence for all classes": Case(
        lambda: contrast_classes(LayerFilterFrequency(FLAT, "1", top_k=2), DATA, 0, 1, **QUIET),
        "use LayerFilterContribution or LayerFilterAblation",
        lambda _: [
            contrast_classes(method(FLAT, "1"), DATA, 0, 1, **QUIET)
            for method in (LayerFilterContribution, LayerFilterAblation)
        ],
    ),
    "pruning what cannot be followed": Case(
        lambda: prune_filters(Shuffled(), {"conv": [0]}, X),
        "cannot be removed",
        lambda _: [
            prune_filters(Shuffled(), layer.name, X, remove=[0])
            for layer in prunable_layers(Shuffled(), X, **QUIET).prunable
        ],
    ),
    "constants that no bias can stand for": Case(
        lambda: prune_filters(bordered(), "0", X, remove=[0]),
        "constants='drop' removes the filters all the same",
        lambda _: prune_filters(bordered(), "0", X, remove=[0], constants="drop"),
    ),
    "a class without filters": Case(
        lambda: decompose(FLAT, tables_of(FLAT, "1", [(X[Y < 2], Y[Y < 2])])),
        "choose missing='dense' to keep all their weights or missing='bias'",
        lambda _: [
            decompose(FLAT, tables_of(FLAT, "1", [(X[Y < 2], Y[Y < 2])]), missing=missing)
            for missing in ("dense", "bias")
        ],
    ),
    "accuracy of several classes for an image": Case(
        lambda: LayerFilterAblation(FLAT, "1").identify(
            [(X, torch.ones(len(X), 3))], metric="accuracy", **QUIET
        ),
        r"LayerFilterAblation\(model, layer\)\.identify\(loader, metric=function\)",
        lambda _: LayerFilterAblation(FLAT, "1").identify(
            [(X, torch.ones(len(X), 3))],
            metric=lambda scores, labels: ((scores > 0) == (labels > 0)).float().mean(),
            **QUIET,
        ),
    ),
    "a lazy model": Case(
        lambda: tables_of(lazy(), "1"),
        "run the model once on a batch",
        lambda _: tables_of(run_once(lazy()), "1"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_following_a_refusal_works(name):
    torch.manual_seed(0)
    case = CASES[name]
    with pytest.raises(ValueError, match=case.words) as refusal:
        case.refused()
    case.followed(str(refusal.value))


def test_collect_features_of_a_refused_layer_says_which_are_inside():
    with pytest.raises(ValueError, match="choose one of the layers inside it"):
        collect_features(Paired(), "pair", DATA, **QUIET)
    collect_features(Paired(), "pair.a", DATA, **QUIET)
