"""Window + compressed entries + sink in one softmax, in plain jnp with whole score arrays (architecture.md §5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


def attend(
    q: Float[Array, "*T N H"],
    keys: Float[Array, "*#T K H"],
    mask: Bool[Array, "*T K"],
    sink: Float[Array, " N"],
    scale: float,
) -> Float[Array, "*T N H"]:
    """Softmax attention of each query over its own keys, which are also the values; the sink has no value.

    Scores, softmax and the weighted sum are float32; the result has q's dtype.
    """
    logits = jnp.einsum("...nh,...kh->...nk", q, keys, precision=_HIGHEST, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(mask[..., None, :], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1), sink))
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1) + jnp.exp(sink - top)
    out = jnp.einsum(
        "...nk,...kh->...nh", weights.astype(q.dtype), keys, precision=_HIGHEST, preferred_element_type=jnp.float32
    )
    return (out / total[..., None]).astype(q.dtype)


def selection_mask(selection: Int[Array, "*T K"], size: int) -> Bool[Array, "*T P"]:
    """Which of `size` entries a list of indices names; −1 names none."""
    return jnp.any(selection[..., None] == jnp.arange(size), axis=-2)


def sparse_attention(
    q: Float[Array, "B S N H"],
    keys: Float[Array, "B WS H"],
    sink: Float[Array, " N"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    key_segment: Int[Array, "B WS"],
    entries: Float[Array, "B P H"] | None,
    entry_end: Int[Array, "B P"] | None,
    entry_segment: Int[Array, "B P"] | None,
    selection: Int[Array, "B S K"] | None,
    *,
    window: int,
    scale: float,
) -> Float[Array, "B S N H"]:
    """See `api.sparse_attention`."""
    length = q.shape[1]
    distance = window + jnp.arange(length)[:, None] - jnp.arange(keys.shape[1])[None, :]
    mask = ((distance >= 0) & (distance < window))[None] & (key_segment[:, None] == q_segment[..., None])
    if entries is not None:
        assert entry_end is not None
        assert entry_segment is not None
        visible = (entry_end[:, None] <= q_position[..., None]) & (entry_segment[:, None] == q_segment[..., None])
        if selection is not None:
            visible = visible & selection_mask(selection, entries.shape[1])
        mask = jnp.concatenate([mask, visible], axis=-1)
        keys = jnp.concatenate([keys, entries], axis=1)
    return attend(q, keys[:, None], mask, sink, scale)


def sparse_attention_decode(
    q: Float[Array, "B N H"],
    ring: Float[Array, "B W H"],
    ring_valid: Bool[Array, "B W"],
    sink: Float[Array, " N"],
    entries: Float[Array, "B P H"] | None,
    visible: Bool[Array, "B P"] | None,
    selection: Int[Array, "B K"] | None,
    *,
    scale: float,
) -> Float[Array, "B N H"]:
    """See `api.sparse_attention_decode`."""
    keys, mask = ring, ring_valid
    if entries is not None:
        assert visible is not None
        if selection is not None:
            visible = visible & selection_mask(selection, entries.shape[1])
        keys, mask = jnp.concatenate([ring, entries], axis=1), jnp.concatenate([mask, visible], axis=-1)
    return attend(q, keys, mask, sink, scale)
