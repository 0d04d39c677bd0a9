"""From what a model returns to scores, and from targets to the score that is explained."""

from types import SimpleNamespace

import pytest
import torch

from captum_classfilters._core.outputs import (
    are_probabilities,
    class_scores,
    log_probabilities,
    scores_per_class,
    two_classes,
)
from captum_classfilters._core.targets import class_indices, own_scores

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def test_where_scores_are_found():
    for output in (LOGITS, SimpleNamespace(logits=LOGITS), {"logits": LOGITS}, {"out": LOGITS}):
        assert class_scores(output) is LOGITS
    with pytest.raises(ValueError, match=r"a tuple of 2 \(Tensor, int\).*ClassScores"):
        class_scores((LOGITS, 1))
    with pytest.raises(ValueError, match="a dict with 'a'"):
        class_scores({"a": LOGITS})
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\), not \(N, C\).*mean over pixels"):
        scores_per_class(torch.zeros(2, 3, 4))


def test_one_logit_is_two_classes():
    z = torch.tensor([2.0, -1.0])
    for output in (z, z[:, None]):
        assert scores_per_class(output).tolist() == [[-2.0, 2.0], [1.0, -1.0]]
    assert two_classes(LOGITS) is LOGITS
    expected = torch.stack([(-z).sigmoid(), z.sigmoid()], 1)
    assert torch.allclose(log_probabilities(z[:, None]).exp(), expected)


def test_probabilities_are_not_put_through_a_softmax_again():
    probabilities = LOGITS.softmax(1)
    assert are_probabilities(probabilities)
    assert not are_probabilities(LOGITS)
    assert not are_probabilities(probabilities * 1.1)
    assert torch.allclose(log_probabilities(probabilities, True), LOGITS.log_softmax(1))
    assert torch.allclose(log_probabilities(LOGITS), LOGITS.log_softmax(1))


@pytest.mark.parametrize("target", [1, torch.tensor([1, 1]), [1, 1], torch.tensor(1)])
def test_targets(target):
    assert own_scores(LOGITS, target, 2).tolist() == [-2.0, 3.0]
    assert class_indices(3, target, 2).tolist() == [1, 1]


def test_targets_of_one_logit_and_of_maps():
    z = torch.tensor([2.0, -1.0])
    for scores in (z, z[:, None]):
        assert own_scores(scores, None, 2).tolist() == [2.0, -1.0]
        assert own_scores(scores, 1, 2).tolist() == [2.0, -1.0]
        assert own_scores(scores, torch.tensor([0, 1]), 2).tolist() == [-2.0, -1.0]
    maps = torch.arange(24.0).reshape(2, 3, 4)
    assert own_scores(maps, (2, 1), 2).tolist() == [9.0, 21.0]


def test_missing_and_unfit_targets_are_refused_as_captum_does():
    with pytest.raises(AssertionError, match="target="):
        own_scores(LOGITS, None, 2)
    with pytest.raises(AssertionError, match="target="):
        class_indices(3, None, 2)
    with pytest.raises(AssertionError):
        own_scores(LOGITS, torch.tensor([1, 1, 1]), 2)
    with pytest.raises((AssertionError, IndexError)):
        class_indices(3, 3, 2)


def test_the_advice_picks_the_scores_of_a_mapping():
    output = {"features": torch.rand(2, 4, 3, 3), "scores": torch.rand(2, 3)}
    with pytest.raises(ValueError, match=r"lambda output: output\['scores'\]\)"):
        class_scores(output)
    with pytest.raises(ValueError, match=r"lambda output: output\.scores\)"):
        class_scores(SimpleNamespace(scores=output["scores"]))
