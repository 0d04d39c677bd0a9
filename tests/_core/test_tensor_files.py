"""What is saved is read back, by us and by safetensors; what is damaged is refused by name."""

import json
import os
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import attack
from captum_classfilters import ClassFilters
from captum_classfilters._core import tensor_files
from captum_classfilters._core.tensor_files import (
    Schema,
    read_any_tensors,
    read_tensors,
    write_tensors,
)

THING = Schema("thing", "tests.Thing", 3, "Thing", "list", checked_from=3)


def every_type():
    """A tensor of every type and several kinds of memory."""
    tensors = {
        str(dtype).removeprefix("torch."): torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
        for dtype in tensor_files.DTYPES.values()
    }
    base = torch.arange(24.0).reshape(4, 6)
    return tensors | {
        "empty": torch.zeros(0, 3),
        "no axes": torch.tensor(2.5),
        "transposed": base.T,
        "part": base[1:3, ::2],
        "same again": base,
        "again": base,
        "expanded": torch.ones(1, 3).expand(2, 3),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(base[0]),
    }


def same(left, right):
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].double(), right[name].double())
        for name in left
        if not left[name].is_complex()
    )


def test_safetensors_reads_what_we_write_and_the_reverse(tmp_path):
    tensors, path = every_type(), tmp_path / "file"
    write_tensors(path, THING, tensors, {"a": [1, None, "ä"]})
    theirs = load_file(path)
    assert same(theirs, tensors)
    assert torch.equal(theirs["conjugate"], torch.tensor([1 - 2j]))
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["thing"])
    assert record["a"] == [1, None, "ä"]
    stored = read_tensors(path, THING)
    assert same(stored.all_tensors(), tensors)
    assert (stored.version, stored.value("a", list)) == (3, [1, None, "ä"])
    save_file(theirs, path, metadata={"anything": "else"})
    assert same(read_any_tensors(path), tensors)
    save_file(theirs, path)
    assert same(read_any_tensors(path), tensors)


def test_tensors_have_memory_of_their_own(tmp_path):
    write_tensors(tmp_path / "file", THING, {"b": torch.ones(3), "a": torch.zeros(2)}, {})
    read = read_tensors(tmp_path / "file", THING).all_tensors()
    read["a"] += 5
    assert read["b"].tolist() == [1, 1, 1]
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex128)}, r"'a' is torch\.complex128"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(2, device="meta")}, "on meta"),
        ({"__metadata__": torch.zeros(2)}, "cannot be called '__metadata__'"),
        ({"half \ud800": torch.zeros(2)}, "cannot be called"),
    ],
)
def test_what_no_file_holds_is_refused_before_anything_is_written(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "file", THING, tensors, {})
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        write_tensors(tmp_path / "file", THING, {}, {"deep": deep})
    with pytest.raises(ValueError, match="holds what JSON cannot: Object of type Tensor"):
        write_tensors(tmp_path / "file", THING, {}, {"origin": torch.zeros(2)})
    assert os.listdir(tmp_path) == []


def test_headers_that_no_reader_takes_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_LONGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="a safetensors file holds 1,000"):
        write_tensors(tmp_path / "file", THING, {}, {"a": "x" * 1000})


