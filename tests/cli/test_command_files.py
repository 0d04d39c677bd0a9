"""Files that the commands read and write: damaged ones are named, and a full disk costs no result."""

import errno
import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from captum_classfilters.cli.folder_job import _image
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


SHADES = np.array([[0, 1, 17, 100], [128, 200, 254, 255]])


def as_pgm(path, image):
    height, width = image.shape
    path.write_bytes(b"P5 %d %d 65535\n" % (width, height) + image.astype(">u2").tobytes())


def as_tiff_of_12_bits(path, image):
    """Two values in three bytes, as Pillow reads and does not write them."""
    height, width = image.shape
    first, second = image[:, ::2], image[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(data))]
    start = 8 + len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack("<2sHI", b"II", 42, start)
    path.write_bytes(header + data + struct.pack("<H", len(tags)) + entries + bytes(4))


def saved(path, image, kind):
    Image.fromarray(image.astype(kind)).save(path)


@pytest.mark.parametrize(
    ("name", "write", "factor"),
    [
        ("8.png", lambda path, image: saved(path, image, np.uint8), 1),
        ("16.png", lambda path, image: saved(path, image, np.uint16), 257),
        ("16.tif", lambda path, image: saved(path, image, np.uint16), 257),
        ("big-endian.tif", lambda path, image: saved(path, image, ">u2"), 257),
        ("16.pgm", as_pgm, 257),
        ("12.tif", as_tiff_of_12_bits, 4095 / 255),
    ],
)
def test_gray_of_more_bits_is_the_gray_of_8_bits(tmp_path, name, write, factor):
    write(tmp_path / name, np.round(SHADES * factor).astype(np.int64))
    read = np.asarray(_image(str(tmp_path / name)))
    assert (read == SHADES[..., None]).all()
    assert read.shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (np.float32, "are floats, of which white is not known"),
        (np.int32, "are integers of 32 bits"),
    ],
)
def test_gray_whose_white_is_not_known_is_refused(
    own_folder, checkpoint, tmp_path, capsys, kind, told
):
    image = own_folder / "dog" / "1.tif"
    saved(image, SHADES, kind)
    assert main(arguments(own_folder, checkpoint, tmp_path / "out")) == 2
    assert f"{image} is no image that can be read: its values {told}" in capsys.readouterr().err
    command = [*arguments(own_folder, checkpoint, tmp_path / "out"), "--skip-broken"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"skipped: {image}" in printed
    assert "convert it to 8 bits" in printed
    assert "1 of 10 files are broken and skipped" in printed
