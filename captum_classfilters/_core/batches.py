"""The one loop over a user's data: what a batch is, where it goes, what is refused, and when."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, DistributedSampler, Subset
from tqdm.auto import tqdm

from captum_classfilters._core import provenance
from captum_classfilters._core.devices import device_of, on_device, ordinary
from captum_classfilters._core.distributed import (
    Ranks,
    is_distributed,
    is_main_process,
    refuse_ranks,
)
from captum_classfilters._core.guard import (
    check_ordinary,
    held,
    model_left_as_found,
    weights_change,
)
from captum_classfilters._core.labels import Memberships, class_labels, joined, memberships
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.progress import Progress
from captum_classfilters._core.repeats import difference_of_runs
from captum_classfilters._core.types import Dataloader, ModelInputs, Unpack
from captum_classfilters._core.warnings import warn

_LABELS = ("labels", "label", "targets", "target", "y")
_IMAGES = ("pixel_values", "images", "image", "inputs", "input", "x")
FEW_IMAGES = 4  # that run twice, to see whether a model repeats itself
BATCHES_AHEAD = 8  # of an accelerator, before the host asks it how they went
BYTES_AHEAD = 256 * 2**20  # of inputs that must be kept meanwhile


@dataclass(frozen=True)
class Batch:
    """One batch of a loader, its inputs where the model is.

    Args:

        number (int): Its place in the loader, from 0.
        first_image (int): How many images came before it.
        inputs (tuple): The model's inputs, N images first.
        labels (object): As the loader gave them; None where it gave none.
    """

    number: int
    first_image: int
    inputs: ModelInputs
    labels: Any

    @property
    def size(self) -> int:
        """N."""
        return num_images(self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return next(part.device for part in self.inputs if isinstance(part, Tensor))

    def class_labels(self, num_classes: int) -> Tensor:
        """One class index for each image (N,), checked, where the inputs are."""
        labels = class_labels(self.labels, self.size, num_classes, self.number)
        return on_device(labels, self.device)

    def memberships(self, num_classes: int) -> Memberships:
        """Which image counts for which class, checked, where the inputs are."""
        return memberships(self.labels, self.size, num_classes, self.number).to(self.device)


class Batches:
    """The batches of one pass over a loader, and what waits for a device to answer.

    Args:

        dataloader (iterable): The user's loader.
        device (torch.device, optional): Where the inputs go.
        unpack (Callable, optional): From a batch to the pair (inputs, labels).
        labeled (bool): Batches without labels are refused.
        bar (tqdm): The progress bar.
        progress (Progress, optional): Which batches are counted already, and where to note the rest.
        ranks (Ranks, optional): Whom to tell where this process is.
        most (int, optional): Images of the loader that are this process's own.
    """

    def __init__(
        self,
        dataloader: Dataloader,
        device: torch.device | None,
        unpack: Unpack | None,
        labeled: bool,
        bar: "tqdm[NoReturn]",
        progress: Progress | None = None,
        ranks: Ranks | None = None,
        most: int | None = None,
    ) -> None:
        self._dataloader, self._device, self._unpack = dataloader, device, unpack
        self._labeled, self._bar = labeled, bar
        self._progress, self._ranks, self._most = progress, ranks or Ranks(), most
        self.num_images = 0
        self.first: Batch | None = None
        self._repeated: set[int] = set()
        self._waiting: list[tuple[Tensor, Callable[[list[bool]], None]]] = []
        self._bytes_kept = self._ahead = 0
        # Looks at batches that wait for others; without a cycle, which would keep the model alive.
        self.kept_back: Callable[[Batches], None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        number = -1
        iterator = iter(self._dataloader)
        while True:
            number += 1
            self._ranks.place = f"batch {number}"
            try:
                raw = next(iterator)
            except StopIteration:
                break
            inputs, labels = _unpacked(raw, number, self._unpack, self._labeled)
            if self._labeled or isinstance(self._dataloader, Dataset):
                _check_pair(inputs, labels, number)
            inputs, labels = self._own(inputs, labels)
            size = num_images(inputs)
            first_image, self.num_images = self.num_images, self.num_images + size
            counted = self._progress is not None and self._progress.look(
                number, inputs, labels, self.num_images
            )
            if size and not (counted and self.first):
                inputs = on_device(ordinary(inputs), self._device)
                batch = Batch(number, first_image, inputs, labels)
                if self._progress is not None:
                    self.first = self.first or batch
                if not counted:
                    yield batch
                    self._ahead += 1
                del batch
            if self._ahead >= BATCHES_AHEAD:
                self.settle()
            if self._progress is not None:
                self._progress.after(self.settle)
            self._tell()
        if self._progress is not None:
            self._progress.end_of_loader()
        self.settle()

    def _tell(self) -> None:
        """A batch more on the bar, and how many images a second that makes."""
        if not self._bar.disable:
            rate = self.num_images / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{rate:.3g} images/s", refresh=False)
        self._bar.update()

    def _own(self, inputs: ModelInputs, labels: Any) -> tuple[ModelInputs, Any]:
        """A batch without the images that a sampler repeats to give all processes as many."""
        size = num_images(inputs)
        left = size if self._most is None else max(0, self._most - self.num_images)
        if left >= size:
            return inputs, labels
        own = chosen_images(inputs, slice(left))
        whole = isinstance(labels, (Tensor, list, tuple)) and len(labels) == size
        return own, labels[:left] if whole else labels

    def check_repeats(
        self,
        model: Callable[..., object],
        batch: Batch,
        output: object,
        *,
        earlier: object = None,
        owner: object = None,
    ) -> None:
        r"""
        Warn, once, if a model gives other scores for the same images of the first batch again.

        On a CPU a few of the images run again, and all only if these differ: a model may compute
        otherwise in other batches. An accelerator, which need not be waited for, runs all.

        Args:

            model (Callable): What was run, a model or a function of its inputs.
            batch (Batch): Any batch; all but the first are passed over.
            output (object): What was returned for it.
            earlier (object, optional): What was returned for it in a run before: there is none more.
                        Default: None
            owner (object, optional): Which model it is, where several functions run it.
                        Default: None
        """
        key = id(model if owner is None else owner)
        if batch.first_image or key in self._repeated:
            return
        self._repeated.add(key)
        with torch.no_grad(), model_left_as_found(None):  # the random state only
            if earlier is None and batch.device.type == "cpu" and _few_repeat(model, batch, output):
                return
            differences = difference_of_runs(
                output, (lambda: model(*batch.inputs)) if earlier is None else lambda: earlier
            )
        if differences is None:
            return

        def then(values: list[bool]) -> None:
            if not values[0]:
                warn(
                    "The model gives different scores for the same images: the first batch, run "
                    f"twice, differs by up to {float(differences[1]):.2g} in scores of up to "
                    f"{float(differences[2]):.2g}. The results carry that noise. Is a random layer "
                    "active in evaluation mode, functional dropout without training=self.training "
                    "for example?"
                )

        self.later([differences[0]], then)

    def later(
        self,
        flags: Sequence[Tensor],
        then: Callable[[list[bool]], None],
        kept: Sequence[object] = (),
    ) -> None:
        r"""
        Call a function with some bools of a device, in order and soon.

        On a CPU that is at once. Elsewhere the answers to several batches are read together, so that
        the device does not wait for the host after each.

        Args:

            flags (sequence of Tensor): Bools of no axes, at least one.
            then (Callable): What to do with their values.
            kept: Tensors that ``then`` keeps alive until it is called.
        """
        self._waiting.append((torch.stack(list(flags)), then))
        self._bytes_kept += num_bytes(kept)
        if flags[0].device.type == "cpu" or self._bytes_kept >= BYTES_AHEAD:
            self.settle()

    def settle(self) -> None:
        """Read what waits and act on it, and on what that leaves to wait in turn."""
        while self._waiting:
            waiting, self._waiting, self._bytes_kept, self._ahead = self._waiting, [], 0, 0
            devices = {flags.device for flags, _ in waiting}
            together = [flags for flags, _ in waiting]
            if len(devices) > 1:
                together = [flags.cpu() for flags in together]
            values: list[bool] = torch.cat(together).tolist()
            for flags, then in waiting:
                own, values = values[: len(flags)], values[len(flags) :]
                then(own)

    def catch_up(self) -> None:
        """Count all batches so far, those included that wait for others."""
        if self.kept_back is not None:
            self.kept_back(self)
        self.settle()

    def memberships(self, block: Sequence[Batch], num_classes: int) -> Memberships:
        """Which image of several batches counts for which class; class indices that come from an
        accelerator are checked later."""
        if not all(_indices_on_a_device(batch, num_classes) for batch in block):
            return joined([batch.memberships(num_classes) for batch in block])
        labels = torch.cat([batch.labels.reshape(-1) for batch in block])
        in_range = ((labels >= 0) & (labels < num_classes)).all()
        self.later([in_range], lambda ok: None if ok[0] else _raised(block, num_classes))
        return Memberships(labels.long().clamp(0, num_classes - 1)).to(block[0].device)

    def class_labels(self, batch: Batch, num_classes: int) -> Tensor:
        """One class index for each image (N,), as of the batch itself, but checked later."""
        memberships = self.memberships([batch], num_classes)
        if memberships.images is not None:
            return batch.class_labels(num_classes)  # which refuses several classes
        return memberships.classes

    def check(self, right: Tensor, error: Callable[[], Exception]) -> None:
        """Raise an error, soon, unless a bool of no axes on a device is true."""

        def then(values: list[bool]) -> None:
            if not values[0]:
                raise error()

        self.later([right], then)


@contextmanager
def read_batches(
    model: nn.Module | Sequence[nn.Module | None] | None,
    dataloader: Dataloader,
    description: str,
    *,
    device: torch.device | str | None = None,
    unpack: Unpack | None = None,
    labeled: bool = True,
    gradients: bool = False,
    training: bool = False,
    may_be_empty: bool = False,
    summed: bool = False,
    show_progress: bool = True,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Batches]:
    r"""
    Read a loader once, the models in evaluation mode and left as found.

    A batch is a pair (inputs, labels), of which more members are ignored; a mapping with labels and
    one tensor of images; or what ``unpack`` makes a pair of. Inputs are a Tensor or several. Empty
    batches are passed over.

    Args:

        model (nn.Module, None or a sequence of them): The models that will run.
        dataloader (iterable): The loader.
        description (str): What the progress bar is called.
        device (torch.device or str, optional): Where the inputs go; by default where the first
                    model is.
        unpack (Callable, optional): From a batch to the pair (inputs, labels).
        labeled (bool): Refuse batches without labels.
                    Default: True
        gradients (bool): Record gradients in the block; the model's parameters stay out of them.
                    Default: False
        training (bool): The block trains the models: gradients are recorded, and modes, parameters
                    and the random state are left to it; other threads wait for the models all the
                    same.
                    Default: False
        may_be_empty (bool): Allow a loader without an image.
                    Default: False
        summed (bool): What several processes read is added up; the share of one may be empty.
                    Otherwise several processes are refused.
                    Default: False
        show_progress (bool): Show a progress bar, on the main process.
                    Default: True
        progress (Progress, optional): Keeps what is counted if the block is left early.
                    Default: None
        ranks (Ranks, optional): The processes that add up what they read, if the caller has them
                    agree; otherwise the end of the block does.
                    Default: None

    Raises:
        ValueError: The loader or a batch is something else, or there is no image, or there are
                    several processes.
    """
    own_ranks = Ranks() if ranks is None else None
    if own_ranks is not None and not summed:
        refuse_ranks(description)
    _check_loader(dataloader)
    models = [model] if model is None or isinstance(model, nn.Module) else list(model)
    where = next((d for d in (device, *map(device_of, models)) if d is not None), None)
    if unpack is not None and not callable(unpack):
        raise ValueError(
            f"unpack={unpack!r}; expected a function from a batch to (inputs, labels)."
        )
    bar = tqdm(
        total=len(dataloader)
        if isinstance(dataloader, Sized) and _has_length(dataloader)
        else None,
        desc=description,
        unit="batch",
        disable=not (show_progress and is_main_process()),
    )
    with ExitStack() as stack:
        stack.enter_context(bar)
        for module in {id(module): module for module in models}.values():
            if not training:
                stack.enter_context(model_left_as_found(module, evaluation=True, freeze=True))
            elif module is not None:
                check_ordinary(module)
                stack.enter_context(held(module))
        # Whatever the caller switched off around the call, Lightning's hooks for example.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(weights_change() if training else torch.set_grad_enabled(gradients))
        batches = Batches(
            dataloader,
            None if where is None else _device(where),
            unpack,
            labeled,
            bar,
            progress,
            own_ranks or ranks,
            None if training else own_images(dataloader),
        )
        try:
            if progress is not None:
                progress.begin()
            yield batches
            batches.settle()
            if own_ranks is not None:
                own_ranks.agree(lambda: {"the measurement": description, **_facts_of(models)})
        except BaseException as error:
            if progress is not None:
                progress.interrupted(error, batches.catch_up)
            if own_ranks is not None and isinstance(error, Exception):
                own_ranks.fail(error)
            raise
    if not batches.num_images and not (may_be_empty or (summed and is_distributed())):
        raise ValueError(
            "The data loader is empty: there is no image to read. A generator can be read only once; "
            "pass a list or a DataLoader."
        )


def first_batch(
    model: nn.Module | None, dataloader: Dataloader, unpack: Unpack | None = None
) -> Batch:
    """The first batch of a loader that has an image, for a look at what the model does with it."""
    with read_batches(
        model,
        dataloader,
        "first batch",
        unpack=unpack,
        labeled=False,
        show_progress=False,
        ranks=Ranks(),
    ) as batches:
        for batch in batches:
            return batch
    raise AssertionError("read_batches refuses empty loaders")


def _indices_on_a_device(batch: Batch, num_classes: int) -> bool:
    labels = batch.labels
    if not isinstance(labels, Tensor) or labels.device.type == "cpu":
        return False
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    column = labels.shape == (batch.size, 1) and num_classes > 1
    return whole and (labels.shape == (batch.size,) or column)


def _raised(block: Sequence[Batch], num_classes: int) -> None:
    """The error that the labels of some batch deserve."""
    for batch in block:
        batch.memberships(num_classes)
    raise AssertionError("labels out of range")


def _facts_of(models: Sequence[nn.Module | None]) -> dict[str, object]:
    """What ranks that add up what they read have in common."""
    return {
        "the model": [None if model is None else provenance.fingerprint(model) for model in models]
    }


def num_bytes(tensors: Sequence[object]) -> int:
    """Bytes of the tensors among some values."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def chosen_images(inputs: ModelInputs, places: Tensor | slice) -> ModelInputs:
    """The inputs for some of a batch's images."""
    size = num_images(inputs)
    return tuple(
        part[places if isinstance(places, slice) else places.to(part.device)]
        if isinstance(part, Tensor) and part.dim() and len(part) == size
        else part
        for part in inputs
    )


