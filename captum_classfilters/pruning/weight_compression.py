"""What is left of a layer's weights: pruned by magnitude, quantized, and coded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import check_read_again
from captum_classfilters._core.copies import copied
from captum_classfilters._core.costs import before_and_after, inputs_of
from captum_classfilters._core.extras import extra
from captum_classfilters._core.filter_graph import computed_weight, is_masked
from captum_classfilters._core.guard import check_sizes, model_left_as_found
from captum_classfilters._core.layers import check_runs, find_layer, name_of
from captum_classfilters._core.linear_maps import check_not_quantized, weight_at_inference
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.taps import hooked
from captum_classfilters._core.types import Dataloader, ExampleInputs, ModelInputs, Unpack
from captum_classfilters.metrics.evaluate_classifier import evaluate_classifier

if TYPE_CHECKING:
    from bitarray import bitarray

_Coder = tuple["bitarray", list[int], list[int]]  # bits, number of codes of each length, symbols


@short_repr
@dataclass(frozen=True)
class CompressedWeights:
    r"""
    Weights as Deep Compression stores them: a codebook, codes and the places of what is not zero.

    Args:

        shape (tuple of int): Shape of the weights.
        dtype (torch.dtype): Their type.
        codebook (Tensor): Shape (clusters,). The values that weights have.
        codes (tuple): Huffman-coded codebook index of each weight that is not zero.
        gaps (tuple or None): Huffman-coded distances between the places of these weights; None
                    where a bit for each place is shorter, or where no weight is zero.
        bitmap (bitarray or None): A bit for each place, or None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    codebook: Tensor
    codes: _Coder
    gaps: _Coder | None
    bitmap: "bitarray | None"

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes and of their Huffman table."""
        return _coded_bytes(self.codes, len(self.codebook))

    @property
    def index_bytes(self) -> int:
        """Bytes that say where the weights stand."""
        if self.gaps is not None:
            return _coded_bytes(self.gaps, self.numel)
        return 0 if self.bitmap is None else -(-len(self.bitmap) // 8)

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the codebook."""
        return self.codebook.numel() * self.codebook.element_size()

    @property
    def num_bytes(self) -> int:
        """Bytes of everything."""
        return self.code_bytes + self.index_bytes + self.codebook_bytes

    @property
    def numel(self) -> int:
        """Number of weights, zeros among them."""
        return int(torch.tensor(self.shape).prod())

    def to_dense(self) -> Tensor:
        """Decode: the weights, zeros where they were pruned.

        Returns:
            *Tensor* of the original shape.
        """
        codes = torch.tensor(_decoded(self.codes), dtype=torch.int64)
        if self.gaps is not None:
            places = torch.tensor(_decoded(self.gaps), dtype=torch.int64).cumsum(0) - 1
        elif self.bitmap is not None:
            places = torch.tensor(self.bitmap.tolist(), dtype=torch.bool).nonzero()[:, 0]
        else:
            places = torch.arange(self.numel)
        flat = torch.zeros(self.numel, dtype=self.dtype)
        flat[places] = self.codebook[codes]
        return flat.reshape(self.shape)


@short_repr
@dataclass(frozen=True)
class CompressionReport(Tabular):
    r"""
    A layer before and after compression; prints as a table.

    Args:

        layer (str): Dotted name.
        filters (tuple of int): Filters before and after.
        weights (tuple of int): Weights before, and weights that are not zero after.
        multiply_adds (tuple of int): For one image: of the dense layer before, and of the weights
                    that are not zero after. A dense convolution saves only what whole filters do.
        bytes (tuple of int): Weights and bias before, as they are held; after: codes, index,
                    codebook, Huffman tables and bias.
        code_bytes (int): Of the bytes after, the codes.
        index_bytes (int): Of the bytes after, the places of the weights.
        codebook_bytes (int): Of the bytes after, the codebook.
        bias_bytes (int): Of the bytes after, the bias.
        accuracy (tuple of float, or None): Accuracy before and after; None without a loader.
    """

    layer: str
    filters: tuple[int, int]
    weights: tuple[int, int]
    multiply_adds: tuple[int, int]
    bytes: tuple[int, int]
    code_bytes: int
    index_bytes: int
    codebook_bytes: int
    bias_bytes: int
    accuracy: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.bytes[0] / self.bytes[1]

    def _tables(self) -> list[Table]:
        titles = ("filters", "weights", "multiply_adds", "bytes")
        quantities = {title.replace("_", "-"): getattr(self, title) for title in titles}
        if self.accuracy:
            quantities["accuracy"] = self.accuracy
        parts = ("code", "index", "codebook", "bias")
        bytes_of = ", ".join(f"{part} {getattr(self, part + '_bytes'):,}" for part in parts)
        return [before_and_after(quantities, self.layer, [f"of the bytes after: {bytes_of}"])]


