"""Rows of scores that lie in VMEM: how they are held, written and masked.

Rows are queries, columns are keys, −inf marks what a query may not see.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.tpu import LANES, SUBLANES, cdiv, round_up

TILE = 256
"""Keys per triangular product."""
GROUP = 16 * TILE
"""Keys whose bits fill a row of lanes: one step of the passes over the scores."""
NEG_INF = float("-inf")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The scores of one tile of queries, in VMEM."""

    rows: int
    """Queries, a multiple of 16."""
    width: int
    """Keys, padded: a multiple of `TILE`, and of `GROUP` beyond it."""
    topk: int
    is_bfloat16: bool
    """Whether scores are rounded to bfloat16: half as many counts."""
    dtype: DTypeLike
    """How they are held: bfloat16 where the chip compares it natively, else float32."""

    @property
    def group(self) -> int:
        """Keys per step."""
        return min(GROUP, self.width)

    @property
    def groups(self) -> int:
        """Steps over all keys."""
        return self.width // self.group

    @property
    def span(self) -> int:
        """Keys per step of a count: more groups at once where there are few queries, to fill the pipeline."""
        span = self.group
        while self.width % (2 * span) == 0 and self.block * span < 64 * GROUP:
            span *= 2
        return span

    @property
    def block(self) -> int:
        """Queries per step."""
        return next(block for block in (256, 128, 64, 48, 32, 16) if self.rows % block == 0)


def padded_width(keys: int) -> int:
    """Columns of the scores of so many keys."""
    return round_up(keys, TILE if keys <= GROUP else GROUP)


def scratch(spec: Rows) -> Any:
    """Scratch for the scores. Two bfloat16 rows lie in one int32 row: as a bfloat16 array, tiles would be half full."""
    if spec.dtype == jnp.bfloat16:
        return pltpu.VMEM((spec.rows // 2, spec.width), jnp.int32)
    return pltpu.VMEM((spec.rows, spec.width), jnp.float32)


def load(scores: Any, spec: Rows, row: Any, rows: int, column: Any, columns: int) -> Float[Array, "R C"]:
    """A block of the scores; row and rows are multiples of 16, columns of 128.

    Args:
      scores: reference as `scratch` makes it, or of floats in their own layout.
    """
    at = pl.ds(column if isinstance(column, int) else pl.multiple_of(column, LANES), columns)
    if scores.dtype == jnp.int32:
        words = scores[pl.ds(pl.multiple_of(row // 2, SUBLANES), rows // 2), at]
        return pltpu.bitcast(words, jnp.bfloat16)
    return scores[pl.ds(pl.multiple_of(row, SUBLANES), rows), at].astype(spec.dtype)


def store(scores: Any, spec: Rows, row: Any, column: Any, values: Float[Array, "R C"]) -> None:
    """Writes a block of scores, rounded as `spec` says; the sizes as in `load`."""
    rows, columns = values.shape
    at = pl.ds(column if isinstance(column, int) else pl.multiple_of(column, LANES), columns)
    if spec.dtype == jnp.bfloat16:
        words = pltpu.bitcast(values.astype(jnp.bfloat16), jnp.int32)
        scores[pl.ds(pl.multiple_of(row // 2, SUBLANES), rows // 2), at] = words
    else:
        values = _rounded(values) if spec.is_bfloat16 else values
        scores[pl.ds(pl.multiple_of(row, SUBLANES), rows), at] = values


def _rounded(values: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """The nearest bfloat16 in float32, in integers: a compiler may drop a conversion there and back."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def clear(scores: Any, spec: Rows, column: Any, columns: int) -> None:
    """Marks keys as invisible to all queries."""

    def one_pair(pair: Any, _: None) -> None:
        store(scores, spec, pair * 16, column, jnp.full((16, columns), NEG_INF, jnp.float32))

    jax.lax.fori_loop(0, spec.rows // 16, one_pair, None)


def clear_padding(scores: Any, spec: Rows, keys: int) -> None:
    """Marks the columns from `keys` on as invisible."""
    if keys < spec.width:
        clear(scores, spec, keys, spec.width - keys)


def mask_scores(
    scores: Float[Array, "R C"], entries: Int[Array, "2 C"], queries: Int[Array, "R 2"]
) -> Float[Array, "R C"]:
    """−inf where an entry (end, segment) is not visible to a query (position, segment); −0 becomes +0."""
    is_visible = (entries[0:1] <= queries[:, 0:1]) & (entries[1:2] == queries[:, 1:2])
    return mask_where(is_visible, scores)


def mask_where(is_visible: Bool[Array, "R C"], scores: Float[Array, "R C"]) -> Float[Array, "R C"]:
    """−inf where not visible; −0 becomes +0."""
    return jnp.where(is_visible, jnp.where(scores == 0.0, 0.0, scores), NEG_INF)


def reached(first: Any, end: Any, step: int, unit: int) -> tuple[Any, Any]:
    """Units of `unit` keys that first ≤ c < end, units of `step` keys, reach into."""
    if isinstance(end, int):
        return first * step // unit, cdiv(end * step, unit)
    return jax.lax.div(first * step, unit), jax.lax.div(end * step + (unit - 1), unit)


def groups_of(spec: Rows, first: Any, end: Any, step: int) -> tuple[Any, Any]:
    """The groups that the chunks first ≤ c < end of `step` keys reach into."""
    return reached(first, end, step, spec.group)
