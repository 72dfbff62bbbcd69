"""The write of the streams on the matrix unit, 16 tokens per product and exact to float32.

X'_k[t] = Σ_s w[s, k, t] · X_s[t], s over the sublayer's output and the C streams. For a tile of tokens that is one
product of a matrix [(k, t), (s, t)], diagonal in the tokens of each (k, s), with the rows [(s, t), D] as they lie in
VMEM. A float32 weight is the sum of three bf16 parts. They share the unit's depth, [(part, s, t)], the same rows three
times, so that the unit adds them up, too: with four streams 240 of the 256 rows of its depth are in use.

Zeros of a row meet the other tokens of its tile, hence a token that is not finite spoils the tile's other 15.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.tpu import LANES, round_up

TILE = 16
"""Tokens of one product: a tile of bf16 rows."""
PARTS = 3
"""bf16 parts of a float32 weight."""


def depth(count: int) -> int:
    """Rows of one product."""
    return PARTS * (count + 1) * TILE


def places(count: int) -> np.ndarray:
    """Which weight stands in which column of a token's row, 0 or 1: [parts · rows of the maps, C · padded depth].

    The rows of the maps are padded to whole sublanes; a weight stands in all columns (part, s, ·) of its tile.
    """
    rows, columns = round_up(count * (2 + count), 8), round_up(depth(count), LANES)
    found = np.zeros((PARTS, rows, count, columns), np.float32)
    for part in range(PARTS):
        for source in range(count + 1):
            start = (part * (count + 1) + source) * TILE
            for k in range(count):
                found[part, count * (1 + source) + k, k, start : start + TILE] = 1
    return found.reshape(PARTS * rows, count * columns)


def fill_matrices(maps_ref: Any, places_ref: Any, matrices_ref: Any) -> None:
    """Writes the matrices of a block: `matrices_ref[k, t]` is the row of token t for the new stream k, bf16.

    Args:
      maps_ref: [rows of the maps, tokens] float32, padded to whole sublanes.
      places_ref: `places` as bf16.
    """
    count, tokens, columns = matrices_ref.shape
    maps = maps_ref[...]
    # The reading rows hold anything; not even times zero may they get in.
    is_written = jax.lax.broadcasted_iota(jnp.int32, maps.shape, 0) >= count
    parts = split_bf16(jnp.where(is_written, maps, 0.0))
    by_token = jnp.transpose(jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=0))
    spread = jax.lax.dot(by_token.astype(jnp.bfloat16), places_ref[...], preferred_element_type=jnp.float32)
    token, column = (jax.lax.broadcasted_iota(jnp.int32, (tokens, columns), axis) for axis in (0, 1))
    is_own = ((token ^ column) & (TILE - 1)) == 0
    for k in range(count):
        own = jnp.where(is_own, spread[:, k * columns : (k + 1) * columns], 0.0)
        matrices_ref[k] = own.astype(jnp.bfloat16)


def split_bf16(x: jax.Array, parts: int = PARTS) -> list[jax.Array]:
    """bf16 arrays that add up to the float32 array: three to its last bit, two to 2^-16 of it."""
    found = [x.astype(jnp.bfloat16)]
    while len(found) < parts:
        x = x - found[-1].astype(jnp.float32)
        found.append(x.astype(jnp.bfloat16))
    return found


def mix_tile(matrices: list[jax.Array], rows: list[jax.Array]) -> jax.Array:
    """The new streams of one tile, float32 [(k, t), columns].

    Args:
      matrices: per new stream, [TILE, padded depth].
      rows: of the sublayer's output and of each stream, bf16 [TILE, columns].
    """
    missing = matrices[0].shape[1] - PARTS * len(rows) * TILE
    padding = [jnp.zeros((missing, rows[0].shape[1]), jnp.bfloat16)] if missing else []
    return jax.lax.dot(
        jnp.concatenate(matrices, axis=0), jnp.concatenate(rows * PARTS + padding, axis=0),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
