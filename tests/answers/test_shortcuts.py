"""Shortcuts against differences computed by hand, and repairs against the model itself."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters.answers import find_shortcuts, repair
from captum_classfilters.answers.head_edits import EditedHeads, HeadEdit
from captum_classfilters.answers.relabeling import Relabeling
from captum_classfilters.answers.repair import Edit
from captum_classfilters.answers.sides import see_loader
from captum_classfilters.heads import decompose
from captum_classfilters.heads.linear_head import linear_head
from captum_classfilters.identify import false_discovery_adjusted
from captum_classfilters.identify.accuracy_reduction import paired_interval
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.visualize import plot_shortcuts
from tests.models import QUIET, known

WEIGHT = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.5], [0.0, 0.0, 2.0, 3.0]])


def net(bias: bool = True) -> nn.Sequential:
    """Means of four channels, weighed: the fourth is none of the classes' and speaks for the third."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=bias))
    with torch.no_grad():
        model.get_parameter("2.weight").copy_(WEIGHT)
        if bias:
            model.get_parameter("2.bias").copy_(torch.tensor([0.1, 0.2, 0.3]))
    return model.eval()


def images(number: int = 60, seed: int = 0):
    """Images whose own channel is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    x = torch.rand(number, 4, 2, 3, generator=generator)
    x[torch.arange(number), labels] += 2
    return x, labels


EDITS: tuple[Edit, ...] = ("weights", "filters", "directions", "oblique")


def stamp(x):
    x = x.clone()
    x[:, 3] += 2
    return x


def data(seed: int = 0, number: int = 60, size: int = 25):
    x, y = images(number, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def with_stamp(batches):
    return [(stamp(x), y) for x, y in batches]


@pytest.fixture(scope="module")
def found():
    return find_shortcuts(net(), data(), stamp, permutations=4999, **QUIET)


class TestFinding:
    def test_changes_by_hand(self, found):
        x, _ = images()
        z = x.mean((2, 3)).double()
        assert torch.allclose(found.filter_change, torch.tensor([0.0, 0, 0, 2]).double(), atol=1e-6)
        assert torch.allclose(found.filter_spread, z.std(0), atol=1e-6)
        # 2 times (0, 0.5, 3), less their mean.
        rise = torch.tensor([0.0, 1.0, 6.0]).double()
        assert torch.allclose(found.output_change, rise - rise.mean(), atol=1e-5)
        assert torch.allclose(found.contributions.sum(1), found.output_change, atol=1e-5)
        before, after = (torch.bincount(net()(i).argmax(1), minlength=3) for i in (x, stamp(x)))
        assert found.predicted.tolist() == torch.stack([before, after], 1).tolist()
        assert found.accuracy() == pytest.approx((1.0, 1 / 3))
        assert found.filters.tolist() == [3]
        assert found.outputs.tolist() == [2]
        assert found.carriers(2, 5).tolist() == [3]
        # Every other relabeling of 60 pairs is smaller: the smallest p, of one among four.
        assert float(found.filter_q[3]) == pytest.approx(4 / 5000)
        assert found.filter_q[:3].tolist() == [1.0, 1.0, 1.0]

    def test_one_loader_of_pairs_two_loaders_and_a_function_give_the_same(self, found):
        pairs = [((x, stamp(x)), y) for x, y in data(size=17)]
        for other in (
            find_shortcuts(net(), pairs, permutations=4999, **QUIET),
            find_shortcuts(net(), data(), with_stamp(data(size=11)), permutations=4999, **QUIET),
        ):
            for name in ("filter_change", "filter_q", "output_change", "output_q"):
                assert torch.allclose(getattr(other, name), getattr(found, name), atol=1e-6)
            assert torch.equal(other.predicted, found.predicted)

    def test_a_mark_that_does_nothing_is_not_found(self):
        def noise(x):
            return x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x)))

        nothing = find_shortcuts(net(), data(), noise, **QUIET)
        assert not len(nothing.outputs)
        assert not len(nothing.filters)
        with pytest.raises(ValueError, match="Nothing was found to repair"):
            repair(net(), nothing, data(1), noise, **QUIET)
        named = repair(net(), nothing, data(1), noise, outputs=[2], edit="weights", **QUIET)
        assert named.outputs == ("2",)

    def test_a_small_change_is_found_only_without_a_least(self):
        def faint(x):
            x = x.clone()
            x[:, 3] += 0.02
            return x

        assert not len(find_shortcuts(net(), data(), faint, **QUIET).outputs)
        assert find_shortcuts(net(), data(), faint, least=0, **QUIET).outputs.tolist() == [2]

    def test_groups_are_compared_within_classes(self):
        """The third class has it more often, which pooled means would take for its own channel."""
        x, y = images(90)
        has = (torch.arange(90) // 3) % 3 == 0
        has |= (y == 2) & ((torch.arange(90) // 3) % 3 == 1)
        without = [(x[~has], y[~has])]
        with_ = [(stamp(x[has]), y[has])]
        found = find_shortcuts(net(), without, with_, paired=False, **QUIET)
        assert found.filters.tolist() == [3]
        assert found.filter_q[2] > 0.05
        z = torch.cat([x[~has], stamp(x[has])]).mean((2, 3)).double()
        g = torch.cat([torch.zeros(int((~has).sum())), torch.ones(int(has.sum()))]).double()
        labels = torch.cat([y[~has], y[has]])
        # The coefficient of `has` in a regression on classes and `has`.
        design = torch.cat([torch.eye(3)[labels].double(), g[:, None]], 1)
        expected = torch.linalg.lstsq(design, z).solution[3]
        assert torch.allclose(found.filter_change, expected, atol=1e-6)

    def test_refusals(self):
        model, (x, y) = net(), images()
        with pytest.raises(ValueError, match="60 images without it and 59 with it"):
            find_shortcuts(model, [(x, y)], [(x[1:], y[1:])], **QUIET)
        with pytest.raises(ValueError, match="Image 0 has the label 0 without it and 2 with it"):
            find_shortcuts(model, [(x, y)], [(x.flip(0), y.flip(0))], **QUIET)
        shuffled = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)
        with pytest.raises(ValueError, match=r"marked draws its images in a random order"):
            find_shortcuts(model, [(x, y)], shuffled, **QUIET)
        with pytest.raises(ValueError, match=r"expected pairs of images"):
            find_shortcuts(model, [(x, y)], **QUIET)
        with pytest.raises(ValueError, match=r"are no pairs"):
            find_shortcuts(model, [((x, x[:, :, :1]), y)], **QUIET)
        with pytest.raises(ValueError, match=r"too few images: 7 pairs have 2\^7.0"):
            find_shortcuts(model, [(x[:7], y[:7])], stamp, **QUIET)
        # As many as the message says are enough.
        find_shortcuts(model, [(x[:8], y[:8])], stamp, **QUIET)
        with pytest.raises(ValueError, match=r"permutations=70 are too few.* needs 79"):
            find_shortcuts(model, [(x, y)], stamp, permutations=70, **QUIET)
        assert find_shortcuts(
            model, [(x, y)], stamp, permutations=79, **QUIET
        ).filters.tolist() == [3]
        with pytest.raises(ValueError, match="paired=False needs two loaders"):
            find_shortcuts(model, [(x, y)], stamp, paired=False, **QUIET)
        zeros, others = [(x[y == 0], y[y == 0])], [(x[y > 0], y[y > 0])]
        with pytest.raises(ValueError, match="In no class are there images with it"):
            find_shortcuts(model, zeros, others, paired=False, **QUIET)
        for options in ({"fdr": 0}, {"fdr": 1.0}, {"least": -1}, {"permutations": 0}):
            with pytest.raises(ValueError, match=next(iter(options))):
                find_shortcuts(model, [(x, y)], stamp, **options, **QUIET)

    def test_a_head_that_is_not_linear_is_refused(self):
        class Scaled(nn.Linear):
            def forward(self, z):
                return 2 * super().forward(z)

        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Scaled(4, 3)).eval()
        with pytest.raises(ValueError, match="not a plain linear layer"):
            find_shortcuts(model, data(), stamp, **QUIET)
        with pytest.raises(ValueError, match="has no linear head"):
            find_shortcuts(nn.Sequential(nn.Conv2d(4, 3, 2), nn.Flatten()), data(), stamp, **QUIET)


class TestRelabeling:
    def test_p_values_of_few_pairs_are_the_exact_ones(self):
        values = torch.tensor([[1.0, -3.0], [2.0, 1.0], [0.5, -2.0], [-0.25, 0.5], [3.0, -1.0]])
        margins = torch.tensor([0.1, 0.0]).double()
        for column, margin in enumerate(margins.tolist()):
            own = values[:, column] * values[:, column].mean().sign() - margin
            sums = [
                abs(float((torch.tensor(signs) * own).sum()))
                for signs in itertools.product((-1.0, 1.0), repeat=5)
            ]
            exact = sum(total >= float(own.sum()) - 1e-6 for total in sums) / 32
            p = Relabeling.of_pairs(5).p_values(values, margins, 40_000, 0)[column]
            assert float(p) == pytest.approx(exact, abs=0.01)

    def test_p_values_under_the_null_are_not_too_small(self):
        """At the edge of the margin, the test holds its level."""
        generator = torch.Generator().manual_seed(0)
        values = 0.3 + torch.randn(40, 2000, generator=generator)
        p = Relabeling.of_pairs(40).p_values(values, torch.full((2000,), 0.3).double(), 999, 0)
        assert float((p <= 0.05).double().mean()) < 0.06
        has = (torch.arange(40) % 3 == 0).float()
        groups = Relabeling.of_groups(has, torch.arange(40) % 2)
        free = torch.randn(40, 2000, generator=generator)
        q = groups.p_values(free, torch.zeros(2000).double(), 999, 0)
        assert 0.03 < float((q <= 0.05).double().mean()) < 0.07

    def test_shuffles_stay_in_their_block(self):
        blocks = torch.tensor([1, 0, 0, 1, 1, 0])
        groups = Relabeling.of_groups(torch.tensor([1.0, 0, 1, 0, 0, 0]), blocks)
        assert groups.bits == pytest.approx(torch.tensor(9.0).log2().item())
        for weights in groups._draws(50, torch.Generator().manual_seed(0)):
            for block in (0, 1):
                own = weights[:, blocks == block].sort(1).values
                assert torch.allclose(own, groups.weights[blocks == block].sort().values.float())


class TestRepair:
    def test_weights_by_hand(self, found):
        """One entry carries it; its mean goes to the bias."""
        model = net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        fixed = repair(model, found, data(1), stamp, edit="weights", **QUIET)
        assert known(fixed.removed).nonzero().tolist() == [[2, 3]]
        weight, bias = (fixed.model.get_parameter(f"2.{name}") for name in ("weight", "bias"))
        expected = WEIGHT.clone()
        expected[2, 3] = 0
        assert torch.equal(weight, expected)
        mean = images()[0].mean((2, 3))[:, 3].mean()
        assert torch.allclose(bias, torch.tensor([0.1, 0.2, 0.3 + 3 * float(mean)]))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert fixed.outputs == ("2",)
        assert fixed.accuracy[:, 0].tolist() == pytest.approx([1.0, 1 / 3])

    @pytest.mark.parametrize("edit", EDITS)
    def test_counts_are_those_of_the_models(self, found, edit):
        x, y = images(50, 3)
        fixed = repair(
            net(), found, [(x[:30], y[:30]), (x[30:], y[30:])], stamp, edit=edit, size=1,
            repetitions=3, **QUIET,
        )  # fmt: skip
        assert fixed.size == 1
        with torch.no_grad():
            for kind, seen in enumerate((x, stamp(x))):
                own, new = net()(seen).argmax(1), fixed.model(seen).argmax(1)
                assert fixed.right[kind, :2].tolist() == [
                    int((own == y).sum()),
                    int((new == y).sum()),
                ]
                others = y != 2
                taken = [int(((p == 2) & others).sum()) for p in (own, new)]
                assert fixed.taken[kind, :2].tolist() == taken
                assert fixed.counts[kind].tolist() == [50, int(others.sum())]
                assert int(fixed.lost[kind, 0]) == int(((own == y) & (new != y)).sum())
                assert int(fixed.gained[kind, 0]) == int(((own != y) & (new == y)).sum())
        assert fixed.right.shape == (2, 5)
        assert float(fixed.gap_closed[0]) > 0.9
        low, high = fixed.interval()[1, 0]
        expected = paired_interval(fixed.gained[1, 0], fixed.lost[1, 0], torch.tensor(50))
        assert (float(low), float(high)) == pytest.approx(tuple(expected.tolist()))
        assert 0 < float(low) < float(fixed.accuracy[1, 1] - fixed.accuracy[1, 0]) < float(high)

    def test_an_edit_that_harms_is_warned_of(self, found, recwarn):
        """With all filters held at their means every image is of one class."""
        repair(net(), found, data(1), stamp, edit="weights", size=1, **QUIET)
        assert not recwarn.list
        told = r"of 4 filters lowers the accuracy of images without it from 1\.000 to 0\.333"
        with pytest.warns(UserWarning, match=told):
            repair(net(), found, data(1), stamp, edit="filters", size=4, **QUIET)

    def test_directions_are_not_seen_any_more(self, found):
        fixed = repair(net(), found, data(1), stamp, edit="directions", size=1, **QUIET)
        x, _ = images(9, 5)
        assert torch.allclose(fixed.model(x), fixed.model(stamp(x)), atol=1e-5)
        assert torch.allclose(
            known(fixed.directions).abs()[:, 0], torch.tensor([0.0, 0, 0, 1]).double(), atol=1e-6
        )

    def test_oblique_reads_where_clean_images_vary_least(self):
        """The third class has the fourth channel, too; what it has of it stays."""

        def with_channel(seed):
            x, y = images(60, seed)
            x[y == 2, 3] += 2
            return x, y

        x, y = with_channel(0)
        found = find_shortcuts(net(), [(x, y)], stamp, permutations=4999, **QUIET)
        fixed = {
            edit: repair(net(), found, [with_channel(1)], stamp, edit=edit, size=1, **QUIET).model
            for edit in ("directions", "oblique")
        }
        z = x.mean((2, 3)).double()
        covariance = (z - z.mean(0)).T @ (z - z.mean(0)) / 60
        covariance += 0.1 * 4 / 60 * covariance.diagonal().mean() * torch.eye(4)
        read = torch.linalg.inv(covariance)[:, 3]
        read = read / read[3]
        weight = WEIGHT.double() - torch.outer(WEIGHT[:, 3].double(), read)
        oblique = fixed["oblique"].get_parameter("2.weight")
        assert torch.allclose(oblique.double(), weight, atol=1e-4)
        assert torch.allclose(fixed["oblique"](x), fixed["oblique"](stamp(x)), atol=1e-4)
        moved = {
            edit: float((model(x) - net()(x)).detach().square().mean())
            for edit, model in fixed.items()
        }
        assert moved["oblique"] < 0.5 * moved["directions"]

    @pytest.mark.parametrize("edit", EDITS)
    def test_rebalanced_outputs_are_predicted_as_often_as_labels(self, edit):
        def model():
            made = net()
            with torch.no_grad():
                made.get_parameter("2.bias")[2] -= 9
            return made

        x, y = images()
        found = find_shortcuts(model(), data(), stamp, permutations=4999, **QUIET)
        options = {"edit": edit, "size": 1, "outputs": [2], "repetitions": 3, **QUIET}
        before = repair(model(), found, data(1), stamp, **options)
        after = repair(model(), found, data(1), stamp, rebalance=True, **options)
        assert int((before.model(x).argmax(1) == 2).sum()) == 0
        assert int((after.model(x).argmax(1) == 2).sum()) == int((y == 2).sum()) == 20
        assert before.right[0, 1] < after.right[0, 1]
        assert bool((before.right[0, 2:] < after.right[0, 2:]).all())  # the control, too
        weights = [made.model.get_parameter("2.weight") for made in (before, after)]
        assert torch.equal(*weights)
        biases = [made.model.get_parameter("2.bias")[:2] for made in (before, after)]
        assert torch.equal(*biases)

    def test_scores_that_are_rounded_are_the_heads_all_the_same(self):
        model = net().bfloat16()
        rounded = [[(x.bfloat16(), y) for x, y in data(seed)] for seed in (0, 1)]
        found = find_shortcuts(model, rounded[0], stamp, permutations=4999, **QUIET)
        options = {"edit": "filters", "size": 1, "outputs": [2], **QUIET}
        fixed = repair(model, found, rounded[1], stamp, rebalance=True, **options)
        assert fixed.outputs == ("2",)

    def test_rebalance_refuses_what_it_does_not_know(self):
        few = find_shortcuts(net(), data(number=24), stamp, permutations=4999, **QUIET)
        with pytest.raises(ValueError, match="8 of the 24 images"):
            repair(net(), few, data(1), stamp, rebalance=True, **QUIET)
        convolution = nn.Conv2d(4, 3, 1)
        rectified = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        found = find_shortcuts(rectified, data(), stamp, permutations=4999, least=0, **QUIET)
        with pytest.raises(
            ValueError, match="rebalance moves biases of scores that are the output"
        ):
            repair(rectified, found, data(1), stamp, outputs=[2], rebalance=True, **QUIET)

    def test_a_filter_keeps_its_clean_mean(self, found):
        fixed = repair(net(), found, data(1), stamp, edit="filters", size=1, **QUIET)
        x, _ = images(9, 5)
        z = x.mean((2, 3))
        z[:, 3] = images()[0].mean((2, 3))[:, 3].mean()
        assert torch.allclose(fixed.model(x), net()[2](z), atol=1e-5)

    def test_a_head_without_bias_gets_one(self):
        found = find_shortcuts(net(bias=False), data(), stamp, permutations=4999, **QUIET)
        fixed = repair(net(bias=False), found, data(1), stamp, edit="weights", **QUIET)
        assert fixed.model.get_parameter("2.bias")[:2].tolist() == [0.0, 0.0]

    def test_a_convolution_for_a_head_and_what_follows_it(self):
        """As in SqueezeNet: maps of scores, rectified and averaged."""

        def model():
            made = nn.Sequential(
                nn.Conv2d(4, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
            with torch.no_grad():
                made.get_parameter("0.weight").copy_(WEIGHT[:, :, None, None])
            return made.eval()

        found = find_shortcuts(model(), data(), stamp, permutations=4999, **QUIET)
        assert found.outputs.tolist() == [2]
        x, y = images(40, 3)
        fixed = repair(model(), found, [(x, y)], stamp, edit="filters", size=1, **QUIET)
        assert isinstance(fixed.model.get_submodule("0"), nn.Conv2d)
        right = [int((fixed.model(i).argmax(1) == y).sum()) for i in (x, stamp(x))]
        assert fixed.right[:, 1].tolist() == right

    def test_scores_that_do_not_follow_from_the_head_alone(self):
        """The whole model runs for each edit."""

        class TwoParts(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net()

            def forward(self, x):
                return self.net(x) + x[:, :3].amax((2, 3))

        model = TwoParts().eval()
        found = find_shortcuts(model, data(), stamp, permutations=4999, **QUIET)
        x, y = images(40, 3)
        fixed = repair(model, found, [(x, y)], stamp, edit="weights", repetitions=2, **QUIET)
        right = [int((fixed.model(i).argmax(1) == y).sum()) for i in (x, stamp(x))]
        assert fixed.right[:, 1].tolist() == right

    def test_one_output(self):
        """A binary classifier's logit is that of class 1; class 0 rises where it falls."""
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)).eval()
        with torch.no_grad():
            model.get_parameter("2.weight").copy_(torch.tensor([[-2.0, 2.0, 0.0, -3.0]]))
            model.get_parameter("2.bias").fill_(1.5)
        binary = [(x, y % 2) for x, y in data()]
        found = find_shortcuts(model, binary, stamp, permutations=4999, **QUIET)
        assert found.outputs.tolist() == [0]
        other = [(x, y % 2) for x, y in data(1)]
        fixed = repair(model, found, other, stamp, edit="weights", **QUIET)
        assert known(fixed.removed).tolist() == [[False, False, False, True]]
        assert float(fixed.taken_rate[1, 1]) < float(fixed.taken_rate[1, 0])

    def test_refusals(self, found):
        with pytest.raises(ValueError, match="25 of the 25 images of batch 0, image 0 first, were"):
            repair(net(), found, data(), stamp, **QUIET)
        with pytest.raises(ValueError, match="choose one of 'weights', 'filters', 'directions'"):
            repair(net(), found, data(1), stamp, edit="rows", **QUIET)  # type: ignore[arg-type]
        for edit in EDITS:
            for size in (0, 5):
                most = 1 if edit in ("directions", "oblique") else 4
                message = f"size={size} is out of range; choose 1 to {most}"
                with pytest.raises(ValueError, match=message):
                    repair(net(), found, data(1), stamp, edit=edit, size=size, **QUIET)
        other = net()
        with torch.no_grad():
            other.get_parameter("2.weight").mul_(2)
        with pytest.raises(ValueError, match="another weight"):
            repair(other, found, data(1), stamp, **QUIET)
        with pytest.raises(ValueError, match="outputs is empty"):
            repair(net(), found, data(1), stamp, outputs=[], **QUIET)
        with pytest.raises(ValueError, match="3"):
            repair(net(), found, data(1), stamp, outputs=[3], **QUIET)
        with pytest.raises(ValueError, match="must not be negative"):
            repair(net(), found, data(1), stamp, repetitions=-1, **QUIET)

    def test_a_decomposed_head_is_refused(self):
        from captum_classfilters import LayerFilterContribution

        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), *net())
        with torch.no_grad():
            model.get_parameter("0.weight").copy_(torch.eye(4)[:, :, None, None])
        table = LayerFilterContribution(model, "1").identify(data(), num_filters=3, **QUIET)
        sparse = decompose(model, table)
        found = find_shortcuts(sparse, data(), stamp, permutations=4999, **QUIET)
        with pytest.raises(ValueError, match="is decomposed"):
            repair(sparse, found, data(1), stamp, outputs=[2], **QUIET)

    def test_few_filters_lose_one_direction(self, found):
        """More would take the classes with them."""
        assert repair(net(), found, data(1), stamp, repetitions=0, **QUIET).size == 1

    def test_without_controls(self, found):
        fixed = repair(net(), found, data(1), stamp, repetitions=0, **QUIET)
        assert fixed.right.shape == (2, 2)
        assert "nan" not in str(fixed)


