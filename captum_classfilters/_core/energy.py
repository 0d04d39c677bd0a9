"""How many eigenvalues hold a share of their sum."""

from torch import Tensor


def number_for_energy(eigenvalues: Tensor, energy: float) -> Tensor:
    """Smallest number of the falling eigenvalues (..., K) that hold a share of their sum (...)."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy} is out of range; choose a share in (0, 1].")
    share = eigenvalues.cumsum(-1) / eigenvalues.sum(-1, keepdim=True)
    return (share < energy * (1 - 1e-12)).sum(-1) + 1
