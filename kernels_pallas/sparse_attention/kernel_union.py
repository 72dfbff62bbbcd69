"""The union of the selections of neighbouring queries: each chosen entry once, with a word that says who chose it.

One grid step takes a tile of Q queries, Q · K indices in a few registers, and

1. sorts the pairs (index, query) by a bitonic network,
2. joins equal neighbours: the first of a run keeps the bits of all of its queries,
3. moves the firsts to the front, each by as many places as others lie before it, one bit of that number at a time.

Neither the number of entries nor any array of that length comes in. A place in the order is (lane, sublane, register),
the register's number running fastest: most steps of the network, and prefix sums, then go between whole registers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels_pallas.sparse_attention.layout import WORD, pad_to
from kernels_pallas.tpu import LANES, SUBLANES, Chip, cdiv, compiler_params

Registers = jax.Array
"""int32 [V, 8, 128], V a power of two: place p = (8 · lane + sublane) · V + register."""
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


def _iota(axis: int) -> jax.Array:
    """Number of the sublane (1) or lane (2), for a register: [1, 8, 128]."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, SUBLANES, LANES), axis)


def _rows_ahead(x: Registers, count: int) -> Registers:
    if count >= SUBLANES:
        return pltpu.roll(x, LANES - count // SUBLANES, 2)
    turned = pltpu.roll(x, SUBLANES - count, 1)
    return jnp.where(_iota(1) < SUBLANES - count, turned, pltpu.roll(turned, LANES - 1, 2))


def _ahead(x: Registers, count: int) -> Registers:
    """What lies `count` places, a power of two, further on; the end goes on at the start."""
    if count < x.shape[0]:
        return jnp.concatenate([x[count:], _rows_ahead(x[:count], 1)])
    return _rows_ahead(x, count // x.shape[0])


def _one_behind(x: Registers) -> Registers:
    turned = pltpu.roll(x[-1:], 1, 1)
    first = jnp.where(_iota(1) > 0, turned, pltpu.roll(turned, 1, 2))
    return jnp.concatenate([first, x[:-1]])


def _bit_of_row(bit: int) -> jax.Array:
    """Whether (lane, sublane), the sublane's number running fastest, has this bit: [1, 8, 128]."""
    return (_iota(1) >> bit if bit < 3 else _iota(2) >> (bit - 3)) & 1 == 1


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
        words = words | jnp.where(_ahead(index, step) == index, _ahead(words, step), 0)
        step *= 2
    before = _one_behind(index)
    is_start = (_iota(1) == 0) & (_iota(2) == 0)
    before = jnp.concatenate([jnp.where(is_start, -1, before[:1]), before[1:]])
    is_first = before != index
    return index, jnp.where(is_first & (own != 0), words, 0)


def _zeros_before(words: Registers) -> Registers:
    """How many zeros lie before each place."""
    zeros = jnp.where(words == 0, 1, 0)
    within, total = [], jnp.zeros((1, SUBLANES, LANES), jnp.int32)
    for number in range(words.shape[0]):
        within.append(total)
        total = total + zeros[number : number + 1]
    rows = total
    for step in (1, 2, 4):
        rows = rows + jnp.where(_iota(1) >= step, pltpu.roll(rows, step, 1), 0)
    of_lane = jnp.broadcast_to(rows[:, SUBLANES - 1 :], rows.shape)
    lanes = of_lane
    for step in (1, 2, 4, 8, 16, 32, 64):
        lanes = lanes + jnp.where(_iota(2) >= step, pltpu.roll(lanes, step, 2), 0)
    return jnp.concatenate(within) + (lanes - of_lane + rows - total)


def _compressed(index: Registers, words: Registers) -> tuple[Registers, Registers]:
    """Moves what has a word to the front, in order."""
    left = jnp.where(words == 0, 0, _zeros_before(words))
    step = 1
    while step < index.size:
        # What moves by `step` finds its place empty: the lower bits of both distances have been moved already.
        arriving = _ahead(left, step)
        arrives, leaves = arriving & step != 0, left & step != 0
        index = jnp.where(arrives, _ahead(index, step), index)
        words = jnp.where(arrives, _ahead(words, step), jnp.where(leaves, 0, words))
        left = jnp.where(arrives, arriving, jnp.where(leaves, 0, left))
        step *= 2
    return index, words


def _unite(selection: Any, members: Any, words: Any) -> None:
    """selection: int32 [1, Q, K]. members, words: int32 [1, 1, C / 128, 128]."""
    queries, topk = selection.shape[1:]
    query = jax.lax.broadcasted_iota(jnp.int32, (queries, topk), 0)
    pairs = jnp.where(selection[0] >= 0, selection[0] * WORD + query + _FIRST, _NONE)
    pairs = jnp.concatenate([pairs[:, at : at + LANES] for at in range(0, topk, LANES)], axis=0)
    pairs = pairs.reshape(-1, SUBLANES, LANES)
    index, word = _compressed(*_joined(_sorted(pairs), queries))
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


def unions(selection: Int[Array, "B S K"], queries: int, chip: Chip) -> Unions:
    """The kernel.

    Args:
      selection: indices below 2^25, none twice in a query's list; −1 for none.
      queries: per tile, Q: 8, 16 or 32. The last tile may be partly filled.
    """
    batch, length, topk = selection.shape
    tiles, width = cdiv(length, queries), padded_topk(topk, queries)
    padded = pad_to(pad_to(selection.astype(jnp.int32), 1, tiles * queries, -1), 2, width, -1)
    rows = queries * width // LANES
    out = jax.ShapeDtypeStruct((batch, tiles, rows, LANES), jnp.int32)
    block = pl.BlockSpec((1, 1, rows, LANES), lambda b, t: (b, t, 0, 0))
    members, words = pl.pallas_call(
        _unite,
        grid=(batch, tiles),
        in_specs=[pl.BlockSpec((1, queries, width), lambda b, t: (b, t, 0))],
        out_specs=[block, block],
        out_shape=[out, out],
        compiler_params=compiler_params(chip, semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=3 * padded.size * 4),
        name="sparse_attention_union",
    )(padded)
    return Unions(members, words, jnp.sum(words != 0, axis=(2, 3), dtype=jnp.int32))
