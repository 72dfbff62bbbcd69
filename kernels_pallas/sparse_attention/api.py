"""`sparse_attention` and `sparse_attention_decode`: V4's attention of every layer kind."""

import functools
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.sparse_attention import kernel_decode, prefill, reference, xla
from kernels_pallas.sparse_attention.block_sizes_decode import DecodeBlockSizes
from kernels_pallas.sparse_attention.decode_layers import of_one_layer
from kernels_pallas.tpu import cdiv

_MOST_PER_SELECTED = 64
"""Entries per selected one up to which a mask has at most twice the bytes of a list."""
_OP = declare(
    "sparse_attention",
    pallas=prefill.sparse_attention,
    xla=xla.sparse_attention,
    reference=reference.sparse_attention,
)
_DECODE = declare(
    "sparse_attention_decode",
    pallas=kernel_decode.sparse_attention_decode,
    xla=functools.partial(of_one_layer, xla.sparse_attention_decode, xla.GATHER_FROM),
    reference=functools.partial(of_one_layer, reference.sparse_attention_decode, None),
)


def selection_form(topk: int, entries: int, implementation: Implementation | None = None) -> Literal["list", "mask"]:
    """The form in which `index_topk` had better give selections to `sparse_attention`; both know either.

    Bits where kernels read them, unless a mask has more than twice the bytes of a list: training keeps it. On v6e, to
    list what is chosen among 2048 entries costs `index_topk` as many cycles again, and to make bits of the list a third
    of that.
    """
    is_kernel = _OP.resolve(implementation) == "pallas"
    return "mask" if is_kernel and entries <= _MOST_PER_SELECTED * topk else "list"


