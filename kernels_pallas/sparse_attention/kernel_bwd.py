"""Backward kernel of prefill and training: gradients to queries, window keys, entries and sink in one pass.

The grid, the blocks and the way through the tiles are the forward kernel's. Weights are recomputed from the saved
logarithm of the softmax's denominator; five products per pair of a row and a key, where the forward pass has two.
Keys are also values, so their gradient is one sum, (weights)ᵀ·d(out) + d(scores)ᵀ·q. It is formed transposed, [H,
keys], from transposes of q and d(out) made once per block: then no product has a transposed left side. Gradients of
entries stay in VMEM for a whole sequence (`prefill` splits longer ones) and go out in one copy. Gradients of window
keys are summed over the blocks that share their first tile of keys; the caller adds the overlaps of neighbours.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.sparse_attention.block_sizes import BlockSizes
from kernels_pallas.sparse_attention.kernel import (
    LOG2_E,
    Group,
    add_bias,
    arguments,
    cost,
    entries_met,
    entry_bias,
    input_specs,
    lane_chunks,
    lanes_to_heads,
    per_row,
    product,
    window_bias,
)
from kernels_pallas.sparse_attention.layout import WORD, Operands, Shape
from kernels_pallas.tpu import LANES, Chip, cdiv, compiler_params, round_up


class Gradients(NamedTuple):
    """What the kernel gives, in its own layouts."""

    q: jax.Array
    """[B, M, H]."""
    keys: jax.Array
    """float32 [B, first tiles, H, near · 128]."""
    sink: jax.Array
    """float32 [B, N, 128], the same in all lanes."""
    entries: jax.Array | None
    """float32 [B, tiles, H, P]."""


def _backward(first: Any, count: Any, flags: Any, *refs: Any, shape: Shape, sizes: BlockSizes, scale: float) -> None:
    """The grid step.

    refs: q [1, M, H], place [1, Q, 2], near × keys [1, 128, H], near × key_segment [1, 1, 128], then with entries
    entries [1, P, H], entry_place [1, 2, P] and with a selection bits [1, Q, 128]; sink [N, 128], d(out) and out
    [1, M, H], stats [1, Q, N]; results dq [1, M, H], dkeys [1, 1, H, near · 128], dsink [1, N, 128] and in HBM dentries
    [B, tiles, H, P]; scratch bias [Q, columns], lse and delta [M, 128], qᵀ and d(out)ᵀ [H, M], weights and d(scores)
    [M, columns], then with entries their gradient [tiles, H, P] and a semaphore, and beyond one tile acc [M, H].
    """
    waiting = iter(refs)
    q, place = next(waiting), next(waiting)
    keys, segments = [next(waiting) for _ in range(shape.near)], [next(waiting) for _ in range(shape.near)]
    entries, entry_place = (next(waiting), next(waiting)) if shape.tiles else (None, None)
    bits = next(waiting) if shape.has_bits else None
    sink, d_out, out, stats, dq, dkeys, dsink = (next(waiting) for _ in range(7))
    dentries = next(waiting) if shape.tiles else None
    bias, lse, delta, q_turned, d_out_turned, weights, dscores, *rest = waiting
    (far, semaphore), acc = (rest[:2], rest[2:]) if shape.tiles else ((None, None), [])
    batch, block, step = (pl.program_id(i) for i in range(3))
    index = batch * shape.blocks + block
    heads, near, c = shape.heads, shape.near * LANES, scale * LOG2_E
    starts = range(0, sizes.queries, sizes.chunk)

    def lines(start: int) -> Any:
        return pl.ds(start * heads, sizes.chunk * heads)

    def products_ahead(groups: list[Group]) -> Iterator[tuple[int, list[tuple[jax.Array, jax.Array]]]]:
        """Chunk by chunk (scores, d(weights)) per group, asked for before the previous chunk is handed out."""
        ahead: tuple[int, list[tuple[jax.Array, jax.Array]]] | None = None
        for start in (*starts, None):
            current, ahead = ahead, None
            if start is not None:
                at = lines(start)
                ahead = start, [(product(q[0, at], k, (1, 1)), product(d_out[0, at], k, (1, 1))) for _, k in groups]
            if current is not None:
                yield current

    def differentiate(groups: list[Group]) -> Iterator[tuple[int, jax.Array]]:
        """Leaves weights and d(scores) in scratch; gives d(q) chunk by chunk."""
        for start, pairs in products_ahead(groups):
            at, part = lines(start), slice(start, start + sizes.chunk)
            low, mean = lse[at], delta[at]
            value = None
            for (s, dp), (offset, k) in zip(pairs, groups, strict=True):
                here = slice(offset, offset + s.shape[1])
                s = add_bias(s, bias[part, here], heads)
                p = [jnp.exp2(x * c - low) for x in lane_chunks(s)]
                ds = [x * ((y - mean) * scale) for x, y in zip(p, lane_chunks(dp), strict=True)]
                weights[at, here] = jnp.concatenate([x.astype(k.dtype) for x in p], axis=1)
                turned = jnp.concatenate([x.astype(k.dtype) for x in ds], axis=1)
                dscores[at, here] = turned
                add = product(turned, k, (1, 0))
                value = add if value is None else value + add
            assert value is not None
            yield start, value

    def key_gradient(begin: int, end: int) -> jax.Array:
        here = slice(begin, end)
        return product(d_out_turned[...], weights[:, here], (1, 0)) + product(q_turned[...], dscores[:, here], (1, 0))

    def far_bias(tile: Any) -> jax.Array:
        assert entry_place is not None
        return entry_bias(place[0], entry_place[0], None if bits is None else bits[0], tile, sizes)

    def prepare() -> None:
        lse[...] = lanes_to_heads(stats[0], heads)
        for start in starts:
            at = lines(start)
            both = d_out[0, at].astype(jnp.float32) * out[0, at].astype(jnp.float32)
            total = functools.reduce(jnp.add, lane_chunks(both))
            delta[at] = jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), (sizes.chunk * heads, LANES))
        share = jnp.exp2(per_row(sink[...], sizes.queries) * c - lse[...]) * delta[...]
        dsink[0] -= jnp.sum(share.reshape(sizes.queries, heads, LANES), axis=0)
        q_turned[...] = q[0].T
        d_out_turned[...] = d_out[0].T

    @pl.when((step == 0) & (block == 0))
    def _() -> None:
        dsink[...] = jnp.zeros_like(dsink)
        if far is not None:
            far[...] = jnp.zeros_like(far)

    @pl.when((step == 0) & (jax.lax.rem(block * sizes.queries, LANES) == 0))
    def _() -> None:
        dkeys[...] = jnp.zeros_like(dkeys)

    @pl.when(step == 0)
    def _() -> None:
        prepare()
        bias[:, :near] = window_bias(place[0], jnp.concatenate([s[0] for s in segments], axis=1), block, shape, sizes)
        groups = [(0, jnp.concatenate([k[0] for k in keys], axis=0))]
        if entries is not None:
            bias[:, near:] = far_bias(first[index])
            groups.append((near, entries[0]))
        for start, value in differentiate(groups):
            if acc:
                acc[0][lines(start)] = value
            else:
                dq[0, lines(start)] = value.astype(dq.dtype)
        dkeys[0, 0] += key_gradient(0, near)
        if far is not None:
            far[first[index]] += key_gradient(near, near + sizes.entries)

    if acc:
        tile = jnp.minimum(first[index] + step, shape.tiles - 1)
        word = flags[index * shape.words + jax.lax.div(tile, WORD)]
        is_met = jnp.bitwise_and(jnp.right_shift(word, jax.lax.rem(tile, WORD)), 1) == 1

        @pl.when((step > 0) & (step < count[index]) & is_met)
        def _() -> None:
            assert entries is not None
            assert far is not None
            bias[:, near:] = far_bias(tile)
            for start, value in differentiate([(near, entries[0])]):
                acc[0][lines(start)] += value
            far[tile] += key_gradient(near, near + sizes.entries)

        @pl.when(step == shape.tiles - 1)
        def _() -> None:
            dq[0] = acc[0][...].astype(dq.dtype)

    if dentries is not None:

        @pl.when((block == shape.blocks - 1) & (step == shape.tiles - 1))
        def _() -> None:
            copy = pltpu.make_async_copy(far, dentries.at[batch], semaphore)
            copy.start()
            copy.wait()


def backward(
    given: Operands,
    out: jax.Array,
    d_out: jax.Array,
    stats: jax.Array,
    shape: Shape,
    sizes: BlockSizes,
    *,
    scale: float,
    q_dtype: Any,
    chip: Chip,
) -> Gradients:
    """Gradients of the operands.

    Args:
      out, d_out: [B, M, H], the forward kernel's output and its cotangent.
      stats: float32 [B, S, N padded to 128], from the forward kernel.
      q_dtype: of the gradient to q.
    """
    rows, near = sizes.queries * shape.heads, shape.near * LANES
    columns = near + (sizes.entries if shape.tiles else 0)
    dtype = given.q.dtype
    row_block = pl.BlockSpec((1, rows, shape.dim), lambda b, i, j, *_: (b, i, 0))
    firsts = cdiv(shape.blocks * sizes.queries, LANES)
    out_specs = [
        row_block,
        pl.BlockSpec((1, 1, shape.dim, near), lambda b, i, j, *_: (b, jax.lax.div(i * sizes.queries, LANES), 0, 0)),
        pl.BlockSpec((1, shape.heads, LANES), lambda b, i, j, *_: (b, 0, 0)),
    ]
    out_shape = [
        jax.ShapeDtypeStruct(given.q.shape, q_dtype),
        jax.ShapeDtypeStruct((shape.batch, firsts, shape.dim, near), jnp.float32),
        jax.ShapeDtypeStruct((shape.batch, shape.heads, LANES), jnp.float32),
    ]
    scratch: list[Any] = [
        pltpu.VMEM((sizes.queries, columns), jnp.float32),
        *(pltpu.VMEM((rows, LANES), jnp.float32) for _ in range(2)),
        *(pltpu.VMEM((shape.dim, rows), dtype) for _ in range(2)),
        *(pltpu.VMEM((rows, columns), dtype) for _ in range(2)),
    ]
    if shape.tiles:
        far = (shape.tiles, shape.dim, sizes.entries)
        out_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        out_shape.append(jax.ShapeDtypeStruct((shape.batch, *far), jnp.float32))
        scratch += [pltpu.VMEM(far, jnp.float32), pltpu.SemaphoreType.DMA(())]
    if shape.tiles > 1:
        scratch.append(pltpu.VMEM((rows, shape.dim), jnp.float32))
    found = pl.pallas_call(
        functools.partial(_backward, shape=shape, sizes=sizes, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(shape.batch, shape.blocks, max(shape.tiles, 1)),
            in_specs=[
                *input_specs(shape, sizes),
                pl.BlockSpec((shape.heads, LANES), lambda b, i, j, *_: (0, 0)),
                row_block,
                row_block,
                pl.BlockSpec((1, sizes.queries, round_up(shape.heads, LANES)), lambda b, i, j, *_: (b, i, 0)),
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=compiler_params(chip, semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=cost(given, shape, entries_met(shape, sizes), products=5),
        name="sparse_attention_backward",
    )(*arguments(given, shape), given.sink, d_out, out, stats)
    return Gradients(found[0], found[1], found[2], found[3] if shape.tiles else None)
