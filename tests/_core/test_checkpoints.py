"""Weights of other programs: by content, without code, and none that an old PyTorch cannot read safely."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from captum_classfilters._core.checkpoints import is_safetensors, read_checkpoint, read_state_dict

STATE = {"module.weight": torch.arange(6.0).reshape(2, 3), "module.bias": torch.ones(2)}


def test_the_content_decides_and_not_the_name(tmp_path):
    for name, wrapper in (("a.pt", None), ("b.safetensors", None), ("c", "model_state_dict")):
        torch.save({wrapper: STATE, "epoch": 3} if wrapper else STATE, tmp_path / name)
        save_file(STATE, tmp_path / f"{name}2.pth")
        assert not is_safetensors(tmp_path / name)
        assert is_safetensors(tmp_path / f"{name}2.pth")
        for path in (tmp_path / name, tmp_path / f"{name}2.pth"):
            state = read_state_dict(path)
            assert set(state) == {"weight", "bias"}
            assert torch.equal(state["weight"], STATE["module.weight"])


@pytest.mark.parametrize("version", ["2.3.0", "2.6.0+cu124", "2.9.1", "2.10.0a0+git1", "2.10.0rc1"])
def test_old_versions_are_given_safetensors_alone(tmp_path, monkeypatch, version):
    """The reason is there, and what to do; the reader with the advisories is not called."""
    torch.save(STATE, tmp_path / "a.pt")
    save_file(STATE, tmp_path / "b.pt")
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", None)
    assert len(read_state_dict(tmp_path / "b.pt")) == 2
    with pytest.raises(ValueError, match=r"CVE-2025-32434.*Upgrade PyTorch, or convert") as raised:
        read_state_dict(tmp_path / "a.pt")
    assert f"PyTorch {version} must not" in str(raised.value)
    monkeypatch.undo()
    code = re.findall(r"safetensors\.torch\.save_file\((.*?), 'FILE", str(raised.value))
    save_file(eval(code[0], {"torch": torch, "FILE": tmp_path / "a.pt"}), tmp_path / "c")
    assert torch.equal(read_state_dict(tmp_path / "c")["bias"], STATE["module.bias"])


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "3.0"])
def test_newer_versions_read_both(tmp_path, monkeypatch, version):
    torch.save(STATE, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", version)
    assert len(read_state_dict(tmp_path / "a.pt")) == 2


class Evil:
    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


def test_no_code_runs(tmp_path):
    proof = tmp_path / "proof"
    torch.save({"weight": Evil(proof)}, tmp_path / "zip.pt")
    torch.save({"weight": Evil(proof)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Evil(proof)))
    np.save(tmp_path / "array.npy", np.array([Evil(proof)], dtype=object), allow_pickle=True)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"{path} is neither a safetensors file nor a PyTorch"):
            read_state_dict(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "held",
    [
        [1, 2],
        {"a": 1},
        {"a": None, "b": torch.ones(2)},
        {1: torch.ones(2)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"state_dict": [torch.ones(2)]},
    ],
)
def test_what_is_no_state_dict(tmp_path, held):
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt (does not hold a state dict|is neither)"):
        read_state_dict(tmp_path / "a.pt")


def test_absent_and_irregular_files(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint"):
        read_state_dict(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="is a folder; expected a file"):
        read_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")
