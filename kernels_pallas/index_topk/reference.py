"""Lightning-indexer scores and exact top-k in plain jnp (architecture.md §7)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels_pallas.tpu import cdiv

_WORD = 32


def decode_keys(
    keys: Shaped[Array, "*B P H"], scale: Float[Array, "*B P"] | None, dtype: DTypeLike
) -> Float[Array, "*B P H"]:
    """FP8 codes times their key's scale, in float32; other keys as they are."""
    if scale is None:
        return keys.astype(dtype)
    return keys.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


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


def pack_mask(selection: Int[Array, "*T K"], count: int) -> Int[Array, "*T W"]:
    """Bits of the selected of `count` entries: bit j of word w is entry 32 w + j."""
    words = cdiv(count, _WORD)
    place = jnp.where(selection < 0, words * _WORD, selection)
    flat = place.reshape(-1, place.shape[-1])
    flags = jnp.zeros((flat.shape[0], words * _WORD), jnp.uint32)
    flags = flags.at[jnp.arange(flat.shape[0])[:, None], flat].set(1, mode="drop")
    bits = flags.reshape(-1, words, _WORD) << jnp.arange(_WORD, dtype=jnp.uint32)
    packed = jax.lax.bitcast_convert_type(bits.sum(-1, dtype=jnp.uint32), jnp.int32)
    return packed.reshape(*selection.shape[:-1], words)


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
    """The whole selection at once; see `api.index_topk`."""
    visible = (entry_end[:, None] <= q_position[..., None]) & (entry_segment[:, None] == q_segment[..., None])
    selection = select(scores(q, weights, decode_keys(keys, key_scale, q.dtype)), visible, topk)
    return selection if output == "list" else pack_mask(selection, keys.shape[1])


def index_topk_decode(
    q: Float[Array, "B N H"],
    weights: Float[Array, "B N"],
    keys: Shaped[Array, "*L B P H"],
    visible: Int[Array, " B"],
    key_scale: Float[Array, "*L B P"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    *,
    topk: int,
) -> Int[Array, "B K"]:
    """See `api.index_topk_decode`."""
    if layer is not None:
        keys, key_scale = keys[layer], None if key_scale is None else key_scale[layer]
    values = scores(q[:, None], weights[:, None], decode_keys(keys, key_scale, q.dtype))[:, 0]
    return select(values, jnp.arange(keys.shape[1]) < visible[:, None], topk)
