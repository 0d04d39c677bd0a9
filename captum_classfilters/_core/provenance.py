"""Where a result comes from."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone

import captum
import torch
from torch import nn

from captum_classfilters._core.devices import device_of
from captum_classfilters._core.guard import check_sizes
from captum_classfilters._core.layers import unwrapped
from captum_classfilters._core.types import JsonDict
from captum_classfilters._version import __version__

_CHUNK = 64 * 2**20  # bytes that travel from a device at once


def fingerprint(model: nn.Module | None) -> str | None:
    """SHA-256 over the names, shapes and bytes of a model's parameters and buffers."""
    if model is None:
        return None
    check_sizes(model)
    device = device_of(model)
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return _digest(model)
    with torch.cuda.stream(torch.cuda.Stream(device)):  # beside the work of the device
        return _digest(model)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    headers: list[bytes] = []
    chunk: list[torch.Tensor] = []
    gathered = 0

    def add_chunk() -> None:
        """Fetch what has gathered, in one copy."""
        data = torch.cat(chunk).cpu() if chunk else torch.zeros(0, dtype=torch.uint8)
        for header, part in zip(headers, data.split([len(part) for part in chunk]), strict=True):
            digest.update(header)
            digest.update(part.numpy().data)
        headers.clear()
        chunk.clear()

    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if chunk and (chunk[0].device != tensor.device or gathered >= _CHUNK):
            add_chunk()
            gathered = 0
        headers.append(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        chunk.append(tensor.detach().contiguous().flatten().view(torch.uint8))
        gathered += len(chunk[-1])
    add_chunk()
    return digest.hexdigest()


class Provenance:
    """Records of one run; a model's fingerprint is computed once for all of them.

    Args:

        models (sequence): Models whose fingerprints are begun at once, beside the run itself.
    """

    def __init__(self, models: Sequence[nn.Module | None] = ()) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._fingerprints: dict[int, Future[str | None]] = {}
        for model in models:
            self._begin(model)

    def _begin(self, model: nn.Module | None) -> "Future[str | None] | None":
        if model is None:
            return None
        plain = unwrapped(model)
        if id(plain) not in self._fingerprints:
            self._fingerprints[id(plain)] = self._pool.submit(fingerprint, plain)
        return self._fingerprints[id(plain)]

    def of(self, model: nn.Module | None, **details: object) -> JsonDict:
        """Versions, the model's class and fingerprint, the time, and any details given."""
        future = self._begin(model)
        return {
            "captum_classfilters": __version__,
            "captum": captum.__version__,
            "torch": str(torch.__version__),
            "model": None if model is None else type(unwrapped(model)).__name__,
            "model_sha256": None if future is None else future.result(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **details,
        }


def provenance(model: nn.Module | None, **details: object) -> JsonDict:
    """One such record."""
    return Provenance().of(model, **details)
