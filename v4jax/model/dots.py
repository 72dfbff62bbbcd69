"""Products of activations with matrices in the checkpoint's [out, in] layout, accumulated in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from v4jax import ops
from v4jax.dtypes import DTypePolicy


def grouped_dot(x: Float[Array, "*T G I"], weight: Float[Array, "G O I"], policy: DTypePolicy) -> Float[Array, "*T GO"]:
    """Each group of channels through its own matrix, in the compute dtype; results side by side."""
    x, weight = x.astype(policy.compute), weight.astype(policy.compute)
    if ops.are_few(rows := math.prod(x.shape[:-2])):
        few = ops.times_few(weight, jnp.moveaxis(x.reshape(rows, *x.shape[-2:]), 0, 1), policy.precision)
        out = few.reshape(len(weight), *x.shape[:-2], -1)
    else:
        numbers = (((x.ndim - 1,), (2,)), ((x.ndim - 2,), (0,)))
        out = jax.lax.dot_general(x, weight, numbers, precision=policy.precision, preferred_element_type=jnp.float32)
    out = ops.with_materialized_gradient(out)
    return jnp.moveaxis(out, 0, -2).reshape(*x.shape[:-2], -1).astype(policy.compute)


def full_dot(x: jax.Array, weight: jax.Array, precision: jax.lax.Precision = jax.lax.Precision.HIGHEST) -> jax.Array:
    """`x · weightᵀ` accumulated and returned in float32."""
    rows = x.size // x.shape[-1]
    if rows == 1:
        return ops.matrix_vector(weight, x.reshape(-1), precision).reshape(*x.shape[:-1], -1)
    if ops.are_few(rows):
        out = ops.times_few(weight, x.reshape(rows, -1), precision).reshape(*x.shape[:-1], -1)
        return ops.with_materialized_gradient(out)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    out = jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)
    return ops.with_materialized_gradient(out)


def joint_dots(x: jax.Array, weights: tuple[jax.Array, ...], precision: jax.lax.Precision) -> tuple[jax.Array, ...]:
    """`full_dot` of x with each of several matrices, as one product where that is faster."""
    if not ops.are_joined(x.size // x.shape[-1]):
        return tuple(full_dot(x, weight, precision) for weight in weights)
    ends = np.cumsum([weight.shape[0] for weight in weights])[:-1].tolist()
    return tuple(jnp.split(full_dot(x, jnp.concatenate(weights), precision), ends, axis=-1))


@jax.custom_vjp
def float32_dot(x: Float[Array, "*T I"], weight: Float[Array, "O I"]) -> Float[Array, "*T O"]:
    """`x · weightᵀ` with both operands upcast to float32.

    Gradients of a bfloat16 x are float32 sums of products exact to 16 bits, of which x's gradient keeps 8: half the
    passes of the matrix unit.
    """
    return full_dot(x.astype(jnp.float32), weight.astype(jnp.float32))


def _float32_dot_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    d_out = ops.materialized(d_out)
    precision = jax.lax.Precision.HIGH if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    d_x = jnp.matmul(d_out, weight.astype(jnp.float32), precision=precision)
    tokens = tuple(range(x.ndim - 1))
    d_weight = jax.lax.dot_general(
        d_out, x.astype(jnp.float32), ((tokens, tokens), ((), ())), precision=precision
    )  # fmt: skip
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


float32_dot.defvjp(lambda x, weight: (float32_dot(x, weight), (x, weight)), _float32_dot_backward)
