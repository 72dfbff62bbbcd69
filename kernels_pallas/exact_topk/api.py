"""`exact_topk`: the largest scores of each row, for callers that have scores; `index_topk` never writes any."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.exact_topk import pallas, reference
from kernels_pallas.tpu import cdiv

_OP = declare("exact_topk", pallas=pallas.exact_topk, reference=reference.exact_topk)
_MOST = 1 << 14


def exact_topk(
    scores: Float[Array, "T N"],
    *,
    topk: int,
    output: Literal["list", "mask"] = "list",
    implementation: Implementation | None = None,
) -> Int[Array, "T W"]:
    """Which `topk` scores of each row are the largest; of equal ones those with the lowest index.

    Args:
      scores: bfloat16 or float32, compared as they are; no NaN. −inf is never selected. 0 and −0 are equal, and on a
        TPU so are subnormal numbers.
      topk: entries per row; K = min(topk, N).
      output: "list" or "mask".
      implementation: None (the platform's default), "pallas" (TPU: scores are read once) or "reference" (`lax.top_k`).

    Returns:
      "list": int32 [T, K], indices in no particular order, −1 where fewer than K scores are above −inf.
      "mask": int32 [T, ⌈N/32⌉], bit j of word w set where score 32 w + j is selected. No gradient flows.

    Raises:
      ValueError: topk, dtype or output that no implementation takes; for "pallas" rows that do not fit VMEM.
    """
    if not 0 < topk < _MOST:
        raise ValueError(f"exact_topk: got topk {topk}, need 1 to {_MOST - 1}")
    if scores.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"exact_topk: got scores of {scores.dtype}, need bfloat16 or float32")
    if output not in ("list", "mask"):
        raise ValueError(f"exact_topk: got output {output!r}, need 'list' or 'mask'")
    function = _OP.choose(implementation)
    rows, count = scores.shape
    if 0 in (rows, count):
        columns = min(topk, count) if output == "list" else cdiv(count, 32)
        return jnp.full((rows, columns), -1 if output == "list" else 0, jnp.int32)
    return function(jax.lax.stop_gradient(scores), topk=topk, output=output)
