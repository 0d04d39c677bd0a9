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

    @property
    def is_complete(self) -> bool:
        """Whether it holds the results of an earlier run."""
        return self._manifest.exists()

    def clear(self) -> None:
        """Remove an earlier run's files, as its manifest lists them, so that none passes for a new one."""
        if not self.is_complete:
            return
        try:
            files = list(json.loads(read_text(self._manifest))["files"])
        except (ValueError, KeyError, TypeError):
            files = []
        self._manifest.unlink()
        inside = self.path.resolve()
        for name in files:
            path = (inside / str(name)).resolve()
            if path.is_relative_to(inside) and path.is_file():
                path.unlink()

    def place(self, *parts: str) -> Path:
        """The path of a file that is to be written, in a folder that is there."""
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.add(path.relative_to(self.path).as_posix())
        return path

    def finish(self, facts: Mapping[str, object], indent: int) -> None:
        """Write the manifest: a folder without it is not complete."""
        manifest = {**facts, "files": sorted(self._files)}
        write_text(self._manifest, json.dumps(manifest, indent=indent) + "\n")
