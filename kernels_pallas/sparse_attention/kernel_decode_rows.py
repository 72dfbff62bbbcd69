"""Decode over selected rows: one query per sequence against its window and the rows that a selection names.

Grid: one step per sequence and one more. Step s computes sequence s − 1 while the rows of sequence s come in: one copy
each, HBM → VMEM, from addresses that lie ready in SMEM. Rows, addresses and buffers go by chunks. A chunk's buffer is
read into the keys and then at once takes the next sequence's copies, so that every address is a constant of the program
and a whole sequence of rows is always under way.

What bounds it is the issue of the copies: 3.5 bundles each (load the index, scale it, add the base; form the VMEM
address, two operations; start). All else is scheduled between them, for which each block of code between two waits
has its share of copies: some are left from chunk to chunk, and half a chunk of them to the next step.

How rows lie in HBM and become keys: `row_words`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.sparse_attention.decode_softmax import (
    LOG2_E,
    Softmax,
    clear_from,
    dot,
    output_shapes,
    write_outputs,
)
from kernels_pallas.sparse_attention.row_words import pack, place_of_row, unpack, word_planes
from kernels_pallas.tpu import LANES, SUBLANES, Chip, cdiv, check_vmem, compiler_params, round_up, tile_bytes

CHUNK = LANES
"""Rows of a chunk: its selection is then one row of a register."""


_TAIL = 80
"""Copies that the last chunk starts beyond its share: the softmax and the second product come in its block of code."""


def chunk_rows(topk: int) -> tuple[int, int]:
    """Number of chunks, at least 2, and rows of each, an even number."""
    rows = min(CHUNK, round_up(cdiv(topk, 2), 16))
    return max(2, cdiv(topk, rows)), rows


def _kernel(
    layer,  # SMEM [1]
    ring_count,  # SMEM [B]
    entry_count,  # SMEM [B]
    q,  # [1, N, H]
    ring,  # [1, 1, W, H]
    sink,  # [1, N]
    selection,  # [B rounded up to 8, C · 128]
    entries,  # HBM [L · B · P, H / 128, 128], or as words [L · B · P, H / 256, 128]
    *rest,  # outputs o, m, l; scratch
    batch: int,
    size: int,
    rows: int,
    scale: float,
    is_partial: bool,
):
    outputs = rest[: 3 if is_partial else 1]
    sinks, keys, raw, index_vmem, index_smem, row_arrived, index_arrived = rest[len(outputs) :]
    step = pl.program_id(0)
    chunks, window = index_vmem.shape[0], ring.shape[2]
    last, carried = chunks - 1, rows // 2
    own = jnp.maximum(step - 1, 0)  # its result is computed in this step
    coming = jnp.minimum(step, batch - 1)  # its rows are fetched in this step
    following = jnp.minimum(step + 1, batch - 1)
    words = entries if entries.dtype.itemsize == 4 else entries.bitcast(jnp.uint32)

    def chosen_and_seen(sequence, c):
        # One row at a dynamic place: a whole register of rows, of which the right one is rolled to the front.
        group = pl.ds(pl.multiple_of(sequence // SUBLANES * SUBLANES, SUBLANES), SUBLANES)
        registers = selection[group, c * LANES : (c + 1) * LANES]
        index = pltpu.roll(registers, SUBLANES - sequence % SUBLANES, 0)[:1]
        return index, (index >= 0) & (index < entry_count[sequence])

    def start_indices(c, sequence):
        """Brings the addresses of a chunk's rows to SMEM. An entry that is not seen becomes the first, which is."""
        index, is_seen = chosen_and_seen(sequence, c)
        index_vmem[pl.ds(c, 1)] = jnp.where(is_seen, index, 0) + (layer[0] * batch + sequence) * size
        pltpu.make_async_copy(index_vmem.at[c], index_smem.at[c], index_arrived.at[c]).start()

    def wait_indices(c):
        pltpu.make_async_copy(index_vmem.at[c], index_smem.at[c], index_arrived.at[c]).wait()

    waiting: list[tuple[int, int]] = [(last, i) for i in range(rows - carried, rows)]
    """Rows to fetch whose buffers are free: first those of the step before that it left to this one."""

    def fetch(count):
        for _ in range(count):
            c, i = waiting.pop(0)
            place = place_of_row(i, rows, keys.dtype)
            pltpu.make_async_copy(words.at[index_smem[c, i]], raw.at[c, :, place], row_arrived.at[c]).start()
            if i == rows - 1:
                start_indices(c, coming if c == last else following)

    def wait_rows(c, count=rows):
        arrived = raw.at[c, :, pl.ds(0, count)]
        pltpu.make_async_copy(arrived, arrived, row_arrived.at[c]).wait()

    @pl.when(step == 0)
    def _():
        sinks[...] = jnp.broadcast_to(sink[...] * LOG2_E, (LANES, sinks.shape[0])).T
        for c in range(chunks):
            start_indices(c, 0)
        wait_indices(last)

    query, scores = q[0], []
    keys[pl.ds(chunks * rows, window)] = clear_from(ring[0, 0], ring_count[own])
    for c in range(chunks):
        wait_indices(c)

        @pl.when(step > 0)
        def _(c=c):
            wait_rows(c)

        chunk = unpack(raw.at[c], keys.dtype, entry_count[own] > 0)
        keys[pl.ds(c * rows, rows)] = chunk
        is_seen = chosen_and_seen(own, c)[1][:, :rows]
        scores.append(jnp.where(is_seen, dot(query, chunk, ((1,), (1,))), -jnp.inf))
        waiting += [(c, i) for i in range(rows)]
        fetch(rows - min(_TAIL, rows) // chunks if c < last else len(waiting) - carried)

    near = dot(query, keys[pl.ds(chunks * rows, window)], ((1,), (1,)))
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, window), 1)
    scores.append(jnp.where(slot < ring_count[own], near, -jnp.inf))
    before = (None, None) if is_partial else (sinks[...], jnp.ones(sinks.shape, jnp.float32))
    softmax = Softmax.of(scores, scale, *before)
    weights = jnp.concatenate([w.astype(keys.dtype) for w in softmax.weights], axis=1)
    write_outputs(outputs, 0, dot(weights, keys[...], ((1,), (0,))), softmax.top, softmax.total)

    @pl.when(step == 0)
    def _():  # the half that the first chunk fetched for no sequence
        wait_rows(last, carried)

    @pl.when(step == batch)
    def _():  # what was fetched for no further sequence
        for c in range(last):
            wait_indices(c)
            wait_rows(c)
        wait_rows(last, rows - carried)


