"""Is a cell of the table more than chance? Label permutations and the false discovery rate."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked, check_numbers
from captum_classfilters._core.image_keys import mixed
from captum_classfilters._core.tables import short_repr
from captum_classfilters._core.types import JsonDict

_ENTRIES_AT_ONCE = 2**22  # of the matrix permutations x images, 32 MB in float64
_ROUNDING = 1e-12  # of a sum, relative to the sum of absolute values
_PIECES = ("evidence", "classes", "keys")


@short_repr
@dataclass(frozen=True)
class LabelPermutation:
    r"""
    How ``identify_class_filters(..., significance=...)`` tells a cell from chance.

    **The null.** Labels say nothing about the images: every pairing of the images with the labels
    at hand is equally likely. The model is taken as it is. What is exchangeable then is an image's
    evidence *for one fixed class*, so each cell (c, k) compares the mean evidence of the images
    labeled *c* with the means of equally many images drawn at random without replacement from a
    pool that holds evidence for *c*:

    - Where evidence does not depend on the target, the pool is all images, and the labels are
      permuted as a whole. For :class:`LayerFilterFrequency`, whose evidence is a vote, the
      permutation distribution is hypergeometric, and its exact tail is used.
    - Where it does (a contribution to the logit of *c*), evidence for the image's own label would
      not be exchangeable between classes. Each image is therefore also asked for its evidence for
      ``foreign_targets`` other classes, each another one, drawn at random, and the pool of *c* is
      the images labeled *c* and the images that drew *c*, each of them once.

    A cell is a discovery if its filter speaks for the class more on the class's images than on
    others. A filter with the same evidence for *c* on every image is none, however large that
    evidence is.

    P-values are :math:`(1 + \#\{T^* \ge T\}) / (1 + P)` (Phipson and Smyth 2010,
    https://doi.org/10.2202/1544-6115.1585), valid for every number *P* of permutations; the smallest
    possible is 1 / (1 + P). They are adjusted over all cells of the table by Benjamini and
    Hochberg's procedure (``scipy.stats.false_discovery_control``).

    Args:

        permutations (int): P. Among M cells, at least M / (fdr (P + 1)) must have the smallest
                    p-value before any of these can be a discovery.
                    Default: 999
        foreign_targets (int): Other classes that each image's evidence is asked for, all C - 1 others
                    at most; each costs as much as the evidence itself, the forward pass excepted
                    where it is shared.
                    Default: 1
        seed (int): Of permutations and foreign targets; the global random state is not touched.
                    Default: 0
        correction (str): ``"bh"``, Benjamini and Hochberg, for independent or positively dependent
                    cells; ``"by"``, Benjamini and Yekutieli, for any dependence.
                    Default: "bh"

    Raises:
        ValueError: A number is below 1, or the correction is unknown.

    Examples::

        >>> import torch
        >>> from captum_classfilters import LabelPermutation, LayerFilterContribution
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> data = [(torch.rand(20, 3, 6, 6), torch.arange(20) % 2)]
        >>> table = LayerFilterContribution(net, "1").identify(
        ...     data, significance=LabelPermutation(permutations=99), show_progress=False)
        >>> table.q_values.shape
        torch.Size([2, 8])
        >>> selected = table.select(fdr=0.05)
    """

    permutations: int = 999
    foreign_targets: int = 1
    seed: int = 0
    correction: Literal["bh", "by"] = "bh"

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("permutations", "foreign_targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.correction not in ("bh", "by"):
            raise ValueError(f"correction={self.correction!r}; choose 'bh' or 'by'.")

    def record(self) -> JsonDict:
        """The options, for the provenance of a table."""
        return {"null": "labels permuted", **asdict(self)}


class EvidenceRecord:
    """Evidence of single images, as batches bring it: for their own labels and for foreign ones."""

    def __init__(self) -> None:
        #: By name, a piece for each batch: evidence, classes and keys, own and foreign.
        self._pieces: dict[str, list[Tensor]] = {}

    def add(self, values: Tensor, labels: Tensor, keys: Tensor | None = None) -> None:
        """Add a batch's evidence (N, K) for its own labels; keys (N,) tell its images apart."""
        self._add("own", values, labels, keys)

    def add_foreign(self, values: Tensor, targets: Tensor, keys: Tensor | None = None) -> None:
        """Add a batch's evidence (N, K) for foreign targets (N,)."""
        self._add("foreign", values, targets, keys)

    def _add(self, whose: str, values: Tensor, classes: Tensor, keys: Tensor | None) -> None:
        keys = torch.zeros_like(classes) if keys is None else keys
        evidence = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        new = {"evidence": evidence, "classes": classes, "keys": keys}
        for name, tensor in new.items():
            self._pieces.setdefault(f"{whose} {name}", []).append(tensor.cpu())

    def merge(self, others: list["EvidenceRecord"]) -> None:
        """Take the records of all ranks, in order of rank, in place of this one."""
        names = dict.fromkeys(name for other in others for name in other._pieces)
        self._pieces = {
            name: [piece for other in others for piece in other._pieces.get(name, [])]
            for name in names
        }

    def state(self) -> dict[str, Tensor]:
        """All that was added, for a run that goes on from here."""
        self._pieces = {name: [torch.cat(pieces)] for name, pieces in self._pieces.items()}
        return {name: pieces[0] for name, pieces in self._pieces.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        names = (f"{whose} {name}" for whose in ("own", "foreign") for name in _PIECES)
        self._pieces = {name: [state[name]] for name in names if name in state}

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Evidence (N, K) and labels (N,), in the order in which they came."""
        state = self.state()
        return state["own evidence"], state["own classes"]

    def sorted_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Evidence (N, K), labels (N,), and the same for foreign targets, None without any, in an
        order that depends neither on the loader's nor on how many ranks there are."""
        own = self._sorted("own")
        return (
            (*own, *self._sorted("foreign"))
            if "foreign keys" in self._pieces
            else (*own, None, None)
        )

    def _sorted(self, whose: str) -> tuple[Tensor, Tensor]:
        evidence, classes, keys = (self.state()[f"{whose} {name}"] for name in _PIECES)
        order = keys.argsort(stable=True)
        order = order[classes[order].argsort(stable=True)]
        return evidence[order], classes[order]


def foreign_labels(
    labels: Tensor, num_classes: int, keys: Tensor, seed: int, number: int
) -> list[Tensor]:
    """For each image ``number`` classes that are not its own, each another one, all equally likely, or
    all others where they are fewer; the images' keys and the seed say which, so that they are the
    same ones wherever the image is read."""
    if num_classes < 2:
        raise ValueError("Significance needs at least two classes; the model puts out one.")
    steps: list[Tensor] = []
    for place in range(min(number, num_classes - 1)):
        start = mixed(torch.tensor(seed + 7919 * place + 1, dtype=torch.int64)).to(keys.device)
        step = 1 + mixed(keys + start) % (num_classes - 1 - place)
        # The step counts the classes that are left: it skips those that were drawn, from the lowest.
        for drawn in torch.stack(steps).sort(0).values if steps else ():
            step = step + (step >= drawn)
        steps.append(step)
    return [(labels + step.to(labels.device)) % num_classes for step in steps]


@arguments_checked
def permutation_p_values(
    evidence: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    foreign: Tensor | None = None,
    foreign_targets: Tensor | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> Tensor:
    r"""
    P-values of class means of per-image evidence, by permuting labels.

    See :class:`LabelPermutation` for the null and for what is exchangeable under it.

    Args:

        evidence (Tensor): Shape (N, K), each image's evidence for its own label.
        labels (Tensor): Shape (N,), class indices.
        num_classes (int, optional): C. By default the largest label plus one.
        foreign (Tensor, optional): Shape (M, K), evidence for targets other than the image's own.
                    An image has at most one row for a target: with the same row again, p-values are
                    too small. None says that evidence does not depend on the target.
                    Default: None
        foreign_targets (Tensor, optional): Shape (M,), those targets.
                    Default: None
        permutations (int): P.
                    Default: 999
        seed (int): Seed of the permutations.
                    Default: 0

    Returns:
        *Tensor* of shape (C, K), float64; NaN for classes without images.

    Raises:
        ValueError: Shapes do not fit, labels are out of range, or evidence is not finite.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import permutation_p_values
        >>> labels = torch.arange(40) % 2
        >>> evidence = torch.stack([labels.float(), torch.ones(40)], dim=1)
        >>> permutation_p_values(evidence, labels, permutations=99)
        tensor([[1.0000, 1.0000],
                [0.0100, 1.0000]], dtype=torch.float64)
    """
    _check_pair(evidence, labels, "evidence", "labels")
    if (foreign is None) != (foreign_targets is None):
        raise ValueError("Give foreign and foreign_targets together.")
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1.")
    number = int(labels.max()) + 1 if num_classes is None else num_classes
    if int(labels.min()) < 0 or int(labels.max()) >= number:
        raise ValueError(f"labels are out of range: expected 0 to {number - 1}.")
    generator = torch.Generator().manual_seed(seed)
    values, classes = evidence.detach().cpu(), labels.cpu().long()
    counts = torch.bincount(classes, minlength=number)
    if foreign is None:
        exceeded = _exceeded_by_relabeling(
            values.double(), classes, number, permutations, generator
        )
    else:
        assert foreign_targets is not None
        _check_pair(foreign, foreign_targets, "foreign", "foreign_targets")
        others, targets = foreign.detach().cpu(), foreign_targets.cpu().long()
        exceeded = torch.zeros(number, values.shape[1], dtype=torch.int64)
        for class_ in counts.nonzero()[:, 0].tolist():
            own = values[classes == class_].double()
            asked = others[targets == class_].double()
            exceeded[class_] = _exceeded_in_pool(own, asked, permutations, generator)
    p_values = (1 + exceeded.double()) / (1 + permutations)
    return p_values.masked_fill((counts == 0)[:, None], float("nan"))


@arguments_checked
def vote_p_values(votes: Tensor, counts: Tensor) -> Tensor:
    r"""
    Exact p-values of class totals of votes, by permuting labels.

    Of the N images, V_k vote for filter *k*. Under permuted labels the votes among the N_c images of
    class *c* are hypergeometric, so that no permutation has to be drawn (Fisher's exact test).

    Args:

        votes (Tensor): Shape (C, K), number of a class's images that vote for a filter.
        counts (Tensor): Shape (C,), number of images of each class.

    Returns:
        *Tensor* of shape (C, K), float64; NaN for classes without images.

    Raises:
        ValueError: A class has more votes for a filter than images, or a number is not whole.

    Examples::

        >>> import torch
        >>> from captum_classfilters.identify import vote_p_values
        >>> vote_p_values(torch.tensor([[3], [0]]), torch.tensor([3, 3]))
        tensor([[0.0500],
                [1.0000]], dtype=torch.float64)
    """
    from scipy.stats import hypergeom

    for name, numbers in (("votes", votes), ("counts", counts)):
        if numbers.is_floating_point() and not torch.equal(numbers, numbers.round()):
            raise ValueError(f"{name} must be whole numbers, of images; some are not.")
    votes, counts = votes.cpu().long(), counts.cpu().long()
    if votes.dim() != 2 or counts.shape != votes.shape[:1]:
        raise ValueError(
            f"votes {tuple(votes.shape)} and counts {tuple(counts.shape)}; expected (C, K), (C,)."
        )
    if bool((votes > counts[:, None]).any()) or bool((votes < 0).any()):
        raise ValueError("votes must lie between 0 and the class's number of images.")
    for_filter = votes.sum(0)[None].numpy()
    tail = hypergeom.sf(votes.numpy() - 1, int(counts.sum()), for_filter, counts[:, None].numpy())
    p_values = torch.as_tensor(np.asarray(tail, dtype=np.float64)).clamp(0, 1)
    return p_values.masked_fill((counts == 0)[:, None], float("nan"))


@arguments_checked
def false_discovery_adjusted(p_values: Tensor, correction: Literal["bh", "by"] = "bh") -> Tensor:
    """P-values adjusted over all cells of a table (``scipy.stats.false_discovery_control``).

    Args:

        p_values (Tensor): Any shape; NaN cells are no tests.
        correction (str): ``"bh"`` or ``"by"``, see :class:`LabelPermutation`.
                    Default: "bh"

    Returns:
        *Tensor* of float64 of the same shape.

    Raises:
        ValueError: A value is no probability.
    """
    from scipy.stats import false_discovery_control

    adjusted = p_values.detach().cpu().double().clone()
    tested = ~adjusted.isnan()
    if bool(((adjusted < 0) | (adjusted > 1)).any()):
        raise ValueError("p_values must lie between 0 and 1; NaN cells are no tests.")
    if bool(tested.any()):
        values = false_discovery_control(adjusted[tested].numpy(), method=correction)
        adjusted[tested] = torch.as_tensor(values)
    return adjusted


def _check_pair(values: Tensor, labels: Tensor, name: str, labels_name: str) -> None:
    if values.dim() != 2 or labels.shape != values.shape[:1] or len(values) == 0:
        raise ValueError(
            f"{name} {tuple(values.shape)} and {labels_name} {tuple(labels.shape)} do not fit; "
            "expected (N, K) and (N,) with at least one image."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{labels_name} are {labels.dtype}; expected class indices.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or Inf.")


def _exceeded_by_relabeling(
    values: Tensor, labels: Tensor, num_classes: int, permutations: int, generator: torch.Generator
) -> Tensor:
    """How many permutations of all labels give each class and filter as large a total (C, K)."""

    def totals(order: Tensor) -> Tensor:
        zeros = torch.zeros(num_classes, values.shape[1], dtype=torch.float64)
        return zeros.index_add_(0, labels[order], values)

    # Sums in another order may differ by rounding; what is equal must count as reached.
    least = totals(torch.arange(len(labels))) - _ROUNDING * values.abs().sum(0)
    exceeded = torch.zeros(least.shape, dtype=torch.int64)
    for _ in range(permutations):
        exceeded += totals(torch.randperm(len(labels), generator=generator)) >= least
    return exceeded


def _exceeded_in_pool(
    own: Tensor, others: Tensor, permutations: int, generator: torch.Generator
) -> Tensor:
    """How many random subsets of the pool of both, as large as ``own``, total as much (K,)."""
    pool = torch.cat([own, others])
    least = own.sum(0) - _ROUNDING * pool.abs().sum(0)
    exceeded = torch.zeros(pool.shape[1], dtype=torch.int64)
    for members in _random_subsets(len(pool), len(own), permutations, generator):
        exceeded += (members.double() @ pool >= least).sum(0)
    return exceeded


def _random_subsets(
    size: int, members: int, number: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Masks (P, size) of random subsets, a part of all P = ``number`` at a time."""
    at_once = max(1, _ENTRIES_AT_ONCE // size)
    for start in range(0, number, at_once):
        rows = min(at_once, number - start)
        keys = torch.rand(rows, size, generator=generator, dtype=torch.float64)
        yield keys <= keys.kthvalue(members, dim=1, keepdim=True).values
