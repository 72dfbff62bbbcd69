"""The union of neighbouring selections given as lists: each chosen entry once, with a word that says who chose it.

One grid step takes a tile of Q queries, Q · K indices in a few registers, and

1. sorts the pairs (index, query) by a bitonic network,
2. joins equal neighbours: the first of a run keeps the bits of all of its queries,
3. moves the firsts to the front (`places`).

Neither the number of entries nor any array of that length comes in.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels_pallas.sparse_attention.layout import WORD, pad_to
from kernels_pallas.sparse_attention.places import Registers, ahead, iota, one_behind, to_front, zeros_before
from kernels_pallas.tpu import LANES, SUBLANES, Chip, cdiv, compiler_params

_FIRST, _NONE = 1 << 23, 0x7F7FFFFF
"""Pairs are sorted as the float32 of the same bits: positive ones have the integers' order, and unlike integers a TPU
takes the smaller of two in one operation. From 2^23 on they are not subnormal; the largest is none."""


class Unions(NamedTuple):
    """Unions of `Q` neighbouring queries each, in `C` = Q · K places, K padded."""

    members: jax.Array
    """int32 [B, T, C / 128, 128]: distinct entries; beyond them the first is repeated (0 where there is none)."""
    words: jax.Array
    """int32 [B, T, C / 128, 128]: bit i of a member's word is set where the tile's query i chose it; 0 where there is
    no member. They fill groups of C / 128 places one after another, in no particular order within the last."""
    size: jax.Array
    """int32 [B, T]: how many members."""


def _bit_of_row(bit: int) -> jax.Array:
    """Whether (lane, sublane), the sublane's number running fastest, has this bit: [1, 8, 128]."""
    return (iota(1) >> bit if bit < 3 else iota(2) >> (bit - 3)) & 1 == 1


def _exchanged_rows(x: Registers, bit: int) -> Registers:
    """The smaller first, of places that differ in one bit of (lane, sublane)."""
    is_upper = _bit_of_row(bit)
    if bit >= 3:
        flat = x.reshape(-1, LANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 1)
        other = jnp.take_along_axis(flat, lane ^ (1 << (bit - 3)), axis=1).reshape(x.shape)
    elif bit == 2:
        other = pltpu.roll(x, 4, 1)
    else:
        other = jnp.where(is_upper, pltpu.roll(x, 1 << bit, 1), pltpu.roll(x, SUBLANES - (1 << bit), 1))
    return jnp.where(is_upper, jnp.maximum(x, other), jnp.minimum(x, other))


def _turned(x: Registers, size: int) -> Registers:
    """Negates, which reverses their order, every second run of 2^size."""
    bits = (x.shape[0] - 1).bit_length()
    if size >= bits + 10:
        return x
    if size >= bits:
        return jnp.where(_bit_of_row(size - bits), -x, x)
    runs = x.reshape(-1, 2, 1 << size, SUBLANES, LANES)
    return jnp.concatenate([runs[:, :1], -runs[:, 1:]], axis=1).reshape(x.shape)


def _sorted(pairs: Registers) -> Registers:
    """Ascending, by a bitonic network: runs of 2^size are sorted, every second one downwards."""
    x = jax.lax.bitcast_convert_type(pairs, jnp.float32)
    bits = (x.shape[0] - 1).bit_length()
    for size in range(1, bits + 11):
        x = _turned(x, size)
        for bit in reversed(range(size)):
            if bit >= bits:
                x = _exchanged_rows(x, bit - bits)
            else:
                couples = x.reshape(-1, 2, 1 << bit, SUBLANES, LANES)
                low, high = couples[:, 0], couples[:, 1]
                x = jnp.stack([jnp.minimum(low, high), jnp.maximum(low, high)], axis=1).reshape(x.shape)
        x = _turned(x, size)
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _joined(x: Registers, queries: int) -> tuple[Registers, Registers]:
    """Sorted pairs → (index, word of the first of a run, 0 for the others and where there is none)."""
    index = (x - _FIRST) >> 5
    words = own = jnp.where(x != _NONE, jnp.left_shift(jnp.int32(1), x & (WORD - 1)), 0)
    step = 1
    while step < queries:
        words = words | jnp.where(ahead(index, step) == index, ahead(words, step), 0)
        step *= 2
    before = one_behind(index)
    is_start = (iota(1) == 0) & (iota(2) == 0)
    before = jnp.concatenate([jnp.where(is_start, -1, before[:1]), before[1:]])
    is_first = before != index
    return index, jnp.where(is_first & (own != 0), words, 0)


