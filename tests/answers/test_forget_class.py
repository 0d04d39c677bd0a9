"""Forgetting by hand, and an audit of what can be told in closed form."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from captum_classfilters.answers import audit_forgetting, forget_class
from tests.models import QUIET, deep, layer_at

# Mean features: (4, 0, 0, 3), (0, 2, 0, 0), (0, 0, 1, 0). Of class 0, none of the others has any.
FEATURES = torch.tensor(
    [[5.0, 0, 0, 3], [3, 0, 0, 3], [0, 1, 0, 0], [0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def end(weight=None, bias=None):
    """Features that pass by, and a head."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3)).eval()
    torch.manual_seed(0)
    head = layer_at(model, "1", nn.Linear)
    head.weight.data = torch.randn(3, 4) if weight is None else weight
    head.bias.data = torch.randn(3) if bias is None else bias
    return model


def forgetting(model=None, class_index=0, features=FEATURES, labels=LABELS, **options):
    return forget_class(model or end(), [(features, labels)], class_index, **QUIET, **options)


def test_the_prototypes_own_direction_goes():
    model = end()
    head = layer_at(model, "1", nn.Linear)
    forgotten = forgetting(model)
    u = torch.tensor([0.8, 0, 0, 0.6])
    eraser = layer_at(forgotten, "1.forget", nn.Linear)
    assert torch.allclose(eraser.weight, torch.eye(4) - torch.outer(u, u), atol=1e-6)
    assert torch.allclose(eraser.bias, torch.zeros(4), atol=1e-6)
    x = torch.tensor([[1.0, 2, 3, 4]])
    expected = head(x - (0.8 + 2.4) * u)
    assert torch.allclose(forgotten(x), expected, atol=1e-5)


def test_only_what_the_others_do_not_span_goes():
    """Where the other classes have filter 0, too, what is left of class 0 is filter 3."""
    features = FEATURES.clone()
    features[2:4, 0] = 2
    features[2:4, 1] = 0
    eraser = layer_at(forgetting(features=features), "1.forget", nn.Linear)
    assert torch.allclose(eraser.weight, torch.diag(torch.tensor([1.0, 1, 1, 0])), atol=1e-6)


def test_means_of_other_classes_stay():
    torch.manual_seed(0)
    features = FEATURES + torch.rand(6, 4)
    eraser = layer_at(forgetting(features=features), "1.forget", nn.Linear)
    for label in (1, 2):
        mean = features[label == LABELS].mean(0)
        assert torch.allclose(eraser(mean), mean, atol=1e-5)


def test_what_a_probe_reads_goes():
    """The class's mean goes to the others', and the direction of the largest ratio is constant."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 4) @ torch.randn(4, 4) + 3 * torch.eye(4)[labels]
    forgotten = forgetting(features=features, labels=labels, class_index=1, erase="probe")
    changed = layer_at(forgotten, "1.forget", nn.Linear)(features).detach().double()
    others = features[labels != 1].double()
    center, own = others.mean(0), features[labels == 1].double().mean(0)
    assert torch.allclose(changed[labels == 1].mean(0), center, atol=1e-4)
    covariance = (others - center).T @ (others - center) / len(others)
    read = torch.linalg.solve(
        covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(4), own - center
    )
    along = (changed - center) @ read
    assert float(along.abs().max()) < 1e-3 * float(((features - center) @ read).abs().max())


def test_the_model_stays_and_shares_nothing():
    model = end().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forgotten = forgetting(model)
    assert forgotten.training
    with torch.no_grad():
        for parameter in forgotten.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_further_down():
    torch.manual_seed(0)
    x, y = torch.randn(30, 2, 6, 6), torch.arange(30) % 3
    x[:, 0] += y[:, None, None]
    model = deep()
    forgotten = forget_class(model, [(x, y)], 2, layers="stage1", **QUIET)
    eraser = layer_at(forgotten, "stage1.forget", nn.Conv2d)
    assert eraser.kernel_size == (1, 1)
    with torch.no_grad():
        own = model.get_submodule("stage1")(x)
        means = own.mean((2, 3))
        changed = forgotten.get_submodule("stage1")(x)
    prototypes = torch.stack([means[y == c].mean(0) for c in range(3)]).double()
    basis, _ = torch.linalg.qr(prototypes[:2].T)
    rest = prototypes[2] - basis @ (basis.T @ prototypes[2])
    u = (rest / rest.norm()).float()
    expected = own - torch.einsum("nkhw,k,j->njhw", own, u, u)
    assert torch.allclose(changed, expected, atol=1e-4)
    assert layer_at(forgotten, "head.forget", nn.Linear).in_features == 6


class Wrapping(nn.Module):
    """A layer that puts its tensor into something, scaled by what it is told by name."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.inner, self.wrap = nn.Conv2d(2, 5, 1), wrap

    def forward(self, x, *, scale=1):
        return self.wrap(self.inner(x) * scale)


