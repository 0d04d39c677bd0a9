"""Passes that stop anywhere go on where they stopped, and leave what they have counted."""

import dataclasses
import errno
import os
import random
import signal
import stat
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerActivation, LayerGradientShap

from captum_classfilters import (
    ClassFilters,
    LabelPermutation,
    LayerFilterAblation,
    LayerFilterContribution,
    LayerFilterFrequency,
    identify_class_filters,
)
from captum_classfilters._core.files import write_atomically
from captum_classfilters.identify import collect_evidence, exemplars
from tests.killed_worker import killed_pass, slow_pass
from tests.models import QUIET, batches, deep, joined, pool_linear
from tests.processes import clean_context

MANY = {"number": 115, "batch_size": 5}  # 23 batches: blocks of eight do not divide them


class StopError(Exception):
    """Raised by a loader."""


class Interrupted:
    """A loader that raises before a batch, or does not."""

    def __init__(self, data, at=None, error=StopError):
        self.data, self.at, self.error = data, at, error

    def __iter__(self):
        for number, batch in enumerate(self.data):
            if number == self.at:
                raise self.error(f"batch {number}")
            yield batch


def methods(model):
    """Whose forward passes are shared, whose are not, and which change over from one to the other."""
    return {
        "votes": LayerFilterFrequency(model, "stage1", top_k=2),
        "head": LayerFilterContribution(model, "stage2"),
        "captum": LayerActivation(model, model.stage1),
    }


def several(model, data, **options):
    return identify_class_filters(methods(model), data, num_filters=2, **QUIET, **options)


def inside(model, data, **options):
    return LayerFilterContribution(model, "stage1").identify(
        data, num_filters=2, **QUIET, **options
    )


def significant(model, data, **options):
    return LayerFilterContribution(model, "stage2").identify(
        data, significance=LabelPermutation(permutations=9), num_filters=2, **QUIET, **options
    )


def random_method(model, data, **options):
    return identify_class_filters(
        LayerGradientShap(model, model.stage1),
        data,
        attribute_kwargs={"baselines": torch.zeros(2, 2, 6, 6), "n_samples": 2},
        num_filters=2,
        **QUIET,
        **options,
    )


def accuracy(model, data, **options):
    return LayerFilterAblation(model, "stage1").identify(
        data, metric="accuracy", **QUIET, **options
    )


def evidence(model, data, **options):
    return collect_evidence(LayerFilterContribution(model, "stage1"), data, **QUIET, **options)


def best_images(model, data, **options):
    return exemplars(model, ["stage1", "stage2"], data, num_exemplars=3, **QUIET, **options)


PASSES = {
    "several methods": several,
    "contributions inside": inside,
    "significance": significant,
    "a method that draws numbers": random_method,
    "accuracy": accuracy,
    "evidence": evidence,
    "exemplars": best_images,
}


