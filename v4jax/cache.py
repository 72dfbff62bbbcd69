"""Decode state as pytrees: window ring, compressed entries, index keys, and the compressors' open blocks.

Every array is indexed by sequence first; sequences of one batch may have different lengths. Rings hold the last W
tokens at slot = position mod W, so order inside a ring means nothing and nothing is ever shifted (architecture.md §8).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from v4jax.config import LayerSpec, ModelConfig, SegmentSpec, layer_plan, mtp_plan, plan_segments
from v4jax.dtypes import DTypePolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorState:
    """Uncompressed rows of the open block (and, for overlapping windows, of the one before), float32.

    A ring over the last `slots` positions; a gate of −inf marks a row that no token has filled.
    """

    kv: jax.Array
    gate: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer remembers of each sequence. Fields a layer kind does not need are None."""

    window: jax.Array
    """[B, W, H]: rotated keys (= values) of the last W tokens."""
    entries: jax.Array | None = None
    """[B, P, H]: compressed entries in order."""
    state: CompressorState | None = None
    index_keys: jax.Array | None = None
    """[B, P, index H]: the indexer's entries."""
    index_state: CompressorState | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MTPCache:
    """State of an MTP block: its window, and the streams of the last token, whose successor was not yet known."""

    layer: LayerCache
    streams: jax.Array
    """[B, C, D]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Decode state of a batch: one tuple of `LayerCache` per segment (leading repeats axis where stacked)."""

    segments: tuple[tuple[LayerCache, ...], ...]
    mtp: tuple[MTPCache, ...]
    length: jax.Array
    """int32 [B]: tokens seen by each sequence."""
    max_length: int = dataclasses.field(metadata={"static": True})


def init_cache(config: ModelConfig, batch: int, max_length: int, policy: DTypePolicy, *, stacked: bool = True) -> Cache:
    """Empty state for `batch` sequences of at most `max_length` tokens.

    Args:
      stacked: one array per segment position, as the stacked model needs; else one per layer.
    """
    plan = layer_plan(config)
    segments = plan_segments(plan) if stacked else tuple(SegmentSpec((spec,), 1) for spec in plan)

    def layer(spec: LayerSpec, repeats: int | None) -> LayerCache:
        cache = _init_layer(config, spec, batch, max_length, policy)
        if repeats is None:
            return cache
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)).copy(), cache)

    streams = jnp.zeros((batch, config.hc_mult, config.hidden_size), policy.compute)
    return Cache(
        segments=tuple(
            tuple(layer(spec, segment.repeats if stacked else None) for spec in segment.unit) for segment in segments
        ),
        mtp=tuple(MTPCache(layer(spec, None), streams) for spec in mtp_plan(config)),
        length=jnp.zeros(batch, jnp.int32),
        max_length=max_length,
    )


def _init_layer(config: ModelConfig, spec: LayerSpec, batch: int, max_length: int, policy: DTypePolicy) -> LayerCache:
    window = jnp.zeros((batch, config.sliding_window, config.head_dim), policy.compute)
    if not spec.ratio:
        return LayerCache(window)
    overlap = 2 if spec.is_overlapped else 1
    # One entry more than can be complete: a whole spare window never makes an array empty.
    count = max_length // spec.ratio + 1

    def state(width: int) -> CompressorState:
        shape = (batch, overlap * spec.ratio, overlap * width)
        return CompressorState(jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32))

    entries = jnp.zeros((batch, count, config.head_dim), policy.compute)
    if not spec.has_indexer:
        return LayerCache(window, entries, state(config.head_dim))
    index_keys = jnp.zeros((batch, count, config.index_head_dim), policy.compute)
    return LayerCache(window, entries, state(config.head_dim), index_keys, state(config.index_head_dim))


# ---- rings -----------------------------------------------------------------------------------------------------------
def ring_positions(end: Int[Array, " B"], slots: int) -> Int[Array, "B W"]:
    """Position that each slot holds once `end` tokens were seen; negative where none was."""
    slot = jnp.arange(slots)[None]
    return end[:, None] - 1 - jnp.mod(end[:, None] - 1 - slot, slots)


def ring_rows(
    ring: Shaped[Array, "B W *F"], new: Shaped[Array, "B S *F"], start: Int[Array, " B"], positions: Int[Array, "B T"]
) -> Shaped[Array, "B T *F"]:
    """Rows by position, from the ring (positions before `start`) or from the `new` rows that begin at `start`.

    Positions that neither holds give some row; the caller masks them.
    """
    slots = ring.shape[1]
    offset = positions - start[:, None]
    index = jnp.where(offset < 0, jnp.mod(positions, slots), slots + jnp.clip(offset, 0, new.shape[1] - 1))
    rows = jnp.concatenate([ring, new.astype(ring.dtype)], axis=1)
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *[1] * (ring.ndim - 2)), axis=1)


def ring_extend(
    ring: Shaped[Array, "B W *F"], new: Shaped[Array, "B S *F"], start: Int[Array, " B"], end: Int[Array, " B"]
) -> Shaped[Array, "B W *F"]:
    """The ring after the rows `new`, of positions `start` to `end`, were seen."""
    positions = ring_positions(end, ring.shape[1])
    rows = ring_rows(ring, new, start, positions)
    keep = (positions < start[:, None]).reshape(*positions.shape, *[1] * (ring.ndim - 2))
    return jnp.where(keep, ring, rows)


def ring_put(ring: Shaped[Array, "B W *F"], row: Shaped[Array, "B *F"], position: Int[Array, " B"]) -> Any:
    """The ring after one token at `position`, in place where the ring is donated."""
    batch = jnp.arange(ring.shape[0])
    slot = jnp.mod(position, ring.shape[1])
    return ring.at[batch, slot].set(row.astype(ring.dtype), unique_indices=True, indices_are_sorted=True)


def put_rows(
    array: Shaped[Array, "B P *F"], rows: Shaped[Array, "B N *F"], index: Int[Array, "B N"], valid: Bool[Array, "B N"]
) -> Shaped[Array, "B P *F"]:
    """Writes the valid rows at their indices."""
    batch = jnp.arange(array.shape[0])[:, None]
    return array.at[batch, jnp.where(valid, index, array.shape[1])].set(rows.astype(array.dtype), mode="drop")
