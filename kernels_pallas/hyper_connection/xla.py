"""`write` for differentiation off TPU: products per token instead of one elementwise expression.

XLA would fuse that expression into every reader of the streams, so that each recomputes them, several layers deep; the
results of products are kept. Only the rules of the derivative are written that way: alone, the reference is fastest.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.hyper_connection import reference
from kernels_pallas.hyper_connection.reference import Maps


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def write(out: Float[Array, "B S D"], streams: Float[Array, "B S C D"], maps: Maps) -> Float[Array, "B S C D"]:
    """See `api.write`."""
    return reference.write(out, streams, maps)


def _forward(out: jax.Array, streams: jax.Array, maps: Maps) -> tuple[jax.Array, tuple]:
    mixed = _product("bskj,bsjd->bskd", jnp.transpose(maps.comb, (2, 3, 1, 0)), streams.astype(jnp.float32))
    new = mixed + jnp.moveaxis(maps.post, 0, -1)[..., None] * out.astype(jnp.float32)[:, :, None]
    return new.astype(streams.dtype), (out, streams, maps)


def _backward(saved: tuple, d_new: jax.Array) -> tuple[jax.Array, jax.Array, Maps]:
    out, streams, maps = saved
    d_new = d_new.astype(jnp.float32)
    d_out = _product("bsk,bskd->bsd", jnp.moveaxis(maps.post, 0, -1), d_new)
    d_streams = _product("bsjk,bskd->bsjd", jnp.transpose(maps.comb, (2, 3, 0, 1)), d_new)
    d_post = _product("bskd,bsd->bsk", d_new, out.astype(jnp.float32))
    d_comb = _product("bsjd,bskd->bsjk", streams.astype(jnp.float32), d_new)
    d_maps = Maps(jnp.moveaxis(d_post, -1, 0), jnp.transpose(d_comb, (2, 3, 0, 1)))
    return d_out.astype(out.dtype), d_streams.astype(streams.dtype), d_maps


write.defvjp(_forward, _backward)


seam = functools.partial(reference.seam, mix=write)
leave = functools.partial(reference.leave, mix=write)
flat_write = functools.partial(reference.flat_write, mix=write)
