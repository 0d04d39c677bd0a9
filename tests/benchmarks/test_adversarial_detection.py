"""Telling attacked images from clean ones by the filters."""

import pytest
import torch
from captum.robust import FGSM, PGD
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.adversarial_detection import adversarial_detection
from tests.models import batches, hooks_of, pool_linear

QUIET = {"show_progress": False}


def test_a_visible_attack_is_found_and_none_is_chance():
    model, data = pool_linear(), batches(60)
    found = adversarial_detection(model, "1", data, lambda x, y: x + 3, **QUIET)
    assert found.error < 0.05
    assert found.auc > 0.98
    assert found.num_images == 60
    nothing = adversarial_detection(model, "1", data, lambda x, y: x, **QUIET)
    # The two images of a pair are alike: whatever is said is right for exactly one of them.
    assert nothing.error == 0.5
    assert nothing.auc == pytest.approx(0.5)
    assert nothing.attacked_accuracy == nothing.clean_accuracy


def test_accuracies_and_successful_attacks():
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("2.weight").copy_(torch.eye(2))
    # Feature 0 is larger for label 0; every second image of label 0 has too wide a margin.
    x = torch.tensor([[2.0, 1.0], [5.0, 1.0]]).repeat(20, 1)
    data = [(x, torch.zeros(40, dtype=torch.int64))]
    result = adversarial_detection(
        model, "0", data, lambda x, y: x - torch.tensor([2.0, 0.0]), folds=4, **QUIET
    )
    assert (result.clean_accuracy, result.attacked_accuracy) == (1.0, 0.5)
    successful = adversarial_detection(
        model,
        "0",
        data,
        lambda x, y: x - torch.tensor([2.0, 0.0]),
        folds=4,
        successful_only=True,
        detector=LogisticRegression(),
        **QUIET,
    )
    assert successful.num_images == 20
    assert successful.error == 0


def test_an_image_and_its_attacked_version_share_a_fold():
    seen = []

    class Spy(LogisticRegression):
        def fit(self, X, y):  # noqa: N803
            seen.append({round(float(value), 6) for value in X[:, 0].round(3)})
            return super().fit(X, y)

    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(1, 2))
    # 22 images in 5 folds: were they of one size, each kind's own folds would have the same images.
    x = torch.arange(22.0)[:, None]
    data = [(x, torch.zeros(22, dtype=torch.int64))]
    adversarial_detection(model, "0", data, lambda x, y: x + 100, detector=Spy(), **QUIET)
    assert len(seen) == 5
    for values in seen:
        clean = {value for value in values if value < 50}
        assert {value - 100 for value in values if value > 50} == clean
        assert len(clean) in (17, 18)


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_captums_attacks(kind):
    model, data = pool_linear(), batches(30)
    loss = nn.CrossEntropyLoss(reduction="none")
    if kind == "fgsm":
        fgsm = FGSM(model, loss_func=loss)

        def attack(x, y):
            return fgsm.perturb(x, epsilon=0.5, target=y)
    else:
        pgd = PGD(model, loss_func=loss)

        def attack(x, y):
            return pgd.perturb(
                x, radius=0.5, step_size=0.2, step_num=3, target=y, random_start=True
            )

    first = adversarial_detection(model, "1", data, attack, **QUIET)
    assert first.attacked_accuracy < first.clean_accuracy
    assert adversarial_detection(model, "1", data, attack, **QUIET) == first
    assert hooks_of(model) == 0


def test_bad_input():
    model, data = pool_linear(), batches(10)
    for attack, message in (
        (lambda x, y: x[:, :1], "The attack gave"),
        (lambda x, y: None, "gave NoneType"),
        (lambda x, y: x * float("nan"), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            adversarial_detection(model, "1", data, attack, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        adversarial_detection(model, "1", [], lambda x, y: x, **QUIET)
    with pytest.raises(ValueError, match="0 images are left for 5 folds"):
        adversarial_detection(model, "1", data, lambda x, y: x, successful_only=True, **QUIET)
