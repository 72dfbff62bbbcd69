"""Exact top-k of rows of scores in plain jnp."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.index_topk.reference import pack_mask, select


def exact_topk(
    scores: Float[Array, "T N"], *, topk: int, output: Literal["list", "mask"] = "list"
) -> Int[Array, "T W"]:
    """See `api.exact_topk`."""
    # In the order that sorts floats −0 is below 0.
    values = jnp.where(scores == 0, jnp.zeros_like(scores), scores)
    selection = select(values, jnp.ones(scores.shape, bool), topk)
    return selection if output == "list" else pack_mask(selection, scores.shape[1])
