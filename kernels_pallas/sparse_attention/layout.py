"""What the prefill kernels, forward and backward, are given: whole tiles, and which tiles of entries a block meets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.sparse_attention.block_sizes import BlockSizes, QuerySizes
from kernels_pallas.tpu import LANES, SUBLANES, cdiv, round_up

NEVER = -1e30
"""Score of a pair that is masked: finite, so that differences of two of them are; exp2 of it gives exactly 0."""
WORD = 32
_NO_SEGMENT = -(1 << 30)
_LATE = (1 << 31) - 1


class Shape(NamedTuple):
    """Static sizes, padded to whole tiles."""

    batch: int
    blocks: int
    """Blocks of queries."""
    heads: int
    dim: int
    window: int
    """As the model has it."""
    near: int
    """Tiles of 128 keys that a block of queries touches."""
    tiles: int
    """Tiles of entries; 0 for a window alone."""
    words: int
    """Words of tile flags per block of queries."""
    has_bits: bool

    @property
    def lead(self) -> int:
        """Keys before the first query: the window in whole tiles."""
        return LANES * (self.near - 1)


class Operands(NamedTuple):
    """Arrays as the kernels read them. `M` rows are queries × heads, heads inner."""

    first: jax.Array
    """int32 [B · blocks]: first tile of entries that the block meets."""
    length: jax.Array
    """int32 [B · blocks]: tiles from there to the last that it meets, at least 1."""
    flags: jax.Array
    """int32 [B · blocks · words]: bit j says whether the block meets tile j."""
    q: jax.Array
    """[B, M, H]."""
    place: jax.Array
    """int32 [B, S, 2]: position and document of each query."""
    keys: jax.Array
    """[B, lead + S, H], S in whole tiles."""
    key_segment: jax.Array
    """int32 [B, 1, lead + S]."""
    entries: jax.Array | None
    """[B, P, H]."""
    entry_place: jax.Array | None
    """int32 [B, 2, P]: end and document of each entry."""
    bits: jax.Array | None
    """int32 [B, S, P / 32 in whole tiles of 128 words]."""
    sink: jax.Array
    """float32 [N, 128]: in units of an unscaled product, the same in all lanes."""


def pad_to(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """Appends to one axis up to `size`; nothing is copied where it has that already."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def rows(x: Float[Array, "B S N H"], shape: Shape, sizes: QuerySizes) -> Float[Array, "B M H2"]:
    """Queries × heads as rows, padded."""
    x = pad_to(pad_to(x, 3, shape.dim), 2, shape.heads)
    x = pad_to(x, 1, shape.blocks * sizes.queries)
    return x.reshape(shape.batch, -1, shape.dim)


def unrows(x: Float[Array, "B M H2"], shape: Shape, like: Float[Array, "B S N H"]) -> Float[Array, "B S N H"]:
    """The inverse of `rows`."""
    whole = x.reshape(shape.batch, -1, shape.heads, shape.dim)
    return whole[:, : like.shape[1], : like.shape[2], : like.shape[3]]


def join_near(parts: Float[Array, "B A C H2"], shape: Shape, keys: Float[Array, "B WS H"]) -> Float[Array, "B WS H"]:
    """Sums the gradients of overlapping spans of keys: span a begins at tile a."""
    batch, firsts, _, _ = parts.shape
    parts = parts.reshape(batch, firsts, shape.near, LANES, shape.dim)
    tiles = firsts + shape.near - 1
    total = sum(jnp.pad(parts[:, :, k], [(0, 0), (k, tiles - firsts - k), (0, 0), (0, 0)]) for k in range(shape.near))
    front = shape.lead - shape.window
    flat = jnp.asarray(total).reshape(batch, tiles * LANES, shape.dim)
    return flat[:, front : front + keys.shape[1], : keys.shape[2]]


def shape_of(
    q: Float[Array, "B S N H"], window: int, entries: Float[Array, "B P H"] | None, has_bits: bool, sizes: QuerySizes
) -> Shape:
    """Static sizes of a call."""
    batch, length, heads, dim = q.shape
    tiles = 0
    if entries is not None:
        assert isinstance(sizes, BlockSizes)
        tiles = cdiv(entries.shape[1], sizes.entries)
    return Shape(
        batch, cdiv(length, sizes.queries), round_up(heads, SUBLANES), round_up(dim, LANES), window,
        cdiv(window, LANES) + 1, tiles, cdiv(max(tiles, 1), WORD), has_bits,
    )  # fmt: skip


