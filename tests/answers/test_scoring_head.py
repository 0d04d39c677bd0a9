"""Every function that edits or reads the head takes the layer whose rows are the classes, or says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_classfilters import ClassScores, LayerFilterContribution, decompose
from captum_classfilters.answers import (
    ClassFilterOOD,
    audit_forgetting,
    build_specialist,
    find_shortcuts,
    forget_class,
    repair,
    repair_confusion,
)
from captum_classfilters.heads import accuracy_curve, find_head, fine_tune, refit_head
from captum_classfilters.heads.linear_head import scoring_head
from captum_classfilters.pruning import specialize

QUIET: dict[str, Any] = {"show_progress": False}
CLASSES = 5


def images() -> list[tuple[Tensor, Tensor]]:
    """Five classes, each bright in a channel of its own, and some noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % CLASSES
    x = 0.6 * torch.rand(150, CLASSES, 4, 4, generator=generator)
    x[torch.arange(150), labels] += 0.3
    labels[::15] = 1  # some of class 0 are not what they look like
    return list(zip(x.split(64), labels.split(64), strict=True))


class Net(nn.Module):
    """A convolution that hands its channels on, shuffled among eight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(CLASSES, 8, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.conv.weight.add_(torch.eye(8, CLASSES)[:, :, None, None] * 3)
            self.fc.weight.add_(torch.eye(CLASSES, 8) * 3)
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class UnusedHead(Net):
    """Another head is registered after it, runs after it, and does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        scores = self.fc(features)
        self.aux(features)
        return scores


class HeadOfTraining(UnusedHead):
    """The other head runs in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else Net.forward(self, x)


class TwoOutputs(UnusedHead):
    """Both heads' outputs are returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features = self.features(x)
        return self.fc(features), self.aux(features)


class OtherOrder(Net):
    """The same scores from a head whose rows are in another order."""

    order = torch.tensor([3, 0, 4, 1, 2])

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.fc.weight.copy_(self.fc.weight[self.order.argsort()].clone())
            self.fc.bias.copy_(self.fc.bias[self.order.argsort()].clone())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order]


