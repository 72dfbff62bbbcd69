"""`grouped_experts`: the routed experts of a mixture."""

from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.grouped_experts import reference, xla

_OP = declare("grouped_experts", xla=xla.grouped_experts, reference=reference.grouped_experts)


def grouped_experts(
    x: Float[Array, "T D"],
    w1: Float[Array, "E F D"],
    w3: Float[Array, "E F D"],
    w2: Float[Array, "E D F"],
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    limit: float,
    implementation: Implementation | None = None,
) -> Float[Array, "T D"]:
    """Σ_k w2[e_k] · (weight_k · silu(min(w1[e_k] x, limit)) · clip(w3[e_k] x, ±limit)) (architecture.md §9.2).

    Args:
      x: tokens in the compute dtype.
      w1, w3, w2: gate, up and down matrices, stacked by expert, [out, in].
      experts: K distinct experts per token; weights: their routing weights, float32.
      limit: clamp of gate (from above) and up; 0 means none.
      implementation: None (the platform's default), "xla" (sorted blocks, work ∝ T·K) or "reference" (every expert over
        every token).

    Returns:
      [T, D] float32. Differentiable in x, the matrices and the weights.
    """
    function = _OP.choose(implementation)
    return function(x, w1, w3, w2, experts, weights, limit=limit)
