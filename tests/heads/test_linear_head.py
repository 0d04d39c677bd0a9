"""Heads are seen to compute their weight: everything holds then, and is refused otherwise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_classfilters import (
    ClassFilters,
    accuracy_curve,
    decompose,
    refit_head,
    select_by_accuracy,
)
from captum_classfilters._core.layers import find_layer
from captum_classfilters.heads import (
    compare_heads,
    decomposed_head,
    find_head,
    model_essentiality,
    remove_class,
    replace_head,
)
from captum_classfilters.heads.linear_head import linear_head
from captum_classfilters.metrics import evaluate_classifier
from tests.heads.common import (
    HOLDING,
    NOT_PLAIN,
    QUIET,
    Net,
    Quantized,
    TwoHeads,
    WeightAlone,
    data_for,
    table_for,
    with_hook,
)
from tests.models import hooks_of, images


def scores_of(model, x):
    output = model(x)
    return getattr(output, "logits", output)


def with_masked_head(model, name, mask, x):
    """The model's scores with its head's weight masked, by a plain hook."""
    head = find_layer(model, name)

    def hook(_module, inputs, _output):
        weight, bias = head.weight, head.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor | None)
        weight = weight.detach()
        if weight.dim() > 2:
            return F.conv2d(inputs[0], weight * mask[:, :, None, None], bias)
        return F.linear(inputs[0], weight * mask, bias)

    handle = head.register_forward_hook(hook)
    try:
        return scores_of(getattr(model, "_orig_mod", model), x)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("look", [False, True])
@torch.no_grad()
def test_decomposing_respects_what_follows_the_head(name, look):
    model = HOLDING[name]().eval()
    data, table = data_for(model, name), table_for(name)
    x = data[0][0]
    feeds = name not in ("a head used twice",)  # its last use is that of other images
    examples = x if look and feeds else None
    decomposed = decompose(model, table, example_inputs=examples)
    head = table.provenance["feeds_head"]["name"]
    mask = table.selected.any(0, keepdim=True) if name.startswith("one") else table.selected
    expected = with_masked_head(model, head, mask, x)
    assert not torch.allclose(expected, scores_of(model, x), atol=1e-2)
    torch.testing.assert_close(scores_of(decomposed, x), expected)
    assert hooks_of(decomposed) == 0


@pytest.mark.parametrize("name", HOLDING)
def test_curves_equal_the_decomposed_models(name, caplog):
    model = HOLDING[name]().eval()
    data, table = data_for(model, name), table_for(name)
    before = copy.deepcopy(model.state_dict())
    curve = accuracy_curve(model, {"table": table}, data, num_filters=(1, 3, 6), **QUIET)
    assert curve.full_accuracy == evaluate_classifier(model, data, **QUIET).accuracy
    for place, number in enumerate(curve.num_filters):
        scores = evaluate_classifier(decompose(model, table.select(number)), data, **QUIET)
        assert curve.accuracy["table"][place] == scores.accuracy
        assert torch.equal(curve.recall["table"][place], scores.recall)
    runs_each = "runs once for each of" in caplog.text
    follows = "temperature clip softmax cooled probability twice convolution"
    assert runs_each == any(word in name for word in follows.split())
    assert len(curve.random_mean) == 3
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_what_follows_the_head_runs_by_itself(caplog):
    """The convolution does not run for each of 60 heads."""
    runs: list[int] = []

    class Counted(nn.Conv2d):
        def forward(self, x):
            runs.append(1)
            return super().forward(x)

    model = Net(after=torch.relu)
    model.conv = Counted(2, 6, 3)
    data = data_for(model)
    curve = accuracy_curve(
        model, table_for(), data, num_filters=range(1, 7), repetitions=9, **QUIET
    )
    assert "what follows it runs once for each of 60 heads" in caplog.text
    assert len(runs) < 20 * len(data)
    for number, accuracy in zip(curve.num_filters, curve.accuracy["class filters"], strict=True):
        small = decompose(model, table_for(number=number))
        assert evaluate_classifier(small, data, **QUIET).accuracy == accuracy


@pytest.mark.parametrize("always", [True, False])  # a new tensor, or the head's own where it can be
def test_a_clip_that_only_a_decomposed_head_reaches(always):
    class Clipped(nn.Module):
        limit = 2.0

        def __init__(self):
            super().__init__()
            self.relu, self.fc = nn.ReLU(), nn.Linear(2, 2, bias=False)
            self.fc.weight = nn.Parameter(torch.tensor([[2.0, -2.0], [3.0, -1.2]]))

        def forward(self, x):
            scores = self.fc(self.relu(x))
            reached = always or bool(scores.max() > self.limit)
            return scores.clamp(max=self.limit) if reached else scores

    # All of it: (0, 1.8), class 1. The first filter alone: (2, 3), which the clip makes a draw.
    model, data = Clipped(), [(torch.ones(4, 2), torch.ones(4).long())]
    table = ClassFilters(
        model.fc.weight.detach(),
        torch.ones(2),
        layer="relu",
        provenance={"feeds_head": {"name": "fc", "by": "identical"}},
    )
    curve = accuracy_curve(model, {"table": table}, data, num_filters=(1, 2), **QUIET)
    assert (curve.full_accuracy, curve.accuracy["table"]) == (1.0, [0.0, 1.0])
    smaller = decompose(model, table.select(1))
    assert evaluate_classifier(smaller, data, **QUIET).accuracy == 0.0
    model.limit = 4.0
    curve = accuracy_curve(model, {"table": table}, data, num_filters=(1, 2), **QUIET)
    assert curve.accuracy["table"] == [1.0, 1.0]


def test_what_holds_for_one_batch_and_not_for_another(caplog):
    """The head's own tensor is returned, or a changed copy, depending on the batch."""

    class Moody(Net):
        def forward(self, x):
            scores = super().forward(x)
            return scores.clamp(max=0.1) if len(x) < 5 else scores

    model = Moody()
    data, table = data_for(model), table_for()
    curve = accuracy_curve(model, table, data, num_filters=(2, 6), **QUIET)
    expected = [
        evaluate_classifier(decompose(model, table.select(k)), data, **QUIET).accuracy
        for k in (2, 6)
    ]
    assert curve.accuracy["class filters"] == expected
    assert caplog.text.count("runs once for each of") == 1


