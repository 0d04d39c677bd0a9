"""Files that the commands read and write: damaged ones are named, and a full disk costs no result."""

import errno
import os
import shutil

import pytest

from captum_classfilters.cli.main import main
from tests.cli.test_commands import arguments, checkpoint, folder

__all__ = ["checkpoint", "folder"]  # fixtures


@pytest.fixture
def own_folder(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "images")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", ["text", "cut", "empty", "pipe"])
def test_damaged_images_are_named(own_folder, checkpoint, tmp_path, capsys, damage):
    image = own_folder / "dog" / "1.png"
    content = image.read_bytes()
    image.unlink()
    if damage == "pipe":
        os.mkfifo(image)
    else:
        image.write_bytes({"text": b"a text", "cut": content[:-200], "empty": b""}[damage])
    assert main(arguments(own_folder, checkpoint, tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert f"{image} is " in printed
    assert ("named pipe" if damage == "pipe" else "no image that can be read") in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"caf\xe9\ndog\nfox\n", "pipe", "folder"])
def test_class_names_that_are_no_text(folder, checkpoint, tmp_path, capsys, content):
    names = tmp_path / "names.txt"
    if content == "pipe":
        os.mkfifo(names)
    elif content == "folder":
        names.mkdir()
    else:
        names.write_bytes(content)
    command = arguments(folder, checkpoint, tmp_path / "out", **{"--class-names": names})
    assert main(command) == 2
    assert f"{names} is " in capsys.readouterr().err


def test_a_full_disk_costs_the_files_and_not_the_result(
    folder, checkpoint, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    output = tmp_path / "out"
    for command in ("identify", "compare"):
        options = arguments(folder, checkpoint, output, **{"--limit": 2})[1:]
        methods = ["--method", "saliency", "contribution"] if command == "compare" else []
        assert main([command, *options, *methods]) == 2
        printed = capsys.readouterr()
        assert f"the disk of {output} is full" in printed.err
        assert "contribution" in printed.out
        assert os.listdir(output) == []


def test_places_that_cannot_be_written_are_told_before_the_images_are_read(
    folder, checkpoint, tmp_path, capsys, monkeypatch
):
    def readonly(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", readonly)
    monkeypatch.setattr("captum_classfilters.cli.folder_job.image_folder", None)
    monkeypatch.setattr("captum_classfilters.cli.demo.load_digits", None)
    for command in ("identify", "compare"):
        options = arguments(folder, checkpoint, tmp_path / "new" / "out")[1:]
        assert main([command, *options]) == 2
        assert "Read-only file system" in capsys.readouterr().err
    assert main(["demo", "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert "Read-only file system" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_names_that_are_no_text_are_spelled_out(own_folder, checkpoint, tmp_path):
    """Names of folders are bytes; half a character is written as what it is."""
    try:
        os.rename(os.fsencode(own_folder / "dog"), os.fsencode(own_folder) + b"/d\xf6g")
    except OSError:
        pytest.skip("this disk takes names in UTF-8 alone")
    output = tmp_path / "out"
    assert main(arguments(own_folder, checkpoint, output)) == 0
    assert "d\\udcf6g,0," in (output / "contribution.csv").read_text("utf-8")
