"""Forward kernel of prefill and training: window, compressed entries and sink in one softmax.

Grid (batch, block of queries, tile of entries). A block's rows are its queries × heads (one key head serves all), so
that each key tile, loaded once for scores and values, is multiplied by about 2048 rows. Step 0 takes the window (two
tiles of 128 keys, masked to the band) together with the first tile of entries that the block meets; further steps
rescale what is there; steps beyond the last tile, or at a tile that the block does not meet, do nothing and fetch
nothing. Up to 1024 entries (128K tokens at ratio 128) there is one step and no rescaling.

Within a step matrix products are asked for one chunk of rows ahead of the softmax, and one behind (`attend`), so that
the vector units work under them. Running maxima are the same in all lanes; sums stay per lane until the end. HBM: q and
the output once, keys about once, entries once per block.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from kernels_pallas.sparse_attention.block_sizes import BlockSizes, QuerySizes
from kernels_pallas.sparse_attention.layout import NEVER, WORD, Operands, Shape
from kernels_pallas.tpu import LANES, Chip, compiler_params, mean_visible, round_up

LOG2_E = math.log2(math.e)
_WORDS_PER_GROUP = LANES
_ENTRIES_PER_GROUP = LANES * WORD


# ---- pieces that the backward kernel shares --------------------------------------------------------------------------
def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over one dimension of each, accumulated in float32; float32 operands keep all their bits."""
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def window_bias(place: jax.Array, key_segment: jax.Array, block: Any, shape: Shape, sizes: QuerySizes) -> jax.Array:
    """0 where a query sees a key, `NEVER` elsewhere: [Q, near · 128].

    place: [Q, 2]. key_segment: [1, near · 128]. block: index of the block of queries.
    """
    columns = shape.near * LANES
    start = jax.lax.rem(block * sizes.queries, LANES)  # of the block within its first tile of keys
    query = start + jax.lax.broadcasted_iota(jnp.int32, (sizes.queries, columns), 0)
    distance = shape.lead + query - jax.lax.broadcasted_iota(jnp.int32, (sizes.queries, columns), 1)
    seen = (distance >= 0) & (distance < shape.window) & (key_segment == place[:, 1:2])
    return jnp.where(seen, 0.0, NEVER)


