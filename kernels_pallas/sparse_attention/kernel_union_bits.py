"""The union of neighbouring selections given as bits: each chosen entry once, with a word that says who chose it.

One grid step takes the mask of a tile of 32 queries (or fewer), 16,384 entries at a time, and

1. transposes squares of 32 × 32 bits: a word per (query, 32 entries) becomes a word per (entry, 32 queries),
2. moves the words that are not zero to the front (`places`),
3. appends them to those of the entries before.

The cost grows with the number of entries; stretches that nobody chose are skipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels_pallas.sparse_attention.kernel_union import Unions, over_tiles, padded_topk
from kernels_pallas.sparse_attention.layout import WORD, pad_to
from kernels_pallas.sparse_attention.places import Registers, to_front, zeros_before
from kernels_pallas.tpu import LANES, SUBLANES, Chip, check_vmem, round_up

_PLACE_BITS = 14
_STRETCH = 1 << _PLACE_BITS
"""Entries that are put in order together: 128 rows of 128."""
_HALVES = ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))
"""Distance of the rows that trade halves of their bits, and the mask of the lower halves."""


def _transposed_bits(x: Int[Array, "4 8 W"]) -> Int[Array, "4 8 W"]:
    """Bit b of row q → bit q of row b, in every column; row q is (q // 8, q % 8)."""
    for distance, low in _HALVES:
        high = ~low
        if distance >= SUBLANES:
            pairs = x.reshape(-1, 2, distance // SUBLANES, *x.shape[1:])
            a, b = pairs[:, 0], pairs[:, 1]
            upper = jax.lax.shift_right_logical(a, jnp.full_like(a, distance)) & low
            x = jnp.stack([(a & low) | ((b & low) << distance), upper | (b & high)], axis=1).reshape(x.shape)
            continue
        is_upper = jax.lax.broadcasted_iota(jnp.int32, (1, SUBLANES, 1), 1) & distance != 0
        before, after = pltpu.roll(x, distance, 1), pltpu.roll(x, SUBLANES - distance, 1)
        to_lower = (x & low) | ((after & low) << distance)
        to_upper = (jax.lax.shift_right_logical(before, jnp.full_like(x, distance)) & low) | (x & high)
        x = jnp.where(is_upper, to_upper, to_lower)
    return x


def _ordered(bits: Int[Array, "Q W"]) -> tuple[Registers, Registers]:
    """Words per query of one stretch → (number of the entry in the stretch, word), those with a word first."""
    missing = WORD - bits.shape[0]
    if missing:
        bits = jnp.concatenate([bits, jnp.zeros((missing, bits.shape[1]), bits.dtype)], axis=0)
    turned = _transposed_bits(bits.reshape(-1, SUBLANES, bits.shape[1]))
    tiles = range(0, bits.shape[1], LANES)
    words = jnp.concatenate([turned[..., at : at + LANES] for at in tiles], axis=0)
    register, sublane, lane = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    groups = turned.shape[0]
    entry = ((register // groups) * LANES + lane) * WORD + (register % groups) * SUBLANES + sublane
    left = jnp.where(words == 0, 0, zeros_before(words) << _PLACE_BITS | entry)
    left, words, _ = to_front(left, words, shift=_PLACE_BITS)
    return left & (_STRETCH - 1), words


def _in_rows(x: Registers) -> Int[Array, "128 128"]:
    """Places that follow one another along the lanes."""
    turned = x.reshape(-1, LANES).T
    lane = jax.lax.broadcasted_iota(jnp.int32, turned.shape, 1)
    registers = x.shape[0]
    return jnp.take_along_axis(turned, (lane % registers) * SUBLANES + lane // registers, axis=1)


def _append(found: Any, rows: Int[Array, "128 128"], count: Any, most: int) -> None:
    """Writes rows of places behind the first `count`, and leaves those as they are; `most` rows count."""
    # A mask with more bits than was promised must not write past the scratch.
    row, shift = jnp.minimum(count // LANES, most), count % LANES
    rows = pltpu.roll(rows, shift, 1)
    is_first = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) >= shift
    for at, mine in ((pl.ds(row, LANES), is_first), (pl.ds(row + 1, LANES), ~is_first)):
        found[at, :] = jnp.where(mine, rows, found[at, :])


def _unite(mask: Any, members: Any, words: Any, found_members: Any, found_words: Any) -> None:
    """mask: int32 [1, Q, W]. members, words: int32 [1, 1, C / 128, 128]. found: with room for a stretch more."""
    # Sums and maxima over whole registers exist for floats only; counts up to a stretch are exact in them.
    size, step = members.shape[2], _STRETCH // WORD
    found_words[...] = jnp.zeros(found_words.shape, jnp.int32)

    def one_stretch(number: Any, count: Any) -> Any:
        bits = mask[0, :, pl.ds(pl.multiple_of(number * step, step), step)]

        def add(count: Any) -> Any:
            entry, word = _ordered(bits)
            _append(found_members, _in_rows(entry) + number * _STRETCH, count, size)
            _append(found_words, _in_rows(word), count, size)
            return count + jnp.sum(jnp.where(word != 0, 1.0, 0.0)).astype(jnp.int32)

        is_chosen = jnp.max(jnp.where(bits != 0, 1.0, 0.0)) > 0
        return jax.lax.cond(is_chosen, add, lambda count: count, count)

    jax.lax.fori_loop(0, mask.shape[2] // step, one_stretch, jnp.int32(0))
    word = found_words[:size, :]
    first = jnp.where(found_words[:1, :1] != 0, found_members[:1, :1], 0)
    members[0, 0] = jnp.where(word != 0, found_members[:size, :], jnp.broadcast_to(first, word.shape))
    words[0, 0] = word


def unions_of_bits(mask: Int[Array, "B S D"], topk: int, queries: int, chip: Chip) -> Unions:
    """The kernel.

    Args:
      mask: bit j of word w is set where the query chose entry 32 w + j.
      topk: no query has chosen more.
      queries: per tile, Q: 8, 16 or 32. The last tile may be partly filled.

    Raises:
      ValueError: masks of a tile that do not fit into VMEM.
    """
    topk, width = padded_topk(topk, queries), round_up(mask.shape[2], _STRETCH // WORD)
    rows = queries * topk // LANES
    needed = 4 * (2 * queries * width + 2 * (3 * rows + LANES + SUBLANES) * LANES)
    check_vmem(f"sparse_attention, union of masks of {width * WORD:,} entries", needed, chip, "give lists")
    return over_tiles(
        _unite, pad_to(mask.astype(jnp.int32), 2, width), topk, queries, chip, empty=0,
        name="sparse_attention_union_bits",
        scratch=[pltpu.VMEM((rows + LANES + SUBLANES, LANES), jnp.int32)] * 2,
    )  # fmt: skip
