"""Captum's own configurations, which it ships for its generic suites, over our layer methods."""

import copy

import pytest
import torch
import torch.distributed as dist
from captum.attr import ClassSummarizer, CommonStats, LayerAttribution, NoiseTunnel
from captum.concept import TCAV, Concept
from captum.testing.attr.helpers.test_config import config
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from captum_classfilters import (
    ClassFilters,
    ClassFilterSaliency,
    LayerClassGate,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    LayerFilterShapley,
    LayerSingularDirection,
)
from tests.models import deep, hooks_of, images

NAMES = (
    "conv_layer_single_target",
    "basic_layer_in_place",
    "basic_layer_multi_output",
    "basic_layer_multi_input",
    "basic_layer_multiple_target",
    "basic_layer_tensor_multiple_target",
    "basic_layer_multiple_tuple_target",
)
ENTRIES = [entry for entry in config if entry["name"] in NAMES]
SINGLE_TENSOR = {"ablation", "Shapley", "class gate", "saliency"}
CLASSES = {"class gate", "saliency"}  # their targets are classes, indices of a (N, C) output


def shape_of(model, layer, arguments):
    """Classes and filters of a configuration."""
    shapes = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: shapes.append(output))
    inputs, further = arguments["inputs"], arguments.get("additional_forward_args", ())
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    further = further if isinstance(further, tuple) else (further,)
    with torch.no_grad():
        output = model(*inputs, *further)
    handle.remove()
    return output.shape[1], shapes[0].shape[1]


def drawn(shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def class_gate(model, layer, arguments):
    return LayerClassGate(model, layer, drawn(shape_of(model, layer, arguments)))


def saliency(model, layer, arguments):
    scores = drawn(shape_of(model, layer, arguments))
    table = ClassFilters(scores, torch.ones(len(scores))).select(1)
    return ClassFilterSaliency(model, layer, table)


METHODS = {
    "frequency": lambda model, layer, _: LayerFilterFrequency(model, layer, top_k=2),
    "contribution": lambda model, layer, _: LayerFilterContribution(model, layer),
    "ablation": lambda model, layer, _: LayerFilterAblation(model, layer),
    "Shapley": lambda model, layer, _: LayerFilterShapley(model, layer),
    "class gate": class_gate,
    "directions": lambda model, layer, _: LayerSingularDirection(
        model, layer, evidence="contribution"
    ),
    "saliency": saliency,
}
cases = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])


@pytest.fixture(params=METHODS)
def make(request):
    def make(model, layer, arguments):
        return METHODS[request.param](model, layer, arguments)

    vars(make)["name"] = request.param
    return make


def prepared(entry):
    """A copy of the configured model, its layer, and the arguments."""
    model = copy.deepcopy(entry["model"])
    return model, model.get_submodule(entry["layer"]), dict(entry["attribute_args"])


def skip_unsupported(make, entry):
    layer = entry["model"].get_submodule(entry["layer"])
    if make.name == "directions" and not isinstance(layer, (nn.Conv2d, nn.Linear)):
        pytest.skip("only a layer with a weight has singular directions")
    if make.name in SINGLE_TENSOR and entry["name"] == "basic_layer_multi_output":
        pytest.skip("the method takes layers of one tensor, and says so")
    if make.name in CLASSES and entry["name"] == "basic_layer_multiple_tuple_target":
        pytest.skip("the method takes classes as targets, and says so")


def tensors(value):
    return value if isinstance(value, tuple) else (value,)


def sliced(value, index):
    """One example of inputs or further arguments."""
    if isinstance(value, tuple):
        return tuple(sliced(part, index) for part in value)
    return value[index : index + 1] if isinstance(value, Tensor) and value.dim() else value


def test_all_seven_configurations_are_there():
    assert {entry["name"] for entry in ENTRIES} == set(NAMES)


@cases
def test_a_batch_is_its_examples(make, entry):
    skip_unsupported(make, entry)
    model, layer, arguments = prepared(entry)
    method = make(model, layer, arguments)
    together = tensors(method.attribute(**arguments))
    targets = arguments["target"]
    several = isinstance(targets, (list, Tensor)) and len(targets) > 1
    number = len(tensors(arguments["inputs"])[0])
    for index in range(number):
        one = {name: sliced(value, index) for name, value in arguments.items() if name != "target"}
        one["target"] = targets[index] if several else targets
        if isinstance(one["target"], Tensor):
            one["target"] = int(one["target"])
        alone = tensors(make(model, layer, arguments).attribute(**one))
        for whole, part in zip(together, alone, strict=True):
            assert torch.allclose(whole[index : index + 1], part, atol=1e-4)


@cases
def test_noise_tunnel_without_noise(make, entry):
    skip_unsupported(make, entry)
    model, layer, arguments = prepared(entry)
    method = make(model, layer, arguments)
    plain = tensors(method.attribute(**arguments))
    smooth = tensors(NoiseTunnel(method).attribute(**arguments, nt_samples=2, stdevs=0.0))
    for expected, found in zip(plain, smooth, strict=True):
        assert torch.allclose(expected, found, atol=1e-4)


