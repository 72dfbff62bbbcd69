"""What crosses the streams, with derivatives for use off TPU, whose results are written to memory once.

XLA would fuse an elementwise expression into every reader of the streams, so that each recomputes them, several layers
deep. The sums that give the maps their gradients are products per token.
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
    d_out = jnp.asarray(sum(maps.post[k][..., None] * d_new[:, :, k] for k in by_stream))
    # The transpose of `reference.write`: new stream k gives its part of comb's second axis to every stream j.
    d_streams = jnp.asarray(
        sum(jnp.moveaxis(maps.comb[:, k], 0, -1)[..., None] * d_new[:, :, k : k + 1] for k in by_stream)
    )
    d_post = _product("bskd,bsd->bsk", d_new, out.astype(jnp.float32))
    d_comb = _product("bsjd,bskd->bsjk", streams.astype(jnp.float32), d_new)
    d_maps = Maps(jnp.moveaxis(d_post, -1, 0), jnp.transpose(d_comb, (2, 3, 0, 1)))
    return d_out.astype(out.dtype), d_streams.astype(streams.dtype), d_maps


write.defvjp(_forward, _backward)


@jax.custom_vjp
def weighted_sum(weights: Float[Array, "C B S"], streams: Float[Array, "B S C D"]) -> Float[Array, "B S D"]:
    """See `reference.weighted_sum`."""
    return reference.weighted_sum(weights, streams)


def _weighted_sum_backward(saved: tuple[jax.Array, jax.Array], d_x: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, streams = saved
    d_x = materialized(d_x.astype(jnp.float32))
    d_weights = _product("bscd,bsd->bsc", streams.astype(jnp.float32), d_x)
    d_streams = jnp.moveaxis(weights, 0, -1)[..., None] * d_x[:, :, None]
    return jnp.moveaxis(d_weights, -1, 0), d_streams.astype(streams.dtype)


weighted_sum.defvjp(lambda *given: (weighted_sum(*given), given), _weighted_sum_backward)


seam = functools.partial(reference.seam, mix=write, collapse=weighted_sum)
leave = functools.partial(reference.leave, mix=write, collapse=weighted_sum)
