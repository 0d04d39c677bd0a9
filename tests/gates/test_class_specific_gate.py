"""The class-specific gate: projection, regularizer, hook, training, measures."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import ClassFilters, ClassSpecificGate, LayerClassGate
from captum_classfilters.gates import (
    GatedTrainer,
    GateSchedule,
    assign_filters,
    density_interval,
    filter_correlation,
    gate_similarity,
    masking_test,
)
from captum_classfilters.gates.class_specific_gate import Regularizer
from tests.models import (
    QUIET,
    batches,
    deep,
    hooks_of,
    images,
    known,
    made_in_inference_mode,
    pool_linear,
)
from tests.pretend_device import host_reads, pretend


def gate_with(columns, projection="rescale"):
    weight = torch.tensor(columns).T.contiguous()
    classes, filters = weight.shape
    gate = ClassSpecificGate(classes, filters, projection=projection)
    with torch.no_grad():
        gate.weight.copy_(weight)
    return gate


class TestProjection:
    def test_rescale_divides_by_the_largest_and_clips(self):
        gate = gate_with([[0.5, 0.25, -0.1], [2.0, 1.0, 0.0]])
        gate.project()
        assert torch.allclose(gate.weight.T, torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]))

    @pytest.mark.parametrize("projection", ["rescale", "euclidean"])
    def test_corner_cases_of_the_released_formula(self, projection):
        gate = gate_with([[0.0, 0.0, 0.0], [-2.0, -1.0, -3.0]], projection)
        gate.project()
        # Zeros would give NaN and negative columns would open fully.
        assert gate.weight.T.tolist() == [[1, 0, 0], [0, 1, 0]]

    @pytest.mark.parametrize("projection", ["rescale", "euclidean"])
    def test_uniform_shrinkage_is_undone_by_rescaling_alone(self, projection):
        gate = gate_with([[1.0, 1.0, 1.0]], projection)
        with torch.no_grad():
            gate.weight.sub_(0.25)  # a step of the regularizer
        gate.project()
        expected = [1, 1, 1] if projection == "rescale" else [1, 0.75, 0.75]
        assert gate.weight[:, 0].tolist() == expected

    def test_euclidean_is_the_nearest_point(self):
        torch.manual_seed(0)
        gate = gate_with((2 * torch.rand(30, 3) - 0.5).tolist(), "euclidean")
        before = gate.weight.detach().T.clone()
        gate.project()
        after = gate.weight.detach().T
        for column, found in zip(before, after, strict=True):
            candidates = []
            for opened in range(3):
                point = column.clamp(0, 1)
                point[opened] = 1.0
                candidates.append(point)
            best = min(float((column - point).norm()) for point in candidates)
            assert float((column - found).norm()) == pytest.approx(best, abs=1e-6)

    def test_projected_gates_are_feasible_and_stay(self):
        torch.manual_seed(0)
        for projection in ("rescale", "euclidean"):
            gate = gate_with(torch.randn(20, 4).tolist(), projection)
            gate.project()
            assert gate.weight.min() >= 0
            assert torch.equal(gate.weight.max(0).values, torch.ones(20))
            first = gate.weight.detach().clone()
            gate.project()
            assert torch.allclose(gate.weight, first)

    def test_refuses_gates_that_are_not_finite(self):
        gate = gate_with([[float("nan"), 1.0]])
        with pytest.raises(ValueError, match="gates hold NaN"):
            gate.project()


def test_regularizer_family():
    gate = gate_with([[1.0, 0.5], [1.0, 0.0], [0.25, 1.0]])  # C = 2, K = 3, sum 3.75
    assert float(gate.regularizer().detach()) == pytest.approx(0.75)
    assert float(gate.regularizer(limit=10).detach()) == 0
    assert float(gate.regularizer(distance="l2").detach()) == pytest.approx(0.5625)
    assert float(gate.regularizer(distance="smooth_l1").detach()) == pytest.approx(0.28125)
    assert float(gate.regularizer(distance="smooth_l1", limit=1).detach()) == pytest.approx(2.25)
    assert float(gate.regularizer("l1").detach()) == pytest.approx(3.75)
    assert float(gate.regularizer("column_limit", limit=1.1).detach()) == pytest.approx(0.55)
    expected = (1.5**2 + 1 + 1.25**2) ** 0.5
    assert float(gate.regularizer("l12").detach()) == pytest.approx(expected)
    assert float(gate.regularizer("column_maximum").detach()) == pytest.approx(3.0)
    assert gate.density == pytest.approx(3.75 / 6)
    # Before the projection gates can be negative: the norm counts them.
    signed = gate_with([[1.0, -0.5, -0.25], [1.0, 0.0, 0.5]])  # C = 3, K = 2
    assert float(signed.regularizer().detach()) == pytest.approx(1.25)
    assert float(signed.regularizer("column_limit").detach()) == pytest.approx(0.85 + 0.6)
    assert signed.density == pytest.approx(3.25 / 6)
    with pytest.raises(ValueError, match="kind='l3'"):
        gate.regularizer("l3")


@pytest.mark.parametrize("kind", get_args(Regularizer))
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_regularizers_have_gradients_everywhere(kind, initial):
    gate = ClassSpecificGate(2, 5, initial=initial)
    gate.regularizer(kind).backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad.isfinite().all()
    if kind == "l12":  # the column's sum, 1, by the norm of five of them
        expected = torch.full((2, 5), 0.0 if initial == 0 else 5**-0.5)
        assert torch.allclose(gate.weight.grad, expected)


class TestHook:
    def test_gates_inside_the_block_only(self):
        model, x, y = pool_linear(), images(), torch.arange(8) % 3
        gate = ClassSpecificGate(3, 6, initial=torch.rand(3, 6)).attach(model, "1")
        plain = model(x)
        with gate.gating(y):
            gated = model(x)
        means = model[:4](x) * gate.weight[y]
        assert torch.allclose(
            gated,
            F.linear(means, model.get_parameter("4.weight"), model.get_parameter("4.bias")),
            atol=1e-6,
        )
        assert torch.equal(model(x), plain)
        assert set(model.state_dict()) == set(pool_linear().state_dict())
        gate.detach()
        assert hooks_of(model) == 0

    def test_bad_input(self):
        model, x = pool_linear(), images()
        gate = ClassSpecificGate(3, 6)
        with pytest.raises(ValueError, match="not attached"), gate.gating(torch.zeros(8).long()):
            pass
        gate.attach(model, "1")
        with pytest.raises(ValueError, match="attached already"):
            gate.attach(model, "0")
        with pytest.raises(ValueError, match="Another gate"):
            ClassSpecificGate(3, 6).attach(model, "1")
        for labels, message in (
            (None, "needs the labels"),
            (torch.zeros(8), "torch.float32"),
            (torch.tensor(0), "needs the labels"),
            (torch.full((8,), 3), "label 3, but there are 3 classes"),
            (torch.rand(8, 3), "not multi-hot"),
        ):
            with pytest.raises(ValueError, match=message), gate.gating(labels):  # type: ignore[arg-type]
                pass
        with pytest.raises(ValueError, match="for 5 labels"), gate.gating(torch.zeros(5).long()):
            model(x)
        with pytest.raises(ValueError, match="never reached"), gate.gating(torch.zeros(8).long()):
            pass
        wrong = ClassSpecificGate(3, 5).attach(pool_linear(), "1")
        with (
            pytest.raises(ValueError, match="gate has 5 filters"),
            wrong.gating(torch.zeros(8).long()),
        ):
            known(wrong._tap).module(torch.rand(8, 6, 4, 4))
        with pytest.raises(ValueError, match="hold NaN"):
            ClassSpecificGate(1, 1, initial=torch.tensor([[float("nan")]]))
        with pytest.raises(ValueError, match="from 0 to 2; expected"):
            ClassSpecificGate(1, 2, initial=torch.tensor([[0.0, 2.0]]))
        with pytest.raises(ValueError, match="ReLU is not part of the model"):
            ClassSpecificGate(3, 6).attach(model, nn.ReLU())
        labels = torch.zeros(8).long()
        with (
            pytest.raises(ValueError, match="cannot be nested"),
            gate.gating(labels),
            gate.gating(labels),
        ):
            pass
        with torch.no_grad():
            gate.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="gates hold NaN"), gate.gating(labels):
            pass
        with pytest.raises(ValueError, match="projection='simplex'"):
            ClassSpecificGate(1, 1, projection="simplex")  # type: ignore[arg-type]


def test_schedule_is_two_plain_steps_and_a_gated_one():
    schedule = GateSchedule(warmup=3)
    assert [schedule.is_gated(epoch, 0) for epoch in range(9)] == [
        False, False, False, False, False, True, False, False, True,
    ]  # fmt: skip
    by_batch = GateSchedule(unit="batch", period=2)
    assert [by_batch.is_gated(0, batch) for batch in range(4)] == [False, True, False, True]
    assert GateSchedule(unit="joint").is_gated(0, 0)
    with pytest.raises(ValueError, match="between 1 and period"):
        GateSchedule(gated=4)
    with pytest.raises(ValueError, match="warmup=-1"):
        GateSchedule(warmup=-1)


def separable():
    torch.manual_seed(0)
    x, y = 0.1 * torch.randn(120, 2, 6, 6), torch.arange(120) % 3
    x[y == 0, 0] += 1
    x[y == 1, 1] += 1
    return x, y


def trainer_of(model, **options):
    gate = ClassSpecificGate(3, 6).attach(model, "stage2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return GatedTrainer(model, gate, optimizer, scheduler=scheduler, regularization=0.05, **options)


def loader(seed=0):
    x, y = separable()
    order = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), batch_size=24, shuffle=True, generator=order)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 1),
    "linear": lr_scheduler.LinearLR,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "function": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "one after another": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "two at once": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch)]
    ),
}


def test_a_gate_called_by_itself_gates_maps():
    gate = ClassSpecificGate(2, 3)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0, 0.5, 0.0], [0.25, 1.0, 1.0]]))
    maps, labels = torch.rand(3, 3, 2, 4), torch.tensor([1, 0, 1])
    expected = maps * gate.weight[labels][:, :, None, None]
    assert torch.equal(gate(maps, labels), expected)
    last = maps.movedim(1, -1)
    assert torch.equal(gate(last, labels, channel_dim=-1), expected.movedim(1, -1))
    assert torch.equal(gate(last, labels, layer=nn.LayerNorm(3)), expected.movedim(1, -1))
    rows = maps[:, :, 0, 0].bfloat16()
    assert gate(rows, labels).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(3, 3, 2, 4\) for 2 labels.*expected \(2, 3, \.\.\.\)"):
        gate(maps, labels[:2])


class TestTraining:
    def test_learns_and_keeps_the_gate_feasible(self):
        model = deep()
        trainer = trainer_of(model)
        history = trainer.fit(loader(), loader(1), epochs=9, **QUIET)
        assert [epoch.gated_share for epoch in history] == [0, 0, 1] * 3
        assert history[-1].validation_accuracy > 0.9
        weight = trainer.gate.weight
        assert torch.equal(weight.max(0).values, torch.ones(6))
        assert history[0].density == 0.5  # untouched in a plain epoch
        assert history[-1].density == trainer.gate.density >= 1 / 3 - 1e-6

    def test_a_step_minimizes_the_stated_objective(self):
        x, y = separable()
        for unit in ("epoch", "joint"):
            trainer = trainer_of(deep(), schedule=GateSchedule(unit=unit), gated_weight=0.3)
            plain, gated = copy.deepcopy(trainer.model).train(), trainer.model.train()
            with trainer.gate.gating(y):
                first = F.cross_entropy(gated(x), y)
            second = F.cross_entropy(plain(x), y)
            regularizer = 0.05 * trainer.gate.regularizer()
            expected = 0.3 * first + regularizer + (second if unit == "joint" else 0)
            assert trainer.step(x, y, gated=True)[0] == pytest.approx(expected.item(), abs=1e-5)

    def test_each_kind_of_step_has_its_optimizer(self):
        model = deep()
        gate = ClassSpecificGate(3, 6).attach(model, "stage2")
        plain = torch.optim.SGD(model.head.parameters(), lr=0.1)
        gated = torch.optim.SGD([*model.stage1.parameters(), gate.weight], lr=0.1)
        trainer = GatedTrainer(model, gate, plain, gated_optimizer=gated)
        x, y = separable()
        for is_gated, moves in ((False, {"head"}), (True, {"stage1", "gate"})):
            parts = {
                "head": model.head,
                "stage1": model.stage1,
                "stage2": model.stage2,
                "gate": gate,
            }
            before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
            trainer.step(x, y, gated=is_gated)
            moved = {
                name
                for name, part in parts.items()
                for key, parameter in part.named_parameters()
                if not torch.equal(parameter, before[name][key])
            }
            assert moved == moves

    def test_the_gate_is_not_decayed(self):
        model = deep()
        gate = ClassSpecificGate(3, 6).attach(model, "stage2")
        trainer = GatedTrainer(
            model, gate, torch.optim.SGD(model.parameters(), lr=1, weight_decay=0.5)
        )
        own = trainer.optimizer.param_groups[-1]
        assert own["params"][0] is gate.weight
        assert own["weight_decay"] == 0

    @pytest.mark.parametrize("unit", ["batch", "joint"])
    def test_other_schedules(self, unit):
        trainer = trainer_of(deep(), schedule=GateSchedule(unit=unit, period=2))
        history = trainer.fit(loader(), epochs=4, **QUIET)
        assert history[-1].gated_share == (1.0 if unit == "joint" else 0.4)
        assert history[-1].accuracy > 0.6

    def test_resuming_goes_on_exactly(self, tmp_path):
        whole = trainer_of(deep())
        torch.manual_seed(5)
        batches_ = [list(loader(epoch)) for epoch in range(6)]
        for epoch in range(6):
            whole.fit(batches_[epoch], epochs=epoch + 1, **QUIET)
        first = trainer_of(deep())
        for epoch in range(3):
            first.fit(batches_[epoch], epochs=epoch + 1, **QUIET)
        first.save(tmp_path / "state.safetensors")
        second = trainer_of(deep(seed=9))
        second.load(tmp_path / "state.safetensors")
        for epoch in range(3, 6):
            second.fit(batches_[epoch], epochs=epoch + 1, **QUIET)
        assert second.history == whole.history
        assert torch.equal(second.gate.weight, whole.gate.weight)
        for key, value in second.model.state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[key])

    def test_resuming_restores_both_optimizers_and_schedulers(self, tmp_path):
        def make(seed):
            torch.manual_seed(seed)
            model = deep(seed=seed)
            gate = ClassSpecificGate(3, 6, "uniform").attach(model, "stage2")
            plain = torch.optim.Adam(model.parameters(), lr=0.02)
            gated = torch.optim.SGD([*model.parameters(), gate.weight], lr=0.05, momentum=0.9)
            steps = torch.optim.lr_scheduler.StepLR
            return GatedTrainer(
                model, gate, plain, gated, steps(plain, 1, 0.5), steps(gated, 1, 0.3),
                schedule=GateSchedule(period=2),
            )  # fmt: skip

        # Shuffled by torch's own random state, which is part of what is resumed.
        data = DataLoader(TensorDataset(*separable()), batch_size=24, shuffle=True)
        whole = make(0)
        torch.manual_seed(7)
        whole.fit(data, epochs=3, **QUIET)
        whole.save(tmp_path / "state.safetensors")
        torch.save(whole.state_dict(), tmp_path / "state.pt")  # as earlier versions advised
        whole.fit(data, epochs=6, **QUIET)
        rates = [whole.optimizer.param_groups[0]["lr"], whole.gated_optimizer.param_groups[0]["lr"]]
        assert rates == pytest.approx([0.02 * 0.5**3, 0.05 * 0.3**3])
        resumed = make(1)
        resumed.load(tmp_path / "state.pt")
        early = resumed.state_dict()
        resumed = make(1)
        resumed.load(tmp_path / "state.safetensors")
        assert str(resumed.state_dict()) == str(early)
        assert len(resumed.history) == 3
        resumed.fit(data, epochs=6, **QUIET)
        one, other = resumed.state_dict(), whole.state_dict()
        assert one["history"] == other["history"]
        assert one["scheduler"] == other["scheduler"]
        assert one["gated_scheduler"] == other["gated_scheduler"]
        for part in ("model", "gate"):
            for key, value in one[part].items():
                assert torch.equal(value, other[part][key]), key
        for part in ("optimizer", "gated_optimizer"):
            for index, state in one[part]["state"].items():
                for key, value in state.items():
                    assert torch.equal(value, other[part]["state"][index][key]), (part, key)

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (lambda x, y: x, "Batch 0 is a Tensor"),
            (lambda x, y: (x, None), "Batch 0 is a pair whose labels are None"),
            (lambda x, y: (x, torch.rand(120, 3)), r"have shape \(120, 3\) but are not multi-hot"),
            (lambda x, y: (x, torch.ones(120, 3)), "multi-hot, several classes for one image"),
            (lambda x, y: (x, y.float()), "are torch.float32"),
            (lambda x, y: (x, y + 1), "has the label 3"),
        ],
    )
    def test_batches_without_usable_labels_are_named(self, batch, message):
        trainer = trainer_of(deep())
        with pytest.raises(ValueError, match=message):
            trainer.fit([batch(*separable())], epochs=1, **QUIET)

    def test_what_does_not_fit_is_named_before_anything_is_trained(self):
        x, y = separable()
        for gate, message in (
            (ClassSpecificGate(3, 5), "gate has 5 filters"),
            (ClassSpecificGate(4, 6), "3 classes apart, but the gate has 4"),
            (ClassSpecificGate(2, 6), "3 classes apart, but the gate has 2"),
        ):
            model = deep()
            before = copy.deepcopy(model.state_dict())
            gate.attach(model, "stage2")
            trainer = GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=0.1))
            with pytest.raises(ValueError, match=message):
                trainer.fit([(x, y % 2)], epochs=1, **QUIET)  # a plain epoch
            assert hooks_of(model) == 0
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_the_check_of_the_first_batch_changes_nothing(self):
        x, y = separable()
        one, other = trainer_of(deep()), trainer_of(deep())
        state = torch.get_rng_state()
        one.fit([(x, y.int())], epochs=1, **QUIET)
        assert torch.equal(torch.get_rng_state(), state)
        other.model.train()
        other.step(x, y, gated=False)
        for key, value in one.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[key])

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_a_scheduler_made_before_the_gate_was_added_treats_it_alike(self, name):
        model = deep()
        gate = ClassSpecificGate(3, 6).attach(model, "stage2")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        trainer = GatedTrainer(model, gate, optimizer, scheduler=SCHEDULERS[name](optimizer))
        whole = torch.optim.SGD([*deep().parameters()], lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](whole)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
        for epoch in range(1, 5):
            trainer.fit([separable()], epochs=epoch, **QUIET)
            whole.step()
            scheduler.step()
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([whole.param_groups[0]["lr"]] * 2)

    def test_bad_input(self):
        model = deep()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="not attached"):
            GatedTrainer(model, ClassSpecificGate(3, 6), optimizer)
        gate = ClassSpecificGate(3, 6).attach(model, "stage2")
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="does not hold the gate"):
            GatedTrainer(model, gate, optimizer, gated_optimizer=other)
        trainer = GatedTrainer(model, gate, optimizer)
        with pytest.raises(ValueError, match="empty"):
            trainer.fit([], epochs=1, **QUIET)
        with pytest.raises(ValueError, match="can be read only once; pass a list"):
            trainer.fit((separable() for _ in range(1)), epochs=2, **QUIET)
        with pytest.raises(ValueError, match="can be read only once; pass a list"):
            trainer.fit(loader(), (separable() for _ in range(1)), epochs=2, **QUIET)
        x, y = next(iter(loader()))
        with pytest.raises(ValueError, match="NaN or Inf for image 0 of batch 1"):
            trainer.fit(loader(), [(x, y), (x * math.nan, y)], **QUIET)
        assert trainer.history == []
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        with pytest.raises(ValueError, match="needs a metric"):
            GatedTrainer(model, gate, optimizer, scheduler=plateau)
        state = trainer.state_dict()
        del state["gate"]
        with pytest.raises(ValueError, match="differs in gate"):
            trainer.load_state_dict(state)

    def test_a_copy_keeps_what_is_frozen_and_the_mode(self):
        gate = ClassSpecificGate(3, 6).eval().requires_grad_(False)
        copied = copy.deepcopy(gate)
        assert not copied.training
        assert not copied.weight.requires_grad
        assert copy.deepcopy(ClassSpecificGate(3, 6)).weight.requires_grad

    @pytest.mark.parametrize("first", ["model", "gate"])
    def test_which_copies_are_attached(self, first):
        """As the gate's page says."""
        model, gate = deep(), ClassSpecificGate(3, 6)
        whole: Any = nn.ModuleDict({first: {"model": model, "gate": gate}[first]})
        whole.update({"model": model, "gate": gate})
        assert next(iter(whole)) == first
        gate.attach(model, "stage2")
        assert pickle.loads(pickle.dumps(whole))["gate"].attached
        copied = copy.deepcopy(whole)
        assert copied["gate"].attached == (first == "model")
        if first == "gate":
            with pytest.raises(ValueError, match=r"not attached.*attach\("):
                copied["gate"].gating(images()).__enter__()
            assert copied["gate"].attach(copied["model"], "stage2").attached

    def test_a_copy_of_a_gate_is_not_attached(self):
        gate = ClassSpecificGate(3, 6).attach(deep(), "stage2")
        with torch.no_grad():
            gate.weight.sub_(0.7)  # between a step and its projection
        copied = copy.deepcopy(gate)
        assert not copied.attached
        assert torch.equal(copied.weight, gate.weight)

    def test_a_copy_of_model_and_gate_is_attached_to_the_copy(self):
        whole: Any = nn.Module()
        whole.model, whole.gate = deep(), ClassSpecificGate(3, 6, initial="uniform")
        whole.gate.attach(whole.model, "stage2")
        copied: Any = torch.optim.swa_utils.AveragedModel(whole).module
        assert copied.gate.attached
        x, y = images(), torch.arange(8) % 3
        with whole.gate.gating(y):
            expected = whole.model(x)
            assert not torch.equal(copied.model(x), expected)  # each has its own gate
        with copied.gate.gating(y):
            assert torch.equal(copied.model(x), expected)
        with pytest.raises(ValueError, match="Another gate is attached"):
            ClassSpecificGate(3, 6).attach(copied.model, "stage2")
        copied.gate.detach()
        assert whole.gate.attached

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
    )
    def test_a_layer_has_one_gate_in_copies_too(self, copied):
        model = deep()
        gate = ClassSpecificGate(3, 6).attach(model, "stage2")
        model, own = copied((model, gate))
        with pytest.raises(ValueError, match="Another gate is attached to the layer 'stage2'"):
            ClassSpecificGate(3, 6).attach(model, "stage2")
        assert not copy.copy(own).attached
        assert own.attached
        own.detach()
        assert ClassSpecificGate(3, 6).attach(model, "stage2").attached
        assert gate.attached

    @pytest.mark.parametrize("gated", [False, True])
    def test_a_step_takes_a_batch_made_in_inference_mode(self, gated):
        batch, found = (images(4), torch.tensor([0, 1, 2, 0])), []
        for x, y in (batch, made_in_inference_mode(batch)):
            model = deep()
            gate = ClassSpecificGate(3, 6).attach(model, "stage2")
            trainer = GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=0.1))
            found.append(trainer.step(x, y, gated=gated))
        assert found[0] == found[1]

    @pytest.mark.parametrize(
        "labels",
        [[0, 1, 2, 0], torch.tensor([0, 1, 2, 0], dtype=torch.int32), torch.eye(3)[[0, 1, 2, 0]]],
        ids=["list", "int32", "one-hot"],
    )
    @pytest.mark.parametrize("gated", [False, True])
    def test_a_step_takes_the_labels_that_fit_takes(self, labels, gated):
        x, found = images(4), []
        for given in (labels, torch.tensor([0, 1, 2, 0])):
            model = deep()
            gate = ClassSpecificGate(3, 6).attach(model, "stage2")
            trainer = GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=0.1))
            found.append(trainer.step(x, given, gated=gated))
            with pytest.raises(ValueError, match="has the label 3, but there are 3 classes"):
                trainer.step(x, torch.tensor([0, 1, 2, 3]), gated=gated)
        assert found[0] == found[1]

    @pytest.mark.parametrize("given", [np.asarray, Tensor.tolist])
    def test_initial_gates_of_arrays_and_lists(self, given):
        initial = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
        assert torch.equal(ClassSpecificGate(2, 2, initial=given(initial)).weight, initial)
        with pytest.raises(ValueError, match=r"have shape \(2, 2\); not \(2, 3\)"):
            ClassSpecificGate(2, 3, initial=given(initial))
        with pytest.raises(ValueError, match="no matrix of numbers"):
            ClassSpecificGate(2, 2, initial=[[1.0], [0.5, 1.0]])


