"""The form of stacks that hold many layers: one loop over tiles of a few rows, each with its one expert's matrices.

The compiler reads an expert's bytes straight out of the stack of all layers into the product: nothing is copied, and an
expert that no token chose is never touched. FP4 matrices are multiplied as two halves, even and odd inputs, because
putting nibbles side by side costs more than the product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_experts.reference import dot, swiglu
from kernels_pallas.grouped_experts.stacks import ExpertStack
from kernels_pallas.loops import data_loop
from kernels_pallas.ordering import gather_sum

MIN_ROWS, MAX_ROWS = 8, 128
"""Rows of a tile: the sublanes of a float32 register, and what makes a product large enough."""


def rows_of_tile(picks: float, experts: int) -> int:
    """The largest power of two up to the mean load: more tiles read the matrices more often, larger ones are padded."""
    mean = max(int(picks) // experts, 1)
    return min(max(1 << (mean.bit_length() - 1), MIN_ROWS), MAX_ROWS)


class Tiles(NamedTuple):
    """Picks, (token, expert) pairs, in the order of their experts, and the rows of them that each tile takes."""

    owner: jax.Array
    """[N]: expert of each tile."""
    begin: jax.Array
    """[N]: first pick of each tile."""
    end: jax.Array
    """[E]: the pick after each expert's last."""
    active: jax.Array
    """Tiles with work, which come first."""
    token: jax.Array
    """[P + rows]: token of each pick in order, and padding."""
    share: jax.Array
    """[P + rows]: its routing weight."""
    order: jax.Array
    """[P]: the pick at each place."""


def group(experts: jax.Array, weights: jax.Array, count: int, rows: int) -> Tiles:
    """Tiles of `rows` picks of one expert each, out of `count` experts; picks of none come last, in no tile."""
    flat, picks = experts.reshape(-1), experts.size
    order = jnp.argsort(flat, stable=True)
    load = jnp.bincount(flat, length=count)
    used = (load + rows - 1) // rows
    last, end = jnp.cumsum(used), jnp.cumsum(load)
    tile = jnp.arange(picks // rows + min(count, picks))  # enough for every distribution of the load
    owner = jnp.minimum(jnp.searchsorted(last, tile, side="right"), count - 1)
    begin = (end - load)[owner] + (tile - (last - used)[owner]) * rows
    token, share = (jnp.pad(a[order], (0, rows)) for a in (jnp.arange(picks) // experts.shape[1], weights.reshape(-1)))
    return Tiles(owner, begin, end, last[-1], token, share, order)


def forward(
    x: jax.Array,
    matrices: tuple[ExpertStack, ExpertStack, ExpertStack],
    experts: jax.Array,
    weights: jax.Array,
    rows: int,
    limit: float,
    expected: float,
) -> jax.Array:
    """The combined output [T, D] float32.

    Args:
      x: [T, D].
      matrices: w1, w3, w2.
      experts: [T, K], the number of experts for none; weights: [T, K].
      rows: of a tile.
      limit: of gate and up.
      expected: tiles with work under an even load.
    """
    gate, up, down = matrices
    count, picks = gate.shape[0], experts.size
    tiles = group(experts, weights, count, rows)

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        expert, start = tiles.owner[i], tiles.begin[i]
        own = x[jax.lax.dynamic_slice_in_dim(tiles.token, start, rows)]
        z = swiglu(_product(own, gate, expert), _product(own, up, expert), limit)
        own_share = jax.lax.dynamic_slice_in_dim(tiles.share, start, rows)
        own_share = jnp.where(start + jnp.arange(rows) < tiles.end[expert], own_share, 0.0)
        z = (z * own_share[:, None]).astype(x.dtype)
        # Rows of the next expert, zero here, are written again by the next tile.
        return jax.lax.dynamic_update_slice_in_dim(out, _product(z, down, expert), start, 0)

    out = jnp.zeros((picks + rows, x.shape[1]), jnp.float32)
    out = data_loop(0, tiles.active, one_tile, out, expected=expected)
    # The last row is never filled: picks of no expert, which come last, read it.
    place = jnp.zeros(picks, jnp.int32).at[tiles.order].set(jnp.arange(picks, dtype=jnp.int32), unique_indices=True)
    return gather_sum(out, jnp.where(experts < count, place.reshape(experts.shape), picks + rows - 1))


def _product(x: jax.Array, stack: ExpertStack, expert: jax.Array) -> jax.Array:
    """X [R, I] · [O, I]ᵀ of one expert, float32."""
    if not stack.is_fp4:
        return dot(x, stack.one(expert, x.dtype))
    even, odd = stack.halves(expert, x.dtype)
    return dot(x[:, 0::2], even.T) + dot(x[:, 1::2], odd.T)
