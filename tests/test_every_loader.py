"""Every public entry that reads a loader, put through the same table of batches, modes and devices."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import captum_classfilters
from captum_classfilters import (
    GreedyFilterPruning,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    refit_head,
    select_by_accuracy,
)
from captum_classfilters.answers import find_shortcuts
from captum_classfilters.gates import masking_test
from captum_classfilters.heads import layer_sweep, model_essentiality
from captum_classfilters.identify import (
    activation_scores,
    collect_evidence,
    collect_features,
    confusion_filters,
    contrast_classes,
    exemplars,
    random_weights_null,
    unit_scores,
)
from captum_classfilters.metrics import (
    class_curves,
    collateral_damage,
    evaluate_classifier,
    remove_and_retrain,
)
from captum_classfilters.pruning import accuracy_after_removal, filter_importance_baselines
from captum_classfilters.spectral import profile_graph, profile_images
from tests.models import QUIET, batches, checkpointed, deep, hooks_of, made_in_inference_mode
from tests.pretend_device import pretend


def table(model):
    """A table of class filters that needs no loader."""
    scores = torch.arange(18.0).reshape(3, 6)[: num_classes(model)] % 7 + 1
    return captum_classfilters.ClassFilters(
        scores, torch.full((len(scores),), 8), layer="stage2", method="Example"
    ).select(num_filters=2)


def num_classes(model):
    return max(2, model.head.out_features)


def share_right(outputs, labels):
    outputs = outputs.reshape(len(labels), -1)
    guess = outputs.argmax(1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
    return (guess == labels).double().mean()


class WithLogits(nn.Sequential):
    def forward(self, images):
        return SimpleNamespace(logits=super().forward(images), hidden_states=None)


class Mapped(nn.Sequential):
    def forward(self, images):
        return {"out": super().forward(images), "aux": None}


class OneLogit(nn.Sequential):
    def forward(self, images):
        return super().forward(images)[:, 0]


def binary(kind):
    """A model of one logit."""
    model = deep()
    model.head = nn.Linear(6, 1)
    with torch.no_grad():
        model.head.weight.copy_(torch.arange(6.0)[None] - 2.5)
        model.head.bias.zero_()
    model.__class__ = kind
    return model.eval()


@dataclass
class Entry:
    """A call, and what it does not do by its nature."""

    call: Callable[..., Any]
    labels: bool = True  # needs labels
    trains: bool = False  # changes the model it is given
    slow: bool = False
    reads_twice: bool = False


ENTRIES = {
    "identify, votes": Entry(
        lambda m, d, **o: LayerFilterFrequency(m, "stage1", top_k=2).identify(d, **o)
    ),
    "identify, contributions at the head": Entry(
        lambda m, d, **o: LayerFilterContribution(m, "stage2").identify(d, num_filters=2, **o)
    ),
    "identify, contributions inside": Entry(
        lambda m, d, **o: LayerFilterContribution(m, "stage1").identify(d, num_filters=2, **o)
    ),
    "identify, ablation": Entry(
        lambda m, d, **o: LayerFilterAblation(m, "stage1").identify(d, num_filters=2, **o)
    ),
    "accuracy reduction": Entry(
        lambda m, d, **o: LayerFilterAblation(m, "stage1").identify(d, metric="accuracy", **o)
    ),
    "metric reduction": Entry(
        lambda m, d, **o: LayerFilterAblation(m, "stage1").identify(d, metric=share_right, **o),
        labels=False,
    ),
    "evidence": Entry(
        lambda m, d, **o: collect_evidence(LayerFilterContribution(m, "stage1"), d, **o)
    ),
    "features": Entry(lambda m, d, **o: collect_features(m, "stage1", d, **o)),
    "unit scores": Entry(lambda m, d, **o: unit_scores(m, ["stage1", "stage2"], d, **o)),
    "activation scores": Entry(lambda m, d, **o: activation_scores(m, "stage1", d, **o)),
    "exemplars": Entry(
        lambda m, d, **o: exemplars(m, "stage1", d, num_exemplars=2, boxes=False, **o),
        labels=False,
    ),
    "contrast": Entry(
        lambda m, d, **o: contrast_classes(
            LayerFilterContribution(m, "stage1"), d, 0, num_classes(m) - 1, **o
        )
    ),
    "shortcuts": Entry(
        lambda m, d, **o: find_shortcuts(m, d, lambda x: x + 1, least=0, permutations=199, **o)
    ),
    "confusion": Entry(
        lambda m, d, **o: confusion_filters(LayerFilterContribution(m, "stage1"), d, **o)
    ),
    "random weights": Entry(
        lambda m, d, **o: random_weights_null(
            LayerFilterContribution(m, "stage2"), d, repetitions=1, num_filters=2, **o
        ),
        reads_twice=True,
    ),
    "accuracy": Entry(evaluate_classifier),
    "accuracy curve": Entry(
        lambda m, d, **o: accuracy_curve(m, table(m), d, num_filters=(2, 4), repetitions=1, **o)
    ),
    "selection by accuracy": Entry(lambda m, d, **o: select_by_accuracy(m, table(m), d, **o)),
    "refitted head": Entry(lambda m, d, **o: refit_head(m, d, max_iterations=5, **o)),
    "essentiality": Entry(lambda m, d, **o: model_essentiality(m, table(m), d, repetitions=1, **o)),
    "layer sweep": Entry(lambda m, d, **o: layer_sweep(m, ["stage1.2", "stage2.2"], d, **o)),
    "greedy pruning": Entry(
        lambda m, d, **o: GreedyFilterPruning(m, "stage1").run(d, num_filters=1, **o)
    ),
    "removal curve": Entry(
        lambda m, d, **o: accuracy_after_removal(m, "stage1", torch.arange(4), d, **o)
    ),
    "baselines": Entry(
        lambda m, d, **o: filter_importance_baselines(m, "stage1.0", d, **o), reads_twice=True
    ),
    "masking": Entry(lambda m, d, **o: masking_test(m, "stage2", table(m), d, **o)),
    "class curves": Entry(
        lambda m, d, **o: class_curves(
            m, "stage2", {"a": table(m)}, d, num_filters=(1, 3), repetitions=1, **o
        )
    ),
    "collateral damage": Entry(
        lambda m, d, **o: collateral_damage(m, "stage2", table(m), d, repetitions=1, **o)
    ),
    "profiles": Entry(lambda m, d, **o: profile_images(m, ["stage1", "stage2"], d, **o)),
    "profile graph": Entry(
        lambda m, d, **o: sorted(
            (str(a), str(b), w)
            for a, b, w in profile_graph(m, ["stage1", "stage2"], d, **o).edges(data="weight")
        ),
        labels=False,
    ),
    "remove and retrain": Entry(
        lambda m, d, **o: remove_and_retrain(
            m, "stage2", {"a": torch.arange(6)}, d, d, num_filters=(2,), epochs=1, seed=0, **o
        ),
        trains=True,
        reads_twice=True,
        slow=True,
    ),
}
VARIANTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "three members": lambda x, y: (x, y, ["name"] * len(x)),
    "a list": lambda x, y: [x, y],
    "inputs as a tuple": lambda x, y: ((x,), y),
    "labels as a list": lambda x, y: (x, y.tolist()),
    "labels as a column": lambda x, y: (x, y[:, None]),
    "a mapping": lambda x, y: {"pixel_values": x, "labels": y},
    "labels in bytes": lambda x, y: (x, y.to(torch.uint8)),
    "made in inference mode": lambda x, y: made_in_inference_mode((x, y)),
}
BAD = {
    "float labels": (lambda x, y: (x, y + 0.5), "float32"),
    "boolean labels": (lambda x, y: (x, y > 0), "bool"),
    "a label out of range": (lambda x, y: (x, y + 2), "label 3|label 4|classes"),
    "too few labels": (lambda x, y: (x, y[:-1]), "shape"),
    "no labels": (lambda x, y: x, "pair"),
}


def numbers(result: Any, depth: int = 0) -> list[Any]:
    """All numbers in a result, in order."""
    if isinstance(result, Tensor):
        return [result.detach().cpu().double()]
    if isinstance(result, (bool, int, float)):
        return [torch.tensor(float(result), dtype=torch.float64)]
    if isinstance(result, nn.Module):
        return numbers(list(result.state_dict().values()), depth)
    if isinstance(result, captum_classfilters.ClassFilters):
        return numbers([result.scores, result.counts, result.selected, result.standard_errors])
    if dataclasses.is_dataclass(result):
        values = [getattr(result, f.name) for f in dataclasses.fields(result)]
        return numbers([v for v in values if not _is_record(v)], depth + 1)
    if isinstance(result, dict):
        return numbers(list(result.values()), depth + 1)
    if isinstance(result, (list, tuple)):
        return [number for part in result for number in numbers(part, depth + 1)]
    if hasattr(result, "toarray"):
        return [torch.as_tensor(result.toarray()).double()]
    if hasattr(result, "__dict__") and depth < 4:
        return numbers({k: v for k, v in vars(result).items() if not _is_record(v)}, depth + 1)
    return []


def _is_record(value: Any) -> bool:
    """Provenance, with the time of the run in it."""
    return hasattr(value, "keys") and "created" in value


def same(left: Any, right: Any, tolerance: float = 1e-5) -> None:
    ours, theirs = numbers(left), numbers(right)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def data(variant: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)) -> list[Any]:
    """Five batches, the last one of a single image."""
    return [variant(x, y) for x, y in batches(21)]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What each entry gives for plain pairs."""
    return {}


