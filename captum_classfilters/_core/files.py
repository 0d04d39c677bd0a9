"""Files that are either the old ones or the new ones, never half of each; the one place that opens any."""

import errno
import hashlib
import io
import os
import secrets
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, TypeAlias

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AnyPath: TypeAlias = str | os.PathLike[str]

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_OLD = 24 * 3600  # seconds after which a leftover is one, on disks that know no locks
_PROBE = 4096  # bytes; an empty file fits on a full disk
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


# -- reading ---------------------------------------------------------------------------------------


def open_regular(path: AnyPath) -> io.BufferedReader:
    """Open a file to read; what only has the name of one, a pipe say, is refused without waiting.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is a folder, a pipe, a socket or a device.
    """
    path = os.fspath(path)
    try:
        _check_kind(os.stat(path), path)
        # The file may have been exchanged meanwhile; a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    try:
        _check_kind(os.fstat(handle), path)
    except ValueError:
        os.close(handle)
        raise
    return open(handle, "rb")


def read_text(path: AnyPath) -> str:
    """A file's text.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no text in UTF-8.
    """
    with open_regular(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{os.fspath(path)} is no text in UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            "save it as UTF-8."
        ) from error


def identity(path: AnyPath) -> tuple[int, ...] | None:
    """What another file under this name would not have in common with the one there; None if there is
    none."""
    try:
        return _identity(os.stat(path))
    except FileNotFoundError:
        return None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# -- writing ---------------------------------------------------------------------------------------


def write_atomically(
    path: AnyPath, data: bytes | Iterable[bytes | memoryview], overwrite: bool = True
) -> tuple[int, ...]:
    r"""
    Write a file so that a kill or a full disk at any moment leaves the old one in place.

    The data go to a new file beside the target, which takes the target's name when all is on the disk.
    It has the mode (also a read-only one) and, where that is allowed, the owner of the file that it
    replaces, else those that the process gives to new files. A symbolic link stays one: what it
    points to is replaced. Of several hard links only this one leads to the new file. What killed runs
    have left beside this target is removed; a file that a living process writes to is locked, and is
    not touched.

    Args:

        path (path): The target.
        data (bytes, or an iterable of them): Its contents.
        overwrite (bool): Replace a file that is there, also one that came while this was written.
                    Default: True

    Returns:
        *tuple*: The new file's :func:`identity`.

    Raises:
        FileExistsError: There is one, and it is not to be replaced.
        ValueError: The target is a folder, a pipe, a socket or a device.
        OSError: It cannot be written; nothing has changed.
    """
    try:
        target, before = _target(path)
        if before is not None and not overwrite:
            raise FileExistsError(errno.EEXIST, target)
        folder, prefix = _temporary_names(target)
        handle, temporary = _new_file(folder, prefix)
        try:
            with open(handle, "wb") as file:
                if before is not None:
                    _keep_mode_and_owner(handle, before)
                for part in (data,) if isinstance(data, bytes) else data:
                    file.write(part)
                file.flush()
                os.fsync(handle)
                written = _identity(os.fstat(handle))
                if fcntl is None:
                    file.close()  # where there are no locks, open files cannot be moved either
                (os.replace if overwrite else _move_to_free_name)(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise _explained(error, path) from error
    _sync_folder(folder)
    return written


def write_text(path: AnyPath, text: str) -> None:
    """Write text in UTF-8; halves of characters, as in names of undecodable files, are spelled out."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_figure(path: AnyPath, figure: "Figure", dpi: int = 110) -> None:
    """Write a picture, in the format that the path's suffix names."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=os.path.splitext(path)[1].lstrip("."), dpi=dpi)
    write_atomically(path, buffer.getvalue())


def end_nowhere(stream: TextIO) -> None:
    """Let a stream of the process write nowhere: also what it still holds, which Python flushes at its
    own end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def check_writable(path: AnyPath) -> None:
    """Raise, before the work whose result is to be written there, if it cannot be written.

    What killed runs have left beside the file is removed, as when it is written.

    Raises:
        ValueError: Its folder is absent, read-only or full, or the path is no regular file.
    """
    try:
        target, _ = _target(path)
        _probe(*_temporary_names(target))
    except OSError as error:
        raise _refusal(error, path) from error


def check_writable_folder(path: AnyPath) -> None:
    """The same of a folder for several results, which may be new.

    Raises:
        ValueError: It, or the folder that it would be made in, cannot be written.
    """
    folder = os.path.abspath(path)
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise ValueError(
            f"{folder} cannot be written: it is a file; expected a folder for the results."
        )
    result = os.path.join(folder, "results")  # whatever has that name already is no obstacle
    try:
        _probe(*_temporary_names(result))
    except OSError as error:
        raise _refusal(error, result) from error


# -- how -------------------------------------------------------------------------------------------


def _refusal(error: OSError, path: AnyPath) -> ValueError:
    return ValueError(_explained(error, path).strerror or str(error))


def _check_kind(status: os.stat_result, path: AnyPath) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for of, name in _KINDS if of(status.st_mode)), "no regular file")
        raise ValueError(f"{os.fspath(path)} is {kind}; expected a file.")


def _target(path: AnyPath) -> tuple[str, os.stat_result | None]:
    """Where a path leads through symbolic links, and what is there."""
    path = os.fspath(path)
    if not os.path.basename(path):  # as realpath would not tell any more
        raise ValueError(f"{path!r} ends with no name; expected a file.")
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return os.path.realpath(path), None
    _check_kind(status, path)
    return os.path.realpath(path), status


def _temporary_names(target: str) -> tuple[str, str]:
    """A target's folder, and what its temporary files there begin with, however long its name."""
    folder, name = os.path.split(target)
    return folder, f".classfilters-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}-"


def _new_file(folder: str, prefix: str) -> tuple[int, str]:
    """A new file, locked until it is closed or its process dies; umask and folder decide its mode."""
    with suppress(OSError):  # a folder that may be written but not listed
        _clear_leftovers(folder, prefix)
    while True:
        path = os.path.join(folder, f"{prefix}{secrets.token_hex(8)}.tmp")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        # Another writer may take it for a leftover before it is locked: it has it locked, or gone.
        if _locked(handle) is not False and os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)


