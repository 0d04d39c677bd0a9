"""Twelve kinds of data by seven methods: every table is that of plain hooks and autograd."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_average_precision

from captum_classfilters import (
    ClassScores,
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerSingularDirection,
    identify_class_filters,
)
from tests.models import QUIET

NUMBER, SIZES, FILTERS, TOP = 23, (7, 7, 7, 2), 5, 2


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Batches of uneven sizes."""
    return list(zip(*(tensor.split(list(SIZES)) for tensor in tensors), strict=True))


class Net(nn.Module):
    """A convolution, then something that is not linear; `finish` makes of scores what it returns."""

    def __init__(self, outputs: int, finish: Callable[[Tensor], Any] = lambda scores: scores):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.mix = nn.Conv2d(2, FILTERS, 3), nn.Conv2d(FILTERS, 6, 2)
        self.head, self.finish = nn.Linear(6, outputs), finish

    def forward(self, images: Tensor) -> Any:
        maps = self.mix(torch.tanh(self.conv(images)))
        return self.finish(self.head(torch.relu(maps).mean((2, 3))))


class Pixels(Net):
    """Scores of every pixel."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = torch.relu(self.mix(torch.tanh(self.conv(images))))
        return {"out": self.head(maps.movedim(1, -1)).movedim(-1, 1)}


class ImageAndTable(Net):
    def forward(self, images: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        maps = self.mix(torch.tanh(self.conv(images)))
        return self.head(torch.relu(maps).mean((2, 3)) * table.sigmoid())


class Words(nn.Module):
    """A text classifier over whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(11, 4), nn.Conv1d(4, FILTERS, 3)
        self.head = nn.Linear(FILTERS, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        maps = self.conv(self.embedding(input_ids).movedim(1, 2))
        return self.head(torch.tanh(maps).amax(2))


@dataclass
class Case:
    """One kind of data.

    ``explained`` are the pairs of image, row of the table and class whose score is explained.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loader: list[Any]
    scores: Callable[[Any], Tensor]
    explained: list[tuple[int, int, int]]
    rows: int
    options: dict[str, Any] = field(default_factory=dict)
    wrapped: nn.Module | None = None


X, Y = numbers(NUMBER, 2, 7, 6), torch.arange(NUMBER) * 5 % 3
EACH = [(n, c, c) for n, c in enumerate(Y.tolist())]


def plus_and_minus(logit: Tensor) -> Tensor:
    z = logit.reshape(-1)
    return torch.stack([-z, z], 1)


def case_index() -> Case:
    return Case(Net(3), (X,), split(X, Y), lambda s: s, EACH, 3)


def case_one_hot() -> Case:
    hot = torch.eye(3)[Y]
    return Case(Net(3), (X,), split(X, hot), lambda s: s, EACH, 3)


def case_multi_hot() -> Case:
    hot = numbers(NUMBER, 3, seed=4) > 0
    pairs = [(n, c, c) for n in range(NUMBER) for c in range(3) if hot[n, c]]
    assert len(pairs) not in (0, NUMBER)
    return Case(Net(3), (X,), split(X, hot.float()), lambda s: s, pairs, 3)


def binary(finish: Callable[[Tensor], Tensor], labels: Tensor) -> Case:
    pairs = [(n, c, c) for n, c in enumerate((Y % 2).tolist())]
    return Case(Net(1, finish), (X,), split(X, labels), plus_and_minus, pairs, 2)


def case_binary_column() -> Case:
    return binary(lambda z: z, (Y % 2).float()[:, None])


def case_binary_vector() -> Case:
    return binary(lambda z: z[:, 0], (Y % 2).float())


def case_regression() -> Case:
    """Named bins of a value; the one output itself is explained."""
    value = numbers(NUMBER, seed=5)
    bins = (value > 0).long()
    return Case(
        Net(1),
        (X,),
        split(X, value),
        plus_and_minus,
        [(n, b, 1) for n, b in enumerate(bins.tolist())],
        2,
        {
            "target": 1,
            "class_names": ["low", "high"],
            "unpack": lambda batch: (batch[0], (batch[1] > 0).long()),
        },
    )


def case_groups() -> Case:
    site = torch.arange(NUMBER) // 4 % 4
    pairs = [(n, s, 2) for n, s in enumerate(site.tolist())]
    return Case(
        Net(3), (X,), split(X, site), lambda s: s, pairs, 4, {"target": 2, "num_classes": 4}
    )


def case_dict() -> Case:
    loader = [{"pixel_values": x, "labels": y} for x, y in split(X, Y)]
    net = Net(3, lambda scores: {"logits": scores, "loss": None})
    return Case(net, (X,), loader, lambda out: out["logits"], EACH, 3)


def case_triple() -> Case:
    loader = [(x, y.tolist(), "where it comes from") for x, y in split(X, Y)]
    return Case(Net(3), (X,), loader, lambda s: s, EACH, 3)


def case_several_inputs() -> Case:
    table = numbers(NUMBER, 6, seed=7)
    loader = [((x, t), y) for x, t, y in split(X, table, Y)]
    return Case(ImageAndTable(3), (X, table), loader, lambda s: s, EACH, 3)


def case_segmentation() -> Case:
    net = Pixels(3)
    mean = ClassScores(net, lambda out: out["out"].mean((2, 3)))
    return Case(net, (X,), split(X, Y), lambda out: out["out"].mean((2, 3)), EACH, 3, wrapped=mean)


def case_tokens() -> Case:
    tokens = torch.arange(NUMBER * 8).reshape(NUMBER, 8) * 7 % 11
    loader = [{"input_ids": t, "label": y} for t, y in split(tokens, Y)]
    return Case(Words(), (tokens,), loader, lambda s: s, EACH, 3)


CASES = {
    name.removeprefix("case_"): make
    for name, make in list(globals().items())
    if name.startswith("case_")
}
GATE = numbers(4, FILTERS, seed=9).abs()


# -- the truth -------------------------------------------------------------------------------------


def run(case: Case, edit: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The layer's maps (N, K, P) and the scores (N, C), with the maps edited."""
    seen = []

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        changed = edit(output)
        seen.append(changed)
        return changed

    handle = case.model.get_submodule("conv").register_forward_hook(hook)
    scores = case.scores(case.model(*case.inputs))
    handle.remove()
    return seen[0], scores


def evidence_of_votes(case: Case, targets: list[int]) -> Tensor:
    maps, _ = run(case, lambda maps: maps)
    means = maps.flatten(2).mean(2)
    return torch.zeros_like(means).scatter(1, means.topk(TOP, dim=1).indices, 1.0)


def evidence_of_contributions(case: Case, targets: list[int]) -> Tensor:
    maps, scores = run(case, lambda maps: maps.detach().requires_grad_())
    own = scores[torch.arange(NUMBER), targets].sum()
    (gradient,) = torch.autograd.grad(own, maps)
    return (maps * gradient).flatten(2).sum(2)


def evidence_of_ablation(case: Case, targets: list[int]) -> Tensor:
    rows = torch.arange(NUMBER)
    _, full = run(case, lambda maps: maps)
    drops = []
    for k in range(FILTERS):

        def without(maps: Tensor, k: int = k) -> Tensor:
            kept = torch.ones(FILTERS)
            kept[k] = 0
            return maps * kept.reshape(-1, *[1] * (maps.dim() - 2))

        drops.append((full - run(case, without)[1])[rows, targets])
    return torch.stack(drops, 1)


def evidence_of_gates(case: Case, targets: list[int]) -> Tensor:
    maps, _ = run(case, lambda maps: maps)
    return maps.flatten(2).sum(2) * GATE[targets]


def evidence_of_directions(case: Case, targets: list[int]) -> Tensor:
    maps, _ = run(case, lambda maps: maps)
    left = torch.linalg.svd(
        case.model.get_parameter("conv.weight").flatten(1), full_matrices=False
    ).U
    return ((maps.flatten(2).mean(2)) - case.model.get_parameter("conv.bias")) @ left


METHODS: dict[str, tuple[Callable[..., Any], Callable[[Case, list[int]], Tensor]]] = {
    "frequency": (lambda m, name: LayerFilterFrequency(m, name, top_k=TOP), evidence_of_votes),
    "contribution": (LayerFilterContribution, evidence_of_contributions),
    "ablation": (LayerFilterAblation, evidence_of_ablation),
    "gate": (lambda m, name: LayerClassGate(m, name, GATE), evidence_of_gates),
    "direction": (LayerSingularDirection, evidence_of_directions),
    "captum": (
        lambda m, name: LayerGradientXActivation(m, dict(m.named_modules())[name]),
        evidence_of_contributions,
    ),
}


def truth(case: Case, evidence: Callable[[Case, list[int]], Tensor]) -> Tensor:
    """Means of the evidence over each row's pairs, (rows, K)."""
    by_class = {
        c: evidence(case, [c] * NUMBER).detach().double() for c in {c for _, _, c in case.explained}
    }
    table = torch.zeros(case.rows, FILTERS, dtype=torch.float64)
    for row in range(case.rows):
        own = [by_class[c][n] for n, r, c in case.explained if r == row]
        table[row] = torch.stack(own).mean(0)
    return table


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CASES)
def test_every_method_on_every_kind_of_data(kind, method):
    case = CASES[kind]()
    case.model.eval()
    model = case.wrapped or case.model
    name = "wrapped_model.conv" if case.wrapped and method == "captum" else "conv"
    make, evidence = METHODS[method]
    table = identify_class_filters(make(model, name), case.loader, **case.options, **QUIET)
    expected = truth(case, evidence)
    if method == "direction":  # singular vectors are known up to their signs
        expected, found = expected.abs(), table.scores.abs()
        assert table.layer == "conv.directions"
    else:
        found = table.scores
        assert table.layer == "conv"
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)
    counts = [sum(r == row for _, r, _ in case.explained) for row in range(case.rows)]
    assert table.counts.tolist() == counts
    if "class_names" in case.options:
        assert table.class_names == tuple(case.options["class_names"])