def sparse_attention(
    q: Float[Array, "B S N H"],
    keys: Float[Array, "B WS H"],
    sink: Float[Array, " N"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    key_segment: Int[Array, "B WS"],
    entries: Float[Array, "B P H"] | None = None,
    entry_end: Int[Array, "B P"] | None = None,
    entry_segment: Int[Array, "B P"] | None = None,
    selection: Int[Array, "B S K"] | None = None,
    selection_mask: Int[Array, "B S D"] | None = None,
    *,
    window: int,
    scale: float,
    sound_topk: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B S N H"]:
    """One softmax over the last `window` keys, compressed entries and a per-head sink (architecture.md §5).

    Keys are also the values and are shared by all heads. Differentiable in q, keys, entries and sink.

    Args:
      q: rotated queries, not yet scaled.
      keys: `window` keys before the first query, then one per query (WS = window + S).
      sink: logit per head without a value.
      q_position, q_segment: position and document of each query.
      key_segment: document of each key; −1 where there is none. A query sees keys of its own document only.
      entries, entry_end, entry_segment: compressed entries, the position of the last token each covers, its document
        (−1: empty slot). An entry is visible iff it ends at or before the query in the same document.
      selection: indices into P that a query is restricted to, −1 for none.
      selection_mask: the same as bits, bit j of word w for entry 32 w + j (D = ⌈P / 32⌉). Without either, a query
        attends to all visible entries.
      sound_topk: the caller vouches that each query has selected visible entries only, none twice and at most so many,
        as with `index_topk`; what is beyond is left out. Only with it the kernels may read the entries that
        neighbouring queries chose, one by one, instead of all (`prefill_union`); no other implementation needs to know.
      scale: multiplies the dot products; positive.
      implementation: None (the platform's default), "pallas" (TPU: forward and backward kernels), "xla" (blocked,
        O(S) memory) or "reference" (whole [B, S, N, WS + P] scores).

    Returns:
      [B, S, N, H] in q's dtype; scores, softmax and sums are float32.

    Raises:
      ValueError: arrays that do not go together; for "pallas" blocks that do not fit into VMEM.
    """
    function = _OP.choose(implementation)
    _check(q, keys, entries, entry_end, entry_segment, selection, selection_mask, window, scale, sound_topk)
    return function(
        q, keys, sink, q_position, q_segment, key_segment, entries, entry_end, entry_segment, selection,
        selection_mask, window=window, scale=scale, sound_topk=sound_topk,
    )  # fmt: skip


def _check(
    q: Array, keys: Array, entries: Array | None, entry_end: Array | None, entry_segment: Array | None,
    selection: Array | None, selection_mask: Array | None, window: int, scale: float, sound_topk: int | None,
) -> None:  # fmt: skip
    """Refuses what no implementation can compute.

    Raises:
      ValueError: what was got and what is needed.
    """
    if window < 1 or keys.shape[1] != window + q.shape[1]:
        raise ValueError(
            f"sparse_attention: got {keys.shape[1]} keys for {q.shape[1]} queries and a window of {window}, need a "
            "window of at least 1 and that many keys before one per query"
        )
    if sound_topk is not None and sound_topk < 1:
        raise ValueError(f"sparse_attention: got sound_topk {sound_topk}, need at least 1, or None")
    if scale <= 0:
        raise ValueError(f"sparse_attention: got scale {scale}, need a positive one")
    others = {"keys": keys} if entries is None else {"keys": keys, "entries": entries}
    for name, array in others.items():
        if array.dtype != q.dtype:
            raise ValueError(f"sparse_attention: got {name} of {array.dtype}, need the queries' {q.dtype}")
    if (entries is None) != (entry_end is None) or (entries is None) != (entry_segment is None):
        raise ValueError("sparse_attention: got some of entries, entry_end and entry_segment, need all or none")
    if selection is not None and selection_mask is not None:
        raise ValueError("sparse_attention: got selection and selection_mask, need one of them")
    if entries is None and (selection is not None or selection_mask is not None):
        raise ValueError("sparse_attention: got a selection without entries; pass the entries it indexes")
    if entries is not None and selection_mask is not None and selection_mask.shape[-1] != cdiv(entries.shape[1], 32):
        raise ValueError(
            f"sparse_attention: got a selection_mask of {selection_mask.shape[-1]} words for {entries.shape[1]} "
            f"entries, need {cdiv(entries.shape[1], 32)}"
        )


def sparse_attention_decode(
    q: Float[Array, "B N H"],
    ring: Float[Array, "*L B W H"],
    ring_count: Int[Array, " B"],
    sink: Float[Array, " N"],
    entries: Float[Array, "..."] | None = None,
    entry_count: Int[Array, " B"] | None = None,
    selection: Int[Array, "B K"] | None = None,
    *,
    layer: Int[Array, ""] | int | None = None,
    scale: float,
    is_partial: bool = False,
    block_sizes: DecodeBlockSizes | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B N H"] | tuple[Float[Array, "B N H"], Float[Array, "B N"], Float[Array, "B N"]]:
    """`sparse_attention` of one query per sequence against its caches, float32 or bf16.

    Args:
      q: rotated query of each sequence.
      ring: window keys, the query's own included. Slots from `ring_count` on are empty, whatever they hold; the order
        of the others means nothing.
      entries: compressed entries [*L, B, P, H] in order, of which the query sees the first `entry_count`, or
        [*L, B, P, H / 128, 128]: the kernels take single rows out of this form without a copy of the array, and whole
        pages out of the other (P a multiple of 16, else the compiler copies it).
      selection: indices into P, −1 for none, none twice; only the visible ones count. None means all visible entries.
      layer: with it, ring and entries have a leading axis of layers, and the kernels read this one in place.
      scale: multiplies the dot products, positive.
      is_partial: gives (o, m, l) instead, float32: Σ exp(s − m) · value, the maximum m of the scores s and
        l = Σ exp(s − m), all without the sink; m is −1e30 or thereabouts where nothing is seen. `merge_partials` joins
        those of several devices.
      block_sizes: of the kernels; None means the default.
      implementation: as `sparse_attention`, or "pallas".

    Returns:
      [B, N, H] in q's dtype; scores, softmax and sums are float32.

    Raises:
      ValueError: shapes that do not belong together, or what the kernels refuse.
    """
    lead = () if layer is None else ring.shape[:1]
    if ring.ndim != 3 + len(lead):
        raise ValueError(f"ring: got shape {ring.shape}, need [{'layers, ' if lead else ''}B, W, H]; see `layer`")
    if (entries is None) != (entry_count is None) or (selection is not None and entries is None):
        raise ValueError("entries and entry_count go together, and a selection needs them")
    if entries is not None:
        at = len(lead) + 2
        is_fitting = entries.shape[: at - 1] == ring.shape[:-2] and math.prod(entries.shape[at:]) == ring.shape[-1]
        if not is_fitting or entries.ndim - at not in (1, 2):
            need = f"{(*ring.shape[:-2], 'P', ring.shape[-1])} or its rows cut into lanes"
            raise ValueError(f"entries: got shape {entries.shape}, need {need} beside a ring {ring.shape}")
    if scale <= 0:
        raise ValueError(f"scale: got {scale}, need a positive number")
    if layer is None:
        ring, entries, layer = ring[None], None if entries is None else entries[None], 0
    return _DECODE.choose(implementation)(
        q, ring, ring_count, sink, entries, entry_count, selection, layer=jnp.asarray(layer, jnp.int32), scale=scale,
        is_partial=is_partial, block_sizes=block_sizes,
    )  # fmt: skip
