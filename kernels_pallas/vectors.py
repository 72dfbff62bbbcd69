"""Products that XLA's CPU does faster in another form: a matrix times one or few rows, small matrices times many."""

import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.tpu import current_platform

_LEAST_PART = 1 << 16
"""Elements of a matrix that are worth a thread."""

_FEW_ROWS = 32
"""Up to so many rows, a matrix times them is faster than they times the matrix."""

_MANY_ROWS = 256
"""From so many rows on, copying a matrix is little beside multiplying by it."""


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


def are_few(rows: int) -> bool:
    """Whether so many rows are better multiplied by `times_few`."""
    return 1 < rows <= _FEW_ROWS and current_platform() == "cpu"


def times_few(weight: Float[Array, "*G O I"], x: Float[Array, "*G R I"], precision: jax.lax.Precision) -> jax.Array:
    """`x · weightᵀ` [*G, R, O] for few rows, accumulated and returned in float32.

    XLA's CPU rearranges the second operand of a product in memory: here the rows instead of the matrix.
    """
    batch = tuple(range(weight.ndim - 2))
    numbers = (((weight.ndim - 1,), (x.ndim - 1,)), (batch, batch))
    out = jax.lax.dot_general(weight, x, numbers, precision=precision, preferred_element_type=jnp.float32)
    # Without the barrier XLA makes a transposed product one of swapped operands.
    return jnp.swapaxes(jax.lax.optimization_barrier(out), -1, -2)


def are_joined(rows: int) -> bool:
    """Whether several matrices that multiply the same rows are better copied together and multiplied once.

    The rows are read once, and backward one product takes the place of several whose results are added. Joining the
    shared expert's gate and up, and the queries' and keys' first matrices, saves a few percent of a training step of
    the 137M-parameter model.
    """
    return rows >= _MANY_ROWS and current_platform() == "cpu"
