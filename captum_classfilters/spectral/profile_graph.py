"""Which units of one layer make the influential units of the next, as a graph."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.batches import Batch, Batches
from captum_classfilters._core.extras import extra
from captum_classfilters._core.layers import CHECKPOINTED
from captum_classfilters._core.names import kind_of
from captum_classfilters._core.outputs import at_least_float32
from captum_classfilters._core.types import Dataloader, Directions, Unpack
from captum_classfilters._core.units import UnitTap, read_units, units_of
from captum_classfilters.spectral.influential import influential

if TYPE_CHECKING:
    import networkx

GraphKind = Literal["channel", "direction"]
_ROUNDING = 1e-12  # of a mean: what rounding leaves of the spread of equal numbers
_ENTRIES_AT_ONCE = 2**22  # of contributions that are weighed together


@arguments_checked
def profile_graph(
    model: nn.Module,
    layers: Sequence[str | nn.Module],
    dataloader: Dataloader,
    *,
    kind: GraphKind = "channel",
    directions: Mapping[str, Directions] | None = None,
    share: float = 0.1,
    contribution_share: float = 0.1,
    channel_dim: int | Mapping[str, int] | None = None,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> "networkx.DiGraph":
    r"""
    Connect the influential units of successive layers by what they contribute to each other.

    In every image, each influential unit of a layer (as :func:`profile_images` finds them) is
    followed back to the layer before. Unit *a* there contributes its maps times the gradient of the
    later unit's score, summed over positions,

    .. math:: m_{ab} = \sum_p z_{a p} \, \partial s_b / \partial z_{a p} ,

    and the units with the largest positive contributions are accepted by the same rule
    (:func:`influential` at ``contribution_share``). Between two weighted layers without anything
    non-linear these are the products of weights and inputs; any model is followed through whatever
    stands between the layers. One image's graph comes from a loader of one image, a class's from
    one of the class's images.

    Args:

        model (nn.Module): The model. It runs in evaluation mode and is left as found.
        layers (sequence): Two layers or more, or their dotted names, in the order in which they
                    run.
        dataloader (iterable): Batches of (inputs, labels); labels are not used and may be missing.
        kind (str): ``"channel"`` or ``"direction"``, with scores as in :func:`profile_images`.
                    Default: "channel"
        directions (mapping, optional): For kind ``"direction"``, by layer name, its decomposition.
                    Default: None
        share (float): For influential units.
                    Default: 0.1
        contribution_share (float): For contributions.
                    Default: 0.1
        channel_dim (int or mapping, optional): Axis of the filters where it cannot be told from the
                    layer, for all layers or by name.
                    Default: None
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *networkx.DiGraph*: Nodes are (layer, unit); edges lead to the later layer and have
        ``count``, the number of images, ``weight``, the mean over the images of a contribution's
        share of those accepted, and ``length`` = 1 / ``weight``. ``graph.graph["num_images"]`` is
        the number of images.

    Raises:
        ImportError: networkx is missing.
        ValueError: There are fewer than two layers, no gradient of a later one reaches the one
                    before it, or an option is unknown or does not fit.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import profile_graph
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 2, 1, bias=False), torch.nn.Flatten(),
        ...     torch.nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([1., 2.]).reshape(2, 1, 1, 1))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[3., -1.]]))
        >>> data = [(torch.ones(1, 1, 1, 1), torch.zeros(1))]
        >>> graph = profile_graph(net, ["0", "2"], data, show_progress=False)
        >>> list(graph.edges(data="weight"))
        [(('0', 0), ('2', 0), 1.0)]
    """
    networkx = extra("networkx", "profile_graph")
    if kind not in get_args(GraphKind):
        raise ValueError(f"kind={kind!r}; choose one of {list(get_args(GraphKind))}.")
    if (directions is not None) != (kind == "direction"):
        raise ValueError("directions go with kind='direction', which needs them.")
    for part in (share, contribution_share):
        influential(torch.zeros(1, 1), share=part)
    taps = units_of(model, layers, channel_dim, directions)
    if len(taps) < 2:
        raise ValueError("A profile graph needs two layers or more.")
    for tap in taps:
        tap.differentiable = True
    links = [_Link(*ends, share, contribution_share) for ends in pairwise(taps)]

    def take(batches: Batches, batch: Batch, _output: object) -> None:
        batches.settle()  # which backward passes are needed depends on the numbers
        for link in links:
            link.add(batch.number)

    num_images = read_units(
        model,
        taps,
        dataloader,
        "graph",
        take,
        unpack=unpack,
        show_progress=show_progress,
        labeled=False,
    )
    graph = networkx.DiGraph(num_images=num_images)
    for link in links:
        for a, b, count, total in link.edges():
            weight = total / num_images
            graph.add_edge(a, b, count=count, weight=weight, length=1 / weight)
    return graph


def distance_matrix(
    graph: "networkx.DiGraph", *, directed: bool = False, kernel: bool = False
) -> tuple[list[Hashable], NDArray[np.float64]]:
    r"""
    Lengths of the shortest paths between all nodes of a profile graph.

    Args:

        graph (networkx.DiGraph): Edges have a ``length``.
        directed (bool): Follow edges forwards only.
                    Default: False
        kernel (bool): Return :math:`1 - \exp(-d / 2 s)`, with s the standard deviation of the
                    finite distances between different nodes (their mean, where all are equal), and 1
                    where there is no path.
                    Default: False

    Returns:
        *tuple* of the list of nodes and an array (n, n); infinite, or 1, where there is no path.

    Examples::

        >>> import networkx
        >>> from captum_classfilters.spectral import distance_matrix
        >>> graph = networkx.DiGraph()
        >>> graph.add_edge("a", "b", length=2.0)
        >>> graph.add_edge("b", "c", length=0.5)
        >>> distance_matrix(graph)[1][0].tolist()
        [0.0, 2.0, 2.5]
    """
    networkx = extra("networkx", "distance_matrix")
    nodes = list(graph)
    if not nodes:
        return nodes, np.zeros((0, 0))
    lengths = networkx.to_scipy_sparse_array(graph, nodelist=nodes, weight="length", dtype=float)
    distances = np.asarray(sparse.csgraph.dijkstra(lengths, directed=directed))
    if not directed:  # a path's two ways sum its lengths in opposite orders, which round apart
        distances = np.minimum(distances, distances.T)
    if not kernel:
        return nodes, distances
    different = ~np.eye(len(nodes), dtype=bool)
    finite = distances[different & np.isfinite(distances)]
    spread, mean = (float(finite.std()), float(finite.mean())) if len(finite) else (0.0, 0.0)
    # Equal distances have no spread but what rounding leaves; any scale then keeps their order.
    if spread <= _ROUNDING * mean:
        spread = mean or 1.0
    return nodes, 1 - np.exp(-distances / (2 * spread))


@arguments_checked
def persistence(
    distances: NDArray[np.float64], *, max_dimension: int = 1
) -> list[NDArray[np.float64]]:
    r"""
    Persistent homology of a distance matrix, by Ripser.

    Args:

        distances (ndarray): Shape (n, n), symmetric up to rounding, as :func:`distance_matrix` gives
                    undirected.
        max_dimension (int): Highest dimension.
                    Default: 1

    Returns:
        *list* of diagrams (number, 2) of births and deaths, one for each dimension from 0.

    Raises:
        ImportError: Ripser is missing.
        ValueError: The matrix is not symmetric.
    """
    try:
        values = np.asarray(distances, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"distances is {kind_of(distances)}; take the second of what distance_matrix returns."
        ) from error
    if values.ndim != 2 or values.shape != values.T.shape or not _is_symmetric(values):
        raise ValueError(
            f"distances have shape {values.shape} and must be a symmetric matrix; take those of "
            "distance_matrix with directed=False."
        )
    ripser = extra("ripser", "persistence").ripser
    values = np.minimum(values, values.T)
    return list(ripser(values, distance_matrix=True, maxdim=max_dimension)["dgms"])


def _is_symmetric(values: NDArray[np.float64]) -> bool:
    """Whether a square matrix is symmetric, but for what single precision rounds off; NaN is not."""
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    return bool(np.allclose(values, values.T, rtol=1e-6, atol=1e-9 * largest))


class _Link:
    """Contributions of one layer's units to the next one's, summed over images where the model is."""

    def __init__(
        self, before: UnitTap, after: UnitTap, share: float, contribution_share: float
    ) -> None:
        self.before, self.after = before, after
        self.share, self.contribution_share = share, contribution_share
        self.counts: Tensor | None = None  # (later units, earlier units)
        self.totals: Tensor | None = None

    def add(self, batch: int) -> None:
        """Add the batch that the layers have just seen."""
        (earlier,), (later,) = self.before.seen, self.after.seen
        scores = later.amax(2) if self.after.matrix is None else later.mean(2).abs()
        if self.counts is None:
            shape = (later.shape[1], earlier.shape[1])
            self.counts = torch.zeros(shape, dtype=torch.int64, device=scores.device)
            self.totals = torch.zeros(shape, dtype=torch.float64, device=scores.device)
        mask, _ = influential(scores, share=self.share)
        images, units = mask.cpu().nonzero(as_tuple=True)
        held, columns = [], []
        for unit in units.unique().tolist():
            rows = images[units == unit]
            # Images do not depend on each other, so one sum has every image's own gradient.
            (gradient,) = torch.autograd.grad(
                scores[rows, unit].sum(), self.before.source, retain_graph=True, allow_unused=True
            )
            if gradient is None:
                raise ValueError(
                    f"No gradient of the layer {self.after.name!r} reaches {self.before.name!r}: give "
                    "layers in the order in which they run; quantized layers, rounding and "
                    f"torch.no_grad() let no gradient through; {CHECKPOINTED}."
                )
            slopes = self.before.projected(gradient)
            held.append((at_least_float32(earlier.detach()) * slopes).sum(2)[rows])
            columns += [unit] * len(rows)
            if len(columns) * earlier.shape[1] >= _ENTRIES_AT_ONCE:
                self._weigh(held, columns, batch)
                held, columns = [], []
        self._weigh(held, columns, batch)

    def _weigh(self, held: list[Tensor], units: list[int], batch: int) -> None:
        """Add the contributions that are accepted, one row for each image of a later unit."""
        if not units:
            return
        assert self.counts is not None
        assert self.totals is not None
        contributions = torch.cat(held)
        if not bool(contributions.isfinite().all()):
            raise ValueError(
                f"NaN or Inf among the gradients of the layer {self.after.name!r} at "
                f"{self.before.name!r} in batch {batch}."
            )
        accepted, weights = influential(contributions, share=self.contribution_share)
        index = torch.tensor(units).to(weights.device)
        self.counts.index_add_(0, index, accepted.long())
        self.totals.index_add_(0, index, weights)

    def edges(self) -> Iterator[tuple[tuple[str, int], tuple[str, int], int, float]]:
        """Earlier unit, later unit, number of images and sum of weights."""
        assert self.counts is not None
        assert self.totals is not None
        counts, totals = self.counts.cpu().T, self.totals.cpu().T
        for a, b in counts.nonzero().tolist():
            ends = (self.before.name, a), (self.after.name, b)
            yield *ends, int(counts[a, b]), float(totals[a, b])
