"""Models of every make: the tables are those of the plain model, or the refusal works when followed."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from captum.attr import FeatureAblation, IntegratedGradients, Saliency
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from captum_classfilters import (
    ClassFilters,
    ClassFilterSaliency,
    FilterGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    decompose,
    fine_tune,
    list_filter_layers,
    prune_filters,
)
from captum_classfilters._core.equality import same
from captum_classfilters.answers import ClassFilterOOD, forget_class
from captum_classfilters.attr import filter_activation_maps, filter_gradient_maps
from captum_classfilters.gates import ClassSpecificGate, GatedTrainer, GateSchedule
from captum_classfilters.heads import (
    accuracy_curve,
    compare_heads,
    find_head,
    refit_head,
)
from captum_classfilters.identify import confusion_filters, contrast_classes
from captum_classfilters.metrics import (
    cascading_randomization,
    class_curves,
    collateral_damage,
    filter_curves,
    filter_max_sensitivity,
    remove_and_retrain,
)
from captum_classfilters.pruning import (
    LayerwiseFineTuning,
    compare_networks,
    compress_layer,
    filter_importance_baselines,
    magnitude_prune,
    prunable_layers,
    specialize,
)
from captum_classfilters.pruning.baseline_scores import outgoing_weight_scores
from captum_classfilters.spectral import layer_svd
from captum_classfilters.visualize import FeatureObjective, visualize_features
from tests.models import QUIET, batches, checkpointed, deep, hooks_of

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS: dict[str, Callable[[nn.Module, str], ClassFilters]] = {
    "frequency": lambda model, layer: LayerFilterFrequency(model, layer, top_k=2).identify(
        data_for(model), **QUIET
    ),
    "contribution": lambda model, layer: LayerFilterContribution(model, layer).identify(
        data_for(model), num_filters=2, **QUIET
    ),
    "ablation": lambda model, layer: LayerFilterAblation(model, layer).identify(
        data_for(model), num_filters=2, **QUIET
    ),
}


def data_for(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Batches in the type of a model's parameters."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return [(x.to(dtype), y) for x, y in batches(21)]


class Around(nn.Module):
    """Another module around `deep()`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def part(self, name: str, x: Tensor) -> Tensor:
        result: Tensor = self.net.get_submodule(name)(x)
        return result

    def head(self, x: Tensor) -> Tensor:
        return self.part("head", self.part("flatten", self.part("pool", x)))


class FrozenBackbone(Around):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.part("stage1", x)
        return self.head(self.part("stage2", maps))


class Checkpointed(Around):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("stage1", "stage2"):
            x = checkpoint(self.net.get_submodule(name), x, use_reentrant=False)
        return self.head(x)


class WithoutLength(nn.Sequential):
    def __len__(self) -> int:
        return 0


class WithoutTruth(nn.Sequential):
    def __len__(self) -> int:  # as a compiled model that has none
        raise TypeError("no length")


def compiled() -> nn.Module:
    model = torch.compile(deep(), backend="eager")
    assert isinstance(model, nn.Module)
    return model


def compiled_in_place() -> nn.Module:
    model = deep()
    model.compile(backend="eager")
    return model


def without_length() -> nn.Module:
    model: nn.Sequential = deep()
    model.__class__ = WithoutLength
    return model


def without_truth() -> nn.Module:
    model: nn.Sequential = deep()
    model.__class__ = WithoutTruth
    return model


def lightning_module() -> nn.Module:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = deep()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return Module().eval()


def weight_norm() -> nn.Module:
    model = deep()
    parametrizations.weight_norm(model.get_submodule("stage2.0"))
    return model


def mask_of_ones() -> nn.Module:
    model = deep()
    prune.identity(model.get_submodule("stage2.0"), "weight")
    return model


SAME: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "compiled": (compiled, "", 1e-6),
    "compiled in place": (compiled_in_place, "", 1e-6),
    "data parallel": (lambda: nn.DataParallel(deep()), "", 1e-6),
    "lightning": (lightning_module, "net.", 1e-6),
    "checkpointed": (lambda: Checkpointed().eval(), "net.", 1e-6),
    "weight norm": (weight_norm, "", 1e-6),
    "a mask of ones": (mask_of_ones, "", 1e-6),
    "without length": (without_length, "", 1e-6),
    "without truth": (without_truth, "", 1e-6),
    "float64": (lambda: deep().double(), "", 1e-6),
    "bfloat16": (lambda: deep().bfloat16(), "", 3e-2),
    "float16": (lambda: deep().half(), "", 3e-3),
    "channels last": (lambda: deep().to(memory_format=torch.channels_last), "", 1e-6),
}


