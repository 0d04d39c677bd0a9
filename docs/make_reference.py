"""A page for each object of the API reference: those that the tables in ``docs/api`` name."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from captum_classfilters.attr import LayerFilterAttribution, WeightedFilterAttribution

ROOMS = sorted(
    path for path in (Path(__file__).parent / "api").glob("*.rst") if path.stem != "index"
)
# What these classes define is documented by those who wrote them.
OTHERS = "Attribution, LayerAttribution, Module, Callback, Tabular, Mapping, Sequence, Enum, tuple, object"
# What is called; all else of these is for those who write a method, and stands on their own pages.
CALLED = {"attribute", "compute_convergence_delta", "filter_scores", "identify"}
METHODS = (LayerFilterAttribution, WeightedFilterAttribution)
NAMES = {name for method in METHODS for name in dir(method) if not name.startswith("_")}
WRITTEN = ", ".join(sorted(NAMES - CALLED))


def listed(path: Path) -> list[str]:
    """The objects in the tables of a page, by the names to import them."""
    return re.findall(r"^   ~(captum_classfilters\S+)$", path.read_text("utf-8"), re.MULTILINE)


def named(name: str) -> object:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def object_pages() -> Iterator[tuple[str, str]]:
    """Name and text of each object's page."""
    for name in (name for room in ROOMS for name in listed(room)):
        title = name.rpartition(".")[2]
        lines = [":orphan:", "", title, "=" * len(title), ""]
        found = named(name)
        if inspect.isclass(found):
            lines += [f".. autoclass:: {name}", "   :members:"]
            lines += [f"   :inherited-members: {OTHERS}"]
            if issubclass(found, LayerFilterAttribution) and found not in METHODS:
                lines += [f"   :exclude-members: {WRITTEN}"]
            lines += [""]
        else:
            lines += [f".. autofunction:: {name}", ""]
        yield name, "\n".join(lines)