class TestLayerClassGate:
    gates = torch.tensor([[0.9, 0.1, 0.5, 0.05, 0.2, 0.3], [0.0, 1.0, 0.6, 0.2, 0.1, 0.4]])

    def method(self, **options):
        gates = torch.cat([self.gates, torch.rand(1, 6)])
        return LayerClassGate(pool_linear(), "1", gates, **options)

    def test_high_gates_are_the_classs_filters(self):
        assert self.method().class_filters(num_filters=2).filters_of(0).tolist() == [0, 2]
        lowest = self.method(descending=False).class_filters(num_filters=2)
        assert lowest.filters_of(0).tolist() == [3, 1]

    def test_attribution_is_gate_times_activation(self):
        method, x = self.method(), images()
        activation = method.forward_func[1](method.forward_func[0](x))
        expected = activation * self.gates[torch.tensor([0, 1] * 4)][:, :, None, None]
        assert torch.allclose(method.attribute(x, target=[0, 1] * 4), expected, atol=1e-6)
        table = method.identify(batches(), num_filters=2, **QUIET)
        assert table.method == "LayerClassGate"

    def test_a_table_of_gates_says_what_it_is(self):
        method, names = self.method(descending=False), ("cat", "dog", "bird")
        table = method.class_filters(counts=torch.tensor([3, 0, 2]), class_names=names)
        assert (table.class_names, table.layer, table.method) == (names, "1", "LayerClassGate")
        assert table.counts.tolist() == [3, 0, 2]
        assert torch.equal(table.scores[0], -self.gates[0].double())
        assert bool(table.scores[1].isnan().all())  # no image of it was trained on
        told = table.provenance
        assert (told["options"], told["model"]) == ({"descending": False}, "Sequential")
        assert not bool(table.selected.any())

    def test_filters_may_lie_on_another_axis(self):
        model = nn.Sequential(nn.Flatten(1, 2), nn.Flatten(), nn.Linear(24, 3))
        gates, x = torch.rand(3, 3), torch.rand(2, 4, 2, 3)
        last = LayerClassGate(model, "0", gates, channel_dim=-1).attribute(x, target=[2, 0])
        assert torch.allclose(last, x.flatten(1, 2) * gates[[2, 0], None], atol=1e-6)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"gate has shape \(3,\)"):
            LayerClassGate(pool_linear(), "1", torch.rand(3))
        with pytest.raises(ValueError, match=r"expected a Tensor, as gate\.weight is"):
            LayerClassGate(pool_linear(), "1", ClassSpecificGate(3, 6))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="NaN or Inf"):
            LayerClassGate(pool_linear(), "1", torch.full((3, 6), float("nan")))
        with pytest.raises(ValueError, match=r"counts have shape \(2,\)"):
            self.method().class_filters(counts=torch.ones(2))
        with pytest.raises(ValueError, match=r"6 filters, the gate 4"):
            LayerClassGate(pool_linear(), "1", torch.rand(3, 4)).attribute(images(), target=0)


