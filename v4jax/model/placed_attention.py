"""Attention to compressed entries that several devices hold: the axis `sequence` divides a cache by place.

Device r has the places from r · P on. To decode, each device scores its own entries; selections and softmax are merged,
so that no entry travels. A chunk of tokens gathers the entries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from v4jax import ops, parallel
from v4jax.cache import put_rows


def first_place(count: int) -> jax.Array | int:
    """Place of the first of this device's `count` entries."""
    names = parallel.axes("entries")
    return parallel.index(names) * count if names else 0


def join_entries(values: jax.Array | None) -> jax.Array | None:
    """All devices' entries [B, P, H] in order."""
    return None if values is None else parallel.join(values, parallel.axes("entries"), 1)


def put_entries(
    values: Shaped[Array, "..."],
    new: Float[Array, "B N H"],
    place: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
    layer: Int[Array, ""] | None = None,
) -> Shaped[Array, "..."]:
    """Writes what all devices have completed into those of this device's places that it touches (`cache.put_rows`)."""
    new, place, valid = (parallel.join(a, parallel.sequence_axes(), 1) for a in (new, place, valid))
    if parallel.axes("entries"):
        count = values.shape[1 if layer is None else 2]
        place = place - first_place(count)
        valid = valid & (place >= 0) & (place < count)
    return put_rows(values, new, place, valid, layer)


def own_selection(selection: Int[Array, "B S K"], count: int) -> Int[Array, "B S K"]:
    """Places among all devices' entries → numbers of this device's `count`, −1 for those elsewhere."""
    names = parallel.axes("entries")
    if not names:
        return selection
    own = selection - parallel.index(names) * count
    return jnp.where((selection >= 0) & (own >= 0) & (own < count), own, -1)


def merged_selection(
    selection: Int[Array, "B 1 K"],
    q: Float[Array, "B 1 N H"],
    weights: Float[Array, "B 1 N"],
    keys: Float[Array, "*L B P H"],
    layer: Int[Array, ""] | None,
    topk: int,
) -> Int[Array, "B 1 L"]:
    """The best `topk` of all devices' selections, as far as this device holds them.

    Args:
      selection: this device's own numbers of its best entries, −1 for none.
      q, weights, keys, layer: as for `ops.index_topk_decode`; keys are this device's.

    Returns:
      This device's numbers of the selected entries, −1 for those elsewhere. Ties go to the lowest place overall: each
      device's entries are put in order here, and the devices are in order.
    """
    names, count = parallel.axes("entries"), keys.shape[-2]
    number = jnp.sort(jnp.where(selection < 0, count, selection), axis=-1)
    lead = () if layer is None else (layer,)
    rows = keys.at[(*lead, jnp.arange(len(q))[:, None], number[:, 0])].get(mode="clip")
    scores = jnp.where(number < count, ops.index_scores(q, weights, rows), -jnp.inf)
    places = parallel.join(jnp.where(number < count, number + parallel.index(names) * count, -1), names, 2)
    best, rank = jax.lax.top_k(parallel.join(scores, names, 2), min(topk, places.shape[-1]))
    return own_selection(jnp.where(best > -jnp.inf, jnp.take_along_axis(places, rank, axis=-1), -1), count)


def merged_attention(
    q: Float[Array, "B N H"],
    ring: Float[Array, "*L B W H"],
    ring_count: Int[Array, " B"],
    sink: Float[Array, " N"],
    entries: Float[Array, "..."],
    entry_count: Int[Array, " B"],
    selection: Int[Array, "B K"] | None,
    *,
    layer: Int[Array, ""] | None,
    scale: float,
) -> Float[Array, "B N H"]:
    """`ops.sparse_attention_decode` over all devices' entries: each device's part of one softmax, joined.

    All devices hold the same window, which counts once: on the first.
    """
    names = parallel.axes("entries")
    ring_count = jnp.where(parallel.index(names) == 0, ring_count, 0)
    out, top, total = ops.sparse_attention_decode(
        q, ring, ring_count, sink, entries, entry_count, selection, layer=layer, scale=scale, is_partial=True
    )
    return ops.merge_partials(out, top, total, sink, names).astype(q.dtype)
