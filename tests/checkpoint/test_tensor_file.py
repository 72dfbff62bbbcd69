import json
import os
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from v4jax.checkpoint.tensor_file import (
    DTYPES,
    INDEX_FILE,
    CheckpointError,
    TensorInfo,
    check_apart,
    notes_on_index,
    read_header,
    read_shards,
)

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(8, dtype=np.int64).reshape(4, 2),
    "c": np.linspace(-9, 9, 5).astype(ml_dtypes.float8_e4m3fn),
    "d": np.arange(3, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu),
    "e": np.array([1, -2], ml_dtypes.bfloat16),
    "f": np.zeros((0, 7), np.float16),
}


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: list | None = None) -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read_bit_for_bit(tmp_path: Path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        got = found[name].read()
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_one_slab_is_one_entry_of_the_leading_axis(tmp_path: Path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["b"]
    for n in range(4):
        np.testing.assert_array_equal(info.read(n), TENSORS["b"][n])


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"1234", "truncated: got 73 bytes, need 77"),
        ({"a": entry(0, 4)}, b"12345678", "too long"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, "b overlaps a"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, "b leaves a gap after a"),
        ({"a": entry(0, 8, shape=[3])}, b"x" * 8, r"need 12 bytes for F32 \[3\]"),
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, b"x" * 8, r"a has the shape \[4.*less than 2\^63 bytes"),
        ({"a": entry(0, 0, shape=[0, 2**62])}, b"", "less than 2\\^63 bytes"),
        ({"a": entry(0, 4, shape=[1] * 33)}, b"x" * 4, "need at most 32 axes"),
        ({"a": entry(2**60, 2**60 + 4)}, b"x" * 4, "a leaves a gap after the header"),
        ({"a": entry(0, 2**60)}, b"x" * 4, "truncated: got"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, b"x" * 8, "b overlaps a"),
        ({"a": entry(-4, 0)}, b"x" * 4, "no valid dtype, shape"),
        ({"a\x1b[31m": entry(0, 4)}, b"x" * 4, r"names 'a\\x1b\[31m', need 1 to 1000 printable characters"),
        (b'{"a\\ud800": {}}', b"", r"names 'a\\ud800', need"),
        ({"": entry(0, 4)}, b"x" * 4, "names '', need"),
        ({"a" * 1001: entry(0, 4)}, b"x" * 4, r"names 'aaaa+\.\.\.aaaa+', need"),
        ({"a": entry(8, 0, shape=[0])}, b"x" * 8, "a has data_offsets"),
        ({"a": entry(0, 8, shape=[-2])}, b"x" * 8, "no valid dtype, shape"),
        ({"a": entry(0, 4, shape=[True])}, b"x" * 4, "no valid dtype, shape"),
        ({"a": entry(0, 4, shape=[1.0])}, b"x" * 4, "no valid dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"x" * 4, "no valid dtype, shape"),
        ({"a": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, b"x" * 4, "a has data_offsets"),
        ({"a": [1, 2]}, b"", "no valid dtype, shape"),
        ({"a": entry(0, 4, "F4")}, b"x" * 4, "has dtype 'F4', need one of F32"),
        ({"a": entry(0, 4) | {"dtype": ["F32"]}}, b"x" * 4, "has dtype"),
        ([1], b"", "a JSON list, need an object"),
        (b"\xff\xfe", b"", "not JSON"),
        (b'{"a": ', b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "absurd number"),
        (b'{"a": 1, "a": 2}', b"", "names 'a' twice"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, header: object, data: bytes, message: str):
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(write_raw(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize("start", [b"", b"1234", struct.pack("<Q", 2**60), struct.pack("<Q", 9) + b"{}      "])
def test_a_header_longer_than_the_file_is_refused_unread(tmp_path: Path, start: bytes):
    (tmp_path / "x.safetensors").write_bytes(start)
    with pytest.raises(CheckpointError, match=r"got a header of \d+ bytes in a file of \d+, need at most"):
        read_header(tmp_path / "x.safetensors")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "I8", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def read_everything(path: Path) -> dict[str, TensorInfo] | None:
    """What a reader does with a file: a description of the tensors that reads, or a `CheckpointError` that prints."""
    message = b""
    tensors = None
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        message = str(error).encode()
    assert len(message) < 2500 + len(str(path))
    for info in (tensors or {}).values():
        array = info.read()
        assert (array.shape, array.nbytes, array.dtype) == (info.shape, info.nbytes, DTYPES[info.dtype])
    return tensors


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=16))
def test_any_header_is_read_or_refused(tmp_path_factory, header: bytes, data: bytes):
    path = write_raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data)
    tensors = read_everything(path)
    assert tensors is None or sum(info.nbytes for info in tensors.values()) == len(data)


NUMBERS = (
    st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -1, 0.5, True, None]) | st.integers()
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "f32", "", None]),
        "shape": st.lists(NUMBERS, max_size=4) | st.lists(st.just(1), min_size=30, max_size=70),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | st.lists(NUMBERS, max_size=3),
    }
)


