"""The k-th largest of score rows in VMEM, by bisection on the ordered bit pattern of the scores.

16 counts for scores rounded to bfloat16, 32 for float32; nothing is sorted.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.index_topk.kernel_scores import NEG_INF, Rows, load, reached
from kernels_pallas.tpu import LANES


def level_scratch(spec: Rows) -> list[Any]:
    """Scratch of `find_threshold`: each query's threshold, and room for ties at it."""
    return [pltpu.VMEM((spec.rows, LANES), jnp.dtype(spec.dtype)), pltpu.VMEM((spec.rows, LANES), jnp.float32)]


def _value_of(pattern: jax.Array, is_bfloat16: bool) -> jax.Array:
    """The float32 whose place among all floats is `pattern` (negative floats run backwards)."""
    if is_bfloat16:
        return jax.lax.bitcast_convert_type((pattern ^ ((pattern >> 31) & 0x7FFF)) << 16, jnp.float32)
    return jax.lax.bitcast_convert_type(pattern ^ ((pattern >> 31) & 0x7FFFFFFF), jnp.float32)


def _count(scores: Any, spec: Rows, row: Any, first: Any, end: Any, threshold: jax.Array) -> Float[Array, "R 1"]:
    """How many scores of each row of a block reach its threshold, over the groups first ≤ g < end."""
    one, zero = jnp.ones((), spec.dtype), jnp.zeros((), spec.dtype)

    def step(span: Any, count: jax.Array) -> jax.Array:
        # A lane counts at most 4 GROUP / 128 = 128 here, which bfloat16 holds exactly. Two sums, for an add's latency.
        parts = [jnp.zeros((spec.block, LANES), spec.dtype)] * 2
        x = load(scores, spec, row, spec.block, span * spec.span, spec.span)
        for at in range(0, spec.span, LANES):
            parts = [parts[1], parts[0] + jnp.where(x[:, at : at + LANES] >= threshold, one, zero)]
        return count + (parts[0] + parts[1]).astype(jnp.float32)

    spans = reached(first, end, spec.group, spec.span)
    count = jax.lax.fori_loop(*spans, step, jnp.zeros((spec.block, LANES), jnp.float32))
    return jnp.sum(count, axis=1, keepdims=True)


def find_threshold(scores: Any, threshold: Any, room: Any, spec: Rows, first: Any, end: Any) -> None:
    """Writes each row's k-th largest value and how many of the scores equal to it are chosen.

    Args:
      scores: reference [rows, width].
      threshold: reference [rows, 128], every lane alike; −inf where fewer than k scores are finite.
      room: float32 reference [rows, 128].
      first, end: only the groups first ≤ g < end are read.
    """
    bits = 16 if spec.is_bfloat16 else 32
    infinity = 0x7F80 if spec.is_bfloat16 else 0x7F800000

    def one_block(block: Any, _: None) -> None:
        row = pl.multiple_of(block * spec.block, spec.block)

        def halve(_: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            low, high, above = state
            middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
            value = _value_of(middle, spec.is_bfloat16).astype(spec.dtype)
            count = jnp.broadcast_to(_count(scores, spec, row, first, end, value), middle.shape)
            enough = count >= spec.topk
            low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)
            return low, high, jnp.where(enough, above, count)

        shape = (spec.block, LANES)
        start = (
            jnp.full(shape, -infinity - 1, jnp.int32), jnp.full(shape, infinity, jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )  # fmt: skip
        low, _, above = jax.lax.fori_loop(0, bits, halve, start)
        value = _value_of(low, spec.is_bfloat16)
        threshold[pl.ds(row, spec.block), :] = value.astype(spec.dtype)
        # What is not visible is −inf and never chosen, even if fewer than k are left.
        room[pl.ds(row, spec.block), :] = jnp.where(value > NEG_INF, spec.topk - above, 0.0)

    jax.lax.fori_loop(0, spec.rows // spec.block, one_block, None)
