"""Stored matrices read and decoded by row ranges, so that memory holds a few rows of one matrix at a time.

A `Matrix` is one parameter in a checkpoint, or one expert of it: a weight in any stored dtype with its scale.
"""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from kernels_pallas.formats import FP4_BLOCK, decode_fp4, decode_fp8
from v4jax.checkpoint.inventory import fp8_tile
from v4jax.checkpoint.location import RangeReader
from v4jax.checkpoint.names import StoredTensor
from v4jax.checkpoint.reader import Checkpoint, check_finite
from v4jax.checkpoint.tensor_file import DTYPES, CheckpointError, TensorInfo

# E8M0 codes up to this cannot carry 448 out of float32's and bfloat16's range.
_LARGEST_SAFE_SCALE = 245


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight of [rows, columns] (vectors: one column) within the files of a checkpoint."""

    name: str
    """Of the tensor that holds it."""
    rows: int
    columns: int
    dtype: str
    """Safetensors' name of the weight's dtype: I8 means FP4 in pairs."""
    scale_dtype: str | None
    tile: tuple[int, int]
    """Rows and columns that share a scale."""
    weight: TensorInfo
    scale: TensorInfo | None
    first_row: int
    """Within the weight's tensor, slabs before it included."""
    first_scale_row: int
    skipped_rows: int
    """Rows of the first scale row's tile that belong to another matrix."""
    reader: RangeReader

    # ---- raw -----------------------------------------------------------------------------------------------------
    @property
    def row_bytes(self) -> int:
        """Of the weight."""
        return self._bytes_of_row(self.weight, self.columns // 2 if self.dtype == "I8" else self.columns)

    @property
    def scale_columns(self) -> int:
        """Scales per scale row."""
        return -(-self.columns // self.tile[1])

    @property
    def scale_row_bytes(self) -> int:
        """Of the scale; 0 without one."""
        return 0 if self.scale is None else self._bytes_of_row(self.scale, self.scale_columns)

    @staticmethod
    def _bytes_of_row(info: TensorInfo, columns: int) -> int:
        return DTYPES[info.dtype].itemsize * columns

    def codes(self, start: int, stop: int) -> np.ndarray:
        """Rows of the weight in its stored dtype; [stop − start, columns, or half of them for FP4].

        Raises:
            CheckpointError: a value is NaN or infinite, or reading fails.
        """
        values = self._read(self.weight, self.first_row + start, stop - start, self.row_bytes)
        check_finite(self.weight.name, values)
        return values

    def scales(self, start: int, stop: int) -> np.ndarray:
        """Rows of the scale, in its stored dtype, U8 read as E8M0.

        Raises:
            CheckpointError: a scale is NaN or infinite, or reading fails.
        """
        assert self.scale is not None
        values = self._read(self.scale, self.first_scale_row + start, stop - start, self.scale_row_bytes)
        values = values.view(ml_dtypes.float8_e8m0fnu) if values.dtype == np.uint8 else values
        check_finite(self.scale.name, values)
        return values

    def _read(self, info: TensorInfo, row: int, count: int, row_bytes: int) -> np.ndarray:
        content = self.reader.read(info.file, info.offset + row * row_bytes, count * row_bytes)
        return content.view(DTYPES[info.dtype]).reshape(count, -1)

    # ---- decoded -------------------------------------------------------------------------------------------------
    def values(self, start: int, stop: int, dtype: Any) -> np.ndarray:
        """Dequantised rows in float32, bfloat16 or (for integers) int64; [stop − start, columns].

        Raises:
            CheckpointError: a value is NaN or infinite, or reading fails.
        """
        codes = self.codes(start, stop)
        if self.scale is None:
            values = codes.astype(dtype, copy=False)
            if values.dtype.itemsize < codes.dtype.itemsize:  # what float32 holds, a narrower dtype may not
                check_finite(self.weight.name, values)
            return values
        scales, skipped = self._scales_of(start, stop)
        if self.dtype == "I8":
            values = decode_fp4(codes, scales, self.tile[1], dtype)
        elif skipped:
            padded = np.pad(codes.view(np.uint8), ((skipped, 0), (0, 0))).view(codes.dtype)
            values = decode_fp8(padded, scales, self.tile, dtype)[skipped:]
        else:
            values = decode_fp8(codes, scales, self.tile, dtype)
        self.reader.reuse(codes)
        is_safe = scales.dtype == ml_dtypes.float8_e8m0fnu and int(scales.view(np.uint8).max()) <= _LARGEST_SAFE_SCALE
        if not is_safe:
            check_finite(f"{self.weight.name} with {self.scale.name}", values)
        return values

    def _scales_of(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        """The scale rows that a range of rows touches, and how many rows of the first one's tile come before it."""
        tile = self.tile[0]
        first, last = self.skipped_rows + start, self.skipped_rows + stop
        return self.scales(first // tile, -(-last // tile)), first % tile


def find_matrix(checkpoint: Checkpoint, stored: StoredTensor, reader: RangeReader) -> Matrix:
    """The matrix that `stored` means, from an opened checkpoint."""
    info = checkpoint.inventory[stored.name]
    scale = next((checkpoint.inventory[name] for name in stored.scale_names if name in checkpoint.inventory), None)
    shape = stored.shape if stored.slab is None else stored.shape[1:]
    whole_rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    tile = (1, FP4_BLOCK) if info.dtype == "I8" else fp8_tile(checkpoint.config)
    part = stored.rows or slice(0, whole_rows)
    slab = stored.slab or 0
    return Matrix(
        name=stored.name,
        rows=part.stop - part.start,
        columns=columns,
        dtype=info.dtype,
        scale_dtype=scale.dtype if scale else None,
        tile=tile,
        weight=info,
        scale=scale,
        first_row=slab * whole_rows + part.start,
        first_scale_row=slab * -(-whole_rows // tile[0]) + part.start // tile[0],
        skipped_rows=part.start % tile[0] if scale else 0,
        reader=reader,
    )


def check_tile_boundary(matrix: Matrix) -> None:
    """That the matrix' scales are its own, so that stored bytes can be cut out where it begins and ends.

    Raises:
        CheckpointError: a scale spans this matrix and its neighbour.
    """
    tile = matrix.tile[0]
    if matrix.scale is None or matrix.dtype == "I8":
        return
    is_whole = matrix.rows == matrix.weight.shape[-2]
    if matrix.skipped_rows or (matrix.rows % tile and not is_whole):
        raise CheckpointError(
            f"{matrix.name}: one FP8 scale spans the {tile} rows where w1 meets w3, so the stored bytes cannot be "
            "split there; convert to bf16 or fp32"
        )