class TestMeasures:
    gate = torch.tensor([[1.0, 0.6, 0.0], [0.0, 1.0, 1.0]])

    def test_shares_similarity_and_interval(self):
        table = ClassFilters(self.gate, torch.ones(2))
        for threshold, count in ((0.5, [[2, 1], [1, 2]]), (0.6, [[1, 0], [0, 2]])):
            opened = table.with_selection(self.gate > threshold)
            assert opened.overlap().count.tolist() == count
        cosine = 0.6 / ((1.36**0.5) * (2**0.5))
        assert gate_similarity(self.gate) == pytest.approx(2 * cosine)
        assert density_interval(10, 64).tolist() == pytest.approx([0.1, 0.1])
        assert density_interval(6, 10, limit=12).tolist() == pytest.approx([1 / 6, 0.2])
        assert density_interval(6, 10, limit=3).tolist() == pytest.approx([1 / 6, 1 / 6])

    def test_correlation_and_assignment(self):
        weight = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
        assert filter_correlation(weight).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
        assert not filter_correlation(torch.zeros(2, 3)).any()  # filters that decay has removed
        assert assign_filters(torch.tensor([[1.0, 0.0, 2.0], [1.0, 3.0, 0.0]])).tolist() == [
            0,
            1,
            0,
        ]

    def test_masking_a_class_removes_it_alone(self):
        model = nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False))
        with torch.no_grad():
            model.get_parameter("1.weight").copy_(torch.eye(2, 4))
        x = torch.tensor([[2.0, 1.0, 0, 0], [1.0, 2.0, 0, 0]]).repeat(5, 1)
        data = [(x, torch.arange(10) % 2)]
        mask = torch.eye(2, 4).bool()
        table = ClassFilters(mask.double(), torch.ones(2)).with_selection(mask)
        result = masking_test(model, model[0], table, data, **QUIET)
        assert result.clean.tolist() == [1, 1]
        assert result.recall.tolist() == [[0, 1], [1, 0]]
        assert result.own.tolist() == [0, 0]
        assert result.loss_of_others == 0
        assert result.confusion.tolist() == [[0, 5], [5, 0]]
        assert result.predicted.tolist() == [[0, 10], [10, 0]]
        kept = masking_test(model, model[0], table, data, mode="keep", **QUIET)
        assert kept.recall.tolist() == [[1, 0], [0, 1]]
        assert kept.confusion.tolist() == [[5, 0], [0, 5]]
        with pytest.raises(ValueError, match="mode='drop'"):
            masking_test(model, model[0], table, data, mode="drop")  # type: ignore[arg-type]
        unselected = ClassFilters(mask.double(), torch.ones(2))
        with pytest.raises(ValueError, match="selects no filters"):
            masking_test(model, model[0], unselected, data)
        with pytest.raises(ValueError, match="has the label 2"):
            masking_test(model, model[0], table, [(x, torch.full((10,), 2))], **QUIET)

    def test_masking_of_one_class_confuses_it_with_the_next(self):
        # Three classes of unequal size; masking class 0 leaves the second-largest logit, class 2.
        model = nn.Sequential(nn.Identity(), nn.Linear(3, 3, bias=False))
        with torch.no_grad():
            model.get_parameter("1.weight").copy_(torch.eye(3))
        rows = torch.tensor([[3.0, 1, 2], [1, 3, 2], [1, 2, 3]])
        y = torch.tensor([0, 0, 0, 1, 2, 2])
        mask = torch.eye(3).bool()
        table = ClassFilters(mask.double(), torch.ones(3)).with_selection(mask)
        result = masking_test(model, model[0], table, [(rows[y], y)], **QUIET)
        assert result.confusion.tolist() == [[0, 0, 3], [0, 0, 1], [0, 2, 0]]
        assert result.predicted.tolist() == [[0, 1, 5], [3, 0, 3], [3, 3, 0]]
        assert result.loss_of_others == 0

    def test_random_control_masks_as_many_filters(self):
        model = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            model.get_parameter("1.weight").copy_(torch.eye(2))
        data = [(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.arange(2))]
        mask = torch.tensor([[True, True], [False, False]])  # so that there is nothing to draw
        table = ClassFilters(mask.double(), torch.ones(2)).with_selection(mask)
        result = masking_test(model, model[0], table, data, **QUIET)
        assert result.control.tolist() == result.recall.tolist() == [[1, 0], [1, 1]]

    def test_measures_work_without_a_gate(self):
        scores = torch.tensor([[0.2, 0.9, 0.1], [0.8, 0.7, 0.3]])
        table = ClassFilters(scores, torch.ones(2)).select(num_filters=2)
        assert gate_similarity(table.selected) == pytest.approx(2.0)
        assert assign_filters(table).tolist() == [1, 0, 1]

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"gate is \(3,\)"):
            gate_similarity(torch.rand(3))
        with pytest.raises(ValueError, match="gate is a ClassFilters; expected a Tensor"):
            gate_similarity(ClassFilters(torch.rand(2, 3), torch.ones(2)))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="without NaN"):
            gate_similarity(torch.full((2, 3), float("nan")))
        with pytest.raises(ValueError, match="0 classes"):
            density_interval(0, 3)
        with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
            filter_correlation(torch.rand(3))
        with pytest.raises(ValueError, match=r"scores have shape \(3,\)"):
            assign_filters(torch.rand(3))