def plain(result):
    """A result as tensors and values that can be compared."""
    if isinstance(result, torch.Tensor):
        return [
            tuple(result.shape),
            str(result.dtype),
            result.nan_to_num(-123.0).flatten().tolist(),
        ]
    if isinstance(result, ClassFilters):
        tables = ("scores", "counts", "selected", "standard_errors", "p_values", "q_values")
        return [plain(getattr(result, name)) for name in tables] + [plain(dict(result.provenance))]
    if dataclasses.is_dataclass(result):
        return {f.name: plain(getattr(result, f.name)) for f in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {name: plain(value) for name, value in result.items() if name != "created"}
    if isinstance(result, (list, tuple)):
        return [plain(value) for value in result]
    return result


def counting(model):
    """Batches that the model runs on, by a number of their first image."""
    seen: list[float] = []
    handle = model.register_forward_pre_hook(
        lambda _, inputs: seen.append(float(inputs[0].detach().sum()))
    )
    return seen, handle


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("at", [1, 14])
def test_after_an_exception_a_run_goes_on_to_the_identical_result(name, at, tmp_path):
    call, data, path = PASSES[name], batches(**MANY), tmp_path / "state"
    np.random.seed(3)
    whole = call(deep(), data)
    np.random.seed(3)
    with pytest.raises(StopError) as caught:
        call(deep(), Interrupted(data, at), state_path=path, save_every=0)
    assert path.exists()
    partial = caught.value.partial  # type: ignore[attr-defined]
    counts = {
        "exemplars": lambda p: p["stage1"].num_images,
        "several methods": lambda p: int(p["captum"].counts.sum()),
    }.get(name, lambda p: int(p.counts.sum()))(partial)
    assert 0 < counts <= 5 * at
    if sys.version_info >= (3, 11):
        assert "`partial`" in " ".join(caught.value.__notes__)
        assert "state_path=" in " ".join(caught.value.__notes__)
    again = call(deep(), data, state_path=path)
    assert plain(again) == plain(whole)
    assert not path.exists()


def test_batches_that_are_counted_are_not_run(tmp_path):
    data, path = batches(**MANY), tmp_path / "state"
    with pytest.raises(StopError):
        inside(deep(), Interrupted(data, 14), state_path=path)
    model = deep()
    seen, handle = counting(model)
    inside(model, data, state_path=path)
    handle.remove()
    assert seen[: len(data) - 14] == [float(images.sum()) for images, _ in data[14:]]


def test_the_partial_table_is_that_of_the_images_before():
    data = batches(**MANY)
    kinds: tuple[Any, ...] = (StopError, KeyboardInterrupt, SystemExit)
    for error in kinds:
        with pytest.raises(error) as caught:
            inside(deep(), Interrupted(data, 14, error))
        partial = caught.value.partial
        expected = inside(deep(), data[:14])
        assert plain(partial)[:4] == plain(expected)[:4]
        assert partial.provenance["partial"] is True
        assert partial.provenance["num_images"] == 70


@pytest.mark.parametrize("at", [1, 2, 8, 11])
@pytest.mark.parametrize(
    "method", [LayerFilterContribution, LayerFilterFrequency, LayerFilterAblation]
)
def test_batches_that_wait_for_others_are_in_the_partial_table(method, at):
    data = batches(**MANY)
    with pytest.raises(StopError) as caught:
        method(pool_linear(), "1").identify(Interrupted(data, at), show_progress=False)
    expected = method(pool_linear(), "1").identify(data[:at], show_progress=False)
    partial = caught.value.partial  # type: ignore[attr-defined]
    assert torch.equal(partial.counts, expected.counts)
    torch.testing.assert_close(partial.scores, expected.scores, equal_nan=True)


def test_a_bad_batch_late_in_the_pass_leaves_what_came_before(tmp_path):
    data, path = batches(**MANY), tmp_path / "state"
    bad = list(data)
    bad[18] = (torch.full_like(data[18][0], torch.nan), data[18][1])
    for broken, message in ((bad, "batch 18"), ([*data[:18], "no batch"], "Batch 18")):
        with pytest.raises(ValueError, match=message) as caught:
            several(deep(), broken, state_path=path)
        partial = caught.value.partial["votes"]  # type: ignore[attr-defined]
        assert 0 < int(partial.counts.sum()) <= 90
    # Mended, the run goes on: what follows the last batch counted may differ.
    assert plain(several(deep(), data, state_path=path)) == plain(several(deep(), data))


def test_without_an_image_counted_nothing_is_left(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(StopError) as caught:
        inside(deep(), Interrupted(batches(), 0), state_path=path, save_every=0)
    assert not hasattr(caught.value, "partial")
    assert not path.exists()


def state_of(path, call=inside, at=14, **options):
    with pytest.raises(StopError):
        call(deep(), Interrupted(batches(**MANY), at), state_path=path, **options)
    return path.read_bytes()


def test_two_runs_at_once_with_one_path(tmp_path):
    """The state is that of the run which wrote last; the other one leaves it alone, and says so."""
    data, path = batches(**MANY), tmp_path / "state"

    def with_another():
        for number, batch in enumerate(data):
            if number == 3:  # the first run has saved its state, which the other takes up
                with pytest.raises(StopError):
                    inside(deep(), Interrupted(data, 7), state_path=path, save_every=0)
            yield batch

    with pytest.warns(UserWarning, match="another run keeps its state in .*, too"):
        first = inside(deep(), with_another(), state_path=path, save_every=0)
    assert plain(first) == plain(inside(deep(), data))
    model = deep()
    seen, handle = counting(model)
    other = inside(model, data, state_path=path)
    handle.remove()
    assert float(data[6][0].sum()) not in seen
    assert plain(other) == plain(first)
    assert not path.exists()


class TestAnotherRunIsRefused:
    def refused(self, path, match, call):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert path.read_bytes() == before
        assert not hasattr(caught.value, "partial")

    def test_by_what_differs(self, tmp_path):
        path, data = tmp_path / "state", batches(**MANY)
        state_of(path)

        def identified(method, **options):
            options = {"num_filters": 2, **options}
            return lambda: method.identify(data, state_path=path, **QUIET, **options)

        model = deep()
        other = deep()
        with torch.no_grad():
            other.head.bias[0] += 1
        own = LayerFilterContribution(model, "stage1")
        cases = {
            "the model": identified(LayerFilterContribution(other, "stage1")),
            "the layer": identified(LayerFilterContribution(model, "stage2")),
            "the method": identified(LayerFilterFrequency(model, "stage1")),
            "num_filters": identified(own, num_filters=3),
            "mass": identified(own, num_filters=None, mass=0.5),
            "class_names": identified(own, class_names=["a", "b", "c"]),
            "num_classes": identified(own, num_classes=4),
            "target": identified(own, target=1, num_classes=3),
            "significance": identified(own, significance=True),
            "options": identified(own, attribute_to_layer_input=True),
            "call": lambda: collect_evidence(own, data, state_path=path, **QUIET),
        }
        for name, call in cases.items():
            self.refused(path, f"state of another run.*{name}", call)

    def test_another_option_of_the_method(self, tmp_path):
        path, data = tmp_path / "state", batches(**MANY)

        def call(model, data, k=2, **options):
            return LayerFilterFrequency(model, "stage1", top_k=k).identify(data, **QUIET, **options)

        state_of(path, call)
        self.refused(path, "options", lambda: call(deep(), data, k=3, state_path=path))

    @pytest.mark.parametrize("name", ["contributions inside", "accuracy", "exemplars", "evidence"])
    def test_other_data(self, name, tmp_path):
        call, path, data = PASSES[name], tmp_path / "state", batches(**MANY)
        state_of(path, call)
        images, labels = joined(data)
        swapped = images.clone()
        swapped[[3, 4]] = swapped[[4, 3]]
        others = {
            "batch 0 is another": [(images.roll(1, 0)[:5], labels[:5]), *data[1:]],
            "batch 3 is another": [*data[:3], (data[3][0], data[3][1].roll(1)), *data[4:]],
            "batch 2 is another": [
                *data[:2],
                *zip(images[10:].split(7), labels[10:].split(7), strict=True),
            ],
            "it has 6 batches": data[:6],
        }
        for match, other in others.items():
            self.refused(path, match, lambda other=other: call(deep(), other, state_path=path))
        assert plain(call(deep(), data, state_path=path)) == plain(call(deep(), data))

    def test_large_images_are_told_apart(self, tmp_path):
        """One pixel of many, at a place that no sample looks at."""
        model, path = pool_linear(), tmp_path / "state"
        data = [(torch.rand(4, 2, 64, 64), torch.arange(4) % 3) for _ in range(12)]
        other = [(images.clone(), labels) for images, labels in data]
        other[1][0][2, 1, 33, 17] += 0.01
        method = LayerFilterContribution(model, "1")
        with pytest.raises(StopError):
            method.identify(Interrupted(data, 11), state_path=path, **QUIET)
        with pytest.raises(ValueError, match="batch 1 is another"):
            method.identify(other, state_path=path, **QUIET)

    @pytest.mark.parametrize(
        "content", [b"", b"no state", b"\0" * 100, "truncated", "flipped"], ids=str
    )
    def test_a_damaged_file(self, content, tmp_path):
        path = tmp_path / "state"
        data = state_of(path)
        if content == "truncated":
            content = data[: len(data) // 2]
        elif content == "flipped":
            place = len(data) - 9
            content = data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :]
        path.write_bytes(content)
        self.refused(path, "state", lambda: inside(deep(), batches(**MANY), state_path=path))


class TestThePathIsCheckedFirst:
    def refused(self, path, **options):
        read = []

        def data():
            read.append(1)
            yield from batches()

        for call in PASSES.values():
            with pytest.raises(ValueError):
                call(deep(), data(), state_path=path, **options)
        assert not read

    def test_a_folder_that_is_not_there(self, tmp_path):
        self.refused(tmp_path / "nowhere" / "state")

    def test_a_folder_in_its_place(self, tmp_path):
        self.refused(tmp_path)

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_cannot_be_written(self, tmp_path):
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        try:
            self.refused(tmp_path / "state")
        finally:
            tmp_path.chmod(stat.S_IRWXU)

    @pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "60", True])
    def test_seconds_that_are_none(self, seconds, tmp_path):
        self.refused(tmp_path / "state", save_every=seconds)

    def test_seconds_without_a_path(self):
        self.refused(None, save_every=5)