@short_repr
@dataclass(frozen=True)
class CompressedLayer:
    """A model with one compressed layer.

    Args:

        model (nn.Module): A copy of the model with the decoded weights.
        weights (CompressedWeights): The layer's weights, coded.
        report (CompressionReport): What it saves.
    """

    model: nn.Module
    weights: CompressedWeights
    report: CompressionReport


@arguments_checked
@torch.inference_mode(False)
def magnitude_prune(model: nn.Module, layer: nn.Module | str, sparsity: float) -> nn.Module:
    r"""
    A copy of the model in which a share of a layer's smallest weights is zero, ready to be trained.

    The mask is PyTorch's (``torch.nn.utils.prune.l1_unstructured``) and holds while the rest is
    fine-tuned; :func:`compress_layer` makes it permanent.

    Args:

        model (nn.Module): The model.
        layer (nn.Module or str): A layer with weights, or its dotted name.
        sparsity (float): Share of the weights to remove, from 0 to below 1; of those left, if the
                    layer was pruned before. One weight stays at least.

    Returns:
        *nn.Module*: The copy.

    Raises:
        ValueError: The share is out of range or the layer has no weights.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is out of range; choose a share in [0, 1).")
    name = name_of(model, layer)
    pruned = copied(model)
    module = _weighted(pruned, name)
    mask = getattr(module, "weight_mask", None)
    left = module.weight.numel() if mask is None else int(mask.sum())
    # PyTorch rounds, of few weights up to all of them.
    amount = max(0, min(round(sparsity * left), left - 1))
    # PyTorch views what it compares, which of channels-last weights it cannot, and its mask would
    # give them another memory format.
    sizes = weight_at_inference(module).contiguous()  # type: ignore[union-attr]
    prune.l1_unstructured(module, "weight", amount=amount, importance_scores=sizes)
    own: Tensor = module.weight_orig  # type: ignore[assignment]
    module.weight_mask = torch.empty_like(own).copy_(module.weight_mask)  # type: ignore[arg-type]
    module.weight = module.weight_mask * own
    return pruned


def kmeans_quantize(weights: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""
    Values for weights to share, by k-means, started evenly between the smallest and the largest.

    Source: Han et al., *Deep Compression*, 2016, https://arxiv.org/abs/1510.00149; the k-means is
    scikit-learn's.

    Args:

        weights (Tensor): Any shape.
        clusters (int): Number of values; fewer are used if the weights have fewer.
        seed (int): Seed, for clusters that become empty.
                    Default: 0

    Returns:
        *tuple* of the values (clusters,), of the weights' type, and the codes, int64, of the
        weights' shape.

    Raises:
        ValueError: There are no weights or no clusters.
        ImportError: scikit-learn, of the extra ``prune``, is not installed.
    """
    if clusters < 1 or weights.numel() == 0:
        raise ValueError(
            f"clusters={clusters} of {weights.numel()} weights: both must be positive."
        )
    cluster = extra("sklearn.cluster", "kmeans_quantize")
    flat = weights.detach().cpu().flatten()
    values, codes = flat.unique(return_inverse=True)
    if len(values) > clusters:
        start = torch.linspace(float(values[0]), float(values[-1]), clusters, dtype=torch.float64)
        fitted = cluster.KMeans(
            clusters, init=start[:, None].numpy(), n_init=1, random_state=seed
        ).fit(flat[:, None].double().numpy())
        values = torch.as_tensor(fitted.cluster_centers_[:, 0]).to(weights.dtype)
        codes = torch.as_tensor(fitted.labels_).long()
    return values, codes.reshape(weights.shape)


