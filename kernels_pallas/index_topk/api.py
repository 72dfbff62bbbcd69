"""`index_topk` and `index_topk_decode`: which compressed entries each query attends to."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.index_topk import pallas, reference, xla
from kernels_pallas.tpu import cdiv

_OP = declare(
    "index_topk",
    pallas=pallas.index_topk,
    xla=xla.index_topk,
    reference=reference.index_topk,
)
_DECODE = declare(
    "index_topk_decode",
    pallas=pallas.index_topk_decode,
    reference=reference.index_topk_decode,
)
_MOST = 1 << 14


def _check(q: jax.Array, keys: jax.Array, key_scale: jax.Array | None, topk: int) -> None:
    """Refuses what no implementation can compute.

    Raises:
      ValueError: topk out of range, or dtypes that do not go together.
    """
    if not 0 < topk < _MOST:
        raise ValueError(f"index_topk: got topk {topk}, need 1 to {_MOST - 1}")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"index_topk: got queries of {q.dtype}, need bfloat16 or float32")
    is_fp8 = keys.dtype == jnp.float8_e4m3fn
    if not is_fp8 and keys.dtype != q.dtype:
        raise ValueError(f"index_topk: got keys of {keys.dtype}, need the queries' {q.dtype} or float8_e4m3fn codes")
    if is_fp8 != (key_scale is not None):
        raise ValueError(
            f"index_topk: got keys of {keys.dtype} {'without' if is_fp8 else 'with'} key_scale; "
            "float8_e4m3fn codes need one scale per key, other keys none"
        )
    if key_scale is not None and key_scale.shape != keys.shape[:-1]:
        raise ValueError(f"index_topk: got key_scale of shape {key_scale.shape}, need {keys.shape[:-1]}")


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
    implementation: Implementation | None = None,
) -> Int[Array, "B S W"]:
    """Exact top-k of I[t, s] = Σ_h weights[t, h] · relu(q[t, h] · keys[s]) over visible entries s (architecture.md §7).

    Exact for the scores formed: "pallas" rounds those of bfloat16 queries to bfloat16, the model's reference precision.

    Args:
      q: index queries, rotated, bfloat16 or float32. keys: index entries of the same dtype, or float8_e4m3fn codes.
      weights: per-head weights, possibly negative.
      q_position: position of each query; q_segment: its document.
      entry_end: position of the last token an entry covers; entry_segment: its document, −1 for an empty slot.
      key_scale: positive factor of each key's codes, with FP8 keys only.
      topk: entries per query; K = min(topk, P).
      output: "list" or "mask".
      implementation: None (the platform's default), "pallas" (TPU: no score leaves VMEM), "xla" (blocked, O(S)
        memory) or "reference" (the whole [B, S, N, P] product).

    Returns:
      "list": int32 [B, S, K], indices into P in no particular order, −1 where fewer than K entries are visible.
      "mask": int32 [B, S, ⌈P/32⌉], bit j of word w set where entry 32 w + j is selected.
      Ties go to the lowest index. An entry is visible iff it ends at or before the query's position in the same
      document; one whose score is −inf is never selected. No gradient flows.

    Raises:
      ValueError: topk, dtypes or output that no implementation takes; for "pallas" scores that do not fit VMEM.
    """
    _check(q, keys, key_scale, topk)
    if output not in ("list", "mask"):
        raise ValueError(f"index_topk: got output {output!r}, need 'list' or 'mask'")
    function = _OP.choose(implementation)
    batch, length, count = *q.shape[:2], keys.shape[1]
    if 0 in (batch, length, count):
        columns = min(topk, count) if output == "list" else cdiv(count, 32)
        return jnp.full((batch, length, columns), -1 if output == "list" else 0, jnp.int32)
    q, weights, keys, key_scale = jax.lax.stop_gradient((q, weights, keys, key_scale))
    return function(
        q, weights, keys, q_position, q_segment, entry_end, entry_segment, key_scale, topk=topk, output=output
    )


def index_topk_decode(
    q: Float[Array, "B N H"],
    weights: Float[Array, "B N"],
    keys: Shaped[Array, "*L B P H"],
    visible: Int[Array, " B"],
    key_scale: Float[Array, "*L B P"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    *,
    topk: int,
    implementation: Implementation | None = None,
) -> Int[Array, "B K"]:
    """`index_topk` of one query per sequence over the first entries of its cache.

    Args:
      q: index query of each sequence; keys: its cache, of the dtypes that `index_topk` takes.
      visible: how many entries, from the first, each sequence sees; may be 0, and beyond P means all.
      key_scale: with FP8 keys only.
      layer: index into stacked caches, which then have a leading axis L; the kernel reads that layer in place.

    Returns:
      int32 [B, K], −1 where fewer than K = min(topk, P) entries are visible.

    Raises:
      ValueError: as `index_topk`, or stacked caches without a layer (or the reverse).
    """
    _check(q, keys, key_scale, topk)
    if keys.ndim != (3 if layer is None else 4):
        raise ValueError(
            f"index_topk_decode: got keys of shape {keys.shape} {'without' if layer is None else 'with'} a layer, "
            "need [B, P, H] without or [L, B, P, H] with one"
        )
    function = _DECODE.choose(implementation)
    batch, count = keys.shape[-3:-1]
    if 0 in (batch, count):
        return jnp.full((batch, min(topk, count)), -1, jnp.int32)
    q, weights, keys, key_scale = jax.lax.stop_gradient((q, weights, keys, key_scale))
    return function(q, weights, keys, visible, key_scale, layer, topk=topk)