def _locked(handle: int) -> bool | None:
    """Lock a file for as long as it is open; False if another has, None where disks know no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clear_leftovers(folder: str, prefix: str) -> None:
    with os.scandir(folder) as entries:
        leftovers = [
            entry.path
            for entry in entries
            if entry.name.startswith(prefix) and entry.name.endswith(".tmp")
        ]
    for path in leftovers:
        with suppress(OSError):  # another process may be at it, or its owner
            handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                locked = _locked(handle)
                age = time.time() - os.fstat(handle).st_mtime
                if locked or (locked is None and age > _OLD):
                    os.unlink(path)
            finally:
                os.close(handle)


def _keep_mode_and_owner(handle: int, before: os.stat_result) -> None:
    own = os.fstat(handle)
    for user, group in ((before.st_uid, -1), (-1, before.st_gid)):
        if hasattr(os, "fchown") and (user, group) not in ((own.st_uid, -1), (-1, own.st_gid)):
            with suppress(OSError):
                os.fchown(handle, user, group)
    if hasattr(os, "fchmod"):
        with suppress(PermissionError):  # disks that know no modes
            os.fchmod(handle, stat.S_IMODE(before.st_mode))


def _move_to_free_name(temporary: str, target: str) -> None:
    """Rename a file, if nothing has the name by then."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, target) from None
        os.replace(temporary, target)
    else:
        os.unlink(temporary)


def _probe(folder: str, prefix: str) -> None:
    handle, path = _new_file(folder, prefix)
    try:
        os.write(handle, bytes(_PROBE))
        os.fsync(handle)
    finally:
        os.unlink(path)
        os.close(handle)


def _sync_folder(folder: str) -> None:
    """Have the folder's entry on the disk, too, where that can be asked for."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _explained(error: OSError, path: AnyPath) -> OSError:
    """What went wrong, of the path that was asked for and not of a temporary name."""
    path = os.fspath(path)
    folder = os.path.dirname(os.path.realpath(path))
    if error.errno in _FULL:
        text = (
            f"No space left on device: the disk of {folder} is full. {path} is as it was, and what "
            "was to be saved is still in memory; make room and save again, or save it elsewhere"
        )
    elif not os.path.isdir(folder):
        text = f"There is no folder {folder} to write {os.path.basename(path)} in; make it first"
    elif error.errno == errno.EEXIST:
        text = f"{path} exists; pass overwrite=True to replace it"
    elif error.errno is None:
        return error
    else:
        text = f"{os.strerror(error.errno)}: {path} cannot be written"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text += f"; its folder {folder} must allow new files, or choose another"
    return OSError(error.errno, text)
