"""The k-th largest of each row of scores in VMEM, with rows on lanes.

Each step of a bisection counts how many scores reach a candidate, and the next candidate depends on the counts. With
keys on lanes a count is a sum over lanes, whose way through the cross-lane unit and back takes longer than the counting
itself. Scores are therefore turned once: keys lie on sublanes and across registers, rows on lanes, and a count is a sum
of registers.

Scores are compared as integers that order like them. Where the chip compares 16-bit integers a register holds two of
them per lane: first the upper halves are bisected, then the lower halves of the scores whose upper half is that of the
k-th. Fewer than 128 rows leave lanes over: those hold copies or, where there are many keys, other parts of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.index_topk.kernel_scores import NEG_INF
from kernels_pallas.tpu import LANES, SUBLANES

_UNIT = 16
"""Registers of which all but one are sorted, lane by lane, before they are counted."""
_UNITS = 8
"""Units per step of a count."""
_TURNS = 4
"""Squares of 128 × 128 words that are turned together."""
_SIGN = -(1 << 31)
_LOWEST = -(1 << 15)


@dataclasses.dataclass(frozen=True)
class Turned:
    """Scores of one tile of rows, keys first."""

    rows: int
    """A power of two from 16, or a multiple of 128."""
    width: int
    """Keys per row, padded: a multiple of 256 for every part."""
    topk: int
    bits: int
    """Of a score: 16 or 32."""
    is_packed: bool
    """Whether 16-bit halves are compared, two to a lane."""
    parts: int
    """Lanes that share a row's keys, at most 128 / rows. Adding their counts up takes longer than 50 registers do."""

    @property
    def groups(self) -> int:
        """Registers side by side."""
        return max(1, self.rows // LANES)

    @property
    def depth(self) -> int:
        """Rows of words per group."""
        return self.width // self.parts // (2 if self.is_packed else 1)

    @property
    def phases(self) -> int:
        """Bisections, each of other bits."""
        return 2 if self.is_packed and self.bits == 32 else 1

    @property
    def buffers(self) -> int:
        """Arrays of words: those of each phase, and with two phases the sorted ones."""
        return 3 if self.phases == 2 else 1


def scratch(spec: Turned) -> list[Any]:
    """The words of each phase, and where there are two of them room for those that are counted."""
    return [pltpu.VMEM((spec.groups, spec.depth, LANES), jnp.int32)] * spec.buffers


def _ordered(scores: Float[Array, "R C"]) -> Int32[Array, "R C"]:
    """Integers that order like the scores; −0 is 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value_of(pattern: Int32[Array, "R C"]) -> Float[Array, "R C"]:
    """The float32 with this place in the order."""
    return jax.lax.bitcast_convert_type(pattern ^ ((pattern >> 31) & 0x7FFFFFFF), jnp.float32)


def turn(scores: Any, words: list[Any], spec: Turned) -> None:
    """Fills the words of the phases from the [rows, width] scores, bfloat16 or float32."""
    rows, step = min(spec.rows, LANES), LANES * (2 if spec.is_packed else 1)
    keys = spec.width // spec.parts

    def tile(group: int, start: Any) -> Int32[Array, "128 128"]:
        """Rows and parts on sublanes, 128 keys on lanes."""
        at = [
            scores[group * LANES : group * LANES + rows, pl.ds(pl.multiple_of(part * keys + start, LANES), LANES)]
            for part in range(spec.parts)
        ]
        copies = LANES // (rows * spec.parts)
        return _ordered(jnp.concatenate(at * copies, axis=0).astype(jnp.float32))

    def one_step(index: Any, _: None) -> None:
        place = pl.ds(pl.multiple_of(index * LANES, LANES), LANES)
        for group in range(spec.groups):
            first = tile(group, index * step)
            if not spec.is_packed:
                words[0][group, place, :] = jnp.transpose(first if spec.bits == 32 else first >> 16)
                continue
            second = tile(group, index * step + LANES)
            words[0][group, place, :] = jnp.transpose((first & ~0xFFFF) | jax.lax.shift_right_logical(second, 16))
            if spec.phases == 2:
                # The lower halves order as unsigned integers: with their upper bit turned over they do as signed ones.
                low = (first << 16) | (second & 0xFFFF)
                words[1][group, place, :] = jnp.transpose(low ^ (_SIGN | 0x8000))

    # Several steps together: a register takes long through the transposing unit, and others can follow it.
    count, together = keys // step, max(d for d in range(1, _TURNS // spec.groups + 1) if keys // step % d == 0)

    def some_steps(index: Any, _: None) -> None:
        for i in range(together):
            one_step(index * together + i, None)

    jax.lax.fori_loop(0, count // together, some_steps, None)


def _halves(value: Int32[Array, "8 128"]) -> jax.Array:
    """The same 16-bit integer in both halves of a lane."""
    return pltpu.bitcast((value << 16) | (value & 0xFFFF), jnp.int16)


def sorting_network(size: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort: pairs of places to put in order, for any size."""
    pairs, p = [], 1
    while p < size:
        k = p
        while k:
            for j in range(k % p, size - k, 2 * k):
                pairs += [
                    (i + j, i + j + k)
                    for i in range(min(k, size - j - k))
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p)
                ]
            k //= 2
        p *= 2
    return pairs