class Unwrapping(nn.Module):
    """Takes the tensor out of what its first layer puts out."""

    def __init__(self, wrap, unwrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.unwrap = Wrapping(wrap), nn.Linear(5, 3), unwrap

    def forward(self, x):
        assert self.first.inner.weight.dtype == x.dtype
        return self.head(self.unwrap(self.first(x, scale=2)).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda h: (h, None), lambda output: output[0]),
        (lambda h: {"kept": True, "h": h}, lambda output: output["h"]),
        (lambda h: [torch.ones(3, dtype=torch.int64), h], lambda output: output[1]),
    ],
)
def test_layers_that_put_out_more_than_a_tensor(wrap, unwrap):
    x, y = torch.randn(30, 2, 6, 7), torch.arange(30) % 3
    x[:, 0] += y[:, None, None]
    plain = Unwrapping(lambda h: h, lambda h: h).eval()
    wrapped = Unwrapping(wrap, unwrap).eval()
    options = {"erase": "probe", "layers": "first", **QUIET}
    expected, found = (forget_class(model, [(x, y)], 1, **options) for model in (plain, wrapped))
    eraser = layer_at(found, "first.forget", nn.Conv2d)
    with torch.no_grad():
        assert torch.allclose(found(x), expected(x), atol=1e-6)
        made = unwrap(found.get_submodule("first")(x, scale=2))
        assert torch.allclose(made, eraser(2 * plain.first.inner(x)), atol=1e-5)


COMPILERS = {
    "fx": lambda model, _x: torch.fx.symbolic_trace(model),
    "script": lambda model, _x: torch.jit.script(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore")  # TorchScript is old
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("layer", ["0", "0.0", "0.1", "1", "3"])
def test_copies_are_compiled_as_the_model_is(layer, compiler):
    """What puts out a tensor by itself is followed by a layer, whatever it is."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5))
    pool = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(block, nn.ReLU(), pool, nn.Flatten(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(30, 2, 6, 7), torch.arange(30) % 3
    x[:, 0] += y[:, None, None]
    copy = forget_class(model, [(x, y)], 1, layers=layer, erase="probe", **QUIET).eval()
    with torch.no_grad():
        assert torch.allclose(COMPILERS[compiler](copy, x)(x), copy(x), atol=1e-6)
        assert not torch.allclose(model(x), copy(x), atol=1e-3)


class ByName(nn.Module):
    """Gives its first layer the only input by its name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = Wrapping(lambda h: h), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.first(x=x).relu().mean((2, 3)))


def test_a_layer_given_its_input_by_name():
    model, x, y = ByName().eval(), torch.randn(30, 2, 6, 7), torch.arange(30) % 3
    copy = forget_class(model, [(x, y)], 1, layers="first", erase="probe", **QUIET)
    eraser = layer_at(copy, "first.forget", nn.Conv2d)
    with torch.no_grad():
        made = copy.get_submodule("first")(x=x)
        assert torch.allclose(made, eraser(model.first.inner(x)), atol=1e-6)


def test_bad_inputs():
    with pytest.raises(ValueError, match="erase='all'; choose"):
        forgetting(erase="all")
    with pytest.raises(ValueError, match="Class 3 is out of range; there are 3 classes"):
        forgetting(class_index=3)
    with pytest.raises(ValueError, match="No image of class 2"):
        forgetting(features=FEATURES[:4], labels=LABELS[:4])
    same = FEATURES.clone()
    same[:2] = same[2:4]
    with pytest.raises(ValueError, match="no direction is its own"):
        forgetting(features=same)


def test_an_audit_by_hand():
    """Features are the classes' own; the head tells class 0 from none, and the others right."""
    weight = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    names_none = end(weight, torch.tensor([-9.0, 0, 0.1]))
    weight_all = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1)
    names_all = end(weight_all, torch.zeros(3))
    data = [(FEATURES, LABELS)]
    audit = audit_forgetting({"all": names_all, "none": names_none}, 0, data, data, **QUIET)
    assert audit.models == ("all", "none")
    assert audit.forget_accuracy.tolist() == [1.0, 0.0]
    assert audit.retain_accuracy.tolist() == [1.0, 1.0]
    assert audit.linear_probe.tolist() == [1.0, 1.0]  # the features tell it all the same
    assert audit.to_pandas().shape == (2, 6)