def of_few(call: Callable[[ModelInputs], Tensor], inputs: ModelInputs, size: int) -> Tensor:
    """What a function makes of some images of a batch, a row for each. Of a model that takes only
    batches of the very ``size`` of theirs, the images are repeated until they are as many."""
    number = num_images(inputs)
    try:
        return call(inputs)
    except RuntimeError as error:
        if number >= size:
            raise
        with suppress(RuntimeError):
            return call(chosen_images(inputs, torch.arange(size) % number))[:number]
        raise error


def _few_repeat(model: Callable[..., object], batch: Batch, output: object) -> bool:
    """Whether a few images alone have the scores that they have in their batch."""
    if batch.size <= FEW_IMAGES:
        return False
    few = chosen_images(batch.inputs, slice(FEW_IMAGES))
    try:
        differences = difference_of_runs(output, lambda: model(*few), FEW_IMAGES)
    except Exception:  # it may take batches of one size only
        return False
    return differences is not None and bool(differences[0])


def num_images(inputs: Sequence[object]) -> int:
    """N, the rows of the first input that is a tensor with axes."""
    return next((len(part) for part in inputs if isinstance(part, Tensor) and part.dim()), 0)


def check_now(right: Tensor, error: Callable[[], Exception]) -> None:
    """Raise an error unless a bool of no axes is true: :meth:`Batches.check` for a single batch."""
    if not bool(right):
        raise error()