def test_q_values_are_those_of_the_package(found):
    p = torch.tensor([1.0, 1.0, 1.0, 1 / 5000]).double()
    assert torch.allclose(found.filter_q, false_discovery_adjusted(p))


class _Echo(nn.Module):
    """Adds to the head's output, ten times, what its weight was; the largest score is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2, bias=False)
        self.echo = nn.Parameter(self.head.weight.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features) + 10 * nn.functional.linear(features, self.echo)


def test_a_short_cut_that_did_not_hold_is_not_taken_later() -> None:
    model = _Echo()
    head = linear_head(model.head, "head")
    removed = torch.tensor([[False] * 3, [True] * 3])
    edit = HeadEdit(torch.zeros(3), removed)
    heads = EditedHeads(model, head, [edit])
    answers: list[Tensor] = []
    features = torch.randn(36, 3)
    data = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in features.split(12)]
    see_loader(
        model,
        head,
        data,
        lambda seen: answers.append(heads.answers(seen)),
        unpack=None,
        show_progress=False,
    )
    edited = edit.edited(model, head)
    expected = torch.stack([model(features).argmax(1), edited(features).argmax(1)])
    head_alone = edited.get_submodule("head")(features).argmax(1)
    differ = head_alone != expected[1]  # where the short cut would be wrong
    assert not differ[:12].any()  # it seems to hold first
    assert differ[12:].any()
    assert torch.equal(torch.cat(answers, 1), expected)


def test_one_of_a_kind_is_told_in_the_singular(found):
    """In tables and in pictures."""
    assert "carried by 1 of 4 filters of 2, into 1 of 3 outputs; " in str(found)
    _, axes = plot_shortcuts(found)
    assert axes.get_title(loc="left") == "carried by 1 filter of 2, into 1 output"
    before, after = found.predicted[2].tolist()
    assert [text.get_text() for text in axes.texts] == [f" {before} → {after} images; filter 3"]
    pair = [(images(1)[0], images(1)[1])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = repair(net(), found, data(seed=1), stamp, edit="weights", size=1, **QUIET)
    assert "1 weight of the head edited, judged on 60 other images" in str(one)
    _, axes = plot_shortcuts(one)
    assert axes.get_title(loc="left") == "1 weight of the head edited"
    assert str(evaluate_classifier(net(), pair, **QUIET)).count("1 image") == 1


def test_images_that_are_no_pairs_are_reported():
    """Two folders of different images in the order of their classes, as many of each."""
    (x, y), (other, _) = images(60, 0), images(60, 1)
    order = y.argsort(stable=True)
    without, with_ = [(x[order], y[order])], [(stamp(x)[order], y[order])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_shortcuts(net(), without, with_, permutations=4999, **QUIET)
    unlike = [(stamp(other)[order], y[order])]
    with pytest.warns(UserWarning, match="may be no pairs.*paired=False"):
        find_shortcuts(net(), without, unlike, permutations=4999, **QUIET)
