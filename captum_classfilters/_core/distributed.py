"""What ranks tell each other besides what torchmetrics merges, and what they refuse together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed
from torch import Tensor

from captum_classfilters._core.types import JsonDict, Keywords

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether more than one process works on the data."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def gather(value: T, group: "ProcessGroup | None" = None) -> list[T]:
    """One object from every rank, in order of rank; of the ranks of a group, if one is given."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group)
    return values


def added_up(tensors: Sequence[Tensor], group: "ProcessGroup | None" = None) -> list[Tensor]:
    """Tensors of one type, summed over ranks by a single call; what a rank holds and is sent does not
    grow with the number of ranks. One tensor alone is overwritten."""
    flats = [tensor.reshape(-1) for tensor in tensors]
    flat = flats[0] if len(flats) == 1 else torch.cat(flats)
    torch.distributed.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def rank() -> int:
    """The number of this process, 0 if it is the only one."""
    return torch.distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this process may print."""
    return rank() == 0


def refuse_ranks(what: str) -> None:
    """Raise, within a group of processes, for a measurement that they would not share.

    Raises:
        ValueError: There are several processes.
    """
    if is_distributed():
        raise ValueError(
            f"{what!r} is not added up over processes, and this is rank {rank()} of {world_size()}: "
            "each would measure its own share alone. Run it in a single process: without torchrun, "
            "before torch.distributed.init_process_group or after destroy_process_group."
        )


class Ranks:
    """The processes that work on one thing; see :func:`ranks_together`."""

    def __init__(self) -> None:
        self.place = ""
        self.is_settled = not is_distributed()

    def agree(self, facts: Callable[[], Keywords], seen: Keywords | None = None) -> None:
        """Wait for all, and raise unless each succeeded and says the same of what it did.

        Args:

            facts (Callable): What must be the same on all of them.
            seen (mapping, optional): Likewise, of what they saw of the data: a process that saw none
                        leaves it out.
                        Default: None

        Raises:
            ValueError: On every process alike, with the ranks and what differs.
        """
        if self.is_settled:
            return
        own = flattened(facts())
        self.is_settled = True
        answers = _answers(("facts", (own, dict(seen or {}))))
        _raise_failures(answers)
        records = [answer[1][0] for answer in answers]
        names = dict.fromkeys(name for record in records for name in record)
        complete = [dict.fromkeys(names) | record for record in records]
        check_alike(complete, [answer[1][1] for answer in answers])

    def fail(self, error: Exception) -> None:
        """Tell the others of an error and raise the one that all of them raise."""
        if self.is_settled:
            return
        self.is_settled = True
        where = f" in {self.place}" if self.place else ""
        try:
            answers = _answers(("error", f"{where}: {type(error).__name__}: {error}"))
        except ValueError:  # nobody is there to be told
            return
        try:
            _raise_failures(answers)
        except ValueError as common:
            if hasattr(error, "partial"):
                common.partial = error.partial  # type: ignore[attr-defined]
            raise common from error


@contextmanager
def ranks_together() -> Iterator[Ranks]:
    """Where one process fails in the block, or finds another thing than the others, all of them raise
    the same ValueError instead of waiting for it. Alone, a process raises its own errors."""
    ranks = Ranks()
    try:
        yield ranks
    except Exception as error:
        ranks.fail(error)
        raise


def _answers(answer: tuple[str, Any]) -> list[tuple[str, Any]]:
    try:
        return gather(answer)
    except RuntimeError as error:
        raise ValueError(
            f"Rank {rank()} of {world_size()} got no answer from the others: a process was killed or "
            f"lost, or took longer than the group's timeout allows ({error})."
        ) from error


def _raise_failures(answers: list[tuple[str, Any]]) -> None:
    failures = [
        f"rank {place} failed{answer[1].rstrip('.')}"
        for place, answer in enumerate(answers)
        if answer[0] == "error"
    ]
    if failures:
        raise ValueError(f"{'; '.join(failures)}. No rank has a result.")


def check_alike(*records: Sequence[Keywords]) -> None:
    """Raise, on all alike, unless all ranks have the same records, of which each may lack some names.

    Raises:
        ValueError: The same one wherever the records are, with the ranks and what differs.
    """
    differing = "; ".join(part for part in map(_differing, records) if part)
    if differing:
        raise ValueError(f"The ranks do not measure the same thing: {differing}.")


def flattened(record: Keywords, start: str = "") -> JsonDict:
    """A record in which parts of parts have names of their own."""
    parts: JsonDict = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            parts |= flattened(value, f"{start}{name}.")
        else:
            parts[start + name] = value
    return parts


def _differing(records: Sequence[Keywords]) -> str:
    """What some ranks say differently, in words."""
    parts = []
    for name in dict.fromkeys(name for record in records for name in record):
        by_value: dict[str, list[int]] = {}
        for place, record in enumerate(records):
            if name in record:
                by_value.setdefault(repr(record[name]), []).append(place)
        if len(by_value) > 1:
            said = " and ".join(
                f"{value if len(value) <= 120 else value[:117] + '...'} on {_ranks(places)}"
                for value, places in by_value.items()
            )
            parts.append(f"{name} is {said}")
    return "; ".join(parts)


def _ranks(places: list[int]) -> str:
    numbers = ", ".join(map(str, places[:8])) + (" ..." if len(places) > 8 else "")
    return f"rank{'s' if len(places) > 1 else ''} {numbers}"