@pytest.mark.parametrize("layer", ["stage1", "stage2"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", SAME)
def test_a_make_of_model_gives_the_plain_models_tables(make, method, layer):
    build, prefix, tolerance = SAME[make]
    model = build()
    table = METHODS[method](model, prefix + layer)
    plain = METHODS[method](deep(), layer)
    assert table.layer == prefix + layer  # the plain name, also of a compiled model
    if make in ("bfloat16", "float16"):
        if method != "frequency":  # votes of nearly equal filters may change
            scale = float(plain.scores.abs().max())
            assert float((table.scores - plain.scores).abs().max()) < tolerance * scale
    else:
        torch.testing.assert_close(table.scores, plain.scores, atol=tolerance, rtol=1e-5)
    if layer == "stage2" and not prefix and "float16" not in make:  # tables fit both ways
        x = data_for(model)[0][0]
        for one, found in ((model, plain), (deep(), table)):
            small = decompose(one, found, example_inputs=x.to(next(one.parameters()).dtype))
            assert small(x.to(next(one.parameters()).dtype)).shape == (len(x), 3)


def scores_of(model: nn.Module) -> ClassFilters:
    return METHODS["ablation"](model, "stage1")


READ_WEIGHTS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "list": lambda model, x: str(list_filter_layers(model, x)),
    "baselines": lambda model, _x: filter_importance_baselines(
        model, "stage1", batches(21), repetitions=1, **QUIET
    ),
    "outgoing": lambda model, x: outgoing_weight_scores(model, "stage1", x),
    "class curves": lambda model, _x: (
        class_curves(
            model, "stage1", scores_of(deep()), batches(21), repetitions=1, **QUIET
        ).necessity
    ),
    "collateral damage": lambda model, _x: (
        collateral_damage(
            model, "stage1", scores_of(deep()), batches(21), repetitions=1, **QUIET
        ).control_recall
    ),
    "filter curves": lambda model, x: (
        filter_curves(
            model,
            "stage1",
            x,
            torch.rand(len(x), 4, generator=torch.Generator().manual_seed(0)),
            target=1,
        ).deletion
    ),
    "compare heads": lambda model, x: (
        compare_heads(model, model, x, repetitions=1).before.head_multiply_adds
    ),
    "compare networks": lambda model, x: (
        compare_networks(model, model, x, repetitions=1).before.filters
    ),
    "decompose": lambda model, x: (
        decompose(model, METHODS["contribution"](deep(), "stage2")).eval()(x).detach()
    ),
    "refit head": lambda model, _x: refused(refit_head, model, batches(21), **QUIET),
    "specialize": lambda model, x: refused(specialize, model, scores_of(deep()), [0, 1], x),
    "a layer for a tensor": lambda model, x: refused(
        filter_curves,
        model,
        "stage1",
        x,
        torch.ones(1),
        weight_magnitude=model.get_submodule("head"),
    ),
}


def refused(call: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(ValueError) as refusal:
        call(*arguments, **options)
    return str(refusal.value)


@pytest.mark.parametrize("task", READ_WEIGHTS)
def test_weights_that_change_by_being_read_in_training_mode(task):
    def normed() -> nn.Module:
        model = deep()
        for name in ("stage1.0", "stage2.0", "head"):
            layer = model.get_submodule(name)
            parametrizations.spectral_norm(layer)
            own = next(p for n, p in layer.named_parameters() if n.endswith("original"))
            with torch.no_grad():  # as a step of training would
                own.mul_(1 + torch.arange(own.numel()).reshape(own.shape) / own.numel())
        return model

    x = batches(21)[0][0]
    expected, model = READ_WEIGHTS[task](normed().eval(), x), normed().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = READ_WEIGHTS[task](model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert same(found, expected)


def test_a_frozen_backbone_has_no_gradient_inside():
    model = FrozenBackbone().eval()
    with pytest.raises(ValueError, match=r"under torch\.no_grad") as refusal:
        METHODS["contribution"](model, "net.stage1")
    assert "LayerFilterAblation" in str(refusal.value)  # which is followed:
    for method, name in (("ablation", "stage1"), ("contribution", "stage2")):
        found = METHODS[method](model, f"net.{name}")
        torch.testing.assert_close(found.scores, METHODS[method](deep(), name).scores)


def test_quantized_layers_have_no_gradient():
    model = torch.ao.quantization.quantize_dynamic(deep(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"quantized or rounds.*LayerFilterAblation needs no grad"):
        METHODS["contribution"](model, "stage1")
    found = METHODS["ablation"](model, "stage1").scores
    plain = METHODS["ablation"](deep(), "stage1").scores
    assert float((found - plain).abs().max()) < 0.1 * float(plain.abs().max())


def test_a_block_that_fx_took_apart():
    model = torch.fx.symbolic_trace(deep())
    with pytest.raises(ValueError, match=r"contains, 'stage1\.2' may run by itself"):
        METHODS["contribution"](model, "stage1")
    found = METHODS["contribution"](model, "stage1.2")
    torch.testing.assert_close(found.scores, METHODS["contribution"](deep(), "stage1.2").scores)


GONE = {
    "scripted": (lambda: torch.jit.script(deep()), "give the module that it was made from"),
    "traced": (
        lambda: torch.jit.trace(deep(), torch.rand(2, 2, 6, 6)),
        "give the module that it was made from",
    ),
    "exported": (
        lambda: torch.export.export(deep(), (torch.rand(5, 2, 6, 6),)),
        "give the module that it was exported from",
    ),
    "exported module": (
        lambda: torch.export.export(deep(), (torch.rand(5, 2, 6, 6),)).module(),
        "give the module that it was exported from",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", GONE)
def test_models_whose_layers_are_gone_are_refused(make, method):
    build, message = GONE[make]
    with pytest.raises(ValueError, match=message):
        METHODS[method](build(), "stage1")


NEED_A_MODULE: dict[str, Callable[[Any, Tensor], object]] = {
    "list": lambda model, x: list_filter_layers(model, x),
    "prunable": lambda model, x: prunable_layers(model, x, **QUIET),
    "prune": lambda model, x: prune_filters(model, "stage1.0", x, remove=[0]),
    "decompose": lambda model, x: decompose(model, METHODS["contribution"](deep(), "stage2")),
}


@pytest.mark.parametrize("task", NEED_A_MODULE)
@pytest.mark.parametrize(
    "kind", ["scripted", "traced", "exported", "function", "partial", "method"]
)
def test_what_needs_a_module_says_so(kind, task):
    plain, (x, _) = deep(), batches(21)[0]
    functions = {"function": lambda x: plain(x), "partial": partial(plain), "method": plain.forward}
    if kind in functions:
        model, message = functions[kind], "give the module inside it"
    else:
        build, message = GONE[kind]
        model = build()
    with pytest.raises(ValueError, match=message):
        NEED_A_MODULE[task](model, x)
    NEED_A_MODULE[task](plain, x)


ON_QUANTIZED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "find": lambda model, _x: find_head(model),
    "find on a batch": find_head,
    "decompose": lambda model, _x: decompose(model, METHODS["contribution"](deep(), "stage2")),
    "refit": lambda model, _x: refit_head(model, batches(21), **QUIET),
    "compare heads": lambda model, x: compare_heads(deep(), model, x),
    "fine-tune": lambda model, _x: fine_tune(
        model, batches(21), batches(9), epochs=1, freeze="backbone", **QUIET
    ),
    "specialize": lambda model, x: specialize(model, scores_of(deep()), [0, 1], x),
    "specialize by name": lambda model, x: specialize(
        model, scores_of(deep()), [0, 1], x, head="head"
    ),
    "forget": lambda model, _x: forget_class(model, batches(21), 0, **QUIET),
    "prune weights": lambda model, _x: magnitude_prune(model, "head", 0.5),
    "compress": lambda model, x: compress_layer(model, "head", x),
    "retrain": lambda model, _x: remove_and_retrain(
        model, "stage2", torch.arange(6.0), batches(21), batches(9), num_filters=[2], **QUIET
    ),
    "randomize": lambda model, x: cascading_randomization(
        model, lambda twin: LayerFilterAblation(twin, "stage2"), x, target=0
    ),
    "decompose weights": lambda model, _x: layer_svd(model.get_submodule("head")),
}


@pytest.mark.parametrize("task", ON_QUANTIZED)
def test_a_quantized_layer_is_called_so(task):
    model = torch.ao.quantization.quantize_dynamic(deep(), {nn.Linear}, dtype=torch.qint8)
    pattern = "Linear.* is quantized: its weight is packed integers.* floating-point"
    with pytest.raises(ValueError, match=pattern):
        ON_QUANTIZED[task](model, batches(21)[0][0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ao.nn.quantized.Linear(6, 3),
        lambda: torch.ao.nn.quantized.Conv2d(6, 3, 1),
        lambda: torch.ao.nn.quantized.dynamic.Linear(6, 3),
        lambda: torch.ao.nn.intrinsic.quantized.LinearReLU(6, 3),
    ],
)
def test_no_layer_before_a_quantized_head_is_taken_for_it(make):
    if torch.backends.quantized.engine == "none":
        pytest.skip("PyTorch was built without quantized operations")
    with pytest.raises(ValueError, match=r"head '2' \(.*\) is quantized"):
        find_head(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), make()))
    inner = nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 6, (3, 1)), nn.Linear(6, 2))
    assert find_head(inner)[0] == "1"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ao.nn.quantized.Embedding(7, 4),
        lambda: torch.ao.nn.quantized.dynamic.GRU(4, 6),
        lambda: torch.ao.nn.quantized.DeQuantize(),
    ],
)
def test_quantized_layers_that_are_not_linear_are_no_heads(make):
    if torch.backends.quantized.engine == "none":
        pytest.skip("PyTorch was built without quantized operations")
    assert find_head(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), make()))[0] == "0"