def check_read_again(dataloader: Dataloader | None) -> None:
    """Raise if a loader, read more than once here, would be empty the second time."""
    if isinstance(dataloader, Iterable) and iter(dataloader) is dataloader:
        raise ValueError("The dataloader can be read only once; pass a list or a DataLoader.")


def own_images(dataloader: Dataloader) -> int | None:
    """How many of a loader's images are not repeated by its ``DistributedSampler``, which gives every
    process as many and ends with images of others; None where none are, or nothing can be seen."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    for sampler in (getattr(dataloader, "sampler", None), getattr(batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            number = len(sampler.dataset)  # type: ignore[arg-type]
            if sampler.total_size <= number:
                return None
            return len(range(sampler.rank, number, sampler.num_replicas))
    return None


def dataset_names(dataloader: Dataloader) -> Sequence[str] | None:
    """Class names that a loader's data set knows, as torchvision's do; of a part of one, those of the
    whole, and of several, those that all of them have."""
    return _names_of(getattr(dataloader, "dataset", None))


def _names_of(dataset: object) -> Sequence[str] | None:
    names = getattr(dataset, "classes", None)
    if isinstance(names, (list, tuple)):
        return [str(name) for name in names]
    if isinstance(dataset, ConcatDataset):
        first, *others = map(_names_of, dataset.datasets)
        return first if all(other == first for other in others) else None
    return _names_of(dataset.dataset) if isinstance(dataset, Subset) else None


def _unpacked(
    batch: object, number: int, unpack: Unpack | None, labeled: bool
) -> tuple[ModelInputs, Any]:
    """Inputs and labels of one batch of a loader."""
    if unpack is not None:
        batch = unpack(batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"unpack returned {_described(batch)} for batch {number}; expected a pair "
                "(inputs, labels)."
            )
    inputs, labels = _parts(batch, number, labeled)
    if isinstance(inputs, Mapping):
        inputs = _tensors_of(inputs, number)
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not inputs or not all(isinstance(part, Tensor) for part in inputs):
        kinds = ", ".join(sorted({type(part).__name__ for part in inputs})) or "missing"
        raise ValueError(
            f"The inputs of batch {number} are {kinds}; expected a Tensor, N images first, or "
            "several. Arrays become one: unpack=lambda batch: (torch.as_tensor(batch[0]), batch[1]). "
            "Pictures of files need a transform of their data set, such as torchvision's ToTensor()."
        )
    return inputs, labels


def _check_pair(inputs: ModelInputs, labels: object, number: int) -> None:
    """Raise if what was read is one image with its label, as a data set gives them, or images are
    where labels should be."""
    shape = tuple(inputs[0].shape)
    one = labels.dim() == 0 if isinstance(labels, Tensor) else isinstance(labels, Integral)
    if one:
        raise ValueError(
            f"Batch {number} has one number as labels, for inputs of shape {shape}; expected one "
            "class index for each image. A data set of single images is read through "
            "torch.utils.data.DataLoader(dataset, batch_size=64)."
        )
    if isinstance(labels, Tensor) and labels.dim() > 2 and inputs[0].dim() < labels.dim():
        raise ValueError(
            f"Batch {number} has labels of shape {tuple(labels.shape)} and inputs of shape {shape}; "
            "expected a pair (inputs, labels) in this order: "
            "unpack=lambda batch: (batch[1], batch[0])."
        )


def _check_loader(dataloader: object) -> None:
    """Raise unless something can give batches."""
    wrong = isinstance(dataloader, (str, bytes, Mapping, Tensor, np.ndarray, nn.Module))
    if wrong or not (hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")):
        raise ValueError(
            f"The data loader is of the type {type(dataloader).__name__}; expected a DataLoader, or "
            "a list of batches (inputs, labels), such as [(images, labels)]."
        )


def _parts(batch: object, number: int, labeled: bool) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        key = next((name for name in _LABELS if name in batch), None)
        if key is None and labeled:
            raise _refusal(number, f"a mapping with {', '.join(map(repr, batch))} and no labels")
        inputs = {name: value for name, value in batch.items() if name != key}
        return inputs, None if key is None else batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        if labeled and batch[1] is None:
            raise _refusal(number, "a pair whose labels are None")
        return batch[0], batch[1]
    if labeled or not isinstance(batch, (Tensor, tuple, list)):
        raise _refusal(number, _described(batch))
    return (batch, None) if isinstance(batch, Tensor) else (batch[0] if batch else (), None)


def _tensors_of(inputs: Mapping[object, object], number: int) -> ModelInputs:
    images = next((name for name in _IMAGES if name in inputs), None)
    if images is not None:
        return (inputs[images],)
    if "input_ids" in inputs:  # tokens, and what masks them
        return tuple(inputs[name] for name in ("input_ids", "attention_mask") if name in inputs)
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    if len(tensors) != 1:
        raise _refusal(number, f"a mapping whose inputs could be {tensors or list(inputs)}")
    return (inputs[tensors[0]],)


def _refusal(number: int, found: str) -> ValueError:
    return ValueError(
        f"Batch {number} is {found}; expected a pair (inputs, labels), or a mapping with 'labels' and "
        "one tensor of images. Otherwise say what is what: "
        "unpack=lambda batch: (batch['image'], batch['label'])."
    )


def _described(value: object) -> str:
    name = kind_of(value)
    if isinstance(value, (tuple, list)):
        return f"{name} of {len(value)} ({', '.join(type(p).__name__ for p in value)})"
    return name


def _device(where: torch.device | str) -> torch.device:
    try:
        return torch.device(where)
    except RuntimeError as error:
        raise ValueError(
            f"device={where!r} is no device; expected 'cpu' or 'cuda:0', for example."
        ) from error


def _has_length(dataloader: Sized) -> bool:
    try:
        len(dataloader)
    except TypeError:  # a DataLoader of an iterable data set
        return False
    return True
