"""Fine-tuned networks."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import fine_tune
from captum_classfilters.metrics import evaluate_classifier
from tests.heads.common import HOLDING, QUIET, Net, data_for, separable
from tests.models import deep, joined, pool_linear


class TestFineTune:
    def loaders(self):
        x, y = separable()
        train = DataLoader(TensorDataset(x[:90], y[:90]), batch_size=16)
        return train, DataLoader(TensorDataset(x[90:], y[90:]), batch_size=16)

    def test_ends_in_its_best_state(self):
        train, validation = self.loaders()
        model = deep().train()
        history = fine_tune(model, train, validation, epochs=6, learning_rate=1e-2, **QUIET)
        accuracies = [epoch.validation_accuracy for epoch in history]
        assert len(history) == 7
        assert max(accuracies) > accuracies[0]
        best = evaluate_classifier(model, validation, **QUIET).accuracy
        assert best == pytest.approx(max(accuracies))
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_an_interruption_leaves_the_best_state(self):
        train, validation = self.loaders()
        model = deep()
        before = copy.deepcopy(model.state_dict())

        def interrupted():
            yield from train
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fine_tune(model, interrupted(), validation, epochs=1, learning_rate=10.0, **QUIET)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_freezing(self):
        train, validation = self.loaders()
        model = deep()
        before = copy.deepcopy(model.state_dict())
        fine_tune(model, train, validation, epochs=3, learning_rate=0.1, freeze="backbone", **QUIET)
        changed = {
            key for key, value in model.state_dict().items() if not torch.equal(before[key], value)
        }
        assert changed == {"head.weight", "head.bias"}
        assert all(parameter.requires_grad for parameter in model.parameters())
        model = deep()
        fine_tune(
            model,
            train,
            validation,
            epochs=3,
            learning_rate=1e-2,
            freeze="batch_norm_statistics",
            **QUIET,
        )
        after = model.state_dict()
        assert torch.equal(after["stage1.1.running_mean"], before["stage1.1.running_mean"])
        assert not torch.equal(after["stage1.1.weight"], before["stage1.1.weight"])

    def test_teacher_is_followed_and_left_as_found(self):
        train, validation = self.loaders()
        teacher = deep(seed=1).train()
        fine_tune(teacher, train, validation, epochs=6, learning_rate=1e-2, **QUIET)
        before = copy.deepcopy(teacher.state_dict())
        wrong = [(x, (y + 1) % 3) for x, y in train]  # labels mislead, the teacher does not
        model = deep(seed=2)
        fine_tune(
            model,
            wrong,
            validation,
            epochs=8,
            learning_rate=1e-2,
            teacher=teacher,
            teacher_weight=1.0,
            **QUIET,
        )
        assert evaluate_classifier(model, validation, **QUIET).accuracy > 0.8
        assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
        assert teacher.training

    def test_bad_input(self, caplog):
        train, validation = self.loaders()
        with pytest.raises(ValueError, match="freeze='all'"):
            fine_tune(deep(), train, validation, freeze="all", **QUIET)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="training loader is empty"):
            fine_tune(deep(), [], validation, **QUIET)
        with caplog.at_level(logging.WARNING, "captum_classfilters"):
            fine_tune(deep(), validation, validation, **QUIET)
        assert "same data" in caplog.text
        broken = [(torch.full((4, 2, 6, 6), float("nan")), torch.zeros(4).long())]
        with pytest.raises(ValueError, match="loss is NaN"):
            fine_tune(deep(), broken, validation, **QUIET)

    @pytest.mark.parametrize(
        "name", sorted(HOLDING.keys() - {"half precision"})
    )  # too coarse for Adam
    def test_every_kind_of_output_is_trained(self, name):
        model = HOLDING[name]().eval()
        data = data_for(model, name)
        with torch.inference_mode():  # whatever is switched off around the call
            history = fine_tune(
                model, data, [*data], epochs=12, learning_rate=0.02, freeze="backbone", **QUIET
            )
        losses = [epoch.loss or 0.0 for epoch in history]
        assert 0 < losses[-1] < losses[1]

    def test_the_loss_of_one_step(self):
        """Cross-entropy of logits, of probabilities, and the binary one."""
        x, y = joined(data_for(Net()))
        ends = {
            "plain": lambda z, labels: F.cross_entropy(z, labels),
            "softmax": lambda z, labels: F.cross_entropy(z, labels),
            "log-softmax": lambda z, labels: F.cross_entropy(z, labels),
            "one logit": lambda z, labels: F.binary_cross_entropy_with_logits(
                z[:, 0], labels.float()
            ),
            "one probability": lambda z, labels: F.binary_cross_entropy_with_logits(
                z[:, 0], labels.float()
            ),
        }
        for name, loss in ends.items():
            labels = y % 2 if name.startswith("one") else y
            model = HOLDING[name]()
            with torch.no_grad():
                expected = loss(model.fc(model.features(x)), labels)
            data = [(x, labels)]
            history = fine_tune(model, data, [*data], epochs=1, **QUIET)
            assert history[1].loss == pytest.approx(float(expected), rel=1e-4), name
            assert history[1].train_accuracy == history[0].validation_accuracy, name

    def test_a_teacher_that_gives_probabilities_teaches_the_same(self):
        data = data_for(Net())
        teachers = [HOLDING[name]() for name in ("plain", "softmax", "log-softmax")]
        losses = []
        for teacher in teachers:
            options: dict[str, Any] = {
                "teacher": teacher,
                "teacher_weight": 0.7,
                "temperature": 3.0,
            }
            history = fine_tune(pool_linear(), data, [*data], **options, **QUIET)
            losses.append(history[1].loss)
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
        with torch.no_grad():
            x, y = data[0]
            z, taught = pool_linear()(x), teachers[0](x)
            soft = F.cross_entropy(z / 3, (taught / 3).softmax(1)) * 9
            expected = 0.3 * F.cross_entropy(z, y) + 0.7 * soft
        found = fine_tune(
            pool_linear(),
            data[:1],
            data,
            teacher=teachers[0],
            teacher_weight=0.7,
            temperature=3.0,
            **QUIET,
        )
        assert found[1].loss == pytest.approx(float(expected), rel=1e-5)

    def test_epochs_draw_new_random_numbers(self):
        train, validation = self.loaders()
        order = []
        shuffled = DataLoader(train.dataset, batch_size=90, shuffle=True)

        class Watched(Net):
            def forward(self, x):
                if self.training:
                    order.append(x[:, 0, 0, 0].clone())
                return super().forward(x)

        fine_tune(Watched(), shuffled, validation, epochs=2, **QUIET)
        assert torch.equal(order[0].sort().values, order[1].sort().values)
        assert not torch.equal(order[0], order[1])

    def test_labels_are_checked(self):
        _, validation = self.loaders()
        wrong = [(torch.rand(4, 2, 6, 6), torch.tensor([0, 1, 2, 3]))]
        with pytest.raises(ValueError, match="Batch 0 has the label 3"):
            fine_tune(deep(), wrong, validation, **QUIET)


def quantized(model: nn.Module, *layers: str) -> nn.Module:
    """The model with some linear layers quantized dynamically."""
    spec = dict.fromkeys(layers, torch.ao.quantization.default_dynamic_qconfig)
    result: nn.Module = torch.ao.quantization.quantize_dynamic(model, spec, dtype=torch.qint8)
    return result


def three_linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)
    )


def no_grad_head() -> nn.Module:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)).detach()

    return Detached()


NOTHING_TO_TRAIN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "frozen": (
        lambda: three_linear().requires_grad_(False),
        r"its 6 parameters are frozen; model\.requires_grad_\(True\) unfreezes them\.$",
    ),
    "all quantized": (
        lambda: quantized(three_linear(), "1", "3", "5"),
        r"no parameters\. Quantized layers cannot be trained \('1', '3', '5'\)",
    ),
    "quantized head": (
        lambda: quantized(three_linear(), "5"),
        r"No gradient of the loss leads to any.*cannot be trained \('5'\)",
    ),
    "detached": (no_grad_head, "No gradient of the loss leads to any.*does not use them"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOTHING_TO_TRAIN)
def test_where_nothing_can_be_trained(kind: str) -> None:
    build, message = NOTHING_TO_TRAIN[kind]
    model, data = build(), [(torch.rand(4, 2, 3), torch.tensor([0, 2, 1, 1]))]
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        fine_tune(model, data, list(data), **QUIET)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags


class Masked(nn.Module):
    """A trainable mask of its scores switches the last class off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.mask = nn.Linear(6, 4), nn.Parameter(torch.tensor([0, 0, 0, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(x.flatten(1)) + self.mask
        return scores


def test_what_was_infinite_before_may_stay_so() -> None:
    model, data = Masked(), [(torch.rand(7, 2, 3), torch.arange(7) % 3)]
    fine_tune(model, data, list(data), epochs=2, **QUIET)
    assert model.mask[3] == -torch.inf
    with pytest.raises(ValueError, match="The model after an epoch is NaN or Inf"):
        # A single step, whose loss was finite.
        fine_tune(model, data, list(data), learning_rate=torch.inf, **QUIET)


@pytest.mark.filterwarnings("ignore")
def test_layers_behind_a_quantized_one_are_trained() -> None:
    """Its state holds versions, without which it is not read back."""
    model: Any = quantized(three_linear(), "1")
    data = [(torch.rand(4, 2, 3), torch.tensor([0, 2, 1, 1]))]
    before = copy.deepcopy(model[5].weight)
    first = model[1](torch.ones(1, 6))
    history = fine_tune(model, data, list(data), epochs=9, learning_rate=0.1, **QUIET)
    assert max(epoch.validation_accuracy for epoch in history) > history[0].validation_accuracy
    assert not torch.equal(before, model[5].weight)
    assert torch.equal(first, model[1](torch.ones(1, 6)))
