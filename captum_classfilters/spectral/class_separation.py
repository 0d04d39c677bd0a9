"""How far a hypergraph keeps classes apart, against the same scores under permuted labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import trange

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.names import listed_names
from captum_classfilters._core.overlap import jaccard_of, shared_members
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters._core.types import ClassNames, Keywords
from captum_classfilters.spectral.hypergraph import (
    Ends,
    Hypergraph,
    Membership,
    Rule,
    Vertices,
    checked_labels,
    class_hypergraph,
    connected_components,
)

# Which end of the null's distribution speaks for separation.
_HIGHER = {"jaccard": False, "components": True, "purity": True, "single_class_share": True}


@short_repr
@dataclass(frozen=True)
class SeparationTest(Tabular):
    r"""
    A layer's separation scores and what permuted labels give.

    Args:

        hypergraph (Hypergraph): The layer's, under the true labels.
        observed (dict): As :func:`separation_scores` gives them.
        null (dict): For each score, its values under permuted labels, shape (permutations,).
        p_values (dict): For each score, the share of permutations, the observed labels among them,
                    that separate at least as well. One-sided: a lower Jaccard similarity, more
                    components, a higher purity and a higher share of edges of one class separate
                    better. NaN where a score is not defined; permutations without a score count
                    as separating less.
    """

    hypergraph: Hypergraph
    observed: Mapping[str, float]
    null: Mapping[str, NDArray[np.float64]]
    p_values: Mapping[str, float]

    def _tables(self) -> list[Table]:
        rows = []
        for name, p in self.p_values.items():
            draws = self.null[name][~np.isnan(self.null[name])]
            mean, spread = (draws.mean(), draws.std()) if len(draws) else (np.nan, np.nan)
            numbers = {"observed": self.observed[name], "null": mean, "std": spread, "p": p}
            rows.append({"score": name, **numbers})
        empty = "" if self.hypergraph.incidence.any() else "The rule found nothing: no incidences."
        return [Table(rows, title=empty, bars=())]


def class_jaccard(hypergraph: Hypergraph) -> NDArray[np.float64]:
    r"""
    Jaccard similarities of the classes' edge sets.

    Args:

        hypergraph (Hypergraph): With classes.

    Returns:
        *numpy.ndarray* of shape (C, C). Where vertices are images, the mean over all pairs of
        different images of the two classes. Vertices without edges have no similarity to others
        and do not count; NaN where nothing is left, as of a class of one image with itself.

    Raises:
        ValueError: The hypergraph has no classes.
    """
    classes = _classes(hypergraph)
    similarities = _similarities(hypergraph.incidence)
    between = _between(similarities, classes, hypergraph.num_classes)
    if not hypergraph.of_images and np.array_equal(classes, np.arange(hypergraph.num_classes)):
        np.fill_diagonal(between, similarities.diagonal())  # vertices are classes
    return between


@arguments_checked
def separation_scores(hypergraph: Hypergraph, *, s: int = 1) -> dict[str, float]:
    r"""
    Measure how far the edges of a hypergraph keep its classes apart.

    Args:

        hypergraph (Hypergraph): With classes.
        s (int): Edges that two classes, or images, must share to be linked.
                    Default: 1

    Returns:
        *dict*, with NaN for what is not defined, as for a hypergraph without incidences:

        - ``"jaccard"``: mean :func:`class_jaccard` of two different classes; low where classes use
          different edges.
        - ``"components"``: number of s-connected components of the vertices, with every vertex that
          is in none as one of its own; C for classes fully apart.
        - ``"purity"``: mean over edges of :math:`1 - H / \log C`, H the entropy of the classes of
          the edge's vertices; 1 where every edge is of one class.
        - ``"single_class_share"``: share of the edges that hold one class only.
        - ``"empty_edges"``: share of edges that hold nothing; they do not count above.
        - ``"empty_vertices"``: share of classes, or images, that are in no edge.

    Raises:
        ValueError: The hypergraph has no classes, or fewer than two.

    Examples::

        >>> import numpy as np
        >>> from captum_classfilters.spectral import (separation_scores)
        >>> from captum_classfilters.spectral.hypergraph import Hypergraph
        >>> incidence = np.array([[True, False, True], [False, True, True]])
        >>> graph = Hypergraph(incidence, ("cat", "dog"), ("a", "b", "c"), np.arange(2), 2)
        >>> {name: round(score, 3) for name, score in separation_scores(graph).items()}
        {'jaccard': 0.333, 'components': 1.0, 'purity': 0.667, 'single_class_share': 0.667,
         'empty_edges': 0.0, 'empty_vertices': 0.0}
    """
    classes = _classes(hypergraph)
    return _scores(hypergraph.incidence, classes, hypergraph.num_classes, s)


@arguments_checked
def separation_test(
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
    s: int = 1,
    match_size: bool = True,
    permutations: int = 200,
    seed: int = 0,
    show_progress: bool = True,
) -> SeparationTest:
    r"""
    Compare a layer's separation scores with those of permuted labels.

    Labels are permuted among the images, so that classes keep their sizes; where vertices are
    classes, the hypergraph is built again for each permutation. Classes of mixed images have even
    mean shares, and at the same threshold nearly all or nearly no incidences, which would compare
    sizes, not separation; so the threshold of each permutation is the one that leaves as many
    incidences as the true labels have (``match_size``). The smallest p-value that n permutations
    can give is 1 / (n + 1).

    Args:

        scores (Tensor): Shape (N, U), as for :func:`class_hypergraph`.
        labels (Tensor): Shape (N,).
        rule (str): As for :func:`class_hypergraph`.
                    Default: "signal_share"
        vertices (str): As for :func:`class_hypergraph`.
                    Default: "class"
        threshold (float, optional): As for :func:`class_hypergraph`.
                    Default: None
        share (float): As for :func:`class_hypergraph`.
                    Default: 0.1
        num_exemplars (int): As for :func:`class_hypergraph`.
                    Default: 10
        ends (str): As for :func:`class_hypergraph`.
                    Default: "highest"
        class_names (sequence of str, optional): As for :func:`class_hypergraph`.
                    Default: None
        s (int): As for :func:`separation_scores`.
                    Default: 1
        match_size (bool): See above; the rule ``"exemplars"`` has no threshold to set.
                    Default: True
        permutations (int): Number of permutations.
                    Default: 200
        seed (int): Of the permutations; the global random state is not touched.
                    Default: 0
        show_progress (bool): Show a progress bar.
                    Default: True

    Returns:
        *SeparationTest*: prints as a table.

    Raises:
        ValueError: As for :func:`class_hypergraph`.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import separation_test
        >>> labels = torch.arange(60) % 3
        >>> own = torch.eye(3).repeat_interleave(4, dim=1)  # four directions for each class
        >>> scores = own[labels] + torch.rand(60, 12, generator=torch.Generator().manual_seed(0))
        >>> test = separation_test(
        ...     scores, labels, threshold=0.12, permutations=99, show_progress=False)
        >>> test.observed["jaccard"], test.p_values["jaccard"]
        (0.0, 0.01)
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations}; expected a positive number.")
    options: Keywords = {"threshold": threshold, "share": share, "rule": rule, "ends": ends}
    class_names = listed_names(class_names)
    graph = class_hypergraph(
        scores,
        labels,
        vertices=vertices,
        num_exemplars=num_exemplars,
        class_names=class_names,
        **options,
    )
    known = checked_labels(scores, labels, class_names)[0].numpy()
    observed = separation_scores(graph, s=s)
    size = int(graph.incidence.sum()) if match_size else None
    membership = Membership(scores, rule, threshold, share, num_exemplars, ends)
    # Images keep their edges under any labels, and so their similarities and components.
    fixed = _similarities(graph.incidence) if vertices == "image" else None
    generator = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in _HIGHER}
    for _ in trange(permutations, desc="permutations", disable=not show_progress):
        permuted = generator.permutation(known)
        if fixed is None:
            incidence = membership.of_classes(permuted, graph.num_classes, size)
            drawn = _scores(incidence, np.arange(graph.num_classes), graph.num_classes, s)
        else:
            drawn = _scores(graph.incidence, permuted, graph.num_classes, None, fixed)
            drawn["components"] = observed["components"]
        for name, values in draws.items():
            values.append(drawn[name])
    null = {name: np.array(values) for name, values in draws.items()}
    p_values = {
        name: _p_value(observed[name], null[name], higher) for name, higher in _HIGHER.items()
    }
    if vertices == "image":
        p_values["components"] = float("nan")  # labels do not enter
    return SeparationTest(graph, observed, null, p_values)


