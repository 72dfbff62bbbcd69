"""What a converted matrix consists of: stored bytes, dequantised values, or codes made anew, by row ranges.

Each class turns ranges of a matrix' rows into rows of the output's weight and scale. Ranges may be asked for in any
order and from several threads.
"""

import abc
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from kernels_pallas.formats import FP4_BLOCK, FP8_TILE, encode_fp4, encode_fp8, fp4_to_fp8, fp8_to_fp4
from v4jax.checkpoint.matrix import Matrix
from v4jax.checkpoint.tensor_file import DTYPES, CheckpointError

DEFAULT_RANGE_BYTES = 8 << 20


class Format(NamedTuple):
    """How a matrix is stored: safetensors names of the weight's dtype (I8 means FP4) and of the scale's."""

    weight: str
    scale: str | None = None

    def __str__(self) -> str:
        return {"I8": "FP4", "F8_E4M3": "FP8"}.get(self.weight, self.weight)


class Content(abc.ABC):
    """Rows of one output matrix."""

    rows: int
    granularity: int
    """Ranges begin at multiples of it."""
    row_memory: int
    """Bytes of memory that one row costs, intermediates included."""

    @abc.abstractmethod
    def weight(self, start: int, stop: int) -> np.ndarray:
        """Rows of the weight."""

    def scale(self, start: int, stop: int) -> np.ndarray:
        """The scales of these rows of the weight."""
        raise TypeError(f"{type(self).__name__} has no scale")


def ranges(content: Content, memory: int) -> Iterator[tuple[int, int]]:
    """Row ranges that each need about `memory` bytes at most."""
    unit = content.granularity
    step = max(unit, memory // max(1, content.row_memory) // unit * unit)
    for start in range(0, content.rows, step):
        yield start, min(content.rows, start + step)


class Stored(Content):
    """The stored bytes, weight and scale."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.rows, self.granularity = matrix, matrix.rows, matrix.tile[0] if matrix.scale else 1
        self.row_memory = 2 * matrix.row_bytes

    def weight(self, start: int, stop: int) -> np.ndarray:
        """See `Content.weight`."""
        return self.matrix.codes(start, stop)

    def scale(self, start: int, stop: int) -> np.ndarray:
        """See `Content.scale`."""
        tile = self.matrix.tile[0]
        return self.matrix.scales(start // tile, -(-stop // tile))


class Values(Content):
    """The dequantised values in a float dtype, or integers."""

    def __init__(self, matrix: Matrix, dtype: str) -> None:
        self.matrix, self.rows, self.granularity, self._dtype = matrix, matrix.rows, 1, DTYPES[dtype]
        self.row_memory = 16 * matrix.columns

    def weight(self, start: int, stop: int) -> np.ndarray:
        """See `Content.weight`."""
        return self.matrix.values(start, stop, self._dtype)


class _Coded(Content):
    """New codes; the scales made with them wait until they are asked for."""

    def __init__(self, matrix: Matrix, target: Format) -> None:
        self.matrix, self.rows, self.target = matrix, matrix.rows, target
        self.granularity = FP8_TILE[0] if "F8_E4M3" in (target.weight, matrix.dtype) else 1
        self._scales: dict[tuple[int, int], np.ndarray] = {}

    def _make(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of these rows."""
        raise NotImplementedError

    def weight(self, start: int, stop: int) -> np.ndarray:
        """See `Content.weight`."""
        codes, scales = self._make(start, stop)
        self._scales[start, stop] = scales
        return codes

    def scale(self, start: int, stop: int) -> np.ndarray:
        """See `Content.scale`."""
        scales = self._scales.pop((start, stop), None)
        if scales is None:
            scales = self._make(start, stop)[1]
        return scales.view(np.uint8) if self.target.scale == "U8" else scales.astype(DTYPES[self.target.scale or ""])


class Recoded(_Coded):
    """FP4 as FP8 or back, value for value.

    Making rows raises CheckpointError, with the tensor named, where that is not exact.
    """

    def __init__(self, matrix: Matrix, target: Format) -> None:
        super().__init__(matrix, target)
        self.granularity = FP8_TILE[0] if target.weight == "F8_E4M3" else matrix.tile[0]
        self.row_memory = 24 * matrix.columns

    def _make(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        matrix, tile = self.matrix, self.matrix.tile[0]
        codes, scales = matrix.codes(start, stop), matrix.scales(start // tile, -(-stop // tile))
        try:
            return fp4_to_fp8(codes, scales) if matrix.dtype == "I8" else fp8_to_fp4(codes, scales, matrix.tile)
        except ValueError as error:
            place = f" (rows from {start})" if start else ""
            raise CheckpointError(f"{matrix.name}{place}: {error}") from None


class Encoded(_Coded):
    """Values rounded to the nearest codes, or the base's own bytes if the whole matrix has the base's values.

    Args:
        matrix: of floats.
        target: the format of the codes; the base's, if there is one.
        base: the matrix that this one was made from.
        tile: rows and columns per scale of FP8 codes.
    """

    def __init__(self, matrix: Matrix, target: Format, base: Matrix | None, tile: tuple[int, int]) -> None:
        super().__init__(matrix, target)
        self._tile, self._base = tile, Stored(base) if base else None
        self.is_same: bool | None = None
        """What `is_unchanged` found, None before it was asked."""
        self._deciding = threading.Lock()
        self.granularity = tile[0] if target.weight == "F8_E4M3" else 1
        self.row_memory = 48 * matrix.columns

    def is_unchanged(self) -> bool:
        """Whether every value is the base's; zeros may differ in sign."""
        if self._base is None:
            return False
        with self._deciding:
            if self.is_same is None:
                self.is_same = all(self._has_base_values(*rows) for rows in ranges(self, DEFAULT_RANGE_BYTES))
            return self.is_same

    def _has_base_values(self, start: int, stop: int) -> bool:
        assert self._base is not None
        dtype = DTYPES[self.matrix.dtype]
        mine, base = self.matrix.codes(start, stop), self._base.matrix.values(start, stop, np.float32)
        if dtype == ml_dtypes.bfloat16:  # a base that bfloat16 cannot hold was rounded when it was converted
            base = base.astype(dtype)
        return bool(np.array_equal(mine.astype(np.float32), base.astype(np.float32)))

    def weight(self, start: int, stop: int) -> np.ndarray:
        """See `Content.weight`."""
        if self._base is not None and self.is_unchanged():
            return self._base.weight(start, stop)
        return super().weight(start, stop)

    def scale(self, start: int, stop: int) -> np.ndarray:
        """See `Content.scale`."""
        if self._base is not None and self.is_unchanged():
            return self._base.scale(start, stop)
        return super().scale(start, stop)

    def _make(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        values: Any = self.matrix.values(start, stop, np.float32)
        if self.target.weight == "I8":
            return encode_fp4(values, FP4_BLOCK)
        return encode_fp8(values, self._tile)
