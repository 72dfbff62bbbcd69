"""Exact top-k of score rows that lie in VMEM: what the prefill and the decode kernel share.

Rows are queries, columns are keys, −inf marks what a query may not see. Three passes:

1. `find_threshold` bisects the k-th largest value on the ordered bit pattern of the scores: 16 counts for scores
   rounded to bfloat16, 32 for float32. Nothing is sorted.
2. Ties at the threshold go to the lowest index. A product of the tie flags with a triangular matrix numbers them; the
   matrix unit is idle here.
3. The chosen flags become bits by a product with powers of two, or a list: another triangular product ranks them, and
   slot k of the list looks its block of keys up among the blocks' first ranks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.tpu import LANES, SUBLANES, cdiv, round_up

TILE = 256
"""Keys per triangular product."""
GROUP = 16 * TILE
"""Keys whose bits fill a row of lanes: one step of the passes over the scores."""
WORD = 32
_NEG_INF = float("-inf")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The scores of one tile of queries, in VMEM."""

    rows: int
    """Queries, a multiple of 16."""
    width: int
    """Keys, padded: a multiple of `TILE`, and of `GROUP` beyond it."""
    topk: int
    is_bfloat16: bool
    """Whether scores are rounded to bfloat16: half as many counts."""
    dtype: DTypeLike
    """How they are held: bfloat16 where the chip compares it natively, else float32."""

    @property
    def group(self) -> int:
        """Keys per step."""
        return min(GROUP, self.width)

    @property
    def groups(self) -> int:
        """Steps over all keys."""
        return self.width // self.group

    @property
    def span(self) -> int:
        """Keys per step of a count: more groups at once where there are few queries, to fill the pipeline."""
        span = self.group
        while self.width % (2 * span) == 0 and self.block * span < 64 * GROUP:
            span *= 2
        return span

    @property
    def block(self) -> int:
        """Queries per step."""
        return next(block for block in (64, 48, 32, 16) if self.rows % block == 0)


def padded_width(keys: int) -> int:
    """Columns of the scores of so many keys."""
    return round_up(keys, TILE if keys <= GROUP else GROUP)


def mask_words(width: int) -> int:
    """Words that the kernel writes per query: whole lanes."""
    return round_up(cdiv(width, WORD), LANES)


