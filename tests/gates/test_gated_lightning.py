"""The Lightning callback, and the three lines of a loop of one's own, against GatedTrainer."""

import logging
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import ClassSpecificGate
from captum_classfilters.gates import GatedTrainer, GateSchedule
from tests.gates.test_class_specific_gate import separable
from tests.models import deep, images

pytest.importorskip("lightning")
import lightning

from captum_classfilters.gates.gated_lightning import ClassGateCallback

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(lightning.LightningModule):
    def __init__(self, fails_at=None):
        super().__init__()
        self.net = deep().train()
        self.gate = ClassSpecificGate(3, 6).attach(self.net, "stage2")
        self.fails_at = fails_at

    def training_step(self, batch, number):
        if number == self.fails_at:
            raise RuntimeError("alarm")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


def data():
    return DataLoader(TensorDataset(*separable()), batch_size=24)


def trainer_of(callback, epochs, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def fit(module, epochs, checkpoint=None, schedule=None, **options):
    callback = ClassGateCallback(module.gate, regularization=0.05, schedule=schedule)
    trainer = trainer_of(callback, epochs, **options)
    trainer.fit(module, data(), ckpt_path=checkpoint)
    return trainer


def same(first, second):
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("schedule", [GateSchedule(), GateSchedule("batch", 2)])
def test_callback_is_gated_trainer_step_for_step(schedule):
    module = Classifier()
    fit(module, 4, schedule=schedule)
    model = deep()
    gate = ClassSpecificGate(3, 6).attach(model, "stage2")
    optimizer = torch.optim.SGD([*model.parameters(), *gate.parameters()], lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    trainer = GatedTrainer(
        model, gate, optimizer, scheduler=scheduler, regularization=0.05, schedule=schedule
    )
    trainer.fit(data(), epochs=4, show_progress=False)
    assert torch.allclose(gate.weight, module.gate.weight, atol=1e-6)
    assert not torch.allclose(gate.weight, torch.full((3, 6), 0.5))
    for key, value in model.state_dict().items():
        assert torch.allclose(value.float(), module.net.state_dict()[key].float(), atol=1e-5), key


@pytest.mark.parametrize("batches_each_step", [1, 2, 3])
@pytest.mark.parametrize("schedule", [GateSchedule("batch", 2), GateSchedule("batch", 4, 2)])
def test_gradients_added_up_over_batches(schedule, batches_each_step):
    """A step in which a gated batch takes part has the regularizer and the projection."""
    module, twin = Classifier(), Classifier()
    fit(module, 2, schedule=schedule, accumulate_grad_batches=batches_each_step)
    (optimizer,), (scheduler,) = twin.configure_optimizers()
    steps = []
    for epoch in range(2):
        gated = False
        for number, batch in enumerate(data(), 1):
            turn = schedule.is_gated(epoch, number - 1)
            gated |= turn
            with twin.gate.gating(batch[1]) if turn else nullcontext():
                loss = twin.training_step(batch, number) / batches_each_step
            loss.backward()
            if number % batches_each_step == 0 or number == len(data()):
                if gated:
                    (0.05 * twin.gate.regularizer()).backward()
                optimizer.step()
                optimizer.zero_grad()
                if gated:
                    twin.gate.project()
                steps.append(gated)
                gated = False
        scheduler.step()
    assert True in steps
    for key, value in module.state_dict().items():
        assert torch.allclose(value.float(), twin.state_dict()[key].float(), atol=1e-5), key
    assert torch.equal(module.gate.weight.max(0).values, torch.ones(6))


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_once_more_for_gradients_are_gated_once_more(reentrant):
    class Checkpointed(Classifier):
        def training_step(self, batch, number):
            x = batch[0].requires_grad_()  # which a reentrant checkpoint needs
            maps = checkpoint(self.net[:2], x, use_reentrant=reentrant)
            return F.cross_entropy(self.net[2:](maps), batch[1])

    plain, module = Classifier().eval(), Checkpointed().eval()
    for trained in (plain, module):
        fit(trained, 2, schedule=GateSchedule("batch", 2))
    assert not torch.equal(plain.gate.weight, ClassSpecificGate(3, 6).weight)
    assert torch.allclose(plain.gate.weight, module.gate.weight, atol=1e-6)


def test_a_batch_that_is_skipped_leaves_the_gate_off():
    class Skips(Classifier):
        def training_step(self, batch, number):
            return None if number == len(data()) - 1 else super().training_step(batch, number)

    module = Skips()
    fit(module, 2, schedule=GateSchedule(period=1))
    with module.gate.gating(images().new_zeros(8).long()):  # not on
        module.net(images())


def test_resuming_goes_on_exactly(tmp_path):
    whole = Classifier()
    fit(whole, 6)
    first = Classifier()
    fit(first, 3).save_checkpoint(tmp_path / "three.ckpt")
    second = Classifier()
    with torch.no_grad():
        second.get_parameter("net.head.weight").zero_()
    fit(second, 6, checkpoint=tmp_path / "three.ckpt")
    same(second, whole)
    assert torch.equal(second.gate.weight, whole.gate.weight)


def test_a_gate_beside_the_module_is_in_the_checkpoint(tmp_path):
    class Beside(Classifier):
        def __init__(self):
            super().__init__()
            self.beside = (self.gate,)  # a tuple hides it from Lightning
            self._modules["gate"] = None

        def configure_optimizers(self):
            return torch.optim.SGD([*self.net.parameters(), self.beside[0].weight], lr=0.05)

    module = Beside()
    trainer = trainer_of(ClassGateCallback(module.beside[0], GateSchedule(period=1)), 1)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    stored = torch.load(tmp_path / "one.ckpt", weights_only=False)["callbacks"]["ClassGateCallback"]
    assert torch.equal(stored["gate"]["weight"], module.beside[0].weight)


def test_an_exception_switches_the_gate_off():
    module = Classifier(fails_at=1)
    with pytest.raises(RuntimeError, match="alarm"):
        fit(module, 1, schedule=GateSchedule(period=1))
    x = images()
    module.eval()
    plain = module.net(x)
    module.gate.detach()
    assert torch.equal(module.net(x), plain)


def test_bad_input():
    module = Classifier()
    with pytest.raises(ValueError, match="joint schedule"):
        ClassGateCallback(module.gate, GateSchedule("joint"))
    with pytest.raises(ValueError, match="not attached"):
        ClassGateCallback(ClassSpecificGate(3, 6))
    with pytest.raises(ValueError, match="not a pair"):
        ClassGateCallback(module.gate).labels({"images": images()})
    other = Classifier()
    beside = ClassSpecificGate(3, 4).attach(other.net, "stage1")
    with pytest.raises(ValueError, match="No optimizer holds the gate"):
        trainer_of(ClassGateCallback(beside), 1).fit(other, data())


def test_a_gate_that_never_runs_is_named():
    class Elsewhere(Classifier):
        def training_step(self, batch, number):
            return F.cross_entropy(self.net.head(batch[0].mean((2, 3)).repeat(1, 3)), batch[1])

    with pytest.raises(ValueError, match="never reached"):
        fit(Elsewhere(), 1, schedule=GateSchedule(period=1))
