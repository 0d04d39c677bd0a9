"""Networks with random weights beside the model: which, and where."""

import pytest
import torch
from torch import nn

from captum_classfilters import LayerFilterContribution
from captum_classfilters.identify import random_weights_null
from captum_classfilters.metrics import cascading_randomization
from tests.models import QUIET, batches, deep
from tests.pretend_device import pretend


def null_of(model, data, **options):
    method = LayerFilterContribution(model, "stage2")
    return random_weights_null(method, data, num_filters=2, **QUIET, **options)


def test_no_random_network_is_the_one_that_the_model_began_as():
    """A model is often made with a small seed, and its own beginning is no random network to it."""
    for seed in range(3):
        model = deep(seed=seed)
        state = torch.get_rng_state()
        null = null_of(model, batches(), repetitions=3, seed=0)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(
            not torch.allclose(table.scores, null.class_filters.scores) for table in null.random
        )
        again = null_of(deep(seed=seed), batches(), repetitions=2, seed=0)
        for first, second in zip(null.random, again.random, strict=False):
            assert torch.equal(first.scores, second.scores)
    other = null_of(deep(), batches(), repetitions=2, seed=1)
    assert not torch.equal(other.random[0].scores, again.random[0].scores)


def test_on_a_device():
    expected = null_of(deep(), batches(), repetitions=2)
    with pretend("meta") as device:
        found = null_of(deep().to(device), batches(), repetitions=2)
    for left, right in zip(found.random, expected.random, strict=True):
        torch.testing.assert_close(left.scores, right.scores, atol=1e-6, rtol=1e-4)
    assert torch.equal(found.class_filters.p_values, expected.class_filters.p_values)
    torch.testing.assert_close(found.overlap, expected.overlap)


@pytest.mark.parametrize(
    "changed",
    [
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.weight_norm,
        torch.nn.utils.parametrizations.weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_computed_weights_are_refused(changed):
    """New numbers would be computed from the old ones in the next forward pass."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    changed(model[0])
    images = torch.rand(8, 2, 4, 3)
    model(images).sum().backward()
    method = LayerFilterContribution(model, model[1])
    with pytest.raises(
        ValueError, match="cannot be given new weights: the weight of '0' is computed"
    ):
        random_weights_null(method, [(images, torch.arange(8) % 2)], repetitions=1, **QUIET)
    with pytest.raises(
        ValueError, match="cannot be given new weights: the weight of '0' is computed"
    ):
        cascading_randomization(
            model, lambda twin: LayerFilterContribution(twin, "1"), images, target=1
        )


def test_one_method_at_one_layer():
    class Loader:
        def __iter__(self):
            raise AssertionError("read")

    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    for methods in (
        LayerFilterContribution(model, [model[0]]),
        LayerFilterContribution(model, [model[0], model[1]]),
        [LayerFilterContribution(model, model[1])],
    ):
        with pytest.raises(ValueError, match="one method at one layer"):
            random_weights_null(methods, Loader(), **QUIET)  # type: ignore[arg-type]
