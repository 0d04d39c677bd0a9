"""A list of a model's layers that is also read by name and prints as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

from captum_classfilters._core.names import hint
from captum_classfilters._core.tables import Row, Table, Tabular, described, import_pandas

if TYPE_CHECKING:
    import pandas


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Layer = TypeVar("Layer", bound=_Named)


class NamedLayers(Tabular, Sequence[Layer], Generic[Layer]):
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
            raise KeyError(f"no layer {index!r}. {hint(index, [one.name for one in self._layers])}")
        return self._layers[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each layer, with all that is known of it.

        Returns:
            *pandas.DataFrame*. Needs the extra ``pandas``.
        """
        layers: list[Any] = list(self._layers)
        frame: pandas.DataFrame = import_pandas().DataFrame([asdict(layer) for layer in layers])
        return frame

    def _rows(self) -> list[Row]:
        """What is printed, layer by layer."""
        raise NotImplementedError

    def _tables(self) -> list[Table]:
        return [Table(self._rows(), most=None)]

    def __repr__(self) -> str:
        names = described([layer.name for layer in self._layers])
        return f"{type(self).__name__}({len(self)} layers: {names})"
