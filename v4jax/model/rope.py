"""Rotary embedding: interleaved pairs in the LAST channels of a head, two tables, YaRN (architecture.md §4)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v4jax import ops
from v4jax.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """cos and signed sin of the angles of each position, float32 [..., R], laid out like the channels they multiply.

    Channels 2i and 2i + 1 are one pair: cos repeats, sin is −sin for the even and +sin for the odd channel.
    """

    cos: jax.Array
    sin: jax.Array

    @property
    def inverse(self) -> "Rotation":
        """The rotation by the negative angles."""
        return Rotation(self.cos, -self.sin)


def frequencies(rope_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle per position of each pair, float32 [rope_dim / 2], YaRN-blended where `scaling` is given.

    YaRN keeps fast frequencies, divides slow ones by `factor` and blends linearly between the channels at which
    `beta_fast` and `beta_slow` full turns fit into the original context. It applies at every length, and cos and sin
    are not scaled.
    """
    exponents = np.arange(0, rope_dim, 2, dtype=np.float32) / np.float32(rope_dim)
    base = np.float32(1.0) / np.power(np.float32(theta), exponents, dtype=np.float32)
    if scaling is None:
        return base

    def channel_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return rope_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel_of(scaling.beta_fast)), 0)
    high = min(math.ceil(channel_of(scaling.beta_slow)), rope_dim - 1)
    span = (high - low) or 0.001  # equal bounds: a step, without a division by zero
    ramp = np.clip((np.arange(rope_dim // 2, dtype=np.float32) - low) / np.float32(span), 0, 1).astype(np.float32)
    return (base * (1 - ramp) + base / np.float32(scaling.factor) * ramp).astype(np.float32)


def layer_frequencies(config: ModelConfig, ratio: int) -> np.ndarray:
    """The table of a layer: plain where it has no compressed entries, YaRN everywhere in it where it has."""
    if ratio == 0:
        return frequencies(config.qk_rope_head_dim, config.rope_theta, None)
    return frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling)


def rotation(positions: Int[Array, "*T"], table: np.ndarray) -> Rotation:
    """The rotation at integer positions; the angles are formed in float32, as the reference does."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(np.repeat(table, 2))
    signs = np.tile(np.array([-1, 1], np.float32), len(table))
    # Otherwise XLA's CPU puts sines and cosines into every reader: once per head, in every layer.
    return ops.materialized(Rotation(jnp.cos(angles), jnp.sin(angles) * signs))


@jax.custom_vjp
def rotate(x: Float[Array, "*T H"], turn: Rotation) -> Float[Array, "*T H"]:
    """Rotates the last R channels of x as complex pairs (2i, 2i + 1); computed in float32, returned in x.dtype.

    `turn` broadcasts against x's leading axes: insert an axis for heads where x has one. No gradient goes to it.
    """
    size = turn.cos.shape[-1]
    rope = x[..., -size:]
    # The other channel of each pair, by an exact product with a permutation: strided access is slow everywhere.
    swap = np.kron(np.eye(size // 2, dtype=np.float32), np.array([[0, 1], [1, 0]], np.float32))
    other = jnp.matmul(
        rope, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    turned = (rope.astype(jnp.float32) * turn.cos + other * turn.sin).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, turned, x.shape[-1] - size, axis=-1)


def _rotate_backward(turn: Rotation, d_out: jax.Array) -> tuple[jax.Array, None]:
    # A rotation's transpose is its inverse. Written so, the permutation meets d_out in its own dtype.
    return rotate(d_out, turn.inverse), None


rotate.defvjp(lambda x, turn: (rotate(x, turn), turn), _rotate_backward)


def over_heads(turn: Rotation) -> Rotation:
    """`turn` for arrays with a head axis before the channels."""
    return Rotation(turn.cos[..., None, :], turn.sin[..., None, :])