def right_answers(case: Case, labels: Tensor) -> Tensor:
    """The images that become wrong without each filter, and those that become right, (2, C, K)."""
    lost = torch.zeros(2, case.rows, FILTERS, dtype=torch.int64)
    with torch.no_grad():
        full = run(case, lambda maps: maps)[1].argmax(1) == labels
        for k in range(FILTERS):

            def without(maps: Tensor, k: int = k) -> Tensor:
                maps = maps.clone()
                maps[:, k] = 0
                return maps

            still = run(case, without)[1].argmax(1) == labels
            for c in range(case.rows):
                lost[0, c, k] = (full & ~still & (labels == c)).sum()
                lost[1, c, k] = (~full & still & (labels == c)).sum()
    return lost


NO_ACCURACY = {"multi_hot": "multi-hot", "regression": None, "groups": None}


@pytest.mark.parametrize("kind", CASES)
def test_accuracy_reduction_on_every_kind_of_data(kind):
    case = CASES[kind]()
    case.model.eval()
    method = LayerFilterAblation(case.wrapped or case.model, "conv")
    if kind in NO_ACCURACY:
        if NO_ACCURACY[kind]:  # an image of several classes has no one right answer
            with pytest.raises(ValueError, match=NO_ACCURACY[kind]):
                method.identify(case.loader, metric="accuracy", **QUIET)
        return
    labels = torch.tensor([c for _, _, c in case.explained])
    with torch.no_grad():  # no class is far ahead, so that a filter makes a difference
        means = run(case, lambda maps: maps)[1].mean(0)
        case.model.head.bias -= means[-len(case.model.head.bias) :]
    found = method.identify(case.loader, metric="accuracy", **QUIET)
    expected = right_answers(case, labels)
    assert int(expected.sum()) > 0
    assert torch.equal(torch.stack([found.lost, found.gained]), expected)


def test_multi_hot_labels_are_measured_by_a_metric_that_fits():
    """Average precision with and without each filter."""

    def precision(scores: Tensor, labels: Tensor) -> Tensor:
        return multilabel_average_precision(scores, labels.long(), num_labels=3)

    case = CASES["multi_hot"]()
    case.model.eval()
    found = LayerFilterAblation(case.model, "conv").identify(case.loader, metric=precision, **QUIET)
    hot = torch.cat([labels for _, labels in case.loader])
    with torch.no_grad():
        for k in range(FILTERS):
            kept = (torch.arange(FILTERS) != k)[:, None, None]
            scores = run(case, partial(torch.mul, kept))[1]
            assert found.without[k] == pytest.approx(float(precision(scores, hot)), abs=1e-6)
        full = run(case, lambda maps: maps)[1]
    assert found.metric == pytest.approx(float(precision(full, hot)), abs=1e-6)
    assert found.reduction.abs().max() > 0
