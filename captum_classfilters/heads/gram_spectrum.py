"""Spectra of the features of each class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters._core.energy import number_for_energy
from captum_classfilters.metrics.features import checked_features, class_rows


@dataclass(frozen=True)
class GramSpectrum:
    r"""
    Eigenvalues of the features' Gram matrix, of each class and of all images.

    Args:

        eigenvalues (Tensor): Shape (C, K), falling; NaN for classes without images.
        overall (Tensor): Shape (K,), of all images.
    """

    eigenvalues: Tensor
    overall: Tensor

    @property
    def top_share(self) -> Tensor:
        """Share of each class's largest eigenvalue (C,)."""
        return self.eigenvalues[:, 0] / self.eigenvalues.sum(1)

    @property
    def participation_ratio(self) -> Tensor:
        r"""Effective number of directions of each class (C,): :math:`(\sum l)^2 / \sum l^2`."""
        return self.eigenvalues.sum(1).square() / self.eigenvalues.square().sum(1)

    def number_for(self, energy: float = 0.95) -> Tensor:
        """Smallest number of eigenvalues that holds a share of each class's energy (C,).

        Args:

            energy (float): The share.

        Returns:
            *Tensor* of int64.
        """
        return number_for_energy(self.eigenvalues, energy)

    def overallnumber_for_energy(self, energy: float = 0.95) -> int:
        """The same for all images together.

        Args:

            energy (float): The share.

        Returns:
            *int*.
        """
        return int(number_for_energy(self.overall[None], energy)[0])


def gram_spectrum(
    features: Tensor, labels: Tensor, *, centred: bool = False, num_classes: int | None = None
) -> GramSpectrum:
    r"""
    Eigenvalues of :math:`A_c^\top A_c / N_c`, with :math:`A_c` the features of class *c*'s images.

    Badola et al.'s code takes the **uncentred** matrix, whose first eigenvector is nearly the mean
    response; ``centred=True`` subtracts each class's mean, and gives the spectrum of the covariance.

    Args:

        features (Tensor): Shape (N, K).
        labels (Tensor): Shape (N,).
        centred (bool): Subtract the mean.
                    Default: False
        num_classes (int, optional): C. By default the largest label plus one.

    Returns:
        *GramSpectrum*.
    """
    features, labels, number = checked_features(features, labels, num_classes)

    def spectrum(rows: Tensor) -> Tensor:
        if len(rows) == 0:
            return torch.full((features.shape[1],), float("nan"), dtype=torch.float64)
        values = rows - rows.mean(0) if centred else rows
        return torch.linalg.eigvalsh(values.T @ values / len(values)).flip(0).clamp(min=0)

    classes = [spectrum(features[row]) for row in class_rows(labels, number)]
    return GramSpectrum(torch.stack(classes), spectrum(features))
