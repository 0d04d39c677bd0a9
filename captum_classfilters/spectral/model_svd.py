"""The singular directions of all layers of a model, computed when asked for."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.layers import (
    find_layer,
    layer_name,
    named_layers,
    plain_name,
    unwrapped,
)
from captum_classfilters._core.linear_maps import why_not_its_weight
from captum_classfilters._core.names import counted, hint
from captum_classfilters._core.tables import Row, Table, Tabular
from captum_classfilters._core.tensor_files import Schema, read_tensors, write_tensors
from captum_classfilters._core.warnings import warn
from captum_classfilters.spectral.layer_svd import LayerSVD, check_method, check_rank, matrix_svd
from captum_classfilters.spectral.routes import Method
from captum_classfilters.spectral.weight_matrix import (
    WeightMatrix,
    can_decompose,
    unfold,
    weight_matrix,
)

_FILE = Schema(
    "layer_svd", "captum_classfilters/layer_svd/1", 1, "LayerSVD", "decomposition", checked_from=2
)
Source = tuple[nn.Module, str | None]  # a module, and the part of it if not its weight


class ModelSVD(Tabular, Mapping[str, LayerSVD]):
    """Layer names and their decompositions; each is computed, or read, at its first use.

    Use :func:`model_svd` to make one.

    Args:

        model (nn.Module): The model.
        sources (mapping): Layer names and where their weights are.
        options (mapping): ``rank``, ``method`` and ``right`` of :func:`layer_svd`.
        cache (path, optional): Folder of decompositions on disk.
        skipped (mapping, optional): Convolutions and linear layers that are left out, and why.
                    Default: None
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Source],
        options: tuple[int | None, Method, bool],
        cache: Path | None,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.skipped = dict(skipped or {})
        self.rank, self.method, self.right = options
        self.cache = cache
        self._sources = dict(sources)
        self._kept: dict[str, LayerSVD] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, name: str) -> LayerSVD:
        self._source(name)
        if name not in self._kept:
            self._kept[name] = self._decomposed(name)
        return self._kept[name]

    def _source(self, name: str) -> Source:
        """Where a layer's weight is; the error says why there is none."""
        known = isinstance(name, str)
        if known and name in self._sources:
            return self._sources[name]
        if known and name in self.skipped:
            raise KeyError(f"{name!r} was skipped: {self.skipped[name]}.")
        raise KeyError(f"{name!r} is not among the layers. {hint(name, list(self._sources))}")

    def __repr__(self) -> str:
        parts = [
            f"{counted(len(self), 'layer')} of {type(self.model).__name__}",
            f"{len(self._kept)} decomposed",
        ]
        parts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        return f"ModelSVD({', '.join(parts)})"

    def _tables(self) -> list[Table]:
        rows = []
        for name in self:
            groups, height, width = self.matrix(name).matrices.shape
            route = self._kept[name].route if name in self._kept else ""
            row: Row = {"layer": name, "groups": groups, "rows": height, "columns": width}
            rows.append(row | {"decomposed by": route})
        notes = [f"{name} was skipped: {reason}." for name, reason in self.skipped.items()]
        return [Table(rows, notes=notes, index="layer", most=None)]

    def module(self, name: str) -> nn.Module:
        """The module that holds a layer's weight.

        Args:

            name (str): One of the names.

        Returns:
            *nn.Module*.
        """
        return self._source(name)[0]

    def held(self, name: str) -> LayerSVD | None:
        """A layer's decomposition if it is in memory already.

        Args:

            name (str): One of the names.

        Returns:
            *LayerSVD* or None.
        """
        return self._kept.get(name)

    def matrix(self, name: str, module: nn.Module | None = None) -> WeightMatrix:
        """The unfolded weight of a layer, a view where possible.

        Args:

            name (str): One of the names.
            module (nn.Module, optional): Read it from another module of the same kind.

        Returns:
            *WeightMatrix*.
        """
        own, part = self._source(name)
        module = own if module is None else module
        if part is None:
            return weight_matrix(module, name)
        assert isinstance(module, nn.MultiheadAttention)
        return unfold(_projection(module, part), "linear", 1, f"The projection {name!r}")

    def routes(self) -> dict[str, str]:
        """How each layer decomposed so far was decomposed.

        Returns:
            *dict* of layer names and routes; ``", from disk"`` follows those read from the cache.
        """
        return {name: svd.route for name, svd in self._kept.items()}

    def forget(self, name: str | None = None) -> None:
        """Drop a decomposition, or all of them, from memory; the cache on disk stays.

        Args:

            name (str, optional): Which; by default all.
        """
        if name is None:
            self._kept.clear()
        else:
            self._kept.pop(name, None)

    def _decomposed(self, name: str) -> LayerSVD:
        weight = self.matrix(name)
        # Layers differ in size, so one rank for a model is an upper bound.
        rank = None if self.rank is None else min(self.rank, *weight.matrices.shape[1:])
        if self.cache is None:
            return matrix_svd(weight, repr(name), rank, self.method, self.right)
        options = {"rank": rank, "method": self.method, "right": self.right}
        path = self.cache / f"{_key(weight, options)}.safetensors"
        try:
            return _read(path, weight, rank, self.right)
        except FileNotFoundError:
            pass
        except (ValueError, OSError) as error:
            warn(f"{error} The layer {name!r} is decomposed again.")
        svd = matrix_svd(weight, repr(name), rank, self.method, self.right)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            _write(path, svd)
        except (ValueError, OSError) as error:  # what was computed is not lost
            warn(f"The decomposition of {name!r} was not kept: {str(error).rstrip('.')}.")
        return svd


