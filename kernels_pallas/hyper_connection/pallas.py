"""The kernels as differentiable functions of flattened streams.

One kernel per seam each way. The derivative makes gates and Sinkhorn rounds again, so that nothing is kept but the
seam's inputs and the streams that it wrote: those the next seam keeps as its own input anyway, and reading them costs
less than mixing them again.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.hyper_connection.backward import seam_backward
from kernels_pallas.hyper_connection.kernel import seam_forward


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
) -> tuple[Float[Array, "B S D"], Float[Array, "B S CD"], Float[Array, "M B S"]]:
    """See `api.seam`."""
    settings = (("eps", eps), ("iterations", iterations), ("norm_eps", norm_eps))
    return _seam("seam", settings, (out, streams, maps, fn, base, scale, gain))


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
) -> tuple[Float[Array, "B S D"], Float[Array, "B S CD"]]:
    """See `api.leave`."""
    return _seam("leave", (("eps", eps), ("norm_eps", norm_eps)), (out, streams, maps, fn, base, scale, gain))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _seam(variant: str, settings: tuple[tuple[str, Any], ...], operands: tuple[Any, ...]) -> Any:
    x, streams, maps = seam_forward(*operands, is_head=variant == "leave", **({"iterations": 0} | dict(settings)))
    return (x, streams) if variant == "leave" else (x, streams, maps)


def _forward(variant: str, settings: Any, operands: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    results: Any = _seam(variant, settings, operands)
    return results, (operands, results[1])


def _backward(variant: str, settings: Any, saved: tuple[Any, ...], cotangents: Any) -> tuple[Any]:
    (out, streams, maps, fn, base, scale, gain), new = saved
    is_head = variant == "leave"
    d_x, d_new, d_maps = (*cotangents, None) if is_head else cotangents
    options: dict[str, Any] = {"iterations": 0} | dict(settings)
    given = (out, streams, maps, new, fn, base, scale, gain, d_x, d_new, d_maps)
    return (seam_backward(*given, is_head=is_head, **options),)


_seam.defvjp(_forward, _backward)
