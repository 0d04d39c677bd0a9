"""A list of a model's layers that is also read by name and prints as a table."""

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar, overload


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Layer = TypeVar("Layer", bound=_Named)


class NamedLayers(Sequence[Layer], Generic[Layer]):
    """What is known of some layers; ``layers[0]``, ``layers["conv1"]``."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int | str) -> Layer: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Layer, ...]: ...

    def __getitem__(self, index: int | str | slice) -> Layer | tuple[Layer, ...]:
        if isinstance(index, str):
            for layer in self._layers:
                if layer.name == index:
                    return layer
            raise KeyError(index)
        return self._layers[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def _rows(self) -> list[tuple[str, ...]]:
        """The table's rows, its head first."""
        raise NotImplementedError

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    __repr__ = __str__
