"""Types that many signatures share, where one name says more than what it stands for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor

#: The user's batches, in whatever form they come; ``_core/batches.py`` is what reads them.
Dataloader: TypeAlias = Iterable[object]

#: From one of these batches to the pair (inputs, labels).
Unpack: TypeAlias = Callable[[Any], tuple[Any, Any]]

#: C names that the user gave: in the classes' order, or by index, as Hugging Face's ``id2label``.
ClassNames: TypeAlias = Iterable[str] | Mapping[int, str]

#: A model, or a function that runs one.
ForwardFunc: TypeAlias = Callable[..., Any]

#: The arguments of one call of a model: tensors with the images first, and whatever else it takes.
ModelInputs: TypeAlias = tuple[Any, ...]

#: A batch to try a model with: its only argument, or all of them.
ExampleInputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any]

#: Arguments of any function, by place and by name, which are handed on as they are.
Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = Mapping[str, Any]

#: What is kept for the record, with tables and in files: names to what JSON can hold.
JsonDict: TypeAlias = dict[str, Any]

#: What ``attribute`` returns, as in Captum: a tensor shaped like the layer, a tuple of them if the
#: layer handles several, a list if there are several layers. Which of them is known from how the
#: method was made and not from its type, so that a caller need not tell them apart.
Attributions: TypeAlias = Tensor | Any


#: Raises an error, soon, unless a bool of no axes, on a device maybe, is true.
Check: TypeAlias = Callable[[Tensor, Callable[[], Exception]], None]


class DatasetLike(Protocol):
    """A data set, a list say: an index gives an image, or a pair that starts with one."""

    def __getitem__(self, index: int, /) -> Any:
        """One example."""


class Decomposed(Protocol):
    """A decomposition of a layer's weight."""

    @property
    def left(self) -> Tensor:
        """Its directions in the space of the layer's K filters, (K, r)."""


#: Directions of a layer: the columns of a matrix (K, r), or those of its decomposition.
Directions: TypeAlias = Tensor | Decomposed


#: Keywords of ``attribute``; of several methods, such by a method's name or place.
AttributeKwargs: TypeAlias = Mapping[str, object] | Mapping[int, object]


class Replay(Protocol):
    """A batch that has run once, ready to run without some of its K filters, or pixels."""

    output: Tensor

    @property
    def gives_probabilities(self) -> bool:
        """Whether the model returns probabilities, not logits."""

    @property
    def num_images(self) -> int:
        """N."""

    @property
    def num_filters(self) -> int:
        """K."""

    def outputs(self, removed: Tensor) -> Tensor:
        """Outputs (P, N, ...) without sets of filters (P, K) or (P, N, K)."""

    def in_parts(self, removed: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same, one run at a time: which sets they are, and their outputs."""


class LayerMethod(Protocol):
    """What explains layers: a ``LayerAttribution`` of Captum or of this package."""

    layer: Any

    @property
    def attribute(self) -> Callable[..., Any]:
        """Attributions of a batch."""
