"""Accuracy and recall against scikit-learn, and what each kind of model means by its output."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score
from torch import nn

from captum_classfilters import ClassScores
from captum_classfilters.metrics import evaluate_classifier
from tests.models import QUIET, batches, joined, known, pool_linear
from tests.pretend_device import host_reads, pretend


class Returns(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def seven_classes():
    model = pool_linear(classes=7)
    data = [(x, (3 * torch.arange(len(x)) + place) % 7) for place, (x, _) in enumerate(batches())]
    with torch.no_grad():
        model.get_parameter("4.weight").mul_(9)
        scores = model(joined(data)[0])
    return model, data, scores, joined(data)[1]


def test_is_scikit_learns():
    model, data, scores, labels = seven_classes()
    found = evaluate_classifier(model, data, **QUIET)
    predicted = scores.argmax(1)
    assert found.accuracy == pytest.approx(float((predicted == labels).double().mean()))
    five = top_k_accuracy_score(labels, scores.numpy(), k=5, labels=range(7))
    assert found.top5_accuracy == pytest.approx(five)
    assert found.confusion.tolist() == confusion_matrix(labels, predicted).tolist()
    assert found.recall.tolist() == pytest.approx(recall_score(labels, predicted, average=None))
    assert found.num_images == 24
    assert repr(found).startswith("ClassifierScores(accuracy=")
    assert evaluate_classifier(pool_linear(), batches(), **QUIET).top5_accuracy is None


def test_a_class_without_images_has_no_recall():
    model, data, _, _ = seven_classes()
    without = [(x, y.clamp(max=3)) for x, y in data]
    recall = evaluate_classifier(model, without, **QUIET).recall
    assert recall.isnan().tolist() == [False] * 4 + [True] * 3


BINARY = {
    "logits": lambda z: z,
    "a column": lambda z: z[:, None],
    "small logits": lambda z: z / 100,
    "probabilities": torch.sigmoid,
    "a column of probabilities": lambda z: torch.sigmoid(z)[:, None],
    "two probabilities": lambda z: torch.stack([1 - z.sigmoid(), z.sigmoid()], 1),
    "an object": lambda z: SimpleNamespace(logits=z[:, None]),
    "named": lambda z: {"logits": z},
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("label", [torch.int64, torch.float32, torch.bool])
def test_one_output_means_two_classes(name, label):
    z = torch.tensor([-3.0, 0.2, 2.0, -0.1, 0.7])
    labels = torch.tensor([0, 1, 1, 1, 0])
    data = [(z[:3], labels[:3].to(label)), (z[3:], labels[3:].to(label)[:, None])]
    found = evaluate_classifier(Returns(BINARY[name]), data, **QUIET)
    assert found.confusion.tolist() == [[1, 1], [1, 2]]


def test_one_logit_of_a_linear_layer_may_lie_between_zero_and_one():
    head = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        head.weight.fill_(1)
    x = torch.tensor([[0.2], [0.4]])
    assert evaluate_classifier(head, [(x, torch.ones(2).long())], **QUIET).accuracy == 1
    ends = nn.Sequential(head, nn.Sigmoid())
    low = [(x - 1, torch.zeros(2).long())]
    assert evaluate_classifier(ends, low, **QUIET).accuracy == 1
    pooled = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(pooled.get_parameter("0.weight"), 0.1)
    nn.init.constant_(pooled.get_parameter("0.bias"), 0.1)
    maps = [(torch.rand(3, 1, 4, 4), torch.ones(3).long())]
    assert evaluate_classifier(pooled, maps, **QUIET).accuracy == 1


def test_one_output_that_is_neither_is_refused_and_the_advice_works():
    data = [(torch.tensor([0.2, 0.4]), torch.tensor([1, 1])), (torch.tensor([-2.0]), [0])]
    model = Returns(lambda z: z)
    with pytest.raises(ValueError, match=r"batch 1 has values outside \[0, 1\]") as refused:
        evaluate_classifier(model, data, **QUIET)
    advice = re.search(r"ClassScores\(.*\)(?= in place)", str(refused.value))
    said = eval(known(advice)[0], {"ClassScores": ClassScores, "torch": torch, "model": model})
    assert evaluate_classifier(said, data, **QUIET).accuracy == 1
    z = torch.tensor([0.2, -2.0, 5.0])
    torch.testing.assert_close(said(z).softmax(1), torch.stack([-z, z], 1).sigmoid())


class TestBadInput:
    def test_loaders_without_images(self):
        model = pool_linear()
        data = batches()
        generator = (batch for batch in data)
        evaluate_classifier(model, generator, **QUIET)
        for loader in ([], generator, [(torch.zeros(0, 2, 6, 6), torch.zeros(0).long())]):
            with pytest.raises(ValueError, match="empty"):
                evaluate_classifier(model, loader, **QUIET)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 3]), "Batch 0 has the label 3"),
            (torch.tensor([0.0, 1.0]), "torch.float32; expected whole numbers"),
            (torch.tensor([True, False]), "torch.bool; expected whole numbers"),
            (torch.tensor([[1, 1, 0], [0, 1, 0]]), "several classes for one image"),
            (torch.tensor([0]), r"shape \(1,\)"),
        ],
    )
    def test_labels(self, labels, message):
        with pytest.raises(ValueError, match=message):
            evaluate_classifier(pool_linear(), [(torch.rand(2, 2, 6, 6), labels)], **QUIET)

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
    def test_scores_that_are_no_numbers(self, wrong):
        scores = torch.eye(3)
        scores[2, 0] = wrong
        data = [(torch.eye(3), torch.arange(3)), (scores, torch.arange(3))]
        with pytest.raises(ValueError, match="NaN or Inf for image 2 of batch 1"):
            evaluate_classifier(nn.Identity(), data, **QUIET)

    def test_a_class_that_is_ruled_out_is_no_error(self):
        scores = torch.eye(3)
        scores[:, 2] = -float("inf")
        data = [(scores[:2], torch.arange(2))]
        assert evaluate_classifier(nn.Identity(), data, **QUIET).accuracy == 1

    def test_outputs_that_are_not_class_scores(self):
        data = [(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))]
        with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\), not \(N, C\).*ClassScores"):
            evaluate_classifier(nn.Identity(), data, **QUIET)
        with pytest.raises(ValueError, match="1 rows of scores for the 2 images"):
            evaluate_classifier(Returns(lambda x: x.mean((2, 3))[:1]), data, **QUIET)


def test_batches_of_other_kinds():
    model, data, _, _ = seven_classes()
    expected = evaluate_classifier(model, data, **QUIET)
    x, y = joined(data)
    loaders: dict[str, list[Any]] = {
        "more members": [(x[:23], y[:23], "names"), (x[23:], y[23:], None)],
        "a tuple of inputs": [((x,), y.tolist())],
        "an empty one": [(x[:0], y[:0]), (x, y)],
        "a mapping": [{"pixel_values": x, "labels": y}],
    }
    for name, loader in loaders.items():
        with torch.inference_mode():
            found = evaluate_classifier(model, loader, **QUIET)
        assert torch.equal(found.confusion, expected.confusion), name
    unpacked = evaluate_classifier(
        model, [{"picture": x, "kind": y}], unpack=lambda b: (b["picture"], b["kind"]), **QUIET
    )
    assert torch.equal(unpacked.confusion, expected.confusion)


@pytest.mark.parametrize("on_device", [False, True])
def test_on_an_accelerator(on_device):
    model, data, _, _ = seven_classes()
    expected = evaluate_classifier(model, data, **QUIET)
    reads = []
    with pretend("cuda") as device:
        model.to(device)
        for times in (1, 2):
            loader = [
                (x.to(device), y.to(device)) if on_device else (x, y) for x, y in data * times
            ]
            host_reads.clear()
            found = evaluate_classifier(model, loader, **QUIET)
            reads.append(len(host_reads))
            if times == 1:
                assert torch.equal(found.confusion, expected.confusion)
                assert found.top5_accuracy == expected.top5_accuracy
                assert {found.confusion.device.type, found.recall.device.type} == {"cpu"}
    assert reads[1] - reads[0] <= 1  # for five more batches
