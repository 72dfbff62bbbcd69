"""The form of stacks that hold many layers: one loop over tiles of a few rows, each with its one expert's matrices.

The compiler reads an expert's bytes straight out of the stack of all layers into the product: nothing is copied, and an
expert that no token chose is never touched. FP4 matrices are multiplied as two halves, even and odd inputs, because
putting nibbles side by side costs more than the product.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_experts.reference import dot, swiglu
from kernels_pallas.grouped_experts.stacks import ExpertStack
from kernels_pallas.loops import data_loop

MIN_ROWS, MAX_ROWS = 8, 128
"""Rows of a tile: the sublanes of a float32 register, and what makes a product large enough."""


def rows_of_tile(picks: float, experts: int) -> int:
    """The largest power of two up to the mean load: more tiles read the matrices more often, larger ones are padded."""
    mean = max(int(picks) // experts, 1)
    return min(max(1 << (mean.bit_length() - 1), MIN_ROWS), MAX_ROWS)


def forward(
    x: jax.Array,
    matrices: tuple[ExpertStack, ExpertStack, ExpertStack],
    token: jax.Array,
    share: jax.Array,
    last: jax.Array,
    rows: int,
    limit: float,
    expected: float,
) -> jax.Array:
    """Outputs of rows in the padded order by expert.

    Args:
      x: [T, D].
      matrices: w1, w3, w2.
      token: [R] token of each row; share: [R] its routing weight; R is a multiple of `rows`.
      last: [E] the tile after each expert's last.
      rows: of a tile.
      limit: of gate and up.
      expected: tiles with work under an even load.

    Returns:
      [R, D] float32; zero beyond the last tile.
    """
    gate, up, down = matrices
    owner = jnp.minimum(jnp.searchsorted(last, jnp.arange(token.shape[0] // rows), side="right"), last.shape[0] - 1)

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        expert, start = owner[i], i * rows
        own = x[jax.lax.dynamic_slice_in_dim(token, start, rows)]
        z = swiglu(_product(own, gate, expert), _product(own, up, expert), limit)
        z = (z * jax.lax.dynamic_slice_in_dim(share, start, rows)[:, None]).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, _product(z, down, expert), start, 0)

    out = jnp.zeros((token.shape[0], x.shape[1]), jnp.float32)
    return data_loop(0, last[-1], one_tile, out, expected=expected)


def _product(x: jax.Array, stack: ExpertStack, expert: jax.Array) -> jax.Array:
    """X [R, I] · [O, I]ᵀ of one expert, float32."""
    if not stack.is_fp4:
        return dot(x, stack.one(expert, x.dtype))
    even, odd = stack.halves(expert, x.dtype)
    return dot(x[:, 0::2], even.T) + dot(x[:, 1::2], odd.T)