def test_a_full_disk_does_not_end_the_pass(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path, data = tmp_path / "state", batches(**MANY)
    monkeypatch.setattr("captum_classfilters._core.progress.write_tensors", full)
    with pytest.warns(UserWarning, match="could not be saved.*No space left"):
        table = inside(deep(), data, state_path=path, save_every=0)
    assert plain(table) == plain(inside(deep(), data))
    with pytest.warns(UserWarning, match="saved"), pytest.raises(StopError) as caught:
        inside(deep(), Interrupted(data, 14), state_path=path, save_every=0)
    assert int(caught.value.partial.counts.sum()) == 70  # type: ignore[attr-defined]
    if sys.version_info >= (3, 11):
        assert "could not be saved" in caught.value.__notes__[0]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    """Half a state, beside the place where the whole one would be."""
    path, data = tmp_path / "state", batches(**MANY)
    state_of(path)
    (left,) = _names_while_writing(path) - {path}
    left.write_bytes(b"half")
    inside(deep(), data, state_path=path)
    assert list(tmp_path.iterdir()) == []


def _names_while_writing(path):
    """What is in a folder while a file is written there."""
    names = set()

    def data():
        names.update(path.parent.iterdir())
        yield path.read_bytes()

    write_atomically(path, data())
    return names


def test_saving_is_rare_by_default(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(
        "captum_classfilters._core.progress.write_tensors", lambda *_: saves.append(1)
    )
    inside(deep(), batches(**MANY), state_path=tmp_path / "state")
    assert not saves
    inside(deep(), batches(**MANY), state_path=tmp_path / "state", save_every=0)
    assert len(saves) >= 2


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal; in the background of a shell it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_does_not_cut_sums_in_two():
    """A signal that arrives while a batch is added is raised when it has been."""
    from captum_classfilters._core.progress import Count

    count = Count()
    done = []

    def add():
        with count.adding(0, 5):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        add()
    assert done
    assert (count.images, count.is_known) == (5, True)
    with pytest.raises(RuntimeError), count.adding(5, 5):
        raise RuntimeError("in the middle")
    assert not count.is_known


def test_killed_at_any_moment(tmp_path):
    """With a seed of its own; benchmarks/attack.py kills more often."""
    data, moments = batches(**MANY), random.Random(5)
    whole, context = slow_pass(data), clean_context()
    for number in range(6):
        path = tmp_path / str(number)
        for _ in range(2):  # killed twice
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=killed_pass, args=(path, data, theirs))
            process.start()
            theirs.close()
            assert pipe.recv() == "begun"
            while number < 3 and process.is_alive() and not path.exists():  # a state is there
                time.sleep(0.001)
            time.sleep(0.15 * moments.random() if number else 0)
            process.kill()
            process.join()
            pipe.close()
        assert plain(slow_pass(data, state_path=path)) == plain(whole)