def test_three_lines_in_a_loop_of_ones_own_are_the_trainers_gated_step():
    x, y = separable()
    own, theirs = deep().train(), deep().train()
    gate = ClassSpecificGate(3, 6).attach(own, "stage2")
    optimizer = torch.optim.SGD([*own.parameters(), *gate.parameters()], lr=0.05, momentum=0.9)
    trainer = trainer_of(theirs)
    theirs.train()
    for _ in range(3):
        optimizer.zero_grad()
        with gate.gating(y):  # 1
            loss = F.cross_entropy(own(x), y)
        loss = loss + 0.05 * gate.regularizer()  # 2
        loss.backward()
        optimizer.step()
        gate.project()  # 3
        trainer.step(x, y, gated=True)
    assert torch.allclose(gate.weight, trainer.gate.weight, atol=1e-6)
    assert not torch.allclose(gate.weight, torch.full((3, 6), 0.5))
    for key, value in own.state_dict().items():
        assert torch.allclose(value.float(), theirs.state_dict()[key].float(), atol=1e-6), key


def test_a_class_absent_from_training():
    x, y = separable()
    model = deep()
    trainer = trainer_of(model, schedule=GateSchedule(unit="joint"))
    present = y < 2
    trainer.fit([(x[present], y[present])], epochs=4, **QUIET)
    weight = trainer.gate.weight.detach()
    assert bool(torch.isfinite(weight).all())
    assert torch.equal(weight.max(0).values, torch.ones(6))
    counts = torch.bincount(y[present], minlength=3)
    table = LayerClassGate(model, "stage2", weight).class_filters(num_filters=2, counts=counts)
    assert table.scores[2].isnan().all()
    assert table.filters_of(2).tolist() == []
    assert len(table.filters_of(0)) == 2


