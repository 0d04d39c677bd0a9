"""Maps of single filters, and whether maps find the object."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from captum_classfilters import ClassFilters, ClassFilterSaliency
from captum_classfilters.attr import filter_activation_maps, filter_gradient_maps
from captum_classfilters.metrics import (
    boxes_to_masks,
    center_box_maps,
    choose_threshold,
    filter_localization,
    localization,
)
from tests.metrics.test_any_device import KINDS_OF_DATA
from tests.models import ChannelsLast, images, pool_linear


class TestFilterMaps:
    def test_activations_are_interpolated(self):
        model, x = pool_linear(), images()
        activation = torch.relu(model[0](x))
        expected = F.interpolate(activation, size=(6, 6), mode="bilinear", align_corners=False)
        assert torch.allclose(filter_activation_maps(model, "1", x), expected)
        rows = torch.tensor([[0, 5], [1, 2]]).repeat(4, 1)
        chosen = filter_activation_maps(model, "1", x, rows)
        assert torch.equal(chosen[1], filter_activation_maps(model, "1", x)[1, [1, 2]])
        assert filter_activation_maps(model, "1", x, size=(9, 12)).shape == (8, 6, 9, 12)

    def test_class_activation_map_is_the_saliency_of_all_filters(self):
        model, x = pool_linear(), images()
        weight = model.get_parameter("4.weight")
        table = ClassFilters(weight.detach().double(), torch.ones(3)).with_selection(
            torch.ones(3, 6).bool()
        )
        saliency = ClassFilterSaliency(model, "1", table, mode="activation_map")
        maps = saliency.attribute(x, target=2).sum(1)
        cam = (filter_activation_maps(model, "1", x) * weight[2][:, None, None]).sum(1)
        assert torch.allclose(maps / maps.std(), cam / cam.std(), atol=1e-4)

    def test_gradients_are_the_norm_over_colors(self):
        model, x = pool_linear(), images()
        rows = torch.tensor([[0, 5], [1, 2]]).repeat(4, 1)
        maps = filter_gradient_maps(model, "1", x, rows)
        point = x[3:4].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.relu(model[0](point))[0, 2].mean(), point)
        expected = gradient[0].square().sum(0).sqrt()
        expected = expected / expected.square().mean().sqrt()
        assert torch.allclose(maps[3, 1], expected, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS_OF_DATA)
    @pytest.mark.parametrize("around", [torch.enable_grad, torch.inference_mode])
    @pytest.mark.parametrize("function", [filter_activation_maps, filter_gradient_maps])
    def test_images_and_filters_of_any_kind(self, function, around, kind):
        model, x, rows = pool_linear(), images(), torch.tensor([[0, 5], [1, 2]]).repeat(4, 1)
        for filters in (rows, rows[0]):
            expected = function(model, "1", x, filters)
            with around():
                own_images, own_filters = KINDS_OF_DATA[kind]((x, filters))
                assert torch.equal(function(model, "1", own_images, filters), expected)
                assert torch.equal(function(model, "1", x, own_filters), expected)

    def test_a_dead_filter_has_no_map(self):
        model = pool_linear()
        with torch.no_grad():
            model.get_parameter("0.weight")[4] = 0
            model.get_parameter("0.bias")[4] = -1
        assert filter_gradient_maps(model, "1", images(), torch.tensor([4])).abs().max() == 0

    def test_blur_is_torchvisions(self):
        x = images(size=40)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1))
        sharp = filter_gradient_maps(model, "0", x, torch.tensor([1]))
        soft = filter_gradient_maps(model, "0", x, torch.tensor([1]), blur=2.0)
        assert torch.allclose(soft, gaussian_blur(sharp, [13, 13], [2.0, 2.0]), atol=1e-5)

    def test_channels_last_and_flat_layers(self):
        twin = pool_linear()
        model, x = ChannelsLast(twin), images()
        found = filter_activation_maps(model, "transpose", x, channel_dim=-1)
        assert torch.equal(found, filter_activation_maps(model, "relu", x))
        flat = filter_gradient_maps(twin, "4", x, torch.tensor([0]))
        assert flat.shape == (8, 1, 6, 6)

    def test_bad_input(self):
        model, x = pool_linear(), images()
        for filters, message in (
            (torch.tensor([6]), "filters 0 to 5"),
            (torch.tensor([0.5]), "expected indices"),
            (torch.ones(6).bool(), "expected indices"),
            (torch.zeros(3, 1).long(), "3 rows for 8 images"),
            (torch.zeros(0).long(), "at least one"),
        ):
            with pytest.raises(ValueError, match=message):
                filter_activation_maps(model, "1", x, filters)
        with pytest.raises(ValueError, match="maps need"):
            filter_activation_maps(model, "4", x)
        with pytest.raises(ValueError, match="blur=0"):
            filter_gradient_maps(model, "1", x, torch.tensor([0]), blur=0)
        with pytest.raises(ValueError, match="colors, H, W"):
            filter_gradient_maps(model, "1", x[0], torch.tensor([0]))


class TestLocalization:
    def test_by_hand(self):
        # Two of three kept pixels lie on an object of four: 2 / 5.
        maps = torch.zeros(1, 5, 5)
        maps[0, 0, 0], maps[0, 0, 1], maps[0, 0, 2] = 3, 2, 1
        result = localization(maps, torch.tensor([[0, 0, 2, 2]]), value=3 / 25)
        assert result.iou.tolist() == [2 / 5]
        # The kept row is a box of 3 x 1, the object one of 2 x 2: 2 / 5 as well.
        assert result.box_iou.tolist() == pytest.approx([2 / 5])
        assert result.hit.tolist() == [1]
        assert result.average_precision(0.4) == 1
        assert result.average_precision(0.41) == 0
        assert result.average_precision(0.4, boxes=True) == 1

    def test_rules(self):
        maps = torch.arange(16.0).reshape(1, 4, 4)
        last_row = torch.tensor([[0, 3, 4, 4]])
        rules: tuple[tuple[Literal["share", "level", "value"], float], ...] = (
            ("share", 0.25),
            ("level", 0.8),
            ("value", 12.0),
        )
        for rule, value in rules:
            assert localization(maps, last_row, rule=rule, value=value).iou.tolist() == [1]
        # One threshold for each map: the first keeps the row, the second half of it.
        two = maps[:, None].repeat(1, 2, 1, 1)
        found = localization(two, last_row, rule="value", value=torch.tensor([12.0, 14.0]))
        assert found.iou.tolist() == [0.75]

    def test_box_is_that_of_the_largest_part(self):
        maps = torch.zeros(1, 6, 6)
        maps[0, 0:2, 0:2] = 1
        maps[0, 5, 5] = 1
        found = localization(maps, torch.tensor([[0, 0, 2, 2]]), rule="value", value=0.5)
        assert found.box_iou.tolist() == [1]
        assert found.iou.tolist() == [0.8]
        turned = localization(  # the smaller part comes first
            maps.flip(1, 2), torch.tensor([[4, 4, 6, 6]]), rule="value", value=0.5
        )
        assert turned.box_iou.tolist() == [1]

    @pytest.mark.parametrize("axes", [(), (1,), (2,), (1, 2)])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_boxes_of_equally_large_parts_are_averaged(self, axes, transposed):
        # Two parts of two pixels, one of a single one; the object is the first part's box, and one
        # more pixel: overlaps of 2 / 3 and 0.
        maps, objects = torch.zeros(1, 4, 6), torch.zeros(1, 4, 6, dtype=torch.bool)
        maps[0, 0, :2] = maps[0, 2:, 5] = maps[0, 3, 0] = 1
        objects[0, 0, :3] = True
        maps, objects = maps.flip(axes), objects.flip(axes)
        if transposed:
            maps, objects = maps.mT, objects.mT
        found = localization(maps, objects, rule="value", value=0.5)
        assert found.box_iou.tolist() == pytest.approx([1 / 3])

    def test_nothing_above_the_threshold(self):
        found = localization(
            torch.zeros(1, 3, 3), torch.tensor([[0, 0, 1, 1]]), rule="value", value=1.0
        )
        assert found.iou.tolist() == found.box_iou.tolist() == [0]

    def test_pointing_game_of_a_constant_map_is_chance(self):
        objects = torch.tensor([[0, 0, 2, 2], [0, 0, 4, 2]])
        found = localization(torch.ones(2, 4, 4), objects)
        assert found.hit.tolist() == [0.25, 0.5]

    def test_a_level_keeps_all_of_a_constant_map(self):
        objects = torch.tensor([[0, 0, 2, 2]])
        found = localization(torch.ones(1, 4, 4), objects, rule="level", value=0.5)
        assert found.iou.tolist() == found.box_iou.tolist() == [0.25]
        assert choose_threshold(torch.ones(1, 4, 4), objects, rule="level")[1] == 0.25

    def test_a_share_of_a_constant_map_is_drawn_at_random(self):
        """As many pixels as are asked for, of no part of the image in particular."""
        upper = boxes_to_masks(torch.tensor([[0, 0, 50, 20]]), (40, 50))
        for objects in (upper, ~upper):
            found = localization(torch.ones(1, 40, 50), objects, value=0.3)
            # 600 of 2,000 pixels, half of which lie in the object's 1,000: 300 of 1,300 in common.
            assert found.iou.tolist() == pytest.approx([300 / 1300], abs=0.02)
            assert found.iou.tolist() == localization(torch.ones(1, 40, 50), objects).iou.tolist()

    def test_of_equal_pixels_a_share_takes_what_is_missing(self):
        maps = torch.zeros(1, 4, 5)
        maps[0, 0, :3] = 1
        for value, overlap in ((3 / 20, 1.0), (2 / 20, 2 / 3), (8 / 20, 3 / 8), (1e-9, 1 / 3)):
            found = localization(maps, maps > 0, value=value)
            assert found.iou.tolist() == pytest.approx([overlap])
        assert choose_threshold(maps, maps > 0, candidates=[0.4, 0.15, 0.1]) == (0.15, 1.0)

    def test_tolerance(self):
        maps = torch.zeros(1, 5, 5)
        maps[0, 0, 4] = 1
        box = torch.tensor([[0, 0, 2, 1]])
        assert localization(maps, box, tolerance=2.9).hit.tolist() == [0]
        assert localization(maps, box, tolerance=3.0).hit.tolist() == [1]

    def test_masks_and_classes(self):
        masks = torch.zeros(3, 4, 4, dtype=torch.bool)
        masks[:, 1:3, 1:3] = True
        maps = torch.stack([masks[0].float(), -masks[0].float(), masks[0].float()])
        labels = torch.tensor([7, 7, 2])
        found = localization(maps, masks, rule="level", value=0.5, labels=labels)
        assert found.iou.tolist() == [1, 0, 1]
        classes = found.by_class()
        assert {class_: part.average_iou for class_, part in classes.items()} == {7: 0.5, 2: 1.0}
        assert classes[7].average_precision(0.5) == 0.5

    def test_pixels_whose_center_is_inside(self):
        mask = boxes_to_masks(torch.tensor([[0.6, 1.0, 2.5, 3.0]]), (4, 5))[0]
        assert mask.nonzero().tolist() == [[1, 1], [2, 1]]
        wider = boxes_to_masks(torch.tensor([[0.4, 1.0, 2.6, 3.0]]), (4, 5))[0]
        assert wider.nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]

    def test_center_box_keeps_proportions(self):
        maps = center_box_maps(2, (8, 16))
        found = localization(maps, torch.tensor([[4, 2, 12, 6]] * 2), value=0.25)
        assert found.iou.tolist() == [1, 1]
        assert found.hit.tolist() == [1, 1]

    def test_threshold_is_the_best_of_the_candidates(self):
        torch.manual_seed(0)
        maps, boxes = torch.rand(20, 8, 8), torch.tensor([[2, 2, 6, 6]]).repeat(20, 1)
        maps[:, 2:6, 2:6] += 0.5
        for rule in ("share", "level"):
            best, score = choose_threshold(maps, boxes, rule=rule)
            tried = {
                share / 20: localization(maps, boxes, rule=rule, value=share / 20).average_iou
                for share in range(1, 20)
            }
            assert score == pytest.approx(max(tried.values()))
            assert tried[best] == pytest.approx(score)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int8])
    @pytest.mark.parametrize(("rule", "value"), [("level", 0.8), ("value", 11.5), ("share", 0.25)])
    def test_maps_of_whole_numbers(self, dtype, rule, value):
        maps, box = torch.arange(16).view(1, 4, 4), torch.tensor([[0, 3, 4, 4]])
        found = localization(maps.to(dtype), box, rule=rule, value=value)
        assert found.average_iou == 1.0
        assert choose_threshold(maps.to(dtype), box, rule=rule, candidates=[value]) == (value, 1.0)

    @pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, iter])
    def test_candidates_of_any_form(self, form):
        maps, box = torch.arange(16.0).view(1, 4, 4), torch.tensor([[0, 3, 4, 4]])
        assert choose_threshold(maps, box, candidates=form([0.125, 0.25, 0.5])) == (0.25, 1.0)
        with pytest.raises(ValueError, match="candidates is empty"):
            choose_threshold(maps, box, candidates=form([]))

    def test_bad_input(self):
        maps, box = torch.rand(2, 4, 4), torch.tensor([[0, 0, 2, 2]] * 2)
        for arguments, options, message in (
            ((maps[0], box), {}, "expected .N, H, W."),
            ((maps, box[:1]), {}, "objects are"),
            ((maps, torch.rand(2, 4, 4)), {}, "expected bool masks"),
            ((maps * float("nan"), box), {}, "NaN"),
            ((maps, torch.tensor([[0, 0, 2, 2], [9, 9, 12, 12]])), {}, "image 1 is empty"),
            ((maps, box), {"value": 1.5}, "between 0 and 1"),
            ((maps, box), {"rule": "otsu"}, "rule='otsu'"),
            ((maps, box), {"rule": "value", "value": torch.rand(3)}, "3 numbers for 1 maps"),
            ((maps, box), {"rule": "value", "value": float("nan")}, "NaN"),
            ((maps, box), {"tolerance": -1}, "tolerance=-1"),
            ((maps, box), {"labels": torch.zeros(3)}, "for 2 images"),
            ((maps, torch.rand(2, 3)), {}, "expected .N, 4."),
        ):
            with pytest.raises(ValueError, match=message):
                localization(*arguments, **options)
        with pytest.raises(ValueError, match="candidates is empty"):
            choose_threshold(maps, box, candidates=())
        with pytest.raises(ValueError, match="between 0 and 1"):
            localization(maps, box).average_precision(2)
        with pytest.raises(ValueError, match="no labels"):
            localization(maps, box).by_class()


class TestFilterLocalization:
    def planted(self):
        """Filter k fires on the object of class k, filter 2 everywhere a little, filter 3 never."""
        boxes = torch.tensor([[0, 0, 4, 4], [4, 4, 8, 8]]).repeat(3, 1)
        labels = torch.arange(6) % 2
        masks = boxes_to_masks(boxes, (8, 8)).float()
        activations = torch.zeros(6, 4, 8, 8)
        for image, label in enumerate(labels):
            activations[image, label] = masks[image]
        activations[:, 2] = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0))
        return activations, boxes, labels

    def test_planted_filters(self):
        activations, boxes, labels = self.planted()
        found = filter_localization(activations, boxes, labels, size=(8, 8), share=0.125)
        assert found.filter_class.tolist()[:2] == [0, 1]
        assert found.iou.shape == (2, 4)
        assert found.iou[:, 0].tolist() == [1, 0]
        assert found.iou[:, 1].tolist() == [0, 1]
        assert found.iou[:, 3].tolist() == [0, 0]  # at its minimum everywhere: nowhere active
        assert found.precision[:, :2].tolist() == [[1, 0], [0, 1]]
        number, overlap, precision = found.by_class()[1]
        own = found.filter_class == 1
        assert number == int(own.sum())
        assert overlap == pytest.approx(float(found.iou[1, own].mean()))
        assert precision == pytest.approx(float(found.precision[1, own].mean()))

    def test_threshold_is_over_all_images(self):
        activations = torch.arange(20.0).reshape(5, 1, 2, 2)
        masks = torch.ones(5, 2, 2, dtype=torch.bool)
        labels = torch.zeros(5, dtype=torch.int64)
        found = filter_localization(activations, masks, labels, share=0.3)
        assert found.thresholds.tolist() == [14.0]  # 14 to 19 are the highest six
        assert found.iou.tolist() == [[pytest.approx((0.5 + 1) / 5)]]
        found = filter_localization(activations, masks, labels, share=0.3, iou_threshold=0.5)
        assert found.precision.tolist() == [[pytest.approx(1 / 5)]]  # 0.5 does not exceed it

    def test_other_images_take_over_thresholds_and_classes(self):
        activations, boxes, labels = self.planted()
        first = filter_localization(activations[:4], boxes[:4], labels[:4], size=(8, 8))
        second = filter_localization(
            activations[4:],
            boxes[4:],
            labels[4:],
            size=(8, 8),
            thresholds=first.thresholds,
            filter_class=first.filter_class,
        )
        assert torch.equal(second.filter_class, first.filter_class)
        assert torch.equal(second.thresholds, first.thresholds)
        own = [float(second.iou[c, k]) for k, c in enumerate(first.filter_class.tolist())]
        assert second.average_iou == pytest.approx(sum(own) / 4)

    def test_with_thresholds_an_image_scores_the_same_among_any_others(self):
        # Constant maps of 5, 6, 1 and 2 under a threshold of 4: all of the first two is active.
        activations = torch.tensor([5.0, 6, 1, 2]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
        masks, labels = torch.ones(4, 3, 2, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
        masks[0, 0] = False  # four of six pixels
        own: dict[str, Any] = {"thresholds": torch.tensor([4.0]), "filter_class": torch.tensor([0])}
        for chosen, expected in (
            ([0, 1, 2, 3], [5 / 6, 0]),
            ([0, 1], [5 / 6, math.nan]),
            ([0], [4 / 6, math.nan]),
        ):
            data = activations[chosen], masks[chosen], labels[chosen]
            found = filter_localization(*data, **{**own, "num_classes": 2})
            assert found.iou[:, 0].tolist() == pytest.approx(expected, nan_ok=True)

    def test_thresholds_of_filters_that_are_mostly_zero_hold_for_other_images(self):
        # One pixel of nine fires, so the highest third ends among zeros, which are not active.
        activations = torch.zeros(2, 1, 3, 3)
        activations[:, 0, 1, 2] = torch.tensor([1e-30, 3.0])
        masks, labels = activations[:, 0] > 0, torch.zeros(2, dtype=torch.int64)
        both = filter_localization(activations, masks, labels)
        assert both.iou.tolist() == [[1.0]]
        one = filter_localization(
            activations[:1], masks[:1], labels[:1], thresholds=both.thresholds
        )
        assert one.iou.tolist() == [[1.0]]
        everywhere = filter_localization(activations, masks, labels, thresholds=torch.zeros(1))
        assert everywhere.iou.tolist() == [[pytest.approx(1 / 9)]]

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8, torch.float32])
    def test_classes_of_filters_in_any_type(self, dtype):
        activations, boxes, labels = self.planted()
        filter_class = torch.tensor([0, 1, 1, 0]).to(dtype)
        found = filter_localization(
            activations, boxes, labels, size=(8, 8), share=0.125, filter_class=filter_class
        )
        iou = found.iou
        assert found.average_iou == pytest.approx(
            float(iou[0, [0, 3]].sum() + iou[1, 1:3].sum()) / 4
        )

    def test_bad_input(self):
        activations, boxes, labels = self.planted()
        for arguments, options, message in (
            ((activations[0], boxes, labels), {"size": (8, 8)}, "expected .N, K, h, w."),
            ((activations, boxes, labels), {}, "Boxes need size"),
            ((activations, boxes[:2], labels), {"size": (8, 8)}, "objects are"),
            ((activations, boxes + 20, labels), {"size": (8, 8)}, "outside the image"),
            ((activations, boxes, labels), {"size": (8, 8), "share": 1.0}, "share=1.0"),
            (
                (activations, boxes, labels),
                {"size": (8, 8), "thresholds": torch.zeros(3)},
                "for 4 filters",
            ),
            (
                (activations, boxes, labels),
                {"size": (8, 8), "filter_class": torch.zeros(3).long()},
                "for 4 filters",
            ),
            (
                (activations, boxes, labels),
                {"size": (8, 8), "filter_class": torch.tensor([0, 1, 2, 1])},
                "filter_class runs from 0 to 2; expected 0 to 1",
            ),
            (
                (activations, boxes, labels),
                {"size": (8, 8), "filter_class": torch.tensor([0, 1, 0.5, 1])},
                "filter_class is torch.float32; expected class indices",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                filter_localization(*arguments, **options)