@cases
def test_hooks_are_removed(make, entry):
    skip_unsupported(make, entry)
    model, layer, arguments = prepared(entry)
    method = make(model, layer, arguments)
    method.attribute(**arguments)
    assert hooks_of(model) == 0
    if not isinstance(method, LayerFilterFrequency):  # its votes need no target
        with pytest.raises(AssertionError):
            method.attribute(**{**arguments, "target": (9999,) * 20})
        assert hooks_of(model) == 0

    def failing(*_args, **_kwargs):
        raise AssertionError("a failing module")

    layer.forward = failing
    with pytest.raises(AssertionError):
        method.attribute(**arguments)
    assert hooks_of(model) == 0


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A group of this process alone, as Captum's own suite makes one for a single machine."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_gpu(value):
    if isinstance(value, tuple):
        return tuple(on_gpu(one) for one in value)
    return value.cuda() if isinstance(value, Tensor) else value


@cases
@pytest.mark.parametrize(
    "mode", ["DataParallel", "DistributedDataParallel", "cuda", "DataParallel reversed"]
)
def test_data_parallel_configurations(make, entry, mode, process_group):
    """Captum's four: wrapped models, given as such or by their forward, answer as the plain one."""
    skip_unsupported(make, entry)
    if mode in ("cuda", "DataParallel reversed") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, layer, arguments = prepared(entry)
    plain = tensors(make(model, layer, arguments).attribute(**arguments))
    twin = copy.deepcopy(model)
    twin_layer, forward = twin.get_submodule(entry["layer"]), twin
    given = arguments
    if torch.cuda.is_available():
        twin.cuda()
        given = {name: on_gpu(value) for name, value in arguments.items()}
    method = make(twin, twin_layer, given)
    if mode == "DistributedDataParallel":
        forward = nn.parallel.DistributedDataParallel(twin)
    elif mode == "DataParallel":
        forward = nn.DataParallel(twin)
    elif mode == "DataParallel reversed":
        devices = list(reversed(range(torch.cuda.device_count())))
        forward = nn.DataParallel(twin, device_ids=devices).forward
        method.device_ids = devices
        twin.to(f"cuda:{devices[0]}")
    method.forward_func = forward
    wrapped = tensors(method.attribute(**given))
    for expected, found in zip(plain, wrapped, strict=True):
        assert torch.allclose(expected, found.cpu(), atol=1e-4)


def test_layer_attributions_interpolate(make):
    """Maps grow to the input's size by `LayerAttribution.interpolate`, as any of Captum's do."""
    entry = next(entry for entry in ENTRIES if entry["name"] == "conv_layer_single_target")
    model, layer, arguments = prepared(entry)
    found = make(model, layer, arguments).attribute(**arguments)
    grown = LayerAttribution.interpolate(found, (20, 20))
    assert grown.shape == (*found.shape[:2], 20, 20)
    step = 20 // found.shape[-1]
    assert torch.equal(grown[:, :, ::step, ::step][:, :, 0, 0], found[:, :, 0, 0])


class Endless(IterableDataset):
    """Random images of a concept."""

    def __init__(self, shift):
        self.shift = shift

    def __iter__(self):
        generator = torch.Generator().manual_seed(int(10 * self.shift))
        for _ in range(12):
            yield torch.randn(2, 6, 6, generator=generator) + self.shift


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["contribution", "frequency", "ablation", "class gate"])
def test_tcav_takes_our_methods(name, tmp_path):
    model = deep()
    gated = name == "class gate"
    method = (
        LayerClassGate(model, None, drawn((3, 4))) if gated else METHODS[name](model, None, None)
    )
    concepts = [
        Concept(id=index, name=f"concept{index}", data_iter=DataLoader(Endless(shift), 4))
        for index, shift in enumerate((0.0, 2.0))
    ]
    tcav = TCAV(
        model=model,
        layers=["stage1"],
        layer_attr_method=method,
        save_path=str(tmp_path),
        test_split_ratio=0.5,
    )
    scores = tcav.interpret(images(4), experimental_sets=[concepts], target=1)
    result = next(iter(scores.values()))["stage1"]
    assert result["sign_count"].shape == (2,)
    assert float(result["sign_count"].sum()) == pytest.approx(1.0, abs=0.51)


def test_class_summarizer_agrees_with_identify():
    model, x = deep(), images()
    labels = torch.arange(8) % 3
    method = LayerFilterContribution(model, "stage2")
    summarizer = ClassSummarizer(stats=CommonStats())
    scores = method.filter_scores(method.attribute(x, target=labels))
    summarizer.update(scores, labels.tolist())
    table = method.identify([(x, labels)], show_progress=False)
    for class_ in range(3):
        mean = summarizer.class_summaries[class_][0]["mean"]
        assert torch.allclose(mean.double(), table.scores[class_], atol=1e-6)


def test_a_method_without_a_layer_can_be_made():
    model = deep()
    method = LayerFilterContribution(model, None)
    method.layer = model.get_submodule("stage2")
    assert method.attribute(images(), target=0).shape == (8, 6, 6, 6)
    assert isinstance(method.layer, nn.Module)