def test_more_gates_than_the_model_has_classes():
    model = deep()
    gate = ClassSpecificGate(4, 6).attach(model, "stage2")
    trainer = GatedTrainer(model, gate, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = separable()
    with pytest.raises(ValueError, match="tells 3 classes apart, but the gate has 4"):
        trainer.step(x, y, gated=True)


def test_gates_that_become_nan_in_training_are_named():
    model = deep()
    trainer = trainer_of(model, schedule=GateSchedule(unit="joint"))
    x, y = separable()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="gates hold NaN"):
        trainer.fit([(x, y)], epochs=1, **QUIET)


# -- batches, devices, models ---------------------------------------------------------------------


def after_training(model, gate, data, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = GatedTrainer(
        model, gate, optimizer, schedule=GateSchedule("batch", period=2), regularization=0.05
    )
    trainer.fit(data, data, epochs=2, **QUIET, **options)
    return trainer


def test_training_on_an_accelerator_is_training_on_the_cpu():
    x, y = separable()
    data = [(x[i : i + 24], y[i : i + 24]) for i in range(0, 120, 24)]
    model = deep()
    gate = ClassSpecificGate(3, 6).attach(model, "stage2")
    expected = after_training(model, gate, data)
    for there in (True, False):
        with pretend("meta") as device:
            model = deep().to(device)
            gate = ClassSpecificGate(3, 6).to(device).attach(model, "stage2")
            batches_ = [(x.to(device), y.to(device)) for x, y in data] if there else data
            trainer = after_training(model, gate, batches_)
            assert torch.allclose(gate.weight.detach().cpu(), expected.gate.weight, atol=1e-6)
            for key, value in model.state_dict().items():
                assert torch.allclose(value.cpu(), expected.model.state_dict()[key], atol=1e-5)
        for epoch, same in zip(trainer.history, expected.history, strict=True):
            assert epoch.accuracy == same.accuracy
            assert epoch.validation_accuracy == same.validation_accuracy
            assert epoch.loss == pytest.approx(same.loss, abs=1e-6)


@pytest.mark.parametrize("there", [True, False])
def test_no_step_waits_for_the_device(there):
    """The number of reads in an epoch does not grow with its batches but for every eighth."""
    x, y = separable()
    reads = []
    for number in (8, 16):
        with pretend("meta") as device:
            model = deep().to(device)
            gate = ClassSpecificGate(3, 6).to(device).attach(model, "stage2")
            data = [(x[i : i + 7], y[i : i + 7]) for i in range(number)]
            if there:
                data = [(x.to(device), y.to(device)) for x, y in data]
            host_reads.clear()
            after_training(model, gate, data)
            reads.append(len(host_reads))
    assert reads[1] - reads[0] <= 4  # two epochs of training and validation, one look each


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_logit(shape):
    class OneLogit(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 1)

        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3))).reshape(-1, *shape)

    x, y = separable()
    y = (y > 0).long()
    model = OneLogit()
    gate = ClassSpecificGate(2, 6).attach(model, "conv")
    trainer = GatedTrainer(
        model, gate, torch.optim.Adam(model.parameters(), lr=0.05), schedule=GateSchedule("joint")
    )
    with gate.gating(y), torch.no_grad():
        gated = F.binary_cross_entropy_with_logits(model(x).flatten(), y.float())
    plain = F.binary_cross_entropy_with_logits(model(x).flatten(), y.float())
    loss, _ = trainer.step(x, y, gated=True)
    assert loss == pytest.approx(float((gated + plain).detach()), abs=1e-5)  # no excess of gates
    assert trainer.fit([(x, y.bool())], [(x, y)], epochs=30, **QUIET)[-1].accuracy > 0.9
    gate.detach()
    third = ClassSpecificGate(3, 6).attach(model, "conv")
    trainer = GatedTrainer(model, third, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="tells 2 classes apart, but the gate has 3"):
        trainer.step(x, y, gated=True)


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Wrapping(nn.Module):
    """`deep` that answers as Hugging Face's models do, for batches of 24 alone."""

    def __init__(self):
        super().__init__()
        self.net = deep()

    def forward(self, x):
        return Answer(self.net(x.view(24, 2, 6, 6)))


