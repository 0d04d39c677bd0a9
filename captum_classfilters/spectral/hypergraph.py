"""Classes, or images, as vertices; directions as edges that hold those they are active in."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.extras import extra
from captum_classfilters._core.names import listed_names, short_name
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import ClassNames
from captum_classfilters.spectral.influential import influential

Rule = Literal["signal_share", "influential", "exemplars"]
Vertices = Literal["class", "image"]
Ends = Literal["highest", "lowest", "both"]

_SHOWN = 5  # vertices of an edge that are printed


@short_repr
@dataclass(frozen=True)
class Hypergraph(Tabular):
    r"""
    Vertices and the edges that hold them, which may be none: then the rule found nothing.

    Args:

        incidence (ndarray): Shape (V, E), bool: the vertex is in the edge.
        vertices (tuple of str): Names of the vertices.
        edges (tuple of str): Names of the edges.
        classes (ndarray or None): Shape (V,), int64: each vertex's class, its own index where
                    vertices are classes. None for a dual.
        num_classes (int): C.
        of_images (bool): Vertices are images, also where each class has one.
                    Default: False
    """

    incidence: NDArray[np.bool_]
    vertices: tuple[str, ...]
    edges: tuple[str, ...]
    classes: NDArray[np.int64] | None
    num_classes: int
    of_images: bool = False

    def __post_init__(self) -> None:
        shape = (len(self.vertices), len(self.edges))
        if self.incidence.shape != shape or self.incidence.dtype != np.bool_:
            raise ValueError(
                f"incidence is {self.incidence.dtype} of shape {self.incidence.shape}; expected bool "
                f"of shape {shape}, vertices by edges."
            )

    def _tables(self) -> list[Table]:
        rows = []
        for index, edge in enumerate(self.edges):
            held = np.flatnonzero(self.incidence[:, index])
            names = [short_name(self.vertices[vertex]) for vertex in held[:_SHOWN]]
            rows.append(
                {
                    "edge": edge,
                    "vertices": len(held),
                    "which": ", ".join(names) + (", …" if len(held) > _SHOWN else ""),
                }
            )
        return [Table(rows, bars=("vertices",))]

    def dual(self) -> "Hypergraph":
        """Edges as vertices, and vertices as edges.

        Returns:
            *Hypergraph*, without classes.
        """
        return Hypergraph(self.incidence.T, self.edges, self.vertices, None, self.num_classes)

    @arguments_checked
    def components(
        self, s: int = 1, of: Literal["vertices", "edges"] = "vertices"
    ) -> list[list[str]]:
        r"""
        The s-connected components.

        Two vertices are adjacent if they share at least s edges, two edges if they share at least s
        vertices. Those that are in fewer than s belong to no component.

        Args:

            s (int): At least 1.
                        Default: 1
            of (str): ``"vertices"`` or ``"edges"``.
                        Default: "vertices"

        Returns:
            *list* of lists of names, the largest first.

        Raises:
            ValueError: s or ``of`` is out of range.
        """
        if s < 1 or of not in ("vertices", "edges"):
            raise ValueError(f"s={s}, of={of!r}; expected s >= 1 and 'vertices' or 'edges'.")
        names = self.vertices if of == "vertices" else self.edges
        groups = connected_components(self.incidence if of == "vertices" else self.incidence.T, s)
        return [[names[index] for index in group] for group in groups]

    def to_scipy(self) -> sparse.csr_array:
        """The incidence matrix.

        Returns:
            *scipy.sparse.csr_array* of shape (V, E), int64.
        """
        return sparse.csr_array(self.incidence.astype(np.int64))

    def to_hypernetx(self) -> Any:
        """The same for HyperNetX's analyses and drawings; vertices and edges without partners go.

        Returns:
            *hypernetx.Hypergraph*.

        Raises:
            ImportError: HyperNetX is missing.
        """
        hypernetx = extra("hypernetx", "to_hypernetx")
        return hypernetx.Hypergraph(
            {
                edge: [self.vertices[row] for row in np.flatnonzero(self.incidence[:, column])]
                for column, edge in enumerate(self.edges)
                if self.incidence[:, column].any()
            }
        )


@arguments_checked
def class_hypergraph(
    scores: Tensor,
    labels: Tensor,
    *,
    rule: Rule = "signal_share",
    vertices: Vertices = "class",
    threshold: float | None = None,
    share: float = 0.1,
    num_exemplars: int = 10,
    ends: Ends = "highest",
    class_names: ClassNames | None = None,
) -> Hypergraph:
    r"""
    Build a layer's hypergraph of classes, or images, and the directions active in them.

    =============== =================================== ==================================
    rule            an image is in an edge if           a class is in an edge if
    =============== =================================== ==================================
    signal_share    the direction's share of the        its images' mean share is at least
                    image's absolute signals is at      ``threshold``, 2 / U by default:
                    least ``threshold``                 twice an even share
    influential     the direction is influential        it is so for at least ``threshold``
                    (:func:`influential` at ``share``)  of its images, half by default
    exemplars       it is one of the direction's        one of these images is its
                    ``num_exemplars`` highest images,
                    if their scores differ
    =============== =================================== ==================================

    Source: Praggastis et al. (2022), https://arxiv.org/abs/2208.06894, whose abstract models class
    separation with hypergraphs. The rules are this library's readings of it.

    Args:

        scores (Tensor): Shape (N, U): each image's signals, as
                    :func:`~captum_classfilters.identify.unit_scores` gives them.
        labels (Tensor): Shape (N,), int64: classes.
        rule (str): See above.
                    Default: "signal_share"
        vertices (str): ``"class"`` or ``"image"``.
                    Default: "class"
        threshold (float, optional): See above.
                    Default: None
        share (float): Of the rule ``"influential"``.
                    Default: 0.1
        num_exemplars (int): Of the rule ``"exemplars"``.
                    Default: 10
        ends (str): Of the rule ``"exemplars"``: ``"highest"``, ``"lowest"`` or ``"both"``, which
                    takes ``num_exemplars`` of each.
                    Default: "highest"
        class_names (sequence of str, optional): Names of the C classes; by default their numbers.
                    Default: None

    Returns:
        *Hypergraph*: Edges are named ``"u0"`` to ``"u{U-1}"``, images ``"image 0"`` and so on.

    Raises:
        ValueError: Shapes do not fit, or an option is unknown.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import class_hypergraph
        >>> scores = torch.tensor([[4., 0.2, 0.], [5., 0., 0.1], [0.1, -3., 3.]])
        >>> graph = class_hypergraph(scores, torch.tensor([0, 0, 1]), threshold=0.3)
        >>> graph.incidence.tolist()
        [[True, False, False], [False, True, True]]
        >>> graph.components()
        [['0'], ['1']]
    """
    membership = Membership(scores, rule, threshold, share, num_exemplars, ends)
    labels, names = checked_labels(scores, labels, class_names)
    edges = tuple(f"u{unit}" for unit in range(scores.shape[1]))
    if vertices == "class":
        incidence = membership.of_classes(labels.numpy(), len(names))
        return Hypergraph(incidence, names, edges, np.arange(len(names)), len(names))
    if vertices == "image":
        images = tuple(f"image {index}" for index in range(len(scores)))
        incidence = membership.of_images()
        return Hypergraph(incidence, images, edges, labels.numpy(), len(names), of_images=True)
    raise ValueError(f"vertices={vertices!r}; choose one of {list(get_args(Vertices))}.")


class Membership:
    """Which images, and which classes under any labels, are in which edges."""

    def __init__(
        self,
        scores: Tensor,
        rule: Rule,
        threshold: float | None,
        share: float,
        num_exemplars: int,
        ends: Ends,
    ) -> None:
        if scores.dim() != 2 or not scores.numel():
            raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (N, U).")
        if not bool(scores.isfinite().all()):
            raise ValueError("The scores hold NaN or infinity.")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold}; expected a number in (0, 1].")
        if num_exemplars < 1:
            raise ValueError(f"num_exemplars={num_exemplars}; expected a positive number.")
        values = scores.detach().double().cpu()
        self.rule = rule
        if rule == "signal_share":
            size = values.abs()
            tiny = torch.finfo(torch.float64).tiny
            self.degree = (size / size.sum(1, keepdim=True).clamp(min=tiny)).numpy()
            self.threshold = 2 / scores.shape[1] if threshold is None else threshold
        elif rule == "influential":
            self.degree = influential(values.abs(), share=share)[0].double().numpy()
            self.threshold = 0.5 if threshold is None else threshold
        elif rule == "exemplars":
            if threshold is not None:
                raise ValueError("The rule 'exemplars' has no threshold; give num_exemplars.")
            self.degree = _exemplary(values, num_exemplars, ends).double().numpy()
        else:
            raise ValueError(f"rule={rule!r}; choose one of {list(get_args(Rule))}.")

    def of_images(self) -> NDArray[np.bool_]:
        """Shape (N, U)."""
        if self.rule == "signal_share":
            return np.asarray(self.degree >= self.threshold)
        return np.asarray(self.degree > 0)

    def of_classes(
        self, labels: NDArray[np.int64], num_classes: int, size: int | None = None
    ) -> NDArray[np.bool_]:
        """Shape (C, U); with a size, the threshold is set so that this many incidences remain."""
        member = np.zeros((num_classes, len(labels)))
        member[labels, np.arange(len(labels))] = 1
        total = member @ self.degree
        if self.rule == "exemplars":
            return np.asarray(total > 0)
        mean = total / np.maximum(member.sum(1, keepdims=True), 1)
        edge = self.threshold
        if size is not None:
            edge = np.inf if size == 0 else -np.partition(-mean, size - 1, axis=None)[size - 1]
        return np.asarray((mean >= edge - 1e-12) & (mean > 0))


def _exemplary(values: Tensor, num_exemplars: int, ends: Ends) -> Tensor:
    """Whether an image is among a unit's highest or lowest; ties go to the lower image index."""
    if ends not in get_args(Ends):
        raise ValueError(f"ends={ends!r}; choose one of {list(get_args(Ends))}.")
    mask = torch.zeros_like(values, dtype=torch.bool)
    for end in ("highest", "lowest") if ends == "both" else (ends,):
        order = values.sort(dim=0, descending=end == "highest", stable=True).indices
        mask.scatter_(0, order[:num_exemplars], True)
    # Where all images have the same score, none is exemplary.
    return mask & (values.amax(0) > values.amin(0))


def checked_labels(
    scores: Tensor, labels: Tensor, class_names: ClassNames | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels on the CPU, and the names of all classes."""
    if labels.shape != (len(scores),) or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected whole numbers of "
            f"shape ({len(scores)},)."
        )
    highest = int(labels.max())
    given = listed_names(class_names)
    num_classes = highest + 1 if given is None else len(given)
    if int(labels.min()) < 0 or highest >= num_classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {highest}; expected 0 to {num_classes - 1}."
        )
    return labels.long().cpu(), tuple(given or map(str, range(num_classes)))


def connected_components(incidence: NDArray[np.bool_], s: int) -> list[list[int]]:
    """Rows that are linked by sharing at least s columns."""
    member = sparse.csr_array(incidence.astype(np.int64))
    linked = (member @ member.T).toarray() >= s
    of_row = sparse.csgraph.connected_components(sparse.csr_array(linked), directed=False)[1]
    inside = np.flatnonzero(linked.diagonal())
    groups = [inside[of_row[inside] == label].tolist() for label in np.unique(of_row[inside])]
    return sorted(groups, key=lambda group: (-len(group), group))
