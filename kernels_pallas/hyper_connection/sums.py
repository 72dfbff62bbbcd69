"""Products, sums, packed rows and cleared rows of blocks in a kernel."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.tpu import LANES, SUBLANES, sublanes

ROWS = (((1,), (1,)), ((), ()))
"""Contracts the last dimensions: rows × rows."""
PLAIN = (((1,), (0,)), ((), ()))


def dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    """A product in float32, exact to it for float32 operands."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def sum_of(terms: Iterable[jax.Array]) -> jax.Array:
    """In their order, without the 0 that `sum` starts from."""
    return functools.reduce(jnp.add, terms)


def lane_sums(values: list[jax.Array]) -> jax.Array:
    """The sum over lanes of values[i] ([rows, 128]) in lane i."""
    lane = jax.lax.broadcasted_iota(jnp.int32, values[0].shape, 1)
    return sum_of(jnp.where(lane == i, jnp.sum(v, axis=1, keepdims=True), 0.0) for i, v in enumerate(values))


def pack(row: jax.Array) -> jax.Array:
    """[1, tokens] → [tokens / 128, 128]: one register instead of several of one row each."""
    size = row.shape[1]
    if size % LANES or size == LANES:
        return row
    return jnp.concatenate([row[:, i : i + LANES] for i in range(0, size, LANES)], axis=0)


def unpack(rows: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    return jnp.concatenate([rows[i : i + 1] for i in range(rows.shape[0])], axis=1)


def clear_rows(ref: Any, first: int) -> None:
    """Zeros from a row on; the tile that it lies in is rewritten whole."""
    step = sublanes(ref.dtype)
    tile = first // step * step
    if first > tile:
        row = jax.lax.broadcasted_iota(jnp.int32, (step, ref.shape[1]), 0)
        kept = ref[tile : tile + step].astype(jnp.float32)
        ref[tile : tile + step] = jnp.where(row < first - tile, kept, 0.0).astype(ref.dtype)
        tile += step
    if tile < ref.shape[0]:
        ref[tile:] = jnp.zeros((ref.shape[0] - tile, ref.shape[1]), ref.dtype)


def fold_rows(x: jax.Array) -> jax.Array:
    """Sums registers: [rows, 128] → [8, 128]."""
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)
