"""Experts by sorted blocks: tokens are grouped by expert, and an outer loop over the experts with work takes each one's
matrices once for inner loops over its blocks of rows.

No array of [tokens, experts] or [experts, capacity] exists, no token is dropped, and the work is that of the chosen
experts, rounded up to a small block each (`blocks`). Plain dots in a loop, because `lax.ragged_dot` is many times
slower than a dense product off TPU. Quantised matrices are dequantised one expert at a time.

Which form runs: a stack that is addressed by layer (inference on TPU), one loop over tiles of rows (`tiles`); up to 8
picks, each with its own matrices; few rows per expert on a CPU, row by row; else blocks. Only plain arrays have a
gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_experts import tiles
from kernels_pallas.grouped_experts.blocks import Blocks, active_experts, blocks_for, expected_tiles, over_blocks
from kernels_pallas.grouped_experts.reference import dot, precision, swiglu
from kernels_pallas.grouped_experts.stacks import ExpertStack
from kernels_pallas.loops import data_loop
from kernels_pallas.ordering import gather_sum
from kernels_pallas.tpu import current_platform
from kernels_pallas.vectors import are_few, matrix_vector, times_few

_FEW_ROWS = 3.0
"""Below this many rows per expert with work, a CPU is faster by one row at a time than by the smallest blocks."""
_FEW_PICKS = 8
"""Up to this many (token, expert) pairs each get their own copy of the expert's matrices: no sort, no padding."""


Stacks = tuple[ExpertStack, ExpertStack, ExpertStack]
"""w1, w3, w2."""


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
    """[E]: first unit of rows of each expert; its rows end where `last` says."""
    last: jax.Array


def _stacks(matrices: tuple[jax.Array, ...]) -> Stacks:
    return tuple(ExpertStack(matrix) for matrix in matrices)  # pyright: ignore


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
    # A pick of no expert reads the last row: with such a pick that row is never filled, so it holds zeros.
    row = jnp.where(sorted_expert < count, row, limit * block - 1)
    slot = jnp.zeros(picks, row.dtype).at[order].set(row, unique_indices=True).reshape(tokens, choices)
    share = jnp.where(is_pick, weights.reshape(-1)[pick], 0.0)
    return _Groups(
        pick // choices, share, slot, jnp.argsort(load == 0, stable=True), jnp.sum(load > 0), first, last
    )  # fmt: skip


def _rows(array: jax.Array, row: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, row, count)


def _put(array: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), row, 0)