# -- damage ----------------------------------------------------------------------------------------


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, which is too short"),
        (b"1234567", "7 bytes, which is too short"),
        (b"a text that somebody wrote", "announce a header of"),
        (bytes(8), "Expecting value"),
        ((2**63).to_bytes(8, "little") + b"{}", "announce a header of 9,223"),
        (with_header(b"\xff\xfe"), "utf-8"),
        (with_header(b"[]"), r"JSON is \[\]; expected an object"),
        (with_header(b"{} x"), "Extra data"),
        (with_header(b"[" * 200_000), "nested too deeply"),
        (with_header(b'{"a":' * 200_000), "nested too deeply"),
        (with_header(b'{"a": 1, "a": 1}'), "a name stands twice"),
        (with_header({"a": None}), "'a' is described by None"),
        (with_header({"a": {**entry(), "more": 1}}, bytes(8)), "is described by"),
        (with_header({"a": entry("F4")}, bytes(8)), "of type 'F4'; known are"),
        (with_header({"a": entry(["F32"])}, bytes(8)), r"of type \['F32'\]"),
        (with_header({"a": entry(shape=[-2])}, bytes(8)), "is described by"),
        (with_header({"a": entry(shape=[True, 2])}, bytes(8)), "is described by"),
        (with_header({"a": entry(shape=[2.0])}, bytes(8)), "is described by"),
        (with_header({"a": entry(shape=[2**70, 0], offsets=[0, 0])}), "is described by"),
        (with_header({"a": entry(shape=[3])}, bytes(8)), "needs 12 bytes, not 8"),
        (with_header({"a": entry(offsets=[0, 8, 9])}, bytes(8)), "is described by"),
        (with_header({"a": entry(offsets=[8, 0])}, bytes(8)), "needs 8 bytes, not -8"),
        (with_header({"a": entry(offsets=[4, 12])}, bytes(12)), "begins at 4, not at 0"),
        (with_header({"a": entry(), "b": entry()}, bytes(8)), "'b' begins at 0, not at 8"),
        (with_header({"a": entry()}, bytes(7)), "need 8 bytes, but 7 follow"),
        (with_header({"a": entry()}, bytes(9)), "need 8 bytes, but 9 follow"),
        (with_header({"a": entry("BOOL", [2], [0, 2])}, b"\1\2"), "neither true nor false"),
        (with_header({"__metadata__": []}), "metadata are not names and texts"),
        (with_header({"__metadata__": {"thing": 1}}), "metadata are not names and texts"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not a complete safetensors file.*{message}"):
        read_any_tensors(path)
    if b"thing" in content or b"__metadata__" in content or b"BOOL" not in content:
        with pytest.raises(ValueError, match=f"{path} .*"):
            read_tensors(path, THING)


RECORD = {"schema": "tests.Thing", "schema_version": 2}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "does not hold a Thing list: its metadata name nothing"),
        ({"other": "{}"}, r"its metadata name \['other'\]"),
        ({"thing": "no JSON"}, "not a complete Thing file"),
        ({"thing": "[" * 100_000}, "nested too deeply"),
        ({"thing": "null"}, "JSON is None"),
        ({"thing": "{}"}, "it says None and not 'tests.Thing'"),
        ({"thing": json.dumps({**RECORD, "schema": ["x"]})}, r"it says \['x'\]"),
        ({"thing": json.dumps({**RECORD, "schema_version": 4})}, r"schema version 4.*upgrade"),
        ({"thing": json.dumps({**RECORD, "schema_version": "2"})}, "schema version is '2'"),
        ({"thing": json.dumps({**RECORD, "schema_version": True})}, "schema version is True"),
        ({"thing": json.dumps({**RECORD, "schema_version": 0})}, "schema version is 0"),
        ({"thing": json.dumps({**RECORD, "checksum": "sha256"})}, "checksum is not that"),
        ({"thing": json.dumps(RECORD), "checksum": "sha256:0"}, "checksum is not that"),
        ({"thing": json.dumps({**RECORD, "schema_version": 3})}, "checksum is not that"),
        ({"thing": json.dumps(RECORD), "chacksum": "x"}, "hold 'chacksum' beside 'thing'"),
        ({"thing": json.dumps(RECORD)[:-1] + ', "n": ' + "1" * 5000 + "}"}, "not a complete"),
    ],
)
def test_what_is_another_record(tmp_path, metadata, message):
    save_file({"a": torch.ones(2)}, tmp_path / "file", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "file", THING)


