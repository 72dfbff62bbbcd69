"""Compares a converted checkpoint with its source, tensor by tensor, a few rows of a few matrices at a time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from kernels_pallas.formats import decode_fp4, decode_fp8, encode_fp4, encode_fp8
from v4jax.checkpoint.content import DEFAULT_RANGE_BYTES, Stored, Values, ranges
from v4jax.checkpoint.location import Location, RangeReader
from v4jax.checkpoint.matrix import Matrix, find_matrix
from v4jax.checkpoint.names import section_parameters, section_prefix, sections, stored_tensors
from v4jax.checkpoint.reader import MANIFEST, Checkpoint, read_manifest
from v4jax.checkpoint.tensor_file import DTYPES, CheckpointError
from v4jax.checkpoint.transfer import checksum

_THREADS = 4


class _Pair(NamedTuple):
    source: Matrix
    output: Matrix


def harmed_files(path: Location) -> list[str]:
    """The files of a v4jax directory that are not as they were written, by their checksums; [] for others."""
    if not (path / MANIFEST).is_file():
        return []
    files = read_manifest(path)["files"]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(files, pool.map(lambda name: checksum(path / name), files), strict=True))
    return [
        name for name, record in files.items() if found[name] != {key: record.get(key) for key in ("bytes", "sha256")}
    ]


def differing_tensors(output: Checkpoint, source: Checkpoint) -> tuple[int, list[str]]:
    """Compares every tensor with its source: stored bytes where formats agree, else dequantised values, bit for bit.

    A tensor that had to be rounded must have the values that rounding its source gives, or its source's own.

    Returns:
        How many tensors were compared, and a line for each that differs.

    Raises:
        CheckpointError: one has layers or parameters that the other has not.
    """
    _check_same_model(output, source)
    with RangeReader() as reader, ThreadPoolExecutor(_THREADS) as pool:
        pairs = list(_pairs(output, source, reader))
        carried = [name for name in source.ignored if name in output.inventory]
        lines = [line for line in pool.map(_differences, pairs) if line]
        lines += [line for name in carried if (line := _raw_difference(output, source, name, reader))]
        lines += [f"{name}: is not in the output" for name in source.ignored if name not in output.inventory]
    return len(pairs) + len(carried), lines


def _check_same_model(output: Checkpoint, source: Checkpoint) -> None:
    mine, theirs = (
        {
            (section_prefix(section) + parameter.key, parameter.shape)
            for section in sections(one.config)
            for parameter in section_parameters(one.config, section)
        }
        for one in (output, source)
    )
    if mine != theirs:
        name, shape = min(mine ^ theirs)
        raise CheckpointError(
            f"{output.path}: is another model than {source.path}, only one of them has {name} {list(shape)}; "
            "give the checkpoint that it was converted from"
        )


def _pairs(output: Checkpoint, source: Checkpoint, reader: RangeReader) -> Iterator[_Pair]:
    for section in sections(source.config):
        for parameter in section_parameters(source.config, section):
            for one, other in zip(
                stored_tensors(section, parameter, source.spelling),
                stored_tensors(section, parameter, output.spelling),
                strict=True,
            ):
                yield _Pair(find_matrix(source, one, reader), find_matrix(output, other, reader))


def _differences(pair: _Pair) -> str | None:
    source, output = pair
    try:
        for start, stop in ranges(_Widest(source, output), DEFAULT_RANGE_BYTES):
            wrong = _wrong(source, output, start, stop)
            if wrong.any():
                row, column = (int(index[0]) for index in np.nonzero(wrong))
                return (
                    f"{output.name}{_place(output)}: differs from {source.name} of the source in {int(wrong.sum())} "
                    f"values, the first in row {start + row}, column {column}"
                )
    except CheckpointError as error:
        return str(error)
    return None


def _place(matrix: Matrix) -> str:
    rows = matrix.weight.shape[-2] if len(matrix.weight.shape) == 3 else 0
    return f"[{matrix.first_row // rows}]" if rows else ""


class _Widest(Values):
    def __init__(self, source: Matrix, output: Matrix) -> None:
        super().__init__(source, "F32")
        tiles = [matrix.tile[0] for matrix in (source, output) if matrix.scale]
        self.granularity = int(np.lcm.reduce(tiles)) if tiles else 1
        self.row_memory = 64 * source.columns


def _wrong(source: Matrix, output: Matrix, start: int, stop: int) -> np.ndarray:
    """bool, one per value: where the output is not what it should be."""
    is_same_format = (source.dtype, source.scale_dtype, source.tile) == (output.dtype, output.scale_dtype, output.tile)
    if is_same_format and not source.skipped_rows and not output.skipped_rows:
        wrong = _bits(source.codes(start, stop)) != _bits(output.codes(start, stop))
        if source.scale is not None:
            mine, theirs = (Stored(matrix).scale(start, stop) for matrix in (source, output))
            differs = (_bits(mine) != _bits(theirs)).any(axis=-1).repeat(source.tile[0])[: stop - start]
            wrong = wrong | differs[:, None]
        return wrong
    if output.scale is None and source.scale is None and output.dtype not in ("F32", "BF16", "F16"):
        return source.values(start, stop, np.int64) != output.values(start, stop, np.int64)
    dtype: Any = DTYPES[output.dtype] if output.scale is None else np.float32
    got, want = output.values(start, stop, dtype), source.values(start, stop, dtype)
    wrong = _bits(got) != _bits(want)
    if output.scale is not None and source.scale is None and wrong.any():
        wrong &= got.astype(np.float32) != _rounded(want, output)
    return wrong


def _bits(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values)
    return values.view(f"u{values.dtype.itemsize}")


def _rounded(values: np.ndarray, like: Matrix) -> np.ndarray:
    if like.dtype == "I8":
        return decode_fp4(*encode_fp4(values))
    return decode_fp8(*encode_fp8(values, like.tile), like.tile)


def _raw_difference(output: Checkpoint, source: Checkpoint, name: str, reader: RangeReader) -> str | None:
    mine, theirs = output.inventory[name], source.inventory[name]
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return f"{name}: {mine.dtype} {list(mine.shape)}, in the source {theirs.dtype} {list(theirs.shape)}"
    for start in range(0, mine.nbytes, DEFAULT_RANGE_BYTES):
        count = min(DEFAULT_RANGE_BYTES, mine.nbytes - start)
        one, other = (reader.read(info.file, info.offset + start, count) for info in (mine, theirs))
        if not np.array_equal(one, other):
            return f"{name}: differs from the source"
    return None
