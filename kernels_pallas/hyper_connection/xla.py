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
from kernels_pallas.materialize import materialized


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def write(out: Float[Array, "B S D"], streams: Float[Array, "B S C D"], maps: Maps) -> Float[Array, "B S C D"]:
    """See `api.write`."""
    return reference.write(out, streams, maps)


def _forward(out: jax.Array, streams: jax.Array, maps: Maps) -> tuple[jax.Array, tuple]:
    return materialized(reference.write(out, streams, maps)), (out, streams, maps)


def _backward(saved: tuple, d_new: jax.Array) -> tuple[jax.Array, jax.Array, Maps]:
    out, streams, maps = saved
    d_new = materialized(d_new.astype(jnp.float32))
    by_stream = range(d_new.shape[2])
    d_out = sum(maps.post[k][..., None] * d_new[:, :, k] for k in by_stream)
    # The transpose of `reference.write`: new stream k gives its part of comb's second axis to every stream j.
    d_streams = sum(jnp.moveaxis(maps.comb[:, k], 0, -1)[..., None] * d_new[:, :, k : k + 1] for k in by_stream)
    d_out, d_streams = materialized((jnp.asarray(d_out), jnp.asarray(d_streams)))
    d_post = _product("bskd,bsd->bsk", d_new, out.astype(jnp.float32))
    d_comb = _product("bsjd,bskd->bsjk", streams.astype(jnp.float32), d_new)
    d_maps = Maps(jnp.moveaxis(d_post, -1, 0), jnp.transpose(d_comb, (2, 3, 0, 1)))
    return d_out.astype(out.dtype), d_streams.astype(streams.dtype), d_maps


write.defvjp(_forward, _backward)


seam = functools.partial(reference.seam, mix=write)
leave = functools.partial(reference.leave, mix=write)
flat_write = functools.partial(reference.flat_write, mix=write)