def attend_rows(
    layer: jax.Array, ring_count: jax.Array, entry_count: jax.Array, q: jax.Array, ring: jax.Array, sink: jax.Array,
    entries: jax.Array, selection: jax.Array, *, scale: float, is_partial: bool, chip: Chip,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The kernel. Shapes: layer [1], counts [B], q [B, N, H], ring [L, B, W, H], sink [N],
    entries [L, B, P, H/128, 128] (H a multiple of 256 in bf16, of 128 in float32), selection [B, K].

    Returns:
      As `decode_softmax.output_shapes`.

    Raises:
      ValueError: the blocks do not fit the chip's VMEM.
    """
    batch, heads, dim = q.shape
    layers, _, window, _ = ring.shape
    chunks, rows = chunk_rows(selection.shape[1])
    lacking = (round_up(batch, SUBLANES) - batch, chunks * rows - selection.shape[1])
    selection = jnp.pad(selection, [(0, count) for count in lacking], constant_values=-1)
    if rows < LANES:
        selection = jnp.pad(selection.reshape(-1, chunks, rows), ((0, 0), (0, 0), (0, LANES - rows)))
        selection = selection.reshape(-1, chunks * LANES)
    topk = chunks * rows
    dtype = entries.dtype
    planes, word = word_planes(dim, dtype)
    outputs = output_shapes(q.shape, q.dtype, is_partial)
    scratch = [
        ((heads, LANES), jnp.float32),
        ((window + topk, dim), dtype),
        ((chunks, planes, rows, LANES), word),
        ((chunks, LANES), jnp.int32),
    ]
    blocks = [((heads, dim), q.dtype), ((window, dim), ring.dtype), ((1, heads), jnp.float32)]
    blocks += [(selection.shape, jnp.int32)] + [(x.shape[1:], x.dtype) for x in outputs]
    needed = 2 * sum(tile_bytes(*b) for b in blocks) + sum(tile_bytes(*b) for b in scratch)
    needed += tile_bytes((heads, window + topk), jnp.float32) * 3  # scores and weights, where they spill
    check_vmem(
        f"sparse_attention_decode of {heads} heads × {dim}, window {window}, top-k {topk}", needed, chip,
        "shard the heads over more devices",
    )  # fmt: skip

    def before(step: jax.Array) -> jax.Array:
        return jnp.maximum(step - 1, 0)

    in_specs = [
        pl.BlockSpec((1, heads, dim), lambda s, *_: (before(s), 0, 0)),
        pl.BlockSpec((1, 1, window, dim), lambda s, layer, *_: (layer[0], before(s), 0, 0)),
        pl.BlockSpec((1, heads), lambda s, *_: (0, 0)),
        pl.BlockSpec(selection.shape, lambda s, *_: (0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    keys = window + topk
    call = pl.pallas_call(
        functools.partial(_kernel, batch=batch, size=entries.shape[2], rows=rows, scale=scale, is_partial=is_partial),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch + 1,),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda s, *_: (before(s), 0, 0)) for x in outputs],
            scratch_shapes=[
                *(pltpu.VMEM(*shape) for shape in scratch),
                pltpu.SMEM((chunks, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((chunks,)),
                pltpu.SemaphoreType.DMA((chunks,)),
            ],
        ),
        # Every address is clamped before it is used, and a check per copy would cost four times the copy's issue.
        compiler_params=compiler_params(chip, semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * keys * dim,
            transcendentals=batch * heads * (keys + 1),
            bytes_accessed=batch * dim * (keys * dtype.itemsize + 2 * heads * q.dtype.itemsize),
        ),
        name="sparse_attention_decode_rows",
    )
    near = (layer, ring_count, entry_count, q, ring, sink[None], selection)
    flat = entries.reshape(layers * batch * entries.shape[2], dim // LANES, LANES)
    if word == dtype:
        return call(*near, flat)
    # The interpreter cannot reinterpret an array that it copies from: off TPU the words are made beforehand.
    return jax.lax.platform_dependent(flat, tpu=lambda x: call(*near, x), default=lambda x: call(*near, pack(x)))
