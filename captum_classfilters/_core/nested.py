"""Nested states, an optimizer's for example, as named tensors and a tree that JSON can hold, and back."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from captum_classfilters._core.names import kind_of
from captum_classfilters._core.types import JsonDict

_SCALARS = (str, int, float, bool, type(None))


def flattened(value: object, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    r"""
    A nested value as a tree and the tensors that it names.

    Dicts, lists, tuples, numbers, texts and None are in the tree, everything but plain lists and scalars
    under the name of its kind.

    Args:

        value (object): The value.
        name (str): What it is called.
                    Default: ""

    Returns:
        *tuple* of the tree and a dict of tensors.

    Raises:
        ValueError: A part is something else; it is named.
    """
    tensors: dict[str, Tensor] = {}

    def tree(value: object, name: str) -> Any:
        if isinstance(value, Tensor):
            own = name
            while own in tensors:
                own += "'"
            tensors[own] = value
            return {"tensor": own}
        if isinstance(value, Mapping):
            kind = "counter" if isinstance(value, Counter) else "dict"
            return {
                kind: [[key_of(key, name), tree(value[key], below(name, key))] for key in value]
            }
        if isinstance(value, (list, tuple)):
            parts = [tree(part, below(name, place)) for place, part in enumerate(value)]
            return {"tuple": parts} if isinstance(value, tuple) else parts
        if not isinstance(value, _SCALARS):
            raise ValueError(
                f"{name or 'The value'} is {kind_of(value)}, which a file without code cannot hold."
            )
        return value

    def key_of(key: object, name: str) -> object:
        if not isinstance(key, _SCALARS):
            raise ValueError(
                f"{name or 'The value'} has the key {key!r}; expected text or numbers."
            )
        return key

    def below(name: str, key: object) -> str:
        return f"{name}.{key}" if name else str(key)

    return tree(value, name), tensors


def unflattened(tree: object, tensors: Mapping[str, Tensor]) -> object:
    """The value that :func:`flattened` made a tree and tensors of.

    Raises:
        ValueError: The tree is none, or does not name every tensor once.
    """
    left = dict(tensors)

    def value(tree: object) -> object:
        if isinstance(tree, list):
            return [value(part) for part in tree]
        if not isinstance(tree, dict):
            return tree
        if len(tree) != 1:
            raise ValueError(f"its tree has a branch of {len(tree)} kinds.")
        ((kind, content),) = tree.items()
        if kind == "tensor" and isinstance(content, str) and content in left:
            return left.pop(content)
        if kind == "tuple" and isinstance(content, list):
            return tuple(value(part) for part in content)
        if kind in ("dict", "counter") and isinstance(content, list):
            pairs = dict(_pairs(content))
            if len(pairs) != len(content):
                raise ValueError("its tree has a key twice.")
            values: JsonDict = {key: value(part) for key, part in pairs.items()}
            return Counter(values) if kind == "counter" else values
        raise ValueError(f"its tree has a branch of the kind {kind!r} that means nothing.")

    try:
        result = value(tree)
    except RecursionError as error:
        raise ValueError("its tree is nested too deeply.") from error
    if left:
        raise ValueError(
            f"its tree does not name the tensors {', '.join(map(repr, list(left)[:3]))}."
        )
    return result


def _pairs(content: Iterable[object]) -> Iterable[tuple[Any, object]]:
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], _SCALARS):
            raise ValueError("its tree has a dict that is not of keys and values.")
        yield pair[0], pair[1]