class SoftAttention(nn.Module):
    """Its weights are computed from the maps, by a method of that name."""

    def weight(self, maps: Tensor) -> Tensor:
        return maps.mean(1, keepdim=True).flatten(2).softmax(2).unflatten(2, maps.shape[2:])

    def forward(self, maps: Tensor) -> Tensor:
        return (maps * self.weight(maps)).sum((2, 3))


class EndsInAttention(nn.Module):
    """The attention is registered after the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.head = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Linear(5, 4)
        self.pool = SoftAttention()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.pool(self.relu(self.conv(x))))
        return scores


def test_a_method_called_weight_quantizes_nothing():
    model, x = EndsInAttention().eval(), torch.rand(3, 3, 6, 7)
    assert find_head(model)[0] == find_head(model, x)[0] == "head"
    found = cascading_randomization(
        model, lambda twin: LayerFilterContribution(twin, "relu"), x, target=1
    )
    assert found.modules == ["head", "conv"]
    with pytest.raises(ValueError, match="no weight") as refused:
        layer_svd(model.pool)
    assert "quantized" not in str(refused.value)


def test_quantized_activations_are_no_numbers_to_weigh():
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.ao.quantization.QuantStub(), *deep().children(), torch.ao.quantization.DeQuantStub()
    ).eval()
    backend = torch.backends.quantized.engine
    if backend == "none":
        pytest.skip("PyTorch was built without quantized operations")
    model.qconfig = torch.ao.quantization.get_default_qconfig(backend)
    prepared = torch.ao.quantization.prepare(model)
    prepared(batches(21)[0][0])
    quantized = torch.ao.quantization.convert(prepared)
    for name in METHODS:
        with pytest.raises(ValueError, match=r"handles torch\.quint8, not floating-point"):
            METHODS[name](quantized, "1.0")


def contribution(model: nn.Module) -> LayerFilterContribution:
    return LayerFilterContribution(model, "1")


def lazy_table() -> ClassFilters:
    return ClassFilters(torch.rand(3, 6), torch.ones(3), layer="1").select(2)


ON_LAZY: dict[str, Callable[[nn.Module], object]] = {
    "identify": lambda model: contribution(model).identify(batches(21), num_filters=2, **QUIET),
    "contrast": lambda model: contrast_classes(contribution(model), batches(21), 0, 1, **QUIET),
    "confusions": lambda model: confusion_filters(contribution(model), batches(21), **QUIET),
    "prune weights": lambda model: magnitude_prune(model, "0", 0.5),
    "compress": lambda model: compress_layer(model, "4", batches()[0][0], clusters=2),
    "decompose": lambda model: decompose(model, lazy_table()),
    "curve": lambda model: accuracy_curve(
        model, lazy_table(), batches(21), num_filters=[1], repetitions=1, **QUIET
    ),
    "unknown": lambda model: ClassFilterOOD(model, lazy_table()),
}


@pytest.mark.parametrize("task", ON_LAZY)
def test_lazy_modules_run_once_first(task):
    if task == "compress":
        pytest.importorskip("bitarray")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LazyConv2d(6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3)
    ).eval()
    with pytest.raises(ValueError, match="run the model once on a batch"):
        ON_LAZY[task](model)
    model(batches()[0][0])
    ON_LAZY[task](model)


IMAGES = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 2, 1, 1, 0])


def in_gates(method: Any, layer: str, **options: Any) -> Callable[[nn.Module], object]:
    """Captum's own method over the gates of a layer."""

    def call(model: nn.Module) -> object:
        gate = FilterGate(model, layer)
        gates = torch.linspace(0.2, 1, 5 * gate.num_filters).reshape(5, -1)
        return method(gate).attribute(
            gates, target=TARGET, additional_forward_args=(IMAGES,), **options
        )

    return call