def entry_bias(
    place: jax.Array, entry_place: jax.Array, bits: jax.Array | None, tile: Any, sizes: BlockSizes
) -> jax.Array:
    """0 where a query attends to an entry of the tile, `NEVER` elsewhere: [Q, P].

    place: [Q, 2]. entry_place: [2, P]. bits: [Q, 128] words of the 4096 entries around the tile, or None.
    """
    seen = (entry_place[0:1] <= place[:, 0:1]) & (entry_place[1:2] == place[:, 1:2])
    if bits is not None:
        lane = jax.lax.broadcasted_iota(jnp.int32, (sizes.queries, LANES), 1)
        first = jax.lax.rem(tile * (sizes.entries // WORD), _WORDS_PER_GROUP)
        parts = []
        for word in range(0, sizes.entries // WORD, LANES // WORD):
            spread = jnp.take_along_axis(bits, first + word + lane // WORD, axis=1)
            parts.append(jnp.right_shift(spread, lane % WORD) & 1)
        seen &= jnp.concatenate(parts, axis=1) == 1
    return jnp.where(seen, 0.0, NEVER)


def add_bias(scores: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
    """Adds a query's row of the bias to the scores of all of its heads."""
    queries, columns = bias.shape
    return (scores.reshape(queries, heads, columns) + bias[:, None, :]).reshape(queries * heads, columns)


def lane_chunks(x: jax.Array) -> list[jax.Array]:
    """Columns in registers' widths."""
    return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]


def across(x: jax.Array, width: int) -> jax.Array:
    """Repeats [M, 128], the same in all lanes, up to a width."""
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def per_row(sink: jax.Array, queries: int) -> jax.Array:
    """Repeats [N, 128] for each query."""
    return jnp.broadcast_to(sink[None], (queries, *sink.shape)).reshape(-1, LANES)


def _diagonal(heads: int) -> list[tuple[slice, jax.Array]]:
    """Heads in groups of at most 128, and where the row of a head meets the lane that holds it: [1, heads, 128]."""
    found = []
    for start in range(0, heads, LANES):
        shape = (1, min(LANES, heads - start), LANES)
        equal = jax.lax.broadcasted_iota(jnp.int32, shape, 1) == jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        found.append((slice(start, start + shape[1]), equal))
    return found


def heads_to_lanes(x: jax.Array, queries: int, heads: int) -> jax.Array:
    """[Q · N, 128], the same in all lanes → [Q, N padded to 128] (by diagonals: no transposition)."""
    whole = x.reshape(queries, heads, LANES)
    groups = [jnp.sum(jnp.where(equal, whole[:, part], 0.0), axis=1) for part, equal in _diagonal(heads)]
    return jnp.concatenate(groups, axis=1)


def lanes_to_heads(x: jax.Array, heads: int) -> jax.Array:
    """The inverse: [Q, N padded to 128] → [Q · N, 128], the same in all lanes."""
    groups = []
    for part, equal in _diagonal(heads):
        lines = x[:, None, part.start : part.start + LANES]
        one = jnp.sum(jnp.where(equal, lines, 0.0), axis=2, keepdims=True)
        groups.append(jnp.broadcast_to(one, (x.shape[0], part.stop - part.start, LANES)))
    return jnp.concatenate(groups, axis=1).reshape(x.shape[0] * heads, LANES)


# ---- the kernel ------------------------------------------------------------------------------------------------------
Group = tuple[int, jax.Array]
"""Columns of the bias at which keys begin, and the keys."""


def attend(
    q: Any, bias: Any, groups: list[Group], floor_of: Callable[[int], jax.Array], *, heads: int, starts: range, c: float
) -> Iterator[tuple[int, jax.Array, jax.Array, jax.Array]]:
    """Chunk by chunk: its first query, the maximum of each row, Σ weights per lane, Σ weight · value.

    The compiler's scheduler keeps the order of matrix products. They are asked for one chunk ahead and one behind, so
    that a chunk's softmax has the products of two others to run under: scores of the next, values of the one before.

    Args:
      q: reference [1, M, H]. bias: reference [Q, columns]. starts: first queries of the chunks.
      floor_of: of a chunk, what the maxima are at least.
    """

    def products(start: int) -> list[jax.Array]:
        rows = q[0, pl.ds(start * heads, starts.step * heads)]
        return [product(rows, k, (1, 1)) for _, k in groups]

    def values(weights: list[jax.Array]) -> jax.Array:
        return functools.reduce(
            jnp.add, [product(w, k, (1, 0)) for w, (_, k) in zip(weights, groups, strict=True)]
        )  # fmt: skip

    ahead = products(starts[0])
    behind: tuple[int, jax.Array, jax.Array, list[jax.Array]] | None = None
    for start in starts:
        scores, later = ahead, start + starts.step
        ahead = products(later) if later in starts else []
        value = values(behind[3]) if behind else None
        part = slice(start, start + starts.step)
        scores = [
            add_bias(s, bias[part, offset : offset + s.shape[1]], heads)
            for s, (offset, _) in zip(scores, groups, strict=True)
        ]
        top = highest(scores, floor_of(start))
        total, weights = weigh(scores, top, c, q.dtype)
        if behind and value is not None:
            yield *behind[:3], value
        behind = start, top, total, weights
    assert behind
    yield *behind[:3], values(behind[3])


def weigh(scores: list[jax.Array], top: jax.Array, c: float, dtype: DTypeLike) -> tuple[jax.Array, list[jax.Array]]:
    """(Σ weights per lane, weights of each group) under the given maximum."""
    total, found = None, []
    for s in scores:
        weights = [jnp.exp2((part - top) * c) for part in lane_chunks(s)]
        for part in weights:
            total = part if total is None else total + part
        found.append(jnp.concatenate([part.astype(dtype) for part in weights], axis=1))
    assert total is not None
    return total, found


def highest(scores: list[jax.Array], floor: jax.Array) -> jax.Array:
    """Largest score of each row, at least `floor`, the same in all lanes."""
    parts = [part for s in scores for part in lane_chunks(s)]
    return jnp.maximum(floor, jnp.max(functools.reduce(jnp.maximum, parts), axis=1, keepdims=True))


def _forward(
    first: Any, count: Any, flags: Any, *refs: Any, shape: Shape, sizes: BlockSizes, scale: float, with_stats: bool
) -> None:
    """The grid step.

    refs: q [1, M, H], place [1, Q, 2], near × keys [1, 128, H], near × key_segment [1, 1, 128], then with entries
    entries [1, P, H], entry_place [1, 2, P] and with a selection bits [1, Q, 128]; sink [N, 128]; out [1, M, H],
    stats [1, Q, N]; scratch bias [Q, columns] and beyond one tile acc [M, H], top [M, 128], total [M, 128].
    """
    waiting = iter(refs)
    q, place = next(waiting), next(waiting)
    keys, segments = [next(waiting) for _ in range(shape.near)], [next(waiting) for _ in range(shape.near)]
    entries, entry_place = (next(waiting), next(waiting)) if shape.tiles else (None, None)
    bits = next(waiting) if shape.has_bits else None
    sink, out = next(waiting), next(waiting)
    stats = next(waiting) if with_stats else None
    bias, *carried = waiting
    block, step = pl.program_id(1), pl.program_id(2)
    index = pl.program_id(0) * shape.blocks + block
    heads, near, c = shape.heads, shape.near * LANES, scale * LOG2_E
    starts = range(0, sizes.queries, sizes.chunk)

    def lines(start: int) -> Any:
        return pl.ds(start * heads, sizes.chunk * heads)

    attend_to = functools.partial(attend, q, bias, heads=heads, starts=starts, c=c)

    def far_bias(tile: Any) -> jax.Array:
        assert entry_place is not None
        return entry_bias(place[0], entry_place[0], None if bits is None else bits[0], tile, sizes)

    def finish(start: int, total: jax.Array, top: jax.Array, value: jax.Array) -> None:
        whole = jnp.sum(total, axis=1, keepdims=True) + jnp.exp2((per_row(sink[...], sizes.chunk) - top) * c)
        out[0, lines(start)] = (value * across(1.0 / whole, shape.dim)).astype(out.dtype)
        if stats is not None:
            stats[0, start : start + sizes.chunk] = heads_to_lanes(top * c + jnp.log2(whole), sizes.chunk, heads)

    @pl.when(step == 0)
    def _() -> None:
        bias[:, :near] = window_bias(place[0], jnp.concatenate([s[0] for s in segments], axis=1), block, shape, sizes)
        groups = [(0, jnp.concatenate([k[0] for k in keys], axis=0))]
        if entries is not None:
            bias[:, near:] = far_bias(first[index])
            groups.append((near, entries[0]))
        for start, top, total, value in attend_to(groups, lambda _: per_row(sink[...], sizes.chunk)):
            if carried:
                for ref, x in zip(carried, (value, top, total), strict=True):
                    ref[lines(start)] = x
            else:
                finish(start, total, top, value)

    if not carried:
        return
    acc, tops, totals = carried
    tile = jnp.minimum(first[index] + step, shape.tiles - 1)
    word = flags[index * shape.words + jax.lax.div(tile, WORD)]
    is_met = jnp.bitwise_and(jnp.right_shift(word, jax.lax.rem(tile, WORD)), 1) == 1

    @pl.when((step > 0) & (step < count[index]) & is_met)
    def _() -> None:
        assert entries is not None
        bias[:, near:] = far_bias(tile)
        groups = [(near, entries[0])]
        for start, top, total, value in attend_to(groups, lambda start: tops[lines(start)]):
            rescale = jnp.exp2((tops[lines(start)] - top) * c)
            acc[lines(start)] = acc[lines(start)] * across(rescale, shape.dim) + value
            tops[lines(start)] = top
            totals[lines(start)] = totals[lines(start)] * rescale + total

    @pl.when(step == shape.tiles - 1)
    def _() -> None:
        for start in starts:
            finish(start, totals[lines(start)], tops[lines(start)], acc[lines(start)])


def input_specs(shape: Shape, sizes: QuerySizes) -> list[pl.BlockSpec]:
    """Blocks of q, place, keys, key_segment, entries, entry_place and bits, as far as they exist."""
    steps = shape.tiles

    def tile(b: Any, i: Any, j: Any, first: Any, count: Any) -> Any:
        index = b * shape.blocks + i
        return first[index] + jnp.minimum(j, count[index] - 1)

    def near(k: int, *, is_row: bool) -> Any:
        def place(b: Any, i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
            at = jax.lax.div(i * sizes.queries, LANES) + k
            return (b, 0, at) if is_row else (b, at, 0)

        return place

    specs = [
        pl.BlockSpec((1, sizes.queries * shape.heads, shape.dim), lambda b, i, j, *_: (b, i, 0)),
        pl.BlockSpec((1, sizes.queries, 2), lambda b, i, j, *_: (b, i, 0)),
        *(pl.BlockSpec((1, LANES, shape.dim), near(k, is_row=False)) for k in range(shape.near)),
        *(pl.BlockSpec((1, 1, LANES), near(k, is_row=True)) for k in range(shape.near)),
    ]
    if steps:
        assert isinstance(sizes, BlockSizes)
        entries = sizes.entries
        specs += [
            pl.BlockSpec((1, entries, shape.dim), lambda b, i, j, f, n, _: (b, tile(b, i, j, f, n), 0)),
            pl.BlockSpec((1, 2, entries), lambda b, i, j, f, n, _: (b, 0, tile(b, i, j, f, n))),
        ]
        if shape.has_bits:

            def group(b: Any, i: Any, j: Any, f: Any, n: Any, _: Any) -> tuple[Any, ...]:
                return b, i, jax.lax.div(tile(b, i, j, f, n) * entries, _ENTRIES_PER_GROUP)

            specs.append(pl.BlockSpec((1, sizes.queries, LANES), group))
    return specs


def arguments(given: Operands, shape: Shape) -> list[jax.Array]:
    """The arrays in the order of `input_specs`, the prefetched scalars in front."""
    optional = (given.entries, given.entry_place, given.bits)
    return [
        given.first, given.length, given.flags, given.q, given.place, *[given.keys] * shape.near,
        *[given.key_segment] * shape.near, *(x for x in optional if x is not None),
    ]  # fmt: skip


def forward(
    given: Operands, shape: Shape, sizes: BlockSizes, *, scale: float, with_stats: bool, chip: Chip
) -> tuple[jax.Array, jax.Array | None]:
    """Output [B, M, H] in q's dtype, and the statistics for the backward pass.

    The statistics are float32 [B, S, N padded to 128]: log2 of the softmax's denominator (sink included).
    """
    rows, near = sizes.queries * shape.heads, shape.near * LANES
    lanes = round_up(shape.heads, LANES)
    columns = near + (sizes.entries if shape.tiles else 0)
    row_block = pl.BlockSpec((1, rows, shape.dim), lambda b, i, j, *_: (b, i, 0))
    out_specs, out_shape = [row_block], [jax.ShapeDtypeStruct(given.q.shape, given.q.dtype)]
    if with_stats:
        out_specs.append(pl.BlockSpec((1, sizes.queries, lanes), lambda b, i, j, *_: (b, i, 0)))
        out_shape.append(jax.ShapeDtypeStruct((shape.batch, shape.blocks * sizes.queries, lanes), jnp.float32))
    scratch = [pltpu.VMEM((sizes.queries, columns), jnp.float32)]
    if shape.tiles > 1:
        scratch += [pltpu.VMEM((rows, width), jnp.float32) for width in (shape.dim, LANES, LANES)]
    grid = (shape.batch, shape.blocks, max(shape.tiles, 1))
    found = pl.pallas_call(
        functools.partial(_forward, shape=shape, sizes=sizes, scale=scale, with_stats=with_stats),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[*input_specs(shape, sizes), pl.BlockSpec((shape.heads, LANES), lambda b, i, j, *_: (0, 0))],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=compiler_params(chip, semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(given, shape, entries_met(shape, sizes), products=2),
        name="sparse_attention_forward",
    )(*arguments(given, shape), given.sink)
    return found[0], found[1] if with_stats else None


def entries_met(shape: Shape, sizes: BlockSizes) -> int:
    """Entries that a block of queries meets in the tiles that causality leaves it, on average."""
    return round(mean_visible(shape.tiles) * sizes.entries)


def cost(given: Operands, shape: Shape, met: int, *, products: int) -> pl.CostEstimate:
    """Work of the whole grid, every block meeting its window and so many entries.

    products: matrix products per pair of a row and a key.
    """
    pairs = given.q.shape[0] * given.q.shape[1] * (shape.near * LANES + met)
    read = sum(x.size * x.dtype.itemsize for x in given if x is not None and x is not given.entries)
    read += shape.batch * shape.blocks * met * shape.dim * given.q.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * pairs * shape.dim,
        transcendentals=pairs,
        bytes_accessed=read + (products - 1) * given.q.size * given.q.dtype.itemsize,
    )
