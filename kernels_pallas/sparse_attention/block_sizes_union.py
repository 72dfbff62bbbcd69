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
_MEMBERS = 512
"""Members of a block: fewer would rescale the accumulator more often, more would leave more of the last block empty."""


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


def default_union_sizes(heads: int, dtype: DTypeLike) -> UnionSizes:
    """Blocks for this many heads (padded to 8)."""
    narrow = jnp.dtype(dtype).itemsize // 2  # float32 rows take twice the room
    queries = WORD
    while queries > SUBLANES and queries * heads > _ROWS // narrow:
        queries //= 2
    chunk = queries
    while chunk > 1 and chunk * heads > _CHUNK_ROWS // narrow:
        chunk //= 2
    return UnionSizes(queries, chunk, _MEMBERS // narrow)


def check_forward(
    sizes: UnionSizes, heads: int, dim: int, window: int, capacity: int, dtype: DTypeLike, chip: Chip
) -> None:
    """Refuses a forward kernel that does not fit.

    Raises:
      ValueError: with the bytes needed and available.
    """
    rows, near = sizes.queries * heads, round_up(window, LANES) + LANES
    columns = near + sizes.rows
    blocks = 2 * tile_bytes((rows, dim), dtype) + tile_bytes((near, dim), dtype) + tile_bytes((1, capacity), jnp.int32)
    planes, word = word_planes(dim, dtype)
    scratch = tile_bytes((planes, sizes.rows, LANES), word) + tile_bytes((sizes.rows, dim), dtype)
    scratch += tile_bytes((sizes.queries, columns), jnp.float32) + tile_bytes((rows, dim + 2 * LANES), jnp.float32)
    values = 2 * sizes.chunk * heads * columns * 6 + sizes.chunk * heads * dim * 4
    check_vmem(
        f"sparse_attention over unions, {heads} heads × {dim}, {sizes}", 2 * blocks + scratch + values, chip,
        "use fewer queries or members",
    )  # fmt: skip
