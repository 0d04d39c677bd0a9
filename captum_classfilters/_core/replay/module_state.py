"""What modules keep between calls, put back after runs that were not the model's own."""

from collections import deque
from typing import Any, TypeAlias

from torch import nn

# What every module has: parameters, children, hooks. A forward pass does not change these, and what
# stands in for `forward` during a replay is taken away by whoever put it there.
_EVERY_MODULE = (vars(nn.Module()).keys() | {"forward"}) - {"_buffers"}


Container: TypeAlias = list[Any] | dict[Any, Any] | set[Any] | deque[Any]
Contents: TypeAlias = list[Any] | dict[Any, Any]


class ModuleState:
    """The attributes of a model's modules, and what is in their lists, dictionaries and sets.

    A replay runs modules on several copies of a batch. What they keep of it for their next call
    would not fit the model's own batch, and must not be left in a user's model.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = [] if model is None else list(model.modules())
        self._attributes = [(vars(module), _own(vars(module))) for module in modules]
        self._containers = [
            (value, _contents(value))
            for _, attributes in self._attributes
            for value in attributes.values()
            if isinstance(value, (list, dict, set, deque))
        ]

    def restore(self) -> bool:
        """Put everything back that is another object now; returns whether anything was."""
        moved = False
        for attributes, before in self._attributes:
            for name in _own(attributes).keys() - before.keys():
                del attributes[name]
                moved = True
            for name, value in before.items():
                if attributes.get(name) is not value:
                    attributes[name] = value
                    moved = True
        for container, contents in self._containers:
            if _differ(_contents(container), contents):
                container.clear()
                extend = container.extend if hasattr(container, "extend") else container.update
                extend(contents)
                moved = True
        return moved


def _own(attributes: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in attributes.items() if name not in _EVERY_MODULE}


def _contents(container: Container) -> Contents:
    return dict(container) if isinstance(container, dict) else list(container)


def _differ(now: Contents, before: Contents) -> bool:
    if len(now) != len(before):
        return True
    if isinstance(now, dict) and isinstance(before, dict):
        return any(now.get(key, now) is not value for key, value in before.items())
    return any(left is not right for left, right in zip(now, before, strict=True))
