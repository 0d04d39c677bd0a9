"""Spectra of the features of each class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.energy import number_for_energy
from captum_classfilters._core.tables import Table, Tabular, short_repr
from captum_classfilters.metrics.features import checked_features, class_rows


@short_repr
@dataclass(frozen=True)
class GramSpectrum(Tabular):
    r"""
    Eigenvalues of the features' Gram matrix, of each class and of all images.

    Args:

        eigenvalues (Tensor): Shape (C, K), falling; NaN for classes without images.
        overall (Tensor): Shape (K,), of all images.
    """

    eigenvalues: Tensor
    overall: Tensor

    def _tables(self) -> list[Table]:
        columns = {
            "largest share": self.top_share.tolist(),
            "participation ratio": self.participation_ratio.tolist(),
            "for 95 % of the energy": self.number_for().tolist(),
        }
        rows = [
            {"class": index, **dict(zip(columns, cells, strict=True))}
            for index, cells in enumerate(zip(*columns.values(), strict=True))
        ]
        return [Table(rows, title=f"{self.eigenvalues.shape[1]:,} eigenvalues of each class")]

    @property
    def top_share(self) -> Tensor:
        """Share of each class's largest eigenvalue (C,)."""
        return self.eigenvalues[:, 0] / self.eigenvalues.sum(1)

    @property
    def participation_ratio(self) -> Tensor:
        r"""Effective number of directions of each class (C,): :math:`(\sum l)^2 / \sum l^2`."""
        return self.eigenvalues.sum(1).square() / self.eigenvalues.square().sum(1)

    @arguments_checked
    def number_for(self, energy: float = 0.95) -> Tensor:
        """Smallest number of eigenvalues that holds a share of each class's energy (C,).

        Args:

            energy (float): The share.

        Returns:
            *Tensor* of int64.
        """
        return number_for_energy(self.eigenvalues, energy)

    @arguments_checked
    def overall_number_for(self, energy: float = 0.95) -> int:
        """The same for all images together.

        Args:

            energy (float): The share.

        Returns:
            *int*.
        """
        return int(number_for_energy(self.overall[None], energy)[0])


@arguments_checked
def gram_spectrum(
    features: Tensor, labels: Tensor, *, centered: bool = False, num_classes: int | None = None
) -> GramSpectrum:
    r"""
    Eigenvalues of :math:`A_c^\top A_c / N_c`, with :math:`A_c` the features of class *c*'s images.

    Badola et al.'s code takes the **uncentered** matrix, whose first eigenvector is nearly the mean
    response; ``centered=True`` subtracts each class's mean, and gives the spectrum of the covariance.

    Args:

        features (Tensor): Shape (N, K).
        labels (Tensor): Shape (N,).
        centered (bool): Subtract the mean.
                    Default: False
        num_classes (int, optional): C. By default the largest label plus one.

    Returns:
        *GramSpectrum*: ``eigenvalues`` (C, K), falling, and ``overall`` (K,) of all images;
        ``top_share``, ``participation_ratio`` (C,), ``number_for(energy)`` and
        ``overall_number_for(energy)`` follow from them.

    Raises:
        ValueError: Features or labels do not fit, or are not finite.
    """
    features, labels, num_classes = checked_features(features, labels, num_classes)

    def spectrum(rows: Tensor) -> Tensor:
        if len(rows) == 0:
            return torch.full((features.shape[1],), float("nan"), dtype=torch.float64)
        values = rows - rows.mean(0) if centered else rows
        return torch.linalg.eigvalsh(values.T @ values / len(values)).flip(0).clamp(min=0)

    classes = [spectrum(features[row]) for row in class_rows(labels, num_classes)]
    return GramSpectrum(torch.stack(classes), spectrum(features))
