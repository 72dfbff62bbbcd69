"""`sparse_attention` over the unions of neighbouring selections: lists, padding, rows of entries as words."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.sparse_attention import kernel_gather, kernel_gather_bwd
from kernels_pallas.sparse_attention.block_sizes_union import UnionSizes, check_backward, check_forward
from kernels_pallas.sparse_attention.kernel import LOG2_E
from kernels_pallas.sparse_attention.kernel_gather import Lists
from kernels_pallas.sparse_attention.kernel_union import unions
from kernels_pallas.sparse_attention.kernel_union_bits import unions_of_bits
from kernels_pallas.sparse_attention.layout import (
    NEVER,
    Operands,
    Shape,
    join_near,
    operands,
    pad_to,
    rows,
    shape_of,
    unrows,
)
from kernels_pallas.sparse_attention.row_words import pack, word_planes
from kernels_pallas.tpu import LANES, Chip, round_up

_MOST_TOPK = 1024
"""A tile's lists are sorted in registers: 32 queries with so many entries each take half of them. And a union's places
are addresses in SMEM."""


class Static(NamedTuple):
    """What is known while tracing."""

    window: int
    scale: float
    topk: int
    """Most entries that a query has selected."""
    forward: UnionSizes
    backward: UnionSizes
    chip: Chip
    blocks: int | None = None
    """Fixes the number of blocks of every union; None: as many as it has."""


class Places(NamedTuple):
    """Arrays without gradients, as `api.sparse_attention` takes them."""

    q_position: jax.Array
    q_segment: jax.Array
    key_segment: jax.Array
    selection: jax.Array | None
    """A list, or else the mask says it."""
    selection_mask: jax.Array | None


def is_worth_it(topk: int, entries: int, heads: int) -> bool:
    """Whether a union's copies pay: with many entries per selected one, and unions that fit.

    By the compiler's bundles per token on v6e, the dense path costs 0.31 per entry with 64 heads and 0.09 with 8, this
    one 135 and 0.34 per member (195 if lists are to be united), or 57 and 0.16 (117), which copies dominate. From 8
    entries per selected one on (16 with 8 heads) it wins up to unions of some 6 × top-k. Selections of neighbours
    without anything in common would unite to all entries at that length, and this path would lose: with fewer entries
    per selected one, where unions of masks of 2 × top-k would pay too, it would gain less and lose as much.
    """
    return topk <= _MOST_TOPK and entries >= topk * max(8, 128 // heads)


def expected_members(topk: int, entries: int) -> int:
    """Members of a tile's union, as the costs count them: neighbours share half of what they choose."""
    return min(entries, 2 * topk)


