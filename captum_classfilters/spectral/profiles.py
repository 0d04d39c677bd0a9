"""Which directions, channels, elements or positions carry an image, and a class."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn, get_args, overload

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked, indices_of, whole_number
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.types import Dataloader, Directions, Unpack
from captum_classfilters._core.units import (
    Aggregate,
    Rows,
    Seen,
    UnitTap,
    aggregated,
    check_aggregate,
    units_of,
)
from captum_classfilters.identify.unit_scores import collect_units
from captum_classfilters.spectral.influential import influential

Kind = Literal["direction", "channel", "element", "position"]


@short_repr
@dataclass(frozen=True)
class Profile:
    r"""
    Influential units of one image, or of several images together; profiles add.

    Args:

        kind (str): ``"direction"``, ``"channel"``, ``"element"`` or ``"position"``.
        counts (dict): By layer, a sparse row (1, U): the number of images in which a unit is
                    influential.
        totals (dict): By layer, a sparse row (1, U): the sum of its weights.
        num_images (int): Images summed.
    """

    kind: str
    counts: Mapping[str, sparse.csr_array]
    totals: Mapping[str, sparse.csr_array]
    num_images: int

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(self.counts)

    @property
    def size(self) -> int:
        """Units influential in at least one image, over all layers."""
        return sum(int(row.count_nonzero()) for row in self.counts.values())

    def weights(self, layer: str) -> sparse.csr_array:
        """Mean weights of a layer's units over all images, which sum to one.

        Args:

            layer (str): Its name.

        Returns:
            *scipy.sparse.csr_array* of shape (1, U). Images in which no unit of the layer is
            positive have no weights, and lower the sum.
        """
        return self.totals[layer] / max(self.num_images, 1)

    def units(self, layer: str) -> list[int]:
        """A layer's influential units, the heaviest first.

        Args:

            layer (str): Its name.

        Returns:
            *list* of int.
        """
        row = self.totals[layer].tocoo()
        order = np.lexsort((row.coords[1], -row.data))
        return [int(unit) for unit in row.coords[1][order]]

    def __add__(self, other: "Profile") -> "Profile":
        if self.kind != other.kind or _widths(self.counts) != _widths(other.counts):
            raise ValueError(
                f"Profiles of {self.kind}s at {_widths(self.counts)} and of {other.kind}s at "
                f"{_widths(other.counts)} do not add: kinds, layers and numbers of units differ."
            )
        return Profile(
            self.kind,
            {name: row + other.counts[name] for name, row in self.counts.items()},
            {name: row + other.totals[name] for name, row in self.totals.items()},
            self.num_images + other.num_images,
        )


@short_repr
@dataclass(frozen=True)
class ImageProfiles(Sequence[Profile]):
    r"""
    The profiles of many images; a sequence of :class:`Profile`.

    Args:

        kind (str): As in :class:`Profile`.
        weights (dict): By layer, a sparse matrix (N, U) whose rows sum to one.
        labels (Tensor): Shape (N,), int64: the images' classes.
        positions (dict): By layer, the shape of its maps, (h, w) for a convolution. A unit of kind
                    ``"position"`` is an index into it, one of kind ``"element"`` into
                    (K, \*positions), both in row-major order.
    """

    kind: str
    weights: Mapping[str, sparse.csr_array]
    labels: Tensor
    positions: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Profile: ...

    @overload
    def __getitem__(self, index: slice) -> NoReturn: ...

    def __getitem__(self, index: int | slice) -> Profile:
        if isinstance(index, slice):
            raise TypeError("ImageProfiles take one index; use `of` for several images.")
        place = whole_number(index)
        if place is None:
            raise TypeError(f"ImageProfiles take the index of an image, not {kind_of(index)}.")
        return self.of([place])

    def of(self, images: Sequence[int] | Tensor) -> Profile:
        """The sum of some images' profiles.

        Args:

            images (sequence of int or Tensor): Their indices, or a bool mask of shape (N,).

        Returns:
            *Profile*.

        Raises:
            ValueError: They are neither.
            IndexError: There is no such image.
        """
        rows = indices_of("images", images, len(self))
        for place in rows:
            if not -len(self) <= place < len(self):
                raise IndexError(f"There are {len(self)} images, not one with index {place}.")
        counts, totals = {}, {}
        for name, matrix in self.weights.items():
            chosen = matrix[np.array(rows, dtype=np.int64)]
            totals[name] = sparse.csr_array(chosen.sum(0)[None])
            counts[name] = sparse.csr_array((chosen > 0).astype(np.int64).sum(0)[None])
        return Profile(self.kind, counts, totals, len(rows))

    def by_class(self) -> dict[int, Profile]:
        """Class profiles: the sums over each class's images.

        Returns:
            *dict* from class to :class:`Profile`, for the classes that have images.
        """
        return {
            int(label): self.of((self.labels == label).nonzero()[:, 0])
            for label in self.labels.unique()
        }


@arguments_checked
def profile_images(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    dataloader: Dataloader,
    *,
    kind: Kind = "channel",
    directions: Mapping[str, Directions] | None = None,
    aggregate: Aggregate | None = None,
    share: float | None = None,
    quantile: float | None = None,
    at_most: int | None = None,
    channel_dim: int | Mapping[str, int] | None = None,
    num_classes: int | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> ImageProfiles:
    r"""
    Profile every image by its influential units, layer by layer.

    ============= ======================= ============================== ========================
    kind          unit                    score, if positive             rule
    ============= ======================= ============================== ========================
    direction     singular direction      size of the mean signal        share 0.1
    channel       filter                  maximum over positions         share 0.1
    element       filter at a position    the same, where it is reached  share 0.1
    position      position                norm over filters              quantile 0.97, at most
                                                                         100
    ============= ======================= ============================== ========================

    The rules are :func:`influential`'s. All batches of images are read once, with one forward pass
    and one hook for each layer, whatever its successors do to its output in place.

    Source: DeepDataProfiler (https://github.com/pnnl/DeepDataProfiler), the library of Praggastis
    et al. (2022).

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (str, nn.Module or sequence): Layers, or their dotted names.
        dataloader (iterable): Batches of (images, labels).
        kind (str): What the units are.
                    Default: "channel"
        directions (mapping, optional): For kind ``"direction"``, by layer name, its decomposition,
                    or a matrix (K, r): the result of
                    :func:`~captum_classfilters.spectral.model_svd` say.
                    Default: None
        aggregate (str, optional): For directions and channels, another score, as in
                    :func:`~captum_classfilters.identify.unit_scores`; the ``"mean"``, ``"min"`` and
                    ``"sum"`` count by their size.
                    Default: None
        share (float, optional): Of :func:`influential`; by default as in the table.
        quantile (float, optional): Of :func:`influential`; by default as in the table.
        at_most (int, optional): Of :func:`influential`; by default as in the table.
        channel_dim (int or mapping, optional): Axis of the filters where it cannot be told from the
                    layer, for all layers or by name.
                    Default: None
        num_classes (int, optional): C; labels are 0 to C - 1. By default the number of the model's
                    outputs, if those are scores (N, C), else any.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *ImageProfiles*.

    Raises:
        ValueError: An option is unknown or does not fit the kind, or as in
            :func:`~captum_classfilters.identify.unit_scores`.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import model_svd, profile_images
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> data = [(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)]
        >>> profiles = profile_images(
        ...     net, "0", data, kind="direction", directions=model_svd(net), show_progress=False)
        >>> len(profiles), profiles.weights["0"].sum(1).round(6).tolist()
        (6, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        >>> profiles.by_class()[1].num_images
        3
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}; choose one of {list(get_args(Kind))}.")
    if (directions is not None) != (kind == "direction"):
        raise ValueError("directions go with kind='direction', which needs them.")
    if aggregate is not None:
        if kind not in ("direction", "channel"):
            raise ValueError(f"aggregate={aggregate!r} does not apply to kind={kind!r}.")
        check_aggregate(aggregate)
    if share is None and quantile is None:
        share = None if kind == "position" else 0.1
        quantile = 0.97 if kind == "position" else None
        at_most = 100 if kind == "position" and at_most is None else at_most
    select = partial(influential, share=share, quantile=quantile, at_most=at_most)
    select(torch.zeros(1, 1))  # refuses what does not fit
    taps = units_of(model, layers, channel_dim, directions)
    for tap in taps:
        tap.average_first = aggregate == "mean" or (kind == "direction" and aggregate is None)
        tap.reduce = partial(_scores, kind=kind, aggregate=aggregate)
    rows = {tap.name: Rows(partial(_sparse_weights, tap, select)) for tap in taps}
    one_size = kind in ("element", "position")
    labels = collect_units(
        model, taps, dataloader, rows, num_classes, unpack, show_progress, one_size
    )
    weights = {
        name: sparse.csr_array(sparse.vstack(kept.pieces(), format="csr"))
        for name, kept in rows.items()
    }
    return ImageProfiles(kind, weights, labels, {tap.name: tap.positions for tap in taps})


def _scores(maps: Tensor, kind: Kind, aggregate: str | None) -> Seen:
    """Scores (N, U) of a batch's maps, and the places of elements."""
    if kind == "position":
        return (aggregated(maps.transpose(1, 2), "l2"),)
    if kind == "element":
        return tuple(maps.max(2))  # the place of the first of equal values
    how = aggregate or ("mean" if kind == "direction" else "max")
    values = aggregated(maps, how)
    return (values.abs() if how in ("mean", "min", "sum") else values,)


def _sparse_weights(
    tap: UnitTap,
    select: Callable[[Tensor], tuple[Tensor, Tensor]],
    scores: Tensor,
    places: Tensor | None = None,
) -> sparse.csr_array:
    """Weights (N, U) of the influential units, selected where the scores are."""
    mask, weights = select(scores)
    rows, columns = mask.nonzero(as_tuple=True)
    values, width = weights[rows, columns], scores.shape[1]
    if places is not None:
        num_positions = math.prod(tap.positions)
        columns, width = columns * num_positions + places[rows, columns], width * num_positions
    entries = (values.cpu().numpy(), (rows.cpu().numpy(), columns.cpu().numpy()))
    return sparse.csr_array(entries, shape=(len(scores), width))


def _widths(rows: Mapping[str, sparse.csr_array]) -> dict[str, int]:
    return {name: int(row.shape[1]) for name, row in rows.items()}
