"""A folder of pages: templates that become files, and what the files are called."""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from captum_classfilters._core.extras import extra
from captum_classfilters._core.files import write_text
from captum_classfilters._core.results_folder import ResultsFolder

MANIFEST = "atlas.json"
_SCHEMA_VERSION = 1
_LONGEST_SLUG = 40
_STATIC = ("atlas.css", "atlas.js")
_UNKNOWN, _MINUS, _SPACE = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


class Site:
    r"""
    Where an atlas is written.

    Args:

        folder (Path): The folder; it is made if it is missing.
        overwrite (bool): Replace an atlas that is there.

    Raises:
        ValueError: It holds an atlas already, or cannot be written.
        ImportError: The extra ``atlas`` is not installed.
    """

    def __init__(self, folder: Path, overwrite: bool) -> None:
        jinja = extra("jinja2", "The atlas")
        self.folder = folder
        self._environment = jinja.Environment(
            loader=jinja.PackageLoader(__package__),
            autoescape=True,
            undefined=jinja.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {
            "interval": interval,
            "number": number,
            "percent": percent,
        }
        self._results = ResultsFolder(folder, MANIFEST)
        if self._results.is_complete and not overwrite:
            raise ValueError(f"{folder} holds an atlas already; pass overwrite to replace it.")

    def place(self, *parts: str) -> Path:
        """A file's path, in a folder that is there."""
        return self._results.place(*parts)

    def write(self, name: str, template: str, **values: object) -> None:
        """Write a page; in it ``top`` leads to the site's first folder."""
        top = "../" * name.count("/")
        text = self._environment.get_template(template).render(top=top, **values)
        write_text(self.place(*name.split("/")), text)

    def finish(self, facts: Mapping[str, object]) -> None:
        """Write what pages share, and last of all the manifest: without it an atlas is not complete."""
        for name in _STATIC:
            source, _, _ = self._environment.loader.get_source(self._environment, name)
            write_text(self.place(name), source)
        self._results.finish({"schema_version": _SCHEMA_VERSION, **facts}, indent=1)


def slug(index: int, name: str) -> str:
    r"""
    What a page about something is called: its number, and what of its name is safe everywhere.

    Examples::

        >>> from captum_classfilters.atlas.site import slug
        >>> slug(7, "Größe <b>/etc"), slug(12, "猫")
        ('0007-groe-b-etc', '0012')
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain)[:_LONGEST_SLUG].strip("-")
    return f"{index:04d}-{words}" if words else f"{index:04d}"


def number(value: object, digits: int = 3) -> str:
    """A number in so many digits; a dash where it is not known."""
    if value is None or value != value:
        return _UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("-", _MINUS)


def interval(row: Mapping[str, float]) -> str:
    """From where to where a score may lie; a dash where that is not known."""
    low, high = row["low"], row["high"]
    return _UNKNOWN if low != low else f"{number(low)} to {number(high)}"


def percent(value: float | None) -> str:
    """A share in per cent; a dash where it is not known."""
    return _UNKNOWN if value is None or value != value else f"{100 * value:.1f}{_SPACE}%"