@arguments_checked
def model_svd(
    model: nn.Module,
    layers: Sequence[str | nn.Module] | None = None,
    *,
    rank: int | None = None,
    method: Method = "auto",
    right: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> ModelSVD:
    r"""
    The decompositions of all convolutions and linear layers of a model, layer by layer when asked.

    No class of model is known by name. The query, key and value projections of a
    ``MultiheadAttention`` are parameters, not layers; they are listed as ``"<name>.query"``,
    ``"<name>.key"`` and ``"<name>.value"``, three linear layers that share their input, beside its
    ``"<name>.out_proj"``. They have spectra, but no output of their own to take signals from. Layers
    whose own forward computes another map than their weight's are in ``skipped``, with the reason.

    Args:

        model (nn.Module): The model; it is only read.
        layers (sequence, optional): The layers wanted, or their dotted names, in this order; by
                    default all, in the order in which the model lists them.
        rank (int, optional): As for :func:`layer_svd`; layers with fewer directions give all they
                    have.
                    Default: None
        method (str): As for :func:`layer_svd`.
                    Default: "auto"
        right (bool): Also keep the right vectors. Signals need the left ones only.
                    Default: False
        cache (path, optional): A folder in which decompositions are kept, each under the SHA-256 of
                    its weight and options: a changed weight is decomposed again, an unchanged one is
                    read, whatever its layer is called.
                    Default: None

    Returns:
        *ModelSVD*: A mapping from layer names to :class:`LayerSVD`.

    Raises:
        ValueError: A layer is unknown or cannot be decomposed, or the model has none that can.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import model_svd
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 2))
        >>> svds = model_svd(net)
        >>> list(svds), svds["3"].left.shape
        (['0', '3'], torch.Size([2, 2]))
        >>> svds.routes()
        {'3': 'direct'}
    """
    check_method(method)
    if rank is not None:
        check_rank(rank, None, "any layer")
    sources, skipped = _sources(model)
    if not sources:
        reasons = "".join(f" {name!r}: {reason}." for name, reason in skipped.items())
        raise ValueError(
            f"The model {type(model).__name__} has no convolution or linear layer to decompose.{reasons}"
        )
    if layers is not None:
        sources, skipped = _chosen(model, layers, sources), {}
    folder = None if cache is None else Path(cache)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"cache={str(cache)!r} is a file; expected a folder, which may be new.")
    return ModelSVD(model, sources, (rank, method, right), folder, skipped)


