"""The three ways to a singular value decomposition of a matrix, and the choice among them."""

from typing import Literal

import torch
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk
from torch import Tensor

Method = Literal["auto", "direct", "gram", "randomized"]

# Below this many directions LAPACK's own decomposition is as fast as the Gram matrix.
_DIRECT_UP_TO = 64
# A truncated decomposition is worth a randomized sketch where it drops most of a large matrix.
_RANDOMIZED_FROM = 1024
_RANDOMIZED_SHARE = 16
# Columns, or rows, of a weight that are held in float64 at a time.
_AT_ONCE = 512
# Singular values below this share of the largest have no direction that the Gram matrix can tell.
NEGLIGIBLE = 1e-6


def choose_route(rows: int, columns: int, rank: int | None, method: Method) -> str:
    """The route that ``method="auto"`` takes for a matrix of this size; any other method itself."""
    if method != "auto":
        return method
    directions = min(rows, columns)
    if directions <= _DIRECT_UP_TO:
        return "direct"
    few = rank is not None and rank * _RANDOMIZED_SHARE <= directions
    return "randomized" if few and directions >= _RANDOMIZED_FROM else "gram"


def decompose(
    matrices: Tensor, rank: int | None, route: str, right: bool
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """Left (G, d, r), values (G, r), right (G, r, n) or None, and the route taken in the end."""
    matrices = matrices.detach()
    matrices = matrices if matrices.dtype == torch.float64 else matrices.float()
    parts = None if route == "direct" else _each(matrices, rank, route, right)
    if parts is None:
        route = route if route == "direct" else "direct, the weight being of lower rank"
        parts = _direct(matrices)
    left, values, rows = parts
    left, rows = _fixed_signs(
        left[..., :rank], rows[:, :rank] if right and rows is not None else None
    )
    return (
        left.to(matrices.dtype).contiguous(),
        values[:, :rank].to(matrices.dtype).contiguous(),
        None if rows is None else rows.to(matrices.dtype).contiguous(),
        route,
    )


def _each(
    matrices: Tensor, rank: int | None, route: str, right: bool
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Each group by itself; None where one of them loses directions."""
    lefts, values, rights = [], [], []
    for matrix in matrices:
        parts = _gram(matrix, right) if route == "gram" else _randomized(matrix, rank)
        if parts is None:
            return None
        lefts.append(parts[0])
        values.append(parts[1])
        rights.append(parts[2])
    rows = [vectors for vectors in rights if vectors is not None]
    return _stacked(lefts), _stacked(values), _stacked(rows) if rows else None


def _stacked(parts: list[Tensor]) -> Tensor:
    """Stacked, without a copy where there is one part."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _direct(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return left, values, right


def _gram(matrix: Tensor, right: bool) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Through the eigenvectors of the smaller Gram matrix; None where directions are lost in it."""
    rows, columns = matrix.shape
    wide = rows <= columns
    squares, vectors = _eigenvectors(_minus_gram(matrix if wide else matrix.T))
    values = _roots(squares)
    # Only the other side's vectors are divided by the values; one side alone is always safe.
    if (right or not wide) and values[-1] <= NEGLIGIBLE * values[0]:
        return None
    if wide and not right:
        return vectors.to(matrix.dtype), values, None
    if not wide:
        return _times(matrix, vectors) / values, values, vectors.T
    return vectors, values, _times(matrix.T, vectors).T / values[:, None]


def _eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Rising eigenvalues and their vectors, from the lower triangle; the matrix is overwritten."""
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram)
    # On the CPU LAPACK's `syevr` needs half the time and memory of `torch.linalg.eigh`. Its matrix is
    # the transpose, in Fortran's order, so that SciPy need not copy it.
    values, vectors = eigh(
        gram.numpy().T, lower=False, driver="evr", overwrite_a=True, check_finite=False
    )
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _minus_gram(matrix: Tensor) -> Tensor:
    """-M M^T in float64, of which rising eigenvalues are the falling ones of M M^T.

    Only the lower triangle is sure to be filled, and there is never a float64 copy of M.
    """
    rows = len(matrix)
    gram = torch.empty(rows, rows, dtype=torch.float64, device=matrix.device)
    for place, columns in enumerate(matrix.split(_AT_ONCE, dim=1)):
        part, before = columns.double().contiguous(), float(place > 0)
        if gram.device.type == "cpu":
            # BLAS's symmetric update needs half the products; its matrices are the transposes.
            dsyrk(-1.0, part.numpy().T, before, gram.numpy().T, trans=1, overwrite_c=1)
        else:
            gram.addmm_(part, part.T, beta=before, alpha=-1)
    return gram


def _roots(squares: Tensor) -> Tensor:
    """Singular values from the eigenvalues of -M M^T."""
    return squares.neg().clamp(min=0).sqrt()


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """M V in float64, by blocks of rows of M."""
    blocks = [block.double() @ vectors for block in matrix.split(_AT_ONCE)]
    return torch.cat(blocks)


def _randomized(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Halko et al.'s randomized sketch, with the same random numbers every time."""
    rank = min(matrix.shape) if rank is None else rank
    sketch = min(rank + max(10, rank // 2), *matrix.shape)
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        left, _values, _right = torch.svd_lowrank(matrix, q=sketch, niter=6)
    # The rotated sketch satisfies U^T M = S V^T to rounding only if V is formed from U itself.
    projected = left.T @ matrix
    values = projected.norm(dim=1)
    order = values.sort(descending=True, stable=True).indices
    scale = values.clamp(min=torch.finfo(values.dtype).tiny)
    return left[:, order], values[order], (projected / scale[:, None])[order]


def _fixed_signs(left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The entry of each left vector that is largest in size becomes positive."""
    signs = torch.where(-left.amin(1, keepdim=True) > left.amax(1, keepdim=True), -1.0, 1.0)
    signs = signs.to(left.dtype)
    return left.mul_(signs), None if right is None else right.mul_(signs.mT)


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values (G, r) in float64, without vectors."""
    _, rows, columns = matrices.shape
    turned = matrices if rows <= columns else matrices.mT
    return torch.stack([_roots(torch.linalg.eigvalsh(_minus_gram(matrix))) for matrix in turned])
