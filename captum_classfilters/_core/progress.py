"""A pass that may stop anywhere: what it has counted goes to a file, and with the error."""

import hashlib
import json
import math
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from captum_classfilters._core.distributed import flattened, rank, world_size
from captum_classfilters._core.files import AnyPath, check_writable, identity
from captum_classfilters._core.names import shortened
from captum_classfilters._core.tensor_files import Schema, Stored, read_tensors, write_tensors
from captum_classfilters._core.types import JsonDict, Keywords, ModelInputs
from captum_classfilters._core.warnings import warn

_SCHEMA = Schema("pass", "captum_classfilters.Pass", 1, "state", "of a pass over data")
_LEAST = 60.0  # seconds from save to save, if nothing is said
_SHARE = 100  # times as long as a save takes
_SAMPLE = 4096  # numbers of each input of a batch that are looked at one by one
_DIGEST = 8  # bytes for each batch


class SharedStateError(Exception):
    """Two runs that go on at once have been given one file for their states."""


class Count:
    """How many images are counted: the first so many of the loader, if they are known."""

    def __init__(self) -> None:
        self.images = self._end = 0
        self._torn = False

    @contextmanager
    def adding(self, first_image: int, size: int) -> Iterator[None]:
        """Count some images in the block, which Ctrl-C does not cut in two."""
        with uninterrupted():
            self._torn = True
            yield
            self.images, self._end = self.images + size, max(self._end, first_image + size)
            self._torn = False

    @property
    def is_known(self) -> bool:
        """Whether the images counted are the loader's first, each of them wholly."""
        return not self._torn and self.images == self._end

    def restore(self, images: int) -> None:
        """Go on after so many images."""
        self.images = self._end = images


