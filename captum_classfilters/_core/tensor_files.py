"""Safetensors files of tensors and a record in JSON: one writer and one reader for all that we keep.

Reading runs no code. A checksum covers record and tensors, so that damage is seen; files of versions that
wrote none are read without. Whatever is wrong with a file is a ValueError that names it.
"""

import hashlib
import io
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from captum_classfilters._core.files import AnyPath, open_regular, write_atomically
from captum_classfilters._core.names import shortened
from captum_classfilters._core.types import JsonDict, Keywords

T = TypeVar("T")

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as every reader of safetensors has it
_LENGTH = struct.Struct("<Q")
_METADATA, _CHECKSUM = "__metadata__", "checksum"
_REQUIRED = object()


@dataclass(frozen=True)
class Schema:
    """What a kind of file is called.

    Args:

        key (str): Where its record is in the file's metadata.
        name (str): What the record says that it is.
        version (int): The newest version that is read.
        kind (str): What messages call it: a file of this kind ...
        noun (str): ... holds such a thing.
        nameless (bool): Its first version did not say what it is.
                    Default: False
        checked_from (int): The version from which on every file has a checksum.
                    Default: 1
    """

    key: str
    name: str
    version: int
    kind: str
    noun: str
    nameless: bool = False
    checked_from: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.noun}"


# -- writing ---------------------------------------------------------------------------------------