def test_batches_of_every_kind():
    x, y = separable()
    model = Wrapping()
    gate = ClassSpecificGate(3, 6).attach(model, "net.stage2")
    expected = after_training(model, gate, [(x[:24], y[:24])] * 4)
    kinds = {
        "list": [(x[:24], y[:24].tolist())] * 4,
        "more": [(x[:24], y[:24], "names")] * 4,
        "tuple": [((x[:24],), y[:24])] * 4,
        "one-hot": [(x[:24], F.one_hot(y[:24]))] * 4,
        "mapping": [{"pixel_values": x[:24], "labels": y[:24]}] * 4,
        "empty first": [(x[:0], y[:0])] + [(x[:24], y[:24])] * 4,
    }
    for name, data in kinds.items():
        model = Wrapping()
        gate = ClassSpecificGate(3, 6).attach(model, "net.stage2")
        schedule = after_training(model, gate, data).history
        if name != "empty first":  # whose batches have other numbers
            assert schedule == expected.history, name
            assert torch.equal(gate.weight, expected.gate.weight), name
    other = Wrapping()
    gate = ClassSpecificGate(3, 6).attach(other, "net.stage2")
    packed = [{"a": x[:24], "b": y[:24]}] * 4
    history = after_training(other, gate, packed, unpack=lambda batch: (batch["a"], batch["b"]))
    assert history.history == expected.history


