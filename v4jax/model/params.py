"""Typed parameters and the three modules made of one matrix: `Linear`, `RMSNorm`, `Embedding`.

Every variable says its shape, initialiser, trailing logical axes and role where it is made. The role, never the rank,
decides optimiser treatment, quantisation and freezing: stacking a segment adds leading axes to everything.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from v4jax.dtypes import DTypePolicy


class Role(enum.StrEnum):
    """What a parameter is, for optimisers, quantisation and freezing."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    NORM = "norm"
    GAIN = "gain"
    BIAS = "bias"
    TABLE = "table"
    SINK = "sink"


class RoutingTable(nnx.Variable):
    """`tid2eid`: expert ids by token id. Integers, never differentiated."""


class RouterBias(nnx.Variable):
    """Selection bias of a top-k router: moved by the load rule, never by a gradient (architecture.md §9.3)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Normal:
    """Draws from N(0, stddev²)."""

    stddev: float

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of this shape."""
        return generator.standard_normal(shape, np.float32) * np.float32(self.stddev)


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """One value everywhere."""

    value: float

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of this shape."""
        return np.full(shape, self.value, np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class RandomTable:
    """Distinct experts per token id, drawn from `experts`; how the released tables were made is not public."""

    experts: int

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """int32 of this shape."""
        ids = np.broadcast_to(np.arange(self.experts, dtype=np.int32), (*shape[:-1], self.experts))
        return generator.permuted(ids, axis=-1)[..., : shape[-1]]


Initialiser = Normal | Constant | RandomTable


@dataclasses.dataclass(frozen=True, slots=True)
class Declare:
    """Declares variables while a model is laid out: shapes and metadata, no arrays yet (`transformer.initialise`)."""

    policy: DTypePolicy
    leading: tuple[int, ...] = ()
    """Axes in front of every declared shape: (repeats,) inside a stacked segment."""

    def __call__(
        self,
        shape: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        role: Role,
        init: Initialiser,
        dtype: DTypeLike = jnp.float32,
        kind: type[nnx.Variable] = nnx.Param,
    ) -> Any:
        """One variable; `axes` names its trailing dimensions (`v4jax.sharding`)."""
        return kind(jax.ShapeDtypeStruct((*self.leading, *shape), dtype), axes=axes, role=role, init=init)


def dot(x: jax.Array, weight: jax.Array, policy: DTypePolicy) -> jax.Array:
    """`x · weightᵀ` over the last axes in the compute dtype: x [..., I], weight [O, I] → [..., O]."""
    return full_dot(x.astype(policy.compute), weight.astype(policy.compute), policy.precision).astype(policy.compute)


def full_dot(x: jax.Array, weight: jax.Array, precision: jax.lax.Precision = jax.lax.Precision.HIGHEST) -> jax.Array:
    """`x · weightᵀ` accumulated and returned in float32."""
    contract = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)


def rms_scale(x: jax.Array, eps: float) -> jax.Array:
    """`rsqrt(mean(x²) + eps)` over the last axis, kept as size 1; x is float32."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class Linear(nnx.Module):
    """A matrix in the checkpoint's [out, in] layout, without bias."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        axes: tuple[str | None, str | None],
        declare: Declare,
        *,
        stddev: float = 0.02,
    ) -> None:
        self.policy = declare.policy
        self.weight = declare(
            (out_size, in_size), axes=axes, role=Role.MATRIX, init=Normal(stddev), dtype=declare.policy.param
        )

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """Result in the compute dtype."""
        return dot(x, self.weight[...], self.policy)

    def in_float32(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The product with both operands upcast, for the float32 islands."""
        return full_dot(x.astype(jnp.float32), self.weight[...].astype(jnp.float32))


class RMSNorm(nnx.Module):
    """Weighted RMS norm: statistics and the weight in float32, one cast at the end (architecture.md §2)."""

    def __init__(self, size: int, eps: float, declare: Declare) -> None:
        self.eps, self.policy = eps, declare.policy
        self.weight = declare((size,), axes=(None,), role=Role.NORM, init=Constant(1.0))

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        """Result in the compute dtype."""
        x = x.astype(self.policy.norm)
        return (x * rms_scale(x, self.eps) * self.weight[...]).astype(self.policy.compute)


class Embedding(nnx.Module):
    """Rows of [vocab, hidden]; the same class holds the head's matrix."""

    def __init__(self, vocab: int, hidden: int, declare: Declare, *, stddev: float = 0.02) -> None:
        self.policy = declare.policy
        self.weight = declare(
            (vocab, hidden),
            axes=("vocab", "hidden"),
            role=Role.EMBEDDING,
            init=Normal(stddev),
            dtype=declare.policy.param,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Embeds int ids [...] → [..., D] in the compute dtype."""
        return jnp.take(self.weight[...], ids, axis=0).astype(self.policy.compute)
