"""Experts of many rows on TPU: rows are sorted by expert, and the products are those of JAX's own `megablox` kernels.

They take plain bfloat16 matrices (training, prefill with such weights). Few tokens through FP4 experts have a kernel
where XLA needs one (`kernel_fp4`). Other quantised matrices, stacks of layers and float32 run as in `xla`.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_experts import kernel_fp4, tiles, xla
from kernels_pallas.grouped_experts.blocks import expected_tiles
from kernels_pallas.grouped_experts.reference import swiglu
from kernels_pallas.grouped_experts.stacks import ExpertStack
from kernels_pallas.loops import part_of_grid
from kernels_pallas.ordering import by_key, gather_sum
from kernels_pallas.tpu import LANES, cdiv, current_chip, round_up

_TILE = 256
"""Rows of a tile. Where experts meet in a tile it is computed for both: smaller tiles waste less."""
_WIDE = 1024
"""Rows and columns of a tile of a matrix's gradient."""
_VMEM = (16 << 20) - (1 << 18)
"""Bytes that a product may take: the compiler's own limit, which these kernels do not raise, less a little."""
_MANY = 128
"""Picks per expert from which on products in tiles pay."""

Matrices = tuple[jax.Array, jax.Array, jax.Array]
"""w1, w3 [E, F, D] and w2 [E, D, F], bfloat16."""


class _Rows(NamedTuple):
    """Picks in the order of their experts, padded to whole tiles; those of no expert are last."""

    token: jax.Array
    """[R]: the token of each row; of padding some token."""
    share: jax.Array
    """[R]: routing weight, 0 where no expert is meant."""
    sizes: jax.Array
    """int32 [E]: rows of each expert."""
    slot: jax.Array
    """[T, K]: the row of each pick."""

    @property
    def is_real(self) -> jax.Array:
        """Bool [R, 1]: rows of an expert; what a product leaves in the others is undefined."""
        return (jnp.arange(self.token.shape[0]) < jnp.sum(self.sizes))[:, None]