def test_an_audit_finds_nothing_where_there_is_nothing():
    torch.manual_seed(0)
    labels = torch.arange(600) % 3
    features = torch.randn(600, 4)
    features[labels == 1, 1] += 20
    data, test = [(features[:300], labels[:300])], [(features[300:], labels[300:])]
    audit = audit_forgetting({"model": end()}, 0, data, test, **QUIET)
    # Class 2 looks like class 0, class 1 does not: three quarters at most, by chance of halves.
    assert 0.6 < float(audit.linear_probe) < 0.85
    assert 0.6 < float(audit.neighbor_probe) < 0.85
    assert 0.4 < float(audit.other_classes_probe) < 0.85


def test_audits_that_make_no_sense():
    data = [(FEATURES, LABELS)]
    with pytest.raises(ValueError, match="models is empty; expected models by name"):
        audit_forgetting({}, 0, data, data, **QUIET)
    with pytest.raises(ValueError, match="Class 5 is out of range; there are 3 classes"):
        audit_forgetting({"a": end()}, 5, data, data, **QUIET)
    single = nn.Sequential(nn.Identity(), nn.Linear(4, 1)).eval()
    with pytest.raises(ValueError, match="The head of 'a' has one output"):
        audit_forgetting({"a": single}, 0, [(FEATURES, LABELS % 2)], data, **QUIET)
    with pytest.raises(ValueError, match="dataloader needs images of class 0 and of others"):
        audit_forgetting({"a": end()}, 0, data, [(FEATURES[2:], LABELS[2:])], **QUIET)
    with pytest.raises(ValueError, match="train_loader needs images of class 0"):
        audit_forgetting({"a": end()}, 0, [(FEATURES[:2], LABELS[:2])], data, **QUIET)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_takes_a_class_out_has_the_models_type(dtype):
    model = end().to(dtype)
    features = FEATURES.to(dtype)
    forgotten = forgetting(model, features=features)
    own = forgetting(end())
    assert forgotten(features).dtype == dtype
    assert torch.allclose(forgotten(features).float(), own(FEATURES), rtol=0.03, atol=0.03)


def test_a_class_that_is_still_named_is_reported():
    """Two classes' means span all but a twentieth of class 0's, and its images vary more than that."""
    features = torch.cat([FEATURES + 0.0] * 4)
    features[:, 3] = 0
    features[LABELS.repeat(4) == 0] = torch.tensor([2.0, 3, 3, 0.05])
    features[::6, 0] += 2
    features[1::6, 0] -= 2
    features[LABELS.repeat(4) == 1, 0] = 1
    model = end(torch.tensor([[0.0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]]), torch.zeros(3))
    with pytest.warns(UserWarning, match=r"Class 0 is still named on 100% .* erase='probe'"):
        forgotten = forgetting(model, features=features, labels=LABELS.repeat(4))
    named = forgotten(features).argmax(1) == 0
    assert bool(named[LABELS.repeat(4) == 0].all())
    better = forgetting(model, features=features, labels=LABELS.repeat(4), erase="probe")
    assert int((better(features).argmax(1) == 0)[LABELS.repeat(4) == 0].sum()) < 8


def test_classes_have_names_and_one_output_two_of_them():
    """Of the one logit, class 0 is what is below zero."""

    class Loader(list):  # with a data set, as data loaders have
        dataset = SimpleNamespace(classes=["cat", "dog", "owl"])

    loader = Loader([(FEATURES, LABELS)])
    assert torch.equal(
        forget_class(end(), loader, "dog", **QUIET)(FEATURES), forgetting(class_index=1)(FEATURES)
    )
    with pytest.raises(ValueError, match="No class named 'fox'"):
        forget_class(end(), loader, "fox", **QUIET)
    single = nn.Sequential(nn.Identity(), nn.Linear(4, 1)).eval()
    first, second = (
        forget_class(single, [(FEATURES, LABELS % 2)], index, **QUIET) for index in (0, 1)
    )
    assert not torch.allclose(first(FEATURES), second(FEATURES))
    with pytest.raises(ValueError, match="Class 2 is out of range; there are 2 classes"):
        forget_class(single, [(FEATURES, LABELS % 2)], 2, **QUIET)


class OneSize(nn.Sequential):
    """Takes batches of six images only."""

    def forward(self, x):
        return super().forward(x.view(6, 4))


@pytest.mark.parametrize("erase", ["prototype", "probe"])
def test_a_model_of_one_batch_size_forgets(erase):
    model = end()
    forgotten = forgetting(OneSize(*model).eval(), erase=erase)
    expected = forgetting(model, erase=erase)
    torch.testing.assert_close(forgotten(FEATURES), expected(FEATURES))
