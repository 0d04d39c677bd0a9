"""What a model makes of its head's output: the same answers have the same edits, and are the model's own."""

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from captum_classfilters import LayerFilterContribution
from captum_classfilters.answers import (
    ClassFilterOOD,
    audit_forgetting,
    build_specialist,
    find_shortcuts,
    forget_class,
    repair,
    repair_confusion,
)
from tests.models import QUIET


def means(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    """Channels' means, weighed."""
    head = nn.Linear(weight.shape[1], len(weight))
    head.weight.data = weight.clone()
    head.bias.data = torch.zeros(len(weight)) if bias is None else bias.clone()
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


class After(nn.Module):
    """A model and a function of its scores."""

    def __init__(self, inner: nn.Module, function: Any) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


def adjusted(scores: Tensor) -> Tensor:
    """By what is known of the classes before."""
    return scores + torch.tensor([2.0, 0.0, -1.0])


SAME_ANSWERS = [
    lambda scores: scores / 0.07,
    lambda scores: scores / 10,
    torch.sigmoid,
    lambda scores: scores.softmax(1),
    lambda scores: scores.log_softmax(1),
]


def confused(number: int = 600):
    """A network whose third output hears a channel that is no class's own, and noisy labels."""
    torch.manual_seed(0)
    model = means(3 * torch.randn(3, 6))
    x = torch.rand(number, 6, 2, 2) + 0.4 * torch.randn(number, 6, 1, 1)
    y = (model(x) + 1.5 * torch.randn(number, 3)).argmax(1)
    model.get_parameter("2.weight").data[2, 3] += 4
    half = number // 2
    return model, [(x[:half], y[:half])], [(x[half:], y[half:])]


def mark(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :2] += 1
    return x


@pytest.mark.parametrize("function", SAME_ANSWERS)
def test_the_same_answers_are_repaired_alike(function):
    model, made_of, judged = confused()
    found = []
    for each in (model, After(model, function)):
        confusion = repair_confusion(each, made_of, judged, 1, 2, repetitions=3, **QUIET)
        shortcuts = find_shortcuts(each, made_of, mark, **QUIET)
        options: Any = {"outputs": 0, "edit": "weights", "repetitions": 3, **QUIET}
        weights = repair(each, shortcuts, judged, mark, **options)
        found.append((confusion.removed, confusion.hits, weights.removed, weights.right))
    assert int(found[0][0].sum()) > 0
    for ours, others in zip(*found, strict=True):
        assert torch.equal(ours, others)


@pytest.mark.parametrize("size", [300, 7, 1])
def test_counts_do_not_depend_on_batches(size):
    model, made_of, ((x, y),) = confused()
    model = After(model, adjusted)
    shortcuts = find_shortcuts(model, made_of, mark, **QUIET)
    loader = list(zip(x.split(size), y.split(size), strict=True))
    options: Any = {"outputs": [0], "size": 1, "repetitions": 3, **QUIET}
    made = repair(model, shortcuts, loader, mark, **options)
    with torch.no_grad():
        for column, network in enumerate((model, made.model)):
            for row, seen in enumerate((x, mark(x))):
                right = int((network(seen).argmax(1) == y).sum())
                assert int(made.right[row, column]) == right
    whole = repair(model, shortcuts, [(x, y)], mark, **options)
    assert torch.equal(made.right, whole.right)
    fixed = repair_confusion(model, made_of, loader, 1, 0, repetitions=3, **QUIET)
    whole_cell = repair_confusion(model, made_of, [(x, y)], 1, 0, repetitions=3, **QUIET)
    assert torch.equal(fixed.hits, whole_cell.hits)


def test_an_audit_and_a_detector_have_the_models_answers():
    model, _, ((x, y),) = confused()
    model = After(model, adjusted)
    predicted = model(x).argmax(1)
    assert not torch.equal(predicted, model.inner(x).argmax(1))
    audit = audit_forgetting({"m": model}, 0, [(x, y)], [(x, y)], **QUIET)
    own = y == 0
    right = (predicted == y).double()
    assert float(audit.forget_accuracy) == pytest.approx(float(right[own].mean()))
    assert float(audit.retain_accuracy) == pytest.approx(float(right[~own].mean()))
    table = LayerFilterContribution(model, "inner.0").identify([(x, y)], num_filters=2, **QUIET)
    detector = ClassFilterOOD(model, table, earlier="inner.0").fit([(x, y)], **QUIET)
    assert torch.equal(detector.reasons(x).predicted, predicted)
    again = pickle.loads(pickle.dumps(detector))
    assert torch.equal(again(x), detector(x))
    broken = x[:2].clone()
    broken[0, 0, 0, 0] = torch.nan
    broken[1] *= 1e38
    for image in broken:
        with pytest.raises(ValueError, match="NaN or Inf"):
            detector(image[None])
    with pytest.raises(ValueError, match="there is no image"):
        detector(x[:0])


class UnderAutocast(nn.Module):
    """A model that opens autocast itself, so that its head reads bfloat16 and holds single precision."""

    def __init__(self, head: list[nn.Module]) -> None:
        super().__init__()
        same = nn.Conv2d(6, 6, 1)
        nn.init.dirac_(same.weight)
        nn.init.zeros_(same.get_parameter("bias"))
        self.layers = nn.Sequential(same, *head).eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x)