def operands(
    q: Float[Array, "B S N H"],
    keys: Float[Array, "B WS H"],
    sink: Float[Array, " N"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    key_segment: Int[Array, "B WS"],
    entries: Float[Array, "B P H"] | None,
    entry_end: Int[Array, "B P"] | None,
    entry_segment: Int[Array, "B P"] | None,
    bits: Int[Array, "B S D"] | None,
    shape: Shape,
    sizes: QuerySizes,
    scale: float,
) -> Operands:
    """Pads what is not whole tiles (nothing, at production shapes) and finds the tiles that each block meets."""
    length = shape.blocks * sizes.queries
    place = jnp.stack([pad_to(q_position, 1, length, -1), pad_to(q_segment, 1, length, _NO_SEGMENT)], axis=-1).astype(
        jnp.int32
    )
    front = shape.lead - shape.window
    key_count = shape.lead + round_up(length, LANES)
    if front:
        keys = jnp.pad(keys, [(0, 0), (front, 0), (0, 0)])
        key_segment = jnp.pad(key_segment, [(0, 0), (front, 0)], constant_values=-1)
    keys = pad_to(pad_to(keys, 2, shape.dim), 1, key_count)
    key_segment = pad_to(key_segment, 1, key_count, -1).astype(jnp.int32)[:, None]
    sink_rows = jnp.broadcast_to(
        (pad_to(sink.astype(jnp.float32), 0, shape.heads) / scale)[:, None], (shape.heads, LANES)
    )
    whole = (rows(q, shape, sizes), place, keys, key_segment)
    if entries is None:
        nothing = jnp.zeros(shape.batch * shape.blocks, jnp.int32)
        return Operands(nothing, nothing, nothing, *whole, None, None, None, sink_rows)
    assert entry_end is not None
    assert entry_segment is not None
    assert isinstance(sizes, BlockSizes)
    size = shape.tiles * sizes.entries
    entries = pad_to(pad_to(entries, 2, shape.dim), 1, size)
    entry_place = jnp.stack([pad_to(entry_end, 1, size, _LATE), pad_to(entry_segment, 1, size, -1)], axis=1)
    entry_place = entry_place.astype(jnp.int32)
    if bits is not None:
        bits = pad_to(pad_to(bits, 1, length), 2, round_up(cdiv(size, WORD), LANES))
    met = _met(place, entry_place, bits, shape, sizes)
    # Not argmax: for that XLA makes a loop whose length no listing tells. A block that meets none takes the first tile.
    number = jnp.arange(shape.tiles)
    last = jnp.max(jnp.where(met, number, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(met, number, shape.tiles), axis=-1), last)
    count = last - first + 1
    grouped = pad_to(met, 2, shape.words * WORD).reshape(*met.shape[:2], shape.words, WORD).astype(jnp.int32)
    flags = jnp.sum(grouped << jnp.arange(WORD), axis=-1)
    first, count, flags = (x.astype(jnp.int32).reshape(-1) for x in (first, count, flags))
    return Operands(first, count, flags, *whole, entries, entry_place, bits, sink_rows)


def _met(
    place: jax.Array, entry_place: jax.Array, bits: jax.Array | None, shape: Shape, sizes: BlockSizes
) -> jax.Array:
    """Bool [B, blocks, tiles]: false only where no query of the block attends to an entry of the tile.

    Decided from the extremes of a block and of a tile, so that no array of queries × entries is formed.
    """
    position, segment = (x.reshape(shape.batch, shape.blocks, 1, -1) for x in (place[..., 0], place[..., 1]))
    end, owner = (x.reshape(shape.batch, 1, shape.tiles, -1) for x in (entry_place[:, 0], entry_place[:, 1]))
    is_query, is_entry = segment != _NO_SEGMENT, owner >= 0

    def lowest(x: jax.Array, valid: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(valid, x, _LATE), axis=-1)

    def highest(x: jax.Array, valid: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(valid, x, _NO_SEGMENT), axis=-1)

    met = lowest(end, is_entry) <= highest(position, is_query)
    met &= lowest(owner, is_entry) <= highest(segment, is_query)
    met &= lowest(segment, is_query) <= highest(owner, is_entry)
    if bits is None:
        return met
    words = bits[..., : shape.tiles * sizes.entries // WORD].reshape(
        shape.batch, shape.blocks, sizes.queries, shape.tiles, -1
    )
    return met & jnp.any(words != 0, axis=(2, 4))
