"""`sparse_attention` over the unions of neighbouring selections: lists, padding, rows of entries as words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.sparse_attention import kernel_gather
from kernels_pallas.sparse_attention.block_sizes_union import UnionSizes, check_forward
from kernels_pallas.sparse_attention.kernel_gather import Lists
from kernels_pallas.sparse_attention.kernel_union import unions
from kernels_pallas.sparse_attention.layout import Operands, Shape, operands, pad_to, shape_of, unrows
from kernels_pallas.sparse_attention.row_words import pack, word_planes
from kernels_pallas.tpu import LANES, Chip, round_up


class Static(NamedTuple):
    """What is known while tracing."""

    window: int
    scale: float
    sizes: UnionSizes
    chip: Chip
    blocks: int | None = None
    """Fixes the number of blocks of every union; None: as many as it has."""


class Places(NamedTuple):
    """Arrays without gradients, as `api.sparse_attention` takes them."""

    q_position: jax.Array
    q_segment: jax.Array
    key_segment: jax.Array
    selection: jax.Array


def is_worth_it(topk: int, entries: int) -> bool:
    """Whether a union's copies pay: from more than 8 entries per selected one on.

    By the compiler's bundles per token (Flash, v6e), the dense path costs 0.31 per entry, this one 170 and 0.34 per
    member. At 8 entries per selected one it wins up to unions of 5.7 × top-k; neighbours' selections without anything
    in common would unite to all entries there, and this path would lose 1.2×.
    """
    return entries > 8 * topk


def expected_members(topk: int, entries: int) -> int:
    """Members of a tile's union, as the costs count them: neighbours share half of what they choose."""
    return min(entries, 2 * topk)


def _shape(static: Static, q: jax.Array) -> Shape:
    shape = shape_of(q, static.window, None, False, static.sizes)
    return shape._replace(dim=round_up(shape.dim, LANES * 4 // q.dtype.itemsize))


def _lists(static: Static, selection: jax.Array, size: int) -> Lists:
    sizes = static.sizes
    found = unions(selection, sizes.queries, static.chip)
    batch, tiles, capacity = found.members.shape
    address = jnp.clip(found.members, 0, size - 1) + jnp.arange(batch, dtype=jnp.int32)[:, None, None] * size
    address = address.reshape(batch * tiles, 1, capacity)
    first = jnp.roll(address[..., : sizes.rows], -1, axis=0)
    words = found.words.reshape(batch * tiles, 1, capacity)
    return Lists(found.size.reshape(-1), jnp.concatenate([first, address], axis=-1), words)


def _operands(static: Static, q: Any, keys: Any, sink: Any, places: Places) -> Operands:
    return operands(
        q, keys, sink, *places[:3], None, None, None, None, _shape(static, q), static.sizes, static.scale
    )  # fmt: skip


def _row_source(entries: jax.Array, dim: int) -> jax.Array:
    """[B, P, H] → [B · P, H / 128, 128]: a row is then contiguous."""
    padded = pad_to(entries, 2, dim)
    return padded.reshape(-1, dim // LANES, LANES)


def run(
    static: Static, q: Any, keys: Any, sink: Any, entries: Any, places: Places, *, with_stats: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Output as `api.sparse_attention`'s, and the statistics [B, S, N padded to 128] of `kernel.forward`.

    Every listed entry is visible to its query, and none is twice in a list.

    Raises:
      ValueError: blocks that do not fit into VMEM.
    """
    shape, size = _shape(static, q), entries.shape[1]
    lists = _lists(static, places.selection, size)
    check_forward(
        static.sizes, shape.heads, shape.dim, shape.window, lists.words.shape[-1], q.dtype, static.chip
    )  # fmt: skip
    given = _operands(static, q, keys, sink, places)

    def call(source: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return kernel_gather.forward(
            lists, given, source, shape, static.sizes, scale=static.scale, blocks=static.blocks,
            expected=expected_members(places.selection.shape[-1], size), with_stats=with_stats, chip=static.chip,
        )  # fmt: skip

    out, stats = with_words(call, _row_source(entries, shape.dim))
    return unrows(out, shape, q), stats if stats is None else stats[:, : q.shape[1]]


def with_words(call: Any, source: jax.Array) -> Any:
    """Calls with rows that the kernel reads as words.

    The interpreter cannot reinterpret an array that it copies from: off TPU the words are made beforehand.
    """
    if word_planes(LANES, source.dtype)[1] == source.dtype:
        return call(source)
    return jax.lax.platform_dependent(source, tpu=call, default=lambda x: call(pack(x)))
