"""Where a result comes from."""

import hashlib
from datetime import datetime, timezone
from typing import Any

import captum
import torch
from torch import nn

from captum_classfilters._core.layers import unwrapped
from captum_classfilters._version import __version__


def fingerprint(model: nn.Module | None) -> str | None:
    """SHA-256 over the names, shapes and bytes of a model's parameters and buffers."""
    if model is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous()
        if plain.numel():
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Provenance:
    """Records of one run; a model's fingerprint is computed once for all of them."""

    def __init__(self) -> None:
        self._fingerprints: dict[int, str | None] = {}

    def of(self, model: nn.Module | None, **details: Any) -> dict[str, Any]:
        """Versions, the model's class and fingerprint, the time, and any details given."""
        plain = None if model is None else unwrapped(model)
        if id(plain) not in self._fingerprints:
            self._fingerprints[id(plain)] = fingerprint(plain)
        return {
            "captum_classfilters": __version__,
            "captum": captum.__version__,
            "torch": str(torch.__version__),
            "model": None if plain is None else type(plain).__name__,
            "model_sha256": self._fingerprints[id(plain)],
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **details,
        }


def provenance(model: nn.Module | None, **details: Any) -> dict[str, Any]:
    """One such record."""
    return Provenance().of(model, **details)
