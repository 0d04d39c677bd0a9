"""Where a result comes from."""

import hashlib
from datetime import datetime, timezone
from typing import Any

import captum
import torch
from torch import nn

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


def provenance(model: nn.Module | None, **details: Any) -> dict[str, Any]:
    """Versions, the model's class and fingerprint, the time, and any details given."""
    return {
        "captum_classfilters": __version__,
        "captum": captum.__version__,
        "torch": str(torch.__version__),
        "model": type(model).__name__ if model is not None else None,
        "model_sha256": fingerprint(model),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **details,
    }