def run(name: str, model: nn.Module, loader: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return ENTRIES[name].call(model, loader, **QUIET, **options)


def plain(name: str, expected: dict[str, Any]) -> Any:
    if name not in expected:
        expected[name] = run(name, deep(), data())
    return expected[name]


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ENTRIES)
def test_batches_of_any_form_give_the_same(name, variant, expected):
    same(run(name, deep(), data(VARIANTS[variant])), plain(name, expected))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_empty_first_batch_is_passed_over(name, expected):
    x, y = data()[0]
    same(run(name, deep(), [(x[:0], y[:0]), *data()]), plain(name, expected))


@pytest.mark.parametrize("name", ENTRIES)
def test_unpack_reads_any_batch(name, expected):
    strange = [{"a": x, "b": -x, "c": y} for x, y in data()]
    found = run(name, deep(), strange, unpack=lambda batch: (batch["a"], batch["c"]))
    same(found, plain(name, expected))


@pytest.mark.parametrize("kind", [WithLogits, Mapped])
@pytest.mark.parametrize("name", ENTRIES)
def test_outputs_of_any_form_give_the_same(name, kind, expected):
    if name == "metric reduction":
        pytest.skip("the metric is given what the model returns")
    model = deep()
    model.__class__ = kind
    same(run(name, model, data()), plain(name, expected))


