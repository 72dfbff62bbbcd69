"""Block sizes of the kernels over unions of selections."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.sparse_attention.block_sizes import QuerySizes
from kernels_pallas.sparse_attention.layout import WORD
from kernels_pallas.sparse_attention.row_words import word_planes
from kernels_pallas.tpu import LANES, SUBLANES, Chip, check_vmem, round_up, tile_bytes

_ROWS = 2048
"""Rows of a tile, queries × heads: a copy of a member's row costs as much as multiplying it by some 1000 rows."""
_CHUNK_ROWS = 1024
"""Rows whose softmax overlaps with the products of the next ones."""
_CHUNK_ROWS_BACK = 512
_MEMBERS = 512
"""Members of a block: fewer would rescale the accumulator more often, more would leave more of the last block empty."""
_MANY_HEADS = 128
"""From so many heads on the forward kernel takes twice of all three, as their selections are twice as long: 32 queries
share a copy, and the softmax of a longer block leaves less of the matrix unit idle."""
_LARGE_VMEM = 128 << 20
"""Where chunks of twice the rows fit beside the blocks."""


@dataclasses.dataclass(frozen=True)
class UnionSizes(QuerySizes):
    """Sizes of what a grid step holds; its queries, which share a union, are 8, 16 or 32: bits of a word."""

    rows: int
    """Members per block: a multiple of 128."""

    def __post_init__(self) -> None:
        legal = self.queries in (8, 16, 32) and self.queries % self.chunk == 0
        if not legal or self.rows % LANES or self.rows > SUBLANES * LANES:
            raise ValueError(
                f"block sizes: got {self}, need queries 8, 16 or 32, a chunk that divides them, and members a multiple "
                f"of {LANES} up to {SUBLANES * LANES}"
            )


def default_union_sizes(heads: int, dtype: DTypeLike, chip: Chip) -> tuple[UnionSizes, UnionSizes]:
    """Forward and backward blocks for this many heads (padded to 8)."""
    narrow = jnp.dtype(dtype).itemsize // 2  # float32 rows take twice the room
    twice = 2 if heads >= _MANY_HEADS and narrow == 1 else 1
    longer = twice if chip.vmem_bytes >= _LARGE_VMEM else 1
    return (
        _sizes(heads, twice * _ROWS // narrow, longer * _CHUNK_ROWS // narrow, twice * _MEMBERS // narrow),
        _sizes(heads, _ROWS // narrow, _CHUNK_ROWS_BACK // narrow, _MEMBERS // narrow),
    )


def _sizes(heads: int, rows: int, chunk_rows: int, members: int) -> UnionSizes:
    queries = WORD
    while queries > SUBLANES and queries * heads > rows:
        queries //= 2
    return UnionSizes(queries, _chunk(queries, heads, chunk_rows), members)


def _chunk(queries: int, heads: int, rows: int) -> int:
    """Queries of a chunk of about so many rows, which are whole registers of lanes."""
    chunk = queries
    while chunk % 2 == 0 and chunk * heads > rows and chunk // 2 * heads % LANES == 0:
        chunk //= 2
    return chunk


def _check_groups(sizes: UnionSizes, capacity: int) -> None:
    group = capacity // LANES
    if sizes.rows % group:
        raise ValueError(f"block sizes: got {sizes}, need members a multiple of {group} for {capacity} places")


def check_forward(
    sizes: UnionSizes, heads: int, dim: int, window: int, capacity: int, dtype: DTypeLike, chip: Chip
) -> None:
    """Refuses a forward kernel that does not fit.

    Raises:
      ValueError: with the bytes needed and available.
    """
    _check_groups(sizes, capacity)
    rows, near = sizes.queries * heads, round_up(window, LANES) + LANES
    columns = near + sizes.rows
    blocks = 2 * tile_bytes((rows, dim), dtype) + tile_bytes((near, dim), dtype) + capacity * 4
    planes, word = word_planes(dim, dtype)
    scratch = tile_bytes((planes, sizes.rows, LANES), word) + tile_bytes((sizes.rows, dim), dtype)
    scratch += tile_bytes((sizes.queries, columns), jnp.float32) + tile_bytes((rows, dim + 2 * LANES), jnp.float32)
    values = 2 * sizes.chunk * heads * columns * 6 + sizes.chunk * heads * dim * 4
    check_vmem(
        f"sparse_attention over unions, {heads} heads × {dim}, {sizes}", 2 * blocks + scratch + values, chip,
        "use fewer queries or members",
    )  # fmt: skip


def check_backward(
    sizes: UnionSizes, heads: int, dim: int, window: int, capacity: int, dtype: DTypeLike, chip: Chip
) -> None:
    """Refuses a backward kernel that does not fit.

    Raises:
      ValueError: with the bytes needed and available.
    """
    _check_groups(sizes, capacity)
    rows, near, chunk = sizes.queries * heads, round_up(window, LANES) + LANES, sizes.chunk * heads
    blocks = 3 * tile_bytes((rows, dim), dtype) + tile_bytes((near, dim), dtype) + tile_bytes((near, dim), jnp.float32)
    blocks += capacity * 4 + 4 * tile_bytes((1, rows), jnp.float32)
    planes, word = word_planes(dim, dtype)
    scratch = tile_bytes((planes, sizes.rows, LANES), word) + tile_bytes((sizes.rows, LANES), jnp.int32)
    scratch += tile_bytes((sizes.rows, dim), dtype) + tile_bytes((dim, sizes.rows), dtype)
    scratch += tile_bytes((dim, rows), jnp.float32) + 2 * tile_bytes((sizes.rows, dim), jnp.float32)
    values = sizes.rows * chunk * 24 + 2 * chunk * dim * 4
    check_vmem(
        f"sparse_attention backward over unions, {heads} heads × {dim}, {sizes}", 2 * blocks + scratch + values, chip,
        "use fewer queries or members",
    )  # fmt: skip
