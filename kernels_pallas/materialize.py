"""Arrays that are to be written to memory once, instead of being computed again in every reader."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from kernels_pallas.loops import data_loop
from kernels_pallas.tpu import current_platform

_Tree = TypeVar("_Tree")


def materialized(tree: _Tree) -> _Tree:
    """The same arrays, which no fusion crosses; on a TPU, whose compiler weighs that itself, just the same arrays.

    XLA's CPU removes optimization barriers before it fuses. It does not fuse across a loop, so the arrays go through
    one that never turns: its count is whether a number exceeds infinity, which the compiler does not know of numbers
    that it has yet to compute. Such a loop has no gradient: use this where none is asked for, as inside of the rules
    of a derivative.

    Args:
      tree: floating-point arrays.
    """
    if current_platform() == "tpu":
        return tree
    if current_platform() != "cpu":
        return jax.lax.optimization_barrier(tree)
    arrays, structure = jax.tree.flatten(tree)
    number = next((jnp.ravel(array)[0] for array in arrays if array.size), None)
    if number is None:
        return tree
    turns = (number.astype(jnp.float32) > jnp.inf).astype(jnp.int32)
    arrays = data_loop(0, turns, lambda _, arrays: [-array for array in arrays], arrays, expected=0)
    return jax.tree.unflatten(structure, arrays)


def with_materialized_gradient(x: jax.Array) -> jax.Array:
    """x, whose cotangent is `materialized`.

    For results of matrix products: the products of their gradient read the cotangent in two orders, for each of which
    XLA's CPU would compute it anew, one of them in strides.
    """
    return _identity(x) if current_platform() == "cpu" else x


@jax.custom_vjp
def _identity(x: jax.Array) -> jax.Array:
    return x


_identity.defvjp(lambda x: (x, None), lambda _, d_x: (materialized(d_x),))
