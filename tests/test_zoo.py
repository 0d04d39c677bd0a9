"""Whole models of kinds that no other test has, six operations each, against hooks and autograd."""

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import zoo
from benchmarks.zoo_members import MEMBERS
from captum_classfilters import list_filter_layers
from captum_classfilters.pruning import prune_filters

pytest.importorskip("timm")
BY_NAME = {member.name: member for member in MEMBERS}
TIED = "tied by a sum to …, whose filters would have to go as well"
# What does not apply, and why; everything else equals the truth.
EXPECTED: dict[str, dict[str, str]] = {
    "small MViT v2": {},  # video, tokens, pooled queries
    "deepseek_vit_412m": {"prune": TIED},
    "naflexvit_base_patch16_gap": {},
    "test_vit_relpos": {},  # its bias has as many rows as there are images
    "starnet_s050": {},  # filters multiplied by filters
}


@pytest.mark.parametrize("name", EXPECTED)
def test_six_operations_on_a_whole_model(name: str) -> None:
    result = zoo.run(BY_NAME[name])
    cells = dict.fromkeys(zoo.OPERATIONS, zoo.OK) | EXPECTED[name]
    assert result["cells"] == cells
    assert result["forward"] > 0
    assert result["prunable"] > 0


def case() -> zoo.Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    images = torch.rand(4, 3, 6, 7)
    return zoo.Case(model, images, layers=list_filter_layers(model, images))


def test_what_is_wrong_crashes_or_is_refused_is_told_apart() -> None:
    def wrong(case: zoo.Case) -> None:
        assert torch.equal(case.images, -case.images), "other numbers"

    def crash(case: zoo.Case) -> None:
        case.images @ case.images.flatten()

    def foreign(case: zoo.Case) -> None:
        raise ValueError("of another library")

    def refused(case: zoo.Case) -> None:
        prune_filters(case.model, "4", case.images, remove=[0])

    def absent(case: zoo.Case) -> None:
        raise zoo.DoesNotApplyError("no head")

    outcomes = {check: zoo.outcome(check, case()) for check in (wrong, crash, foreign, refused)}
    assert outcomes[wrong].startswith("WRONG: AssertionError: other numbers")
    assert outcomes[crash].startswith("CRASH: RuntimeError")
    assert outcomes[foreign].startswith("CRASH: ValueError: of another library")
    assert outcomes[refused].endswith("cannot be removed: its filters are the model's outputs")
    assert zoo.outcome(absent, case()) == "no head"
    assert zoo.outcome(zoo.check_list, case()) == zoo.OK


@pytest.mark.parametrize(
    ("row", "change"),
    [("0", {"channel_dim": 3}), ("1", {"feeds_head": None}), ("0", {"runs": 2})],
)
def test_a_list_with_an_error_is_found_to_be_wrong(monkeypatch, row, change) -> None:
    def with_error(model: nn.Module, images: torch.Tensor) -> Any:
        layers = list_filter_layers(model, images)
        for layer in layers:
            if layer.name == row:
                for name, value in change.items():
                    object.__setattr__(layer, name, value)
        return layers

    monkeypatch.setattr(zoo, "list_filter_layers", with_error)
    assert zoo.outcome(zoo.check_list, case()).startswith(zoo.WRONG)


def test_a_page_numbers_its_reasons() -> None:
    cells = dict.fromkeys(zoo.OPERATIONS, zoo.OK)
    row = {"kind": "timm", "seconds": {"list": 2.0, "prune": 1.5}, "forward": 0.1, "prunable": 0.5}
    results = [
        {**row, "member": "a", "cells": {**cells, "prune": TIED}},
        {**row, "member": "b", "cells": {**cells, "prune": TIED, "decompose": "no head"}},
    ]
    text = zoo.page(results)
    assert "| `a` | ok | ok | ok | ok | ok | [1] | 3.5 | 5 |" in text
    assert "| `b` | ok | ok | ok | ok | [2] | [1] | 3.5 | 5 |" in text
    assert f"1. {TIED}\n2. no head" in text
    assert "2 members, 12 operations: 9 equal the truth, 3 do not apply" in text


def test_the_committed_page_has_nothing_wrong_and_knows_the_families() -> None:
    text = zoo.PAGE.read_text()
    assert "0 are silently wrong, 0 crash" in text
    for family in ("mambaout", "naflexvit", "csatv2", "pvt_v2", "dpn48b", "lambda_resnet26t"):
        assert f"`{family}" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(line.split("|")[1].strip(" `") in BY_NAME for line in rows)
    assert len(rows) >= 60
