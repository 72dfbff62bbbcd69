"""The seams between sublayers: give a sublayer's output back to the residual streams and take the next one's input.

Streams are flattened, [B, S, C · D] stream-major: on a TPU that is the layout in which a block of tokens is contiguous,
and [B, S, C, D] would be a copy away. Maps are [M, B, S] float32, M = C · (2 + C) rows in the order of `fn`: C for
reading (unspecified values: whoever made the maps has read already), C post, C · C comb row-major (source, target).
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.hyper_connection import pallas, reference, xla
from kernels_pallas.hyper_connection.reference import Maps

_SEAM = declare("hyper_connection_seam", pallas=pallas.seam, xla=xla.seam, reference=reference.seam)
_LEAVE = declare("hyper_connection_leave", pallas=pallas.leave, xla=xla.leave, reference=reference.leave)
_WRITE = declare("hyper_connection_write", xla=xla.write, reference=reference.write)


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
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B S CD"], Float[Array, "M B S"]]:
    """hc_post of a sublayer, hc_pre of the next and its RMSNorm (architecture.md §3.1, §3.2), in one pass.

    Args:
      out: what the sublayer before returned, in the streams' dtype; None, like maps, where nothing is to be written.
      streams: what it read from.
      maps: how it writes: those that came with its input.
      fn, base, scale: the next sublayer's float32 parameters.
      gain: weight of the next sublayer's norm, float32.
      iterations, eps: Sinkhorn rounds and the epsilon of gates and rounds; norm_eps: of both RMS.

    Returns:
      The next sublayer's input after its norm; the streams X'_k = post_k · out + Σ_j comb[j, k] · X_j, both in the
      streams' dtype; the maps of the next sublayer. All arithmetic is float32, the streams and the input are rounded
      once before they are read again.

    Raises:
      ValueError: shapes that do not belong together.
    """
    _check(streams, fn, base, scale, gain, out=out, maps=maps)
    run = _SEAM.choose(implementation)
    return run(out, streams, maps, fn, base, scale, gain, iterations=iterations, eps=eps, norm_eps=norm_eps)


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
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B S CD"]]:
    """hc_post of the last sublayer, hc_head (architecture.md §3.3), final RMSNorm: what the head reads; the streams.

    Arguments as `seam` has them.

    Raises:
      ValueError: shapes that do not belong together.
    """
    _check(streams, fn, base, scale, gain, out=out, maps=maps, is_head=True)
    run = _LEAVE.choose(implementation)
    return run(out, streams, maps, fn, base, scale, gain, eps=eps, norm_eps=norm_eps)


def write(
    out: Float[Array, "B S D"],
    streams: Float[Array, "B S C D"],
    maps: Maps,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B S C D"]:
    """hc_post alone (architecture.md §3.2): X'_k = post_k · out + Σ_j comb[j, k] · X_j in float32, rounded once."""
    return _WRITE.choose(implementation)(out, streams, maps)


def sharded_seam(mesh: jax.sharding.Mesh, axes: tuple[str, ...], **settings: Any) -> Any:
    """`seam` on a mesh: every device runs it on its own rows of the batch, and no token crosses.

    Args:
      axes: mesh axes that divide the batch dimension.
      settings: the keyword arguments of `seam`.

    Returns:
      A function of `seam`'s positional arguments, whose parameters are replicated.
    """
    tokens, maps, whole = (jax.sharding.PartitionSpec(*spec) for spec in ((axes,), (None, axes), ()))
    return jax.shard_map(
        functools.partial(seam, **settings),
        mesh=mesh,
        in_specs=(tokens, tokens, maps, whole, whole, whole, whole),
        out_specs=(tokens, tokens, maps),
        check_vma=False,  # a pallas_call does not say over which axes its results vary
    )


def _check(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    gain: jax.Array,
    *,
    out: jax.Array | None,
    maps: jax.Array | None,
    is_head: bool = False,
) -> None:
    batch, length, flat = streams.shape
    count = flat // gain.shape[0]
    rows = count * (2 + count)
    wanted = {
        "streams": (streams.shape, (batch, length, count * gain.shape[0])),
        "fn": (fn.shape, (count if is_head else rows, flat)),
        "base": (base.shape, (count if is_head else rows,)),
        "scale": (scale.shape, (1 if is_head else 3,)),
    }
    if (out is None) != (maps is None):
        raise ValueError("hyper_connection: out and maps come together or not at all")
    if out is not None and maps is not None:
        wanted["out"] = (out.shape, (batch, length, gain.shape[0]))
        wanted["maps"] = (maps.shape, (rows, batch, length))
    for name, (found, need) in wanted.items():
        if found != need:
            raise ValueError(f"hyper_connection: {name} has shape {found}, need {need} beside gain {gain.shape}")
    if out is not None and out.dtype != streams.dtype:
        raise ValueError(f"hyper_connection: out is {out.dtype}, need the streams' {streams.dtype}")