def test_files_of_versions_without_a_checksum_are_read_in_silence(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "file", metadata={"thing": json.dumps(RECORD)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = read_tensors(tmp_path / "file", THING)
    assert stored.version == 2
    nameless = Schema("thing", "tests.Thing", 3, "Thing", "list", nameless=True, checked_from=2)
    save_file({"a": torch.ones(2)}, tmp_path / "file", metadata={"thing": "{}"})
    assert read_tensors(tmp_path / "file", nameless).version == 1


@pytest.mark.parametrize("depth", [200, 450, 700, 900, 960, 990, 2000])
def test_records_of_any_depth_are_read_or_refused(tmp_path, depth):
    """Wherever the limit of the recursion strikes."""
    path = tmp_path / "table"
    ClassFilters(torch.ones(1, 2), torch.ones(1)).save(path)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["class_filters"])
    del record["checksum"]
    for name in ("provenance", "layer", "class_names", "schema_version"):
        deep = "[" * depth + "]" * depth
        deep = f'{{"a": {deep}}}' if name == "provenance" else deep
        text = json.dumps({**record, name: "HERE"}).replace('"HERE"', deep)
        save_file(load_file(path), tmp_path / "deep", metadata={"class_filters": text})
        if depth > sys.getrecursionlimit() or name != "provenance":
            with pytest.raises(ValueError, match=r".+"):
                ClassFilters.load(tmp_path / "deep")
            continue
        try:
            ClassFilters.load(tmp_path / "deep")
        except ValueError as error:
            assert "nested too deeply" in str(error)  # noqa: PT017


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_tensors(path, THING, {"a": torch.ones(20_000)}, {})
    original = torch.empty

    def cut(*arguments, **options):
        os.truncate(path, 10_000)
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "empty", cut)
    with pytest.raises(ValueError, match="became shorter"):
        read_tensors(path, THING)


def test_parts_are_taken_once_and_checked(tmp_path):
    path = tmp_path / "file"
    details = {"n": 3, "x": 0.5, "flag": True, "names": ["a"], "mixed": ["a", 1], "null": None}
    write_tensors(path, THING, {"t": torch.ones(2, 3), "u": torch.ones(2)}, details)
    stored = read_tensors(path, THING)
    assert (stored.value("n", int), stored.value("n", float), stored.value("x", float)) == (
        3,
        3,
        0.5,
    )
    assert stored.value("flag", bool) is True
    assert stored.values("names", str) == ["a"]
    assert stored.value("more", str, "default") == "default"
    assert stored.tensor("t", torch.float32, (2, None)).shape == (2, 3)
    assert stored.optional_tensor("v", torch.float32, ()) is None
    for take, message in [
        (lambda: stored.value("flag", int), "flag is True; expected a value of type int"),
        (lambda: stored.value("x", int), "x is 0.5"),
        (lambda: stored.value("null", str), "null is None"),
        (lambda: stored.value("more", str), "lacks parts of a Thing list: 'more'"),
        (lambda: stored.values("mixed", str), "mixed holds 1; expected type str"),
        (lambda: stored.values("n", str), "n is 3"),
        (lambda: stored.tensor("t", torch.float64, (2, 3)), r"expected torch\.float64"),
        (
            lambda: stored.tensor("t", torch.float32, (3, 2)),
            r"shape \(2, 3\); expected .* \(3, 2\)",
        ),
        (lambda: stored.tensor("v", torch.float32, ()), "lacks parts"),
    ]:
        with pytest.raises(ValueError, match=message):
            take()
    with pytest.raises(ValueError, match="it holds 'u', which Thing files of schema version 3"):  # noqa: SIM117
        with stored.building():
            raise AssertionError
    stored.all_tensors()
    with pytest.raises(ValueError, match=f"{path} is no valid Thing file: odd"), stored.building():
        raise ValueError("odd")
    with pytest.raises(ValueError, match=r"do not fit each other \(KeyError: 'absent'\)"):  # noqa: SIM117
        with stored.building():
            _ = {"a": 1}["absent"]


# -- all that we keep ------------------------------------------------------------------------------

