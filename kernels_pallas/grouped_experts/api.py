"""`grouped_experts`: the routed experts of a mixture."""

from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.grouped_experts import pallas, reference, xla
from kernels_pallas.grouped_experts.stacks import ExpertStack, as_stack

_OP = declare(
    "grouped_experts", pallas=pallas.grouped_experts, xla=xla.grouped_experts, reference=reference.grouped_experts
)


def grouped_experts(
    x: Float[Array, "T D"],
    w1: Float[Array, "E F D"] | ExpertStack,
    w3: Float[Array, "E F D"] | ExpertStack,
    w2: Float[Array, "E D F"] | ExpertStack,
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    limit: float,
    expected_picks: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T D"]:
    """Σ_k w2[e_k] · (weight_k · silu(min(w1[e_k] x, limit)) · clip(w3[e_k] x, ±limit)) (architecture.md §9.2).

    Args:
      x: tokens in the compute dtype.
      w1, w3, w2: gate, up and down matrices, stacked by expert, [out, in]: arrays, or where they lie (`ExpertStack`).
      experts: K distinct experts per token; E instead of a number names none, and that place costs nothing.
      weights: their routing weights, float32; those of no expert are not read.
      limit: clamp of gate (from above) and up; 0 means none.
      expected_picks: (token, expert) pairs with an expert of these, under an even load; all of them if None. Sets the
        size of blocks, never the result.
      implementation: None (the platform's default), "pallas" (TPU: many rows of plain bfloat16 matrices in grouped
        products, few rows through FP4 stacks on v5p in a kernel, the rest as "xla"), "xla" (sorted blocks, work ∝ T·K)
        or "reference" (every expert over every token).

    Returns:
      [T, D] float32. Differentiable in x, the matrices and the weights if the matrices are arrays.
    """
    function = _OP.choose(implementation)
    return function(
        x, as_stack(w1), as_stack(w3), as_stack(w2), experts, weights, limit=limit, expected_picks=expected_picks
    )
