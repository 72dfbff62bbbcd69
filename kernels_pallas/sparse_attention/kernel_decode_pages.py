"""Decode over the window and all visible entries, which lie in order: one query per sequence, entries by whole pages.

Grid: (sequences, pages). A step adds one page to the running softmax in VMEM; the window comes with the first. Pages
beyond a sequence's last one name the next sequence's first page, so that the pipeline fetches that early and nothing
twice; their steps do nothing else. Without entries, or where one page holds them all, a step takes a group of sequences
instead: they share its overhead, and none waits for its own products and maxima.

In VMEM: two pages (the pipeline's buffers), window, queries, running sums. Each entry crosses HBM once for all heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.sparse_attention.block_sizes_decode import DecodeBlockSizes
from kernels_pallas.sparse_attention.decode_softmax import (
    LOG2_E,
    Softmax,
    clear_from,
    dot,
    in_one_block,
    output_shapes,
    spread,
    write_outputs,
)
from kernels_pallas.tpu import LANES, Chip, cdiv, check_vmem, compiler_params, round_up, tile_bytes


def _scores(query, keys, count):
    scores = dot(query, keys, ((1,), (1,)))
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (1, keys.shape[0]), 1) < count, scores, -jnp.inf)


def _sinks(sink):
    """[1, N] → [N, 128] of equal lanes, in powers of 2."""
    return jnp.broadcast_to(sink[...] * LOG2_E, (LANES, sink.shape[1])).T


def _window_kernel(layer, ring_count, entry_count, q, ring, sink, *rest, scale: float, is_partial: bool):
    """Blocks: q [G, N, H], ring [1, G, W, H], sink [1, N], outputs [G, N, ·]; scratch: weights, maxima, totals."""
    del layer, entry_count
    outputs, (weights, top, total) = rest[:-3], rest[-3:]

    @in_one_block
    def _():
        before = (None, None)
        if not is_partial:
            sinks = _sinks(sink)
            before = (sinks, jnp.ones(sinks.shape, jnp.float32))
        for row in range(q.shape[0]):
            count = ring_count[pl.program_id(0) * q.shape[0] + row]
            ring[0, row] = clear_from(ring[0, row], count)
            softmax = Softmax.of([_scores(q[row], ring[0, row], count)], scale, *before)
            weights[row], top[row], total[row] = softmax.weights[0].astype(ring.dtype), softmax.top, softmax.total

    for row in range(q.shape[0]):
        write_outputs(outputs, row, dot(weights[row], ring[0, row], ((1,), (0,))), top[row], total[row])


def _kernel(
    layer,  # SMEM [1]
    ring_count,  # SMEM [B]
    entry_count,  # SMEM [B]
    q,  # [1, N, H]
    ring,  # [1, 1, W, H]
    sink,  # [1, N]
    entries,  # [1, 1, page, H]
    *rest,  # outputs o, m, l [1, N, ·]; scratch: running sums [N, H], maxima and totals [N, 128]
    scale: float,
    is_partial: bool,
):
    outputs, (sums, top, total) = rest[:-3], rest[-3:]
    sequence, page = pl.program_id(0), pl.program_id(1)
    size = entries.shape[2]
    count = entry_count[sequence] - page * size

    @pl.when(page == 0)
    def _():
        keys = clear_from(ring[0, 0], ring_count[sequence])
        before = (None, None)
        if not is_partial:
            sinks = _sinks(sink)
            before = (sinks, jnp.ones(sinks.shape, jnp.float32))
        softmax = Softmax.of([_scores(q[0], keys, ring_count[sequence])], scale, *before)
        sums[...] = dot(softmax.weights[0].astype(keys.dtype), keys, ((1,), (0,)))
        top[...], total[...] = softmax.top, softmax.total

    @pl.when((count > 0) & (count < size))
    def _():
        entries[0, 0] = clear_from(entries[0, 0], count)

    @pl.when(count > 0)
    def _():
        softmax = Softmax.of([_scores(q[0], entries[0, 0], count)], scale, top[...], total[...])
        added = dot(softmax.weights[0].astype(entries.dtype), entries[0, 0], ((1,), (0,)))
        sums[...] = sums[...] * spread(jnp.exp2(top[...] - softmax.top), added.shape[1]) + added
        top[...], total[...] = softmax.top, softmax.total

    @pl.when(page == pl.num_programs(1) - 1)
    def _():
        write_outputs(outputs, 0, sums[...], top[...], total[...])


def _whole_tiles(size: int) -> int:
    """Entries of a page in whole tiles of a 256 wide matrix unit; the rest shares a tile with the window."""
    return size // (2 * LANES) * (2 * LANES)


def _one_page_kernel(
    layer, ring_count, entry_count, q, ring, sink, *rest, copies: int, scale: float, is_partial: bool
):  # fmt: skip
    """A group of sequences where one page holds all entries: one softmax over window and page, without conditions.

    Blocks: as `_window_kernel`, copies × entries [1, G / copies, page, H]; scratch: [G, K, H] for the window and what
    is no whole tile of the page. Scores, softmaxes and values of the group are each asked for together.
    """
    del layer
    pages, outputs, tail = rest[:copies], rest[copies:-1], rest[-1]
    entries = [part.at[0, row] for part in pages for row in range(part.shape[1])]
    size, window = entries[0].shape[0], ring.shape[2]
    whole, first = _whole_tiles(size), pl.program_id(0) * q.shape[0]

    @pl.when(first == 0)
    def _():
        tail[...] = jnp.zeros_like(tail)

    for row in range(q.shape[0]):
        count = entry_count[first + row]
        if whole:

            @pl.when(count < whole)
            def _(row=row, count=count):
                entries[row][:whole] = clear_from(entries[row][:whole], count)

    before = (None, None)
    if not is_partial:
        sinks = _sinks(sink)
        before = (sinks, jnp.ones(sinks.shape, jnp.float32))

    def scores(row):
        count, near = entry_count[first + row], ring_count[first + row]
        tail[row, :window] = clear_from(ring[0, row], near)
        if size > whole:
            tail[row, window : window + size - whole] = clear_from(entries[row][whole:], count - whole)
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, tail.shape[1]), 1)
        is_seen = (slot < jnp.minimum(near, window)) | ((slot >= window) & (slot - window < count - whole))
        found = [jnp.where(is_seen, dot(q[row], tail[row], ((1,), (1,))), -jnp.inf)]
        return found + ([_scores(q[row], entries[row][:whole], count)] if whole else [])

    softmaxes = [Softmax.of(found, scale, *before) for found in [scores(row) for row in range(q.shape[0])]]
    for row, softmax in enumerate(softmaxes):
        weights = [w.astype(tail.dtype) for w in softmax.weights]
        sums = dot(weights[0], tail[row], ((1,), (0,)))
        if whole:
            sums = sums + dot(weights[1], entries[row][:whole], ((1,), (0,)))
        write_outputs(outputs, row, sums, softmax.top, softmax.total)


def attend_pages(
    layer: jax.Array, ring_count: jax.Array, entry_count: jax.Array, q: jax.Array, ring: jax.Array, sink: jax.Array,
    entries: jax.Array | None, *, scale: float, is_partial: bool, chip: Chip, block_sizes: DecodeBlockSizes,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The kernel. Shapes: layer [1], counts [B], q [B, N, H], ring [L, B, W, H], sink [N], entries [L, B, P, H].

    Returns:
      As `decode_softmax.output_shapes`.

    Raises:
      ValueError: the blocks do not fit the chip's VMEM.
    """
    batch, heads, dim = q.shape
    window = ring.shape[2]
    size = 0 if entries is None else entries.shape[2]
    pages, copies = cdiv(size, block_sizes.page) if size else 1, 1
    group = 1 if pages > 1 else min(block_sizes.paged_sequences if size else block_sizes.sequences, batch)
    page = round_up(cdiv(size, pages), 16)
    lacking = [(0, round_up(batch, group) - batch)]
    ring_count, entry_count = jnp.pad(ring_count, lacking), jnp.pad(entry_count, lacking)
    outputs = output_shapes(q.shape, q.dtype, is_partial)
    scratch: list[tuple[tuple[int, ...], Any]] = [((heads, dim), jnp.float32), *[((heads, LANES), jnp.float32)] * 2]
    kernel, name = _kernel, "pages"
    if not size:
        kernel, name = _window_kernel, "window"
        scratch = [((group, heads, window), ring.dtype), *[((group, heads, LANES), jnp.float32)] * 2]
    elif pages == 1:
        copies = 2 if group % 2 == 0 else 1  # on the way at a time: one alone does not use the whole bandwidth
        kernel, whole = functools.partial(_one_page_kernel, copies=copies), _whole_tiles(page)
        scratch = [((group, round_up(window + page - whole, LANES), dim), ring.dtype)]
    blocks = [((group, heads, dim), q.dtype), ((group, window, dim), ring.dtype), ((1, heads), jnp.float32)]
    blocks += [((group, page, dim), ring.dtype)] if size else []
    blocks += [((group, *x.shape[1:]), x.dtype) for x in outputs]
    needed = 2 * sum(tile_bytes(*b) for b in blocks) + sum(tile_bytes(*b) for b in scratch)
    columns = page if pages > 1 else group * (window + (page if size else 0))
    needed += tile_bytes((heads, columns), jnp.float32) * 3  # scores and weights, where they spill
    check_vmem(
        f"sparse_attention_decode of {heads} heads × {dim}, window {window}, pages of {page} entries", needed, chip,
        "give smaller block_sizes, or shard the heads over more devices",
    )  # fmt: skip

    def place(b, p, layer, _, entry_count, part: int = 0):
        if pages == 1:  # a group may lack sequences
            return layer[0], jnp.minimum(b * copies + part, cdiv(batch * copies, group) - 1), 0, 0
        is_seen = p * page < entry_count[b]
        # The last sequence has no successor: it repeats a page.
        following = jnp.minimum(b + 1, batch - 1)
        return layer[0], jnp.where(is_seen, b, following), jnp.where(is_seen, p, 0), 0

    in_specs = [
        pl.BlockSpec((group, heads, dim), lambda b, *_: (b, 0, 0)),
        pl.BlockSpec((1, group, window, dim), lambda b, p, layer, *_: (layer[0], b, 0, 0)),
        pl.BlockSpec((1, heads), lambda b, *_: (0, 0)),
    ]
    if size:
        block = (1, group // copies, page, dim)
        in_specs += [pl.BlockSpec(block, functools.partial(place, part=part)) for part in range(copies)]
    keys = window + size
    return pl.pallas_call(
        functools.partial(kernel, scale=scale, is_partial=is_partial),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cdiv(batch, group), pages),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((group, *x.shape[1:]), lambda b, *_: (b, 0, 0)) for x in outputs],
            scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch],
        ),
        compiler_params=compiler_params(chip, semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * keys * dim,
            transcendentals=batch * heads * (keys + 1),
            bytes_accessed=batch * dim * (keys * ring.dtype.itemsize + 2 * heads * q.dtype.itemsize),
        ),
        name=f"sparse_attention_decode_{name}",
    )(layer, ring_count, entry_count, q, ring, sink[None], *([entries] * copies if size else []))
