"""Packages that extras bring: imported where they are needed, and named where they are missing."""

from sys import modules
from types import ModuleType

# As imported: the package's own name, and the extra of ours that installs it.
EXTRAS = {
    "bitarray": ("bitarray", "prune"),
    "hypernetx": ("HyperNetX", "hypergraph"),
    "jinja2": ("Jinja", "atlas"),
    "lightning": ("Lightning", "lightning"),
    "matplotlib": ("matplotlib", "plot"),
    "networkx": ("networkx", "hypergraph"),
    "pandas": ("pandas", "pandas"),
    "ripser": ("Ripser", "persistence"),
    "sklearn": ("scikit-learn", "prune"),
    "torch_pruning": ("Torch-Pruning", "prune"),
}


def extra(module: str, purpose: str, of: str | None = None) -> ModuleType:
    """A module of a package that an extra installs.

    Args:

        module (str): Its full name.
        purpose (str): What needs it, as the subject of a sentence.
        of (str, optional): The extra to name; by default the smallest that has the package.

    Returns:
        *module*.

    Raises:
        ImportError: It is not installed, or its own import fails.
    """
    try:
        __import__(module)
    except ImportError as error:
        raise missing_extra(module, purpose, error, of) from error
    return modules[module]


def missing_extra(
    module: str, purpose: str, error: ImportError, of: str | None = None
) -> ImportError:
    """The error that names the extra which has a module, and why it is there but cannot be imported."""
    package = module.partition(".")[0]
    name, smallest = EXTRAS[package]
    message = f"{purpose} needs {name}: pip install 'captum-classfilters[{of or smallest}]'."
    if modules.get(package) is not None or (error.name or package).partition(".")[0] != package:
        message += f" Its import fails here: {error}."
    return ImportError(message, name=package)
