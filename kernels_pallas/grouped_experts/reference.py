"""Clamped-SwiGLU experts of a mixture in plain jnp: every expert over every token, masked (architecture.md §9.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_experts.stacks import ExpertStack


def clamp_up(up: jax.Array, limit: float) -> jax.Array:
    """The linear part, clamped to ±limit; limit 0 means no clamp."""
    return jnp.clip(up, -limit, limit) if limit else up


def clamp_gate(gate: jax.Array, limit: float) -> jax.Array:
    """The gate, clamped from above only, before the silu."""
    return jnp.minimum(gate, limit) if limit else gate


def swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(clamped gate) · clamped up; inputs are float32."""
    return jax.nn.silu(clamp_gate(gate, limit)) * clamp_up(up, limit)


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """X [T, I] · weight [O, I]ᵀ in float32, at full precision for float32 operands."""
    numbers = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, numbers, precision=precision(x), preferred_element_type=jnp.float32)


def precision(x: jax.Array) -> jax.lax.Precision:
    """Of products of x with matrices."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def grouped_experts(
    x: Float[Array, "T D"],
    w1: ExpertStack,
    w3: ExpertStack,
    w2: ExpertStack,
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    limit: float,
    expected_picks: float | None = None,
) -> Float[Array, "T D"]:
    """See `api.grouped_experts`."""

    def one_expert(total: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
        gate_weight, up_weight, down_weight = (stack.one(expert, x.dtype) for stack in (w1, w3, w2))
        share = jnp.sum(jnp.where(experts == expert, weights, 0.0), axis=-1, keepdims=True)
        hidden = swiglu(dot(x, gate_weight), dot(x, up_weight), limit) * share
        return total + dot(hidden.astype(x.dtype), down_weight), None

    start = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(one_expert, start, jnp.arange(w1.shape[0]))[0]
