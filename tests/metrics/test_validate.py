"""Correlation with the label, and the card that says whether scores speak of it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import correlation_filters, validate

QUIET: dict[str, Any] = {"show_progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*are selected for")


def telling(num_images: int = 300, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    """Filters c and c + C answer to class c, the latter weakly; two answer to nothing."""
    labels = torch.arange(num_images) % num_classes
    hot = nn.functional.one_hot(labels, num_classes).float()
    noise = torch.rand(num_images, 2 * num_classes + 2)
    return torch.cat([hot, 0.5 * hot, torch.zeros(num_images, 2)], 1) + 0.1 * noise, labels


def joined(loader):
    features, labels = zip(*loader, strict=True)
    return torch.cat(features), torch.cat(labels)


def correlation(loader) -> ClassFilters:
    return correlation_filters(*joined(loader))


def by_class(loader, divided: bool) -> ClassFilters:
    """Sums, or means, of the responses to each class."""
    features, labels = joined(loader)
    counts = labels.bincount(minlength=5)
    sums = torch.zeros(5, features.shape[1]).index_add_(0, labels, features)
    scores = sums / counts[:, None] if divided else sums
    return ClassFilters(scores, counts=counts, method="means" if divided else "sums")


class TestCorrelation:
    def test_it_is_pearsons(self):
        features, labels = torch.randn(37, 4), torch.randint(0, 3, (37,))
        scores = correlation_filters(features, labels).scores
        for class_ in range(3):
            for index in range(4):
                pair = torch.stack([features[:, index], (labels == class_).float()])
                expected = torch.corrcoef(pair)[0, 1]
                torch.testing.assert_close(scores[class_, index].float(), expected)

    def test_of_contributions_it_is_their_covariance_in_units_of_the_label(self):
        features, labels, weight = torch.randn(37, 4), torch.randint(0, 3, (37,)), torch.randn(3, 4)
        scores = correlation_filters(features, labels, weight).scores
        for class_ in range(3):
            label = (labels == class_).double()
            for index in range(4):
                contribution = (weight[class_, index] * features[:, index]).double()
                pair = torch.stack([contribution, label])
                expected = torch.cov(pair, correction=0)[0, 1] / label.std(correction=0)
                torch.testing.assert_close(scores[class_, index], expected, rtol=1e-5, atol=1e-7)

    def test_constant_filters_score_nothing(self):
        features = torch.full((7, 2), 0.1)  # whose mean is not 0.1 in floating point
        features[0, 1] = 3
        scores = correlation_filters(features, torch.arange(7) % 2).scores
        assert scores[:, 0].tolist() == [0, 0]
        assert scores[0, 1] > 0

    def test_classes_without_images_and_a_selection(self):
        table = correlation_filters(
            torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
            torch.tensor([2, 0]),
            num_classes=4,
            num_filters=1,
            class_names=["a", "b", "c", "d"],
            layer="conv",
        )
        assert table.classes_without_images == ["b", "d"]
        assert table.filters_of("c").tolist() == [0]
        assert table.filters_of("a").tolist() == [1]
        assert table.layer == "conv"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"labels": torch.zeros(6, dtype=torch.int64)}, "two classes with images"),
            ({"weight": torch.ones(4, 2)}, r"\(4, 2\); expected \(2, 4\)"),
            ({"features": torch.full((6, 4), math.nan)}, "NaN"),
        ],
    )
    def test_what_is_refused(self, change, words):
        given = {"features": torch.rand(6, 4), "labels": torch.arange(6) % 2} | change
        with pytest.raises(ValueError, match=words):
            correlation_filters(**given)


class TestValidate:
    def test_correlation_falls_in_both(self):
        features, labels = telling()
        card = validate(correlation, [(features, labels)], num_filters=2, features=features)
        assert card.passes
        assert bool((card.missing < -0.2).all())
        assert bool((card.extra < -0.2).all())
        assert card.stability.tolist() == [1.0] * 5
        assert card.purity is not None
        assert card.purity.tolist() == [1.0] * 5
        assert card.chance == pytest.approx(2 / 12)
        assert "speak of the label" in card.verdict
        assert "does not fall" not in str(card)

    def test_means_do_not_see_what_they_lack(self):
        features, labels = telling()
        card = validate(lambda loader: by_class(loader, True), [(features, labels)], num_filters=1)
        assert not card.falls_with_missing_labels
        assert card.falls_with_extra_labels
        # As many others come, who answer with about .05 of noise in place of 1.05.
        assert card.missing.abs().max() < 0.05
        assert float(card.extra.mean()) == pytest.approx(-0.5 / 1.05, abs=0.12)
        assert "lack it are not noticed" in card.verdict
        assert card.purity is None

    def test_sums_do_not_see_what_they_have_too_much(self):
        features, labels = telling()
        card = validate(lambda loader: by_class(loader, False), [(features, labels)], num_filters=1)
        assert card.falls_with_missing_labels
        assert card.missing.tolist() == pytest.approx([-0.5] * 5, abs=0.03)
        assert not card.falls_with_extra_labels
        assert "wrong labels are not noticed" in card.verdict

    def test_scores_that_do_not_look(self):
        def constant(loader):
            counts = joined(loader)[1].bincount(minlength=5)
            return ClassFilters(torch.arange(60.0).reshape(5, 12), counts=counts)

        card = validate(constant, [telling()])
        assert not card.passes
        assert "neither test" in card.verdict
        assert card.shuffled.tolist() == [1.0] * 5

    def test_few_noisy_images_are_unstable(self):
        data = [(torch.rand(20, 40), torch.arange(20) % 5)]
        card = validate(correlation, data)
        assert card.stability.mean() < 0.6
        assert "take more images" in card.verdict

    def test_batches_do_not_matter_nor_does_a_class_without_images(self):
        features, labels = telling(305)
        labels = torch.where(labels == 3, 4, labels)

        def padded(loader):
            return correlation_filters(*joined(loader), num_classes=6)

        whole = validate(padded, [(features, labels)], features=features)
        parts = validate(padded, list(zip(features.split(64), labels.split(64), strict=True)))
        torch.testing.assert_close(parts.missing, whole.missing, equal_nan=True)
        torch.testing.assert_close(parts.stability, whole.stability, equal_nan=True)
        assert whole.missing.isnan().tolist() == [False, False, False, True, False, True]

    def test_two_classes(self):
        card = validate(correlation, [telling(num_classes=2)], num_filters=1)
        assert card.missing.isfinite().all()
        assert card.extra.isfinite().all()
        assert card.passes

    @pytest.mark.parametrize(
        ("sizes", "shares"),
        [
            ((40, 40), [38 / 40] * 2),  # two are left of the other
            ((12, 40), [1, 10 / 40]),
            ((2, 3), [1 / 2, 1 / 3]),
            ((40,) * 3, [1] * 3),  # half of two others
        ],
    )
    def test_extra_labels_are_as_many_as_a_class_has(self, sizes, shares):
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        seen = []

        def identify(loader):
            seen.append(joined(loader)[1])
            return correlation(loader)

        hot = nn.functional.one_hot(labels, len(sizes)).float()
        card = validate(identify, [(hot, labels)], num_filters=1)
        assert card.extra_share.tolist() == pytest.approx(shares)
        assert f"Extra labels are {sum(shares) / len(shares):.2f} times" in str(card)
        if len(sizes) == 2:  # of each class: half of it moves; then as many come as it has
            moves = [(int((m == 1).sum()), int((m == 0).sum())) for m in seen[1:5]]
            a, b = sizes
            extra = round(shares[0] * a), round(shares[1] * b)
            assert sorted(moves) == sorted(
                [
                    (b - b // 2, a + b // 2),
                    (b + a // 2, a - a // 2),
                    (b - extra[0], a + extra[0]),
                    (b + extra[1], a - extra[1]),
                ]
            )

    def test_what_was_not_measured_is_not_judged(self):
        def nothing(loader):
            labels = joined(loader)[1]
            return ClassFilters(torch.zeros(3, 7), counts=labels.bincount(minlength=3))

        card = validate(nothing, [(torch.rand(12, 7), torch.arange(12) % 3)], num_filters=2)
        assert not card.passes
        assert card.verdict.startswith("Not measured: missing labels and extra labels.")
        rows = card.to_pandas()
        assert rows["verdict"].tolist() == ["not measured"] * 4
        assert rows[["mean", "smallest", "largest"]].isna().all(axis=None)
        assert "nan" not in str(card)

    def test_a_class_of_one_image_loses_none(self):
        labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])

        def padded(loader):
            return correlation_filters(*joined(loader), num_classes=3)

        card = validate(padded, [(nn.functional.one_hot(labels).float(), labels)], num_filters=1)
        assert card.missing.isnan().tolist() == [False, False, True]

    @pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 0, 1], [3, 3, 0]])
    def test_labels_too_few_to_move(self, labels):
        y = torch.tensor(labels)
        counts = ", ".join(map(str, y.bincount().tolist()))
        with pytest.raises(ValueError, match=f"at least two each.* have {counts}"):
            validate(correlation, [(torch.rand(len(y), 7), y)], num_filters=2)

    def test_a_method_over_a_model_left_as_found(self):
        net = nn.Sequential(
            nn.Conv2d(3, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)
        ).train()
        loader = [(torch.rand(22, 3, 6, 5), torch.arange(22) % 4) for _ in range(2)]
        features, _ = collect_features(net, "1", loader, **QUIET)
        method = LayerFilterContribution(net, "1")
        card = validate(
            lambda data: method.identify(data, **QUIET), loader, num_filters=2, features=features
        )
        assert card.method == "LayerFilterContribution"
        assert net.training
        assert card.to_pandas().shape[0] == 5

    def test_methods_that_need_gradients(self):
        """A loader that is read inside the pass does not switch them off."""
        net = nn.Sequential(
            nn.Conv2d(3, 7, 3), nn.Sigmoid(), nn.Conv2d(7, 5, 2), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Sigmoid(), nn.Linear(5, 4),
        )  # fmt: skip
        loader = [(torch.rand(22, 3, 6, 5), torch.arange(22) % 4) for _ in range(3)]
        method = LayerFilterContribution(net, "1")
        expected = method.identify(loader, **QUIET)
        seen = []

        def identify(data):
            seen.append(method.identify(data, **QUIET))
            return seen[-1]

        with torch.no_grad():
            validate(identify, loader, num_filters=2)
        assert len(seen) == 7
        assert torch.equal(seen[0].scores, expected.scores)

    def test_another_pair_from_unpack(self):
        features, labels = telling()
        odd = [{"a": features, "b": labels}]
        card = validate(
            correlation, odd, num_filters=2, unpack=lambda batch: (batch["a"], batch["b"])
        )
        assert card.passes

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"identify": "contribution"}, "expected a function from a loader to a table"),
            ({"identify": len}, "has no len|int; expected ClassFilters"),
            ({"num_filters": 13}, "13"),
            ({"features": torch.rand(3, 12)}, "do not fit"),
            ({"dataloader": []}, "The data loader is empty"),
            (
                {"dataloader": [(torch.rand(4, 12), torch.rand(4))]},
                "expected whole numbers, one class index",
            ),
        ],
    )
    def test_what_is_refused(self, options, words):
        given = {"identify": correlation, "dataloader": [telling()]} | options
        with pytest.raises((ValueError, TypeError), match=words):
            validate(given.pop("identify"), given.pop("dataloader"), **given)

    def test_a_shuffling_loader_is_refused(self):
        class Shuffling:
            generator = torch.Generator()  # of its own: the package puts the global one back

            def __iter__(self):
                features, labels = telling()
                order = torch.randperm(len(labels), generator=self.generator)
                yield features[order], labels[order]

        with pytest.raises(ValueError, match="shuffle=False"):
            validate(correlation, Shuffling())

    def test_one_class_is_refused(self):
        def means(loader):
            features, labels = joined(loader)
            return ClassFilters(features.mean(0)[None], counts=torch.tensor([len(labels)]))

        with pytest.raises(ValueError, match="two classes"):
            validate(means, [(torch.rand(6, 7), torch.zeros(6, dtype=torch.int64))])
