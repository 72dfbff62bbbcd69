"""Rows of entries that single copies bring to VMEM: how they lie in HBM, as words, and become keys.

A row in HBM is [H / 128, 128], contiguous. As 32-bit words it has one "plane" of 128 per 256 bf16 channels, and a word
holds two channels 128 apart. Copies put the planes of even rows above those of odd rows, so that two registers of words
make two of ordinary keys with shifts and masks alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels_pallas.tpu import LANES


def word_planes(dim: int, dtype: DTypeLike) -> tuple[int, Any]:
    """Number of planes of a row of `dim` channels, and the type of a word."""
    dtype = jnp.dtype(dtype)
    return (dim // LANES, dtype) if dtype.itemsize == 4 else (dim // (2 * LANES), jnp.dtype(jnp.uint32))


def place_of_row(row: Any, rows: int, dtype: DTypeLike) -> Any:
    """Where a copy puts a row of a buffer of `rows`, an even number."""
    return row if jnp.dtype(dtype).itemsize == 4 else row // 2 + rows // 2 * (row % 2)


def unpack(raw: Any, dtype: DTypeLike, keep: jax.Array | None = None) -> Float[Array, "R H"]:
    """[planes, R, 128] words of a buffer → keys; zeros where `keep`, a scalar, is false."""
    dtype = jnp.dtype(dtype)

    def kept(words: Any) -> Any:
        return words if keep is None else jnp.where(keep, words, 0)

    if dtype.itemsize == 4:
        return jnp.concatenate([kept(raw[p]) for p in range(raw.shape[0])], axis=1)
    low, high = kept(jnp.uint32(0xFFFF)), kept(jnp.uint32(0xFFFF0000))
    columns, half = [], raw.shape[1] // 2
    for p in range(raw.shape[0]):
        even, odd = raw[p, :half], raw[p, half:]
        columns += [(even & low) | ((odd & low) << 16), ((even & high) >> 16) | (odd & high)]
    return jnp.concatenate([pltpu.bitcast(words, dtype) for words in columns], axis=1)


def pack(rows: Float[Array, "R L 128"]) -> jax.Array:
    """bf16 rows → the 32-bit words [R, H / 256, 128] that lie in a TPU's memory."""
    pairs = rows.reshape(rows.shape[0], -1, 2, LANES)
    return jax.lax.bitcast_convert_type(jnp.moveaxis(pairs, 2, -1), jnp.uint32)
