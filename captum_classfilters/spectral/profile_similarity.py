"""How far two profiles hold the same units."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.overlap import jaccard_of, shared_members
from captum_classfilters.spectral.profiles import Profile

Measure = Literal["jaccard", "average", "instance"]


@arguments_checked
def jaccard(first: Profile, second: Profile, layers: Sequence[str] | None = None) -> float:
    r"""
    Jaccard similarity of two profiles' units, all layers together.

    Args:

        first (Profile): One.
        second (Profile): The other.
        layers (sequence of str, optional): Only these layers.
                    Default: None

    Returns:
        *float*: Units of both over units of either; 1 where neither has any.

    Raises:
        ValueError: The profiles are of different kinds or layers.
    """
    return float(similarity_matrix([first, second], "jaccard", layers)[0, 1])


def average_jaccard(first: Profile, second: Profile, layers: Sequence[str] | None = None) -> float:
    r"""
    Mean over layers of the Jaccard similarity of two profiles' units.

    Args:

        first (Profile): One.
        second (Profile): The other.
        layers (sequence of str, optional): Only these layers.
                    Default: None

    Returns:
        *float*: In [0, 1]; a layer where neither has units counts 1.

    Raises:
        ValueError: The profiles are of different kinds or layers.
    """
    return float(similarity_matrix([first, second], "average", layers)[0, 1])


@arguments_checked
def instance_jaccard(image: Profile, group: Profile, layers: Sequence[str] | None = None) -> float:
    r"""
    The share of one profile's units that are in another, an image's in its class's for example.

    Args:

        image (Profile): The profile whose units are counted.
        group (Profile): The profile in which they may be.
        layers (sequence of str, optional): Only these layers.
                    Default: None

    Returns:
        *float*: In [0, 1]; 1 where the first has no units.

    Raises:
        ValueError: The profiles are of different kinds or layers.
    """
    return float(similarity_matrix([image, group], "instance", layers)[0, 1])


def similarity_matrix(
    profiles: Sequence[Profile], measure: Measure = "jaccard", layers: Sequence[str] | None = None
) -> NDArray[np.float64]:
    r"""
    The similarities of every two profiles.

    Args:

        profiles (sequence of Profile): n profiles of one kind and the same layers.
        measure (str): ``"jaccard"`` (:func:`jaccard`), ``"average"`` (:func:`average_jaccard`) or
                    ``"instance"`` (:func:`instance_jaccard` of the row's profile in the column's).
                    Default: "jaccard"
        layers (sequence of str, optional): Only these layers.
                    Default: None

    Returns:
        *numpy.ndarray* of shape (n, n).

    Raises:
        ValueError: The profiles are of different kinds or layers, or the measure is unknown.

    Examples::

        >>> import torch
        >>> from captum_classfilters.spectral import profile_images, similarity_matrix
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> data = [(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)]
        >>> profiles = profile_images(net, ["0", "1"], data, show_progress=False)
        >>> similarity_matrix(list(profiles)).shape
        (6, 6)
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure={measure!r}; choose one of {list(get_args(Measure))}.")
    names = _common(profiles, layers)
    stacks = [sparse.vstack([profile.counts[name] > 0 for profile in profiles]) for name in names]
    shared = [shared_members(stack) for stack in stacks]
    if measure == "average":
        layerwise = [jaccard_of(both, size, of_nothing=1.0) for both, size in shared]
        return np.asarray(np.mean(layerwise, axis=0))
    both = np.sum([pair[0] for pair in shared], axis=0)
    size = np.sum([pair[1] for pair in shared], axis=0)
    if measure == "jaccard":
        return jaccard_of(both, size, of_nothing=1.0)
    own = np.broadcast_to(size[:, None], both.shape)
    return np.divide(both, own, out=np.ones(both.shape), where=own > 0)


def _common(profiles: Sequence[Profile], layers: Sequence[str] | None) -> list[str]:
    if not profiles:
        raise ValueError("There are no profiles.")
    described: list[tuple[str, dict[str, int]]] = [
        (profile.kind, {name: row.shape[1] for name, row in profile.counts.items()})
        for profile in profiles
    ]
    for other in described[1:]:
        if other != described[0]:
            raise ValueError(
                f"Profiles must have one kind and the same layers, not {described[0]} and {other}."
            )
    names = list(described[0][1]) if layers is None else list(layers)
    missing = [name for name in names if name not in described[0][1]]
    if missing or not names:
        raise ValueError(f"layers={layers}; the profiles have {list(described[0][1])}.")
    return names
