"""The little that ranks tell each other besides what torchmetrics merges."""

from typing import TypeVar

import torch.distributed

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether more than one process works on the data."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def gather(value: T) -> list[T]:
    """One object from every rank, in order of rank."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def rank() -> int:
    """The number of this process, 0 if it is the only one."""
    return torch.distributed.get_rank() if is_distributed() else 0


def is_main_process() -> bool:
    """Whether this process may print."""
    return rank() == 0
