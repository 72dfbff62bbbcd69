"""Decode without the kernels: one layer of the stacked caches, counts as masks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.sparse_attention.reference import attend_partial


def of_one_layer(
    function: Callable[..., jax.Array], q: jax.Array, ring: jax.Array, ring_count: jax.Array, sink: jax.Array,
    entries: jax.Array | None, entry_count: jax.Array | None, selection: jax.Array | None, *, layer: jax.Array,
    scale: float, is_partial: bool, block_sizes: Any,
) -> Any:  # fmt: skip
    """`function` (the reference's form of arguments) on one layer; partial results need whole scores."""
    del block_sizes  # of the kernels
    ring = jax.lax.dynamic_index_in_dim(ring, layer, 0, keepdims=False)
    near = jnp.arange(ring.shape[1]) < ring_count[:, None]
    visible = None
    if entries is not None:
        assert entry_count is not None
        slots = entries.shape[1:3]
        entries = jax.lax.dynamic_index_in_dim(entries, layer, 0, keepdims=False).reshape(*slots, -1)
        visible = jnp.arange(slots[1]) < entry_count[:, None]
    if not is_partial:
        return function(q, ring, near, sink, entries, visible, selection, scale=scale)
    if entries is None or visible is None:
        return attend_partial(q, ring, near, scale)
    if selection is not None:
        rows = jnp.maximum(selection, 0)
        visible = jnp.take_along_axis(visible, rows, axis=1) & (selection >= 0)
        entries = jnp.take_along_axis(entries, rows[..., None], axis=1)
    return attend_partial(
        q, jnp.concatenate([ring, entries], axis=1), jnp.concatenate([near, visible], axis=1), scale
    )  # fmt: skip
