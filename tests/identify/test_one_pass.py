"""Methods of every kind, at layers of every kind, share one forward pass; tables equal `attribute`."""

from typing import Any

import pytest
import torch

from captum_classfilters import (
    LayerClassGate,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerSingularDirection,
    identify_class_filters,
)
from tests.models import QUIET, batches, deep, pool_linear


def counted(model):
    """How often a model has run, in a list of one number."""
    runs = [0]

    def count(*_):
        runs[0] += 1

    model.register_forward_hook(count)
    return runs


def four_methods(model, layers, gated, decomposed):
    """Methods over several layers each."""
    gate = torch.rand(3, 6, generator=torch.Generator().manual_seed(4))
    return {
        "frequency": LayerFilterFrequency(model, layers, top_k=2),
        "contribution": LayerFilterContribution(model, layers),
        "gate": LayerClassGate(model, gated, gate),
        "signals": LayerSingularDirection(model, decomposed),
        "directions": LayerSingularDirection(model, decomposed, evidence="contribution"),
    }


def linear_before_head():
    """A convolution, then two linear layers with nothing between them."""
    model = pool_linear(classes=6)
    return model.append(torch.nn.Linear(6, 3)).eval()


def flat(results):
    """Tables of methods over one layer or several, in order."""
    return [
        table
        for value in results.values()
        for table in (value if isinstance(value, list) else [value])
    ]


def means_of_attributions(method, data, num_classes=3):
    """For each layer, (C, K): the mean over each class's images of what `attribute` gives."""
    several = isinstance(method.layer, list)
    scores, labels = [], []
    for x, y in data:
        parts = method.attribute(x, target=y)
        parts = parts if several else [parts]
        scores.append([part.flatten(2).sum(2) if part.dim() > 2 else part for part in parts])
        labels.append(y)
    classes = torch.cat(labels)
    return [
        torch.stack([torch.cat(parts).double()[classes == c].mean(0) for c in range(num_classes)])
        for parts in zip(*scores, strict=True)
    ]


@pytest.mark.parametrize(
    ("model", "layers", "gated", "decomposed", "runs"),
    [
        # Everything feeds the head, and derivatives are its weights: one run of each batch, and another
        # of the first, to see whether it gives the same scores.
        (linear_before_head, ["4"], "4", ["4"], 5 + 1),
        # Gradients are needed, which the first batch shows: it runs twice anyway. What the contributions of
        # stage 1 miss is measured on it at the end: as at first, and without the stage's filters.
        (deep, ["stage1", "stage2"], "stage2", ["stage1.0", "stage2.0", "head"], 6 + 3),
    ],
)
def test_one_forward_pass_for_each_batch(model, layers, gated, decomposed, runs):
    model, data = model(), batches()
    methods = four_methods(model, layers, gated, decomposed)
    number = counted(model)
    tables = identify_class_filters(methods, data, num_filters=2, **QUIET)
    assert number[0] == runs
    assert len(data) == 5
    expected = [part for method in methods.values() for part in means_of_attributions(method, data)]
    for table, means in zip(flat(tables), expected, strict=True):
        torch.testing.assert_close(table.scores, means, atol=1e-6, rtol=1e-4)
    names = [table.layer for table in flat(tables)]
    assert [name for name in names if name.endswith(".directions")] == [
        f"{layer}.directions" for layer in decomposed * 2
    ]


def test_alone_and_together_are_the_same():
    model, data = deep(), batches()
    methods = four_methods(model, ["stage1", "stage2"], "stage2", ["stage1.0", "head"])
    together = identify_class_filters(methods, data, num_filters=2, **QUIET)
    for key, method in methods.items():
        alone = identify_class_filters(method, data, num_filters=2, **QUIET)
        for one, other in zip(flat({key: alone}), flat({key: together[key]}), strict=True):
            torch.testing.assert_close(one.scores, other.scores, atol=1e-6, rtol=1e-5)
            assert torch.equal(one.selected, other.selected)


