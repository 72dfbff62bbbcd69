"""Typed parameters and the three modules made of one matrix: `Linear`, `RMSNorm`, `Embedding`.

Every variable says its shape, initialiser, trailing logical axes and role where it is made. The role, never the rank,
decides optimiser treatment, quantisation and freezing: stacking a segment adds leading axes to everything.
"""

import dataclasses
import enum
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.formats import decode_fp8, fp8_scale_shape
from v4jax import parallel
from v4jax.dtypes import DTypePolicy
from v4jax.model.dots import float32_dot, full_dot, grouped_dot, joint_dots
from v4jax.quant import Codes, Scales
from v4jax.sharding import Names


class Role(enum.StrEnum):
    """What a parameter is, for optimisers, quantisation and freezing."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    NORM = "norm"
    GAIN = "gain"
    BIAS = "bias"
    TABLE = "table"
    SINK = "sink"


class RoutingTable(nnx.Variable):
    """`tid2eid`: expert ids by token id. Integers, never differentiated."""


class RouterBias(nnx.Variable):
    """Selection bias of a top-k router: moved by the load rule, never by a gradient (architecture.md §9.3)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Normal:
    """Draws from N(0, stddev²)."""

    stddev: float

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of this shape."""
        return generator.standard_normal(shape, np.float32) * np.float32(self.stddev)


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """One value everywhere."""

    value: float

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of this shape."""
        return np.full(shape, self.value, np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class RandomTable:
    """Distinct experts per token id, drawn from `experts`; how the released tables were made is not public."""

    experts: int

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """int32 of this shape."""
        ids = np.broadcast_to(np.arange(self.experts, dtype=np.int32), (*shape[:-1], self.experts))
        return generator.permuted(ids, axis=-1)[..., : shape[-1]]


@dataclasses.dataclass(frozen=True, slots=True)
class FromCheckpoint:
    """Released bytes: there is nothing to draw."""

    def __call__(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Refuses."""
        raise ValueError("native weights are a checkpoint's bytes: load one, or draw a model without them")


Initialiser = Normal | Constant | RandomTable | FromCheckpoint


@dataclasses.dataclass(frozen=True, slots=True)
class Declare:
    """Declares variables while a model is laid out: shapes and metadata, no arrays yet (`Transformer.random`)."""

    policy: DTypePolicy
    leading: tuple[int, ...] = ()
    """Axes in front of every declared shape: (repeats,) inside a stacked segment."""

    def __call__(
        self,
        shape: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        role: Role,
        init: Initialiser,
        dtype: DTypeLike = jnp.float32,
        kind: type[nnx.Variable] = nnx.Param,
    ) -> Any:
        """One variable; `axes` names its trailing dimensions (`v4jax.sharding`)."""
        return kind(jax.ShapeDtypeStruct((*self.leading, *shape), dtype), axes=axes, role=role, init=init)


def declare_fp8(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    declare: Declare,
    tile: tuple[int, int],
    scale_dtype: DTypeLike = jnp.float8_e8m0fnu,
) -> tuple[Any, Any]:
    """Codes and scales of a matrix, or a stack of them, released in FP8."""
    role, init = Role.MATRIX, FromCheckpoint()
    codes = declare(shape, axes=axes, role=role, init=init, dtype=jnp.float8_e4m3fn, kind=Codes)
    scales = fp8_scale_shape(shape, tile)
    return codes, declare(scales, axes=axes, role=role, init=init, dtype=scale_dtype, kind=Scales)


def rms_scale(x: jax.Array, eps: float) -> jax.Array:
    """`rsqrt(mean(x²) + eps)` over the last axis, kept as size 1; x is float32."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def unit_rms(x: Float[Array, "*T H"], eps: float, dtype: DTypeLike) -> Float[Array, "*T H"]:
    """`x · rms_scale(x)` computed in `dtype`, returned in that of x; the gradient keeps nothing but x."""
    wide = x.astype(dtype)
    return (wide * rms_scale(wide, eps)).astype(x.dtype)


def _unit_rms_backward(eps: float, dtype: DTypeLike, x: jax.Array, d_out: jax.Array) -> tuple[jax.Array]:
    wide, d_out = x.astype(dtype), d_out.astype(dtype)
    scale = rms_scale(wide, eps)
    along = jnp.mean(d_out * wide, axis=-1, keepdims=True) * jnp.square(scale)
    return (((d_out - wide * along) * scale).astype(x.dtype),)


unit_rms.defvjp(lambda x, eps, dtype: (unit_rms(x, eps, dtype), x), _unit_rms_backward)


FEW_ROWS = 64
"""Up to so many rows of inputs, copies of them for every tile of rows of a matrix are no larger than its codes."""


class Linear(nnx.Module):
    """A matrix in the checkpoint's [out, in] layout, without bias."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        axes: tuple[str | None, str | None],
        declare: Declare,
        *,
        stddev: float = 0.02,
        released_in_fp8: bool = False,
    ) -> None:
        self.policy = declare.policy
        shape, native = (out_size, in_size), declare.policy.native
        if native is not None and released_in_fp8:
            self.weight, self.scale = declare_fp8(shape, axes, declare, native.tile)
        else:
            self.weight = declare(shape, axes=axes, role=Role.MATRIX, init=Normal(stddev), dtype=declare.policy.param)
            self.scale = None

    @property
    def out_size(self) -> int:
        """Rows that are here."""
        return math.prod(self.weight.shape[:-1])

    @property
    def matrix(self) -> Float[Array, "O I"]:
        """The weight; dequantised here where it is kept in released bytes."""
        codes = self.weight[...].reshape(self.out_size, -1)
        if self.scale is None:
            return codes
        assert self.policy.native is not None
        scale, (rows, columns) = self.scale[...], self.policy.native.tile
        if scale.dtype != jnp.float8_e8m0fnu:
            return decode_fp8(codes, scale, (rows, columns)).astype(self.policy.param)
        # A power of two times three bits of mantissa is exact in bfloat16 too, and half as much to move.
        spread = jnp.repeat(scale.astype(self.policy.param), columns, axis=-1)[:, : codes.shape[1]]
        return codes.astype(self.policy.param) * jnp.repeat(spread, rows, axis=-2)[: codes.shape[0]]

    def grouped(self, x: Float[Array, "*T G I"]) -> Float[Array, "*T GO"]:
        """Each group of channels through its own rows of the matrix, in the compute dtype; results side by side."""
        x, groups = x.astype(self.policy.compute), x.shape[-2]
        if self._is_for_few(x, groups):
            return self._of_few(x).reshape(*x.shape[:-2], -1).astype(self.policy.compute)
        return grouped_dot(x, self.matrix.reshape(groups, -1, x.shape[-1]), self.policy)

    def __call__(self, x: Float[Array, "*T I"], *, summed_over: Names = ()) -> Float[Array, "*T O"]:
        """Result in the compute dtype; added up over the mesh axes that divide the inputs, if any."""
        out = self.unrounded(x.astype(self.policy.compute))
        return parallel.add(out, summed_over).astype(self.policy.compute)

    def unrounded(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The product in the dtype of x, accumulated and returned in float32."""
        if self._is_for_few(x[..., None, :], 1):
            return self._of_few(x[..., None, :])[..., 0, :]
        return full_dot(x, self.matrix.astype(x.dtype), self.policy.precision)

    @staticmethod
    def joint(x: Float[Array, "*T I"], linears: "tuple[Linear, ...]") -> tuple[Float[Array, "*T _"], ...]:
        """`unrounded` of the same x through several matrices."""
        if any(linear.scale is not None for linear in linears):
            return tuple(linear.unrounded(x) for linear in linears)
        matrices = tuple(linear.matrix.astype(x.dtype) for linear in linears)
        return joint_dots(x, matrices, linears[0].policy.precision)

    def _is_for_few(self, x: Float[Array, "*T G I"], groups: int) -> bool:
        if self.scale is None or self.scale.dtype != jnp.float8_e8m0fnu:
            return False
        assert self.policy.native is not None
        return self.out_size % (groups * self.policy.native.tile[0]) == 0 and math.prod(x.shape[:-2]) <= FEW_ROWS

    def _of_few(self, x: Float[Array, "*T G I"]) -> Float[Array, "*T G O"]:
        """Products with rows of whole tiles, float32: each tile's scale, a power of two, multiplies the inputs instead.

        That is exact too, and little beside the matrix. A dequantised matrix the compiler would write to memory and
        read back; codes that are only converted it reads once, inside the product.
        """
        assert self.policy.native is not None
        assert self.scale is not None
        (rows, columns), (groups, size) = self.policy.native.tile, x.shape[-2:]
        codes = self.weight[...].reshape(-1, rows, size).astype(x.dtype)
        scale = jnp.repeat(self.scale[...].astype(x.dtype), columns, axis=-1)[:, :size]
        own = x.reshape(-1, groups, 1, size) * scale.reshape(groups, -1, size)
        out = jax.lax.dot_general(
            own.reshape(-1, *scale.shape), codes, (((2,), (2,)), ((1,), (0,))),
            precision=self.policy.precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return jnp.moveaxis(out, 1, 0).reshape(*x.shape[:-1], -1)

    def in_float32(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The product with both operands upcast, for the float32 islands."""
        return float32_dot(x, self.matrix)


def in_tiles(module: Any) -> Any:
    """The module with its FP8 matrices as few rows are multiplied by them, [..., tiles, rows of a tile, in].

    For stacks of layers: a layer is then read where it lies. One that is cut out first and divided afterwards would be
    written to memory for it.
    """

    def tiled(linear: Any) -> Any:
        if not isinstance(linear, Linear) or linear.scale is None:
            return linear
        assert linear.policy.native is not None
        rows, codes = linear.policy.native.tile[0], linear.weight
        division = codes.get_metadata().get("division")
        if codes.shape[-2] % rows or (division is not None and any(division.storage)):
            return linear
        linear = jax.tree.map(lambda leaf: leaf, linear)
        linear.weight = codes.replace(codes[...].reshape(*codes.shape[:-2], -1, rows, codes.shape[-1]))
        return linear

    return jax.tree.map(tiled, module, is_leaf=lambda node: isinstance(node, Linear))


class RMSNorm(nnx.Module):
    """Weighted RMS norm: statistics and the weight in float32, one cast at the end (architecture.md §2)."""

    def __init__(self, size: int, eps: float, declare: Declare) -> None:
        self.eps, self.policy = eps, declare.policy
        self.weight = declare((size,), axes=(None,), role=Role.NORM, init=Constant(1.0))

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        """Result in the compute dtype."""
        x = x.astype(self.policy.island)
        return (x * rms_scale(x, self.eps) * self.weight[...]).astype(self.policy.compute)


class Embedding(nnx.Module):
    """Rows of [vocab, hidden]; the same class holds the head's matrix, under other `axes`."""

    def __init__(
        self,
        vocab: int,
        hidden: int,
        declare: Declare,
        *,
        axes: tuple[str | None, str | None] = ("vocab", "hidden"),
        stddev: float = 0.02,
    ) -> None:
        self.policy = declare.policy
        self.weight = declare(
            (vocab, hidden),
            axes=axes,
            role=Role.EMBEDDING,
            init=Normal(stddev),
            dtype=declare.policy.param,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Embeds int ids [B, S] → [B, S, D] in the compute dtype."""
        return embedded(self.weight, ids).astype(self.policy.compute)


_LEAST_CHANNELS = 128
"""Channels that a device brings of each row of a large table: on TPU fewer take as long to read."""


def embedded(weight: nnx.Variable, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Rows of a table, of which this device may hold some rows (compute axes) and some channels (storage axes).

    The table never travels whole, some of its channels may: devices with other tokens send their ids, and get back the
    channels that are here.
    """
    table, division = weight[...], weight.get_metadata().get("division")
    if parallel.current() is None or division is None:
        return jnp.take(table, ids, axis=0)
    rows, channels = division.compute[0], division.storage[1]
    assert not division.storage[0], "rows of a table are divided by compute axes alone"
    for kept in range(len(channels), 0, -1):
        # The last axes, as few as make enough channels; none where that takes all of them.
        if table.shape[1] * parallel.device_count(channels[kept:]) >= _LEAST_CHANNELS:
            table, channels = parallel.join(table, channels[kept:], 1), channels[:kept]
            break
    # Senders' axes come first, in the order of `asking`: [n, m, …, B, S].
    asking = tuple(name for name in channels if name in parallel.token_axes())
    for name in reversed(asking):
        ids = jax.lax.all_gather(ids, name)
    if rows:
        ids = ids - parallel.index(rows) * table.shape[0]
        is_here = (ids >= 0) & (ids < table.shape[0])
        out = jnp.where(is_here[..., None], jnp.take(table, jnp.where(is_here, ids, 0), axis=0), 0)
    else:
        out = jnp.take(table, ids, axis=0)
    for name in reversed(channels):
        if name in asking:
            place = asking.index(name)
            out = jax.lax.all_to_all(out, name, split_axis=place, concat_axis=out.ndim - 1, tiled=True)
        else:
            out = jax.lax.all_gather(out, name, axis=out.ndim - 1, tiled=True)
    return parallel.add(out.reshape(*out.shape[len(asking) :]), rows)
