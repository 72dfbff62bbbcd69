"""What the decode kernels share: products, and one softmax over pieces of keys whose statistics fill whole registers.

Maxima and sums are kept replicated over the 128 lanes, since broadcasting one column costs more than the arithmetic.
Exponentials are powers of 2: log2(e) is part of the factor that scales the scores.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import LANES

LOG2_E = math.log2(math.e)
_NOTHING = -1e30
"""Maximum where no key is seen: finite, so that no −inf is subtracted from another."""


def dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Product in float32, at full precision for float32 operands."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def in_one_block(body: Callable[[], None]) -> None:
    """Runs a body as a block of code of its own, whose operations the compiler does not mix with those around it.

    Products with keys as they lie and with keys transposed load the matrix unit in different ways, and it stalls when
    they alternate (2.7 times the cycles for windows alone): scores come first, in one block, then the sums of values.
    """
    pl.when(pl.program_id(0) >= 0)(body)


def clear_from(keys: jax.Array, count: jax.Array) -> jax.Array:
    """Keys [K, H] with zeros from row `count` on: a weight of 0 does not hide a NaN in the second product.

    Two rows of bf16 share a word, so that one mask of words serves all columns.
    """
    if keys.dtype.itemsize == 4 or keys.shape[0] % 2:
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0) < count, keys, 0)
    row = 2 * jax.lax.broadcasted_iota(jnp.int32, (keys.shape[0] // 2, LANES), 0)
    mask = jnp.where(row + 1 < count, -1, jnp.where(row < count, 0xFFFF, 0))
    return pltpu.bitcast(pltpu.bitcast(keys, jnp.int32) & spread(mask, keys.shape[1]), keys.dtype)


def spread(statistic: jax.Array, width: int) -> jax.Array:
    """[N, 128] of equal lanes → [N, width]."""
    if width % LANES == 0:
        return jnp.concatenate([statistic] * (width // LANES), axis=1) if width > LANES else statistic
    return jnp.broadcast_to(statistic[:, :1], (statistic.shape[0], width))


def _over_lanes(reduction: str, pieces: list[jax.Array]) -> jax.Array:
    """Maximum or sum over the columns of all pieces [N, ·] → [N, 128] of equal lanes."""
    join, reduce = (jnp.maximum, jnp.max) if reduction == "max" else (jnp.add, jnp.sum)
    registers, columns = None, None
    for piece in pieces:
        whole = piece.shape[1] // LANES if piece.shape[1] % LANES == 0 else 0
        for i in range(whole):
            part = piece[:, i * LANES : (i + 1) * LANES]
            registers = part if registers is None else join(registers, part)
        if not whole:
            column = reduce(piece, axis=1, keepdims=True)
            columns = column if columns is None else join(columns, column)
    if registers is not None:
        column = reduce(registers, axis=1, keepdims=True)
        columns = column if columns is None else join(columns, column)
    assert columns is not None
    return jnp.broadcast_to(columns, (columns.shape[0], LANES))


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Unnormalised weights over pieces of keys, relative to a common maximum."""

    weights: list[jax.Array]
    """Float32 [N, keys] each: 2 ** (score · factor − top)."""
    top: jax.Array
    """[N, 128] of equal lanes, in powers of 2."""
    total: jax.Array
    """[N, 128] of equal lanes: sum of the weights, the sink's or the earlier pieces' included."""

    @classmethod
    def of(cls, scores: list[jax.Array], scale: float, top: jax.Array | None, total: jax.Array | None) -> "Softmax":
        """Over scores [N, keys] with −inf for keys not seen.

        Args:
          top, total: statistics so far, both [N, 128]: of earlier keys, or a sink's logit (in powers of 2) and 1. None
            where nothing precedes.
        """
        factor = scale * LOG2_E
        highest = _over_lanes("max", scores) * factor
        new = jnp.maximum(highest, _NOTHING if top is None else top)
        weights = [jnp.exp2(piece * factor - spread(new, piece.shape[1])) for piece in scores]
        added = _over_lanes("sum", weights)
        if top is not None:
            assert total is not None
            added = added + total * jnp.exp2(top - new)
        return cls(weights, new, added)


def output_shapes(shape: tuple[int, ...], dtype: jnp.dtype, is_partial: bool) -> list[jax.ShapeDtypeStruct]:
    """[B, N, H] of the result; for a partial one float32 sums, then maxima and totals [B, N, 128] of equal lanes."""
    if not is_partial:
        return [jax.ShapeDtypeStruct(shape, dtype)]
    statistics = jax.ShapeDtypeStruct((*shape[:2], LANES), jnp.float32)
    return [jax.ShapeDtypeStruct(shape, jnp.float32), statistics, statistics]


def write_outputs(outputs: tuple, row: int, out: jax.Array, top: jax.Array, total: jax.Array) -> None:
    """Fills row `row` of the output blocks: the normalised result, or its parts with natural maxima."""
    if len(outputs) == 1:
        outputs[0][row] = (out * spread(1.0 / total, out.shape[1])).astype(outputs[0].dtype)
    else:
        for block, value in zip(outputs, (out, top / LOG2_E, total), strict=True):
            block[row] = value
