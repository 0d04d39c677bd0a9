"""Class-specific filters of convolutional networks, as Captum attributions."""

from importlib import import_module
from typing import TYPE_CHECKING

from captum_classfilters._version import __version__

if TYPE_CHECKING:
    from captum_classfilters.attr import (
        ClassFilterSaliency,
        LayerClassGate,
        LayerFilterAblation,
        LayerFilterContribution,
        LayerFilterFrequency,
        LayerFilterShapley,
    )
    from captum_classfilters.class_filters import ClassFilters
    from captum_classfilters.class_scores import ClassScores
    from captum_classfilters.gate_space import FilterGate
    from captum_classfilters.gates import ClassSpecificGate
    from captum_classfilters.heads import (
        DecomposedLinear,
        accuracy_curve,
        decompose,
        fine_tune,
        refit_head,
        select_by_accuracy,
    )
    from captum_classfilters.identify import LabelPermutation, identify_class_filters
    from captum_classfilters.layers import list_filter_layers
    from captum_classfilters.pruning import GreedyFilterPruning, prune_filters
    from captum_classfilters.separate_runs import SeparateRuns
    from captum_classfilters.spectral import LayerSingularDirection

__all__ = [
    "ClassFilterSaliency",
    "ClassFilters",
    "ClassScores",
    "ClassSpecificGate",
    "DecomposedLinear",
    "FilterGate",
    "GreedyFilterPruning",
    "LabelPermutation",
    "LayerClassGate",
    "LayerFilterAblation",
    "LayerFilterContribution",
    "LayerFilterFrequency",
    "LayerFilterShapley",
    "LayerSingularDirection",
    "SeparateRuns",
    "__version__",
    "accuracy_curve",
    "decompose",
    "fine_tune",
    "identify_class_filters",
    "list_filter_layers",
    "prune_filters",
    "refit_head",
    "select_by_accuracy",
]

# What is used is imported, and not all rooms because of one name.
_MODULES = {
    "attr": (
        "ClassFilterSaliency",
        "LayerClassGate",
        "LayerFilterAblation",
        "LayerFilterContribution",
        "LayerFilterFrequency",
        "LayerFilterShapley",
    ),
    "class_filters": ("ClassFilters",),
    "class_scores": ("ClassScores",),
    "gate_space": ("FilterGate",),
    "gates": ("ClassSpecificGate",),
    "heads": (
        "DecomposedLinear",
        "accuracy_curve",
        "decompose",
        "fine_tune",
        "refit_head",
        "select_by_accuracy",
    ),
    "identify": ("LabelPermutation", "identify_class_filters"),
    "layers": ("list_filter_layers",),
    "pruning": ("GreedyFilterPruning", "prune_filters"),
    "separate_runs": ("SeparateRuns",),
    "spectral": ("LayerSingularDirection",),
}
_ROOMS = (
    "answers",
    "atlas",
    "attr",
    "gates",
    "heads",
    "identify",
    "metrics",
    "pruning",
    "spectral",
    "testing",
    "visualize",
)
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """A public name, or a room, when it is first asked for."""
    if name in _ROOMS or name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
