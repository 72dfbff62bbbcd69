"""Quantised parameters, and simulated quantisation as the released weights were trained with.

The codecs are `kernels_pallas.formats` (architecture.md §12); here are the variables that hold released bytes, the two
places where the model rounds activations, with gradients passed straight through, and the refusal of sizes for which
that is not defined.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.formats import FP4_BLOCK, fp4_round_trip, fp8_round_trip
from v4jax.config import ConfigError, ModelConfig


class Codes(nnx.Variable):
    """Codes of a quantised matrix: float8_e4m3fn, or int8 holding two FP4 codes. Never differentiated."""


class Scales(nnx.Variable):
    """Scales of a quantised matrix, in the dtype of the checkpoint. Divided over a mesh like the matrix."""


class PackedCodes(Codes):
    """FP4 codes of experts as `ExpertStack` has them: [in / 2, out], the file's last two axes swapped."""


class PackedScales(Scales):
    """Their scales, [in / 32, out]."""


KV_BLOCK = 64
"""Channels per scale of the simulated FP8 key-value cache."""


def check_simulation(config: ModelConfig) -> None:
    """Refuses sizes for which simulated quantisation is undefined.

    Raises:
        ConfigError: the unrotated channels do not fill blocks of 64, or `index_head_dim` is not a power of two or does
            not fill blocks of 32.
    """
    if config.nope_head_dim % KV_BLOCK:
        raise ConfigError(
            f"simulated quantisation: head_dim - qk_rope_head_dim is {config.nope_head_dim}, need a multiple of "
            f"{KV_BLOCK}; turn the simulation off (--quant-sim off)"
        )
    width = config.index_head_dim
    if width & (width - 1) or width % FP4_BLOCK:
        raise ConfigError(
            f"simulated quantisation: index_head_dim is {width}, need a power of two that is at least {FP4_BLOCK}; "
            "turn the simulation off (--quant-sim off)"
        )


def simulate_kv(x: Float[Array, "*batch H"], nope_dim: int) -> Float[Array, "*batch H"]:
    """Rounds the first `nope_dim` channels of a key to FP8 per 64, not the rotated ones (architecture.md §12.2)."""
    rounded = _straight_through(x[..., :nope_dim], lambda v: fp8_round_trip(v, KV_BLOCK))
    return jnp.concatenate([rounded, x[..., nope_dim:]], axis=-1)


def simulate_index(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """Rotates index queries or keys by the Hadamard matrix, then rounds to FP4 per 32 (architecture.md §7, §12.3)."""
    return _straight_through(hadamard_transform(x), lambda v: fp4_round_trip(v, FP4_BLOCK))


def hadamard_transform(x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    """Sylvester's Hadamard transform of the last axis, scaled by H^-0.5 so that applying it twice is the identity.

    Computed in float32, returned in the dtype of `x`.

    Raises:
        ValueError: the last axis is not a power of two.
    """
    width = x.shape[-1]
    if width & (width - 1) or width == 0:
        raise ValueError(f"Hadamard transform: got a last axis of {width}, need a power of two")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    product = jnp.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)
    return (product * width**-0.5).astype(x.dtype)


def _straight_through(x: Array, function: Callable[[Array], Array]) -> Array:
    """`function(x)`, exactly, with the derivative of the identity."""
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(lambda primals, tangents: (function(*primals), *tangents))
    return wrapped(x)
