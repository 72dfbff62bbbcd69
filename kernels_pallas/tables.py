"""Decoding 8- and 4-bit codes by table in NumPy: one gather per byte, whatever its scale (architecture.md §12).

A table has a row per scale and a column per code, so that a gather scales as well; 65,536 entries stay in a
processor's cache. Indices are made in pieces, so that they do too.
"""

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped, UInt8

_PIECE = 1 << 16
_BYTES = np.arange(256, dtype=np.uint8)
_E8M0_VALUES = _BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)

E4M3_VALUES = _BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_E2M1_PAIRS = np.stack([_E2M1_VALUES[_BYTES & 15], _E2M1_VALUES[_BYTES >> 4]], axis=-1)

E4M3_NAN = 0x7F
NOT_FP4 = 16
LEVELS = 19
"""Rows of the tables between FP4 and FP8: powers of two by which a block's scale may differ from its tile's."""
HIGHEST, LOWEST = 6, -11
"""Exponents of the largest and the smallest FP4 scale that matter beside an FP8 tile's: 6·2^6 is below 448, and 4·2^-11
is FP8's smallest value."""


@functools.cache
def e4m3_table(dtype: Any) -> Shaped[np.ndarray, "256 256 1"]:
    """[E8M0 byte, FP8 code] → value."""
    return _scaled(E4M3_VALUES[:, None], dtype)


@functools.cache
def e2m1_table(dtype: Any) -> Shaped[np.ndarray, "256 256 2"]:
    """[E8M0 byte, packed FP4] → its two values."""
    return _scaled(_E2M1_PAIRS, dtype)


def _scaled(values: Float32[np.ndarray, "256 k"], dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # to infinity, which readers refuse
        return (_E8M0_VALUES[:, None, None] * values).astype(dtype)


@functools.cache
def e2m1_to_e4m3() -> UInt8[np.ndarray, "19 256 2"]:
    """[n, packed FP4] → FP8 codes of its values times 2^(6 - n), NaN where FP8 has no such value.

    In the last row FP8 has zeros alone.
    """
    values = _E2M1_PAIRS * np.exp2(HIGHEST - np.arange(LEVELS, dtype=np.float32))[:, None, None]
    codes = values.astype(ml_dtypes.float8_e4m3fn)
    return np.where(codes.astype(np.float32) == values, codes.view(np.uint8), E4M3_NAN).astype(np.uint8)


@functools.cache
def e4m3_to_e2m1() -> UInt8[np.ndarray, "19 256 1"]:
    """[n, FP8 code] → FP4 code of its value divided by 2^(n - 11), 16 where FP4 has no such value."""
    values = E4M3_VALUES / np.exp2(LOWEST + np.arange(LEVELS, dtype=np.float32))[:, None]
    # The cast saturates and has no NaN: both then differ from the value.
    with np.errstate(invalid="ignore"):
        codes = values.astype(ml_dtypes.float4_e2m1fn)
    is_exact = codes.astype(np.float32) == values
    return np.where(is_exact, codes.view(np.uint8) & 15, NOT_FP4).astype(np.uint8)[..., None]


def gather(
    table: Shaped[np.ndarray, "rows 256 k"],
    rows: UInt8[np.ndarray, "*batch groups"],
    codes: UInt8[np.ndarray, "*batch n"],
    group: int,
) -> Shaped[np.ndarray, "*batch n_times_k"]:
    """table[row, code] of each code, side by side.

    Args:
        table: of any dtype.
        rows: one for each `group` consecutive codes, the last group may be short.
        codes: column of the table.
        group: codes per row.
    """
    *batch, width = codes.shape
    count, values = math.prod(batch), table.shape[-1]
    # One word per code, so that a single gather fetches all its values.
    words = table.reshape(-1).view(f"u{values * table.itemsize}")
    rows, codes = rows.reshape(count, rows.shape[-1]), codes.reshape(count, width)
    out = np.empty((count, width), words.dtype)
    step = max(1, _PIECE // max(1, width))
    for start in range(0, count, step):
        index = np.repeat(rows[start : start + step].astype(np.uint16) << 8, group, axis=-1)[:, :width]
        index = (index | codes[start : start + step]).astype(np.intp)
        words.take(index, out=out[start : start + step], mode="clip")  # in range; "raise" would buffer the output
    return out.view(table.dtype).reshape(*batch, width * values)