def gated(unit: str) -> Callable[[nn.Module], object]:
    def call(model: nn.Module) -> object:
        gate = ClassSpecificGate(3, 4).attach(model, "stage1")
        optimizer = torch.optim.SGD([*model.parameters(), *gate.parameters()], lr=0.1)
        schedule = GateSchedule(unit=unit, period=2)  # type: ignore[arg-type]
        GatedTrainer(model, gate, optimizer, schedule=schedule).fit(batches(7), epochs=2, **QUIET)
        return gate.weight.detach(), model.get_parameter("head.weight").detach()

    return call


def tuned(model: nn.Module) -> object:
    fine_tune(model, batches(7), batches(7), epochs=1, learning_rate=0.1, **QUIET)
    return [parameter.detach() for parameter in model.parameters()]


def saliency(mode: Literal["input_gradient", "activation_map"], **options: Any) -> Any:
    """Through the chosen filters of one layer, to the images."""

    def call(model: nn.Module) -> object:
        found = METHODS["contribution"](deep(), "stage1")
        method = ClassFilterSaliency(model, "stage1", found, mode=mode)
        return method.attribute(IMAGES, target=TARGET, **options)

    return call


WITHOUT_A_LOADER: dict[str, Callable[[nn.Module], Any]] = {
    "saliency of gates": in_gates(Saliency, "stage1", abs=False),
    "saliency of the last layer's gates": in_gates(Saliency, "stage2", abs=False),
    "integrated gradients of gates": in_gates(IntegratedGradients, "stage1.1", n_steps=3),
    "ablation of gates": in_gates(FeatureAblation, "stage1"),
    "gradient maps": lambda model: filter_gradient_maps(
        model, "stage1", IMAGES, torch.tensor([3, 1])
    ),
    "gradients through filters": saliency("input_gradient"),
    "their integral": saliency("input_gradient", n_steps=2),
    "a class's map": saliency("activation_map"),
    "activation maps": lambda model: filter_activation_maps(model, "stage1", IMAGES),
    "sensitivity to gates": lambda model: filter_max_sensitivity(
        LayerFilterContribution(model, "stage1"), IMAGES, target=TARGET, space="gates",
        n_perturb_samples=2,
    ),
    "sensitivity to images": lambda model: filter_max_sensitivity(
        LayerFilterContribution(model, "stage1"), IMAGES, target=TARGET, n_perturb_samples=2
    ),
    "features": lambda model: visualize_features(
        model,
        [FeatureObjective.of_filter("stage1", 3), FeatureObjective.of_direction("stage1.1", torch.ones(4))],
        (2, 6, 6), steps=3, transform=None, **QUIET,
    ).images,
    "gated epochs": gated("epoch"),
    "joint gated epochs": gated("joint"),
    "fine-tuning": tuned,
}  # fmt: skip


