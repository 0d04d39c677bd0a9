"""The same images in any order have one fingerprint; others have another."""

import pytest
import torch

from captum_classfilters._core.data_fingerprint import DataFingerprint
from tests.pretend_device import pretend


def fingerprint(batches):
    found = DataFingerprint()
    for inputs, labels in batches:
        found.add(inputs if isinstance(inputs, tuple) else (inputs,), labels)
    return found.hexdigest()


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(23, 2, 5, 7), torch.arange(23) % 3


def test_order_and_batches_do_not_count(data):
    x, y = data
    expected = fingerprint([(x, y)])
    assert fingerprint(zip(x.split(4), y.split(4), strict=True)) == expected
    order = torch.randperm(23)
    assert fingerprint([(x[order], y[order])]) == expected
    assert fingerprint([(x.to(memory_format=torch.channels_last), y.int())]) == expected
    assert len(expected) == 64


def changed(x, y):
    """Other images, other labels, or others of one image."""
    for change in (
        lambda x, y: (x.flip(3), y),
        lambda x, y: (x.transpose(2, 3).contiguous().reshape(x.shape), y),
        lambda x, y: (x.roll(1, 1), y),
        lambda x, y: (x * 1.0001, y),
        lambda x, y: (x.double(), y),
        lambda x, y: (x.reshape(23, 2, 7, 5), y),
        lambda x, y: (x, (y + 1) % 3),
        lambda x, y: (x, y.roll(1)),
        lambda x, y: (x[:-1], y[:-1]),
        lambda x, y: (torch.cat([x, x[:1]]), torch.cat([y, y[:1]])),
        lambda x, y: (torch.cat([x[1:], x[1:2]]), torch.cat([y[1:], y[1:2]])),
        lambda x, y: ((x, x), y),
    ):
        yield change(x.clone(), y.clone())
    for place in ((0, 0, 0, 0), (11, 1, 2, 3), (22, 1, 4, 6)):
        other = x.clone()
        other[place] += 1e-6
        yield other, y


def test_others_have_another(data):
    found = [fingerprint([other]) for other in changed(*data)]
    assert len({fingerprint([data]), *found}) == 1 + len(found)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.int64, torch.complex64],
)
def test_every_type(data, dtype):
    x = (data[0] * 50).abs().to(dtype)
    other = x.clone()
    other[3, 0, 0, 1] = ~other[3, 0, 0, 1] if dtype == torch.bool else other[3, 0, 0, 1] + 1
    assert fingerprint([(x, data[1])]) != fingerprint([(other, data[1])])
    assert fingerprint([(x, data[1])]) == fingerprint([(x.clone(), data[1])])
    assert fingerprint([(x[:, :0], data[1])]) != fingerprint([(x, data[1])])


def test_other_inputs_and_devices(data):
    x, y = data
    more = torch.arange(23.0)
    assert fingerprint([((x, more), y)]) != fingerprint([((x, more.flip(0)), y)])
    assert fingerprint([((x, "text", torch.tensor(2.0)), y)]) == fingerprint([(x, y)])
    with pretend("cuda") as device:
        assert fingerprint([(x.to(device), y.to(device))]) == fingerprint([(x, y)])
    assert fingerprint([]) == fingerprint([])