@pytest.mark.parametrize("name", ENTRIES)
def test_checkpointed_layers_give_the_same(name, expected):
    model = checkpointed()
    same(run(name, model, data()), plain(name, expected))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", ENTRIES)
def test_reentrant_checkpoints_give_the_same_or_are_named(name, expected):
    model = checkpointed(reentrant=True)
    found = refusal = None
    try:
        found = run(name, model, data())
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        same(found, plain(name, expected))
    else:
        assert "use_reentrant=False" in refusal
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", ENTRIES)
def test_one_logit_may_be_a_vector_or_a_column(name):
    columns = [(x, (y % 2).float()[:, None]) for x, y in data()]
    if name in ("metric reduction", "exemplars"):  # take any labels, floats as values
        columns = [(x, y % 2) for x, y in data()]
    vectors = [(x, y % 2) for x, y in data()]
    same(run(name, binary(OneLogit), vectors), run(name, binary(nn.Sequential), columns))


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ENTRIES)
def test_bad_batches_are_refused_by_name(name, kind):
    entry, (make, message) = ENTRIES[name], BAD[kind]
    if not entry.labels:
        pytest.skip("needs no labels")
    model = deep().train(entry.trains)
    with pytest.raises(ValueError, match=message):
        run(name, model, [*data(), make(*data()[0])])


@pytest.mark.parametrize("name", ENTRIES)
def test_loaders_without_an_image_are_refused(name):
    loaders: list[Any] = [
        [],
        iter([]),
        [(torch.zeros(0, 2, 6, 6), torch.zeros(0, dtype=torch.int64))],
    ]
    for loader in loaders:
        with pytest.raises(ValueError, match=r"empty|read only once"):
            run(name, deep(), loader)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ENTRIES)
def test_modes_around_the_call_change_nothing(name, mode, expected):
    model = deep()
    with mode():
        found = run(name, model, data())
    same(found, plain(name, expected))


@pytest.mark.parametrize(
    "name", [n for n, e in ENTRIES.items() if not e.trains and n != "refitted head"]
)
def test_a_model_in_training_mode_is_read_in_evaluation_mode(name, expected):
    model = deep().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    same(run(name, model, data()), plain(name, expected))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["data on the CPU", "data there"])
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if not entry.slow])
def test_an_accelerator_gives_the_cpus_numbers(name, where, expected):
    reference = plain(name, expected)
    with pretend("meta") as device:
        loader = data()
        if where == "data there":
            loader = [(x.to(device), y.to(device)) for x, y in loader]
        found = run(name, deep().to(device), loader)
        if isinstance(found, nn.Module):
            found = found.to("cpu")
        same(found, reference, 1e-4)


def test_every_entry_with_a_loader_is_here():
    rooms = ("answers", "attr", "identify", "heads", "gates", "pruning", "spectral", "metrics")
    covered = inspect.getsource(sys.modules[__name__])
    elsewhere = {
        "compare_methods",  # reads a second loader: its own tests
        "repair_confusion",  # reads a second loader: its own tests
        "repair_layers",  # reads a second loader: its own tests
        "build_specialist",  # holds its images in memory: its own tests
        "forget_class",  # of one logit there is no class to forget: its own tests
        "audit_forgetting",  # reads two loaders: its own tests
        "repair",  # judges find_shortcuts on other images: its own tests
        "fine_tune",
        "accuracy_reduction",  # identify(metric="accuracy")
        "metric_reduction",
        "identify_class_filters",
        "standard_methods",  # compare_methods
        "compress_layer",  # evaluates by evaluate_classifier
        "specialize",
        "response_chroma",
        "validate",  # reads its loader many times: its own tests
        "ClassGateCallback",
    }
    for room in rooms:
        package = __import__(f"captum_classfilters.{room}", fromlist=["__all__"])
        for name in package.__all__:
            function = getattr(package, name)
            if inspect.isfunction(function) and name not in elsewhere:
                parameters = inspect.signature(function).parameters
                reads = {"dataloader", "train_loader"} & parameters.keys()
                assert not reads or name in covered, f"{room}.{name} is not put through the table"
