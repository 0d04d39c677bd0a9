"""Compressed weights decode to what the model computes with; sizes against entropy and by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from captum_classfilters import fine_tune, prune_filters
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.pruning import compress_layer, magnitude_prune
from captum_classfilters.pruning.weight_compression import encode_weights, kmeans_quantize
from tests.models import QUIET, batches, deep, images, tensor_of
from tests.pretend_device import pretend

pytest.importorskip("bitarray")
sklearn_cluster = pytest.importorskip("sklearn.cluster")


def entropy_bits(symbols):
    counts = torch.tensor(symbols).unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(counts * share.log2()).sum())


def test_magnitude_pruning_removes_the_smallest_and_holds_in_training():
    model = deep()
    weight = tensor_of(model, "stage2.0.weight").detach().clone()
    small = magnitude_prune(model, "stage2.0", 0.6)
    size = weight.abs().flatten()
    threshold = size.sort().values[round(0.6 * size.numel())]
    mask = weight.abs() >= threshold
    assert torch.equal(tensor_of(small, "stage2.0.weight"), weight * mask)
    assert torch.equal(tensor_of(model, "stage2.0.weight"), weight)
    fine_tune(small, batches(), batches(60), epochs=1, learning_rate=1e-2, show_progress=False)
    small(images())  # PyTorch masks again in each forward pass
    trained = tensor_of(small, "stage2.0.weight")
    assert bool((trained[~mask] == 0).all())
    twice = magnitude_prune(small, "stage1.0", 0.5)  # a masked model can be copied
    assert int((tensor_of(twice, "stage1.0.weight") == 0).sum()) == 36
    assert torch.equal(tensor_of(twice, "stage2.0.weight"), trained)


def test_kmeans_is_scikit_learns():
    weights = torch.randn(400, generator=torch.Generator().manual_seed(0))
    values, codes = kmeans_quantize(weights.reshape(20, 20), 5)
    start = torch.linspace(float(weights.min()), float(weights.max()), 5)[:, None].double()
    fitted = sklearn_cluster.KMeans(5, init=start.numpy(), n_init=1).fit(
        weights[:, None].double().numpy()
    )
    assert torch.allclose(values.double(), torch.tensor(fitted.cluster_centers_[:, 0]), atol=1e-6)
    assert codes.shape == (20, 20)
    nearest = (weights[:, None] - values).abs().argmin(1)
    assert torch.equal(codes.flatten(), nearest)
    few, codes = kmeans_quantize(torch.tensor([2.0, 1, 2, 1]), 16)
    assert few.tolist() == [1, 2]
    assert codes.tolist() == [1, 0, 1, 0]


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    clusters=st.integers(1, 9),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.97]),
    seed=st.integers(0, 50),
)
def test_round_trip(shape, clusters, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator)
    weights[torch.rand(shape, generator=generator) < sparsity] = 0
    present = weights != 0
    if not present.any():
        return
    codebook, codes = kmeans_quantize(weights[present], clusters)
    coded = encode_weights(weights, codebook, codes)
    expected = torch.zeros(shape)
    expected[present] = codebook[codes]
    assert torch.equal(coded.to_dense(), expected)
    assert coded.num_bytes == coded.code_bytes + coded.index_bytes + coded.codebook_bytes


def test_size_is_within_a_bit_of_the_entropy():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 512, generator=generator)
    weights[weights.abs() < 1.6] = 0
    present = weights != 0
    codebook, codes = kmeans_quantize(weights[present], 16)
    coded = encode_weights(weights, codebook, codes)
    number = int(present.sum())
    gaps = present.flatten().nonzero()[:, 0] + 1
    gaps = torch.cat([gaps[:1], gaps.diff()])
    for found, symbols, table in [
        (coded.code_bytes, codes.tolist(), 16 * 2),
        (coded.index_bytes, gaps.tolist(), len(gaps.unique()) * 3),
    ]:
        bits = 8 * (found - table)
        assert entropy_bits(symbols) <= bits + 8
        assert bits <= entropy_bits(symbols) + number + 8
    assert coded.codebook_bytes == 64
    assert coded.gaps is not None


def test_size_by_hand():
    # Four weights of two values, three of them equal: one bit each. No zeros: no index.
    weights = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    coded = encode_weights(weights, *kmeans_quantize(weights.flatten(), 2))
    assert (coded.code_bytes, coded.index_bytes, coded.codebook_bytes) == (1 + 2 * 2, 0, 8)
    # A dense mask is cheaper as a bit for each of 16 places than as gaps with a table.
    weights = torch.tensor([1.0, 0] * 8)
    coded = encode_weights(weights, *kmeans_quantize(weights[weights != 0], 2))
    assert coded.bitmap is None or coded.index_bytes == 2
    weights = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1] * 2)
    coded = encode_weights(weights, *kmeans_quantize(weights[weights != 0], 2))
    assert coded.bitmap is not None
    assert coded.index_bytes == 2


def test_compressed_layer_with_filters_removed():
    pytest.importorskip("torch_pruning")
    model, data, x = deep(seed=2), batches(60), images()
    state = copy.deepcopy(model.state_dict())
    smaller = prune_filters(model, "stage2", x, remove=[0, 3])
    result = compress_layer(
        smaller,
        "stage2.0",
        x,
        clusters=4,
        sparsity=0.5,
        original=model,
        dataloader=data,
        **QUIET,
    )
    report, weight = result.report, tensor_of(result.model, "stage2.0.weight")
    assert torch.equal(result.weights.to_dense(), weight)
    assert len(weight[weight != 0].unique()) == 4
    assert report.filters == (6, 4)
    assert report.weights == (6 * 4 * 9, 2 * 4 * 9)
    assert report.multiply_adds == (6 * 4 * 9 * 36, 2 * 4 * 9 * 36)
    assert report.bytes[0] == 4 * (6 * 4 * 9 + 6)
    assert report.bytes[1] == result.weights.num_bytes + 4 * 4
    assert report.bytes[1] == (
        report.code_bytes + report.index_bytes + report.codebook_bytes + report.bias_bytes
    )
    assert report.ratio == report.bytes[0] / report.bytes[1]
    assert report.accuracy == (
        evaluate_classifier(model, data, **QUIET).accuracy,
        evaluate_classifier(result.model, data, **QUIET).accuracy,
    )
    assert "multiply-adds" in str(report)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_mask_from_training_is_kept():
    model = deep()
    pruned = magnitude_prune(model, "stage2.0", 0.5)
    pruned(images()).sum().backward()  # the masked weight is now computed with a gradient
    result = compress_layer(pruned, "stage2.0", images(), clusters=8)
    zero = tensor_of(pruned, "stage2.0.weight") == 0
    assert bool((tensor_of(result.model, "stage2.0.weight")[zero] == 0).all())
    assert result.report.weights[1] == int((~zero).sum())
    assert isinstance(tensor_of(result.model, "stage2.0.weight"), nn.Parameter)


@pytest.mark.parametrize("sparsity", [0.5, 0.97, 0.999])
def test_one_weight_stays_at_least(sparsity):
    model = nn.Sequential(nn.Linear(4, 3))
    kept = int((tensor_of(magnitude_prune(model, "0", sparsity), "0.weight") != 0).sum())
    assert kept == max(1, 12 - round(12 * sparsity))
    twice = magnitude_prune(magnitude_prune(model, "0", 0.5), "0", sparsity)
    assert int((tensor_of(twice, "0.weight") != 0).sum()) == max(1, 6 - round(6 * sparsity))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(
    ("layer", "memory_format", "size"),
    [
        (nn.Conv2d(4, 6, (3, 2)), torch.channels_last, (2, 4, 5, 7)),
        (nn.ConvTranspose2d(4, 6, (3, 2)), torch.channels_last, (2, 4, 5, 7)),
        (nn.Conv3d(4, 6, (1, 3, 2)), torch.channels_last_3d, (2, 4, 3, 5, 7)),
    ],
)
def test_weights_in_another_memory_format(layer, memory_format, size, sparsity):
    """The same weights go, once and again, and the format stays."""
    plain, x = nn.Sequential(layer).eval(), torch.rand(size)
    model = copy.deepcopy(plain).to(memory_format=memory_format)
    found = []
    for network in (plain, model):
        once = magnitude_prune(network, "0", sparsity)
        twice = magnitude_prune(once, "0", 0.5)
        twice(x)  # PyTorch masks again in each forward pass
        coded = compress_layer(network, "0", x, clusters=5, sparsity=sparsity, **QUIET)
        found.append([tensor_of(each, "0.weight") for each in (once, twice, coded.model)])
    number = layer.weight.numel()
    assert int((found[0][0] == 0).sum()) == round(sparsity * number)
    for expected, weight in zip(*found, strict=True):
        assert torch.equal(weight, expected)
        assert weight.is_contiguous(memory_format=memory_format)


def test_bad_input():
    model, x = deep(), images()
    with pytest.raises(ValueError, match=r"sparsity=1"):
        magnitude_prune(model, "stage1.0", 1)
    with pytest.raises(ValueError, match="no layer 'stage9'"):
        magnitude_prune(model, "stage9", 0.5)
    with pytest.raises(ValueError, match="is a BatchNorm2d; expected a convolution"):
        compress_layer(model, "stage1.1", x)
    with pytest.raises(ValueError, match="clusters=0"):
        compress_layer(model, "stage1.0", x, clusters=0)
    with pytest.raises(ValueError, match="1 codes for 2 weights"):
        encode_weights(torch.ones(2), torch.ones(1), torch.zeros(1, dtype=torch.int64))


def test_the_weights_of_a_loaded_mask_are_ranked():
    saved, loaded = deep(seed=1), deep(seed=2)
    for model in (saved, loaded):
        prune.l1_unstructured(model.stage2[0], "weight", amount=0.25)
    loaded.load_state_dict(saved.state_dict())  # and not run since, so that it holds other products
    expected = magnitude_prune(saved, "stage2.0", 0.5).get_buffer("stage2.0.weight_mask")
    found = magnitude_prune(loaded, "stage2.0", 0.5).get_buffer("stage2.0.weight_mask")
    assert torch.equal(found, expected)
    dense = [
        compress_layer(model, "stage2.0", images(), clusters=4, sparsity=0.5).weights.to_dense()
        for model in (saved, loaded)
    ]
    assert torch.equal(*dense)


def test_compression_on_an_accelerator():
    model, data = deep(seed=2), batches(60)
    expected = compress_layer(model, "stage2.0", images(), clusters=4, dataloader=data, **QUIET)
    with pretend("cuda") as device:
        moved = deep(seed=2).to(device)
        result = compress_layer(moved, "stage2.0", images(), clusters=4, dataloader=data, **QUIET)
        weight = tensor_of(result.model, "stage2.0.weight").detach()
        assert weight.device == device
        assert torch.equal(weight.cpu(), result.weights.to_dense())
    assert result.report == expected.report


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_weights_that_are_computed_are_refused_until_the_advice_is_followed(computed, masked):
    model = deep()
    if masked:  # which need not be taken off
        prune.random_unstructured(model.stage2[0], "bias", 2)
    computed(model.stage2[0])
    for call in (
        lambda: compress_layer(model, "stage2.0", images()),
        lambda: magnitude_prune(model, "stage2.0", 0.5),
    ):
        with pytest.raises(
            ValueError, match=r"'stage2\.0': the weight of .* is computed"
        ) as refusal:
            call()
    (advice,) = str(refusal.value).split("first: ")[1].removesuffix(".").split("; ")
    eval(advice)
    assert compress_layer(model, "stage2.0", images(), clusters=3).report.weights[1] > 0
    kept = magnitude_prune(model, "stage2.0", 0.5).get_buffer("stage2.0.weight_mask")
    assert int(kept.sum()) == 108


def test_a_loader_for_both_networks_can_be_read_twice():
    with pytest.raises(ValueError, match="read only once"):
        compress_layer(deep(), "stage2.0", images(), dataloader=iter(batches()), **QUIET)
