"""A folder of results, whose manifest lists the files that one run wrote."""

import json
from collections.abc import Mapping
from pathlib import Path

from captum_classfilters._core.files import check_writable_folder, read_text, write_text


class ResultsFolder:
    r"""
    Where a run writes its files. What else is in the folder is neither listed nor removed.

    Args:

        path (Path): The folder, which is made with the first file.
        manifest (str): Name of the file that is written last of all.

    Raises:
        ValueError: The folder cannot be written.
    """

    def __init__(self, path: Path, manifest: str) -> None:
        check_writable_folder(path)
        self.path, self._manifest = path, path / manifest
        self._files: set[str] = set()
        self._earlier: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether it holds the results of an earlier run."""
        return self._manifest.exists()

    def place(self, *parts: str) -> Path:
        """The path of a file that is to be written, in a folder that is there. From the first on an
        earlier run's results count no more; a run that fails before leaves them."""
        if not self._files and self.is_complete:
            self._earlier = self._listed()
            self._manifest.unlink()
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.add(path.relative_to(self.path).as_posix())
        return path

    def finish(self, facts: Mapping[str, object], indent: int) -> None:
        """Write the manifest, without which a folder is not complete, and remove what an earlier run
        wrote and this one did not, so that none of it passes for new."""
        inside = self.path.resolve()
        for name in set(self._earlier) - self._files:
            path = (inside / name).resolve()
            if path.is_relative_to(inside) and path.is_file():
                path.unlink()
        manifest = {**facts, "files": sorted(self._files)}
        write_text(self._manifest, json.dumps(manifest, indent=indent) + "\n")

    def _listed(self) -> list[str]:
        """The files of an earlier run, as its manifest lists them."""
        try:
            return [str(name) for name in json.loads(read_text(self._manifest))["files"]]
        except (ValueError, KeyError, TypeError):
            return []
