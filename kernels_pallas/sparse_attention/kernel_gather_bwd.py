"""Backward kernel over unions: gradients to queries, window keys and the entries of each tile's union.

Grid, lists and the way rows come in are the forward kernel's (`kernel_gather`). Scores stand with keys on sublanes and
queries × heads on lanes: then no product has a transposed left side but the one with the keys, which are turned once
per block, and what belongs to a row of queries (`lse`, `delta`) is one row. d(q) grows in VMEM, turned as well.

d(entries) is a sum over tiles, kept in HBM in float32. A block's rows of it are copied to VMEM, added to and copied
back. Tiles follow one another on one core and a block waits for the copies of the one before it, so that sums are exact
and always in the same order. Places without a member go to rows of their own behind the entries.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.sparse_attention.block_sizes_union import UnionSizes
from kernels_pallas.sparse_attention.kernel import LOG2_E, arguments, cost, product
from kernels_pallas.sparse_attention.kernel_gather import Lists, input_blocks, list_block, start_row, wait_rows
from kernels_pallas.sparse_attention.layout import Operands, Shape
from kernels_pallas.sparse_attention.row_words import unpack, word_planes
from kernels_pallas.tpu import LANES, Chip, cdiv, compiler_params

Products = tuple[Any, jax.Array, jax.Array]


class PerRow(NamedTuple):
    """What belongs to a row of queries × heads, on lanes: [B · T, 1, M]."""

    lse: jax.Array
    """float32: log2 of the softmax's denominator, 1e30 for a query that is none."""
    delta: jax.Array
    """float32: d(out) · out."""
    segment: jax.Array
    """int32: document of the query."""
    number: jax.Array
    """int32 [1, 1, M], the same for all tiles: number of the query within its tile."""


def _differentiate(
    q: Any, d_out: Any, per_row: PerRow, keys: jax.Array, turned: jax.Array, is_seen: Callable[[Any], jax.Array],
    *, scale: float, chunk: int,
) -> Iterator[tuple[Any, jax.Array, jax.Array]]:  # fmt: skip
    """Chunk by chunk of rows: where it is, its part of d(keys) [R, H] and d(q) turned, [H, chunk].

    Args:
      keys: [R, H]. turned: [H, R]. is_seen: [R, chunk] of a chunk. chunk: rows, queries × heads.
    """
    rows = q.shape[1]
    ahead: Products | None = None
    # A chunk's products are asked for before the previous chunk is handed out.
    for start in (*range(0, rows, chunk), None):
        current, ahead = ahead, None
        if start is not None:
            at = slice(start, start + chunk)
            ahead = at, product(keys, q[0, at], (1, 1)), product(keys, d_out[0, at], (1, 1))
        if current is not None:
            at, scores, dweights = current
            weights = jnp.exp2(scores * (scale * LOG2_E) - per_row.lse[0, :, at])
            weights = jnp.where(is_seen(at), weights, 0.0)
            dscores = (weights * ((dweights - per_row.delta[0, :, at]) * scale)).astype(keys.dtype)
            dkeys = product(weights.astype(keys.dtype), d_out[0, at], (1, 0)) + product(dscores, q[0, at], (1, 0))
            yield at, dkeys, product(turned, dscores, (1, 0))


def _column(row: jax.Array) -> jax.Array:
    """int32 [1, 128] → [128, 128], the same in all lanes."""
    return jnp.broadcast_to(row, (LANES, LANES)).T