class Counted(Protocol):
    """What a pass adds its batches to."""

    def counts(self) -> Sequence[Count]:
        """How far it is; several, where batches are added to several sums one after the other."""

    def state(self) -> tuple[dict[str, Tensor], JsonDict]:
        """All that the images so far have left, as tensors and as what JSON can hold."""

    def restore(self, tensors: Mapping[str, Tensor], notes: JsonDict) -> None:
        """Go on from such a state."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended; it is for blocks of no time at all."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *event: pressed.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])


class Progress:
    r"""
    How far a pass over a loader is, kept in a file if there is to be one.

    A run that was killed is started again with the same path: it reads the loader from the start,
    compares the batches that are counted already with what is noted of them, does not run the
    model on them, and goes on with the next. A run that has ended removes the file.

    Args:

        counted (Counted): What batches are added to.
        facts (Callable): What the state depends on (model, layer, options ...), asked for when it is
                    needed first: a model's fingerprint takes its time.
        partial (Callable): Returns the result for the images so far; None before there is one.
        state_path (path, optional): Where the state goes; each rank has a file of its own.
        save_every (float, optional): Seconds from save to save. By default a minute, and more where
                    that would take more than a hundredth of the time.

    Raises:
        ValueError: The path cannot be written, or the seconds are no number.
    """

    def __init__(
        self,
        counted: Counted,
        facts: Callable[[], JsonDict],
        partial: Callable[[], object],
        state_path: AnyPath | None = None,
        save_every: float | None = None,
    ) -> None:
        self._counted, self._ask, self._partial = counted, facts, partial
        self._path = None if state_path is None else _own_path(state_path)
        if save_every is not None:
            _check_seconds(save_every, state_path)
        self._save_every, self._cost = save_every, 0.0
        self._last = time.monotonic()
        self._facts: JsonDict | None = None
        self._known: list[bytes] = []  # digests of a former run's batches
        self._digests: list[bytes | Tensor] = []
        self._ends: list[int] = []  # images up to the end of each batch
        self._restored = 0
        self._random: JsonDict | None = None
        self._is_refused = True  # until the state is seen to be ours
        self._own: tuple[int, ...] | None = None  # which file we have read or written last

    # -- from the loop ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take up a state that is there."""
        self._is_refused = self._path is not None
        if self._path is None:
            return
        check_writable(self._path)
        self._own = identity(self._path)
        if self._own is not None:
            self._take_up(read_tensors(self._path, _SCHEMA))
        self._is_refused = False

    def _take_up(self, stored: Stored) -> None:
        self._compare(stored.value("facts", dict))
        tensors, notes = stored.all_tensors(), stored.value("notes", dict)
        self._random = {
            "torch": {n: tensors.pop(n) for n in list(tensors) if n.startswith("random/")},
            "others": stored.value("random", dict),
        }
        with stored.building():
            self._known = _split(tensors.pop("digests"))
            self._counted.restore(tensors, notes)
            drawn, others = _random_state()
            try:  # whether it is one, before it is needed
                _set_random_state(self._random)
            finally:
                _set_random_state({"torch": drawn, "others": others})
        self._restored = self.images or 0

    def look(self, number: int, inputs: ModelInputs, labels: object, end: int) -> bool:
        """Note a batch, before it goes anywhere; whether its images are counted already."""
        if self._path is not None:
            digest = _fingerprint(inputs, labels)
            self._digests.append(digest)
            self._ends.append(end)
            if number < len(self._known) and _as_bytes(digest) != self._known[number]:
                self._refuse(
                    f"batch {number} is another one than it was in the run whose state {self._path} "
                    "holds. The loader must give the same batches in the same order (shuffle=False, "
                    "no random augmentation, the same batch size)"
                )
        is_counted = 0 < end <= self._restored
        if not is_counted and self._random is not None:
            _set_random_state(self._random)
            self._random = None
        return is_counted

    def after(self, settle: Callable[[], None]) -> None:
        """Save the state if it is time to; ``settle`` lets the device answer what waits."""
        if self._path is None or time.monotonic() - self._last < self._pause:
            return
        settle()
        try:
            self._save()
        except (OSError, SharedStateError) as error:
            self._last = time.monotonic()
            warn(f"The state of the pass could not be saved; it goes on without: {error}")

    def end_of_loader(self) -> None:
        """Raise if batches are missing that were counted before."""
        if self._path is not None and len(self._digests) < len(self._known):
            self._refuse(
                f"it has {len(self._digests)} batches, and {len(self._known)} were counted by the run "
                f"whose state {self._path} holds"
            )

    def interrupted(self, error: BaseException, catch_up: Callable[[], None]) -> None:
        """Save what is counted, and have the error carry the result for all images so far.

        What waits for other batches is not saved: it would be added up in other portions when the run
        goes on, to a result that is not the same bit by bit.
        """
        if self._is_refused:
            return
        notes = []
        if self._path is not None and self.images:
            try:
                self._save()
                notes.append(
                    f"Started again with state_path={str(self._path)!r}, the run goes on after "
                    f"{self.images} images."
                )
            except Exception as failure:
                notes.append(f"The state could not be saved: {failure}")
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(Exception):  # the error that is there is the one to tell
                catch_up()
            partial = self._partial() if self.images else None
            if partial is not None:
                error.partial = partial  # type: ignore[attr-defined]
                notes.append(
                    f"The result for the {self.images} images before is the attribute `partial` of "
                    "this exception."
                )
        add_note = getattr(error, "add_note", lambda note: None)  # since Python 3.11
        for note in notes:
            add_note(note)

    def finished(self) -> None:
        """Remove the state: the result is there."""
        if self._path is not None and not self._is_shared:
            self._path.unlink(missing_ok=True)

    # -- how ----------------------------------------------------------------------------------------

    @property
    def images(self) -> int | None:
        """How many images are counted in all sums; None while that is not known."""
        counts = self._counted.counts()
        known = counts and all(count.is_known for count in counts)
        return min(count.images for count in counts) if known else None

    @property
    def _is_shared(self) -> bool:
        """Whether another run has put its state in the place of ours."""
        assert self._path is not None
        return identity(self._path) not in (None, self._own)

    @property
    def _pause(self) -> float:
        if self._save_every is not None:
            return self._save_every
        return max(_LEAST, _SHARE * self._cost)

    def facts(self) -> JsonDict:
        """What the state depends on."""
        if self._facts is None:
            facts = {**self._ask(), "the number of ranks": world_size()}
            self._facts = json.loads(json.dumps(facts))
        return self._facts

    def _compare(self, theirs: JsonDict) -> None:
        different = differences(theirs, self.facts(), "was", "is now")
        if different:
            raise ValueError(
                f"{self._path} holds the state of another run: {different}. Give another state_path, "
                "or delete the file to begin anew."
            )

    def _refuse(self, what: str) -> None:
        self._is_refused = True
        raise ValueError(
            f"The data loader is not the one of the run to be continued: {what}. Give another "
            "state_path, or delete the file to begin anew."
        )

    def _save(self) -> None:
        images = self.images
        if images is None or images <= self._restored:
            return
        if self._is_shared:
            raise SharedStateError(
                f"another run keeps its state in {self._path}, too; each needs a state_path of its own"
            )
        begin = time.monotonic()
        tensors, notes = self._counted.state()
        self._digests = [_as_bytes(digest) for digest in self._digests]
        # Batches behind the last that is counted may be other ones when the run goes on: mended.
        digests = [
            digest
            for digest, end in zip(self._digests, self._ends, strict=True)
            if end <= images and isinstance(digest, bytes)
        ]
        drawn, others = _random_state()
        own = {**tensors, **drawn, "digests": _joined(digests)}
        record = {"facts": self.facts(), "notes": notes, "random": others}
        assert self._path is not None
        self._own = write_tensors(self._path, _SCHEMA, own, record)
        self._last = time.monotonic()
        self._cost = self._last - begin


