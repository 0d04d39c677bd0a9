"""Every public function names what it takes as a Tensor, or as an object of ours, and is something else."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import captum_classfilters
from captum_classfilters import ClassFilters, ClassSpecificGate, LabelPermutation
from captum_classfilters._core.arguments import arguments_checked, whole_number
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.tables import Tabular
from captum_classfilters.gates import GateSchedule
from captum_classfilters.heads import diversity, psi
from captum_classfilters.identify import exemplars
from captum_classfilters.metrics.removals import curve_points, one_or_several
from captum_classfilters.pruning import LayerwiseFineTuning, selectivity_test
from captum_classfilters.spectral import (
    fit_marchenko_pastur,
    fit_power_law,
    profile_images,
    select_rank,
)
from captum_classfilters.testing import recovery
from captum_classfilters.visualize import RandomTransform, plot_exemplars, plot_filter_grid


def public_objects() -> Iterator[tuple[str, Any]]:
    """All public functions and classes, with their rooms."""
    path = captum_classfilters.__path__
    rooms = [info.name for info in pkgutil.iter_modules(path, "captum_classfilters.")]
    for room in rooms:
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            public = getattr(module, name)
            if hasattr(public, "__name__"):
                yield room.split(".")[1], public


def results() -> Iterator[tuple[str, Any]]:
    """The classes of what functions return, and those that only the package itself exports."""
    found = {getattr(captum_classfilters, name) for name in captum_classfilters.__all__}
    kinds = [Tabular]
    while kinds:
        found.update(own := kinds.pop().__subclasses__())
        kinds += own
    for kind in sorted(filter(inspect.isclass, found), key=lambda kind: kind.__name__):
        if kind.__module__.startswith("captum_classfilters."):
            yield kind.__module__.split(".")[1], kind


def public_with(
    kind: Callable[[object], bool], takes: Callable[[object], bool]
) -> dict[str, tuple[Any, list[str]]]:
    """Public objects of a kind, and those of their parameters that take something."""
    found = {}
    for room, public in public_objects():
        if not kind(public):
            continue
        parameters = inspect.signature(public).parameters.values()
        own = [parameter.name for parameter in parameters if takes(parameter.annotation)]
        if own:
            found[f"{room}.{public.__name__}"] = public, own
    return found


def is_of_the_package(annotation: object) -> bool:
    return (
        inspect.isclass(annotation)
        and annotation.__module__.startswith("captum_classfilters.")
        and not getattr(annotation, "_is_protocol", False)
    )


def does_more_than_keep(public: object) -> bool:
    """Functions, and classes but for those that only hold what they are given."""
    return callable(public) and not dataclasses.is_dataclass(public)


def others_of(public: Any, own: str) -> dict[str, object]:
    """What else must be given: of the right type, or of no interest yet."""
    return {
        name: some_of(parameter.annotation)
        for name, parameter in inspect.signature(public).parameters.items()
        if parameter.default is parameter.empty and name != own
    }


def some_of(annotation: object) -> object:
    """A Tensor, a number or an object of ours; None for whatever else is annotated."""
    kind: Any = get_args(annotation)[0] if isinstance(annotation, UnionType) else annotation
    if kind in (Tensor, int, float):
        return torch.ones(2) if kind is Tensor else 1
    return object.__new__(kind) if is_of_the_package(kind) else None


FUNCTIONS = public_with(inspect.isfunction, lambda kind: kind in (Tensor, Tensor | None))
TAKE_OURS = public_with(does_more_than_keep, is_of_the_package)
# Pictures take arrays, too.
STRICT = [name for name in FUNCTIONS if not name.startswith("visualize.plot_")]


def test_they_are_found():
    assert len(FUNCTIONS) > 50
    assert FUNCTIONS["heads.psi"][1] == ["features", "labels"]
    assert "weight_magnitude" in FUNCTIONS["metrics.class_curves"][1]


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("value", [[1.0, 2.0], np.ones(3), True, "gpu"])
def test_what_is_no_tensor_is_named(name, value):
    function, tensors = FUNCTIONS[name]
    for own in tensors:
        others = others_of(function, own)
        kind = kind_of(value)
        with pytest.raises(ValueError, match=rf"^{own} is {kind}; expected a Tensor"):
            function(**others, **{own: value})


@pytest.mark.parametrize("name", TAKE_OURS)
@pytest.mark.parametrize("value", [torch.ones(3, 4), {"table": 1}, ClassSpecificGate(3, 4)])
def test_what_is_no_object_of_ours_is_named(name, value):
    public, ours = TAKE_OURS[name]
    parameters = inspect.signature(public).parameters
    for own in ours:
        right = parameters[own].annotation
        if isinstance(value, right):
            continue
        others = others_of(public, own)
        kind = kind_of(value)
        with pytest.raises(ValueError, match=f"^{own} is {kind}; expected {right.__name__}.$"):
            public(**{own: value}, **others)


def kinds_of_number(annotation: object) -> set[type]:
    """The kinds of number that an annotation allows, if it allows nothing else but None."""
    kinds = {*(get_args(annotation) if isinstance(annotation, UnionType) else [annotation])}
    numbers = kinds & {int, float}
    return numbers if kinds <= {int, float, NoneType} else set()


def with_numbers() -> dict[str, tuple[Any, dict[str, set[type]]]]:
    """Public functions and methods that do more than keep what they are given, and their numbers."""
    found = {}
    for room, public in dict.fromkeys([*public_objects(), *results()]):
        methods = vars(public) if inspect.isclass(public) else {"": public}
        for name, value in methods.items():
            function = getattr(value, "__func__", value)
            kept = name == "__init__" and dataclasses.is_dataclass(public)
            own = name == "__init__" or not name.startswith("_")
            if not inspect.isfunction(function) or kept or not own:
                continue
            parameters = inspect.signature(function).parameters.values()
            numbers = {p.name: kinds_of_number(p.annotation) for p in parameters}
            numbers = {parameter: kinds for parameter, kinds in numbers.items() if kinds}
            if numbers:
                found[f"{room}.{public.__name__}.{name}".strip(".")] = function, numbers
    return found


NUMBERS = with_numbers()
del NUMBERS["gates.ClassSpecificGate.forward"]  # that PyTorch compiles and traces


def test_numbers_are_found():
    assert len(NUMBERS) > 150
    assert NUMBERS["class_filters.ClassFilters.select"][1]["mass"] == {float}
    assert NUMBERS["answers.find_shortcuts"][1]["permutations"] == {int}
    assert NUMBERS["attr.LayerFilterFrequency.__init__"][1]["top_k"] == {int}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_named(name):
    function, numbers = NUMBERS[name]
    for own, kinds in numbers.items():
        others = others_of(function, own)
        wrong = ["two", True, [2], np.ones(2), torch.tensor(True), np.bool_(True)]
        wrong += [1.5, np.float32(1.5), float("nan")] if kinds == {int} else []
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{own}=.*; expected a (whole )?number"):
                function(**others, **{own: value})


@pytest.mark.parametrize("kind", [LabelPermutation, GateSchedule, RandomTransform])
def test_numbers_of_settings(kind):
    fields = [f for f in dataclasses.fields(kind) if f.type in (int, float)]
    assert fields
    for field in fields:
        assert getattr(kind(**{field.name: np.float32(1)}), field.name) == 1
        with pytest.raises(ValueError, match=rf"^{field.name}='3'; expected a (whole )?number"):
            kind(**{field.name: "3"})
    tuning: Any = LayerwiseFineTuning
    with pytest.raises(ValueError, match="num_steps='3'; expected a whole number"):
        tuning([], 0.1, num_steps="3")


def test_whole_numbers_are_the_same_everywhere():
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    table = ClassFilters(scores, torch.ones(3))
    threes: list[Any] = [3, 3.0, np.float32(3), np.int64(3), torch.tensor(3), torch.tensor(3.0)]
    for three in threes:
        assert whole_number(three) == 3
        assert torch.equal(table.select(three).selected, table.select(3).selected)
        assert LabelPermutation(permutations=three).permutations == 3
        assert select_rank(torch.tensor([4.0, 3.0, 2.0, 1.0]), (4, 9), "top_k", k=three) == 3
    for value in (
        True,
        np.bool_(True),
        2.5,
        float("nan"),
        float("inf"),
        1e30,
        "3",
        [3],
        np.ones(1),
    ):
        assert whole_number(value) is None
    for true in (True, torch.tensor(True)):
        with pytest.raises(ValueError, match=r"by its index or its name, not by a (bool|Tensor)"):
            table.class_index(true)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="filter_=True; expected a whole number"):
        table.classes_of(True)
    halves: list[Any] = [0.5, np.float32(0.5), torch.tensor(0.5), np.array(0.5)]
    for half in halves:
        assert bool((ClassSpecificGate(3, 6, half).weight == 0.5).all())
    wrong: Any = True
    with pytest.raises(ValueError, match=r"initial=True; give a number in \[0, 1\]"):
        ClassSpecificGate(3, 6, wrong)


def test_what_is_learned_keeps_its_gradient():
    limit: Any = torch.tensor(1.5, requires_grad=True)
    ClassSpecificGate(3, 4, initial=1.0).regularizer(limit=limit).backward()
    assert limit.grad is not None
    assert float(limit.grad) != 0


def test_other_mistakes_are_told_as_python_does():
    with pytest.raises(TypeError, match=r"psi\(\) got an unexpected keyword argument 'image'"):
        psi(image=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"psi\(\) missing 1 required positional argument"):
        psi(torch.rand(4, 2))  # type: ignore[call-arg]


def test_numbers_arrive_as_pythons():
    @arguments_checked
    def function(whole: int, real: float = 0.5, none: int | None = None) -> tuple[object, ...]:
        return whole, real, none

    twos: list[Any] = [2, 2.0, np.int64(2), np.float32(2), torch.tensor(2), np.array(2)]
    twos += [Fraction(2), Decimal(2)]
    for two in twos:
        whole, real, none = function(two, real=two, none=two)
        assert (whole, real, none) == (2, 2, 2)
        assert (type(whole), type(none)) == (int, int)
        assert type(real) in (int, float)
    assert function(1) == (1, 0.5, None)
    assert function(1, none=None) == (1, 0.5, None)
    quarter: Any = torch.tensor(0.25)
    assert function(1, real=quarter)[1] == 0.25
    with pytest.raises(ValueError, match="none='two'; expected a whole number or None"):
        function(1, none="two")  # type: ignore[arg-type]


def test_none_may_be_left_out_and_takes_part_in_the_message():
    @arguments_checked
    def function(table: ClassFilters | None, number: int = 3) -> int:
        return number

    assert function(None) == function(table=None, number=3) == 3
    with pytest.raises(ValueError, match="table is an int; expected ClassFilters or None"):
        function(2)  # type: ignore[arg-type]


def test_the_advice_works_by_position_too():
    features, labels = np.random.default_rng(0).random((20, 5)), [0, 1] * 10
    with pytest.raises(ValueError, match="features is a ndarray"):
        psi(features, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels is a list"):
        psi(torch.as_tensor(features), labels)  # type: ignore[arg-type]
    assert psi(torch.as_tensor(features), torch.as_tensor(labels)) is not None
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'labels'"):
        psi(torch.as_tensor(features))  # type: ignore[call-arg]


NO_INDICES = {
    "floats": ([0.0, 1.7], "torch.float32 of shape (2,)"),
    "a float array": (np.array([1.0]), "torch.float64 of shape (1,)"),
    "another mask": ([True, False], "torch.bool of shape (2,)"),
    "a table": (torch.zeros(3, 3, dtype=torch.bool), "torch.bool of shape (3, 3)"),
    "names": (["a", "b"], "['a', 'b']"),
}


@pytest.mark.parametrize("kind", NO_INDICES)
def test_what_is_no_list_of_indices_is_named(kind):
    """As integers, a mask would be the indices 0 and 1, and floats be cut off."""
    given: Any
    given, found = NO_INDICES[kind]
    data = [(torch.rand(3, 2, 6, 5), torch.arange(3))]
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3))
    profiles = profile_images(model, "0", data, show_progress=False)
    seen = exemplars(model, "0", data, show_progress=False)["0"]
    dataset, weights, half = data[0][0], torch.rand(3, 2, 3, 3), torch.arange(3) < 2
    for name, call in (
        ("images", lambda: profiles.of(given)),
        ("units", lambda: plot_exemplars(seen, dataset, given)),
        ("order", lambda: plot_filter_grid(weights, given)),
        ("order", lambda: selectivity_test(given, half, 1)),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name}: {found}; expected whole numbers")):
            call()


def test_units_are_drawn_by_a_mask():
    data = [(torch.rand(3, 2, 6, 5), torch.arange(3))]
    seen = exemplars(torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3)), "0", data, show_progress=False)[
        "0"
    ]
    mask = torch.tensor([False, False, True, True])
    _, grid = plot_exemplars(seen, data[0][0], mask)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["filter 2", "filter 3"]


@pytest.mark.parametrize("given", [[1.7], [True, False], ["1"]])
def test_numbers_of_filters_are_whole(given):
    for points in (one_or_several, lambda given: curve_points(given, 4)):
        with pytest.raises(ValueError, match=re.escape(f"num_filters={given}; expected whole")):
            points(given)


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