def _sort(experts: jax.Array, weights: jax.Array, count: int) -> _Rows:
    flat = experts.reshape(-1)
    rows = round_up(flat.shape[0], _TILE)
    order = by_key(flat, count + 1)  # the last key is that of no expert
    share = jnp.where(flat < count, weights.reshape(-1), 0.0)[order.item]
    padding = (0, rows - flat.shape[0])
    token = jnp.pad(order.item // experts.shape[1], padding)
    return _Rows(token, jnp.pad(share, padding), order.sizes[:count], order.place.reshape(experts.shape))


def _tiling(depth: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile of a product of [·, depth] with [depth, width], whole in depth.

    So an expert's tiles of rows pass by one copy of its columns. The rows are read once per tile of columns: where
    few columns of a deep matrix fit into VMEM, fewer rows leave room for more.
    """

    def columns(rows: int) -> int:
        # Copies are double buffered, the rows are loaded once more; sums are float32, in two buffers and a scratch.
        most = (_VMEM - 3 * 2 * rows * depth) // (2 * 2 * depth + 3 * 4 * rows) // LANES * LANES
        if most >= width:
            return width
        return round_up(cdiv(width, cdiv(width, most)), LANES) if most > 0 else 0

    rows = _TILE if columns(_TILE) >= min(width, _WIDE // 2) else max((_TILE, _TILE // 2), key=columns)
    return rows, max(columns(rows), LANES)


def _visited(rows: jax.Array, matrices: int, picks: float, tile: int) -> AbstractContextManager[Any]:
    """Says how much of a grid runs: a tile more per expert than its picks fill, since experts meet within tiles."""
    return part_of_grid(min(1.0, (picks + matrices * tile) / rows.shape[0]))


def _by_expert(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array, picks: float, *, transposed: bool
) -> jax.Array:  # fmt: skip
    """Rows [R, I] times the matrix of their expert, [E, I, O] or `transposed` [E, O, I]; float32 [R, O]."""
    depth, width = matrices.shape[-2:][::-1] if transposed else matrices.shape[-2:]
    tile, columns = _tiling(depth, width)
    with _visited(rows, len(matrices), picks, tile):
        return gmm(rows, matrices, sizes, jnp.float32, (tile, depth, columns), transpose_rhs=transposed)


def _over_rows(left: jax.Array, right: jax.Array, sizes: jax.Array, picks: float) -> jax.Array:
    """leftᵀ [R, O] · right [R, I] of each expert's rows: [E, O, I] in the operands' dtype."""
    tiling = (_TILE, min(left.shape[1], _WIDE), min(right.shape[1], _WIDE))
    with _visited(left, len(sizes), picks, _TILE):
        return tgmm(left.T, right, sizes, left.dtype, tiling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _experts(
    x: jax.Array, matrices: Matrices, experts: jax.Array, weights: jax.Array, limit: float, picks: float
) -> jax.Array:
    return _experts_fwd(x, matrices, experts, weights, limit, picks)[0]


def _experts_fwd(
    x: jax.Array, matrices: Matrices, experts: jax.Array, weights: jax.Array, limit: float, picks: float
) -> tuple[jax.Array, tuple]:
    rows = _sort(experts, weights, matrices[0].shape[0])
    own = x[rows.token]
    gate, up = (_by_expert(own, matrix, rows.sizes, picks, transposed=True) for matrix in matrices[:2])
    z = jnp.where(rows.is_real, swiglu(gate, up, limit) * rows.share[:, None], 0.0).astype(x.dtype)
    out = jnp.where(rows.is_real, _by_expert(z, matrices[2], rows.sizes, picks, transposed=True), 0.0)
    return gather_sum(out, rows.slot), (own, gate, up, matrices, experts, weights, rows)


def _experts_bwd(limit: float, picks: float, saved: tuple, d_out: jax.Array) -> tuple:
    own, gate, up, matrices, experts, weights, rows = saved
    dtype, is_real, share = own.dtype, rows.is_real, rows.share[:, None]
    d_rows = jnp.where(is_real, d_out[rows.token], 0.0).astype(dtype)
    hidden, pull = jax.vjp(functools.partial(swiglu, limit=limit), gate, up)
    hidden = jnp.where(is_real, hidden, 0.0)
    d_z = jnp.where(is_real, _by_expert(d_rows, matrices[2], rows.sizes, picks, transposed=False), 0.0)
    d_gate, d_up = (jnp.where(is_real, d, 0.0).astype(dtype) for d in pull(d_z * share))
    d_own = _by_expert(d_gate, matrices[0], rows.sizes, picks, transposed=False)
    d_own = d_own + _by_expert(d_up, matrices[1], rows.sizes, picks, transposed=False)
    z = (hidden * share).astype(dtype)
    d_matrices = tuple(_over_rows(a, b, rows.sizes, picks) for a, b in ((d_gate, own), (d_up, own), (d_rows, z)))
    d_x = gather_sum(jnp.where(is_real, d_own, 0.0), rows.slot).astype(dtype)
    d_share = jnp.sum(d_z * hidden, axis=-1)[rows.slot]
    return d_x, d_matrices, np.zeros(experts.shape, jax.dtypes.float0), d_share.astype(weights.dtype)


_experts.defvjp(_experts_fwd, _experts_bwd)


def grouped_experts(
    x: Float[Array, "T D"],
    w1: ExpertStack,
    w3: ExpertStack,
    w2: ExpertStack,
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    limit: float,
    expected_picks: float | None = None,
) -> Float[Array, "T D"]:
    """See `api.grouped_experts`."""
    stacks = (w1, w3, w2)
    is_plain = all(stack.layer is None and stack.scale is None for stack in stacks)
    picks = experts.size if expected_picks is None else expected_picks
    if w1.layer is not None:
        count, chip = w1.shape[0], current_chip()
        rows = tiles.rows_of_tile(picks, count)
        if kernel_fp4.is_for(x, stacks, rows, chip):
            grouped = tiles.group(experts, weights, count, rows)
            expected = expected_tiles(picks, count, rows)
            return kernel_fp4.forward(x, stacks, grouped, rows, limit=limit, expected=expected, chip=chip)
    if not is_plain or x.dtype != jnp.bfloat16 or picks < w1.shape[0] * _MANY:
        return xla.grouped_experts(x, *stacks, experts, weights, limit=limit, expected_picks=expected_picks)
    w1_values, w3_values, w2_values = (stack.values.astype(x.dtype) for stack in stacks)
    return _experts(x, (w1_values, w3_values, w2_values), experts, weights, limit, float(picks))
