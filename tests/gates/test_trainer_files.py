"""Trainers in files: any optimizer and schedule goes on exactly; what does not fit changes nothing."""

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from captum_classfilters.gates import ClassSpecificGate, GatedTrainer
from tests.models import QUIET, batches, deep

DATA = batches(24)

SCHEDULES: dict[str, Any] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 1, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 1, 2], 0.5),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
}


def made(optimizer="SGD", schedule="StepLR", seed=0):
    torch.manual_seed(seed)
    model = deep(seed=seed)
    gate = ClassSpecificGate(3, 6, "uniform").attach(model, "stage2")
    optimizer = OPTIMIZERS[optimizer]([*model.parameters(), gate.weight])
    schedule = None if schedule is None else SCHEDULES[schedule](optimizer)
    return GatedTrainer(model, gate, optimizer, scheduler=schedule)


def told(value):
    if isinstance(value, torch.Tensor):
        return value.tolist(), str(value.dtype)
    if isinstance(value, dict):
        return type(value).__name__ != "dict", [(key, told(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [told(part) for part in value]
    return value


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        *((name, "StepLR") for name in OPTIMIZERS),
        *(("SGD", name) for name in SCHEDULES),
        ("SGD", None),
    ],
)
def test_a_resumed_run_goes_on_exactly(tmp_path, optimizer, schedule):
    trainer = made(optimizer, schedule)
    trainer.fit(DATA, epochs=2, **QUIET)
    trainer.save(tmp_path / "state")
    expected = told(trainer.state_dict())
    trainer.fit(DATA, epochs=4, **QUIET)
    resumed = made(optimizer, schedule, seed=5)
    resumed.load(tmp_path / "state")
    assert told(resumed.state_dict()) == expected
    resumed.fit(DATA, epochs=4, **QUIET)
    assert told(resumed.state_dict()) == told(trainer.state_dict())


def changed_states(state):
    """States of other trainers, or of none."""

    def with_(part, value):
        return {**copy.deepcopy(state), part: value}

    history = copy.deepcopy(state["history"])
    yield {}, "differs in"
    yield {**state, "more": 1}, "differs in more"
    yield with_("model", {}), "Missing key"
    yield with_("model", {**state["model"], "head.bias": torch.ones(7)}), "size mismatch"
    yield with_("model", 3), ""
    yield with_("gate", {"weight": torch.ones(2, 2)}), "size mismatch"
    yield with_("optimizer", {}), ""
    yield with_("optimizer", {"state": {}, "param_groups": []}), "number of parameter groups"
    yield with_("optimizer", None), ""
    yield with_("scheduler", None), ""
    yield with_("random_state", torch.zeros(3)), ""
    yield with_("random_state", torch.zeros(3, dtype=torch.uint8)), ""
    yield with_("history", [{}]), ""
    yield with_("history", 5), ""
    yield with_("history", history[::-1]), "history"
    yield with_("history", [{**history[0], "accuracy": 1.5}]), "history"
    yield with_("history", [{**history[0], "validation_accuracy": -1}]), "history"
    yield with_("history", [{**history[0], "gated_share": float("nan")}]), "history"
    yield with_("history", [{**history[0], "accuracy": "x"}]), ""
    yield [1], "differs in"
    yield None, "differs in"


def test_states_that_do_not_fit_leave_the_trainer_as_it_was(tmp_path):
    trainer = made()
    trainer.fit(DATA, epochs=2, **QUIET)
    other = made(seed=3)
    other.fit(DATA, epochs=1, **QUIET)
    before = told(other.state_dict())
    for state, message in changed_states(trainer.state_dict()):
        with pytest.raises(ValueError, match=f"(?s)does not fit this trainer.*{message}"):
            other.load_state_dict(state)
        assert told(other.state_dict()) == before
    other.load_state_dict(trainer.state_dict())
    assert told(other.state_dict()) == told(trainer.state_dict())


def test_files_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "state"
    trainer = made("Adam", None)
    trainer.save(path)
    other = made()
    before = told(other.state_dict())
    with pytest.raises(ValueError, match=f"{path} cannot be resumed from.*differs in scheduler"):
        other.load(path)
    for content in (path.read_bytes()[:-9], b"text", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} "):
            other.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        other.load(path)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a named pipe"):
        other.load(path)
    assert told(other.state_dict()) == before


class WithObject(nn.Linear):
    def get_extra_state(self):
        return {"kept": object()}

    def set_extra_state(self, state):
        """Nothing."""


def test_what_only_code_could_make_again_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), WithObject(4, 2))
    gate = ClassSpecificGate(2, 4).attach(model, "1")
    trainer = GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"model\.2\._extra_state\.kept is an object"):
        trainer.save(tmp_path / "state")
    assert os.listdir(tmp_path) == []
