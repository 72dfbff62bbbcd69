"""Where the matrices of a layer's experts lie: an array, or released FP8 or FP4 bytes, of one layer or of many.

An implementation takes one expert's matrix at a time: nothing else is ever dequantised, and no layer's stack is copied.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Shaped

from kernels_pallas.formats import FP4_BLOCK, FP8_TILE, AnyArray, decode_fp4, decode_fp8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """One matrix [out, in] per expert."""

    values: Shaped[Array, "*L E O I"]
    """Floats; or float8_e4m3fn codes; or int8 with two FP4 codes each, [half the inputs, out]: see `k_major`."""
    scale: Shaped[Array, "*L E R C"] | None = None
    """One per tile of FP8, or per 32 inputs of FP4; None for plain floats."""
    layer: Int[Array, ""] | None = None
    """Which of the leading entries is meant, where there is a leading axis of layers."""
    tile: tuple[int, int] = dataclasses.field(default=FP8_TILE, metadata={"static": True})
    """Rows and columns per scale of FP8."""

    @property
    def is_fp4(self) -> bool:
        """Whether two codes share a byte."""
        return self.scale is not None and self.values.dtype == np.int8

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in) of one layer, as if it were not quantised."""
        count, rows, columns = self.values.shape[-3:]
        return (count, columns, 2 * rows) if self.is_fp4 else (count, rows, columns)

    def one(self, expert: Int[Array, ""], dtype: DTypeLike) -> Shaped[Array, "O I"]:
        """The matrix of one expert."""
        values = self._slice(self.values, expert)
        if self.scale is None:
            return values.astype(dtype)
        scale = self._slice(self.scale, expert)
        if self.is_fp4:
            return decode_fp4(values.T, scale.T).astype(dtype)
        return decode_fp8(values, scale, self.tile).astype(dtype)

    def halves(self, expert: Int[Array, ""], dtype: DTypeLike) -> tuple[Shaped[Array, "H O"], Shaped[Array, "H O"]]:
        """The rows of even and of odd inputs of one FP4 expert: its nibbles without putting them side by side."""
        assert self.scale is not None
        # The bytes are wanted twice and should be read once.
        codes = jax.lax.optimization_barrier(self._slice(self.values, expert))
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        scale = jnp.repeat(_power_of_two(self._slice(self.scale, expert)), FP4_BLOCK // 2, axis=0)[: codes.shape[0]]
        low, high = _nibble(codes & 15), _nibble(codes >> 4)
        return (low * scale).astype(dtype), (high * scale).astype(dtype)

    def _slice(self, array: jax.Array, expert: jax.Array) -> jax.Array:
        place = (expert,) if self.layer is None else (self.layer, expert)
        rest = array.shape[len(place) :]
        zero = jnp.zeros((), jnp.int32)
        start = (*(jnp.asarray(i, jnp.int32) for i in place), *(zero for _ in rest))
        return jax.lax.dynamic_slice(array, start, (*(1 for _ in place), *rest)).reshape(rest)


def k_major(array: AnyArray) -> AnyArray:
    """FP4 codes or scales [..., out, in] of a file as a stack keeps them, [..., in, out], or the other way round.

    A TPU multiplies by matrices whose outputs lie along the lanes, and scales then repeat along sublanes, which is
    cheap; as released, the compiler would copy whole stacks into that order.
    """
    return array.swapaxes(-1, -2)


def as_stack(matrices: "Shaped[Array, 'E O I'] | ExpertStack") -> ExpertStack:
    """A plain array as a stack of one layer."""
    return matrices if isinstance(matrices, ExpertStack) else ExpertStack(matrices)


def _nibble(code: jax.Array) -> jax.Array:
    """float32 values of 4-bit codes in uint8."""
    magnitude = (code & 7).astype(jnp.int32)
    bits = (magnitude << 22) + (126 << 23)
    normal = jax.lax.bitcast_convert_type(bits, jnp.float32)
    value = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * 0.5, normal)
    return jnp.where(code >= 8, -value, value)


def _power_of_two(scale: jax.Array) -> jax.Array:
    if scale.dtype == jnp.float8_e8m0fnu:
        scale = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