def _shape(sizes: UnionSizes, window: int, q: jax.Array) -> Shape:
    shape = shape_of(q, window, None, False, sizes)
    return shape._replace(dim=round_up(shape.dim, LANES * 4 // q.dtype.itemsize))


def _lists(static: Static, sizes: UnionSizes, places: Places, size: int) -> Lists:
    if places.selection is not None:
        found = unions(places.selection, sizes.queries, static.chip)
    else:
        assert places.selection_mask is not None
        found = unions_of_bits(places.selection_mask, static.topk, sizes.queries, static.chip)
    batch, tiles, height, _ = found.members.shape
    address = jnp.clip(found.members, 0, size - 1) + size * jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    address, words = (x.reshape(batch * tiles, height, LANES) for x in (address, found.words))
    first = jnp.roll(address[:, : sizes.rows // LANES], -1, axis=0)
    return Lists(found.size.reshape(-1), jnp.concatenate([first, address], axis=1), words)


def _operands(
    static: Static, shape: Shape, sizes: UnionSizes, q: Any, keys: Any, sink: Any, places: Places
) -> Operands:
    return operands(q, keys, sink, *places[:3], None, None, None, None, shape, sizes, static.scale)


def _row_source(entries: jax.Array, dim: int) -> jax.Array:
    """[B, P, H] → [B · P, H / 128, 128]: a row is then contiguous."""
    padded = pad_to(entries, 2, dim)
    return padded.reshape(-1, dim // LANES, LANES)


def run(
    static: Static, q: Any, keys: Any, sink: Any, entries: Any, places: Places, *, with_stats: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Output as `api.sparse_attention`'s, and the statistics [B, S, N padded to 128] of `kernel.forward`.

    Every selected entry is visible to its query, none is twice in a list, and no query has more than `static.topk`.

    Raises:
      ValueError: blocks that do not fit into VMEM.
    """
    sizes, shape, size = static.forward, _shape(static.forward, static.window, q), entries.shape[1]
    lists = _lists(static, sizes, places, size)
    check_forward(sizes, shape.heads, shape.dim, shape.window, lists.words[0].size, q.dtype, static.chip)
    given = _operands(static, shape, sizes, q, keys, sink, places)
    call = functools.partial(
        kernel_gather.forward, lists, given, shape=shape, sizes=sizes, scale=static.scale, blocks=static.blocks,
        expected=expected_members(static.topk, size), with_stats=with_stats, chip=static.chip,
    )  # fmt: skip
    out, stats = with_words(lambda x: call(source=x), _row_source(entries, shape.dim))
    return unrows(out, shape, q), stats if stats is None else stats[:, : q.shape[1]]


def with_words(call: Any, source: jax.Array) -> Any:
    """Calls with rows that the kernel reads as words.

    The interpreter cannot reinterpret an array that it copies from: off TPU the words are made beforehand.
    """
    if word_planes(LANES, source.dtype)[1] == source.dtype:
        return call(source)
    return jax.lax.platform_dependent(source, tpu=call, default=lambda x: call(pack(x)))


def gradients(
    static: Static, q: Any, keys: Any, sink: Any, entries: Any, places: Places, out: Any, d_out: Any, stats: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients to q in its dtype, and in float32 to keys, sink and entries.

    Args:
      out, d_out: [B, S, N, H], the output and its cotangent. stats: from `run`.

    Raises:
      ValueError: blocks that do not fit into VMEM.
    """
    sizes, shape = static.backward, _shape(static.backward, static.window, q)
    size, dim = entries.shape[1:]
    lists = _lists(static, sizes, places, size)
    capacity = lists.words[0].size
    check_backward(sizes, shape.heads, shape.dim, shape.window, capacity, q.dtype, static.chip)
    given = _operands(static, shape, sizes, q, keys, sink, places)
    spare = shape.batch * size + jnp.arange(capacity, dtype=jnp.int32).reshape(-1, LANES) % sizes.rows
    sums = jnp.where(lists.words != 0, lists.addresses[:, sizes.rows // LANES :], spare)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    stats = stats[..., : shape.heads]
    share = jnp.exp2(sink.astype(jnp.float32) * LOG2_E - stats[..., : q.shape[2]]) * delta
    per_row = kernel_gather_bwd.PerRow(
        _on_lanes(stats, shape, sizes, -NEVER),  # so that no weight of a query that is none overflows
        _on_lanes(delta, shape, sizes, 0),
        _on_lanes(jnp.broadcast_to(places.q_segment[..., None], stats.shape), shape, sizes, -1),
        jnp.repeat(jnp.arange(sizes.queries, dtype=jnp.int32), shape.heads).reshape(1, 1, -1),
    )
    call = functools.partial(
        kernel_gather_bwd.backward, lists, sums, per_row, given, rows(d_out, shape, sizes), shape=shape, sizes=sizes,
        scale=static.scale, expected=expected_members(static.topk, size), chip=static.chip,
        blocks=static.blocks,
    )  # fmt: skip
    dq, dkeys, dentries = with_words(lambda x: call(source=x), _row_source(entries, shape.dim))
    dentries = dentries[: shape.batch * size, :dim].reshape(entries.shape)
    return unrows(dq, shape, q), join_near(dkeys, shape, keys), -jnp.sum(share, axis=(0, 1)), dentries


def _on_lanes(x: jax.Array, shape: Shape, sizes: UnionSizes, fill: float) -> jax.Array:
    """[B, S, N] → [B · T, 1, queries × heads of a tile]."""
    whole = pad_to(pad_to(x, 2, shape.heads, fill), 1, shape.blocks * sizes.queries, fill)
    return whole.reshape(shape.batch * shape.blocks, 1, -1)