def _unite(selection: Any, members: Any, words: Any) -> None:
    """selection: int32 [1, Q, K]. members, words: int32 [1, 1, C / 128, 128]."""
    queries, topk = selection.shape[1:]
    query = jax.lax.broadcasted_iota(jnp.int32, (queries, topk), 0)
    pairs = jnp.where(selection[0] >= 0, selection[0] * WORD + query + _FIRST, _NONE)
    pairs = jnp.concatenate([pairs[:, at : at + LANES] for at in range(0, topk, LANES)], axis=0)
    pairs = pairs.reshape(-1, SUBLANES, LANES)
    index, word = _joined(_sorted(pairs), queries)
    _, word, (index,) = to_front(jnp.where(word == 0, 0, zeros_before(word)), word, (index,))
    first = jnp.where(word[:1, :1, :1] != 0, index[:1, :1, :1], 0)
    index = jnp.where(word != 0, index, jnp.broadcast_to(first, index.shape))
    for x, out in ((index, members), (word, words)):
        # Lanes become rows: places that follow one another lie together.
        turned = x.reshape(-1, LANES).T
        parts = turned.shape[1] // LANES
        for part in range(parts):
            out[0, 0, pl.ds(part, LANES, stride=parts)] = turned[:, part * LANES : (part + 1) * LANES]


def padded_topk(topk: int, queries: int) -> int:
    """Indices per query that a tile holds: a power of two, so many that a group of places is whole rows."""
    return max(LANES * LANES // queries, 1 << (topk - 1).bit_length())


def over_tiles(
    unite: Callable[..., None], chosen: Int[Array, "B S W"], topk: int, queries: int, chip: Chip, *, empty: int,
    name: str, scratch: Sequence[Any] = (),
) -> Unions:  # fmt: skip
    """Calls a kernel for every tile of queries.

    Args:
      unite: takes the tile's part of `chosen` [1, Q, W], members and words [1, 1, C / 128, 128], and the scratch.
      topk: indices per query that a tile holds, see `padded_topk`.
      empty: what stands for a query that is none.
    """
    batch, length, width = chosen.shape
    tiles, rows = cdiv(length, queries), queries * topk // LANES
    chosen = pad_to(chosen, 1, tiles * queries, empty)
    out = jax.ShapeDtypeStruct((batch, tiles, rows, LANES), jnp.int32)
    block = pl.BlockSpec((1, 1, rows, LANES), lambda b, t: (b, t, 0, 0))
    members, words = pl.pallas_call(
        unite,
        grid=(batch, tiles),
        in_specs=[pl.BlockSpec((1, queries, width), lambda b, t: (b, t, 0))],
        out_specs=[block, block],
        out_shape=[out, out],
        scratch_shapes=scratch,
        compiler_params=compiler_params(chip, semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=4 * (chosen.size + 2 * out.size)),
        name=name,
    )(chosen)
    return Unions(members, words, jnp.sum(words != 0, axis=(2, 3), dtype=jnp.int32))


def unions(selection: Int[Array, "B S K"], queries: int, chip: Chip) -> Unions:
    """The kernel.

    Args:
      selection: indices below 2^25, none twice in a query's list; −1 for none.
      queries: per tile, Q: 8, 16 or 32. The last tile may be partly filled.
    """
    topk = padded_topk(selection.shape[2], queries)
    padded = pad_to(selection.astype(jnp.int32), 2, topk, -1)
    return over_tiles(_unite, padded, topk, queries, chip, empty=-1, name="sparse_attention_union")