@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), st.binary(max_size=16))
def test_any_table_of_tensors_is_read_or_refused(tmp_path_factory, header: dict, data: bytes):
    path = write_raw(tmp_path_factory.getbasetemp() / "table.safetensors", header, data)
    tensors = read_everything(path)
    assert tensors is None or sum(info.nbytes for info in tensors.values()) == len(data)


@given(st.data())
def test_a_right_table_with_any_value_replaced_is_read_or_refused(tmp_path_factory, data):
    header = {"a": entry(0, 8, shape=[2, 1]), "b": entry(8, 8, shape=[0, 3]), "c": entry(8, 12, shape=[])}
    changed = header[data.draw(st.sampled_from("abc"))]
    field = data.draw(st.sampled_from(["shape", "data_offsets"]))
    if changed[field]:
        changed[field][data.draw(st.integers(0, len(changed[field]) - 1))] = data.draw(NUMBERS)
    read_everything(write_raw(tmp_path_factory.getbasetemp() / "change.safetensors", header, b"x" * 12))


@given(st.data())
def test_any_flipped_header_byte_is_harmless_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flip.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = read_everything(path)
    assert found is None or sum(info.nbytes for info in found.values()) <= len(content)


@pytest.mark.parametrize("length", range(0, 120, 7))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, length: int):
    save_file(TENSORS, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for cut in (length, len(content) - 1 - length):
        (tmp_path / "x.safetensors").write_bytes(content[:cut])
        assert read_everything(tmp_path / "x.safetensors") is None


# ---- memory ---------------------------------------------------------------------------------------------------------
LARGE = 20_000_000


@pytest.mark.parametrize(
    "header",
    [
        b"[" * LARGE,
        b"\0" * LARGE,
        b'{"a":[' + b"[]," * (LARGE // 3) + b"[]]}",
        b'{"a":{' + b'"":{},' * (LARGE // 6) + b'"":0}}',
        b'{"__metadata__":{' + b'"":"",' * (LARGE // 6) + b'"":""}}',
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"1," * (LARGE // 2) + b"1]}}",
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"1" * LARGE + b"]}}",
        b'{"a":' + b" " * LARGE + b"-1}",
        b'{"' + b"a" * LARGE + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":"' + b"\\" * LARGE,
    ],
    ids=["lists", "zeros", "empty", "nested", "metadata", "axes", "digits", "spaces", "name", "backslashes"],
)
def test_a_large_header_that_is_no_table_costs_little_memory(tmp_path: Path, header: bytes):
    path = write_raw(tmp_path / "x.safetensors", header, b"1234")
    assert peak_memory(path) < 6 * LARGE


def peak_memory(path: Path) -> int:
    tracemalloc.start()
    try:
        assert read_everything(path) is None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 8, 100_000, 2**40])
def test_a_header_of_2_to_the_60_bytes_allocates_nothing(tmp_path: Path, size: int):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**60))
        file.truncate(8 + size)  # no blocks on the disk
    assert peak_memory(path) < 1_000_000


def test_a_large_table_is_read(tmp_path: Path):
    header = {f"layers.{n}.ffn.experts.{n}.w1.weight": entry(4 * n, 4 * n + 4) for n in range(12_000)}
    metadata = {"__metadata__": {"format": "pt", 'with "quotes"': '[{"and": "brackets"}]\n'}}
    text = json.dumps(header | metadata, indent=1).encode() + b"  "
    assert len(text) > 2**20
    for place in (text, json.dumps(metadata | header).encode(), json.dumps(header, separators=(",", ":")).encode()):
        path = write_raw(tmp_path / "x.safetensors", place, b"x" * 48_000)
        assert len(read_header(path)) == 12_000


# ---- shards ---------------------------------------------------------------------------------------------------------
def shards(directory: Path, weight_map: object, files: dict[str, list[str]]) -> Path:
    for file, names in files.items():
        save_file({name: TENSORS["a"] for name in names}, directory / file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_shards_are_joined_by_their_index(tmp_path: Path):
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    assert {name: info.file.name for name, info in read_shards(tmp_path).items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "files", "message"),
    [
        ({"a": "1", "b": "2"}, {"1": ["a"]}, "1 of its 2 files are missing; fetch them:\n  2"),
        ({"a": "1", "b": "2"}, {"1": ["a", "b"], "2": ["b"]}, "b is both in .*1 and in 2"),
        ({"a": "1", "b": "1"}, {"1": ["a"]}, r"b \(index: 1, found in: None\)"),
        ({"a": "1"}, {"1": ["a", "b"]}, r"b \(index: None, found in: 1\)"),
        ({"a": "1", "b": "2"}, {"1": ["b"], "2": ["a"]}, "2 tensors are not where the index says"),
        ({"a": "../1"}, {}, "names '../1', need files beside the index"),
        ({"a": 1}, {}, "need a JSON object with a weight_map"),
        ([], {}, "need a JSON object with a weight_map"),
        ({"a": "1\n"}, {}, r"names '1\\n', need 1 to 1000 printable"),
        ({"\x1bc": "1"}, {}, r"names '\\x1bc', need"),
        ({"a": ""}, {}, "names '', need"),
        ({"a": ".."}, {}, "1 of its 1 files are missing"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, weight_map: object, files: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        read_shards(shards(tmp_path, weight_map, files))


def test_a_directory_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"got 0 safetensors files and no model\.safetensors\.index\.json"):
        read_shards(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    infos = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    last = max(infos.values(), key=lambda info: info.offset + info.nbytes)
    with pytest.raises(CheckpointError, match=f"ends within {last.name}"):
        last.read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"weight_map": {"a": "1", "a": "2"}}', "the index names 'a' twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "the index names 'weight_map' twice"),
        (b"[" * 100_000, "its index is not JSON"),
        (b"\xff", "its index is not JSON"),
        (b"[]", "its index is a JSON list, need an object"),
        (b"{}", "need a JSON object with a weight_map"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: bytes, message: str):
    (tmp_path / INDEX_FILE).write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_shards(tmp_path)


def test_an_index_of_a_terabyte_is_refused_unread(tmp_path: Path):
    (tmp_path / INDEX_FILE).touch()
    os.truncate(tmp_path / INDEX_FILE, 2**40)
    with pytest.raises(CheckpointError, match="got 1099511627776 bytes, need at most"):
        read_shards(tmp_path)


@pytest.mark.parametrize("name", [INDEX_FILE, "model.safetensors", "1.safetensors"])
def test_a_link_to_itself_is_refused(tmp_path: Path, name: str):
    shards(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": ["a"]})
    if name == "model.safetensors":
        (tmp_path / INDEX_FILE).unlink()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=f"{name}: a link that leads back to itself"):
        read_shards(tmp_path)


def test_what_is_odd_about_an_index_is_noted(tmp_path: Path):
    shards(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": ["a"]})
    tensors = read_shards(tmp_path)
    assert notes_on_index(tmp_path, tensors) == []
    for metadata, note in (({"total_size": 24}, []), ({}, []), (None, []), ([], []), ({"total_size": "7"}, ["'7'"])):
        text = json.dumps({"metadata": metadata, "weight_map": {"a": "1.safetensors"}})
        (tmp_path / INDEX_FILE).write_text(text)
        found = notes_on_index(tmp_path, tensors)
        assert len(found) == len(note)
        assert all(f"states total_size {value}, its tensors have 24 bytes" in found[0] for value in note)
    save_file({"old": TENSORS["a"]}, tmp_path / "model.safetensors")
    assert "1 safetensors files not read" in notes_on_index(tmp_path, tensors)[1]


# ---- source and destination -----------------------------------------------------------------------------------------
def test_a_destination_that_is_the_source_is_refused(tmp_path: Path):
    source = tmp_path / "model"
    source.mkdir()
    save_file(TENSORS, source / "x.safetensors")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").symlink_to(source / "x.safetensors")
    (tmp_path / "hard").hardlink_to(source / "x.safetensors")
    same = [source, source / ".", source / ".." / "model", tmp_path / "link", source / "x.safetensors"]
    for first in same:
        for second in [*same, *([tmp_path / "file", tmp_path / "hard"] if first == same[-1] else [])]:
            if first.is_dir() and second.is_file():
                continue
            with pytest.raises(CheckpointError, match="is the checkpoint to be converted; give another output"):
                check_apart(first, second)
    for other in (tmp_path, tmp_path / "new", source / "new"):
        check_apart(source, other)


def test_a_destination_that_links_to_itself_is_refused(tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for pair in ((tmp_path / "a", tmp_path), (tmp_path, tmp_path / "b"), (tmp_path, tmp_path / "b" / "new")):
        with pytest.raises(CheckpointError, match="a link that leads back to itself"):
            check_apart(*pair)