class Powers(torch.nn.Module):
    """Score c is the sum of the filters' means to the power of 1, 2 and 3."""

    def __init__(self):
        super().__init__()
        self.maps = torch.nn.Identity()

    def forward(self, x):
        means = self.maps(x).mean((2, 3))
        return torch.stack([(means**power).sum(1) for power in (1, 2, 3)], 1)


def test_what_contributions_miss():
    """At the power p contributions sum to p times what all filters do: p - 1 is missing."""
    x = torch.rand(7, 4, 3, 3)
    model = Powers()
    method = LayerFilterContribution(model, model.maps)
    for power in (1, 2, 3):
        data = [(x[:4], torch.full((4,), power - 1)), (x[4:], torch.full((3,), power - 1))]
        options: dict[str, Any] = {"num_classes": 3, "show_progress": False}
        record = method.identify(data, **options).provenance
        assert record["exact"] is False
        assert record["missing"] == pytest.approx(power - 1, abs=1e-6)
        path = method.identify(data, attribute_kwargs={"n_steps": 8}, **options).provenance
        assert path["missing"] == pytest.approx(0, abs=1e-6)
        grouped = method.identify([(x, torch.arange(7) % 3)], target=power - 1, **options)
        assert grouped.provenance["missing"] == pytest.approx(power - 1, abs=1e-6)
    exact = LayerFilterContribution(pool_linear(), "1")
    images = torch.rand(4, 2, 5, 5)
    assert "missing" not in exact.identify([(images, torch.arange(4) % 3)], **options).provenance


def test_a_first_batch_without_a_class_has_nothing_to_measure():
    x, hot = torch.rand(8, 4, 3, 3), torch.zeros(8, 3)
    hot[4:, 1] = 1
    model = Powers()
    table = LayerFilterContribution(model, model.maps).identify(
        [(x[:4], hot[:4]), (x[4:], hot[4:])], num_filters=2, **QUIET
    )
    plain = LayerFilterContribution(model, model.maps).identify([(x[4:], hot[4:])], **QUIET)
    assert torch.equal(table.scores[1], plain.scores[1])
    assert table.counts.tolist() == [0, 4, 0]
    assert "missing" not in table.provenance
    votes = LayerFilterFrequency(model, model.maps, top_k=2)
    first = votes.identify([(x[:4], hot[:4]), (x[4:], hot[4:])], **QUIET)
    assert torch.equal(first.scores[1], votes.identify([(x[4:], hot[4:])], **QUIET).scores[1])


def test_images_without_a_class_do_not_count_as_missing():
    x, hot = torch.rand(6, 4, 3, 3), torch.zeros(6, 3)
    hot[:3, 2] = 1  # the power of 3, where 2 is missing; at that of 1, class 0, nothing is
    model = Powers()
    method = LayerFilterContribution(model, model.maps)
    record = method.identify([(x, hot)], num_filters=2, **QUIET).provenance
    assert record["missing"] == pytest.approx(2, abs=1e-6)


def test_a_model_that_needs_a_filter_keeps_its_table(caplog):
    class Needy(Powers):
        def forward(self, x):
            scores = super().forward(x)
            if not scores.any():
                raise RuntimeError("nothing to go by")
            return scores

    x, y = torch.rand(6, 4, 3, 3), torch.arange(6) % 3
    model, plain = Needy(), Powers()
    with caplog.at_level("WARNING", logger="captum_classfilters"):
        table = LayerFilterContribution(model, model.maps).identify(
            [(x, y)], num_filters=2, **QUIET
        )
    expected = LayerFilterContribution(plain, plain.maps).identify([(x, y)], num_filters=2, **QUIET)
    assert torch.equal(table.scores, expected.scores)
    assert "missing" not in table.provenance
    assert "nothing to go by" in caplog.text
