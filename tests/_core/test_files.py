"""Files whole or not at all, as they were, where they were; and nothing that only looks like one."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from captum_classfilters._core import files
from captum_classfilters._core.files import (
    check_writable,
    check_writable_folder,
    open_regular,
    read_text,
    write_atomically,
    write_text,
)

BEGINS = ".classfilters-"


def irregular(kind, folder):
    """Something that has a file's name."""
    path = folder / kind
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            previous = os.getcwd()
            os.chdir(folder)  # names of sockets are short
            bound.bind(kind)
            os.chdir(previous)
    elif kind == "device":
        return "/dev/zero"
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(folder / "pipe")
        path.symlink_to("pipe")
    return path


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["named pipe", "socket", "device", "folder", "link to a pipe"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    path = irregular(kind, tmp_path)
    before = os.listdir(tmp_path)
    told = "named pipe" if kind.startswith("link") else kind
    for use in (open_regular, read_text, check_writable, lambda p: write_atomically(p, b"x")):
        with pytest.raises(ValueError, match=f"is a {told}; expected a file"):
            use(path)
    assert os.listdir(tmp_path) == before


def test_absent_files_are_called_absent(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    for path in ("absent", "file/below", "dangling", "no/folder"):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            open_regular(tmp_path / path)
    with pytest.raises(TypeError):
        open_regular(0)  # type: ignore[arg-type]  # not the standard input


@pytest.mark.parametrize("end", ["name/", "", "folder/"])
def test_a_path_without_a_name_is_none_of_a_file(tmp_path, monkeypatch, end):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for use in (check_writable, lambda path: write_atomically(path, b"x")):
        with pytest.raises(ValueError, match="ends with no name; expected a file"):
            use(end)
    assert os.listdir(tmp_path) == ["folder"]


def test_text(tmp_path):
    path = tmp_path / "names.txt"
    write_text(path, "größer\nhalf \ud800")
    assert path.read_bytes().decode() == "größer\nhalf \\ud800"
    path.write_bytes("\ufeffä".encode())
    assert read_text(path) == "ä"
    path.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"names\.txt is no text in UTF-8 \(byte 3 is 0xff\)"):
        read_text(path)


# -- writing ---------------------------------------------------------------------------------------


def test_new_files_have_the_mode_that_umask_gives_and_it_is_not_touched(tmp_path, monkeypatch):
    old = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", None)  # whoever calls it changes it for all threads
            write_atomically(tmp_path / "new", b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o444, 0o755])
def test_overwriting_keeps_the_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    write_atomically(path, b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", mode)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may give files away")
def test_overwriting_keeps_the_owner(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    os.chown(path, 1234, 1235)
    write_atomically(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)

    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(os, "fchown", forbidden)
    write_atomically(path, b"newer")  # where it is not allowed, the file is written all the same
    assert path.read_bytes() == b"newer"


def test_links_stay_and_what_they_point_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "file"
    for link, to in (("one", "far/file"), ("two", "one")):
        (tmp_path / link).symlink_to(to)
    write_atomically(tmp_path / "two", b"new")  # nothing was there
    assert target.read_bytes() == b"new"
    write_atomically(tmp_path / "two", b"newer")
    assert target.read_bytes() == b"newer"
    assert all((tmp_path / link).is_symlink() for link in ("one", "two"))
    assert os.listdir(tmp_path / "far") == ["file"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "loop", b"x")
    other = tmp_path / "hard"
    os.link(target, other)
    write_atomically(target, b"newest")
    assert other.read_bytes() == b"newer"


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "a b\nc", "-", ".hidden"])
def test_any_name_that_the_disk_takes(tmp_path, name):
    for data in (b"1", b"2"):
        check_writable(tmp_path / name)
        write_atomically(tmp_path / name, data)
        assert (tmp_path / name).read_bytes() == data
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(OSError, match="name too long"):
        write_atomically(tmp_path / ("x" * 256), b"")


def test_parts_are_written_one_after_the_other(tmp_path):
    write_atomically(tmp_path / "file", [b"a", memoryview(b"bc"), b""])
    assert (tmp_path / "file").read_bytes() == b"abc"


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_says_where_it_is(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, failing(errno.ENOSPC))
    with pytest.raises(OSError, match=f"the disk of {tmp_path} is full.*still in memory") as raised:
        write_atomically(path, b"new")
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_exception_in_the_middle_leaves_nothing(tmp_path):
    def parts():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", parts())
    assert os.listdir(tmp_path) == []


KILLED = """
import os, sys, time
from captum_classfilters._core.files import write_atomically
def parts():
    yield b"half"
    print("begun", flush=True)
    time.sleep(600)
write_atomically(sys.argv[1], parts())
"""