def _p_value(observed: float, null: NDArray[np.float64], higher: bool) -> float:
    if np.isnan(observed):
        return float("nan")
    slack = 1e-6  # equal scores may differ by rounding
    # A draw without a score, because its hypergraph has too few edges, is never as extreme.
    extreme = null >= observed - slack if higher else null <= observed + slack
    return float((1 + extreme.sum()) / (1 + len(null)))


def _classes(hypergraph: Hypergraph) -> NDArray[np.int64]:
    if hypergraph.classes is None or hypergraph.num_classes < 2:
        raise ValueError(
            "Separation needs a hypergraph whose vertices have classes, two or more; a dual has none."
        )
    return hypergraph.classes


def _scores(
    incidence: NDArray[np.bool_],
    classes: NDArray[np.int64],
    num_classes: int,
    s: int | None,
    similarities: NDArray[np.floating] | None = None,
) -> dict[str, float]:
    """All scores; the components only if s is given."""
    held = np.zeros((num_classes, incidence.shape[1]))
    np.add.at(held, classes, incidence)  # vertices of each class in each edge
    size = held.sum(0)
    held, size = held[:, size > 0], size[size > 0]
    part = held / np.maximum(size, 1)
    logs = np.log(part, out=np.zeros_like(part), where=part > 0)
    purity = 1 + (part * logs).sum(0) / np.log(num_classes)
    known = _similarities(incidence) if similarities is None else similarities
    between = _between(known, classes, num_classes)
    pairs = between[~np.eye(num_classes, dtype=bool)]
    pairs = pairs[~np.isnan(pairs)]
    scores = {
        "jaccard": float(pairs.mean()) if len(pairs) else float("nan"),
        "components": float("nan"),
        "purity": float(purity.mean()) if len(size) else float("nan"),
        "single_class_share": (
            float(((held > 0).sum(0) == 1).mean()) if len(size) else float("nan")
        ),
        "empty_edges": _share(~incidence.any(0)),
        "empty_vertices": _share(~incidence.any(1)),
    }
    if s is not None and incidence.any():
        groups = connected_components(incidence, s)
        scores["components"] = float(len(groups) + len(incidence) - sum(map(len, groups)))
    return scores


def _share(which: Any) -> float:
    return float(which.mean()) if len(which) else float("nan")


def _similarities(incidence: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Jaccard similarities of every two vertices' edge sets (V, V); NaN where one has none."""
    both, size = shared_members(incidence)
    similarities = jaccard_of(both, size, dtype=np.float32)
    similarities[size == 0] = similarities[:, size == 0] = np.nan
    return similarities


def _between(
    similarities: NDArray[np.floating], classes: NDArray[np.int64], num_classes: int
) -> NDArray[np.float64]:
    """Mean similarity of different vertices of every two classes (C, C)."""
    member = np.zeros((num_classes, len(classes)), dtype=np.float32)
    member[classes, np.arange(len(classes))] = 1
    known = (~np.isnan(similarities)).astype(np.float32)
    values = np.nan_to_num(similarities)
    np.fill_diagonal(known, 0)
    np.fill_diagonal(values, 0)
    total = ((member @ values) @ member.T).astype(np.float64)
    count = ((member @ known) @ member.T).astype(np.float64)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
