"""Safetensors files as they lie on disk: a strict header parser and reads of single tensors or single experts.

The library's NumPy loader refuses FP8 and E8M0 and maps whole files, so reading is done here; nothing in a header is
believed before it was checked against the file.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import reprlib
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

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
UNFINISHED = "conversion.unfinished.json"
"""The record in a Hugging Face directory while a conversion writes it."""

RESUME = "go on with `v4jax convert … --resume`, or remove the directory and convert again"
"""What can be done about a conversion that was interrupted."""

_FOLDERS = ("layers", "mtp", "encoding", "additional_chat_templates")
"""Of model directories, v4jax's and others'."""

_MAX_HEADER = 40_000_000
"""Bytes, for a header or an index: V4-Pro in one file needs half of it."""
_MAX_NAME = 1000
_MAX_AXES = 32
_LARGE = 1 << 20
"""Bytes of JSON from which its outline is checked before objects are made of it."""
_FETCH_AGAIN = "the file is damaged or its download incomplete: fetch it again"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Any
    """A `Path`, or a `RemotePath` in an object store."""
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
            if not isinstance(self.file, Path):
                content = self.file.read_range(start, start + length)
                if len(content) < length:
                    raise EOFError
                buffer[:] = np.frombuffer(content, np.uint8)
            else:
                with self.file.open("rb", buffering=0) as file:
                    _read_into(file.fileno(), buffer, start)
        except EOFError:
            raise CheckpointError(f"{self.file}: ends within {self.name}; {_FETCH_AGAIN}") from None
        except OSError as error:
            raise CheckpointError(
                f"{self.file}: {error.strerror or error}; check the disk and the permissions"
            ) from None
        return buffer.view(DTYPES[self.dtype]).reshape(shape)


def _read_into(descriptor: int, buffer: np.ndarray, offset: int) -> None:
    view = buffer.data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise EOFError
        view, offset = view[count:], offset + count


# ---- one file --------------------------------------------------------------------------------------------------------
def read_header(path: Any) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the header is not what the format demands, or does not describe the bytes that follow it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size if isinstance(path, Path) else path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: got a header of {length} bytes in a file of {size}, need at most "
                    f"{max(0, min(size - 8, _MAX_HEADER))}; {_FETCH_AGAIN}, or it is not safetensors"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; check the path and the permissions") from None
    if length > _LARGE:
        _check_outline(path, text)
    entries = parse_json(path, text)
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _parse_entry(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _outline() -> re.Pattern[bytes]:
    """Entries of three fields, and at most a thousand strings of metadata."""
    space, string = rb"\s*+", rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    comma, colon = (space + mark + space for mark in (b",", b":"))
    sizes = rb"\[%s(?:\d{1,20}(?:%s\d{1,20}){0,%d})?%s\]" % (space, comma, _MAX_AXES - 1, space)
    field = rb"%s%s(?:%s|%s)" % (string, colon, string, sizes)
    entry = rb"%s%s\{%s%s(?:%s%s){2}%s\}" % (string, colon, space, field, comma, field, space)
    pair = string + colon + string
    metadata = rb"%s%s\{%s(?:%s(?:%s%s){0,999})?%s\}" % (string, colon, space, pair, comma, pair, space)
    pattern = rb"%s\{%s(?:(?:%s)?%s)*+(?:(?:%s)?%s(?:%s%s)*+)?%s\}%s" % (
        *(space, space, comma, entry, comma, metadata, comma, entry, space, space),
    )
    return re.compile(pattern, re.DOTALL)


_OUTLINE = _outline()


def _check_outline(path: Any, text: bytes) -> None:
    """Refuses a large header that is no table, before objects are made of it.

    JSON such as `[[],[],…` takes twenty-five times its size in memory, tensors about six times theirs.
    """
    if not _OUTLINE.fullmatch(text):
        raise CheckpointError(f"{path}: its header of {len(text)} bytes is no table of tensors; {_FETCH_AGAIN}")


def parse_json(path: Any, text: bytes, what: str = "header") -> dict[str, Any]:
    """A JSON object that names nothing twice.

    Raises:
        CheckpointError: it is something else; the message calls it `what` of `path`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise CheckpointError(f"{path}: the {what} names {_short(twice)} twice; {_FETCH_AGAIN}")
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {what} is not JSON ({error}); {_FETCH_AGAIN}") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its {what} has an absurd number ({error}); {_FETCH_AGAIN}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its {what} is a JSON {type(entries).__name__}, need an object; {_FETCH_AGAIN}")
    return entries


def _short(value: Any) -> str:
    """For messages: as Python writes it, control characters escaped, cut in the middle."""
    return reprlib.repr(value)


def _check_name(path: Any, name: str) -> None:
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise CheckpointError(
            f"{path}: names {_short(name)}, need 1 to {_MAX_NAME} printable characters; {_FETCH_AGAIN}"
        )


