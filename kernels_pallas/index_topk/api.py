"""`index_topk`: which compressed entries each query attends to."""

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.index_topk import reference, xla

_OP = declare("index_topk", xla=xla.index_topk, reference=reference.index_topk)


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
    implementation: Implementation | None = None,
) -> Int[Array, "B S K"]:
    """Exact top-k of I[t, s] = Σ_h weights[t, h] · relu(q[t, h] · keys[s]) over visible entries s (architecture.md §7).

    Args:
      q: index queries, rotated. keys: index entries of the same dtype.
      weights: per-head weights, possibly negative.
      q_position: position of each query; q_segment: its document.
      entry_end: position of the last token an entry covers; entry_segment: its document, −1 for an empty slot.
      topk: entries per query; K = min(topk, P).
      implementation: None (the platform's default), "xla" (blocked, O(S) memory) or "reference" (the
        whole [B, S, N, P] product).

    Returns:
      int32 indices into P, −1 where fewer than K entries are visible. Ties go to the lowest index. An entry is visible
      iff it ends at or before the query's position in the same document. No gradient flows.
    """
    q, weights, keys = jax.lax.stop_gradient((q, weights, keys))
    function = _OP.choose(implementation)
    return function(q, weights, keys, q_position, q_segment, entry_end, entry_segment, topk=topk)
