"""Public functions of Tensors alone, with all of them or any one on an accelerator: the CPU's results."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_classfilters import ClassFilters, gates, heads, pruning, spectral, testing
from tests.metrics.test_any_device import KINDS_OF_DATA, tensors_of
from tests.pretend_device import pretend
from tests.test_arguments import FUNCTIONS, STRICT

FEATURES = torch.rand(24, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(24) % 3
SCORES = torch.rand(3, 6, generator=torch.Generator().manual_seed(4))
MASK = SCORES > 0.5
MAPS = torch.rand(24, 6, 5, 5, generator=torch.Generator().manual_seed(5))
BOXES = torch.tensor([[1, 1, 4, 3]]).expand(24, 4)
ORDER = torch.tensor([3, 0, 5, 1, 2, 4])
TABLE = ClassFilters(SCORES, torch.ones(3)).select(num_filters=2)
SPECTRUM = torch.linspace(9, 1, 40)
OF_FEATURES = {"features": FEATURES, "labels": LABELS}
OF_SCORES = {"scores": FEATURES, "labels": LABELS}

TAKEN: dict[str, dict[str, Any]] = {
    "gates.filter_correlation": {"weight": SCORES},
    "gates.gate_similarity": {"gate": SCORES},
    "heads.coverage": {"clusters": LABELS, "kept": FEATURES[:, 0] > 0.5},
    "heads.diversity": {"vectors": FEATURES.T, "kept": MASK[0]},
    "heads.effective_rank": {"vectors": FEATURES.T, "kept": MASK[0]},
    "heads.essentiality": {
        **OF_FEATURES,
        "weight": SCORES,
        "bias": SCORES[:, 0],
        "class_filters": MASK,
    },
    "heads.filter_clusters": {"vectors": FEATURES.T},
    "heads.gram_spectrum": OF_FEATURES,
    "heads.psi": OF_FEATURES,
    "heads.top_mass": {**OF_FEATURES, "num_filters": [1, 2]},
    "identify.binomial_interval": {
        "successes": torch.tensor([1, 2]),
        "counts": torch.tensor([4, 4]),
    },
    "identify.false_discovery_adjusted": {"p_values": SCORES},
    "identify.permutation_p_values": {
        "evidence": FEATURES,
        "labels": LABELS,
        "foreign": FEATURES[:4],
        "foreign_targets": LABELS[:4],
        "permutations": 19,
    },
    "identify.vote_p_values": {"votes": (SCORES * 5).round(), "counts": torch.tensor([6, 6, 6])},
    "metrics.boxes_to_masks": {"boxes": BOXES, "size": (5, 5)},
    "metrics.choose_threshold": {"maps": MAPS[:, 0], "objects": BOXES},
    "metrics.class_means": OF_FEATURES,
    "metrics.class_selectivity_index": {"class_means": SCORES},
    "metrics.correlation_filters": {**OF_FEATURES, "weight": SCORES},
    "metrics.filter_localization": {
        "activations": MAPS,
        "objects": BOXES,
        "labels": LABELS,
        "size": (5, 5),
        "thresholds": torch.full((6,), 0.5),
        "filter_class": torch.arange(6) % 3,
    },
    "metrics.localization": {"maps": MAPS[:, 0], "objects": BOXES, "labels": LABELS},
    "metrics.mutual_information_bound": {"labels": LABELS},
    "metrics.mutual_information_filters": OF_FEATURES,
    "metrics.mutual_information_matrix": OF_FEATURES,
    "metrics.mutual_information_score": {"matrix": SCORES},
    "metrics.selectivity_filters": OF_FEATURES,
    "metrics.selectivity_regularizer": {"activations": MAPS, "labels": LABELS},
    "pruning.removal_order": {"scores": SCORES[0]},
    "pruning.weight_chroma": {"weights": MAPS[:, :3]},
    "spectral.class_hypergraph": OF_SCORES,
    "spectral.effective_rank": {"values": SPECTRUM},
    "spectral.gavish_donoho_threshold": {"values": SPECTRUM, "shape": (40, 50)},
    "spectral.influential": {"scores": FEATURES, "share": 0.2},
    "spectral.permutation_threshold": {"weight": FEATURES},
    "spectral.separation_test": {**OF_SCORES, "permutations": 19, "show_progress": False},
    "spectral.stable_rank": {"values": SPECTRUM},
    "visualize.color_root": {"images": MAPS[:, :3]},
}

# The same functions with less, and those that take more than Tensors.
FURTHER: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (gates.assign_filters, {"scores": SCORES}),
    (heads.set_overlap, {"class_filters": MASK}),
    (pruning.selectivity_test, {"order": ORDER, "selective": MASK[0], "top": 2}),
    (spectral.fit_marchenko_pastur, {"values": SPECTRUM, "shape": (40, 50)}),
    (spectral.fit_power_law, {"values": SPECTRUM}),
    (spectral.select_rank, {"values": SPECTRUM, "shape": (40, 50)}),
    (testing.recovery, {"class_filters": TABLE, "truth": MASK}),
    (testing.recovery, {"class_filters": TABLE, "truth": MASK, "as_many": True}),
]
CALLS = [(FUNCTIONS[name][0], given) for name, given in TAKEN.items()] + FURTHER


def test_every_function_of_tensors_alone_is_here():
    # Those that run a model are in the tests of models.
    run_models = [name for name in STRICT if {"model", "dataloader"} & {*parameters(name)}]
    assert {*STRICT} - {*run_models} == {*TAKEN}


def parameters(name):
    return inspect.signature(FUNCTIONS[name][0]).parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "given"), CALLS, ids=[call[0].__name__ for call in CALLS])
def test_tensors_there_or_one_of_them(function, given):
    expected = tensors_of(function(**given))
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    with pretend() as device:
        for there in {tuple(tensors), *((name,) for name in tensors)}:
            moved = {name: given[name].to(device) for name in there}
            found = [tensor.cpu() for tensor in tensors_of(function(**{**given, **moved}))]
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS_OF_DATA)
@pytest.mark.parametrize(("function", "given"), CALLS, ids=[call[0].__name__ for call in CALLS])
def test_tensors_of_any_kind(function, given, kind):
    expected = tensors_of(function(**given))
    found = tensors_of(function(**KINDS_OF_DATA[kind](given)))
    torch.testing.assert_close(
        [tensor.detach().double() for tensor in found],
        [tensor.double() for tensor in expected],
        equal_nan=True,
    )
