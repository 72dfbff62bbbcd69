"""What is chosen of score rows in VMEM, given each row's k-th largest (`kernel_threshold`), as flags or bits.

Ties at the threshold go to the lowest index: a product of the tie flags with a triangular matrix numbers them, for the
matrix unit is idle here. The chosen flags become bits by a product with powers of two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.index_topk.kernel_scores import TILE, Rows, load
from kernels_pallas.tpu import LANES, cdiv, round_up

WORD = 32


def mask_words(width: int) -> int:
    """Words that the kernel writes per query: whole lanes."""
    return round_up(cdiv(width, WORD), LANES)


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """int32 [rows, columns], each its own place along the axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _flags(condition: jax.Array) -> jax.Array:
    return jnp.where(condition, 1.0, 0.0).astype(jnp.bfloat16)


def prefix_matrix() -> Float[Array, "256 256"]:
    """Inclusive prefix sums of 256 flags."""
    return _flags(iota((TILE, TILE), 0) <= iota((TILE, TILE), 1))


def bits_matrix() -> Float[Array, "256 256"]:
    """Column c: the low (c < 128) or high half of word c mod 8 of 256 flags; every word 16 times over."""
    shape = (TILE, TILE)
    key, column = iota(shape, 0), iota(shape, 1)
    half = (key & (WORD - 1)) - 16 * (column >= LANES).astype(jnp.int32)
    mine = (key >> 5) == (column & 7)
    # 2^half by its exponent field.
    power = jax.lax.bitcast_convert_type((127 + jnp.clip(half, 0, 15)) << 23, jnp.float32)
    return jnp.where(mine & (half >= 0) & (half < 16), power, 0.0).astype(jnp.bfloat16)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of bfloat16 matrices in float32."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def choose(x: jax.Array, threshold: jax.Array, room: jax.Array, prefix: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Flags of the chosen scores of one group, tile by tile, and the room left for ties.

    Args:
      x: scores [R, group]. threshold, room: [R, 128], as `find_threshold` leaves them (room less what was chosen).
    """
    tiles = x.shape[1] // TILE
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)
    level = jnp.concatenate([threshold, threshold], axis=1)
    parts = [x[:, t * TILE : (t + 1) * TILE] for t in range(tiles)]
    ties = [part == level for part in parts]
    ranks = dot(jnp.concatenate([jnp.where(tie, one, zero).astype(jnp.bfloat16) for tie in ties], axis=0), prefix)
    chosen = []
    for part, tie, rank in zip(parts, ties, jnp.split(ranks, tiles), strict=True):
        fits = rank <= jnp.concatenate([room, room], axis=1)
        if x.dtype == jnp.float32:
            flags = jnp.where((part > level) | (tie & fits), one, zero)
        else:  # masks of two widths do not meet: numbers do
            flags = jnp.where(part > level, one, zero) + jnp.where(tie, one, zero) * jnp.where(fits, 1.0, 0.0).astype(
                x.dtype
            )
        chosen.append(flags.astype(jnp.bfloat16))
        room = room - jnp.broadcast_to(rank[:, TILE - 1 :], room.shape)
    return chosen, room


def pack_bits(chosen: list[jax.Array], bits: jax.Array) -> Int[Array, "R 128"]:
    """Words of one group: bit j of word w is key 32 w + j."""
    rows = chosen[0].shape[0]
    halves = dot(jnp.concatenate(chosen, axis=0), bits)
    lane = iota((rows, LANES), 1)
    low = high = jnp.zeros((rows, LANES), jnp.float32)
    for t in range(len(chosen)):
        half = halves[t * rows : (t + 1) * rows]
        mine = (lane >> 3) == t
        low, high = jnp.where(mine, half[:, :LANES], low), jnp.where(mine, half[:, LANES:], high)
    return low.astype(jnp.int32) | (high.astype(jnp.int32) << 16)


def write_mask(scores: Any, threshold: Any, room: Any, mask: Any, spec: Rows, first: Any, end: Any) -> None:
    """Writes the bit mask of the chosen keys, zero outside of the groups first ≤ g < end.

    Args:
      mask: int32 reference [rows, words].
    """
    prefix, bits = prefix_matrix(), bits_matrix()
    mask[...] = jnp.zeros(mask.shape, mask.dtype)

    def one_block(block: Any, _: None) -> None:
        row = pl.multiple_of(block * spec.block, spec.block)
        level = threshold[pl.ds(row, spec.block), :]

        def step(group: Any, left: jax.Array) -> jax.Array:
            x = load(scores, spec, row, spec.block, group * spec.group, spec.group)
            chosen, left = choose(x, level, left, prefix)
            place = pl.multiple_of(group * LANES, LANES)
            mask[pl.ds(row, spec.block), pl.ds(place, LANES)] = pack_bits(chosen, bits)
            return left

        jax.lax.fori_loop(first, end, step, room[pl.ds(row, spec.block), :])

    jax.lax.fori_loop(0, spec.rows // spec.block, one_block, None)
