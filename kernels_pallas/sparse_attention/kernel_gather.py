"""Forward kernel over unions: window, the entries that neighbouring queries chose, and the sink in one softmax.

Grid (batch, tile of queries). A tile's rows are its queries × heads, about 2048. Its union comes in blocks of members,
one copy per row of an entry, HBM → VMEM, from a list in SMEM. While a block is multiplied the rows of the next one come
in, those of the next tile's first block after a tile's last: a block is unpacked into keys first, so that one buffer
serves and every address in VMEM is a constant. The first block goes with the window, further ones rescale what is
there, as many as the union has: the loop's length depends on the data.

Softmax, order of products and statistics are those of `kernel`. HBM: q and the output once, keys about once, and one
row of entries per member of a tile's union.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.sparse_attention.block_sizes_union import UnionSizes
from kernels_pallas.sparse_attention.kernel import (
    LOG2_E,
    across,
    arguments,
    attend,
    cost,
    heads_to_lanes,
    input_specs,
    per_row,
    window_bias,
)
from kernels_pallas.sparse_attention.layout import NEVER, Operands, Shape
from kernels_pallas.sparse_attention.row_words import place_of_row, unpack, word_planes
from kernels_pallas.tpu import LANES, Chip, compiler_params, round_up


class Lists(NamedTuple):
    """Unions as the kernels read them; places in rows of 128."""

    counts: jax.Array
    """int32 [B · T]: members."""
    addresses: jax.Array
    """int32 [B · T, (R + C) / 128, 128]: rows of the next tile's first block, then those of the tile's members."""
    words: jax.Array
    """int32 [B · T, C / 128, 128]: which of the tile's queries chose a member, 0 where there is none."""