def _registers(group: int, unit: Any) -> list[Any]:
    """Where the registers of a unit lie."""
    return [
        (group, pl.ds(pl.multiple_of((unit * _UNIT + i) * SUBLANES, SUBLANES), SUBLANES), slice(None))
        for i in range(_UNIT)
    ]


def _sort(words: list[Any], spec: Turned, upper: list[jax.Array] | None = None) -> None:
    """Sorts all but the last register of each unit, lane by lane, largest first, into the last of the words.

    Args:
      words: as `turn` leaves them.
      upper: None for the first phase. In the second, where the upper half is not this, the lower half becomes the
        lowest, which is never asked for.
    """
    levels = [_halves(value) for value in upper or []]
    always = _numbers(jnp.full((SUBLANES, LANES), pl.program_id(0) & 0x7FFF7FFF, jnp.int32), spec) >= 0

    def one_unit(unit: Any, _: None) -> None:
        for group in range(spec.groups):
            places = _registers(group, unit)
            values = [_numbers(words[0 if upper is None else 1][at], spec) for at in places]
            if upper is not None:
                lowest = jnp.full(values[0].shape, _LOWEST, jnp.int16)
                high = [_numbers(words[0][at], spec) for at in places]
                values = [jnp.where(h == levels[group], v, lowest) for h, v in zip(high, values, strict=True)]
            for a, b in sorting_network(_UNIT - 1):
                values[a], values[b] = _in_order(values[a], values[b], always)
            for at, value in zip(places, values, strict=True):
                words[-1][at] = pltpu.bitcast(value, jnp.int32) if spec.is_packed else value

    jax.lax.fori_loop(0, spec.depth // SUBLANES // _UNIT, one_unit, None)


def _in_order(a: jax.Array, b: jax.Array, always: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The larger and the smaller; `always` is true, which the compiler must not know.

    No chip has a maximum of 16-bit integers, but a compiler that recognises one in two selections asks for it.
    """
    if a.dtype == jnp.int32:
        return jnp.maximum(a, b), jnp.minimum(a, b)
    is_first = (a >= b) & always
    return jnp.where(is_first, a, b), jnp.where(is_first, b, a)


def _numbers(word: jax.Array, spec: Turned) -> jax.Array:
    return pltpu.bitcast(word, jnp.int16) if spec.is_packed else word


def _reaching(values: list[jax.Array], level: jax.Array) -> list[jax.Array]:
    """Counts whose sum is how many of the values, sorted but for the last, reach the level: a search in each lane."""
    weight, found, masks = (len(values) + 1) // 2, [], []

    def pivot(first: int, size: int, steps: list[jax.Array]) -> jax.Array:
        half = size // 2
        if not steps:
            return values[first + half]
        step, *rest = steps
        return jnp.where(step, pivot(first + half + 1, half, rest), pivot(first, half, rest))

    def counted(mask: jax.Array, weight: int) -> jax.Array:
        return jnp.where(mask, jnp.full((), weight, level.dtype), jnp.zeros((), level.dtype))

    while weight:
        masks.append(pivot(0, len(values) - 1, masks) >= level)
        found.append(counted(masks[-1], weight))
        weight //= 2
    return [*found, counted(values[-1] >= level, 1)]


def _counts(words: Any, spec: Turned, candidates: list[jax.Array]) -> list[Int32[Array, "8 128"]]:
    """How many scores of each row reach its candidate, on all sublanes and lanes of the row."""
    levels = [_halves(c) for c in candidates] if spec.is_packed else candidates
    units = spec.depth // SUBLANES // _UNIT
    block = max(d for d in range(1, max(1, _UNITS // spec.groups) + 1) if units % d == 0)

    def one_block(index: Any, sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
        for i in range(block):
            for group, level in enumerate(levels):
                places = _registers(group, index * block + i)
                found = _reaching([_numbers(words[at], spec) for at in places], level)
                sums = [*sums[:group], [s + f for s, f in zip(sums[group], found, strict=True)], *sums[group + 1 :]]
        return sums

    start = [[jnp.zeros_like(level)] * (_UNIT.bit_length()) for level in levels]
    found = one_block(0, start) if units == block else jax.lax.fori_loop(0, units // block, one_block, start)
    return [_whole(functools.reduce(jnp.add, sums), spec) for sums in found]


def _whole(count: jax.Array, spec: Turned) -> Int32[Array, "8 128"]:
    """Sums over sublanes, halves of lanes and the lanes of a row."""
    if spec.is_packed:
        pairs = pltpu.bitcast(count, jnp.int32)
        count = ((pairs << 16) >> 16) + (pairs >> 16)
    for distance in (4, 2, 1):
        count = count + pltpu.roll(count, distance, 0)
    distance = spec.rows
    while distance < spec.rows * spec.parts:
        count = count + pltpu.roll(count, distance, 1)
        distance *= 2
    return count


def _bisect(words: Any, spec: Turned, bits: int, wanted: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """The largest integers of so many bits that `wanted` of the words reach, and how many words are larger."""
    shape = (SUBLANES, LANES)

    def one_bit(index: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        found, above = state
        candidates = [value + jnp.left_shift(jnp.int32(1), bits - 1 - index) for value in found]
        counts = _counts(words, spec, candidates)
        enough = [count >= need for count, need in zip(counts, wanted, strict=True)]
        return (
            [jnp.where(e, c, v) for e, c, v in zip(enough, candidates, found, strict=True)],
            [jnp.where(e, a, c) for e, a, c in zip(enough, above, counts, strict=True)],
        )

    start = [jnp.full(shape, _SIGN >> (32 - bits), jnp.int32)] * spec.groups
    return jax.lax.fori_loop(0, bits, one_bit, (start, [jnp.zeros(shape, jnp.int32)] * spec.groups))


def find_threshold(words: list[Any], threshold: Any, room: Any, spec: Turned) -> None:
    """Writes each row's k-th largest value and how many of the scores equal to it are chosen.

    Args:
      words: as `turn` leaves them; the last ones are changed.
      threshold: reference [rows, 128], bfloat16 or float32, lanes alike; −inf where fewer than k scores are finite.
      room: float32 reference [rows, 128].
    """
    wanted = [jnp.full((SUBLANES, LANES), spec.topk, jnp.int32)] * spec.groups
    bits = 32 if not spec.is_packed and spec.bits == 32 else 16
    _sort(words, spec)
    found, above = _bisect(words[-1], spec, bits, wanted)
    if spec.phases == 2:
        _sort(words, spec, found)
        low, more = _bisect(words[-1], spec, 16, [w - a for w, a in zip(wanted, above, strict=True)])
        found = [(h << 16) | ((l & 0xFFFF) ^ 0x8000) for h, l in zip(found, low, strict=True)]
        above = [a + m for a, m in zip(above, more, strict=True)]
    elif spec.bits == 16:
        # A bfloat16 is a float32 whose lower half is empty; in the order of negative ones that half is full.
        found = [(h << 16) | ((h >> 31) & 0xFFFF) for h in found]
    is_first = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0) == 0
    rows = min(spec.rows, LANES)
    for group, (pattern, larger) in enumerate(zip(found, above, strict=True)):
        value = value_of(pattern)
        # What is −inf is never chosen, even if fewer than k are left.
        left = jnp.where(value > NEG_INF, (spec.topk - larger).astype(jnp.float32), 0.0)
        columns = jnp.transpose(jnp.where(is_first, value, left))[:rows]
        at = pl.ds(group * LANES, rows)
        threshold[at, :] = jnp.broadcast_to(columns[:, :1], (rows, LANES)).astype(threshold.dtype)
        room[at, :] = jnp.broadcast_to(columns[:, 1:2], (rows, LANES))