def test_training_inside_no_grad_and_inference_mode():
    x, y = separable()
    for block in (torch.no_grad, torch.inference_mode):
        trainer = trainer_of(deep(), schedule=GateSchedule("joint"))
        with block():
            history = trainer.fit([(x, y)], [(x, y)], epochs=3, **QUIET)
        assert history[2].loss < history[0].loss


def test_a_compiled_model_takes_the_gated_path_although_it_was_compiled_before():
    x, y = separable()
    model, plain = deep(), deep()
    fast = torch.compile(model, backend="eager")
    fast(x)
    assert isinstance(fast, nn.Module)
    gates = torch.rand(3, 6)
    gate = ClassSpecificGate(3, 6, initial=gates).attach(fast, "stage2")
    same = ClassSpecificGate(3, 6, initial=gates).attach(plain, "stage2")
    with gate.gating(y), same.gating(y):
        assert torch.allclose(fast(x), plain(x), atol=1e-6)
    assert torch.allclose(fast(x), plain(x), atol=1e-6)


def test_a_gate_leaves_no_trace_in_the_model_and_another_may_follow():
    model = deep()
    gate = ClassSpecificGate(3, 6).attach(model, "stage2")
    assert hooks_of(model) == 0  # the gate is on in its block alone
    assert gate.attached
    twin = copy.deepcopy(model)
    ClassSpecificGate(3, 6).attach(twin, "stage2")
    del gate  # forgotten, not detached
    ClassSpecificGate(3, 6).attach(model, "stage2")


