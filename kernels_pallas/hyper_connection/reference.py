"""Manifold-constrained hyper-connections in plain jnp (architecture.md §3), all in float32.

Maps of the streams keep their 4 or 4×4 entries in LEADING axes and tokens behind them, so that every step of the
Sinkhorn rounds is one elementwise operation over whole rows of tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Maps(NamedTuple):
    """How a sublayer reads and writes the streams, float32."""

    post: jax.Array
    """[C, B, S]: weight of the sublayer's output in each stream."""
    comb: jax.Array
    """[C, C, B, S]: weight of stream j (first axis) in the new stream k (second axis)."""


def _project(streams: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """RMS-scaled projection of the flattened streams, stream-major: [B, S, C, D] × [M, C·D] → [M, B, S]."""
    flat = streams.astype(jnp.float32).reshape(*streams.shape[:2], -1)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)
    # Tokens stay the rows of the product: the other order makes XLA transpose the streams in memory.
    product = jax.lax.dot_general(
        flat, fn, (((2,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return jnp.moveaxis(product * scale, -1, 0)


def sinkhorn(logits: Float[Array, "C C *T"], iterations: int, eps: float) -> Float[Array, "C C *T"]:
    """Sinkhorn normalisation of [source, target, ...] logits: softmax over targets, +eps, then alternating sums.

    Ends on columns: `iterations` column and `iterations − 1` further row normalisations, eps in every denominator.
    """

    def normalise(matrix: jax.Array, axis: int) -> jax.Array:
        return matrix / (jnp.sum(matrix, axis=axis, keepdims=True) + eps)

    def both(matrix: jax.Array, _: None) -> tuple[jax.Array, None]:
        return normalise(normalise(matrix, 1), 0), None

    matrix = normalise(jax.nn.softmax(logits, axis=1) + eps, 0)
    return jax.lax.scan(both, matrix, None, length=iterations - 1)[0]


def weighted_sum(weights: Float[Array, "C B S"], streams: Float[Array, "B S C D"]) -> Float[Array, "B S D"]:
    """Σ_i weights_i · stream_i in float32, rounded once."""
    total = sum(weights[i][..., None] * streams[:, :, i].astype(jnp.float32) for i in range(streams.shape[2]))
    return jnp.asarray(total).astype(streams.dtype)


def read(
    streams: Float[Array, "B S C D"],
    fn: Float[Array, "M CD"],
    base: Float[Array, " M"],
    scale: Float[Array, " 3"],
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    collapse: Callable[..., jax.Array] = weighted_sum,
) -> tuple[Float[Array, "B S D"], Maps]:
    """hc_pre: the sublayer's input (streams' dtype) and the maps that `write` needs. M = C · (2 + C).

    `collapse` may take the place of `weighted_sum`.
    """
    count = streams.shape[2]
    z = _project(streams, fn, norm_eps)
    z = z * jnp.repeat(scale, jnp.array([count, count, count * count]), total_repeat_length=z.shape[0])[:, None, None]
    z = z + base[:, None, None]
    pre = jax.nn.sigmoid(z[:count]) + eps
    post = 2 * jax.nn.sigmoid(z[count : 2 * count])
    comb = sinkhorn(z[2 * count :].reshape(count, count, *z.shape[1:]), iterations, eps)
    return collapse(pre, streams), Maps(post, comb)


def write(out: Float[Array, "B S D"], streams: Float[Array, "B S C D"], maps: Maps) -> Float[Array, "B S C D"]:
    """hc_post: new stream k = post_k · out + Σ_j comb[j, k] · stream_j, summed in float32 (over comb's FIRST axis)."""
    # One elementwise expression over [B, S, C, D], so that it compiles to one pass over memory.
    new = jnp.moveaxis(maps.post, 0, -1)[..., None] * out.astype(jnp.float32)[:, :, None]
    for j in range(streams.shape[2]):
        new = new + jnp.moveaxis(maps.comb[j], 0, -1)[..., None] * streams[:, :, j : j + 1].astype(jnp.float32)
    return new.astype(streams.dtype)


def head(
    streams: Float[Array, "B S C D"],
    fn: Float[Array, "C CD"],
    base: Float[Array, " C"],
    scale: Float[Array, " 1"],
    *,
    eps: float,
    norm_eps: float,
    collapse: Callable[..., jax.Array] = weighted_sum,
) -> Float[Array, "B S D"]:
    """hc_head: the weighted sum of the streams that the final norm reads, in the streams' dtype."""
    z = _project(streams, fn, norm_eps) * scale[0] + base[:, None, None]
    return collapse(jax.nn.sigmoid(z) + eps, streams)


# ---- whole seams: streams flattened to [B, S, C · D], maps to [M, B, S] in the order of fn's rows --------------------
def unpack_maps(maps: Float[Array, "M B S"], count: int) -> Maps:
    """The writing rows: post, then comb row-major. The reading rows before them are only there to keep fn's order."""
    return Maps(maps[count : 2 * count], maps[2 * count :].reshape(count, count, *maps.shape[1:]))


def rms_norm(x: Float[Array, "B S D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "B S D"]:
    """RMS-normalised x times gain, in float32 with one cast at the end."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * gain).astype(x.dtype)


def flat_write(
    out: jax.Array | None,
    streams: Float[Array, "B S CD"],
    maps: jax.Array | None,
    mix: Callable[..., jax.Array] = write,
) -> Float[Array, "B S CD"]:
    """`write` (or `mix` in its place) on flattened streams; the streams themselves where there is nothing to write."""
    if out is None or maps is None:
        return streams
    count = streams.shape[-1] // out.shape[-1]
    apart = streams.reshape(*streams.shape[:2], count, -1)
    return mix(out, apart, unpack_maps(maps, count)).reshape(streams.shape)


def seam(
    out: Float[Array, "B S D"] | None,
    streams: Float[Array, "B S CD"],
    maps: Float[Array, "M B S"] | None,
    fn: Float[Array, "M CD"],
    base: Float[Array, " M"],
    scale: Float[Array, " 3"],
    gain: Float[Array, " D"],
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    mix: Callable[..., jax.Array] = write,
    collapse: Callable[..., jax.Array] = weighted_sum,
) -> tuple[Float[Array, "B S D"], Float[Array, "B S CD"], Float[Array, "M B S"]]:
    """See `api.seam`."""
    streams = flat_write(out, streams, maps, mix)
    apart = streams.reshape(*streams.shape[:2], -1, gain.shape[0])
    x, new = read(apart, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps, collapse=collapse)
    packed = jnp.concatenate([jnp.zeros_like(new.post), new.post, new.comb.reshape(-1, *new.post.shape[1:])])
    return rms_norm(x, gain, norm_eps), streams, packed


def leave(
    out: Float[Array, "B S D"] | None,
    streams: Float[Array, "B S CD"],
    maps: Float[Array, "M B S"] | None,
    fn: Float[Array, "C CD"],
    base: Float[Array, " C"],
    scale: Float[Array, " 1"],
    gain: Float[Array, " D"],
    *,
    eps: float,
    norm_eps: float,
    mix: Callable[..., jax.Array] = write,
    collapse: Callable[..., jax.Array] = weighted_sum,
) -> tuple[Float[Array, "B S D"], Float[Array, "B S CD"]]:
    """See `api.leave`."""
    streams = flat_write(out, streams, maps, mix)
    apart = streams.reshape(*streams.shape[:2], base.shape[0], -1)
    x = head(apart, fn, base, scale, eps=eps, norm_eps=norm_eps, collapse=collapse)
    return rms_norm(x, gain, norm_eps), streams
