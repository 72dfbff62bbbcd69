"""Safetensors files as they lie on disk: a strict header parser and reads of single tensors or single experts.

The library's NumPy loader refuses FP8 and E8M0 and maps whole files, so reading is done here; nothing in a header is
believed before it was checked against the file.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from v4jax.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file or tensor and the remedy."""


DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    # Never part of a V4 model, but sized, so that the inventory can name them.
    "F64": np.dtype(np.float64),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
"""Safetensors dtype names."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_MAX_HEADER = 100_000_000
_FETCH_AGAIN = "the file is damaged or its download incomplete: fetch it again"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int

    def read(self, slab: int | None = None) -> np.ndarray:
        """The tensor in its stored dtype, or with `slab` only that entry of its leading axis.

        Raises:
            CheckpointError: the file cannot be read or is shorter than when it was opened.
        """
        shape, start, length = self.shape, self.offset, self.nbytes
        if slab is not None:
            length //= shape[0]
            start += slab * length
            shape = shape[1:]
        buffer = np.empty(length, np.uint8)
        try:
            with self.file.open("rb", buffering=0) as file:
                _read_into(file.fileno(), buffer, start)
        except EOFError:
            raise CheckpointError(f"{self.file}: ends within {self.name}; {_FETCH_AGAIN}") from None
        except OSError as error:
            raise CheckpointError(f"{self.file}: {error.strerror}; check the disk and the permissions") from None
        return buffer.view(DTYPES[self.dtype]).reshape(shape)


def _read_into(descriptor: int, buffer: np.ndarray, offset: int) -> None:
    view = buffer.data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise EOFError
        view, offset = view[count:], offset + count


# ---- one file --------------------------------------------------------------------------------------------------------
def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the header is not what the format demands, or does not describe the bytes that follow it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: got a header of {length} bytes in a file of {size}, need at most "
                    f"{max(0, min(size - 8, _MAX_HEADER))}; {_FETCH_AGAIN}, or it is not safetensors"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; check the path and the permissions") from None
    entries = _parse_json(path, text)
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _parse_entry(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice; {_FETCH_AGAIN}")
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error}); {_FETCH_AGAIN}") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its header has an absurd number ({error}); {_FETCH_AGAIN}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is a JSON {type(entries).__name__}, need an object; {_FETCH_AGAIN}")
    return entries


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    is_entry = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    if not is_entry or not _is_sizes(entry["shape"]) or not _is_sizes(entry["data_offsets"]):
        raise CheckpointError(f"{path}: {name} has no valid dtype, shape and data_offsets; {_FETCH_AGAIN}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']!r}, need one of {', '.join(DTYPES)}")
    need = DTYPES[entry["dtype"]].itemsize
    for dimension in entry["shape"]:
        need *= dimension
    offsets = entry["data_offsets"]
    if len(offsets) != 2 or offsets[1] - offsets[0] != need:
        raise CheckpointError(
            f"{path}: {name} has data_offsets {offsets}, need {need} bytes for {entry['dtype']} {entry['shape']}; "
            f"{_FETCH_AGAIN}"
        )
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start + offsets[0], need)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """The tensors must tile the data: no gap, no overlap, nothing after the last."""
    end, previous = start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            what = "overlaps" if info.offset < end else "leaves a gap after"
            raise CheckpointError(f"{path}: {info.name} {what} {previous}; {_FETCH_AGAIN}")
        end, previous = end + info.nbytes, info.name
    if end != size:
        what = "truncated" if size < end else "too long"
        raise CheckpointError(f"{path}: {what}: got {size} bytes, need {end} by its header; {_FETCH_AGAIN}")


# ---- a directory -----------------------------------------------------------------------------------------------------
def read_shards(directory: Path) -> dict[str, TensorInfo]:
    """The tensors of a Hugging Face directory: sharded with an index, or a single file.

    Raises:
        CheckpointError: a file is missing or damaged, or index and shards contradict each other.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        return _read_indexed(index)
    single = directory / SINGLE_FILE
    if not single.is_file():
        found = sorted(path.name for path in directory.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{directory}: got {len(found)} safetensors files and no {INDEX_FILE}, need {SINGLE_FILE} or the "
                "index; give a Hugging Face or v4jax model directory"
            )
        single = directory / found[0]
    return read_header(single)


def _read_indexed(index: Path) -> dict[str, TensorInfo]:
    weight_map = _weight_map(index)
    tensors = join(read_header(index.parent / name) for name in sorted(set(weight_map.values())))
    wrong = [
        f"{name} (index: {weight_map.get(name)}, found in: {tensors[name].file.name if name in tensors else None})"
        for name in sorted(weight_map.keys() | tensors.keys())
        if name not in tensors or weight_map.get(name) != tensors[name].file.name
    ]
    if wrong:
        raise CheckpointError(
            f"{index}: {len(wrong)} tensors are not where the index says; fetch index and shards of one revision:\n"
            + summarise(wrong)
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        is_map = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror}; check the permissions") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        is_map, weight_map = False, {}
    if not is_map:
        raise CheckpointError(f"{index}: need a JSON object with a weight_map of tensor to file; {_FETCH_AGAIN}")
    files = set(weight_map.values())
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r}, need files beside the index; correct the index")
    missing = sorted(file for file in files if not (index.parent / file).is_file())
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(files)} files are missing; fetch them:\n" + summarise(missing)
        )
    return weight_map


def join(parts: Iterator[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors of several files.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            first, second = tensors[twice[0]].file, part[twice[0]].file
            raise CheckpointError(f"{twice[0]} is both in {first} and in {second.name}; remove one of the files")
        tensors |= part
    return tensors


def summarise(lines: list[str], limit: int = 20) -> str:
    """At most `limit` of the lines, indented, and how many more there are."""
    more = [f"… and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in [*lines[:limit], *more])
