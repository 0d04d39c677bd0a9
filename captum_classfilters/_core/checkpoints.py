"""Weights in files of other programs; no code runs from any of them."""

import torch
from torch import Tensor

from captum_classfilters._core.files import AnyPath, open_regular
from captum_classfilters._core.tensor_files import read_any_tensors

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_FIRST_SAFE = "2.10"


def read_checkpoint(path: AnyPath) -> object:
    r"""
    What a checkpoint holds: safetensors, or what ``torch.load`` reads with ``weights_only=True``.

    That option has public advisories for PyTorch before 2.10 (CVE-2025-32434, CVE-2026-24747): a file
    could run code in spite of it. Such versions are given safetensors files alone.

    Args:

        path (path): The file; its content decides, not its name.

    Returns:
        *object*: A dict of tensors, or for PyTorch's files whatever plain data were saved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or of another kind, or PyTorch is too old for it.
    """
    if is_safetensors(path):
        return read_any_tensors(path)
    if torch.torch_version.TorchVersion(torch.__version__) < _FIRST_SAFE:
        raise ValueError(
            f"{path} is no safetensors file, and PyTorch {torch.__version__} must not read others: before "
            f"{_FIRST_SAFE}, weights_only=True does not keep a file from running code (CVE-2025-32434, "
            "CVE-2026-24747). Upgrade PyTorch, or convert the file where a newer one is: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')."
        )
    try:
        with open_regular(path) as file:
            state: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the reader raise
        reason = str(error).split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is neither a safetensors file nor a PyTorch state dict: {reason}"
        ) from error
    return state


def is_safetensors(path: AnyPath) -> bool:
    """Whether a file is meant to be one: it begins with a length and an object in JSON.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file.
    """
    with open_regular(path) as file:
        return file.read(9)[8:] == b"{"


def read_state_dict(path: AnyPath) -> dict[str, Tensor]:
    """A model's parameters from a checkpoint; ``state_dict`` wrappers and ``module.`` prefixes are
    understood.

    Raises:
        ValueError: There is no such file, it is damaged, or holds something else.
    """
    try:
        state = read_checkpoint(path)
    except FileNotFoundError as error:
        raise ValueError(f"There is no checkpoint {path}.") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in state.items()
    ):
        raise ValueError(f"{path} does not hold a state dict of dense tensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_complex() or value.is_meta)
    )