# ---- the scores themselves -------------------------------------------------------------------------------------------
def scratch(spec: Rows) -> Any:
    """Scratch for the scores. Two bfloat16 rows lie in one int32 row: as a bfloat16 array, tiles would be half full."""
    if spec.dtype == jnp.bfloat16:
        return pltpu.VMEM((spec.rows // 2, spec.width), jnp.int32)
    return pltpu.VMEM((spec.rows, spec.width), jnp.float32)


def load(scores: Any, spec: Rows, row: Any, rows: int, column: Any, columns: int) -> Float[Array, "R C"]:
    """A block of the scores; row and rows are multiples of 16, columns of 128."""
    at = pl.ds(column if isinstance(column, int) else pl.multiple_of(column, LANES), columns)
    if spec.dtype == jnp.bfloat16:
        words = scores[pl.ds(pl.multiple_of(row // 2, SUBLANES), rows // 2), at]
        return pltpu.bitcast(words, jnp.bfloat16)
    return scores[pl.ds(pl.multiple_of(row, SUBLANES), rows), at]


def store(scores: Any, spec: Rows, row: Any, column: Any, values: Float[Array, "R C"]) -> None:
    """Writes a block of scores, rounded as `spec` says; the sizes as in `load`."""
    rows, columns = values.shape
    at = pl.ds(column if isinstance(column, int) else pl.multiple_of(column, LANES), columns)
    if spec.dtype == jnp.bfloat16:
        words = pltpu.bitcast(values.astype(jnp.bfloat16), jnp.int32)
        scores[pl.ds(pl.multiple_of(row // 2, SUBLANES), rows // 2), at] = words
    else:
        values = _rounded(values) if spec.is_bfloat16 else values
        scores[pl.ds(pl.multiple_of(row, SUBLANES), rows), at] = values


def _rounded(values: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """The nearest bfloat16 in float32, in integers: a compiler may drop a conversion there and back."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def level_scratch(spec: Rows) -> list[Any]:
    """Scratch of `find_threshold`: each query's threshold, and room for ties at it."""
    return [pltpu.VMEM((spec.rows, LANES), jnp.dtype(spec.dtype)), pltpu.VMEM((spec.rows, LANES), jnp.float32)]


def clear(scores: Any, spec: Rows, column: Any, columns: int) -> None:
    """Marks keys as invisible to all queries."""

    def one_pair(pair: Any, _: None) -> None:
        store(scores, spec, pair * 16, column, jnp.full((16, columns), _NEG_INF, jnp.float32))

    jax.lax.fori_loop(0, spec.rows // 16, one_pair, None)


def clear_padding(scores: Any, spec: Rows, keys: int) -> None:
    """Marks the columns from `keys` on as invisible."""
    if keys < spec.width:
        clear(scores, spec, keys, spec.width - keys)


def mask_scores(
    scores: Float[Array, "R C"], entries: Int[Array, "2 C"], queries: Int[Array, "R 2"]
) -> Float[Array, "R C"]:
    """−inf where an entry (end, segment) is not visible to a query (position, segment); −0 becomes +0."""
    is_visible = (entries[0:1] <= queries[:, 0:1]) & (entries[1:2] == queries[:, 1:2])
    return mask_where(is_visible, scores)


def mask_where(is_visible: Bool[Array, "R C"], scores: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """−inf where not visible; −0 becomes +0."""
    return jnp.where(is_visible, jnp.where(scores == 0.0, 0.0, scores), _NEG_INF)


def _reached(first: Any, end: Any, step: int, unit: int) -> tuple[Any, Any]:
    """Units of `unit` keys that first ≤ c < end, units of `step` keys, reach into."""
    if isinstance(end, int):
        return first * step // unit, cdiv(end * step, unit)
    return jax.lax.div(first * step, unit), jax.lax.div(end * step + (unit - 1), unit)


def groups_of(spec: Rows, first: Any, end: Any, step: int) -> tuple[Any, Any]:
    """The groups that the chunks first ≤ c < end of `step` keys reach into."""
    return _reached(first, end, step, spec.group)


# ---- 1. the k-th largest value ---------------------------------------------------------------------------------------
def _value_of(pattern: jax.Array, is_bfloat16: bool) -> jax.Array:
    """The float32 whose place among all floats is `pattern` (negative floats run backwards)."""
    if is_bfloat16:
        return jax.lax.bitcast_convert_type((pattern ^ ((pattern >> 31) & 0x7FFF)) << 16, jnp.float32)
    return jax.lax.bitcast_convert_type(pattern ^ ((pattern >> 31) & 0x7FFFFFFF), jnp.float32)


def _count(scores: Any, spec: Rows, row: Any, first: Any, end: Any, threshold: jax.Array) -> Float[Array, "R 1"]:
    """How many scores of each row of a block reach its threshold, over the groups first ≤ g < end."""
    one, zero = jnp.ones((), spec.dtype), jnp.zeros((), spec.dtype)

    def step(span: Any, count: jax.Array) -> jax.Array:
        # A lane counts at most 4 GROUP / 128 = 128 here, which bfloat16 holds exactly. Two sums, for an add's latency.
        parts = [jnp.zeros((spec.block, LANES), spec.dtype)] * 2
        x = load(scores, spec, row, spec.block, span * spec.span, spec.span)
        for at in range(0, spec.span, LANES):
            parts = [parts[1], parts[0] + jnp.where(x[:, at : at + LANES] >= threshold, one, zero)]
        return count + (parts[0] + parts[1]).astype(jnp.float32)

    spans = _reached(first, end, spec.group, spec.span)
    count = jax.lax.fori_loop(*spans, step, jnp.zeros((spec.block, LANES), jnp.float32))
    return jnp.sum(count, axis=1, keepdims=True)


def find_threshold(scores: Any, threshold: Any, room: Any, spec: Rows, first: Any, end: Any) -> None:
    """Writes each row's k-th largest value and how many of the scores equal to it are chosen.

    Args:
      scores: reference [rows, width].
      threshold: reference [rows, 128], every lane alike; −inf where fewer than k scores are finite.
      room: float32 reference [rows, 128].
      first, end: only the groups first ≤ g < end are read.
    """
    bits = 16 if spec.is_bfloat16 else 32
    infinity = 0x7F80 if spec.is_bfloat16 else 0x7F800000

    def one_block(block: Any, _: None) -> None:
        row = pl.multiple_of(block * spec.block, spec.block)

        def halve(_: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            low, high, above = state
            middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
            value = _value_of(middle, spec.is_bfloat16).astype(spec.dtype)
            count = jnp.broadcast_to(_count(scores, spec, row, first, end, value), middle.shape)
            enough = count >= spec.topk
            low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)
            return low, high, jnp.where(enough, above, count)

        shape = (spec.block, LANES)
        start = (
            jnp.full(shape, -infinity - 1, jnp.int32), jnp.full(shape, infinity, jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )  # fmt: skip
        low, _, above = jax.lax.fori_loop(0, bits, halve, start)
        value = _value_of(low, spec.is_bfloat16)
        threshold[pl.ds(row, spec.block), :] = value.astype(spec.dtype)
        # What is not visible is −inf and never chosen, even if fewer than k are left.
        room[pl.ds(row, spec.block), :] = jnp.where(value > _NEG_INF, spec.topk - above, 0.0)

    jax.lax.fori_loop(0, spec.rows // spec.block, one_block, None)


# ---- 2. ties, 3. bits ------------------------------------------------------------------------------------------------
def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _flags(condition: jax.Array) -> jax.Array:
    return jnp.where(condition, 1.0, 0.0).astype(jnp.bfloat16)


def prefix_matrix() -> Float[Array, "256 256"]:
    """Inclusive prefix sums of 256 flags."""
    return _flags(_iota((TILE, TILE), 0) <= _iota((TILE, TILE), 1))


def bits_matrix() -> Float[Array, "256 256"]:
    """Column c: the low (c < 128) or high half of word c mod 8 of 256 flags; every word 16 times over."""
    shape = (TILE, TILE)
    key, column = _iota(shape, 0), _iota(shape, 1)
    half = (key & (WORD - 1)) - 16 * (column >= LANES).astype(jnp.int32)
    mine = (key >> 5) == (column & 7)
    # 2^half by its exponent field.
    power = jax.lax.bitcast_convert_type((127 + jnp.clip(half, 0, 15)) << 23, jnp.float32)
    return jnp.where(mine & (half >= 0) & (half < 16), power, 0.0).astype(jnp.bfloat16)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def choose(x: jax.Array, threshold: jax.Array, room: jax.Array, prefix: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Flags of the chosen scores of one group, tile by tile, and the room left for ties.

    Args:
      x: scores [R, group]. threshold, room: [R, 128], as `find_threshold` leaves them (room less what was chosen).
    """
    rows, tiles = x.shape[0], x.shape[1] // TILE
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)
    level = jnp.concatenate([threshold, threshold], axis=1)
    parts = [x[:, t * TILE : (t + 1) * TILE] for t in range(tiles)]
    ties = [jnp.where(part == level, one, zero) for part in parts]
    ranks = _dot(jnp.concatenate([tie.astype(jnp.bfloat16) for tie in ties], axis=0), prefix)
    chosen = []
    for t in range(tiles):
        rank = ranks[t * rows : (t + 1) * rows]
        fits = jnp.where(rank <= jnp.concatenate([room, room], axis=1), 1.0, 0.0).astype(x.dtype)
        flags = jnp.where(parts[t] > level, one, zero) + ties[t] * fits
        chosen.append(flags.astype(jnp.bfloat16))
        room = room - jnp.broadcast_to(rank[:, TILE - 1 :], room.shape)
    return chosen, room


def pack_bits(chosen: list[jax.Array], bits: jax.Array) -> Int[Array, "R 128"]:
    """Words of one group: bit j of word w is key 32 w + j."""
    rows = chosen[0].shape[0]
    halves = _dot(jnp.concatenate(chosen, axis=0), bits)
    lane = _iota((rows, LANES), 1)
    low = high = jnp.zeros((rows, LANES), jnp.float32)
    for t in range(len(chosen)):
        half = halves[t * rows : (t + 1) * rows]
        mine = (lane >> 3) == t
        low, high = jnp.where(mine, half[:, :LANES], low), jnp.where(mine, half[:, LANES:], high)
    return low.astype(jnp.int32) | (high.astype(jnp.int32) << 16)


def write_mask(scores: Any, threshold: Any, room: Any, mask: Any, spec: Rows, first: Any, end: Any) -> None:
    """Writes the bit mask of the chosen keys, zero outside of the groups first ≤ g < end.

    Args:
      mask: int32 reference [rows, words].
    """
    prefix, bits = prefix_matrix(), bits_matrix()
    mask[...] = jnp.zeros(mask.shape, mask.dtype)

    def one_block(block: Any, _: None) -> None:
        row = pl.multiple_of(block * spec.block, spec.block)
        level = threshold[pl.ds(row, spec.block), :]

        def step(group: Any, left: jax.Array) -> jax.Array:
            x = load(scores, spec, row, spec.block, group * spec.group, spec.group)
            chosen, left = choose(x, level, left, prefix)
            place = pl.multiple_of(group * LANES, LANES)
            mask[pl.ds(row, spec.block), pl.ds(place, LANES)] = pack_bits(chosen, bits)
            return left

        jax.lax.fori_loop(first, end, step, room[pl.ds(row, spec.block), :])

    jax.lax.fori_loop(0, spec.rows // spec.block, one_block, None)


# ---- 3. a list -------------------------------------------------------------------------------------------------------
_SLOTS = 1 << 14
"""Ranks fit the upper bits of a word beside 10 bits of difference."""
_EMPTY = (_SLOTS - 1) << 10 | 256
_LIST_ROWS = 16


def list_width(topk: int) -> int:
    """Columns that the kernel writes per query: whole lanes."""
    return round_up(topk, LANES)


def list_scratch(spec: Rows) -> Any:
    """Scratch of `write_list`: a row of words per query and block of 128 keys."""
    return pltpu.VMEM((_LIST_ROWS * spec.width // LANES, LANES), jnp.int32)


def _rank_blocks(
    scores: Any, threshold: Any, room: Any, words: Any, spec: Rows, row: Any, first: Any, end: Any
) -> Float[Array, "16 128"]:
    """Writes what `_look_up` needs of 16 queries and returns how many keys each has chosen.

    A word of key j in block b holds the number of keys chosen before the block, and A[b, j] − A[b − 1, j] + 256, where
    A is the rank mod 256 of a chosen key among the chosen, counted from 1, and −1 for others.
    """
    blocks = spec.width // LANES
    prefix = prefix_matrix()
    level = threshold[pl.ds(row, _LIST_ROWS), :]
    words[...] = jnp.full(words.shape, _EMPTY, jnp.int32)

    def step(group: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, before, previous = state
        x = load(scores, spec, row, _LIST_ROWS, group * spec.group, spec.group)
        chosen, left = choose(x, level, left, prefix)
        ranks = _dot(jnp.concatenate(chosen, axis=0), prefix)
        for t, flags in enumerate(chosen):
            rank = ranks[t * _LIST_ROWS : (t + 1) * _LIST_ROWS]
            start = before
            for half in range(2):
                lanes = slice(half * LANES, (half + 1) * LANES)
                absolute = (before + rank[:, lanes]).astype(jnp.int32) & 255
                name = jnp.where(flags[:, lanes].astype(jnp.float32) > 0.5, absolute, -1)
                word = (start.astype(jnp.int32) << 10) + (name - previous + 256)
                block = group * (spec.group // LANES) + 2 * t + half
                for part in range(0, _LIST_ROWS, SUBLANES):
                    at = pl.ds(part * blocks + block, SUBLANES, stride=blocks)
                    words[at, :] = word[part : part + SUBLANES]
                previous = name
                start = before + jnp.broadcast_to(rank[:, (half + 1) * LANES - 1 :][:, :1], before.shape)
            before = start
        return left, before, previous

    zeros = jnp.zeros((_LIST_ROWS, LANES), jnp.float32)
    start = (room[pl.ds(row, _LIST_ROWS), :], zeros, zeros.astype(jnp.int32))
    return jax.lax.fori_loop(first, end, step, start)[1]


def _look_up(words: Any, spec: Rows, query: Any, slots: int) -> Int[Array, "1 K"]:
    """Keys of the slots of one query, garbage beyond the last.

    U[b, k] says whether block b begins at or before slot k. Its column sums count the blocks up to the one that holds
    the slot, and a product with the differences of A leaves that block's ranks: slot k is the key whose rank is k + 1.
    """
    blocks = spec.width // LANES
    piece = min(blocks, TILE)
    slot = _iota((1, slots), 1)
    bound = (slot + 1) << 10

    def add(part: Any, found: jax.Array) -> jax.Array:
        start = pl.multiple_of(query * blocks + part * piece, SUBLANES)
        word = words[pl.ds(start, piece), :]
        begins = jnp.concatenate([word] * (slots // LANES), axis=1) < bound
        steps = jnp.where(begins, 1.0, 0.0).astype(jnp.bfloat16)
        ranks = ((word & 1023) - 256).astype(jnp.float32).T.astype(jnp.bfloat16)
        left = jnp.concatenate([ranks, jnp.ones((16, piece), jnp.bfloat16)], axis=0)
        return found + _dot(left, steps)

    found = jax.lax.fori_loop(0, blocks // piece, add, jnp.zeros((LANES + 16, slots), jnp.float32))
    is_mine = found[:LANES].astype(jnp.int32) == ((slot + 1) & 255)
    lane = jnp.sum(jnp.where(is_mine, _iota((LANES, slots), 0), 0), axis=0, keepdims=True)
    return (found[LANES : LANES + 1].astype(jnp.int32) - 1) * LANES + lane


def write_list(scores: Any, threshold: Any, room: Any, words: Any, out: Any, spec: Rows, first: Any, end: Any) -> None:
    """Writes the chosen keys in ascending order, then −1; only the groups first ≤ g < end are read.

    Args:
      words: int32 scratch of `list_scratch`. out: int32 reference [rows, slots].
    """
    slots = out.shape[1]

    def some_rows(step: Any, _: None) -> None:
        row = pl.multiple_of(step * _LIST_ROWS, _LIST_ROWS)
        count = _rank_blocks(scores, threshold, room, words, spec, row, first, end)
        out[pl.ds(row, _LIST_ROWS), :] = jnp.concatenate([count.astype(jnp.int32)] * (slots // LANES), axis=1)

        def one_query(query: Any, _: None) -> None:
            at = pl.ds(row + query, 1)
            keys = _look_up(words, spec, query, slots)
            out[at, :] = jnp.where(_iota((1, slots), 1) < out[at, :], keys, -1)

        jax.lax.fori_loop(0, _LIST_ROWS, one_query, None)

    jax.lax.fori_loop(0, spec.rows // _LIST_ROWS, some_rows, None)
