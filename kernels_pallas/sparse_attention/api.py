"""`sparse_attention` and `sparse_attention_decode`: V4's attention of every layer kind."""

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.sparse_attention import reference, xla

_OP = declare("sparse_attention", xla=xla.sparse_attention, reference=reference.sparse_attention)
_DECODE = declare(
    "sparse_attention_decode", xla=xla.sparse_attention_decode, reference=reference.sparse_attention_decode
)


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
    *,
    window: int,
    scale: float,
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
      selection: indices into P that a query is restricted to, −1 for none; None means all visible entries.
      scale: multiplies the dot products.
      implementation: None (the platform's default), "xla" (blocked, O(S) memory) or "reference" (whole
        [B, S, N, WS + P] scores).

    Returns:
      [B, S, N, H] in q's dtype; scores, softmax and sums are float32.
    """
    function = _OP.choose(implementation)
    return function(
        q, keys, sink, q_position, q_segment, key_segment, entries, entry_end, entry_segment, selection,
        window=window, scale=scale,
    )  # fmt: skip


def sparse_attention_decode(
    q: Float[Array, "B N H"],
    ring: Float[Array, "B W H"],
    ring_valid: Bool[Array, "B W"],
    sink: Float[Array, " N"],
    entries: Float[Array, "B P H"] | None = None,
    visible: Bool[Array, "B P"] | None = None,
    selection: Int[Array, "B K"] | None = None,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "B N H"]:
    """`sparse_attention` of one query per sequence against its caches.

    Args:
      q: rotated query of each sequence.
      ring: window keys in any order, its own included; ring_valid says which slots are filled.
      entries, visible: compressed entries and which of them the query may see.
      selection: indices into P, −1 for none; None means all visible entries.
    """
    function = _DECODE.choose(implementation)
    return function(q, ring, ring_valid, sink, entries, visible, selection, scale=scale)
