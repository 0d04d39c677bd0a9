"""Every public function names what it takes as a Tensor and is given as something else."""

import importlib
import inspect
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import captum_classfilters
from captum_classfilters import ClassFilters
from captum_classfilters.heads import diversity, psi
from captum_classfilters.spectral import fit_marchenko_pastur, fit_power_law, select_rank
from captum_classfilters.testing import recovery


def functions_with_tensors() -> dict[str, tuple[Any, list[str]]]:
    """Public functions and those of their parameters that are Tensors."""
    found = {}
    for info in pkgutil.iter_modules(captum_classfilters.__path__, "captum_classfilters."):
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            function = getattr(module, name)
            if not inspect.isfunction(function):
                continue
            tensors = [
                parameter.name
                for parameter in inspect.signature(function).parameters.values()
                if parameter.annotation in (Tensor, Tensor | None)
            ]
            if tensors:
                found[f"{info.name.split('.')[1]}.{name}"] = function, tensors
    return found


FUNCTIONS = functions_with_tensors()
# Most pictures take arrays and lists of numbers, too.
STRICT = [
    name
    for name in FUNCTIONS
    if not name.startswith("visualize.plot_") or name == "visualize.plot_explanations"
]


def test_they_are_found():
    assert len(FUNCTIONS) > 50
    assert FUNCTIONS["heads.psi"][1] == ["features", "labels"]
    assert "weight_magnitude" in FUNCTIONS["metrics.class_curves"][1]


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("value", [[1.0, 2.0], np.ones(3), True, "gpu"])
def test_what_is_no_tensor_is_named(name, value):
    function, tensors = FUNCTIONS[name]
    for own in tensors:
        # The others come first, and are right, or of no interest yet.
        others = {
            parameter.name: torch.ones(2) if parameter.name in tensors else None
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty and parameter.name != own
        }
        kind = type(value).__name__
        with pytest.raises(ValueError, match=rf"^{own} is a {kind}; expected a Tensor"):
            function(**others, **{own: value})


def test_the_advice_works_by_position_too():
    features, labels = np.random.default_rng(0).random((20, 5)), [0, 1] * 10
    with pytest.raises(ValueError, match="features is a ndarray"):
        psi(features, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels is a list"):
        psi(torch.as_tensor(features), labels)  # type: ignore[arg-type]
    assert psi(torch.as_tensor(features), torch.as_tensor(labels)) is not None
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'labels'"):
        psi(torch.as_tensor(features))  # type: ignore[call-arg]


@pytest.mark.parametrize("given", [np.asarray, Tensor.tolist])
def test_numbers_that_come_from_elsewhere_are_taken_where_they_are_copied_anyway(given):
    values = torch.linspace(9, 1, 40).double()
    wide = (40, 50)
    assert fit_power_law(given(values)) == fit_power_law(values)
    assert select_rank(given(values), wide) == select_rank(values, wide)
    found, expected = (fit_marchenko_pastur(each, wide) for each in (given(values), values))
    assert found == expected
    vectors = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([True, False, True, True])
    assert diversity(vectors, given(kept)) == diversity(vectors[kept])
    table = ClassFilters(torch.rand(2, 3), torch.ones(2)).select(num_filters=1)
    assert recovery(table, given(table.selected)).precision == 1
