"""How many members two sets share: the one place where Jaccard similarities are computed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


def shared_members(membership: object) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    r"""
    Members that every two sets share, and how many each has.

    Args:

        membership (array or sparse array): Shape (n, E), bool: the row's set holds the column.

    Returns:
        *tuple* of an array (n, n) and one (n,), of whole numbers as float32.
    """
    # Products of floats go through BLAS, and in float32 counts up to 2**24 are exact.
    if sparse.issparse(membership):
        member = sparse.csr_array(membership).astype(np.float32)
        both = (member @ member.T).toarray()
    else:
        member = np.asarray(membership, dtype=np.float32)
        both = member @ member.T
    return both, both.diagonal().copy()


def jaccard_of(
    both: NDArray[np.floating],
    size: NDArray[np.floating],
    of_nothing: float = float("nan"),
    dtype: type[np.floating] = np.float64,
) -> NDArray[Any]:
    r"""
    Jaccard similarities from :func:`shared_members`, or from sums of it over parts.

    Args:

        both (ndarray): Shape (n, n).
        size (ndarray): Shape (n,).
        of_nothing (float): The similarity of two empty sets.
                    Default: NaN
        dtype (dtype): Of the result.
                    Default: float64

    Returns:
        *ndarray* of shape (n, n).

    Examples::

        >>> import numpy as np
        >>> from captum_classfilters._core.overlap import jaccard_of, shared_members
        >>> sets = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], dtype=bool)
        >>> jaccard_of(*shared_members(sets)).round(2).tolist()
        [[1.0, 0.33, 0.0], [0.33, 1.0, 0.0], [0.0, 0.0, nan]]
    """
    either = size[:, None] + size[None, :] - both
    result = np.full(both.shape, of_nothing, dtype)
    return np.divide(both, either, out=result, where=either > 0, dtype=dtype)
