"""How few filters carry an image's response: L1 mass of the top k, and Psi."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters.metrics.features import checked_features, class_rows
from captum_classfilters.metrics.removals import one_or_several


@short_repr
@dataclass(frozen=True)
class TopMass(Tabular):
    r"""
    Share of an image's total response that its strongest filters carry.

    Args:

        num_filters (list of int): The numbers k.
        mean (Tensor): Shape (C, len(num_filters)). Mean share over a class's images; NaN for classes
                    without any.
        standard_deviation (Tensor): The same shape.
        overall (Tensor): Shape (len(num_filters),). Mean share over all images.
    """

    num_filters: list[int]
    mean: Tensor
    standard_deviation: Tensor
    overall: Tensor

    def _tables(self) -> list[Table]:
        rows = [
            {
                "filters": number,
                "share, all images": self.overall[place],
                "lowest class": lowest,
                "highest class": highest,
            }
            for place, number, lowest, highest in zip(
                range(len(self.num_filters)),
                self.num_filters,
                self.mean.nan_to_num(nan=2.0).amin(0).tolist(),
                self.mean.nan_to_num(nan=-1.0).amax(0).tolist(),
                strict=True,
            )
        ]
        return [Table(rows, title="share of an image's response in its strongest filters")]


@arguments_checked
def top_mass(
    features: Tensor, labels: Tensor, num_filters: Sequence[int], num_classes: int | None = None
) -> TopMass:
    r"""
    L1 mass of the top k filters of each image.

    .. math:: m_n(k) = \sum_{j \le k} z_{n (j)} \Big/ \sum_j z_{nj} ,

    :math:`z_{n(1)} \ge z_{n(2)} \ge \dots` the mean activations of image *n* after a ReLU (Badola et
    al., https://arxiv.org/abs/2112.07719). An image whose filters are all zero has no such share and
    is left out.

    Args:

        features (Tensor): Shape (N, K), not negative.
        labels (Tensor): Shape (N,).
        num_filters (sequence of int): The numbers k.
        num_classes (int, optional): C. By default the largest label plus one.

    Returns:
        *TopMass*: The ``mean`` share over the images of each class and its ``standard_deviation``,
        both (C, len(num_filters)), NaN for classes without images, and ``overall``.

    Raises:
        ValueError: Features are negative or not finite, or k exceeds K.
    """
    features, labels, num_classes = checked_features(
        features, labels, num_classes, nonnegative=True
    )
    ks = [int(k) for k in one_or_several(num_filters)]
    if not ks or min(ks) < 1 or max(ks) > features.shape[1]:
        raise ValueError(f"num_filters={ks}; choose numbers from 1 to {features.shape[1]}.")
    total = features.sum(1)
    alive = total > 0
    cumulative = features[alive].sort(dim=1, descending=True).values.cumsum(1)
    share = cumulative[:, [k - 1 for k in ks]] / total[alive, None]
    rows = class_rows(labels[alive], num_classes)
    nothing = torch.full((len(ks),), float("nan"), dtype=torch.float64)
    return TopMass(
        num_filters=ks,
        mean=torch.stack([share[row].mean(0) if len(row) else nothing for row in rows]),
        standard_deviation=torch.stack(
            [share[row].std(0) if len(row) > 1 else nothing for row in rows]
        ),
        overall=share.mean(0),
    )


@arguments_checked
def psi(
    features: Tensor,
    labels: Tensor,
    fraction: float = 0.5,
    *,
    statistic: Literal["median", "mean"] = "median",
    corrected: bool = False,
    num_classes: int | None = None,
) -> Tensor:
    r"""
    Psi: the share of filters that an image does not need for a fraction of its response.

    With :math:`r_n(f) = \#\{ j : \sum_{i \le j} z_{n(i)} / \sum_i z_{ni} < f \}` for the responses in
    falling order,

    .. math:: \Psi^c_f = \big( K - \mathrm{stat}_{n \in c} \, r_n(f) \big) / K .

    A response of one filter alone gives 1, a uniform one the value of :func:`psi_floor`. **Psi
    measures the sparsity of single images**: the labels only partition the average. It comes from
    the code that accompanies Badola et al.'s follow-up work (MIWAI 2023).

    Args:

        features (Tensor): Shape (N, K), not negative.
        labels (Tensor): Shape (N,).
        fraction (float): *f*, in (0, 1].
                    Default: 0.5
        statistic (str): ``"median"`` or ``"mean"`` over a class's images.
                    Default: "median"
        corrected (bool): Count the filters that are needed, :math:`r + 1`, and leave out images
                    whose filters are all zero, which would otherwise count as perfectly sparse.
                    Default: False
        num_classes (int, optional): C. By default the largest label plus one.

    Returns:
        *Tensor* of shape (C,), float64; NaN for classes without images. Their mean is the layer's.

    Raises:
        ValueError: Features are negative, or an argument is out of range.
    """
    features, labels, num_classes = checked_features(
        features, labels, num_classes, nonnegative=True
    )
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} is out of range; choose a share in (0, 1].")
    if statistic not in ("median", "mean"):
        raise ValueError(f"statistic={statistic!r}; choose 'median' or 'mean'.")
    num_filters = features.shape[1]
    total = features.sum(1)
    cumulative = features.sort(dim=1, descending=True).values.cumsum(1)
    # Compared by multiplication, so that an image without response needs no division by zero.
    needed = (cumulative < fraction * total[:, None] * (1 - 1e-12)).sum(1).double()
    if corrected:
        features, labels, needed = features[total > 0], labels[total > 0], needed[total > 0] + 1
    values = []
    for row in class_rows(labels, num_classes):
        if len(row) == 0:
            values.append(float("nan"))
            continue
        middle = needed[row].quantile(0.5) if statistic == "median" else needed[row].mean()
        values.append(float((num_filters - middle) / num_filters))
    return torch.tensor(values, dtype=torch.float64)


@arguments_checked
def psi_floor(num_filters: int, fraction: float = 0.5) -> float:
    r"""
    Psi of a uniform response, its smallest value: :math:`(K - \lceil f K \rceil + 1) / K`.

    Args:

        num_filters (int): K.
        fraction (float): *f*.
                    Default: 0.5

    Returns:
        *float*.
    """
    needed = -int(-(fraction * num_filters * (1 - 1e-12)) // 1)
    return (num_filters - needed + 1) / num_filters