def run_once(task: str, model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    found = WITHOUT_A_LOADER[task](model)
    assert hooks_of(model) == 0
    if isinstance(found, Tensor):
        return [found.detach()]
    parts = found if isinstance(found, (list, tuple)) else list(vars(found).values())
    return [part.detach() for part in parts if isinstance(part, Tensor)]


#: PyTorch trains nothing in a reentrant checkpoint whose inputs need no gradient, and warns of it.
TRAIN = ("gated epochs", "joint gated epochs", "fine-tuning")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("task", WITHOUT_A_LOADER)
def test_checkpointed_layers_give_the_same_or_the_way_is_named(task, reentrant):
    if reentrant and task in TRAIN:
        pytest.skip("it is PyTorch's own")
    model = checkpointed(reentrant)
    found, refusal = [], None
    try:
        found = run_once(task, model)
    except ValueError as error:
        refusal = str(error)
    assert hooks_of(model) == 0
    if refusal is None:
        assert found
        torch.testing.assert_close(found, run_once(task, deep()))
    else:
        assert reentrant, refusal
        assert "use_reentrant=False" in refusal


class DetachedScores(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class AllAgain(Around):
    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = checkpoint(self.net, x, use_reentrant=True)
        return scores


def quantized_head() -> nn.Module:
    model = Around()
    quantized: nn.Module = torch.ao.quantization.quantize_dynamic(
        model, {nn.Linear}, dtype=torch.qint8
    )
    return quantized


TRAINERS: dict[str, Callable[[nn.Module], object]] = {
    "fine_tune": lambda model: fine_tune(model, batches(7), batches(7), epochs=1, **QUIET),
    "layerwise": lambda model: LayerwiseFineTuning(batches(7), 0.1, num_steps=2)(model),
    "retrained": lambda model: remove_and_retrain(
        model, "net.stage1.2", {"a": torch.arange(4)}, batches(7), batches(7), num_filters=(2,),
        epochs=1, seed=0, **QUIET,
    ),
    "gated": lambda model: gate_trainer(model).fit(batches(7), epochs=1, **QUIET),
}  # fmt: skip


def gate_trainer(model: nn.Module, **options: Any) -> GatedTrainer:
    gate = ClassSpecificGate(3, 4).attach(model, "net.stage1")
    parameters = [*model.parameters(), *gate.parameters()]
    return GatedTrainer(model, gate, torch.optim.SGD(parameters, lr=0.1), **options)


@pytest.mark.parametrize("kind", [DetachedScores, AllAgain, quantized_head])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_that_no_gradient_leads_to_is_refused(trainer, kind):
    message = r"No gradient of the loss leads to any .*quantized.*use_reentrant=False"
    if trainer == "retrained" and kind is quantized_head:  # draws weights anew before it trains
        message = r"'net\.head' \(Linear\), which is to get new weights, is quantized"
    with pytest.raises(ValueError, match=message):
        TRAINERS[trainer](kind())


@pytest.mark.parametrize("gate_too", [False, True])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("unit", ["epoch", "batch", "joint"])
def test_the_gate_of_a_frozen_model_is_trained_by_gated_steps_alone(unit, within, gate_too):
    model = Around().requires_grad_(False)
    trainer = gate_trainer(model, schedule=GateSchedule(unit=unit))
    gate = trainer.gate.requires_grad_(not gate_too)
    if within:
        model.add_module("gate", gate)
    advice = r"gate\.requires_grad_\(True\)" if gate_too else r"schedule=GateSchedule\(period=1\)"
    with pytest.raises(ValueError, match=rf"its 10 parameters are frozen.* {advice}"):
        trainer.fit(batches(7), epochs=3, **QUIET)
    gate.requires_grad_(True)  # the advice is followed:
    before = gate.weight.detach().clone()
    gated = GatedTrainer(model, gate, trainer.optimizer, schedule=GateSchedule(period=1))
    gated.fit(batches(7), epochs=1, **QUIET)
    assert not torch.equal(gate.weight, before)


def test_a_frozen_gate_is_kept_while_the_model_is_trained():
    model = Around()
    trainer = gate_trainer(model, schedule=GateSchedule(period=1))
    gate = trainer.gate.requires_grad_(False)
    gate.project()  # as after any gated step
    before = gate.weight.clone()
    trainer.fit(batches(7), epochs=1, **QUIET)
    assert torch.equal(gate.weight, before)
    weight = model.get_parameter("net.head.weight")
    assert not torch.equal(weight, Around().get_parameter("net.head.weight"))
