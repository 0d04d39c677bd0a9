"""Liang et al.: the class-specific gate, its trainer, and what is measured of gates."""

from captum_classfilters.gates.class_specific_gate import ClassSpecificGate
from captum_classfilters.gates.gate_measures import (
    density_interval,
    filter_correlation,
    gate_similarity,
)
from captum_classfilters.gates.gated_training import GatedTrainer, GateSchedule
from captum_classfilters.gates.masking import masking_test
from captum_classfilters.metrics.filter_localization import assign_filters

__all__ = [
    "ClassSpecificGate",
    "GateSchedule",
    "GatedTrainer",
    "assign_filters",
    "density_interval",
    "filter_correlation",
    "gate_similarity",
    "masking_test",
]
