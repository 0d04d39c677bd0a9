"""The pretended device computes what the CPU does, refuses what an accelerator does, and counts reads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import deep, images
from tests.pretend_device import DeviceTensor, host_reads, pretend

KINDS = ("cuda", "meta")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_the_numbers_of_the_cpu(kind):
    expected = deep()(images())
    with pretend(kind) as device, torch.no_grad():
        model = deep().to(device)
        outputs = model(images().to(device))
        assert outputs.device.type == kind
        assert all(isinstance(p, nn.Parameter) and p.device == device for p in model.parameters())
        assert all(buffer.device == device for buffer in model.buffers())
        torch.testing.assert_close(outputs.cpu(), expected)
        assert type(outputs.cpu()) is Tensor
        assert next(model.cpu().parameters()).device.type == "cpu"
    assert not torch.cuda.is_initialized()
    assert type(torch.zeros(2)) is Tensor


def test_gradients_on_the_kind_that_has_them():
    x = images().requires_grad_()
    expected = torch.autograd.grad(deep()(x)[:, 1].sum(), x)[0]
    with pretend("meta") as device:
        on_device = images().to(device).requires_grad_()
        gradient = torch.autograd.grad(deep().to(device)(on_device)[:, 1].sum(), on_device)[0]
        assert gradient.device == device
    torch.testing.assert_close(gradient.cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: here * there.sum(),
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: F.linear(there, here),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there.index_add_(0, torch.tensor([0, 1]), there),
        lambda there, here: there.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda there, here: here[there[:, 0].long()],
        lambda there, here: there.__setitem__(torch.tensor([0, 1]), here),
        lambda there, here: there.add_(here),
        lambda there, here: torch.rand(2, device=there.device, generator=torch.Generator()),
    ],
)
def test_what_an_accelerator_refuses(kind, mix):
    with pretend(kind) as device:
        there, here = torch.zeros(2, 3, device=device), torch.ones(2, 3)
        with pytest.raises(RuntimeError, match=r"on the same device|generator"):
            mix(there, here)
        with pytest.raises(TypeError, match="no NumPy form"):
            there.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_accelerator_allows(kind):
    with pretend(kind) as device:
        there = torch.arange(6.0, device=device).reshape(2, 3)
        assert (there * torch.tensor(2.0)).device == device  # a single number of the CPU
        assert there[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]  # an index of the CPU
        here = torch.zeros(2, 3)
        here.copy_(there)
        there.copy_(here + 1)
        assert there[1].tolist() == [4.0, 5.0, 6.0]
        made = [
            torch.tensor([1, 2], device=device),
            torch.as_tensor([1.0], device=device),
            there.new_tensor([1.0]),
            there.new_zeros(2),
            torch.empty_like(there),
            torch.eye(2, device=device),
        ]
        assert all(isinstance(tensor, DeviceTensor) for tensor in made)
        assert torch.as_tensor(here).device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_views_copies_and_versions(kind):
    with pretend(kind) as device:
        tensor = torch.zeros(2, 3, device=device)
        version = tensor._version
        row = tensor[0]
        assert row.data_ptr() == tensor.data_ptr() != tensor[1].data_ptr()
        row += 1
        assert tensor.tolist() == [[1, 1, 1], [0, 0, 0]]
        assert tensor._version > version
        layer = nn.Linear(3, 2).to(device)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.zero_()
        assert isinstance(twin.weight, nn.Parameter)
        assert float(layer.weight.detach().abs().sum()) > 0


@pytest.mark.parametrize(
    ("read", "operation"),
    [
        (lambda x: bool((x > 0).any()), "item"),
        (lambda x: x.sum().item(), "item"),
        (lambda x: [0, 1, 2][x[0].long()], "item"),
        (lambda x: torch.allclose(x, x), "allclose"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x.to("cpu", torch.float64), "copy to the host"),
        (lambda x: torch.zeros(3).copy_(x), "copy to the host"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.where(x > 0), "nonzero"),
        (lambda x: x[x > 0], "indexing with a mask"),
        (
            lambda x: x.__setitem__(x > 0, 1.0),
            None,
        ),  # written by `masked_fill_`, which need not wait
        (lambda x: x.__setitem__(x > 0, -x[1:]), "indexing with a mask"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.unique(), "unique"),
        (lambda x: torch.bincount(x.long()), "bincount"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
    ],
)
def test_reads_of_the_host_are_noted_with_their_line(read, operation):
    with pretend() as device:
        x = torch.arange(3.0, device=device)
        assert not host_reads
        read(x)
    names = [line.split(" in ")[0] for line in host_reads]
    assert names == ([] if operation is None else [operation])
    assert all(__file__ in line for line in host_reads)


def test_work_on_the_device_reads_nothing():
    with pretend() as device, torch.no_grad():
        model, x = deep().to(device), images().to(device)
        for _ in range(2):
            outputs = model(x)
            torch.where(outputs > 0, outputs, 0.0).sum(0).argsort()
            torch.zeros(3, device=device).index_add_(0, outputs.argmax(1), outputs[:, 0])
    assert host_reads == []
