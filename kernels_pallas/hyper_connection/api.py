"""`read`, `write` and `head`: how a sublayer takes its input from the residual streams and gives its output back."""

from jaxtyping import Array, Float

from kernels_pallas.dispatch import Implementation, declare
from kernels_pallas.hyper_connection import reference, xla
from kernels_pallas.hyper_connection.reference import Maps

_READ = declare("hyper_connection_read", reference=reference.read)
_WRITE = declare("hyper_connection_write", reference=reference.write, xla=xla.write)
_HEAD = declare("hyper_connection_head", reference=reference.head)


def read(
    streams: Float[Array, "B S C D"],
    fn: Float[Array, "M CD"],
    base: Float[Array, " M"],
    scale: Float[Array, " 3"],
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B S D"], Maps]:
    """hc_pre (architecture.md §3.1): the sublayer's input Σ_i pre_i · X_i, and the maps for `write`.

    Args:
      streams: residual streams X in the compute dtype.
      fn, base, scale: the sublayer's float32 parameters; M = C · (2 + C): pre, post, then comb row-major (source,
        target).
      iterations, eps: Sinkhorn rounds and the epsilon of gates and rounds; norm_eps: of the RMS over all C · D values.

    Returns:
      Input in the streams' dtype; maps in float32. All arithmetic is float32.
    """
    return _READ.choose(implementation)(
        streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps
    )  # fmt: skip


def write(
    out: Float[Array, "B S D"],
    streams: Float[Array, "B S C D"],
    maps: Maps,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B S C D"]:
    """hc_post (architecture.md §3.2): X'_k = post_k · out + Σ_j comb[j, k] · X_j in float32, one cast at the end."""
    return _WRITE.choose(implementation)(out, streams, maps)


def head(
    streams: Float[Array, "B S C D"],
    fn: Float[Array, "C CD"],
    base: Float[Array, " C"],
    scale: Float[Array, " 1"],
    *,
    eps: float,
    norm_eps: float,
    implementation: Implementation | None = None,
) -> Float[Array, "B S D"]:
    """hc_head (architecture.md §3.3): Σ_i (σ(scale · z_i + base_i) + eps) · X_i before the final norm."""
    return _HEAD.choose(implementation)(streams, fn, base, scale, eps=eps, norm_eps=norm_eps)
