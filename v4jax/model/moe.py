"""Mixture of experts: router, routed experts, shared expert (architecture.md §9)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.formats import fp4_scale_shape
from v4jax import ops, parallel
from v4jax.config import LayerSpec, ModelConfig, RouterKind
from v4jax.model.dots import float32_dot
from v4jax.model.exchange import routed_experts
from v4jax.model.inputs import LayerInputs
from v4jax.model.params import (
    Constant,
    Declare,
    FromCheckpoint,
    Linear,
    Normal,
    RandomTable,
    Role,
    RouterBias,
    RoutingTable,
    declare_fp8,
)
from v4jax.model.recomputation import kept
from v4jax.quant import PackedCodes, PackedScales


class Routing(NamedTuple):
    """Where each token goes, and what the training rules need to know of it."""

    experts: jax.Array
    """int32 [B, S, K]."""
    weights: jax.Array
    """float32 [B, S, K]: scores of the chosen experts, normalised and scaled."""
    load: jax.Array
    """float32 [E]: tokens per expert, padding not counted."""
    balance: jax.Array
    """float32 scalar: sequence-wise balance loss, averaged over rows (architecture.md §9.3)."""


def sqrt_softplus(z: Float[Array, "*T"]) -> Float[Array, "*T"]:
    """√softplus(z) with a finite gradient everywhere.

    Below −20, where softplus(z) is e^z to float32 precision, e^(z/2) replaces a root whose derivative would overflow.
    """
    is_small = z < -20
    small, large = jnp.where(is_small, z, -20.0), jnp.where(is_small, 0.0, z)
    return jnp.where(is_small, jnp.exp(small / 2), jnp.sqrt(jax.nn.softplus(large)))


class Gate(nnx.Module):
    """The router: experts by token id (HASH) or by biased top-k (TOPK); weights by the learned scores in both."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, declare: Declare) -> None:
        self.config, self.spec, self.policy = config, spec, declare.policy
        count = config.n_routed_experts
        self.weight = declare(
            (count, config.hidden_size), axes=("router_experts", "hidden"), role=Role.MATRIX,
            init=Normal(config.initializer_range), dtype=declare.policy.param,
        )  # fmt: skip
        if spec.router is RouterKind.HASH:
            self.tid2eid = declare(
                (config.vocab_size, config.num_experts_per_tok), axes=("vocab_table", None), role=Role.TABLE,
                init=RandomTable(count), dtype=jnp.int32, kind=RoutingTable,
            )  # fmt: skip
        else:
            self.bias = declare((count,), axes=("router_experts",), role=Role.BIAS, init=Constant(0.0), kind=RouterBias)

    def __call__(
        self, x: Float[Array, "B S D"], inputs: LayerInputs, experts: Int[Array, "B S K"] | None = None
    ) -> Routing:
        """Routes each token. `experts` replaces the choice, not the weights (replay)."""
        scores = sqrt_softplus(kept(float32_dot(x, self.weight[...])))
        experts = kept(self._choose(scores, inputs)) if experts is None else experts
        # Sums over all experts instead of a gather, whose gradient would be a scatter, and that a sort on TPU.
        is_chosen = experts[..., None] == jnp.arange(scores.shape[-1])
        chosen = jnp.sum(jnp.where(is_chosen, scores[..., None, :], 0.0), axis=-1)
        weights = chosen / jnp.sum(chosen, axis=-1, keepdims=True) * np.float32(self.config.routed_scaling_factor)
        return Routing(experts, weights, *self._statistics(scores, is_chosen, inputs))

    def _choose(self, scores: jax.Array, inputs: LayerInputs) -> jax.Array:
        if self.spec.router is RouterKind.HASH:
            return self.tid2eid[...][inputs.tokens]
        biased = jax.lax.stop_gradient(scores) + self.bias[...]
        return jax.lax.top_k(biased, self.config.num_experts_per_tok)[1]

    def _statistics(self, scores: jax.Array, is_chosen: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array]:
        count, choices = self.config.n_routed_experts, self.config.num_experts_per_tok
        real = (inputs.segments > 0).astype(jnp.float32)[..., None]
        load = jnp.sum(is_chosen * real[..., None], axis=(1, 2))
        whole_rows = functools.partial(parallel.add, names=parallel.sequence_axes())
        load = whole_rows(load)
        tokens = jnp.maximum(whole_rows(jnp.sum(real, axis=1)), 1.0)
        share = whole_rows(jnp.sum(scores / jnp.sum(scores, axis=-1, keepdims=True) * real, axis=1)) / tokens
        balance = jnp.mean(jnp.sum(load * count / (choices * tokens) * share, axis=-1))
        batch_axes = parallel.batch_axes()
        balance = parallel.add(balance, batch_axes) / parallel.device_count(batch_axes)
        return parallel.add(jnp.sum(load, axis=0), batch_axes), balance


