"""Answers: one call for each question, with what it rests on, its control and its cost."""

from captum_classfilters.answers.audit_forgetting import audit_forgetting
from captum_classfilters.answers.confusion import repair_confusion
from captum_classfilters.answers.forget_class import forget_class
from captum_classfilters.answers.repair import repair
from captum_classfilters.answers.repair_layers import repair_layers
from captum_classfilters.answers.shortcuts import find_shortcuts
from captum_classfilters.answers.specialist import build_specialist
from captum_classfilters.answers.unknown_inputs import ClassFilterOOD

__all__ = [
    "ClassFilterOOD",
    "audit_forgetting",
    "build_specialist",
    "find_shortcuts",
    "forget_class",
    "repair",
    "repair_confusion",
    "repair_layers",
]