def linear_or_maps(weight: Tensor, maps: bool) -> list[nn.Module]:
    """Channels' means, weighed before or after the mean is taken."""
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if not maps:
        return [*means(weight)]
    head = nn.Conv2d(6, len(weight), 1)
    head.weight.data = weight[:, :, None, None].clone()
    nn.init.zeros_(head.get_parameter("bias"))
    return [head, *pooled]


@pytest.mark.parametrize("maps", [False, True])
def test_features_of_another_type_than_the_head(maps):
    """Counts are those of the edited models themselves, but for answers that rounding turns."""
    plain, made_of, ((x, y),) = confused()
    model = UnderAutocast(linear_or_maps(plain.get_parameter("2.weight").data, maps))
    shortcuts = find_shortcuts(model, made_of, mark, **QUIET)
    made = repair(model, shortcuts, [(x, y)], mark, outputs=[0], size=1, repetitions=3, **QUIET)
    fixed = repair_confusion(model, made_of, [(x, y)], 1, 2, repetitions=3, **QUIET)
    with torch.no_grad():
        before, after = (
            torch.stack([(network(seen).argmax(1) == y).sum() for seen in (x, mark(x))])
            for network in (model, made.model)
        )
        told = (fixed.model(x).argmax(1) == 2) & (y == 1)
    assert torch.equal(made.right[:2, 0], before)
    assert (made.right[:2, 1] - after).abs().max() <= 3
    assert not torch.equal(before, after)
    assert abs(int(fixed.hits[0, 1]) - int(told.sum())) <= 3


def test_an_audit_of_features_of_another_type_than_the_head():
    plain, made_of, judged = confused()
    weight = plain.get_parameter("2.weight").data
    models = {"plain": plain, "rounded": UnderAutocast([*means(weight)])}
    audit = audit_forgetting(models, 0, made_of, judged, **QUIET)
    for name in ("forget_accuracy", "retain_accuracy", "other_classes_probe"):
        one, other = getattr(audit, name).tolist()
        assert other == pytest.approx(one, abs=0.03)