def differences(left: Keywords, right: Keywords, verb: str, other_verb: str) -> str:
    """What two records say differently, in words; empty if nothing."""
    left, right = flattened(left), flattened(right)
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    return "; ".join(
        f"{name} {verb} {shortened(left.get(name), 120)} and {other_verb} {shortened(right.get(name), 120)}"
        for name in names
    )


def described_options(value: object) -> Any:
    """Options as JSON can hold them, such that other options are described otherwise."""
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.tensor(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return f"Tensor {tuple(value.shape)} {_as_bytes(_fingerprint((value,), None)).hex()}"
    if isinstance(value, Mapping):
        return {str(key): described_options(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [described_options(part) for part in value]
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _own_path(state_path: AnyPath) -> Path:
    path = Path(state_path)
    if world_size() > 1:
        path = path.with_name(f"{path.name}.rank{rank()}")
    check_writable(path)
    return path


def _check_seconds(save_every: float, state_path: object) -> None:
    number = isinstance(save_every, (int, float)) and not isinstance(save_every, bool)
    if not number or not math.isfinite(save_every) or save_every < 0:
        raise ValueError(
            f"save_every={save_every!r}; expected seconds, 0 to save after each batch."
        )
    if state_path is None:
        raise ValueError(f"save_every={save_every} has no meaning without state_path.")


# -- what a batch was ------------------------------------------------------------------------------


def _fingerprint(inputs: ModelInputs, labels: object) -> bytes | Tensor:
    """What tells a batch from others: labels, shapes, the sum of all numbers and a sample of them.

    From a device that need not be waited for it comes as a Tensor, read when it is needed.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST)
    parts = [part for part in (*inputs, labels) if isinstance(part, Tensor)]
    if not isinstance(labels, Tensor):
        digest.update(repr(labels).encode())
    for part in parts:
        digest.update(f"{tuple(part.shape)}{part.dtype}".encode())
    traces = [_trace(part) for part in parts]
    waiting = [trace for trace in traces if trace.device.type != "cpu"]
    if waiting:
        head = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        device = waiting[0].device
        return torch.cat([head.to(device), *(trace.to(device) for trace in traces)])
    for trace in traces:
        digest.update(trace.numpy().tobytes())
    return digest.digest()


def _trace(tensor: Tensor) -> Tensor:
    """A few bytes of a tensor, and the sum over all of them, where the tensor is."""
    flat = tensor.detach().contiguous().flatten()
    raw = flat.view(torch.uint8) if flat.dtype != torch.bool else flat.to(torch.uint8)
    if flat.numel() <= _SAMPLE:
        return raw
    step = flat.numel() // _SAMPLE | 1  # odd, so that it does not keep to some columns
    sample = flat[::step].contiguous()
    words = raw.view(torch.int32) if raw.numel() % 4 == 0 else raw
    total = words.sum(dtype=torch.int64).reshape(1)
    sampled = sample.view(torch.uint8) if sample.dtype != torch.bool else sample.to(torch.uint8)
    return torch.cat([sampled, total.view(torch.uint8)])


def _as_bytes(digest: bytes | Tensor) -> bytes:
    if isinstance(digest, bytes):
        return digest
    data = digest.cpu().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _joined(digests: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(digests) or b"\0"), dtype=torch.uint8).clone()


def _split(digests: Tensor) -> list[bytes]:
    data = digests.numpy().tobytes()
    return [data[i : i + _DIGEST] for i in range(0, len(data) - _DIGEST + 1, _DIGEST)]


# -- random numbers ----------------------------------------------------------------------------------


def _random_state() -> tuple[dict[str, Tensor], JsonDict]:
    """The state of the generators that a model or a method may draw from."""
    tensors = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda:{index}"] = state
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["random/numpy"] = torch.as_tensor(np.asarray(keys).astype(np.int64))
    version, words, normal = random.getstate()
    tensors["random/python"] = torch.tensor(words, dtype=torch.int64)
    numpy_rest = [str(name), int(place), int(has_gauss), float(gauss)]
    return tensors, {"numpy": numpy_rest, "python": [version, normal]}


def _set_random_state(state: JsonDict) -> None:
    tensors, others = state["torch"], state["others"]
    torch.set_rng_state(tensors["random/cpu"])
    for name, tensor in tensors.items():
        if name.startswith("random/cuda:") and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(tensor, name.removeprefix("random/"))
    name, place, has_gauss, gauss = others["numpy"]
    keys = tensors["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, place, has_gauss, gauss))
    version, normal = others["python"]
    random.setstate((version, tuple(tensors["random/python"].tolist()), normal))
