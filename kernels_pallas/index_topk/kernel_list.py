"""The chosen of score rows in VMEM as lists.

A triangular product ranks the chosen flags of `kernel_select`, and slot k of a list looks its block of keys up among
the blocks' first ranks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.index_topk.kernel_scores import TILE, Rows, load
from kernels_pallas.index_topk.kernel_select import choose, dot, iota, prefix_matrix
from kernels_pallas.tpu import LANES, SUBLANES, round_up

_SLOTS = 1 << 14
"""Ranks fit the upper bits of a word beside 10 bits of difference."""
_EMPTY = (_SLOTS - 1) << 10 | 256
_LIST_ROWS = 16
_TOGETHER = 2
"""Queries whose slots are looked up together: their products wait for one another's otherwise."""


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
        ranks = dot(jnp.concatenate(chosen, axis=0), prefix)
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
    slot = iota((1, slots), 1)
    bound = (slot + 1) << 10

    def add(part: Any, found: jax.Array) -> jax.Array:
        start = pl.multiple_of(query * blocks + part * piece, SUBLANES)
        word = words[pl.ds(start, piece), :]
        begins = jnp.concatenate([word] * (slots // LANES), axis=1) < bound
        steps = jnp.where(begins, 1.0, 0.0).astype(jnp.bfloat16)
        ranks = ((word & 1023) - 256).astype(jnp.float32).T.astype(jnp.bfloat16)
        left = jnp.concatenate([ranks, jnp.ones((16, piece), jnp.bfloat16)], axis=0)
        return found + dot(left, steps)

    found = jax.lax.fori_loop(0, blocks // piece, add, jnp.zeros((LANES + 16, slots), jnp.float32))
    is_mine = found[:LANES].astype(jnp.int32) == ((slot + 1) & 255)
    lane = jnp.sum(jnp.where(is_mine, iota((LANES, slots), 0), 0), axis=0, keepdims=True)
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

        def some_queries(first: Any, _: None) -> None:
            for query in range(_TOGETHER):
                at = pl.ds(row + first * _TOGETHER + query, 1)
                keys = _look_up(words, spec, first * _TOGETHER + query, slots)
                out[at, :] = jnp.where(iota((1, slots), 1) < out[at, :], keys, -1)

        jax.lax.fori_loop(0, _LIST_ROWS // _TOGETHER, some_queries, None)

    jax.lax.fori_loop(0, spec.rows // _LIST_ROWS, some_rows, None)