def test_a_class_that_the_whole_model_still_names_is_told():
    """By a prior behind the head, or by a head that is a convolution."""
    model, _, ((x, y),) = confused()
    prior = After(model, lambda scores: scores + torch.tensor([50.0, 0, 0]))
    with pytest.warns(UserWarning, match="Class 0 is still named on 100% .* erase='probe'"):
        forgotten = forget_class(prior, [(x, y)], 0, **QUIET)
    assert bool((forgotten(x).argmax(1) == 0).all())
    with pytest.warns(UserWarning, match="Class 0 is still named .* layers="):
        forget_class(prior, [(x, y)], 0, erase="probe", **QUIET)
    convolution = nn.Conv2d(6, 3, 1)
    convolution.weight.data = model.get_parameter("2.weight").data[:, :, None, None]
    convolution.get_parameter("bias").data = torch.tensor([50.0, 0, 0])
    maps = nn.Sequential(nn.Identity(), convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.warns(UserWarning, match="Class 0 is still named on 100%"):
        forget_class(maps, [(x, y)], 0, **QUIET)


def test_a_copy_is_audited_by_the_name_of_its_head():
    model, _, judged = confused()
    networks = {"before": model, "after": forget_class(model, judged, 1, **QUIET)}
    named = audit_forgetting(networks, 1, judged, judged, head="2", **QUIET)
    found = audit_forgetting(networks, 1, judged, judged, **QUIET)
    assert torch.equal(named.linear_probe, found.linear_probe)
    with pytest.raises(ValueError, match="models is a list; expected models by name"):
        audit_forgetting([model], 1, judged, judged, **QUIET)  # type: ignore[arg-type]


def test_a_mark_may_write_into_what_it_is_given():
    def stamp(x: Tensor) -> Tensor:
        x[:, 2] += 1
        return x

    model, ((x, y),), _ = confused()
    before = x.clone()
    found = find_shortcuts(model, [(x, y)], stamp, **QUIET)
    assert torch.equal(x, before)
    assert found.filter_change.tolist() == pytest.approx([0, 0, 1, 0, 0, 0], abs=1e-6)


def test_a_mark_may_give_arrays_or_double_precision():
    model, made_of, _ = confused()
    expected = find_shortcuts(model, made_of, mark, **QUIET)
    forms: list[Any] = [Tensor.double, Tensor.numpy, Tensor.half]
    for form in forms:
        given = lambda x, form=form: form(mark(x))  # noqa: E731
        found = find_shortcuts(model, made_of, given, **QUIET)
        torch.testing.assert_close(
            found.filter_change, expected.filter_change, rtol=1e-2, atol=1e-3
        )
    with pytest.raises(ValueError, match=r"float32 without it and torch\.uint8 with it in batch 0"):
        find_shortcuts(model, made_of, lambda x: mark(x).byte(), **QUIET)


def test_only_directions_that_there_are():
    torch.manual_seed(0)
    weight = torch.zeros(4, 200)
    weight[range(4), range(4)] = 5
    weight[0, 150] = 6
    model = nn.Sequential(nn.Identity(), nn.Linear(200, 4)).eval()
    model.get_parameter("1.weight").data = weight
    x, y = torch.rand(400, 200), torch.arange(400) % 4
    x[torch.arange(400), y] += 0.6

    def one(images: Tensor) -> Tensor:
        images[:, 150] += 1
        return images

    found = find_shortcuts(model, [(x[:200], y[:200])], one, **QUIET)
    judged = [(x[200:], y[200:])]
    fixed = repair(model, found, judged, one, **QUIET)
    assert fixed.directions is not None
    assert fixed.directions.abs().argmax(0).tolist() == [150]
    with pytest.raises(ValueError, match=r"size=2 is out of range; choose 1 to 1 direction\."):
        repair(model, found, judged, one, size=2, **QUIET)
    same = find_shortcuts(model, [(x[:200], y[:200])], lambda images: images, **QUIET)
    with pytest.raises(ValueError, match="the same features as those without it"):
        repair(model, same, judged, one, outputs=[0], **QUIET)


def test_several_outputs_are_rebalanced_together():
    model, ((x, y),), judged = confused()
    found = find_shortcuts(model, [(x, y)], mark, **QUIET)
    options: Any = {"outputs": [0, 1], "size": 1, "rebalance": True, **QUIET}
    fixed = repair(model, found, judged, mark, **options)
    predicted = fixed.model(x).argmax(1).bincount(minlength=3)
    assert torch.equal(predicted, y.bincount(minlength=3))


def test_weights_take_the_whole_rise_back():
    """Of two classes, too, where what one loses is half of what parts them."""
    torch.manual_seed(0)
    head = nn.Linear(40, 2)
    head.weight.data = torch.stack([torch.zeros(40), torch.ones(40)])
    head.bias.data = torch.tensor([20.0, 0.0])
    model = nn.Sequential(nn.Identity(), head).eval()
    x = torch.rand(400, 40) + 0.1 * torch.randn(400, 1)
    y = model(x).argmax(1)

    def more(images: Tensor) -> Tensor:
        return images + 0.3

    found = find_shortcuts(model, [(x[:200], y[:200])], more, **QUIET)
    fixed = repair(model, found, [(x[200:], y[200:])], more, edit="weights", **QUIET)
    rise = (fixed.model(more(x)) - fixed.model(x)).detach()
    assert fixed.size == 40
    assert float((rise[:, 1] - rise[:, 0]).abs().mean()) < 1e-4


def test_switched_off_gradients_and_random_numbers_are_left_alone():
    model, made_of, judged = confused()
    state = torch.get_rng_state()
    with torch.inference_mode():
        found = find_shortcuts(model, made_of, mark, **QUIET)
        repair(model, found, judged, mark, outputs=[0], **QUIET)
        repair_confusion(model, made_of, judged, 1, 2, **QUIET)
    forget_class(model, made_of, 0, **QUIET)
    deep = nn.Sequential(
        nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.ReLU()
    ).append(means(torch.ones(3, 8).tril()))
    state = torch.get_rng_state()
    for low_rank in (True, False):
        build_specialist(deep.eval(), [1, 2], made_of, low_rank=low_rank, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_that_moves_by_being_read_is_read_at_rest():
    torch.manual_seed(0)
    model = means(torch.randn(3, 12))
    spectral_norm(model[2])
    x, y = torch.rand(960, 12, 2, 2), torch.arange(960) % 3
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_shortcuts(model, [(x[:480], y[:480])], mark, **QUIET)
    repair(model, found, [(x[480:], y[480:])], mark, outputs=[0], repetitions=2, **QUIET)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_copies_train_what_the_model_trained():
    model, made_of, _ = confused()
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in forget_class(model, made_of, 0, **QUIET).parameters())
    deep = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), *means(torch.randn(3, 8))).eval()
    deep.requires_grad_(False)
    built = build_specialist(deep, [1, 2], made_of, budget=0.9, epochs=1, repetitions=0, **QUIET)
    assert not any(p.requires_grad for p in built.model.parameters())