def test_leftovers_of_the_killed_go_and_files_of_the_living_stay(tmp_path):
    """Those of other targets are left alone, too."""
    path, other = tmp_path / "file", tmp_path / "other"
    running = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE)
        for target in (path, path, other)
    ]
    try:
        assert all(run.stdout and run.stdout.readline() == b"begun\n" for run in running)
        left = set(os.listdir(tmp_path))
        assert len(left) == 3
        assert all(name.startswith(BEGINS) for name in left)
        write_atomically(path, b"1")
        assert set(os.listdir(tmp_path)) == left | {"file"}
        for run in (running[0], running[2]):
            run.send_signal(signal.SIGKILL)
            run.wait()
        check_writable(path)
        assert len(set(os.listdir(tmp_path)) & left) == 2
        running[1].kill()
        running[1].wait()
        write_atomically(path, b"3")
        write_atomically(other, b"3")
        assert set(os.listdir(tmp_path)) == {"file", "other"}
    finally:
        for run in running:
            run.kill()
            run.wait()


def test_without_locks_leftovers_go_by_their_age(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", failing(errno.ENOLCK))
    path = tmp_path / "file"
    _, prefix = files._temporary_names(os.path.realpath(path))
    young, old = tmp_path / f"{prefix}young.tmp", tmp_path / f"{prefix}old.tmp"
    for leftover in (young, old):
        leftover.touch()
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    write_atomically(path, b"new")
    assert set(os.listdir(tmp_path)) == {"file", young.name}


def test_where_there_are_no_locks_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    write_atomically(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("gone", ["before it is locked", "after"])
def test_a_new_file_taken_for_a_leftover(tmp_path, monkeypatch, gone):
    """Another writer finds a file that has just been made, not yet locked, and removes it."""
    real_open, real_sync = os.open, os.fsync
    taken: list[tuple[int, str]] = []

    def taking_open(path, flags, *rest):
        handle = real_open(path, flags, *rest)
        if flags & os.O_EXCL and not taken:
            other = real_open(path, os.O_RDWR)
            assert files._locked(other)
            taken.append((other, path))
            if gone == "before it is locked":
                os.unlink(path)
                os.close(other)
        return handle

    def removing_sync(handle):
        if os.path.exists(taken[0][1]):
            os.unlink(taken[0][1])
            os.close(taken[0][0])
        real_sync(handle)

    monkeypatch.setattr(os, "open", taking_open)
    monkeypatch.setattr(os, "fsync", removing_sync)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_threads_that_write_one_file(tmp_path):
    """Each time it is one of them that is there, whole."""
    path = tmp_path / "file"
    wrong: list[object] = []
    contents = [bytes([65 + number]) * 10_000 for number in range(4)]
    write_atomically(path, contents[0])

    def write(content):
        for _ in range(15):
            try:
                write_atomically(path, content)
            except Exception as error:
                wrong.append(error)
            if path.read_bytes() not in contents:
                wrong.append("half a file")

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_of_those_that_must_not_replace_one_is_first(tmp_path, monkeypatch, links):
    """Whoever comes later is told, however late the other came."""
    path, won, lost = tmp_path / "file", [], []
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
        write_atomically(path, b"0", overwrite=False)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            write_atomically(path, b"1", overwrite=False)
        assert os.listdir(tmp_path) == ["file"]
        return
    barrier = threading.Barrier(4)

    def write(number):
        def parts():
            barrier.wait()  # nothing was there when any of them began
            yield bytes([number])

        try:
            write_atomically(path, parts(), overwrite=False)
            won.append(bytes([number]))
        except FileExistsError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [path.read_bytes()]
    assert len(lost) == 3
    assert all("file exists; pass overwrite=True" in text for text in lost)
    assert os.listdir(tmp_path) == ["file"]
    path.unlink()
    path.symlink_to("other")
    write_atomically(path, b"5", overwrite=False)
    assert (tmp_path / "other").read_bytes() == b"5"


# -- before the work -------------------------------------------------------------------------------


def test_paths_that_cannot_be_written_are_told_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in ("no/result", "file/result"):
        with pytest.raises(ValueError, match=r"There is no folder .* to write result in"):
            check_writable(tmp_path / path)
        with pytest.raises(OSError, match=r"There is no folder .* to write result in"):
            write_atomically(tmp_path / path, b"")
    check_writable(tmp_path / "result")
    check_writable(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(ValueError, match="is full"):
        check_writable(tmp_path / "result")
    monkeypatch.setattr(os, "open", failing(errno.EROFS))
    with pytest.raises(ValueError, match=r"Read-only.*must allow new files"):
        check_writable(tmp_path / "result")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_for_results_may_have_a_neighbor_of_any_name(tmp_path):
    (tmp_path / "results").mkdir()
    check_writable_folder(tmp_path / "atlas")
    check_writable_folder(tmp_path)
    assert os.listdir(tmp_path) == ["results"]


def test_folders_for_results_may_be_new(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_writable_folder(tmp_path)
    check_writable_folder(tmp_path / "new" / "newer")
    assert os.listdir(tmp_path) == ["file"]
    for path in ("file", "file/below"):
        with pytest.raises(ValueError, match="file cannot be written: it is a file"):
            check_writable_folder(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    check_writable_folder("new")
    with pytest.raises(ValueError, match="it is a file"):
        check_writable_folder("file")