def write_tensors(
    path: AnyPath,
    schema: Schema,
    tensors: Mapping[str, Tensor],
    details: JsonDict,
    version: int | None = None,
    overwrite: bool = True,
) -> tuple[int, ...]:
    r"""
    Write tensors and a record, whole or not at all.

    Args:

        path (path): Where.
        schema (Schema): The kind of file.
        tensors (mapping): Tensors of any place, layout in memory and type that safetensors has.
        details (dict): What JSON can hold.
        version (int, optional): The oldest version that can hold it; by default the schema's.
        overwrite (bool): Replace a file that is there.
                    Default: True

    Returns:
        *tuple*: The new file's identity, as of ``files.identity``.

    Raises:
        FileExistsError: There is one, and it is not to be replaced.
        ValueError: A tensor, a name or a detail is none that the format has.
        OSError: The file cannot be written; nothing has changed.
    """
    # That there is a checksum is said in what the checksum covers, so that it cannot get lost.
    record = {
        "schema": schema.name,
        "schema_version": version or schema.version,
        **details,
        _CHECKSUM: "sha256",
    }
    try:
        text = json.dumps(record)
    except RecursionError as error:
        raise ValueError("The record is nested too deeply for JSON.") from error
    except TypeError as error:
        raise ValueError(f"The record holds what JSON cannot: {error}.") from error
    # Large items first, so that every tensor lies at a multiple of its own size.
    plain = {
        name: _plain(name, tensor)
        for name, tensor in sorted(
            tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
        )
    }
    metadata = {schema.key: text, _CHECKSUM: checksum(schema.key, text, plain)}
    header: JsonDict = {_METADATA: metadata}
    end = 0
    for name, tensor in plain.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _LONGEST_HEADER:
        raise ValueError(
            f"The record has {len(encoded):,} bytes; a safetensors file holds {_LONGEST_HEADER:,}."
        )
    start_of_file = [_LENGTH.pack(len(encoded)), encoded]
    return write_atomically(path, chain(start_of_file, map(_bytes, plain.values())), overwrite)


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it lies in a file."""
    if tensor.layout != torch.strided or tensor.dtype not in _CODES or tensor.is_meta:
        raise ValueError(
            f"The tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; files hold "
            f"dense tensors of {', '.join(_NAMES[code] for code in DTYPES)}."
        )
    if name == _METADATA or not name.isprintable():
        raise ValueError(f"A tensor cannot be called {name!r} in a file; rename it.")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def checksum(key: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a record and all that tensors are."""
    digest = hashlib.sha256(json.dumps([key, text]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, _CODES[tensor.dtype], list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


# -- reading ---------------------------------------------------------------------------------------


@dataclass
class Stored:
    """What a file holds, to be taken part by part and checked.

    Args:

        path (path): The file.
        schema (Schema): Its kind.
        version (int): The version that it was written in.
        details (dict): The record.
        tensors (dict): The tensors.
    """

    path: AnyPath
    schema: Schema
    version: int
    details: JsonDict
    tensors: dict[str, Tensor]
    _taken: set[str] = field(default_factory=set)

    def refuse(self, reason: str) -> NoReturn:
        """Raise a ValueError that names the file."""
        raise ValueError(f"{self.path} is no valid {self.schema.kind} file: {reason}")

    @contextmanager
    def building(self) -> Iterator[None]:
        """A block whose ValueErrors name the file, once all parts are seen to be taken."""
        left = [name for name in (*self.details, *self.tensors) if name not in self._taken]
        if left:
            known = f"{self.schema.kind} files of schema version {self.version}"
            self.refuse(f"it holds {', '.join(map(repr, left[:5]))}, which {known} do not have.")
        try:
            yield
        except ValueError as error:
            self.refuse(str(error))
        except Exception as error:  # what parts make of each other that nobody wrote together
            self.refuse(f"its parts do not fit each other ({type(error).__name__}: {error}).")

    def value(self, name: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """A part of the record, of a type; true and false are no numbers."""
        if name not in self.details and default is not _REQUIRED:
            return default
        value = self._part(self.details, name)
        if not _is(value, kind):
            self.refuse(f"{name} is {shortened(value)}; expected a value of type {kind.__name__}.")
        return value

    def values(self, name: str, kind: type[T], default: Any = _REQUIRED) -> list[T]:
        """A list in the record, of values of a type."""
        values = self.value(name, list, default)
        for value in values:
            if not _is(value, kind):
                self.refuse(
                    f"{name} holds {shortened(value)}; expected type {kind.__name__} alone."
                )
        return values

    def tensor(self, name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> Tensor:
        """A tensor of a type and a shape, in which None stands for any size."""
        tensor = self._part(self.tensors, name)
        fits = tensor.dim() == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            self.refuse(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} of shape "
                f"({wanted})."
            )
        return tensor

    def optional_tensor(
        self, name: str, dtype: torch.dtype, shape: Sequence[int | None]
    ) -> Tensor | None:
        """The same of a tensor that need not be there."""
        return self.tensor(name, dtype, shape) if name in self.tensors else None

    def all_tensors(self) -> dict[str, Tensor]:
        """All tensors, whatever they are."""
        self._taken.update(self.tensors)
        return dict(self.tensors)

    def _part(self, parts: Keywords, name: str) -> Any:
        if name not in parts:
            raise ValueError(f"{self.path} lacks parts of a {self.schema}: {name!r}.")
        self._taken.add(name)
        return parts[name]


def read_tensors(path: AnyPath, schema: Schema) -> Stored:
    r"""
    Read a file of :func:`write_tensors`, or one of earlier versions, which have no checksum.

    Args:

        path (path): The file.
        schema (Schema): The kind that is expected.

    Returns:
        *Stored*.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another kind, or of a newer version.
    """
    with open_regular(path) as file:
        try:
            header, metadata = _header(file)
            text = metadata.get(schema.key)
            if text is not None:
                tensors = _tensors(file, header)
        except ValueError as error:
            raise ValueError(f"{path} is not a complete {schema.kind} file: {error}") from error
    if text is None:
        held = shortened(list(metadata)) if metadata else "nothing"
        raise ValueError(
            f"{path} is a safetensors file, but does not hold a {schema}: its metadata name {held}."
        )
    try:
        details = _parsed(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a complete {schema.kind} file: {error}") from error
    version = _version(path, schema, details)
    try:
        _verify(metadata, schema, version, details, tensors)
    except ValueError as error:
        raise ValueError(f"{path} is not a complete {schema.kind} file: {error}") from error
    return Stored(path, schema, version, details, tensors)


def read_any_tensors(path: AnyPath) -> dict[str, Tensor]:
    """All tensors of another program's safetensors file, in the order of its header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or no safetensors file.
    """
    with open_regular(path) as file:
        try:
            header, _ = _header(file)
            return _tensors(file, header)
        except ValueError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _header(file: io.BufferedReader) -> tuple[list[_Entry], dict[str, str]]:
    """What the start of a file says of its tensors, and its metadata."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size < _LENGTH.size:
        raise ValueError(f"it has {size} bytes, which is too short for a safetensors file.")
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    if length > min(_LONGEST_HEADER, size - _LENGTH.size):
        raise ValueError(
            f"its first 8 bytes announce a header of {length:,} bytes, but it has {size:,} in all; it is "
            "cut off, or no safetensors file."
        )
    header = _parsed(file.read(length).decode())
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not names and texts.")
    entries = sorted(
        (_entry(name, entry) for name, entry in header.items()),
        key=lambda entry: (entry.start, entry.end),
    )
    place = 0
    for entry in entries:
        if entry.start != place:
            raise ValueError(f"the tensor {entry.name!r} begins at {entry.start}, not at {place}.")
        place = entry.end
    available = size - _LENGTH.size - length
    if place != available:
        raise ValueError(f"its tensors need {place:,} bytes, but {available:,} follow the header.")
    order = {name: place for place, name in enumerate(header)}
    return sorted(entries, key=lambda entry: order[entry.name]), metadata


def _entry(name: str, entry: object) -> _Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {name!r} is described by {shortened(entry)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"the tensor {name!r} is of type {shortened(dtype)}; known are {', '.join(DTYPES)}."
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the tensor {name!r} is described by {shortened(entry)}.")
    start, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise ValueError(
            f"the tensor {name!r} of shape {tuple(shape)} and type {dtype} needs {needed:,} bytes, not "
            f"{end - start:,}."
        )
    return _Entry(name, DTYPES[dtype], tuple(shape), start, end)


def _sizes(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(
            isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63
            for size in value
        )
    )


def _tensors(file: io.BufferedReader, entries: Sequence[_Entry]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own."""
    start_of_data = file.tell()
    tensors = {}
    for entry in entries:
        file.seek(start_of_data + entry.start)
        size = entry.end - entry.start
        try:
            raw = torch.empty(size, dtype=torch.uint8, device="cpu")
            tensor = raw.view(entry.dtype).reshape(entry.shape)
        except (RuntimeError, MemoryError) as error:  # no memory for it, or for its strides
            raise ValueError(
                f"the tensor {entry.name!r} has shape {entry.shape}: {error}"
            ) from error
        if size and file.readinto(raw.numpy().data) != size:
            raise ValueError("it became shorter while it was read.")
        if entry.dtype == torch.bool and bool((raw > 1).any()):
            raise ValueError(f"the tensor {entry.name!r} holds what is neither true nor false.")
        tensors[entry.name] = tensor
    return tensors


def _parsed(text: str) -> JsonDict:
    """An object in JSON, no name of it twice."""

    def once(pairs: list[tuple[str, Any]]) -> JsonDict:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name stands twice in its JSON.")
        return names

    try:
        value = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply.") from error
    if not isinstance(value, dict):
        raise ValueError(f"its JSON is {shortened(value)}; expected an object.")
    return value


def _verify(
    metadata: Mapping[str, str],
    schema: Schema,
    version: int,
    details: JsonDict,
    tensors: Mapping[str, Tensor],
) -> None:
    """Compare the checksum, where there is or was one."""
    key = schema.key
    if unknown := [name for name in metadata if name not in (key, _CHECKSUM)]:
        raise ValueError(f"its metadata hold {shortened(unknown[0])} beside {key!r}.")
    announced = details.pop(_CHECKSUM, None)
    if _CHECKSUM not in metadata and announced is None and version < schema.checked_from:
        return
    if metadata.get(_CHECKSUM) != checksum(key, metadata[key], tensors):
        raise ValueError(
            "its checksum is not that of its contents; it was damaged or changed after it was written."
        )


def _version(path: AnyPath, schema: Schema, details: JsonDict) -> int:
    name, version = details.pop("schema", None), details.pop("schema_version", 1)
    if name != schema.name and not (schema.nameless and name is None and version == 1):
        raise ValueError(
            f"{path} is a safetensors file, but does not hold a {schema}: it says {shortened(name)} and not "
            f"{schema.name!r}."
        )
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"{path} is not a complete {schema.kind} file: its schema version is {shortened(version)}."
        )
    if version > schema.version:
        raise ValueError(
            f"{path} has schema version {version}; this version of captum_classfilters reads up to "
            f"{schema.version}. Please upgrade."
        )
    return version


def _is(value: object, kind: type) -> bool:
    """Whether a value from JSON is of a type; true is no number, and 1 is one with a fraction."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