def test_a_layer_that_repeats_itself_not_is_told():
    model, made_of, _ = confused()
    noisy = nn.Sequential(After(nn.Identity(), nn.functional.dropout), *model)
    with pytest.warns(UserWarning, match="different scores for the same images"):
        find_shortcuts(noisy.eval(), made_of, mark, **QUIET)


def test_what_is_given_wrongly_is_named():
    model, made_of, judged = confused()
    with pytest.raises(ValueError, match="repetitions=-1 must not be negative"):
        repair_confusion(model, made_of, judged, 1, 2, repetitions=-1, **QUIET)
    with pytest.raises(ValueError, match="classes='01' is one name"):
        build_specialist(model, "01", made_of, **QUIET)
    with pytest.raises(ValueError, match="take off what follows it, a Softmax"):
        build_specialist(nn.Sequential(model, nn.Softmax(1)), [1, 2], made_of, **QUIET)
    small = [(x[..., :1, :1], y) for x, y in made_of]
    with pytest.raises(ValueError, match=r"images of shape \(6, 1, 1\), those before of \(6, "):
        build_specialist(model, [1, 2], [*made_of, *small], **QUIET)
    pairs = [((x, x), y) for x, y in made_of]
    both = nn.Bilinear(2, 2, 3)
    with pytest.raises(ValueError, match="2 inputs; a specialist is built for a model of one"):
        build_specialist(both, [1, 2], pairs, **QUIET)
    deep = nn.Sequential(nn.Sequential(nn.Identity(), nn.Identity()), *model)
    with pytest.raises(ValueError, match=r"'0\.1' is part of '0'; name it first"):
        forget_class(deep, made_of, 0, layers=["0", "0.1"], **QUIET)
    twelve = means(torch.randn(12, 6))
    x = torch.rand(240, 6, 2, 2)
    found = find_shortcuts(twelve, [(x[:120], torch.arange(120) % 12)], mark, **QUIET)
    fixed = repair(
        twelve, found, [(x[120:], torch.arange(120) % 12)], mark, outputs="10", size=1, **QUIET
    )
    assert fixed.outputs == ("10",)


def test_a_specialist_judged_on_what_it_was_built_with_is_told():
    _, made_of, judged = confused()
    deep = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), *means(torch.randn(3, 8))).eval()
    (x, y), (other, labels) = made_of[0], judged[0]
    mixed = [(torch.cat([x[:9], other]), torch.cat([y[:9], labels]))]
    own = int(torch.isin(y[:9], torch.tensor([1, 2])).sum())
    assert own > 0
    options: Any = {"budget": 0.9, "repetitions": 0, **QUIET}
    with pytest.warns(UserWarning, match=f"{own} of the .* images of report_dataloader are among"):
        build_specialist(deep, [1, 2], made_of, mixed, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*report_dataloader are among")
        build_specialist(deep, [1, 2], made_of, judged, **options)