def _scatter(
    counts: Any, addresses: Any, words: Any, *refs: Any, shape: Shape, sizes: UnionSizes, scale: float,
    blocks: int | None,
) -> None:  # fmt: skip
    """The grid step.

    counts, addresses, words: as the forward kernel's. refs: q [1, M, H], near × keys [1, 128, H], near × key_segment
    [1, 1, 128], `PerRow` [1, 1, M], d(out) [1, M, H], places SMEM [1, C / 128, 128], where rows of d(entries) are;
    entries HBM [B · P, planes, 128], zeros that d(entries) begins with; results dq [1, M, H], dkeys [1, 1, near · 128,
    H], dentries HBM [·, H / 128, 128]; scratch raw [planes, R, 128], keys [R, H], turned [H, R], words of a block
    [R, 128], dq turned [H, M], gradient of a block [R, H], its rows [H / 128, R, 128], semaphores.
    """
    waiting = iter(refs)
    q = next(waiting)
    keys, segments = [next(waiting) for _ in range(shape.near)], [next(waiting) for _ in range(shape.near)]
    per_row = PerRow(*(next(waiting) for _ in range(4)))
    d_out, places, entries, _, dq, dkeys, dentries, *scratch = waiting
    raw, members, turned, chosen, dq_turned, gradient, sums, arrived, read, written = scratch
    tile, last, near = pl.program_id(1), shape.blocks - 1, shape.near * LANES
    index = pl.program_id(0) * shape.blocks + tile
    count = jnp.maximum((counts[index] + (sizes.rows - 1)) // sizes.rows, 1) if blocks is None else blocks
    source = entries if raw.dtype == entries.dtype else entries.bitcast(raw.dtype)
    whole, per_block = slice(0, sizes.rows), sizes.rows // LANES
    differentiate = functools.partial(
        _differentiate, q, d_out, per_row, scale=scale, chunk=sizes.chunk * shape.heads
    )  # fmt: skip

    def start(first: Any, row: Any) -> None:
        start_row(source, addresses, first, row, raw, arrived, members.dtype)

    def sums_row(block: Any, row: int) -> tuple[Any, Any]:
        place = places[0, block * per_block + row // LANES, row % LANES]
        return dentries.at[place], sums.at[:, row]

    def window_is_seen(at: slice) -> jax.Array:
        number, owner = per_row.number[0, :, at], per_row.segment[0, :, at]
        key = jax.lax.broadcasted_iota(jnp.int32, (near, number.shape[1]), 0)
        distance = shape.lead + jax.lax.rem(tile * sizes.queries, LANES) + number - key
        owners = jnp.concatenate([_column(s[0])[:, :1] for s in segments], axis=0)
        return (distance >= 0) & (distance < shape.window) & (owners == owner)

    def is_member(at: slice) -> jax.Array:
        bit = jnp.left_shift(jnp.int32(1), per_row.number[0, :, at])
        return (chosen[:, :1] & bit) != 0

    @pl.when((tile == 0) & (blocks is None))
    def _() -> None:
        def one(row: Any, _: None) -> None:
            start(per_block, row)

        jax.lax.fori_loop(0, sizes.rows, one, None)

    @pl.when(jax.lax.rem(tile * sizes.queries, LANES) == 0)
    def _() -> None:
        dkeys[...] = jnp.zeros_like(dkeys)

    own = jnp.concatenate([k[0] for k in keys], axis=0)
    for at, value, back in differentiate(own, own.T, window_is_seen):
        dkeys[0, 0] += value
        dq_turned[:, at] = back

    def one_block(block: Any, _: None) -> None:
        wait_rows(raw, arrived, whole)
        members[...] = unpack(raw, members.dtype)
        turned[...] = members[...].T
        for row in range(per_block):
            chosen[row * LANES : (row + 1) * LANES] = _column(words[0, pl.ds(block * per_block + row, 1)])
        coming = jnp.where(block + 1 < count, (block + 2) * per_block, 0)
        for row in range(sizes.rows):
            start(coming, row)
        for at, value, back in differentiate(members[...], turned[...], is_member):
            dq_turned[:, at] += back
            if at.start == 0:
                gradient[...] = value

                @pl.when((tile > 0) | (block > 0))
                def _() -> None:
                    wait_rows(sums, written, whole)

                for row in range(sizes.rows):
                    pltpu.make_async_copy(*sums_row(block, row), read).start()
            else:
                gradient[...] += value
        wait_rows(sums, read, whole)
        for plane in range(sums.shape[0]):
            sums[plane] += gradient[:, plane * LANES : (plane + 1) * LANES]
        for row in range(sizes.rows):
            to, at = sums_row(block, row)
            pltpu.make_async_copy(at, to, written).start()

    jax.lax.fori_loop(0, count, one_block, None)
    dq[0] = dq_turned[...].T.astype(dq.dtype)

    @pl.when(tile == last)
    def _() -> None:  # what was fetched for no further tile, and the last rows' way back
        wait_rows(raw, arrived, whole)
        wait_rows(sums, written, whole)


def backward(
    lists: Lists, places: jax.Array, per_row: PerRow, given: Operands, d_out: jax.Array, source: jax.Array,
    shape: Shape, sizes: UnionSizes, *, scale: float, expected: int, chip: Chip, blocks: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """d(q) [B, M, H] in q's dtype, d(keys) float32 [B, first tiles, near · 128, H], d(entries) float32 [B · P + R, H].

    Args:
      places: int32 [B · T, C / 128, 128], the rows of d(entries) of a tile's members; R rows behind those of the
        entries take what is none.
      d_out: [B, M, H]. Others: as `kernel_gather.forward`.
    """
    rows, near, dtype = sizes.queries * shape.heads, shape.near * LANES, given.q.dtype
    capacity, planes = lists.words[0].size, shape.dim // LANES
    word_count, word = word_planes(shape.dim, dtype)
    row_block = pl.BlockSpec((1, rows, shape.dim), lambda b, t, *_: (b, t, 0))
    lanes = pl.BlockSpec((1, 1, rows), lambda b, t, *_: (b * shape.blocks + t, 0, 0))
    specs = input_blocks(shape, sizes, capacity)
    del specs[3]  # place: on lanes here
    zeros = jnp.zeros((source.shape[0] + sizes.rows, planes, LANES), jnp.float32)
    operands = arguments(given, shape)[3:]
    del operands[1]
    inputs = [*lists, *operands, *per_row, d_out, places, source, zeros]
    found = pl.pallas_call(
        functools.partial(_scatter, shape=shape, sizes=sizes, scale=scale, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape.batch, shape.blocks),
            in_specs=[
                *specs,
                lanes,
                lanes,
                lanes,
                pl.BlockSpec((1, 1, rows), lambda b, t, *_: (0, 0, 0)),
                row_block,
                list_block(shape, capacity, pltpu.SMEM),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                row_block,
                pl.BlockSpec(
                    (1, 1, near, shape.dim), lambda b, t, *_: (b, jax.lax.div(t * sizes.queries, LANES), 0, 0)
                ),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            scratch_shapes=[
                pltpu.VMEM((word_count, sizes.rows, LANES), word),
                pltpu.VMEM((sizes.rows, shape.dim), dtype),
                pltpu.VMEM((shape.dim, sizes.rows), dtype),
                pltpu.VMEM((sizes.rows, LANES), jnp.int32),
                pltpu.VMEM((shape.dim, rows), jnp.float32),
                pltpu.VMEM((sizes.rows, shape.dim), jnp.float32),
                pltpu.VMEM((planes, sizes.rows, LANES), jnp.float32),
                *(pltpu.SemaphoreType.DMA(()) for _ in range(3)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(given.q.shape, dtype),
            jax.ShapeDtypeStruct(
                (shape.batch, cdiv(shape.blocks * sizes.queries, LANES), near, shape.dim), jnp.float32
            ),
            jax.ShapeDtypeStruct(zeros.shape, jnp.float32),
        ],
        input_output_aliases={len(inputs) - 1: 2},
        # As in the forward kernel: addresses are clamped when the lists are made.
        compiler_params=compiler_params(chip, semantics=("arbitrary", "arbitrary"), disable_bounds_checks=True),
        cost_estimate=cost(given, shape, expected, products=5),
        name="sparse_attention_scatter",
    )(*inputs)
    return found[0], found[1], found[2].reshape(-1, shape.dim)