def start_row(source: Any, addresses: Any, first: Any, row: Any, raw: Any, arrived: Any, dtype: Any) -> None:
    """Starts the copy of one row of a block.

    Args:
      source: HBM [rows, planes, 128]. addresses: SMEM [1, ·, 128]. first: where the block's addresses begin, a row.
      raw: VMEM [planes, R, 128]. arrived: semaphore, for all rows.
    """
    to = raw.at[:, place_of_row(row, raw.shape[1], dtype)]
    pltpu.make_async_copy(source.at[addresses[0, first + row // LANES, row % LANES]], to, arrived).start()


def wait_rows(raw: Any, arrived: Any, part: slice) -> None:
    """Waits for a part of a block's rows."""
    here = raw.at[:, part]
    pltpu.make_async_copy(here, here, arrived).wait()


def member_bias(words: Any, first: Any, queries: int, rows: int) -> jax.Array:
    """0 where a query chose a member of the block whose words [1, ·, 128] begin at a row, `NEVER` elsewhere: [Q, R]."""
    query = jax.lax.broadcasted_iota(jnp.int32, (queries, LANES), 0)
    parts = [jnp.right_shift(words[0, pl.ds(first + row, 1)], query) & 1 == 1 for row in range(rows // LANES)]
    return jnp.where(jnp.concatenate(parts, axis=1), 0.0, NEVER)


def _gather(
    counts: Any, addresses: Any, words: Any, *refs: Any, shape: Shape, sizes: UnionSizes, scale: float,
    blocks: int | None, with_stats: bool,
) -> None:  # fmt: skip
    """The grid step.

    counts: SMEM [B · T], members. addresses: SMEM [1, (R + C) / 128, 128], the next tile's first block, then this
    tile's. words: [1, C / 128, 128]. refs: q [1, M, H], place [1, Q, 2], near × keys [1, 128, H], near × key_segment
    [1, 1, 128], sink [N, 128], entries HBM [B · P, planes, 128]; out [1, M, H], stats [1, Q, N]; scratch raw
    [planes, R, 128], keys [R, H], bias [Q, near · 128 + R], acc [M, H], top [M, 128], total [M, 128], semaphores.
    """
    waiting = iter(refs)
    q, place = next(waiting), next(waiting)
    keys, segments = [next(waiting) for _ in range(shape.near)], [next(waiting) for _ in range(shape.near)]
    sink, entries, out = (next(waiting) for _ in range(3))
    stats = next(waiting) if with_stats else None
    raw, members, bias, acc, tops, totals, arrived = waiting
    tile, last = pl.program_id(1), shape.blocks - 1
    index = pl.program_id(0) * shape.blocks + tile
    heads, near, c = shape.heads, shape.near * LANES, scale * LOG2_E
    starts = range(0, sizes.queries, sizes.chunk)
    count = jnp.maximum((counts[index] + (sizes.rows - 1)) // sizes.rows, 1) if blocks is None else blocks
    source = entries if raw.dtype == entries.dtype else entries.bitcast(raw.dtype)
    start = functools.partial(start_row, source, addresses, raw=raw, dtype=members.dtype)
    parts = len(starts)
    share, step = sizes.rows // parts, sizes.rows // LANES

    def wait(part: int) -> None:
        wait_rows(raw, arrived.at[part], slice(part * share, (part + 1) * share))

    def lines(begin: int) -> Any:
        return pl.ds(begin * heads, sizes.chunk * heads)

    attend_to = functools.partial(attend, q, bias, heads=heads, starts=starts, c=c)

    def take(block: Any) -> Iterator[None]:
        """Brings a block's keys and bias in place, and has the next block's rows come, some of them at every step.

        A start of a copy that nothing waits for the compiler leaves to the very end; it does not move it past a wait.
        """
        for part in range(max(0, parts - 2), parts):
            wait(part)
        members[...] = unpack(raw, members.dtype)
        bias[:, near:] = member_bias(words, block * step, sizes.queries, sizes.rows)
        coming = jnp.where(block + 1 < count, (block + 2) * step, 0)
        for part in range(parts):
            if part >= 2:
                wait(part - 2)
            for row in range(part * share, (part + 1) * share):
                start(first=coming, row=row, arrived=arrived.at[part])
            yield

    @pl.when((tile == 0) & (blocks is None))
    def _() -> None:
        for part in range(parts):

            def one(row: Any, _: None, part: int = part) -> None:
                start(first=step, row=row, arrived=arrived.at[part])

            jax.lax.fori_loop(part * share, (part + 1) * share, one, None)
        for part in range(parts - 2):
            wait(part)

    fetch = take(0)
    next(fetch)
    bias[:, :near] = window_bias(place[0], jnp.concatenate([s[0] for s in segments], axis=1), tile, shape, sizes)
    groups = [(0, jnp.concatenate([k[0] for k in keys], axis=0)), (near, members[...])]
    for begin, top, total, value in attend_to(groups, lambda _: per_row(sink[...], sizes.chunk)):
        for ref, x in zip((acc, tops, totals), (value, top, total), strict=True):
            ref[lines(begin)] = x
        next(fetch, None)

    def further(block: Any, _: None) -> None:
        fetch = take(block)
        next(fetch)
        groups = [(near, members[...])]
        for begin, top, total, value in attend_to(groups, lambda begin: tops[lines(begin)]):
            rescale = jnp.exp2((tops[lines(begin)] - top) * c)
            acc[lines(begin)] = acc[lines(begin)] * across(rescale, shape.dim) + value
            tops[lines(begin)] = top
            totals[lines(begin)] = totals[lines(begin)] * rescale + total
            next(fetch, None)

    jax.lax.fori_loop(1, count, further, None)
    for begin in starts:
        at = lines(begin)
        top = tops[at]
        whole = jnp.sum(totals[at], axis=1, keepdims=True) + jnp.exp2((per_row(sink[...], sizes.chunk) - top) * c)
        out[0, at] = (acc[at] * across(1.0 / whole, shape.dim)).astype(out.dtype)
        if stats is not None:
            stats[0, begin : begin + sizes.chunk] = heads_to_lanes(top * c + jnp.log2(whole), sizes.chunk, heads)

    @pl.when(tile == last)
    def _() -> None:  # what was fetched for no further tile
        for part in range(max(0, parts - 2), parts):
            wait(part)


def input_blocks(shape: Shape, sizes: UnionSizes, capacity: int) -> list[pl.BlockSpec]:
    """Blocks of addresses, words and what `kernel.input_specs` lists."""
    return [
        list_block(shape, sizes.rows + capacity, pltpu.SMEM),
        list_block(shape, capacity, pltpu.VMEM),
        *(_two_dimensional(spec) for spec in input_specs(shape, sizes)),
    ]


def list_block(shape: Shape, places: int, memory: Any) -> pl.BlockSpec:
    """A tile's part of a list with this many places."""
    index = lambda b, t, *_: (b * shape.blocks + t, 0, 0)  # noqa: E731
    return pl.BlockSpec((1, places // LANES, LANES), index, memory_space=memory)


def _two_dimensional(spec: pl.BlockSpec) -> pl.BlockSpec:
    """For a grid without the dimension of tiles of entries, of which there are none here."""
    index = spec.index_map
    assert index is not None
    return pl.BlockSpec(spec.block_shape, lambda b, t, *_: index(b, t, 0))


def forward(
    lists: Lists, given: Operands, source: jax.Array, shape: Shape, sizes: UnionSizes, *, scale: float, expected: int,
    with_stats: bool, chip: Chip, blocks: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Output [B, M, H] in q's dtype, and the statistics for the backward pass as `kernel.forward` gives them.

    Args:
      source: rows of all entries [B · P, planes, 128], see `row_words`; in bf16 on a TPU [B · P, H / 128, 128].
      expected: members of a union, for the estimate of the cost.
      blocks: fixes the number of blocks of every tile, as a cycle figure needs. None: as many as its union has.
    """
    rows, near, dtype = sizes.queries * shape.heads, shape.near * LANES, given.q.dtype
    lanes, capacity = round_up(shape.heads, LANES), lists.words[0].size
    planes, word = word_planes(shape.dim, dtype)
    row_block = pl.BlockSpec((1, rows, shape.dim), lambda b, t, *_: (b, t, 0))
    out_specs, out_shape = [row_block], [jax.ShapeDtypeStruct(given.q.shape, dtype)]
    if with_stats:
        out_specs.append(pl.BlockSpec((1, sizes.queries, lanes), lambda b, t, *_: (b, t, 0)))
        out_shape.append(jax.ShapeDtypeStruct((shape.batch, shape.blocks * sizes.queries, lanes), jnp.float32))
    found = pl.pallas_call(
        functools.partial(_gather, shape=shape, sizes=sizes, scale=scale, blocks=blocks, with_stats=with_stats),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape.batch, shape.blocks),
            in_specs=[
                *input_blocks(shape, sizes, capacity),
                pl.BlockSpec((shape.heads, LANES), lambda b, t, *_: (0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((planes, sizes.rows, LANES), word),
                pltpu.VMEM((sizes.rows, shape.dim), dtype),
                pltpu.VMEM((sizes.queries, near + sizes.rows), jnp.float32),
                *(pltpu.VMEM((rows, width), jnp.float32) for width in (shape.dim, LANES, LANES)),
                pltpu.SemaphoreType.DMA((sizes.queries // sizes.chunk,)),
            ],
        ),
        out_shape=out_shape,
        # Every address is clamped when the list is made; a check per copy would cost four times the copy's issue.
        compiler_params=compiler_params(chip, semantics=("parallel", "arbitrary"), disable_bounds_checks=True),
        cost_estimate=cost(given, shape, expected, products=2),
        name="sparse_attention_gather",
    )(*lists, *arguments(given, shape)[3:], given.sink, source)
    return found[0], found[1] if with_stats else None
