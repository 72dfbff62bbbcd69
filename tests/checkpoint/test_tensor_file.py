import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from v4jax.checkpoint.tensor_file import INDEX_FILE, CheckpointError, read_header, read_shards

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
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, b"x" * 8, "a has data_offsets"),
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


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=16))
def test_any_header_is_read_or_refused(tmp_path_factory, header: bytes, data: bytes):
    path = write_raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in tensors.values()) == len(data)


@given(st.data())
def test_any_flipped_header_byte_is_harmless_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flip.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in found.values()) <= len(content)


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
