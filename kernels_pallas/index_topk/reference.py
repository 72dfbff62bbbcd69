"""Lightning-indexer scores and exact top-k in plain jnp (architecture.md §7)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def scores(
    q: Float[Array, "B S N H"], weights: Float[Array, "B S N"], keys: Float[Array, "B P H"]
) -> Float[Array, "B S P"]:
    """I[t, s] = Σ_h weights[t, h] · relu(q[t, h] · keys[s]), in float32."""
    products = jnp.einsum(
        "bsnh,bph->bsnp", q, keys, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return jnp.einsum(
        "bsnp,bsn->bsp", jax.nn.relu(products), weights.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def select(values: Float[Array, "*T P"], visible: Bool[Array, "*T P"], topk: int) -> Int[Array, "*T K"]:
    """Indices of the `topk` largest visible values, the lowest index on a tie; −1 where fewer are visible."""
    best, index = jax.lax.top_k(jnp.where(visible, values, -jnp.inf), min(topk, values.shape[-1]))
    return jnp.where(best > -jnp.inf, index, -1).astype(jnp.int32)


def index_topk(
    q: Float[Array, "B S N H"],
    weights: Float[Array, "B S N"],
    keys: Float[Array, "B P H"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    entry_end: Int[Array, "B P"],
    entry_segment: Int[Array, "B P"],
    *,
    topk: int,
) -> Int[Array, "B S K"]:
    """The whole selection at once; see `api.index_topk`."""
    visible = (entry_end[:, None] <= q_position[..., None]) & (entry_segment[:, None] == q_segment[..., None])
    return select(scores(q, weights, keys), visible, topk)