TEXT = (
    st.text(st.characters(exclude_categories=()), max_size=8)
    | st.just("\ud800\udfff")
    | st.just("x" * 3000)
)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32]),
    st.lists(TEXT, min_size=5, max_size=5, unique=True),
    TEXT,
    st.integers(0, 2**31),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    ),
)
def test_tables_that_can_be_made_can_be_kept(
    tmp_path_factory, classes, filters, dtype, names, method, seed, note
):
    draw = torch.Generator().manual_seed(seed)
    parts = torch.rand(4, classes, filters, generator=draw)
    counts = torch.randint(0, 3, (classes,), generator=draw)
    scores = (parts[0] * 100).to(dtype)
    if dtype.is_floating_point:
        scores[counts == 0] = float("nan")
    selected = (parts[1] > 0.8) & (counts > 0)[:, None]
    significant = bool(seed % 2)
    errors = parts[2].masked_fill(counts[:, None] < 2, float("nan"))
    table = ClassFilters(
        scores,
        counts.to(torch.float32 if seed % 3 else torch.int16),
        selected if seed % 5 else None,
        errors.to(dtype) if dtype.is_floating_point else None,
        names[:classes],
        method,
        method,
        {"note": note, "inf": float("inf")},
        parts[3] if significant else None,
        parts[3].sqrt() if significant else None,
    )
    path = tmp_path_factory.mktemp("tables") / "table"
    table.save(path)
    assert ClassFilters.load(path) == table
    first = path.read_bytes()
    ClassFilters.load(path).save(path, overwrite=True)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"counts": torch.tensor([2.5, 1])}, "whole, none negative"),
        ({"counts": torch.tensor([float("nan"), 1])}, "whole, none negative"),
        ({"counts": torch.tensor([float("inf"), 1])}, "whole, none negative"),
        ({"counts": torch.tensor([-1, 1])}, "whole, none negative"),
        ({"counts": torch.tensor([1j, 1])}, "whole, none negative"),
        ({"standard_errors": -torch.ones(2, 3)}, "negative"),
        ({"p_values": torch.full((2, 3), 1.01)}, r"\[0, 1\]"),
        ({"q_values": torch.full((2, 3), float("nan"))}, r"\[0, 1\]"),
        ({"scores": torch.ones(2, 3, dtype=torch.complex64)}, "real numbers"),
        ({"standard_errors": torch.ones(2, 3, dtype=torch.complex64)}, "real numbers"),
    ],
)
def test_tables_whose_values_cannot_be_meant(tmp_path, parts, message):
    """In memory, and in a file that says so."""
    whole: dict[str, Any] = {"scores": torch.ones(2, 3), "counts": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        ClassFilters(**{**whole, **parts})
    path = tmp_path / "table"
    ClassFilters(**whole, selected=torch.eye(2, 3).bool()).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {"class_filters": file.metadata()["class_filters"].replace('"sha256"', "null")}
    changed = {name: tensor.double() for name, tensor in parts.items() if not tensor.is_complex()}
    if "counts" in changed:
        changed["counts"] = torch.tensor([-3, 1])
    if changed:
        save_file({**load_file(path), **changed}, path, metadata=metadata)
        with pytest.raises(ValueError, match=rf"{path} is no valid ClassFilters file: .*{message}"):
            ClassFilters.load(path)


@pytest.mark.parametrize("name", attack.KINDS)
def test_damaged_and_forged_files(name):
    outcome = attack.attack_kind(name, attack.KINDS[name](), 40, seed=3)
    assert outcome.survived == outcome.tried == 40, outcome.failures


def test_the_attack_sees_what_a_checksum_sees(monkeypatch):
    monkeypatch.setattr(tensor_files, "_verify", lambda *parts: parts[3].pop("checksum"))
    outcome = attack.attack_kind("tables", attack.KINDS["tables"](), 150, seed=1)
    assert outcome.survived < outcome.tried
    assert any("other values, and nothing was said" in failure for failure in outcome.failures)
