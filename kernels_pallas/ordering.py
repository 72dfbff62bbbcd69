"""Sorting by small keys without a sort, and sums of rows that were sorted.

On a TPU a sort is slow, and each one takes the compiler seconds.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

_BLOCK = 128
"""Keys that are ranked among each other by one product."""
_FEW_BLOCKS = 1024
"""So many are ranked by one product as well."""


class Order(NamedTuple):
    """A stable order by key."""

    place: Int[Array, " N"]
    """Where each item goes."""
    item: Int[Array, " N"]
    """What is at each place: the inverse permutation."""
    sizes: Int[Array, " C"]
    """Items of each key."""


def by_key(keys: Int[Array, " N"], count: int) -> Order:
    """The stable order of N items by keys of 0 to `count` − 1, by counting.

    How many equal keys precede an item is a product of a triangle of ones with the keys' indicators, block by block:
    work and memory N · `count`. What precedes a key, and a block if there are few, are such products too: the compiler
    takes longer over running sums than over everything else here.
    """
    items = keys.shape[0]
    blocks = -(-max(items, 1) // _BLOCK)
    padded = jnp.pad(keys, (0, blocks * _BLOCK - items), constant_values=count).reshape(blocks, _BLOCK)
    is_key = padded[..., None] == jnp.arange(count)
    within = _product("ij,bjk->bik", jnp.tril(_ones(_BLOCK)), is_key)
    totals = within[:, -1]
    sizes = jnp.sum(totals, axis=0)
    smaller = jnp.sum(_product("bk,kl->bl", totals, jnp.triu(_ones(count), 1)), axis=0)
    earlier = (
        _product("ab,bk->ak", jnp.tril(_ones(blocks), -1), totals)
        if blocks <= _FEW_BLOCKS
        else jnp.cumsum(totals, axis=0) - totals
    )
    before = earlier + smaller
    place = jnp.sum(jnp.where(is_key, within + before[:, None] - 1, 0), axis=-1).reshape(-1)[:items]
    item = jnp.zeros(items, jnp.int32).at[place].set(jnp.arange(items, dtype=jnp.int32), unique_indices=True)
    return Order(place, item, sizes)


def _ones(size: int) -> Array:
    return jnp.ones((size, size), jnp.bfloat16)


def _product(equation: str, left: Array, right: Array) -> Int[Array, "..."]:
    """Exact: numbers up to the size of a block in bfloat16, their sums, up to N < 2²⁴, in float32."""
    left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32).astype(jnp.int32)


def gather_sum(rows: Shaped[Array, "R D"], places: Int[Array, "T K"]) -> Float[Array, "T D"]:
    """Σ_k rows[places[:, k]] in float32: additions that fuse with the gathers, where a reduction would not."""
    return functools.reduce(jnp.add, [rows[places[:, k]].astype(jnp.float32) for k in range(places.shape[1])])
