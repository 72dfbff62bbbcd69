"""Block sizes of the prefill and training kernels: legal for every chip of the table, or refused with the bytes."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.tpu import LANES, SUBLANES, Chip, check_vmem, round_up, tile_bytes

_ROWS = 2048
"""Rows of a block of the forward kernel, queries × heads: its first products and its last softmax overlap with nothing,
the more rows the less of it."""
_ROWS_BACK = 1024
"""Of the backward kernel: enough to hide the loading of keys into the matrix unit."""
_CHUNK_ROWS = 512
"""Rows whose softmax overlaps with the products of the next ones."""
_ENTRIES = 1024
"""Entries of a tile: the fewer tiles, the fewer times the accumulator is rescaled."""
_MASK_GROUP = 32 * LANES
"""Entries that a register row of mask words covers; a tile must not straddle two."""


@dataclasses.dataclass(frozen=True)
class QuerySizes:
    """Queries of a grid step."""

    queries: int
    """Queries per block: a power of two from 8 to 128, so that a block's window lies in two tiles of 128 keys more
    than the window has."""
    chunk: int
    """Queries of a block that are multiplied at a time."""


@dataclasses.dataclass(frozen=True)
class BlockSizes(QuerySizes):
    """Sizes of what a grid step holds."""

    entries: int
    """Compressed entries per tile: a multiple of 128 that divides 4096."""

    def __post_init__(self) -> None:
        legal = self.queries in (8, 16, 32, 64, 128) and self.queries % self.chunk == 0
        if not legal or self.entries % LANES or _MASK_GROUP % self.entries:
            raise ValueError(
                f"block sizes: got {self}, need queries 8, 16, … 128, a chunk that divides them, and entries a "
                f"multiple of {LANES} that divides {_MASK_GROUP}"
            )


def default_block_sizes(heads: int, entries: int, dtype: DTypeLike, *, is_backward: bool = False) -> BlockSizes:
    """Blocks for this many heads (padded to 8) and entries."""
    narrow = jnp.dtype(dtype).itemsize // 2  # float32 rows take twice the room
    queries = 128
    while queries > SUBLANES and queries * heads > (_ROWS_BACK if is_backward else _ROWS) // narrow:
        queries //= 2
    chunk = queries
    while chunk > 1 and chunk * heads > _CHUNK_ROWS:
        chunk //= 2
    tile = _ENTRIES // narrow // (2 if is_backward else 1)
    while tile >= 2 * LANES and tile >= 2 * entries:
        tile //= 2
    return BlockSizes(queries, chunk, tile)


def check_forward(
    sizes: BlockSizes, heads: int, dim: int, window: int, tiles: int, dtype: DTypeLike, chip: Chip
) -> None:
    """Refuses a forward kernel that does not fit.

    Raises:
      ValueError: with the bytes needed and available.
    """
    rows, near = sizes.queries * heads, round_up(window, LANES) + LANES
    blocks = 2 * tile_bytes((rows, dim), dtype) + tile_bytes((near, dim), dtype)
    columns = near + (sizes.entries if tiles else 0)
    if tiles:
        blocks += tile_bytes((sizes.entries, dim), dtype)
    scratch = tile_bytes((sizes.queries, columns), jnp.float32)
    if tiles > 1:
        scratch += tile_bytes((rows, dim), jnp.float32) + 2 * tile_bytes((rows, LANES), jnp.float32)
    values = 2 * sizes.chunk * heads * columns * 6 + sizes.chunk * heads * dim * 4
    check_vmem(
        f"sparse_attention forward, {heads} heads × {dim}, {sizes}", 2 * blocks + scratch + values, chip,
        "use fewer queries per block or entries per tile",
    )  # fmt: skip


def check_backward(
    sizes: BlockSizes, heads: int, dim: int, window: int, tiles: int, dtype: DTypeLike, chip: Chip
) -> None:
    """Refuses a backward kernel that does not fit; the gradient of all entries stays in VMEM.

    Raises:
      ValueError: with the bytes needed and available.
    """
    check_vmem(
        f"sparse_attention backward, {heads} heads × {dim}, {tiles} tiles, {sizes}",
        backward_bytes(sizes, heads, dim, window, tiles, dtype), chip,
        "use fewer queries per block or entries per tile",
    )  # fmt: skip


def backward_bytes(sizes: BlockSizes, heads: int, dim: int, window: int, tiles: int, dtype: DTypeLike) -> int:
    """VMEM of the backward kernel: blocks twice, scratch and the values of a chunk."""
    rows, near = sizes.queries * heads, round_up(window, LANES) + LANES
    columns = near + (sizes.entries if tiles else 0)
    blocks = 4 * tile_bytes((rows, dim), dtype) + tile_bytes((near, dim), dtype)
    blocks += tile_bytes((dim, near), jnp.float32)
    if tiles:
        blocks += tile_bytes((sizes.entries, dim), dtype)
    scratch = tile_bytes((sizes.queries, columns), jnp.float32) + 2 * tile_bytes((rows, LANES), jnp.float32)
    scratch += 2 * tile_bytes((dim, rows), dtype) + 2 * tile_bytes((rows, columns), dtype)
    scratch += tile_bytes((rows, dim), jnp.float32) + tiles * tile_bytes((dim, sizes.entries), jnp.float32)
    return 2 * blocks + scratch + 2 * sizes.chunk * heads * columns * 12
