"""Model in, model out: the decomposed head."""

from captum_classfilters.networks.decompose import (
    DecomposedLinear,
    decompose,
    find_head,
    replace_head,
)

__all__ = ["DecomposedLinear", "decompose", "find_head", "replace_head"]
