"""Experts by sorted blocks: tokens are grouped by expert, and an outer loop over the experts with work takes each one's
matrices once for an inner loop over its blocks of rows.

No array of [tokens, experts] or [experts, capacity] exists, no token is dropped, and the work is that of the chosen
experts rounded up to a block each. Plain dots in a loop, because `lax.ragged_dot` is many times slower than a dense
product off TPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_experts.reference import dot, swiglu

_MAX_BLOCK, _MIN_BLOCK = 128, 4
_WEIGHTS_FIRST = 16
"""Blocks up to this many rows are multiplied as weights · rowsᵀ: XLA packs the second operand, here the smaller one."""
_UNROLLED_PICKS = 8
"""Up to this many (token, expert) pairs run one by one: no sort, no padding, and independent dots run in parallel."""


class _Groups(NamedTuple):
    """Where each (token, expert) pair, or pick, goes in the padded order by expert."""

    token: jax.Array
    """[R]: token of each padded row; a row of padding repeats some token."""
    share: jax.Array
    """[R]: routing weight of each padded row, 0 for padding."""
    slot: jax.Array
    """[T, K]: padded row of each pick."""
    expert: jax.Array
    """[E]: experts, those with work first."""
    active: jax.Array
    """Number of experts with work."""
    first: jax.Array
    """[E]: first block of each expert; its blocks end where `last` says."""
    last: jax.Array


def _block_size(picks: int, experts: int) -> int:
    """A power of two near half the mean load, which wastes a quarter of the mean load per expert on padding."""
    mean = max(picks // experts, 1)
    return int(np.clip(1 << max(mean.bit_length() - 2, 0), _MIN_BLOCK, _MAX_BLOCK))


def _group(experts: jax.Array, weights: jax.Array, count: int, block: int) -> _Groups:
    tokens, choices = experts.shape
    picks = tokens * choices
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    load = jnp.bincount(flat, length=count)
    used = (load + block - 1) // block
    last = jnp.cumsum(used)
    first_pick, first = jnp.cumsum(load) - load, last - used
    limit = picks // block + min(count, picks)  # enough blocks for every distribution of the load
    owner = jnp.minimum(jnp.searchsorted(last, jnp.arange(limit), side="right"), count - 1)
    rank = jnp.arange(limit * block) - jnp.repeat(first[owner], block) * block
    is_pick = rank < jnp.repeat(load[owner], block)
    pick = order[jnp.clip(jnp.repeat(first_pick[owner], block) + rank, 0, picks - 1)]
    sorted_expert = flat[order]
    row = first[sorted_expert] * block + jnp.arange(picks) - first_pick[sorted_expert]
    slot = jnp.zeros(picks, row.dtype).at[order].set(row, unique_indices=True).reshape(tokens, choices)
    share = jnp.where(is_pick, weights.reshape(-1)[pick], 0.0)
    return _Groups(
        pick // choices, share, slot, jnp.argsort(load == 0, stable=True), jnp.sum(load > 0), first, last
    )  # fmt: skip


def _rows(array: jax.Array, index: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index * block, block)


def _put(array: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), index * rows.shape[0], 0)


def _gather_sum(rows: jax.Array, slot: jax.Array) -> jax.Array:
    """Σ_k rows[slot[:, k]]: additions that fuse with the gathers, where a reduction would not."""
    return functools.reduce(jnp.add, [rows[slot[:, k]] for k in range(slot.shape[1])])


def _forward(
    x: jax.Array, matrices: tuple[jax.Array, ...], groups: _Groups, block: int, limit: float, *, keep: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The combined output [T, D] float32 and, if `keep`, gate and up [R, 2F] for the backward pass."""

    def one_expert(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert = groups.expert[i]
        into, w2 = _into(matrices, expert), matrices[2][expert]

        def one_block(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            both = dot(x[_rows(groups.token, j, block)], into)
            z = _swiglu(both, limit) * _rows(groups.share, j, block)[:, None]
            results = (dot(z.astype(x.dtype), w2), both)
            return tuple(_put(array, value, j) for array, value in zip(state, results, strict=False))

        return jax.lax.fori_loop(groups.first[expert], groups.last[expert], one_block, state)

    rows, hidden = groups.token.shape[0], matrices[0].shape[1]
    widths = (x.shape[1], 2 * hidden) if keep else (x.shape[1],)
    state = tuple(jnp.zeros((rows, width), jnp.float32) for width in widths)
    out, *kept = jax.lax.fori_loop(0, groups.active, one_expert, state)
    return _gather_sum(out, groups.slot), kept[0] if keep else None


def _into(matrices: tuple[jax.Array, ...], expert: jax.Array) -> jax.Array:
    """w1 over w3 of one expert, [2F, D]: one larger product instead of two."""
    return jnp.concatenate([matrices[0][expert], matrices[1][expert]])


def _swiglu(both: jax.Array, limit: float) -> jax.Array:
    gate, up = jnp.split(both, 2, axis=1)
    return swiglu(gate, up, limit)


def _forward_few(x: jax.Array, matrices: tuple[jax.Array, ...], groups: _Groups, block: int, limit: float) -> jax.Array:
    """`_forward` for small blocks: products are weights · rowsᵀ, and rows are columns until the end."""

    def one_expert(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = groups.expert[i]
        w1, w3, w2 = (matrix[expert] for matrix in matrices)

        def one_block(j: jax.Array, out: jax.Array) -> jax.Array:
            x_block = x[_rows(groups.token, j, block)]
            z = swiglu(dot(w1, x_block), dot(w3, x_block), limit) * _rows(groups.share, j, block)
            columns = dot(w2, z.astype(x.dtype).T)
            return jax.lax.dynamic_update_slice_in_dim(out, columns, j * block, 1)

        return jax.lax.fori_loop(groups.first[expert], groups.last[expert], one_block, out)

    out = jnp.zeros((x.shape[1], groups.token.shape[0]), jnp.float32)
    return _gather_sum(jax.lax.fori_loop(0, groups.active, one_expert, out).T, groups.slot)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts(
    x: jax.Array, matrices: tuple[jax.Array, ...], experts: jax.Array, weights: jax.Array, limit: float
) -> jax.Array:
    block = _block_size(experts.size, matrices[0].shape[0])
    groups = _group(experts, weights, matrices[0].shape[0], block)
    if block <= _WEIGHTS_FIRST:
        return _forward_few(x, matrices, groups, block, limit)
    return _forward(x, matrices, groups, block, limit, keep=False)[0]


def _experts_fwd(
    x: jax.Array, matrices: tuple[jax.Array, ...], experts: jax.Array, weights: jax.Array, limit: float
) -> tuple[jax.Array, tuple]:
    block = _block_size(experts.size, matrices[0].shape[0])
    groups = _group(experts, weights, matrices[0].shape[0], block)
    out, both = _forward(x, matrices, groups, block, limit, keep=True)
    return out, (x, matrices, experts, weights, groups, both)


def _experts_bwd(limit: float, saved: tuple, d_out: jax.Array) -> tuple:
    x, matrices, experts, weights, groups, both = saved
    block, dtype = _block_size(experts.size, matrices[0].shape[0]), x.dtype
    hidden_size = matrices[0].shape[1]

    def over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
        """aᵀ · b, summed over rows."""
        return dot(a.astype(dtype).T, b.astype(dtype).T)

    def one_expert(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert = groups.expert[i]
        into, w2 = _into(matrices, expert).T, matrices[2][expert].T

        # A padding row repeats a real token, but its share of 0 keeps it out of every sum.
        def one_block(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_x, d_share, d_into, d_w2 = state
            token, share = _rows(groups.token, j, block), _rows(groups.share, j, block)[:, None]
            x_block, d_block = x[token], d_out[token].astype(dtype)
            hidden, pull = jax.vjp(lambda both: _swiglu(both, limit), _rows(both, j, block))
            d_z = dot(d_block, w2)
            d_both = pull(d_z * share)[0].astype(dtype)
            d_share = _put(d_share, jnp.sum(d_z * hidden, axis=-1), j)
            d_x = _put(d_x, dot(d_both, into), j)
            return d_x, d_share, d_into + over_rows(d_both, x_block), d_w2 + over_rows(d_block, hidden * share)

        d_x, d_share, *d_matrices = state
        zeros = jnp.zeros(into.shape[::-1], jnp.float32), jnp.zeros(w2.shape[::-1], jnp.float32)
        bounds = groups.first[expert], groups.last[expert]
        d_x, d_share, d_into, d_w2 = jax.lax.fori_loop(*bounds, one_block, (d_x, d_share, *zeros))
        own = (d_into[:hidden_size], d_into[hidden_size:], d_w2)
        return (
            d_x,
            d_share,
            *(d.at[expert].set(value.astype(d.dtype)) for d, value in zip(d_matrices, own, strict=True)),
        )

    rows = groups.token.shape[0]
    state = (jnp.zeros((rows, x.shape[1]), jnp.float32), jnp.zeros(rows, jnp.float32))
    state = (*state, *(jnp.zeros_like(matrix) for matrix in matrices))
    d_x, d_share, *d_matrices = jax.lax.fori_loop(0, groups.active, one_expert, state)
    no_gradient = np.zeros(experts.shape, jax.dtypes.float0)
    d_x = _gather_sum(d_x, groups.slot).astype(dtype)
    return d_x, tuple(d_matrices), no_gradient, d_share[groups.slot].astype(weights.dtype)


_experts.defvjp(_experts_fwd, _experts_bwd)


def grouped_experts(
    x: Float[Array, "T D"],
    w1: Float[Array, "E F D"],
    w3: Float[Array, "E F D"],
    w2: Float[Array, "E D F"],
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    limit: float,
) -> Float[Array, "T D"]:
    """See `api.grouped_experts`."""
    tokens, choices = experts.shape
    if tokens * choices > _UNROLLED_PICKS:
        return _experts(x, (w1, w3, w2), experts, weights, limit)
    out = []
    for t in range(tokens):
        row = x[t : t + 1]
        total = jnp.zeros((1, x.shape[1]), jnp.float32)
        for k in range(choices):
            expert = experts[t, k]
            z = swiglu(dot(row, w1[expert]), dot(row, w3[expert]), limit) * weights[t, k]
            total = total + dot(z.astype(x.dtype), w2[expert])
        out.append(total)
    return jnp.concatenate(out)