def test_a_head_that_is_plain_for_small_numbers_only(caplog):
    class Saturating(nn.Linear):
        def forward(self, x):
            return super().forward(x.clamp(max=4.0))

    model = Net(Saturating(6, 3))
    decompose(model, table_for())  # on random numbers it is plain
    data = [(20 * x, y) for x, y in data_for(model)]
    curve = accuracy_curve(model, table_for(), data, num_filters=(2, 6), **QUIET)
    expected = [
        evaluate_classifier(decompose(model, table_for(number=k)), data, **QUIET).accuracy
        for k in (2, 6)
    ]
    assert curve.accuracy["class filters"] == expected
    assert "runs once for each of" in caplog.text
    assert curve.full_accuracy == evaluate_classifier(model, data, **QUIET).accuracy
    with pytest.raises(ValueError, match="changes the output of its head"):
        refit_head(model, data, **QUIET)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_heads_that_compute_something_else_are_refused(name):
    model = NOT_PLAIN[name]()
    data, table, x = data_for(model), table_for(), images()
    before = copy.deepcopy(model.state_dict())
    calls = {
        "decompose": lambda: decompose(model, table),
        "with examples": lambda: decompose(model, table, example_inputs=x),
        "decomposed_head": lambda: decomposed_head(model, table),
        "named": lambda: decompose(model, table, head="fc"),
        "accuracy_curve": lambda: accuracy_curve(model, table, data, **QUIET),
        "select_by_accuracy": lambda: select_by_accuracy(model, table, data, **QUIET),
        "refit_head": lambda: refit_head(model, data, head="fc", **QUIET),
        "model_essentiality": lambda: model_essentiality(model, table, data, **QUIET),
        "remove_class": lambda: remove_class(model.fc, 0),
    }
    for entry, call in calls.items():
        where = "'head'" if entry == "remove_class" else "'fc'"
        with pytest.raises(ValueError, match=f"The head {where} .*is not a plain linear layer"):
            call()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_advice_for_such_a_head_works():
    model = NOT_PLAIN["low rank"]().eval()
    head, x = model.fc, images()
    plain = nn.Linear(6, 3)
    with torch.no_grad():
        plain.weight.copy_(head.weight + head.up.weight @ head.down.weight)
        plain.bias.copy_(head.bias)
        merged = replace_head(model, "fc", plain)
        assert torch.allclose(merged(x), model(x), atol=1e-5)
        every = decompose(merged, table_for(number=6))
        assert torch.allclose(every(x), model(x), atol=1e-5)


def test_a_head_that_observes_sees_nothing():
    model = Net(Quantized(6, 3))
    nn.init.zeros_(model.fc.weight)  # rounding changes nothing: plain as far as it can be seen
    decompose(model, table_for())
    assert float(model.get_buffer("fc.largest")) == 0


def test_random_numbers_and_modes_stay_as_they_were():
    model = NOT_PLAIN["cosine"]().train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="plain"):
        decompose(model, table_for())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.fc.training


class OneOfTwoHeads(TwoHeads):
    forward = Net.forward


class TestTwoHeads:
    def test_are_refused_where_they_are_seen(self):
        model, data = TwoHeads(), data_for(Net())
        table = table_for()
        with pytest.raises(ValueError, match=r"'fc' and 'second' have the same shape, \(3, 6\)"):
            decompose(model, table)
        for call in (
            lambda: decompose(model, table, example_inputs=images()),
            lambda: decompose(model, table, head="second", example_inputs=images()),
            lambda: accuracy_curve(model, table, data, **QUIET),
            lambda: model_essentiality(model, table, data, **QUIET),
        ):
            with pytest.raises(ValueError, match="do not follow from its head"):
                call()
        with pytest.raises(ValueError, match="changes the output of its head"):
            refit_head(model, data, head="fc", **QUIET)

    def test_the_advice_works(self):
        model, x = TwoHeads(), images()
        alone = decompose(model, table_for(), head="fc")
        expected = with_masked_head(model, "fc", table_for().selected, x)
        assert torch.allclose(alone(x), expected, atol=1e-6)
        decompose(OneOfTwoHeads(), table_for(), example_inputs=x)

    def test_a_single_example_shows_it(self):
        with pytest.raises(ValueError, match="do not follow"):
            decompose(TwoHeads(), table_for(), example_inputs=images(1))
        decompose(Net(), table_for(), example_inputs=images(1))


