"""Index scores and top-k by blocks of queries: no [S, P] array, memory linear in the sequence."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.index_topk import reference
from kernels_pallas.tpu import cdiv

_SCORE_ELEMENTS = 1 << 21
"""Scores per head and block: 8 MiB of float32, times the index heads."""


def index_topk(
    q: Float[Array, "B S N H"],
    weights: Float[Array, "B S N"],
    keys: Shaped[Array, "B P H"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    entry_end: Int[Array, "B P"],
    entry_segment: Int[Array, "B P"],
    key_scale: Float[Array, "B P"] | None = None,
    *,
    topk: int,
    output: Literal["list", "mask"] = "list",
) -> Int[Array, "B S W"]:
    """See `api.index_topk`."""
    batch, length, heads, _ = q.shape
    block = max(8, min(length, _SCORE_ELEMENTS // (batch * keys.shape[1] * heads)))
    count = cdiv(length, block)

    def one_block(inputs: tuple[jax.Array, ...]) -> jax.Array:
        return reference.index_topk(
            inputs[0], inputs[1], keys, inputs[2], inputs[3], entry_end, entry_segment, key_scale,
            topk=topk, output=output,
        )  # fmt: skip

    if count == 1:
        return one_block((q, weights, q_position, q_segment))

    def blocks_of(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, block, *x.shape[2:]), 1, 0)

    chosen = jax.lax.map(one_block, tuple(blocks_of(x) for x in (q, weights, q_position, q_segment)))
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, count * block, -1)[:, :length]
