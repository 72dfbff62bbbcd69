"""Compares a converted checkpoint with its source, tensor by tensor, a few rows of a few matrices at a time."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kernels_pallas.formats import decode_fp4, decode_fp8, encode_fp4, encode_fp8
from v4jax.checkpoint.content import DEFAULT_RANGE_BYTES, Stored, Values, ranges
from v4jax.checkpoint.location import Location, RangeReader
from v4jax.checkpoint.matrix import Matrix, find_matrix
from v4jax.checkpoint.names import section_parameters, section_prefix, sections, stored_tensors
from v4jax.checkpoint.reader import MANIFEST, Checkpoint, read_manifest
from v4jax.checkpoint.tensor_file import DTYPES, CheckpointError
from v4jax.checkpoint.transfer import checksum
from v4jax.config import ModelConfig

_THREADS = 4
_FLOATS = ("F32", "BF16", "F16")


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


class Comparison(NamedTuple):
    """What comparing two checkpoints found."""

    tensors: int
    """Tensors compared."""
    lines: list[str]
    """One for each tensor that differs."""
    is_rounded: bool
    """Whether the output's values are those of the source only up to the rounding to their format."""


class _Finding(NamedTuple):
    lines: list[str]
    is_rounded: bool


def compare_tensors(output: Checkpoint, source: Checkpoint) -> Comparison:
    """Compares every tensor with its source: stored bytes where formats agree, else dequantised values, bit for bit.

    A tensor that had to be rounded must have the values that rounding its source gives, or values that its source was
    rounded from.

    Raises:
        CheckpointError: one has layers or parameters that the other has not.
    """
    _check_same_model(output, source)
    with RangeReader() as reader, ThreadPoolExecutor(_THREADS) as pool:
        pairs = list(_pairs(output, source, reader))
        findings = list(pool.map(_compare, pairs))
        lines = [line for finding in findings for line in finding.lines]
        carried = [name for name in source.ignored if name in output.inventory]
        lines += [line for name in carried if (line := _raw_difference(output, source, name, reader))]
        lines += [f"{name}: is not in the output" for name in source.ignored if name not in output.inventory]
    return Comparison(len(pairs) + len(carried), lines, any(finding.is_rounded for finding in findings))


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


def differing_settings(output: ModelConfig, source: ModelConfig) -> list[str]:
    """What two configs say differently about the model, a line each; how weights are stored may differ."""
    free = {"expert_dtype", "extra"}
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in free]
    lines = [
        f"{name}: got {getattr(output, name)!r}, the source has {getattr(source, name)!r}"
        for name in names
        if getattr(output, name) != getattr(source, name)
    ]
    mine, theirs = output.extra_fields, source.extra_fields
    heads = sorted(key for key in mine.keys() | theirs.keys() if key.startswith("dspark"))
    return lines + [
        f"{key}: got {mine.get(key)!r}, the source has {theirs.get(key)!r}"
        for key in heads
        if mine.get(key) != theirs.get(key)
    ]


def _pairs(output: Checkpoint, source: Checkpoint, reader: RangeReader) -> Iterator[_Pair]:
    for section in sections(source.config):
        for parameter in section_parameters(source.config, section):
            for one, other in zip(
                stored_tensors(section, parameter, source.spelling),
                stored_tensors(section, parameter, output.spelling),
                strict=True,
            ):
                yield _Pair(find_matrix(source, one, reader), find_matrix(output, other, reader))


def _compare(pair: _Pair) -> _Finding:
    source, output = pair
    is_rounded = False
    try:
        for start, stop in ranges(_Widest(source, output), DEFAULT_RANGE_BYTES):
            if _is_same_format(source, output):
                lines = _stored_differences(source, output, start, stop)
            else:
                wrong, rounded = _wrong_values(source, output, start, stop)
                is_rounded |= rounded
                lines = _line(_called(output), _called(source), wrong, start)
            if lines:
                return _Finding(lines, is_rounded)
    except CheckpointError as error:
        return _Finding([str(error)], is_rounded)
    return _Finding([], is_rounded)


def _line(output: str, source: str, wrong: np.ndarray, first_row: int) -> list[str]:
    if not wrong.any():
        return []
    row, column = (int(index[0]) for index in np.nonzero(wrong))
    return [
        f"{output}: differs from {source} of the source in {int(wrong.sum())} values, the first in row "
        f"{first_row + row}, column {column}"
    ]


def _called(matrix: Matrix) -> str:
    scale = f" with {matrix.scale.name}" if matrix.scale else ""
    return f"{matrix.name}{_place(matrix)}{scale}"


def _place(matrix: Matrix) -> str:
    rows = matrix.weight.shape[-2] if len(matrix.weight.shape) == 3 else 0
    return f"[{matrix.first_row // rows}]" if rows else ""


class _Widest(Values):
    def __init__(self, source: Matrix, output: Matrix) -> None:
        super().__init__(source, "F32")
        tiles = [matrix.tile[0] for matrix in (source, output) if matrix.scale]
        self.granularity = int(np.lcm.reduce(tiles)) if tiles else 1
        self.row_memory = 64 * source.columns


def _is_same_format(source: Matrix, output: Matrix) -> bool:
    mine, theirs = ((matrix.dtype, matrix.scale_dtype, matrix.tile) for matrix in (source, output))
    return mine == theirs and not source.skipped_rows and not output.skipped_rows


def _stored_differences(source: Matrix, output: Matrix, start: int, stop: int) -> list[str]:
    lines = _line(
        output.name + _place(output), source.name + _place(source),
        _bits(source.codes(start, stop)) != _bits(output.codes(start, stop)), start,
    )  # fmt: skip
    if source.scale is not None and output.scale is not None:
        mine, theirs = (Stored(matrix).scale(start, stop) for matrix in (source, output))
        lines += _line(
            output.scale.name + _place(output), source.scale.name + _place(source),
            _bits(mine) != _bits(theirs), start // source.tile[0],
        )  # fmt: skip
    return lines


def _wrong_values(source: Matrix, output: Matrix, start: int, stop: int) -> tuple[np.ndarray, bool]:
    """Where the output is not what it should be, one bool per value, and whether it had to be rounded."""
    if output.scale is None and source.scale is None and output.dtype not in _FLOATS:
        return source.values(start, stop, np.int64) != output.values(start, stop, np.int64), False
    got, want = (matrix.values(start, stop, np.float32) for matrix in (output, source))
    wrong = _bits(got) != _bits(want)
    if not wrong.any():
        return wrong, False
    if output.scale is None:
        return wrong & (_bits(got) != _bits(want.astype(DTYPES[output.dtype]).astype(np.float32))), True
    if source.scale is None:
        wrong &= got != _rounded(want, output)
        # The source may itself have been rounded from what the output holds.
        with np.errstate(over="ignore"):  # infinity differs
            wrong &= got.astype(DTYPES[source.dtype]).astype(np.float32) != want
        return wrong, True
    return wrong, False


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