def test_a_head_that_is_never_called_is_not_replaced():
    model, data = WeightAlone(), data_for(Net())
    with pytest.raises(ValueError, match="never reached"):
        decompose(model, table_for(), example_inputs=images())
    for call in (
        lambda: accuracy_curve(model, table_for(), data, **QUIET),
        lambda: refit_head(model, data, **QUIET),
    ):
        with pytest.raises(ValueError, match="'fc' was never reached"):
            call()


def test_a_head_with_a_second_reference_is_not_replaced():
    model = Net()
    head = model.fc
    model.after = lambda scores: (
        scores * 0 + head(torch.ones(1, 6)) * 0 + vars(model)["kept"](scores)
    )
    vars(model)["kept"] = lambda scores: scores
    vars(model)["forward"] = lambda x: head(model.features(x))  # the copy calls the old one
    with pytest.raises(ValueError, match="cannot be replaced"):
        decompose(model, table_for(), example_inputs=images())


class TestFindHead:
    def test_the_one_that_runs_last(self):
        torch.manual_seed(0)

        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.head, self.inner = nn.Linear(5, 3), nn.Linear(2, 5)

            def forward(self, x):
                return self.head(self.inner(x).relu())

        model = Backwards()
        assert find_head(model)[0] == "inner"
        assert find_head(model, torch.rand(2, 2)) == ("head", model.head)

    def test_a_decomposed_head_is_one(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Net().fc)
        smaller = replace_head(model, "2", decompose(Net(), table_for()).get_submodule("fc"))
        assert find_head(smaller, torch.rand(2, 4))[0] == "2"
        comparison = compare_heads(model, smaller, torch.rand(2, 4), repetitions=1)
        assert comparison.after.head_multiply_adds == 6

    def test_names_are_those_of_the_plain_model(self):
        for name in ("data parallel", "compiled", "scores picked from a tuple"):
            assert find_head(HOLDING[name]())[0] == "fc"

    def test_a_function_is_refused(self):
        model = Net()
        with pytest.raises(ValueError, match=r"is a function; .*pass the module"):
            find_head(lambda x: model(x))  # type: ignore[arg-type]


class TestReplaceHead:
    def test_of_a_compiled_model_the_module_inside(self):
        copied = replace_head(HOLDING["compiled"](), "fc", nn.Identity())
        assert isinstance(copied, Net)
        assert copied(images()).shape == (8, 6)

    def test_of_a_wrapped_model_the_wrapper_stays(self):
        wrapped = HOLDING["data parallel"]()
        copied = replace_head(wrapped, "fc", nn.Identity())
        assert isinstance(copied, nn.DataParallel)
        assert isinstance(copied.module.fc, nn.Identity)
        assert isinstance(wrapped.module.fc, nn.Linear)

    def test_weights_that_hooks_made(self):
        model = Net()
        torch.nn.utils.weight_norm(model.conv)
        model(images()).sum().backward()  # its weight is the result of a computation
        copied = replace_head(model, "fc", nn.Identity())
        assert torch.allclose(copied(images()), model.features(images()), atol=1e-6)


def test_weights_are_those_that_the_next_forward_pass_has():
    model = Net()
    torch.nn.utils.weight_norm(model.fc)
    with torch.no_grad():
        model.get_parameter("fc.weight_g").mul_(3)  # and `weight` is still what it was
        decomposed = decompose(model, table_for(number=6))
        assert torch.allclose(decomposed(images()), model(images()), atol=1e-5)


def test_hooks_of_the_model_go_with_the_copy():
    model = with_hook(lambda *_: None)
    model.conv.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    decomposed = decompose(model, table_for(number=6))
    assert torch.allclose(decomposed(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [[], [4], [1, 5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear, (5, 3)), (nn.Linear, (5, 2, 3)), (nn.Conv2d, (5, 3, 4, 2))],
)
def test_rows_that_are_zero_put_out_the_bias(layer, shape, kept, bias):
    options = {"kernel_size": 1} if layer is nn.Conv2d else {}
    head = linear_head(layer(3, 6, bias=bias, **options))
    weight = torch.zeros_like(head.weight)
    weight[kept] = head.weight[kept]
    features = torch.rand(shape)
    outputs = head.outputs_of_few(features, weight)
    assert outputs.shape == head.outputs(features, weight).shape
    assert torch.allclose(outputs, head.outputs(features, weight), atol=1e-6)