def _forward(
    x: jax.Array, matrices: Stacks, groups: _Groups, blocks: Blocks, limit: float, *, keep: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The combined output [T, D] float32 and, if `keep`, gate and up [R, 2F] for the backward pass."""

    def one_expert(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert = groups.expert[i]
        into, w2 = _into(matrices, expert, x.dtype), matrices[2].one(expert, x.dtype)

        def one_block(row: jax.Array, size: int, _: bool, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            both = _dot(x[_rows(groups.token, row, size)], into)
            z = _swiglu(both, limit) * _rows(groups.share, row, size)[:, None]
            results = (_dot(z.astype(x.dtype), w2), both)
            return tuple(_put(array, value, row) for array, value in zip(state, results, strict=False))

        return over_blocks(groups.first[expert], groups.last[expert], blocks, one_block, state)

    rows, hidden = groups.token.shape[0], matrices[0].shape[1]
    widths = (x.shape[1], 2 * hidden) if keep else (x.shape[1],)
    state = tuple(jnp.zeros((rows, width), jnp.float32) for width in widths)
    out, *kept = data_loop(0, groups.active, one_expert, state, expected=blocks.experts)
    return gather_sum(out, groups.slot), kept[0] if keep else None


def _dot(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return times_few(weight, rows, precision(rows)) if are_few(len(rows)) else dot(rows, weight)


def _into(matrices: Stacks, expert: jax.Array, dtype: DTypeLike) -> jax.Array:
    """w1 over w3 of one expert, [2F, D]: one larger product instead of two."""
    return jnp.concatenate([matrices[0].one(expert, dtype), matrices[1].one(expert, dtype)])


def _swiglu(both: jax.Array, limit: float) -> jax.Array:
    gate, up = jnp.split(both, 2, axis=-1)
    return swiglu(gate, up, limit)


def _row_by_row(
    x: jax.Array, matrices: Stacks, experts: jax.Array, weights: jax.Array, limit: float, picks: float
) -> jax.Array:
    """Each expert's matrices once, then its rows, each a vector: for few rows per expert on a CPU."""
    count = matrices[0].shape[0]
    groups, active = _group(experts, weights, count, 1), active_experts(picks, count)

    def one_expert(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = groups.expert[i]
        into, w2 = _into(matrices, expert, x.dtype), matrices[2].one(expert, x.dtype)

        def one_row(row: jax.Array, out: jax.Array) -> jax.Array:
            both = matrix_vector(into, x[groups.token[row]], precision(x))
            z = _swiglu(both, limit) * groups.share[row]
            return _put(out, matrix_vector(w2, z.astype(x.dtype), precision(x))[None], row)

        return data_loop(groups.first[expert], groups.last[expert], one_row, out, expected=picks / active)

    out = jnp.zeros((groups.token.shape[0], x.shape[1]), jnp.float32)
    return gather_sum(data_loop(0, groups.active, one_expert, out, expected=active), groups.slot)


def _inference(
    x: jax.Array, matrices: Stacks, experts: jax.Array, weights: jax.Array, limit: float, picks: float
) -> jax.Array:
    """Without a gradient, for stacks of any kind."""
    count, is_one_of_many = matrices[0].shape[0], matrices[0].layer is not None
    if is_one_of_many:
        rows = tiles.rows_of_tile(picks, count)
        return tiles.forward(x, matrices, experts, weights, rows, limit, expected_tiles(picks, count, rows))
    if picks < active_experts(picks, count) * _FEW_ROWS and current_platform() == "cpu":
        return _row_by_row(x, matrices, experts, weights, limit, picks)
    blocks = blocks_for(picks, count, experts.size)
    groups = _group(experts, weights, count, blocks.unit)
    return _forward(x, matrices, groups, blocks, limit, keep=False)[0]


def _few_picks(x: jax.Array, matrices: Stacks, experts: jax.Array, weights: jax.Array, limit: float) -> jax.Array:
    """Each pick with its own copy of its expert's matrices, all in one batched product.

    XLA's CPU runs the entries of a batch on all threads, a matrix times one row on one.
    """
    tokens, choices = experts.shape

    def each(rows: jax.Array, stack: ExpertStack) -> jax.Array:
        matrix = jnp.stack([stack.one(expert, x.dtype) for expert in experts.reshape(-1)])
        return jax.vmap(dot)(rows.astype(x.dtype)[:, None], matrix)[:, 0]

    rows = jnp.repeat(x, choices, axis=0)
    share = jnp.where(experts < matrices[0].shape[0], weights, 0.0).reshape(-1, 1)
    z = swiglu(each(rows, matrices[0]), each(rows, matrices[1]), limit) * share
    return jnp.sum(each(z, matrices[2]).reshape(tokens, choices, -1), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _experts(
    x: jax.Array, matrices: tuple[jax.Array, ...], experts: jax.Array, weights: jax.Array, limit: float, picks: float
) -> jax.Array:
    return _inference(x, _stacks(matrices), experts, weights, limit, picks)


def _experts_fwd(
    x: jax.Array, matrices: tuple[jax.Array, ...], experts: jax.Array, weights: jax.Array, limit: float, picks: float
) -> tuple[jax.Array, tuple]:
    count = matrices[0].shape[0]
    blocks = blocks_for(picks, count, experts.size)
    groups = _group(experts, weights, count, blocks.unit)
    out, both = _forward(x, _stacks(matrices), groups, blocks, limit, keep=True)
    return out, (x, matrices, experts, weights, groups, both)


def _experts_bwd(limit: float, picks: float, saved: tuple, d_out: jax.Array) -> tuple:
    x, matrices, experts, weights, groups, both = saved
    count, dtype = matrices[0].shape[0], x.dtype
    blocks = blocks_for(picks, count, experts.size)
    hidden_size = matrices[0].shape[1]

    def back(d_rows: jax.Array, matrix: jax.Array) -> jax.Array:
        """d_rows · matrix: from a product's result to its rows."""
        return jnp.matmul(d_rows, matrix, precision=precision(d_rows), preferred_element_type=jnp.float32)

    def over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
        """aᵀ · b, summed over rows."""
        return dot(a.astype(dtype).T, b.astype(dtype).T)

    def one_expert(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert = groups.expert[i]
        into, w2 = _into(_stacks(matrices), expert, dtype), matrices[2][expert]

        # A padding row repeats a real token, but its share of 0 keeps it out of every sum.
        def one_block(row: jax.Array, size: int, is_first: bool, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_x, d_share, *sums = state
            token, share = _rows(groups.token, row, size), _rows(groups.share, row, size)[:, None]
            x_block, d_block = x[token], d_out[token].astype(dtype)
            hidden, pull = jax.vjp(lambda both: _swiglu(both, limit), _rows(both, row, size))
            d_z = back(d_block, w2)
            d_both = pull(d_z * share)[0].astype(dtype)
            d_share = _put(d_share, jnp.sum(d_z * hidden, axis=-1), row)
            d_x = _put(d_x, back(d_both, into), row)
            own = over_rows(d_both, x_block), over_rows(d_block, hidden * share)
            if not is_first:  # the first one overwrites what the expert before has left
                own = (total + more for total, more in zip(sums, own, strict=True))
            return d_x, d_share, *own

        state, d_matrices = state[:4], state[4:]
        state = over_blocks(groups.first[expert], groups.last[expert], blocks, one_block, state)
        own = (state[2][:hidden_size], state[2][hidden_size:], state[3])
        filled = (d.at[expert].set(value.astype(d.dtype)) for d, value in zip(d_matrices, own, strict=True))
        return *state, *filled

    rows, width = groups.token.shape[0], x.shape[1]
    shapes = ((rows, width), (rows,), (2 * hidden_size, width), (width, hidden_size))
    state = (*(jnp.zeros(shape, jnp.float32) for shape in shapes), *(jnp.zeros_like(matrix) for matrix in matrices))
    d_x, d_share, _, _, *d_matrices = data_loop(0, groups.active, one_expert, state, expected=blocks.experts)
    no_gradient = np.zeros(experts.shape, jax.dtypes.float0)
    d_x = gather_sum(d_x, groups.slot).astype(dtype)
    d_weights = jnp.where(experts < matrices[0].shape[0], d_share[groups.slot], 0.0)
    return d_x, tuple(d_matrices), no_gradient, d_weights.astype(weights.dtype)


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
    tokens, choices = experts.shape
    stacks = (w1, w3, w2)
    if tokens * choices > _FEW_PICKS or w1.layer is not None:
        picks = float(tokens * choices) if expected_picks is None else expected_picks
        if any(stack.layer is not None or stack.scale is not None for stack in stacks):
            return _inference(x, stacks, experts, weights, limit, picks)
        return _experts(x, (w1.values, w3.values, w2.values), experts, weights, limit, picks)
    return _few_picks(x, stacks, experts, weights, limit)