def _sources(model: nn.Module) -> tuple[dict[str, Source], dict[str, str]]:
    """Where each decomposable weight of a model is, and why others are not decomposable."""
    sources: dict[str, Source] = {}
    skipped: dict[str, str] = {}
    for full_name, module in unwrapped(model).named_modules():
        name = plain_name(full_name)
        if can_decompose(module):
            called = name or type(module).__name__
            reason = why_not_its_weight(module)
            if reason is None:
                sources[called] = (module, None)
            else:
                skipped[called] = reason
        elif isinstance(module, nn.MultiheadAttention):
            for part in ("query", "key", "value"):
                sources[f"{name}.{part}" if name else part] = (module, part)
    return sources, skipped


def _chosen(
    model: nn.Module, layers: Sequence[str | nn.Module], sources: dict[str, Source]
) -> dict[str, Source]:
    """Those of the wanted layers, in their order."""
    if isinstance(layers, (str, nn.Module)) or not layers:
        told = "empty" if layers == [] else f"{layers!r}"
        raise ValueError(f"layers={told}; pass a list of layers or names, or None for all.")
    chosen, named = {}, named_layers(model)
    for layer in layers:
        name = layer if isinstance(layer, str) else layer_name(model, layer)
        if name not in named and name not in sources:  # with names of wrappers, if it is one
            name = layer_name(model, find_layer(model, name))
        if name not in sources:
            weight_matrix(find_layer(model, name), name)  # says what is wrong with it
            sources[name] = (find_layer(model, name), None)  # a second name of a shared layer
        chosen[name] = sources[name]
    return chosen


def _projection(attention: nn.MultiheadAttention, part: str) -> Tensor:
    if attention.in_proj_weight is not None:
        parts = attention.in_proj_weight.detach().chunk(3)
        return parts[("query", "key", "value").index(part)]
    separate: Tensor = getattr(attention, f"{part[0]}_proj_weight")
    return separate.detach()


def _key(weight: WeightMatrix, options: Mapping[str, object]) -> str:
    """SHA-256 of a weight's bytes and of everything else that decides its decomposition."""
    digest = hashlib.sha256(_FILE.name.encode())
    shape = (tuple(weight.matrices.shape), weight.folded, weight.kind, str(weight.matrices.dtype))
    digest.update(json.dumps([shape, options], sort_keys=True).encode())
    for matrix in weight.matrices:
        plain = matrix.cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy())  # no second copy of the weight
    return digest.hexdigest()


def _write(path: Path, svd: LayerSVD) -> None:
    tensors = {"blocks": svd.blocks, "values": svd.values}
    if svd.right is not None:
        tensors["right"] = svd.right
    details = {"kind": svd.kind, "columns": svd.columns, "route": svd.route}
    write_tensors(path, _FILE, tensors, details)


def _read(path: Path, weight: WeightMatrix, rank: int | None, right: bool) -> LayerSVD:
    """A stored decomposition of a weight.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or not one of this weight.
    """
    stored = read_tensors(path, _FILE)
    groups, rows, columns = weight.matrices.shape
    each = min(rows, columns) if rank is None else rank
    kind, number = stored.value("kind", str), stored.value("columns", int)
    route = stored.value("route", str)
    if (kind, number) != (weight.kind, columns):
        stored.refuse(f"it is of a {kind} with {number} columns, not {weight.kind}, {columns}.")
    dtype = weight.matrices.dtype if weight.matrices.dtype == torch.float64 else torch.float32
    shapes: dict[str, tuple[int, ...]] = {
        "blocks": (groups, rows, each),
        "values": (groups * each,),
    }
    if right:
        shapes["right"] = (groups * each, *weight.folded)
    parts = {name: stored.tensor(name, dtype, shape) for name, shape in shapes.items()}
    with stored.building():
        if not all(bool(tensor.isfinite().all()) for tensor in parts.values()):
            raise ValueError("it holds NaN or Inf.")
        if bool((parts["values"] < 0).any()):
            raise ValueError("singular values are negative.")
    placed = {name: tensor.to(weight.matrices.device) for name, tensor in parts.items()}
    blocks, values = placed["blocks"], placed["values"]
    return LayerSVD(blocks, values, placed.get("right"), kind, columns, f"{route}, from disk")
