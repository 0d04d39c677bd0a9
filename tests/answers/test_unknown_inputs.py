"""Unknown inputs, against the formulas of the scores, by hand, and against pytorch-ood."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from captum_classfilters import ClassFilters
from captum_classfilters.answers import ClassFilterOOD
from tests.models import QUIET
from tests.pretend_device import pretend

WEIGHT = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
BIAS = torch.tensor([0.5, -0.5])
# Class 0 has much of filter 0, class 1 of filter 1; both have a little of filter 2.
KNOWN = torch.tensor([[4.0, 0.0, 1.0], [9.0, 0.0, 1.0], [0.0, 4.0, 1.0], [0.0, 1.0, 1.0]])
LABELS = torch.tensor([0, 0, 1, 1])
SELECTED = torch.tensor([[True, False, False], [False, True, False]])


class Head(nn.Module):
    """Features that pass by, and a head whose numbers are known."""

    def __init__(self) -> None:
        super().__init__()
        self.earlier, self.features, self.fc = nn.Identity(), nn.Identity(), nn.Linear(3, 2)
        self.fc.weight.data, self.fc.bias.data = WEIGHT.clone(), BIAS.clone()

    def forward(self, x):
        return self.fc(self.features(self.earlier(x)))


def table(selected=SELECTED, classes=2):
    return ClassFilters(
        torch.ones(selected.shape),
        torch.full((classes,), 2),
        selected,
        class_names=["a", "b"][:classes],
        layer="features",
    )


def fitted(score="combined", **options):
    detector = ClassFilterOOD(Head().eval(), table(), score=score, head="fc", **options)
    return detector.fit([(KNOWN[:3], LABELS[:3]), (KNOWN[3:], LABELS[3:])], **QUIET)


def energy(*logits):
    return -math.log(sum(map(math.exp, logits)))


IMAGE = torch.tensor([[1.0, 2.0, 3.0]])  # logits 2 + 3 + .5 and 6 + 3 - .5: class 1
CLIP = float(np.quantile(KNOWN.numpy(), 0.8))  # 2.2 or more: between 1 and 4


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("energy", energy(5.5, 8.5)),
        ("dice", energy(2.5, 5.5)),
        ("react", energy(2 + 1.5 + 0.5, 3 * 1.5 + 1.5 - 0.5)),
        ("line", energy(0.5, 3 * 1.5 - 0.5)),
    ],
)
def test_scores_by_hand(score, expected):
    detector = fitted(score, percentile=0.8)
    object.__setattr__(detector._known, "clip", 1.5)
    assert detector(IMAGE).tolist() == pytest.approx([expected], rel=1e-6)


def test_features_are_clipped_at_a_quantile_of_all_of_them():
    assert fitted(percentile=0.8)._known.clip == pytest.approx(CLIP)


def test_likeness_is_the_cosine_of_roots():
    # Roots of class 1: means of (0, 2, 1) and (0, 1, 1); of the image: (1, sqrt 2, sqrt 3).
    like, own = np.array([0, 1.5, 1]), np.sqrt([1, 2, 3])
    cosine = like @ own / np.linalg.norm(like) / np.linalg.norm(own)
    assert fitted("likeness")(IMAGE).tolist() == pytest.approx([-cosine], rel=1e-6)


def test_combined_is_a_weighted_sum_of_standardized_scores():
    detector = fitted(percentile=0.8)
    known = detector._known
    parts = {
        "energy": lambda z: -(z @ WEIGHT.T + BIAS).logsumexp(1),
        "clipped dice": lambda z: -(z.clamp(max=CLIP) @ (WEIGHT * SELECTED).T + BIAS).logsumexp(1),
        "likeness": fitted("likeness").predict,
    }
    total = torch.zeros(1, dtype=torch.float64)
    for name, part in parts.items():
        of_known = part(KNOWN).double()
        assert known.location[name] == pytest.approx(float(of_known.mean()))
        weight = 1 if name == "energy" else 0.5
        total += weight * (part(IMAGE) - of_known.mean()) / of_known.std(correction=0)
    assert detector(IMAGE).tolist() == pytest.approx(total.tolist(), rel=1e-5)


def test_the_threshold_is_a_quantile_of_the_known_scores():
    detector = fitted(known_rate=0.6)
    scores = detector(KNOWN).sort().values
    assert detector.threshold == pytest.approx(float(scores[2]))  # two of four are less than .6


def test_an_earlier_layer_counts_within_bounds():
    with_it, without = fitted(earlier="earlier"), fitted()
    far = torch.tensor([[4.0, 0.0, 1.0], [400.0, 0.0, 1.0]])
    added = with_it(far) - without(far)
    assert added.tolist() == pytest.approx([0, 3], abs=1e-4)
    # By hand: squares over the spread around the class's mean, averaged over filters.
    means = torch.tensor([[6.5, 0, 1], [0, 2.5, 1]])
    spread = (KNOWN - means[LABELS]).pow(2).mean(0).sqrt()
    spread = spread.clamp(min=float(spread.mean()) / 100)
    predicted = (KNOWN @ WEIGHT.T + BIAS).argmax(1)
    far_known = ((KNOWN - means[predicted]) / spread).pow(2).mean(1)
    assert with_it._known.location["earlier"] == pytest.approx(np.quantile(far_known, 0.95))


def test_reasons_name_what_lowers_the_score_most():
    detector = fitted("energy")
    image = torch.tensor([[0.0, 0.0, 0.5]])  # logits 1.0 and 0.0: class 0, whose mean is 6.5, 0, 1
    reasons = detector.reasons(image, num_filters=2)
    assert reasons.predicted.tolist() == [0]
    assert reasons.filters.tolist() == [[0, 2]]
    assert reasons.activations.tolist() == [[0.0, 0.5]]
    assert reasons.expected.tolist() == [[6.5, 1.0]]
    after = [energy(13 + 0.5 + 0.5, 0.0), energy(13 + 1 + 0.5, 0.5)]
    assert reasons.scores_after[0].tolist() == pytest.approx(after, rel=1e-6)
    assert reasons.scores.tolist() == pytest.approx([energy(1.0, 0.0)])
    assert reasons.unknown.tolist() == [True]
    assert reasons.flipped.tolist() == [True]
    assert detector.reasons(image, threshold=-100.0).flipped.tolist() == [False]
    assert "1 of 1 images are unknown" in str(reasons)
    assert reasons.to_pandas()["filter"].tolist() == [0, 2]


def test_reasons_toward_the_nearest_class():
    """Class 1 has less energy than class 0 whatever two filters do, and the class predicted is named."""
    detector = fitted("energy")
    images = torch.tensor([[0.0, 0.0, 0.5], [0.2, 0.3, 0.0]])
    found = {
        toward: detector.reasons(images, num_filters=2, toward=toward)
        for toward in ("predicted", "nearest")
    }
    nearest = found["nearest"]
    assert torch.equal(found["predicted"].toward, found["predicted"].predicted)
    assert torch.equal(nearest.predicted, found["predicted"].predicted)
    assert (nearest.scores_after[:, -1] <= found["predicted"].scores_after[:, -1]).all()
    # By hand: each class's two best filters, and the lower of the ends.
    means = torch.tensor([[6.5, 0.0, 1.0], [0.0, 2.5, 1.0]])
    for image, row in enumerate(images):
        ends = {}
        for toward, mean in enumerate(means):
            current, left = row.clone(), [0, 1, 2]
            for _ in range(2):
                tried = {}
                for place in left:
                    changed = current.clone()
                    changed[place] = mean[place]
                    tried[place] = energy(*(changed @ WEIGHT.T + BIAS).tolist())
                best = min(tried, key=lambda place: tried[place])
                current[best] = mean[best]
                left.remove(best)
            ends[toward] = tried[best]
        assert int(nearest.toward[image]) == min(ends, key=lambda toward: ends[toward])
        assert float(nearest.scores_after[image, -1]) == pytest.approx(min(ends.values()), rel=1e-5)
    with pytest.raises(ValueError, match="toward='any'; choose one of predicted, nearest"):
        detector.reasons(images, toward="any")


def test_the_same_filter_is_not_named_twice():
    reasons = fitted().reasons(KNOWN, num_filters=3)
    assert all(sorted(row) == [0, 1, 2] for row in reasons.filters.tolist())


def test_dice_is_that_of_pytorch_ood():
    """With its selection: contributions of mean features above a quantile of all."""
    torch.manual_seed(0)
    features, labels = torch.rand(200, 3) * torch.tensor([1.0, 2.0, 3.0]), torch.arange(200) % 2
    contributions = features.mean(0) * WEIGHT
    selected = contributions > contributions.flatten().quantile(0.4)
    assert selected.any(1).all()
    ours = ClassFilterOOD(Head().eval(), table(selected), score="dice", head="fc")(features)
    masked = torch.where(selected, WEIGHT, 0)
    formula = -((features[:, None] * masked).sum(2) + BIAS).logsumexp(1)
    assert torch.allclose(ours, formula, atol=1e-6, rtol=0)
    detectors = pytest.importorskip("pytorch_ood.detector")
    theirs = detectors.DICE(None, WEIGHT, BIAS, 0.4).fit_features(features, labels)
    assert torch.allclose(ours, theirs.predict_features(features), atol=1e-6, rtol=0)


def test_a_prediction_leaves_the_model_as_it_was_and_runs_it_once():
    model, runs = Head().train(), []
    detector = ClassFilterOOD(model, table(), score="energy", head="fc")
    model.register_forward_hook(lambda *_: runs.append(1))
    detector(IMAGE)
    assert model.training
    assert len(runs) == 1
    assert "not fitted" in repr(detector)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "entropy"}, "score='entropy'; choose one of combined"),
        ({"percentile": 0}, "percentile=0 is no share"),
        ({"known_rate": 1.5}, r"known_rate=1\.5 is no share"),
        ({"score": "dice", "earlier": "earlier"}, "earlier has no part in the score 'dice'"),
        ({"earlier": "absent"}, "absent"),
        ({"earlier": nn.Linear(3, 3)}, "The given Linear is not a layer of this Head"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ClassFilterOOD(Head(), table(), head="fc", **options)


def test_a_device_may_be_named_as_in_pytorch_ood():
    """Where the model has nothing that tells where it is."""
    torch.manual_seed(0)
    detector = ClassFilterOOD(Head(), table(), head="fc")
    with pretend("cuda") as device:
        moved = ClassFilterOOD(Head().to(device), table(), head="fc")
        moved.fit([(KNOWN, LABELS)], device=device, **QUIET)
        found = moved.predict(IMAGE.to(device))
        with pytest.raises(RuntimeError):  # inputs go there, where the model is not
            ClassFilterOOD(Head(), table(), head="fc").fit(
                [(KNOWN, LABELS)], device=device, **QUIET
            )
    expected = detector.fit([(KNOWN, LABELS)], device="cpu", **QUIET).predict(IMAGE)
    torch.testing.assert_close(found, expected)


def test_a_table_must_fit():
    with pytest.raises(ValueError, match="Some classes have no selected filters"):
        ClassFilterOOD(Head(), table(torch.zeros(2, 3, dtype=torch.bool)), head="fc")
    with pytest.raises(ValueError, match="2 outputs"):
        ClassFilterOOD(Head(), table(torch.ones(1, 3, dtype=torch.bool), 1), head="fc")


def test_a_detector_must_be_fitted_to_all_classes():
    detector = ClassFilterOOD(Head(), table(), head="fc")
    for use in (detector, detector.reasons):
        with pytest.raises(ValueError, match="not fitted; call fit"):
            use(IMAGE)
    with pytest.raises(ValueError, match="not fitted"):
        _ = detector.threshold
    with pytest.raises(ValueError, match="No image of the class 'b'"):
        detector.fit([(KNOWN[:2], LABELS[:2])], **QUIET)
    with pytest.raises(ValueError, match="num_filters=4; expected 1 to 3"):
        fitted().reasons(IMAGE, num_filters=4)