class StackedLinear(nnx.Module):
    """One matrix per expert, [E, out, in]; or its released bytes."""

    def __init__(self, count: int, in_size: int, out_size: int, axes: tuple[str, ...], declare: Declare) -> None:
        self.policy, native = declare.policy, declare.policy.native
        shape = (count, out_size, in_size)
        if native is None:
            self.weight = declare(shape, axes=axes, role=Role.MATRIX, init=Normal(0.02), dtype=declare.policy.param)
            self.scale = None
        elif native.experts == "fp8":
            # Base checkpoints have float32 scales for FP8 experts (architecture.md §14.2).
            self.weight, self.scale = declare_fp8(shape, axes, declare, native.tile, jnp.float32)
        else:
            role, init = Role.MATRIX, FromCheckpoint()
            packed = (count, -(-in_size // 2), out_size)
            scales = (count, fp4_scale_shape(shape)[-1], out_size)
            axes = (axes[0], axes[2], axes[1])
            self.weight = declare(packed, axes=axes, role=role, init=init, dtype=jnp.int8, kind=PackedCodes)
            self.scale = declare(scales, axes=axes, role=role, init=init, dtype=jnp.float8_e8m0fnu, kind=PackedScales)

    def stack(self, layer: Int[Array, ""] | None) -> ops.ExpertStack:
        """Where the matrices lie; `layer` says which are meant where the arrays hold several layers."""
        if self.scale is None:
            values = self.weight[...]
            # A cast of many layers would be a copy of them: it is left to whoever takes one expert.
            return ops.ExpertStack(values.astype(self.policy.compute) if layer is None else values, None, layer)
        assert self.policy.native is not None
        return ops.ExpertStack(self.weight[...], self.scale[...], layer, self.policy.native.tile)


class Experts(nnx.Module):
    """The routed experts' matrices: w1 gate, w3 up, w2 down."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        count, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        into, out = ("experts", "expert_hidden", "hidden"), ("experts", "hidden", "expert_hidden")
        self.w1 = StackedLinear(count, hidden, width, into, declare)
        self.w3 = StackedLinear(count, hidden, width, into, declare)
        self.w2 = StackedLinear(count, width, hidden, out, declare)


class SharedExpert(nnx.Module):
    """The expert that every token visits, with weight 1; clamped like the others."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        self.limit, self.policy = config.swiglu_limit, declare.policy
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.w1 = Linear(hidden, width, ("expert_hidden", "hidden"), declare, released_in_fp8=True)
        self.w3 = Linear(hidden, width, ("expert_hidden", "hidden"), declare, released_in_fp8=True)
        self.w2 = Linear(width, hidden, ("hidden", "expert_hidden"), declare, released_in_fp8=True)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Output in float32, before it joins the routed sum; where `tensor` divides the width, this device's part."""
        gate, up = Linear.joint(x, (self.w1, self.w3))
        z = ops.swiglu(gate, up, self.limit).astype(x.dtype)
        return self.w2.unrounded(z)


class MoE(nnx.Module):
    """Routed experts plus the shared one, summed in float32."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, declare: Declare) -> None:
        self.limit, self.policy = config.swiglu_limit, declare.policy
        self.gate = Gate(config, spec, declare)
        self.experts = Experts(config, declare)
        self.shared_experts = SharedExpert(config, declare)

    def __call__(
        self, x: Float[Array, "B S D"], inputs: LayerInputs, experts: Int[Array, "B S K"] | None = None
    ) -> tuple[Float[Array, "B S D"], Routing]:
        """Output for the normed input x in the compute dtype, and the routing."""
        routing = self.gate(x, inputs, experts)
        flat = x.reshape(-1, x.shape[-1])
        choices = routing.experts.shape[-1]
        w1, w3, w2 = (w.stack(inputs.layer) for w in (self.experts.w1, self.experts.w3, self.experts.w2))
        routed = routed_experts(
            flat, w1, w3, w2, routing.experts.reshape(-1, choices), routing.weights.reshape(-1, choices),
            limit=self.limit,
        )  # fmt: skip
        out = parallel.add(routed.reshape(x.shape) + self.shared_experts(x), parallel.axes("expert_hidden"))
        return out.astype(self.policy.compute), routing
