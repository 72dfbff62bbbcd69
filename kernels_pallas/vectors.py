"""A matrix times one vector, on all threads of a CPU."""

import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.tpu import current_platform

_LEAST_PART = 1 << 16
"""Elements of a matrix that are worth a thread."""


def matrix_vector(weight: Float[Array, "O I"], x: Float[Array, "I"], precision: jax.lax.Precision) -> Float[Array, "O"]:
    """`weight · x` accumulated and returned in float32."""
    rows, columns = weight.shape
    parts = parts_of(rows, columns)
    if parts == 1:
        numbers = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(weight, x, numbers, precision=precision, preferred_element_type=jnp.float32)
    weight, x = weight.reshape(parts, rows // parts, columns), jnp.broadcast_to(x, (parts, columns))
    numbers = (((2,), (1,)), ((0,), (0,)))
    out = jax.lax.dot_general(weight, x, numbers, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(rows)


def parts_of(rows: int, columns: int) -> int:
    """Groups of rows of a matrix that are multiplied by one vector as a batch; 1 where that is no faster.

    XLA's CPU runs a matrix times a vector on one thread, which does not read as fast as the memory can, and the entries
    of a batch on all threads.
    """
    if current_platform() != "cpu":
        return 1
    most = max(min(os.cpu_count() or 1, rows * columns // _LEAST_PART), 1)
    return next(parts for parts in range(most, 0, -1) if rows % parts == 0)
