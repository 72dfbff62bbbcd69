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

Leaf = Any
"""An array; or, in a tree that describes a cache, its `ShapeDtypeStruct`, spec or sharding."""

_LANES, _TILE = 128, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorState:
    """Uncompressed rows of the open block (and, for overlapping windows, of the one before), float32.

    A ring over the last `slots` positions; a gate of −inf marks a row that no token has filled.
    """

    kv: Leaf
    gate: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer remembers of each sequence. Fields a layer kind does not need are None."""

    window: Leaf
    """[B, W, H]: rotated keys (= values) of the last W tokens."""
    entries: Leaf = None
    """[B, P, H]: compressed entries in order. Where single ones are selected and H is a multiple of 128, they are
    [B, P, H / 128, 128], which lies in a TPU's memory row by row."""
    state: CompressorState | None = None
    index_keys: Leaf = None
    """[B, P, index H]: the indexer's entries."""
    index_state: CompressorState | None = None
    layer: Leaf = None
    """int32 scalar in a view of one layer of a stack (`layer_view`), whose arrays are still the stack's."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MTPCache:
    """State of an MTP block: its window, and the streams of the last token, whose successor was not yet known."""

    layer: LayerCache
    streams: Leaf
    """[B, C, D]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Decode state of a batch: one tuple of `LayerCache` per segment (leading repeats axis where stacked)."""

    segments: tuple[tuple[LayerCache, ...], ...]
    mtp: tuple[MTPCache, ...]
    length: Leaf
    """int32 [B]: tokens seen by each sequence."""
    max_length: int = dataclasses.field(metadata={"static": True})


def init_cache(
    config: ModelConfig,
    batch: int,
    max_length: int,
    policy: DTypePolicy,
    *,
    stacked: bool = True,
    entry_multiple: int = 1,
) -> Cache:
    """Empty state for `batch` sequences of at most `max_length` tokens.

    Args:
      stacked: one array per segment position, as the stacked model needs; else one per layer.
      entry_multiple: what the number of entries of each layer is rounded up to a multiple of.
    """
    plan = layer_plan(config)
    segments = plan_segments(plan) if stacked else tuple(SegmentSpec((spec,), 1) for spec in plan)

    def layer(spec: LayerSpec, repeats: int | None) -> LayerCache:
        cache = _init_layer(config, spec, batch, max_length, policy, entry_multiple)
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


def _init_layer(
    config: ModelConfig, spec: LayerSpec, batch: int, max_length: int, policy: DTypePolicy, entry_multiple: int
) -> LayerCache:
    window = jnp.zeros((batch, config.sliding_window, config.head_dim), policy.compute)
    if not spec.ratio:
        return LayerCache(window)
    overlap = 2 if spec.is_overlapped else 1
    # One entry more than can be complete: a whole spare window never makes an array empty. Then up to whole tiles of
    # every device: a TPU would lay out another count with the sequences innermost, and copy it for every kernel.
    step = entry_multiple * _TILE
    count = -(-(max_length // spec.ratio + 1) // step) * step

    def state(width: int) -> CompressorState:
        shape = (batch, overlap * spec.ratio, overlap * width)
        return CompressorState(jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32))

    width = config.head_dim
    row = (width // _LANES, _LANES) if spec.has_indexer and width % _LANES == 0 else (width,)
    entries = jnp.zeros((batch, count, *row), policy.compute)
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


def ring_put(
    ring: Shaped[Array, "..."], row: Shaped[Array, "B *F"], position: Int[Array, " B"],
    layer: Int[Array, ""] | None = None,
) -> Any:  # fmt: skip
    """The ring [B, W, …] (with `layer` one of [L, B, W, …]) after one token at `position`, in place where donated."""
    lead = () if layer is None else (layer,)
    batch = jnp.arange(ring.shape[len(lead)])
    slot = jnp.mod(position, ring.shape[len(lead) + 1])
    place = ring.at[(*lead, batch, slot)]
    return place.set(row.astype(ring.dtype), unique_indices=True, indices_are_sorted=True)


def put_rows(
    array: Shaped[Array, "..."], rows: Shaped[Array, "B N *F"], index: Int[Array, "B N"], valid: Bool[Array, "B N"],
    layer: Int[Array, ""] | None = None,
) -> Shaped[Array, "..."]:  # fmt: skip
    """Writes the valid rows at their indices into [B, P, …] (with `layer` one of [L, B, P, …]), in its row shape."""
    lead = () if layer is None else (layer,)
    batch = jnp.arange(rows.shape[0])[:, None]
    size, row = array.shape[len(lead) + 1], array.shape[len(lead) + 2 :]
    rows = rows.astype(array.dtype).reshape(*rows.shape[:2], *row)
    return array.at[(*lead, batch, jnp.where(valid, index, size))].set(rows, mode="drop")


# ---- one layer of a stack --------------------------------------------------------------------------------------------
def layer_view(stacked: LayerCache, index: Int[Array, ""]) -> LayerCache:
    """One layer of a stack of caches, for one step of decoding: the whole stack, with the layer's index beside it.

    A step writes one row per sequence into each array and reads what it needs out of it: no layer is ever copied.
    """
    return dataclasses.replace(stacked, layer=index)


def put_layer(view: LayerCache) -> LayerCache:
    """The stack after a `layer_view` of it has changed."""
    return dataclasses.replace(view, layer=None)
