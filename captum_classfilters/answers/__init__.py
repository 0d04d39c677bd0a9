"""Answers: one call for each question, with what it rests on, its control and its cost."""

from captum_classfilters.answers.confusion import repair_confusion
from captum_classfilters.answers.repair import repair
from captum_classfilters.answers.shortcuts import find_shortcuts

__all__ = ["find_shortcuts", "repair", "repair_confusion"]