def _parse_entry(path: Any, name: str, entry: Any, start: int) -> TensorInfo:
    _check_name(path, name)
    is_entry = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    if not is_entry or not _is_sizes(entry["shape"]) or not _is_sizes(entry["data_offsets"]):
        raise CheckpointError(f"{path}: {name} has no valid dtype, shape and data_offsets; {_FETCH_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {_short(dtype)}, need one of {', '.join(DTYPES)}")
    # NumPy holds no more axes, nor sizes whose product, empty axes aside, has no 64-bit address.
    if len(shape) > _MAX_AXES or math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise CheckpointError(
            f"{path}: {name} has the shape {_short(shape)}, need at most {_MAX_AXES} axes and less than 2^63 bytes; "
            f"{_FETCH_AGAIN}"
        )
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != need:
        raise CheckpointError(
            f"{path}: {name} has data_offsets {_short(offsets)}, need {need} bytes for {dtype} {shape}; {_FETCH_AGAIN}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], need)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Any, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
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


# ---- places ----------------------------------------------------------------------------------------------------------
def check_link(path: Any) -> None:
    """Refuses symbolic links that lead back to themselves, which other checks take for missing files.

    Raises:
        CheckpointError: this is one, or lies behind one.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(
                f"{path}: a link that leads back to itself, need a file or directory; remove the link"
            ) from None


def check_apart(source: Path, destination: Path) -> None:
    """Refuses to write over what is read, whatever links lead to it.

    Raises:
        CheckpointError: the destination is the source or its directory, or a folder of it that means something, or
            either is a link to itself.
    """
    for path in (source, destination):
        check_link(path)
    directory = source if source.is_dir() else source.parent
    inside = os.path.relpath(os.path.realpath(destination), os.path.realpath(directory)).split(os.sep)[0]
    if inside in _FOLDERS:
        raise CheckpointError(
            f"{destination}: is where a model directory keeps its own {inside}, and {directory} is one; give another "
            "output directory"
        )
    for path in {source, directory}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.realpath(path) == os.path.realpath(destination) or path.samefile(destination):
                raise CheckpointError(
                    f"{destination}: is the checkpoint to be converted; give another output directory"
                )


# ---- a directory -----------------------------------------------------------------------------------------------------
def read_shards(directory: Any) -> dict[str, TensorInfo]:
    """The tensors of a Hugging Face directory: sharded with an index, or a single file.

    Raises:
        CheckpointError: a file is missing or damaged, index and shards contradict each other, or a conversion into the
            directory was interrupted.
    """
    if (directory / UNFINISHED).is_file():
        raise CheckpointError(f"{directory}: its conversion did not finish ({UNFINISHED} is still there); {RESUME}")
    index = directory / INDEX_FILE
    check_link(index)
    if index.is_file():
        return _read_indexed(index)
    single = directory / SINGLE_FILE
    check_link(single)
    if not single.is_file():
        found = sorted(path.name for path in directory.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{directory}: got {len(found)} safetensors files and no {INDEX_FILE}, need {SINGLE_FILE} or the "
                "index; give a Hugging Face or v4jax model directory"
            )
        single = directory / found[0]
    return read_header(single)


def _read_indexed(index: Any) -> dict[str, TensorInfo]:
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


def _weight_map(index: Any) -> dict[str, str]:
    weight_map = _read_index(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: need a JSON object with a weight_map of tensor to file; {_FETCH_AGAIN}")
    files = set(weight_map.values())
    for name in [*weight_map, *files]:
        _check_name(index, name)
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r}, need files beside the index; correct the index")
    missing = sorted(file for file in files if not (index.parent / file).is_file())
    for file in missing:
        check_link(index.parent / file)
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(files)} files are missing; fetch them:\n" + summarise(missing)
        )
    return weight_map


def _read_index(index: Any) -> dict[str, Any]:
    try:
        size = index.stat().st_size
        if size > _MAX_HEADER:
            raise CheckpointError(f"{index}: got {size} bytes, need at most {_MAX_HEADER}; {_FETCH_AGAIN}")
        return parse_json(index, index.read_bytes(), "index")
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror or error}; check the path and the permissions") from None


def notes_on_index(directory: Any, tensors: dict[str, TensorInfo]) -> list[str]:
    """What is odd, though not wrong, about a directory's index: another size than stated, files it does not name."""
    index = directory / INDEX_FILE
    if not index.is_file():
        return []
    notes = []
    metadata, size = _read_index(index).get("metadata"), sum(info.nbytes for info in tensors.values())
    stated = metadata.get("total_size", size) if isinstance(metadata, dict) else size
    if stated != size:
        notes.append(f"{INDEX_FILE} states total_size {_short(stated)}, its tensors have {size} bytes")
    read = {info.file.name for info in tensors.values()}
    unread = sorted(file.name for file in directory.glob("*.safetensors") if file.name not in read)
    if unread:
        notes.append(f"{len(unread)} safetensors files not read, {INDEX_FILE} names no tensors in them: {unread[0]}")
    return notes


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