class MeanOfTwo(UnusedHead):
    """Scores are the mean of two heads' outputs."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return (self.fc(features) + self.aux(features)) / 2


def table(model: nn.Module):
    inside = model.wrapped_model if isinstance(model, ClassScores) else model
    layer = inside.get_submodule("relu")
    return LayerFilterContribution(model, layer).identify(images(), num_filters=3, **QUIET)


def brighter(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1] += 1
    return x


def answer(model: nn.Module) -> Tensor:
    return torch.cat([model(x) for x, _ in images()]).detach()


def fitted(model: nn.Module, fit: Callable[[nn.Module], object]) -> Tensor:
    fit(model)
    return answer(model)


def curve(model: nn.Module) -> Tensor:
    found = accuracy_curve(model, table(model), images(), num_filters=[1, 3], **QUIET)
    return torch.tensor(next(iter(found.accuracy.values())))


def shortcuts(model: nn.Module) -> Tensor:
    return find_shortcuts(model, images(), brighter, permutations=300, **QUIET).weight


def tuned(model: nn.Module) -> object:
    options = {"epochs": 1, "freeze": "backbone", "learning_rate": 0.1, **QUIET}
    return fine_tune(model, images(), images()[:1], **options)


def specialist(model: nn.Module) -> Tensor:
    found = build_specialist(model, [3, 1], images(), budget=0.7, **QUIET)
    assert found.accuracy[1] > 0.6
    return found.accuracy[:1]  # another head counts, and more or less is left


#: What each function makes of a model, as numbers.
ANSWERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "decompose": lambda m: answer(decompose(m, table(m), example_inputs=images()[0][0])),
    "accuracy_curve": curve,
    "forget_class": lambda m: answer(forget_class(m, images(), 1, **QUIET)),
    "audit_forgetting": lambda m: torch.tensor(
        [
            float(part[0])
            for part in vars(audit_forgetting({"m": m}, 1, images(), images(), **QUIET)).values()
            if isinstance(part, Tensor)
        ]
    ),
    "find_shortcuts": shortcuts,
    "repair_confusion": lambda m: answer(
        repair_confusion(m, images()[:2], images()[2:], 1, 0, size=2, **QUIET).model
    ),
    "ClassFilterOOD": lambda m: ClassFilterOOD(m, table(m)).fit(images(), **QUIET)(images()[0][0]),
    "build_specialist": specialist,
    "specialize": lambda m: (
        specialize(m, table(m), [3, 1], images()[0][0]).model(images()[0][0]).detach()
    ),
    "refit_head": lambda m: fitted(m, lambda model: refit_head(model, images(), **QUIET)),
    "fine_tune": lambda m: fitted(m, tuned),
}

SAME = {
    "unused head": UnusedHead,
    "head of training": HeadOfTraining,
    "first of two outputs": lambda: ClassScores(TwoOutputs(), lambda output: output[0]),
}
#: Functions that train need no rows; what edits measure in the whole model, other heads may add to.
NEEDS_NO_ROWS = {"fine_tune"}
MAY_BE_ADDED_TO = {"find_shortcuts", "repair_confusion"}


@pytest.fixture(scope="module")
def expected():
    known = {}

    def of(name: str) -> Tensor:
        if name not in known:
            known[name] = ANSWERS[name](Net())
        return known[name]

    return of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("kind", SAME)
def test_another_head_makes_no_difference(name, kind, expected):
    model = SAME[kind]()
    assert torch.equal(answer(model), answer(Net()))
    assert torch.allclose(ANSWERS[name](model), expected(name), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ANSWERS if name not in NEEDS_NO_ROWS])
def test_rows_in_another_order_are_refused(name):
    with pytest.raises(ValueError, match="head"):
        ANSWERS[name](OtherOrder())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ANSWERS.keys() - NEEDS_NO_ROWS - MAY_BE_ADDED_TO))
def test_a_mean_of_two_heads_is_refused(name):
    with pytest.raises(ValueError, match="head"):
        ANSWERS[name](MeanOfTwo())


def test_the_advice_works():
    model = OtherOrder()
    with pytest.raises(ValueError, match=r"Output 0 of the head 'fc'.*replace_head\(inner, 'fc'"):
        forget_class(model, images(), 1, **QUIET)
    picked = ClassScores(Net(), lambda scores: scores[:, [2, 0]])
    with pytest.raises(ValueError, match="scores of 2 classes, and its head 'fc' 5 outputs"):
        scoring_head(picked, [(x, y % 2) for x, y in images()])


def test_what_follows_the_head_may_keep_the_order():
    """Temperatures, softmax, clipping at what no output reaches."""
    for follow in (lambda z: z / 3, lambda z: z.softmax(1), lambda z: z.clamp(-50, 50)):
        head, _ = scoring_head(ClassScores(Net(), follow), images())
        assert head.name == "fc"


def test_loaders_that_are_read_once_lose_no_batch():
    whole = forget_class(Net(), images(), 1, **QUIET)
    once = forget_class(Net(), iter(images()), 1, **QUIET)
    assert torch.equal(answer(whole), answer(once))
    _, rest = scoring_head(Net(), iter(images()))
    assert len([*rest]) == len(images())


def test_the_head_that_puts_out_the_scores_is_found():
    assert find_head(UnusedHead())[0] == "aux"  # nothing has run
    assert find_head(UnusedHead(), images()[0][0])[0] == "fc"
    assert find_head(MeanOfTwo(), images()[0][0])[0] == "aux"  # the last one that ran


NAN = [(x * float("nan"), y) for x, y in images()]


@pytest.mark.parametrize(
    "call",
    [
        lambda model: find_shortcuts(model, NAN, lambda x: x, **QUIET),
        lambda model: repair_confusion(model, NAN, NAN, 0, 1, **QUIET),
        lambda model: forget_class(model, NAN, 1, **QUIET),
        lambda model: build_specialist(model, [0, 1], NAN, **QUIET),
        lambda model: refit_head(model, NAN, **QUIET),
        lambda model: repair(
            model,
            find_shortcuts(model, images(), lambda x: x + 1, **QUIET),
            NAN,
            lambda x: x,
            outputs=[1],
            **QUIET,
        ),
        lambda model: audit_forgetting({"model": model}, 1, NAN, NAN, **QUIET),
        lambda model: ClassFilterOOD(
            model, LayerFilterContribution(model, "relu").identify(images(), num_filters=2, **QUIET)
        ).fit(NAN),
    ],
)
def test_images_that_are_no_numbers_are_not_laid_at_the_heads_door(call):
    with pytest.raises(ValueError, match="NaN or Inf"):
        call(Net())
