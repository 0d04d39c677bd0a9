"""Which units of one layer make the influential units of the next, as a graph."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters._core.batches import split_batch
from captum_classfilters._core.guard import model_left_as_found
from captum_classfilters._core.layers import check_runs, only_tensor
from captum_classfilters._core.units import UnitMaps, units_of
from captum_classfilters.spectral.influential import influential

if TYPE_CHECKING:
    import networkx

GraphKind = Literal["channel", "direction"]


def profile_graph(
    model: nn.Module,
    layers: Sequence[str | nn.Module],
    dataloader: Iterable[Any],
    *,
    kind: GraphKind = "channel",
    directions: Mapping[str, Any] | None = None,
    share: float = 0.1,
    contribution_share: float = 0.1,
    channel_dim: int | Mapping[str, int] | None = None,
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
        dataloader (iterable): Batches of (images, labels); labels are not used.
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
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *networkx.DiGraph*: Nodes are (layer, unit); edges lead to the later layer and have
        ``count``, the number of images, ``weight``, the mean over the images of a contribution's
        share of those accepted, and ``length`` = 1 / ``weight``. ``graph.graph["num_images"]`` is
        the number of images.

    Raises:
        ImportError: networkx is missing.
        ValueError: There are fewer than two layers, a later one does not depend on the one before
            it, or an option is unknown or does not fit.

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
    networkx = _networkx()
    if kind not in get_args(GraphKind):
        raise ValueError(f"kind={kind!r}; choose one of {list(get_args(GraphKind))}.")
    if (directions is not None) != (kind == "direction"):
        raise ValueError("directions go with kind='direction', which needs them.")
    for part in (share, contribution_share):
        influential(torch.zeros(1, 1), share=part)
    units = units_of(model, layers, directions, True, channel_dim)
    if len(units) < 2:
        raise ValueError("A profile graph needs two layers or more.")
    links = [_Links() for _ in units[1:]]
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else None
    bar = tqdm(dataloader, desc="graph", unit="batch", disable=not show_progress)
    number = 0
    with model_left_as_found(model, evaluation=True, freeze=True), torch.enable_grad():
        for index, batch in enumerate(bar):
            inputs, _ = split_batch(batch, index, device)
            maps = _maps(model, units, inputs)
            for link, before, after in zip(links, units, units[1:], strict=False):
                link.add(before, after, maps, share, contribution_share)
            number += len(inputs[0])
    if number == 0:
        raise ValueError("The data loader is empty.")
    graph = networkx.DiGraph(num_images=number)
    for link, before, after in zip(links, units, units[1:], strict=False):
        for (a, b), (count, total) in sorted(link.sums.items()):
            weight = total / number
            graph.add_edge(
                (before.name, a), (after.name, b), count=count, weight=weight, length=1 / weight
            )
    return graph


def distance_matrix(
    graph: "networkx.DiGraph", *, directed: bool = False, kernel: bool = False
) -> tuple[list[Any], NDArray[np.float64]]:
    r"""
    Lengths of the shortest paths between all nodes of a profile graph.

    Args:

        graph (networkx.DiGraph): Edges have a ``length``.
        directed (bool): Follow edges forwards only.
                    Default: False
        kernel (bool): Return :math:`1 - \exp(-d / 2 s)`, with s the standard deviation of the
                    finite distances between different nodes, and 1 where there is no path.
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
    networkx = _networkx()
    nodes = list(graph)
    if not nodes:
        return nodes, np.zeros((0, 0))
    lengths = networkx.to_scipy_sparse_array(graph, nodelist=nodes, weight="length", dtype=float)
    distances = np.asarray(sparse.csgraph.dijkstra(lengths, directed=directed))
    if not kernel:
        return nodes, distances
    different = ~np.eye(len(nodes), dtype=bool)
    finite = distances[different & np.isfinite(distances)]
    spread = float(finite.std()) if len(finite) else 0.0
    # Equal distances have no spread; any scale then keeps their order.
    spread = spread if spread > 0 else float(finite.mean()) if len(finite) else 1.0
    return nodes, 1 - np.exp(-distances / (2 * spread))


def persistence(
    distances: NDArray[np.float64], *, max_dimension: int = 1
) -> list[NDArray[np.float64]]:
    r"""
    Persistent homology of a distance matrix, by Ripser.

    Args:

        distances (ndarray): Shape (n, n), symmetric, as :func:`distance_matrix` gives undirected.
        max_dimension (int): Highest dimension.
                    Default: 1

    Returns:
        *list* of diagrams (number, 2) of births and deaths, one for each dimension from 0.

    Raises:
        ImportError: Ripser is missing.
        ValueError: The matrix is not symmetric.
    """
    values = np.asarray(distances, dtype=np.float64)
    if values.ndim != 2 or not np.array_equal(values, values.T, equal_nan=False):
        raise ValueError(
            f"distances have shape {values.shape} and must be a symmetric matrix; take those of "
            "distance_matrix with directed=False."
        )
    try:
        from ripser import ripser
    except ImportError as error:
        raise ImportError("Ripser is missing; install captum-classfilters[persistence].") from error
    return list(ripser(values, distance_matrix=True, maxdim=max_dimension)["dgms"])


class _Links:
    """Contributions between two layers, summed over images."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], tuple[int, float]] = {}

    def add(
        self,
        before: UnitMaps,
        after: UnitMaps,
        maps: Mapping[str, tuple[Tensor, Tensor]],
        share: float,
        contribution_share: float,
    ) -> None:
        """Add a batch, whose tensors and units' maps are given by layer."""
        source, earlier = maps[before.name]
        later = maps[after.name][1]
        scores = later.amax(2) if after.matrix is None else later.mean(2).abs()
        mask, _ = influential(scores, share=share)
        for unit in mask.any(0).nonzero()[:, 0].tolist():
            rows = mask[:, unit].nonzero()[:, 0]
            # Images do not depend on each other, so one sum has every image's own gradient.
            (gradient,) = torch.autograd.grad(
                scores[rows, unit].sum(), source, retain_graph=True, allow_unused=True
            )
            if gradient is None:
                raise ValueError(
                    f"The layer {after.name!r} does not depend on {before.name!r}; give layers in "
                    "the order in which they run."
                )
            contributions = (earlier.detach() * before.projected(gradient))[rows].sum(2)
            accepted, weights = influential(contributions, share=contribution_share)
            for a in accepted.any(0).nonzero()[:, 0].tolist():
                count, total = self.sums.get((a, unit), (0, 0.0))
                count += int(accepted[:, a].sum())
                self.sums[a, unit] = (count, total + float(weights[:, a].sum()))


def _maps(
    model: nn.Module, units: Sequence[UnitMaps], inputs: tuple[Tensor, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, its output, from which gradients can be taken, and its units' maps."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(one: UnitMaps) -> Any:
        def take(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
            tensor = only_tensor(output, one.name)
            tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            found[one.name] = (tensor, one.maps(tensor))
            return tensor.clone()  # in-place successors overwrite this copy

        return take

    for one in units:
        one.runs = 0
    handles = [one.module.register_forward_hook(hook(one)) for one in units]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for one in units:
        check_runs(one.name, one.runs)
        one.check(found[one.name][1].detach().amax(2), len(inputs[0]), 0)
    return found


def _networkx() -> Any:
    try:
        import networkx
    except ImportError as error:
        raise ImportError(
            "networkx is missing; install captum-classfilters[hypergraph]."
        ) from error
    return networkx
