"""Window + compressed entries + sink in one softmax, in plain jnp with whole score arrays (architecture.md §5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST
_NOTHING = -1e30
"""Maximum of no scores: finite, so that no −inf is subtracted from another."""


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


def attend_partial(
    q: Float[Array, "*T N H"], keys: Float[Array, "*#T K H"], mask: Bool[Array, "*T K"], scale: float
) -> tuple[Float[Array, "*T N H"], Float[Array, "*T N"], Float[Array, "*T N"]]:
    """`attend` before its division and without the sink: (Σ exp(s − m) · key, m, Σ exp(s − m)), float32."""
    logits = jnp.einsum("...nh,...kh->...nk", q, keys, precision=_HIGHEST, preferred_element_type=jnp.float32) * scale
    top = jnp.max(logits, axis=-1, where=mask[..., None, :], initial=_NOTHING)
    weights = jnp.where(mask[..., None, :], jnp.exp(logits - top[..., None]), 0.0)
    out = jnp.einsum(
        "...nk,...kh->...nh", weights.astype(q.dtype), keys, precision=_HIGHEST, preferred_element_type=jnp.float32
    )
    return out, top, jnp.sum(weights, axis=-1)


def listed(selection: Int[Array, "*T K"], size: int) -> Bool[Array, "*T P"]:
    """Which of `size` entries a list of indices names; −1 names none."""
    return jnp.any(selection[..., None] == jnp.arange(size), axis=-2)


def unpacked_mask(words: Int[Array, "*T D"], size: int) -> Bool[Array, "*T P"]:
    """Which of `size` entries a bit mask names: bit j of word w stands for entry 32 w + j."""
    bits = (words[..., None] >> jnp.arange(32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :size] == 1


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
    selection_mask: Int[Array, "B S D"] | None = None,
    *,
    window: int,
    scale: float,
    sound_topk: int | None = None,
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
            visible = visible & listed(selection, entries.shape[1])
        if selection_mask is not None:
            visible = visible & unpacked_mask(selection_mask, entries.shape[1])
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
            visible = visible & listed(selection, entries.shape[1])
        keys, mask = jnp.concatenate([ring, entries], axis=1), jnp.concatenate([mask, visible], axis=-1)
    return attend(q, keys, mask, sink, scale)
