"""Arranges operands for the TPU kernels and cuts their padded results to size."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Shaped

from kernels_pallas.index_topk import kernel, kernel_decode, kernel_select
from kernels_pallas.index_topk.block_sizes import SEQUENCES, Blocks, decode_blocks, prefill_blocks
from kernels_pallas.tpu import SUBLANES, cdiv, current_chip, round_up

_NEVER = jnp.iinfo(jnp.int32).max


def _pad(x: jax.Array, axis: int, length: int, value: int = 0) -> jax.Array:
    """`x` with `axis` grown to `length`, at no cost where it has that length."""
    if x.shape[axis] == length:
        return x
    widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _spans(queries: Int32[Array, "B S 2"], entries: Int32[Array, "B 2 P"], blocks: Blocks) -> Int32[Array, " spans"]:
    """First chunk that a tile of queries may see, and the one after the last, from the ranges that each covers."""
    batch = queries.shape[0]
    position, segment = jnp.moveaxis(queries.reshape(batch, -1, blocks.rows.rows, 2), -1, 0)
    end, owner = jnp.moveaxis(entries.reshape(batch, 2, blocks.chunks, blocks.keys), 1, 0)
    lowest = jnp.where(owner < 0, _NEVER, owner).min(-1)
    is_needed = (
        (end.min(-1)[:, None] <= position.max(-1)[..., None])
        & (lowest[:, None] <= segment.max(-1)[..., None])
        & (owner.max(-1)[:, None] >= segment.min(-1)[..., None])
    )
    after = blocks.chunks - jnp.argmax(is_needed[..., ::-1], axis=-1)
    span = jnp.stack([jnp.argmax(is_needed, axis=-1), jnp.where(is_needed.any(-1), after, 0)], axis=-1)
    return span.astype(jnp.int32).reshape(-1)


def index_topk(
    q: Float[Array, "B S N H"],
    weights: Float[Array, "B S N"],
    keys: Shaped[Array, "B P H"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    entry_end: Int[Array, "B P"],
    entry_segment: Int[Array, "B P"],
    key_scale: Float[Array, "B P"] | None = None,
    *,
    topk: int,
    output: Literal["list", "mask"] = "list",
    chip: str | None = None,
    skip: bool = True,
) -> Int[Array, "B S W"]:
    """See `api.index_topk`.

    Args:
      chip: a name of `tpu.CHIPS` whose blocks and formats are used; None means the device compiled for.
      skip: False scores chunks of keys that no query sees too, for cycle figures that do not depend on data.

    Raises:
      ValueError: the scores of 16 queries do not fit VMEM.
    """
    _, length, heads, width = q.shape
    count = keys.shape[1]
    slots = min(topk, count)
    target = current_chip(chip)
    blocks = prefill_blocks(target, length, heads, width, count, slots, q.dtype, keys.dtype, output)
    padded, total = round_up(length, blocks.rows.rows), blocks.chunks * blocks.keys
    queries = _pad(jnp.stack([q_position, q_segment], axis=-1).astype(jnp.int32), 1, padded, -3)
    entries = jnp.stack(
        [_pad(entry_end, 1, total, _NEVER), _pad(entry_segment, 1, total, -1)], axis=1
    ).astype(jnp.int32)  # fmt: skip
    found = kernel.select_prefill(
        _spans(queries, entries, blocks),
        _pad(q, 1, padded),
        _pad(weights.astype(jnp.float32), 1, padded),
        queries,
        keys,
        entries,
        None if key_scale is None else _pad(key_scale.astype(jnp.float32), 1, total)[:, None],
        blocks=blocks,
        output=output,
        chip=target,
        skip=skip,
    )
    return found[:, :length, : slots if output == "list" else cdiv(count, kernel_select.WORD)]


def index_topk_decode(
    q: Float[Array, "B N H"],
    weights: Float[Array, "B N"],
    keys: Shaped[Array, "*L B P H"],
    visible: Int[Array, " B"],
    key_scale: Float[Array, "*L B P"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    *,
    topk: int,
    chip: str | None = None,
    skip: bool = True,
) -> Int[Array, "B K"]:
    """See `api.index_topk_decode`; `chip` and `skip` as in `index_topk`."""
    batch, heads, width = q.shape
    if layer is None:
        keys, key_scale = keys[None], None if key_scale is None else key_scale[None]
    count = keys.shape[2]
    slots = min(topk, count)
    target = current_chip(chip)
    heads_padded, groups = round_up(heads, SUBLANES), cdiv(batch, SEQUENCES)
    blocks = decode_blocks(target, heads_padded, width, count, slots, q.dtype, keys.dtype)
    visible = jnp.clip(visible.astype(jnp.int32), 0, count)
    by_group = _pad(visible, 0, groups * SEQUENCES).reshape(groups, SEQUENCES).max(-1)
    spread = _pad(_pad(weights.astype(jnp.float32), 1, heads_padded), 0, groups * SEQUENCES)
    found = kernel_decode.select_decode(
        jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        (by_group + blocks.keys - 1) // blocks.keys,
        _pad(q, 1, heads_padded),
        spread.reshape(groups, SEQUENCES, heads_padded).swapaxes(1, 2),
        visible[:, None],
        keys,
        None if key_scale is None else key_scale.astype(jnp.float32),
        blocks=blocks,
        chip=target,
        skip=skip,
    )
    return found[:, :slots]