def encode_weights(weights: Tensor, codebook: Tensor, codes: Tensor) -> CompressedWeights:
    r"""
    Code quantized weights: Huffman codes for values and for the gaps between weights not zero.

    The codes are canonical Huffman codes made and written by the library ``bitarray``, so the size
    is that of bits that decode, not an estimate. Where a bit for each place is shorter than the
    gaps, that is used; where no weight is zero, neither.

    Args:

        weights (Tensor): The layer's weights; zeros are not stored.
        codebook (Tensor): Shape (clusters,), from :func:`kmeans_quantize`.
        codes (Tensor): Codebook indices of the weights that are not zero, in their order.

    Returns:
        *CompressedWeights*.

    Raises:
        ValueError: There is not one code for each weight that is not zero.
        ImportError: bitarray, of the extra ``prune``, is not installed.
    """
    present = weights.detach().cpu().flatten() != 0
    if codes.numel() != int(present.sum()) or not len(codes):
        raise ValueError(
            f"{codes.numel()} codes for {int(present.sum())} weights that are not zero; expected "
            "one each, and at least one."
        )
    places = present.nonzero()[:, 0]
    gaps = bitmap = None
    if len(places) < len(present):
        steps = torch.cat([places[:1] + 1, places.diff()])
        gaps = _huffman(steps.tolist())
        if _coded_bytes(gaps, len(present)) >= -(-len(present) // 8):
            gaps, bitmap = None, _bitarray().bitarray(present.tolist())
    return CompressedWeights(
        tuple(weights.shape), weights.dtype, codebook, _huffman(codes.tolist()), gaps, bitmap
    )


@arguments_checked
@torch.inference_mode(False)
def compress_layer(
    model: nn.Module,
    layer: nn.Module | str,
    example_inputs: ExampleInputs,
    *,
    clusters: int = 32,
    sparsity: float | None = None,
    original: nn.Module | None = None,
    dataloader: Dataloader | None = None,
    seed: int = 0,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> CompressedLayer:
    r"""
    Compress a layer's weights and report what it saves, against the layer of another model if given.

    With ``prune_filters`` before it, the combined compression of Abbasi-Asl and Yu: filters
    removed by accuracy, then weights by magnitude, then values shared and everything coded (Han et
    al., *Deep Compression*, 2016, https://arxiv.org/abs/1510.00149). Weights that are zero already,
    from :func:`magnitude_prune` and training after it for example, stay zero.

    Args:

        model (nn.Module): The model; it is not changed.
        layer (nn.Module or str): A layer with weights, or its dotted name.
        example_inputs (Tensor or tuple): A batch, to count the layer's positions.
        clusters (int): Values that weights may have; 32 is 5 bits before coding.
                    Default: 32
        sparsity (float, optional): Share of the weights to make zero now.
                    Default: None
        original (nn.Module, optional): The model before filters were removed, to compare with.
                    Default: None (``model``)
        dataloader (iterable, optional): Batches of (images, labels) to measure accuracy on.
                    Default: None
        seed (int): Seed of the quantization.
                    Default: 0
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar over the batches.
                    Default: True

    Returns:
        *CompressedLayer*.

    Raises:
        ValueError: The layer has no weights, no weight is left, or a number is out of range.
        ImportError: The extra ``prune`` is not installed.

    Examples::

        >>> import torch
        >>> from captum_classfilters.pruning import compress_layer
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.Flatten())
        >>> compressed = compress_layer(net, "0", torch.rand(1, 8, 3, 3), clusters=8, sparsity=0.75)
        >>> compressed.report.weights
        (4608, 1152)
        >>> torch.equal(compressed.weights.to_dense(), compressed.model[0].weight)
        True
    """

    check_read_again(dataloader)
    name = name_of(model, layer)
    first = model if original is None else original
    reference = _weighted(first, name)
    small = magnitude_prune(model, name, sparsity) if sparsity is not None else copied(model)
    module = _weighted(small, name)
    if is_masked(module):
        prune.remove(module, "weight")
    weight = module.weight.detach()
    present = weight != 0
    codebook, codes = kmeans_quantize(weight[present].cpu(), clusters, seed)
    coded = encode_weights(weight, codebook, codes)
    with torch.no_grad():
        module.weight.copy_(coded.to_dense())
    bias = _bytes(module.bias)
    accuracy = None
    if dataloader is not None:
        before, after = (
            evaluate_classifier(network, dataloader, unpack=unpack, show_progress=show_progress)
            for network in (first, small)
        )
        accuracy = before.accuracy, after.accuracy
    report = CompressionReport(
        layer=name,
        filters=(_filters(reference), _filters(module)),
        weights=(reference.weight.numel(), int(present.sum())),
        multiply_adds=(
            reference.weight.numel() * _positions(first, name, example_inputs),
            int(present.sum()) * _positions(small, name, example_inputs),
        ),
        bytes=(_bytes(reference.weight) + _bytes(reference.bias), coded.num_bytes + bias),
        code_bytes=coded.code_bytes,
        index_bytes=coded.index_bytes,
        codebook_bytes=coded.codebook_bytes,
        bias_bytes=bias,
        accuracy=accuracy,
    )
    return CompressedLayer(small, coded, report)


def _weighted(model: nn.Module, name: str) -> nn.modules.conv._ConvNd | nn.Linear:
    check_sizes(model)
    module = find_layer(model, name)
    check_not_quantized(
        module, f"The layer {name!r} ({type(module).__name__})", "Compress the floating-point layer"
    )
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        raise ValueError(
            f"The layer {name!r} is {kind_of(module)}; expected a convolution or a linear "
            "layer, whose weights can be compressed."
        )
    reason = computed_weight(model, module, name, may_be_masked=True)
    if reason:
        raise ValueError(f"The next run would undo a compression of {name!r}: {reason}.")
    return module


def _filters(module: nn.modules.conv._ConvNd | nn.Linear) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _positions(model: nn.Module, name: str, example_inputs: ExampleInputs) -> int:
    """Positions of one image at which a layer's weights are used."""
    positions: list[int] = []
    inputs = inputs_of(model, example_inputs)

    def note(layer: Any, arguments: ModelInputs, output: Tensor) -> None:
        transposed = getattr(layer, "transposed", False)
        maps = arguments[0] if transposed else output
        width = layer.in_channels if transposed else _filters(layer)
        positions.append(maps.numel() // len(inputs[0]) // width)

    with (
        model_left_as_found(model, evaluation=True),
        torch.no_grad(),
        hooked([find_layer(model, name)], note),
    ):
        model(*inputs)
    check_runs(name, len(positions))
    return positions[0]


# -- Huffman codes, made and written by bitarray --------------------------------------------------


def _bitarray() -> ModuleType:
    extra("bitarray.util", "encode_weights")
    return extra("bitarray", "encode_weights")


def _huffman(symbols: list[int]) -> _Coder:
    library = _bitarray()
    values, counts = torch.tensor(symbols).unique(return_counts=True)
    frequency = dict(zip(values.tolist(), counts.tolist(), strict=True))
    codes, lengths, order = library.util.canonical_huffman(frequency)
    bits = library.bitarray()
    bits.encode(codes, symbols)
    return bits, lengths, order


def _decoded(coder: _Coder) -> list[int]:
    decode: Callable[..., Iterable[int]] = _bitarray().util.canonical_decode
    return list(decode(*coder))


def _coded_bytes(coder: _Coder, largest: int) -> int:
    """Bytes of the bits, and of a table: a symbol and the length of its code for each symbol."""
    bits, _lengths, symbols = coder
    wide = max(1, (int(largest).bit_length() + 7) // 8)
    return -(-len(bits) // 8) + len(symbols) * (wide + 1)