def test_masking_with_unequal_sets_repeated_controls_and_one_logit():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([[1.0, -1, 0.5]]))
    x, y = torch.tensor([[2.0, 1, 0], [1, 3, 1], [0, 2, 2]]), torch.tensor([1, 0, 0])
    mask = torch.tensor([[False, True, False], [True, False, True]])
    table = ClassFilters(mask.double(), torch.ones(2)).with_selection(mask)
    result = masking_test(model, "0", table, [(x, y)], repetitions=40, **QUIET)
    assert result.clean.tolist() == [1, 1]
    assert result.recall.tolist() == [[0, 1], [1, 0]]  # z = x0 + x2 / 2, then -x1
    row = model.get_parameter("1.weight")[0]
    singles = [float((x[1:] * (torch.arange(3) != k) @ row <= 0).double().mean())
               for k in range(3)]  # fmt: skip
    assert float(result.control[0, 0]) == pytest.approx(sum(singles) / 3, abs=0.2)
    again = masking_test(model, "0", table, [(x, y)], repetitions=40, **QUIET)
    assert torch.equal(again.control, result.control)
    assert len(str(result).splitlines()) == 4
    with pytest.raises(ValueError, match="repetitions=0"):
        masking_test(model, "0", table, [(x, y)], repetitions=0)


def test_masking_keeps_classes_without_images_apart():
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.eye(2))
    mask = torch.tensor([[True, False], [False, False]])
    scores = torch.tensor([[1.0, 0], [torch.nan, torch.nan]])
    table = ClassFilters(scores, torch.tensor([1, 0])).with_selection(mask)
    data = [(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))]
    kept = masking_test(model, "0", table, data, mode="keep", **QUIET)
    assert kept.recall[0, 0] == 1
    assert bool(kept.recall[:, 1].isnan().all())


def test_masking_on_an_accelerator():
    model, data = deep(), batches()
    table = ClassFilters(torch.rand(3, 6), torch.ones(3)).select(num_filters=2)
    expected = masking_test(model, "stage2", table, data, **QUIET)
    for there in (True, False):
        with pretend("cuda") as device:
            moved = [(x.to(device), y.to(device)) for x, y in data] if there else data
            got = masking_test(deep().to(device), "stage2", table, moved, **QUIET)
        assert torch.equal(got.confusion, expected.confusion)
        assert torch.equal(got.control, expected.control)
        assert got.recall.device.type == "cpu"


@pytest.mark.parametrize(
    "labels", [torch.tensor([1, 2, 1], dtype=torch.uint8), torch.tensor([[1], [2], [1]])]
)
def test_labels_are_classes_however_they_are_kept(labels):
    """Indexing takes bytes for a mask."""
    gate = ClassSpecificGate(3, 2)
    gate.weight.data = torch.arange(6.0).reshape(3, 2) / 6
    gated = gate(torch.ones(3, 2, 1, 1), labels)
    assert torch.equal(gated[:, :, 0, 0], gate.weight.data[[1, 2, 1]])
    with pytest.raises(ValueError, match="label"):
        gate(torch.ones(2, 2, 1, 1), torch.tensor([0, -1]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("unit", ["batch", "joint"])
def test_layers_that_run_once_more_for_gradients_are_gated_once_more(reentrant, unit):
    """Activation checkpointing: the same steps as without it."""

    class Net(nn.Module):
        def __init__(self, checkpoints):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.conv = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1)
            self.head, self.checkpoints = nn.Linear(4, 3), checkpoints

        def forward(self, x):
            x = self.first(x)
            x = (
                checkpoint(self.conv, x, use_reentrant=reentrant)
                if self.checkpoints
                else self.conv(x)
            )
            return self.head(x.mean((2, 3)))

    found = []
    images, labels = torch.randn(6, 2, 5, 4), torch.arange(6) % 3
    for checkpoints in (False, True):
        model = Net(checkpoints)
        torch.manual_seed(1)
        gate = ClassSpecificGate(3, 4).attach(model, "conv")
        optimizer = torch.optim.SGD([*model.parameters(), *gate.parameters()], lr=0.1)
        trainer = GatedTrainer(model, gate, optimizer, schedule=GateSchedule(unit=unit, period=1))
        losses = [trainer.step(images, labels, gated=True)[0] for _ in range(2)]
        found.append(
            [torch.tensor(losses), gate.weight.data, *(p.data for p in model.parameters())]
        )
    for plain, again in zip(*found, strict=True):
        assert torch.allclose(plain, again, atol=1e-6)
