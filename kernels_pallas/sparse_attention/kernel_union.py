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
_NONE = (1 << 31) - 1


class Unions(NamedTuple):
    """Unions of `Q` neighbouring queries each, in `C` = Q · K places, K padded."""

    members: jax.Array
    """int32 [B, T, C / 128, 128]: distinct entries; beyond them the first is repeated (0 where there is none)."""
    words: jax.Array
    """int32 [B, T, C / 128, 128]: bit i of a member's word is set where the tile's query i chose it; 0 where there is
    no member. They fill groups of C / 128 places one after another, in no particular order within the last."""
    size: jax.Array
    """int32 [B, T]: how many members."""


def _iota(x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)


def _bit_of_place(x: jax.Array, bit: int) -> jax.Array:
    """Whether a place has this bit, 0 the lowest."""
    bits = (x.shape[0] - 1).bit_length()
    for axis, size in ((0, bits), (1, 3), (2, 7)):
        if bit < size:
            return (_iota(x, axis) >> bit) & 1 == 1
        bit -= size
    return jnp.zeros(x.shape, bool)


def _rows_ahead(x: Registers, count: int) -> Registers:
    if count >= SUBLANES:
        return pltpu.roll(x, LANES - count // SUBLANES, 2)
    turned = pltpu.roll(x, SUBLANES - count, 1)
    return jnp.where(_iota(x, 1) < SUBLANES - count, turned, pltpu.roll(turned, LANES - 1, 2))


def _ahead(x: Registers, count: int) -> Registers:
    """What lies `count` places, a power of two, further on; the end goes on at the start."""
    if count < x.shape[0]:
        return jnp.concatenate([x[count:], _rows_ahead(x[:count], 1)])
    return _rows_ahead(x, count // x.shape[0])


def _one_behind(x: Registers) -> Registers:
    turned = pltpu.roll(x[-1:], 1, 1)
    first = jnp.where(_iota(turned, 1) > 0, turned, pltpu.roll(turned, 1, 2))
    return first if x.shape[0] == 1 else jnp.concatenate([first, x[:-1]])


def _partner(x: Registers, bit: int) -> Registers:
    """What lies where one bit of (sublane, lane) differs."""
    if bit < 3:
        step = 1 << bit
        above = pltpu.roll(x, SUBLANES - step, 1)
        return above if 2 * step == SUBLANES else jnp.where(_iota(x, 1) & step == 0, above, pltpu.roll(x, step, 1))
    flat = x.reshape(-1, LANES)
    return jnp.take_along_axis(flat, _iota(flat, 1) ^ (1 << (bit - 3)), axis=1).reshape(x.shape)


def _sorted(x: Registers) -> Registers:
    """Ascending, by a bitonic network."""
    bits = (x.shape[0] - 1).bit_length()
    for size in range(1, bits + 11):
        # Runs of 2^size are sorted, every second one downwards.
        is_down = _bit_of_place(x, size)
        for bit in reversed(range(size)):
            if bit >= bits:
                other = _partner(x, bit - bits)
                takes_low = _bit_of_place(x, bit) == is_down
                x = jnp.where(takes_low, jnp.minimum(x, other), jnp.maximum(x, other))
                continue
            pairs = x.reshape(-1, 2, 1 << bit, SUBLANES, LANES)
            down = is_down.reshape(pairs.shape)[:, 0]
            low, high = jnp.minimum(pairs[:, 0], pairs[:, 1]), jnp.maximum(pairs[:, 0], pairs[:, 1])
            pairs = jnp.stack([jnp.where(down, high, low), jnp.where(down, low, high)], axis=1)
            x = pairs.reshape(x.shape)
    return x


def _joined(x: Registers, queries: int) -> tuple[Registers, Registers]:
    """Sorted pairs → (index, word of the first of a run, 0 for the others and where there is none)."""
    index = x >> 5
    words = own = jnp.where(x != _NONE, jnp.left_shift(jnp.int32(1), x & (WORD - 1)), 0)
    step = 1
    while step < queries:
        words = words | jnp.where(_ahead(index, step) == index, _ahead(words, step), 0)
        step *= 2
    is_start = (_iota(x, 0) == 0) & (_iota(x, 1) == 0) & (_iota(x, 2) == 0)
    is_first = is_start | (_one_behind(index) != index)
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
        rows = rows + jnp.where(_iota(rows, 1) >= step, pltpu.roll(rows, step, 1), 0)
    of_lane = jnp.broadcast_to(rows[:, SUBLANES - 1 :], rows.shape)
    lanes = of_lane
    for step in (1, 2, 4, 8, 16, 32, 64):
        lanes = lanes + jnp.where(_iota(lanes, 2) >= step, pltpu.roll(lanes, step, 2), 0)
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
    chosen = jnp.concatenate([selection[0, :, at : at + LANES] for at in range(0, topk, LANES)], axis=0)
    chosen = chosen.reshape(-1, SUBLANES, LANES)
    query = (_iota(chosen, 0) * SUBLANES + _iota(chosen, 1)) % queries
    pairs = jnp.where(chosen >= 0, chosen * WORD + query, _NONE)
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
      selection: indices below 2^26, none twice in a query's list; −1 for none.
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
