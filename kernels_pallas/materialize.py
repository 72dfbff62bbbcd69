"""Arrays that XLA's CPU is to write to memory once, instead of computing them again in every reader."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from kernels_pallas.tpu import current_platform

_Tree = TypeVar("_Tree")


def materialized(tree: _Tree) -> _Tree:
    """The same arrays, which no fusion crosses on a CPU; elsewhere just the same arrays.

    XLA's CPU removes optimization barriers before it fuses. It does not fuse across a loop, so the arrays go through
    one that never turns: its count is whether a number exceeds infinity, which the compiler does not know of numbers
    that it has yet to compute. Differentiable functions are to use it inside of their own rules.
    """
    if current_platform() != "cpu":
        return tree
    arrays, structure = jax.tree.flatten(tree)
    first = jnp.ravel(arrays[0])[0].astype(jnp.float32)
    turns = (first > jnp.inf).astype(jnp.int32)
    body = lambda state: (state[0] - 1, *(-a for a in state[1:]))  # noqa: E731
    kept = jax.lax.while_loop(lambda state: state[0] > 0, body, (turns, *arrays))
    return jax.tree.unflatten(structure, kept[1:])


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
