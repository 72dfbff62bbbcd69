"""The kernels as differentiable functions of flattened streams.

Forward is one kernel per seam. The derivative recomputes the seam from its inputs, so that nothing but those is kept.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.hyper_connection import reference
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
    return _seam(variant, settings, operands), operands


def _backward(variant: str, settings: Any, operands: tuple[Any, ...], cotangents: Any) -> tuple[Any]:
    function = functools.partial(getattr(reference, variant), **dict(settings))
    return (jax.vjp(function, *operands)[1](cotangents),)


_seam.defvjp(_forward, _backward)
