"""`sparse_attention` by the Pallas kernels, differentiable: blocks, padding, statistics, gradients back in shape."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.sparse_attention import kernel, kernel_bwd, prefill_union
from kernels_pallas.sparse_attention.block_sizes import (
    BlockSizes,
    backward_bytes,
    check_backward,
    check_forward,
    default_block_sizes,
)
from kernels_pallas.sparse_attention.block_sizes_union import UnionSizes, default_union_sizes
from kernels_pallas.sparse_attention.kernel_bits import bits_of_selection
from kernels_pallas.sparse_attention.layout import (
    NEVER,
    Shape,
    join_near,
    operands,
    pad_to,
    rows,
    shape_of,
    unrows,
)
from kernels_pallas.tpu import SUBLANES, Chip, current_chip, round_up, vmem_budget

_SPLIT = 4096
"""Entries per register row of mask words: long contexts are differentiated in multiples of it."""


class _Places(NamedTuple):
    """Arrays without gradients."""

    q_position: jax.Array
    q_segment: jax.Array
    key_segment: jax.Array
    entry_end: jax.Array | None
    entry_segment: jax.Array | None
    selection: jax.Array | None
    """A list, which the union path alone takes."""
    bits: jax.Array | None
    """A mask, which both paths take."""


class _Static(NamedTuple):
    window: int
    scale: float
    forward: BlockSizes
    backward: BlockSizes
    union: tuple[UnionSizes, UnionSizes] | None
    """Forward and backward, of the union path where it is taken."""
    topk: int
    """Most entries that a query has selected, on the union path."""
    chip: Chip


def sparse_attention(
    q: Float[Array, "B S N H"],
    keys: Float[Array, "B WS H"],
    sink: Float[Array, " N"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    key_segment: Int[Array, "B WS"],
    entries: Float[Array, "B P H"] | None,
    entry_end: Int[Array, "B P"] | None,
    entry_segment: Int[Array, "B P"] | None,
    selection: Int[Array, "B S K"] | None,
    selection_mask: Int[Array, "B S D"] | None = None,
    *,
    window: int,
    scale: float,
    sound_topk: int | None = None,
    forward_sizes: BlockSizes | None = None,
    backward_sizes: BlockSizes | None = None,
    union_sizes: tuple[UnionSizes, UnionSizes] | None = None,
) -> Float[Array, "B S N H"]:
    """See `api.sparse_attention`.

    The union path is taken for a sound selection of which `prefill_union.is_worth_it` says so, or where its block sizes
    are given; the dense one otherwise. Block sizes: None for those of the chip that is compiled for.

    Raises:
      ValueError: blocks that do not fit into VMEM, with the bytes needed and available.
    """
    if q.size == 0:
        return q
    size = 0 if entries is None else entries.shape[1]
    if size == 0:
        entries, entry_end, entry_segment, selection, selection_mask = None, None, None, None, None
    heads = round_up(q.shape[2], SUBLANES)
    is_selective = selection is not None or selection_mask is not None
    if sound_topk is None or not is_selective:
        union_sizes = None
    elif prefill_union.is_worth_it(max(sound_topk, 0 if selection is None else selection.shape[-1]), size, heads):
        union_sizes = union_sizes or default_union_sizes(heads, q.dtype, current_chip())
    if selection is not None and union_sizes is None:
        selection, selection_mask = None, bits_of_selection(selection, size, current_chip())
    static = _Static(
        window, scale,
        forward_sizes or default_block_sizes(heads, size, q.dtype),
        backward_sizes or default_block_sizes(heads, size, q.dtype, is_backward=True),
        union_sizes, min(sound_topk or 0, size), current_chip(),
    )  # fmt: skip
    places = _Places(q_position, q_segment, key_segment, entry_end, entry_segment, selection, selection_mask)
    if selection_mask is not None:
        places = places._replace(bits=selection_mask.astype(jnp.int32))
    return _attention(static, q, keys, sink, entries, places)


def _shape(static: _Static, sizes: BlockSizes, q: jax.Array, entries: jax.Array | None, places: _Places) -> Shape:
    return shape_of(q, static.window, entries, places.bits is not None, sizes)


def _operands(static: _Static, sizes: BlockSizes, q: Any, keys: Any, sink: Any, entries: Any, places: _Places) -> Any:
    shape = _shape(static, sizes, q, entries, places)
    return operands(
        q, keys, sink, places.q_position, places.q_segment, places.key_segment, entries, places.entry_end,
        places.entry_segment, places.bits, shape, sizes, static.scale,
    )  # fmt: skip


def _run(
    static: _Static, q: Any, keys: Any, sink: Any, entries: Any, places: _Places, *, with_stats: bool
) -> tuple[jax.Array, jax.Array | None]:
    if static.union is not None:
        return prefill_union.run(*_of_union(static, q, keys, sink, entries, places), with_stats=with_stats)
    sizes = static.forward
    shape = _shape(static, sizes, q, entries, places)
    check_forward(sizes, shape.heads, shape.dim, shape.window, shape.tiles, q.dtype, static.chip)
    given = _operands(static, sizes, q, keys, sink, entries, places)
    out, stats = kernel.forward(given, shape, sizes, scale=static.scale, with_stats=with_stats, chip=static.chip)
    return unrows(out, shape, q), stats if stats is None else stats[:, : q.shape[1]]


def _of_union(static: _Static, q: Any, keys: Any, sink: Any, entries: Any, places: _Places) -> tuple[Any, ...]:
    assert static.union is not None
    own = prefill_union.Static(static.window, static.scale, static.topk, *static.union, static.chip)
    return own, q, keys, sink, entries, prefill_union.Places(*places[:3], places.selection, places.bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: Any, keys: Any, sink: Any, entries: Any, places: _Places) -> jax.Array:
    return _run(static, q, keys, sink, entries, places, with_stats=False)[0]


def _attention_fwd(static: _Static, q: Any, keys: Any, sink: Any, entries: Any, places: _Places) -> Any:
    out, stats = _run(static, q, keys, sink, entries, places, with_stats=True)
    return out, (q, keys, sink, entries, places, out, stats)


def _attention_bwd(static: _Static, saved: Any, d_out: jax.Array) -> Any:
    q, keys, sink, entries, places, out, stats = saved
    if static.union is not None:
        given = _of_union(static, q, keys, sink, entries, places)
        found = prefill_union.gradients(*given, out=out, d_out=d_out, stats=stats)
        return *(x.astype(like.dtype) for x, like in zip(found, (q, keys, sink, entries), strict=True)), None
    parts = _splits(static, q, entries, places)
    dq, dkeys, dsink, dentries = 0.0, 0.0, 0.0, []
    for number, (begin, end) in enumerate(parts):
        near = places.key_segment if number == 0 else jnp.full_like(places.key_segment, -1)
        part = places._replace(key_segment=near)
        some = None
        if entries is not None:
            some = entries[:, begin:end]
            part = part._replace(
                entry_end=part.entry_end[:, begin:end],  # pyright: ignore[reportOptionalSubscript]
                entry_segment=part.entry_segment[:, begin:end],  # pyright: ignore[reportOptionalSubscript]
                bits=None if part.bits is None else part.bits[..., begin // 32 : -(-end // 32)],
            )
        found = _gradients(static, q, keys, sink, some, part, out, d_out, stats, is_whole=len(parts) == 1)
        dq += found[0]
        dentries.append(found[3])
        if number == 0:
            dkeys, dsink = found[1], found[2]
    far = None if entries is None else jnp.concatenate(dentries, axis=1).astype(entries.dtype)
    return (
        dq.astype(q.dtype), dkeys.astype(keys.dtype), dsink.astype(sink.dtype), far, None,  # pyright: ignore
    )  # fmt: skip


_attention.defvjp(_attention_fwd, _attention_bwd)


def _splits(static: _Static, q: jax.Array, entries: jax.Array | None, places: _Places) -> list[tuple[int, int]]:
    """Ranges of entries whose gradients fit into VMEM; the first range goes with the window."""
    if entries is None:
        return [(0, 0)]
    sizes, size = static.backward, entries.shape[1]
    shape = _shape(static, sizes, q, entries, places)
    step = round_up(size, _SPLIT)

    def needed(count: int) -> int:
        tiles = min(shape.tiles, count // sizes.entries)
        return backward_bytes(sizes, shape.heads, shape.dim, shape.window, tiles, q.dtype)

    while step > _SPLIT and needed(step) > vmem_budget(static.chip):
        step = round_up(step // 2, _SPLIT)
    return [(begin, min(begin + step, size)) for begin in range(0, size, step)]


def _gradients(
    static: _Static, q: Any, keys: Any, sink: Any, entries: Any, places: _Places, out: Any, d_out: Any, stats: Any,
    *, is_whole: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """Gradients to q, keys, sink and entries, in float32 but for a whole gradient to q."""
    sizes = static.backward
    shape = _shape(static, sizes, q, entries, places)
    check_backward(sizes, shape.heads, shape.dim, shape.window, shape.tiles, q.dtype, static.chip)
    given = _operands(static, sizes, q, keys, sink, entries, places)
    length = shape.blocks * sizes.queries
    stats = pad_to(stats, 1, length, -NEVER)  # so that no weight of a query that is none, nor its sink's, overflows
    found = kernel_bwd.backward(
        given, rows(out, shape, sizes), rows(d_out, shape, sizes), stats, shape, sizes, scale=static.scale,
        q_dtype=q.dtype if is_whole else jnp.float32, chip=static.chip,
    )  # fmt: skip
    dim = q.shape[-1]
    dsink = jnp.sum(found.sink[:, : q.shape[2], 0], axis=0)
    dentries = None
    if found.entries is not None:
        turned = jnp.swapaxes(found.entries, 2, 3).reshape(shape.batch, -1, shape.dim)
        dentries = turned[:, : entries.shape[1], :dim]
    return unrows(found.q, shape, q), join_near(jnp.swapaxes(found.keys, 2, 3), shape, keys), dsink, dentries
