"""Decode without the kernels: one layer of the stacked caches, counts as masks, selected rows out of the stack."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.sparse_attention.reference import attend_partial


def of_one_layer(
    function: Callable[..., jax.Array], gather_from: int | None, q: jax.Array, ring: jax.Array, ring_count: jax.Array,
    sink: jax.Array, entries: jax.Array | None, entry_count: jax.Array | None, selection: jax.Array | None, *,
    layer: jax.Array, scale: float, is_partial: bool, block_sizes: Any,
) -> Any:  # fmt: skip
    """`function` (the reference's form of arguments) on one layer.

    Selected rows are gathered out of the stack, so that no layer of it is ever copied, where there are more than
    `gather_from` entries per selected one (None: never), and for partial results, which need whole scores.
    """
    del block_sizes  # of the kernels
    ring = jax.lax.dynamic_index_in_dim(ring, layer, 0, keepdims=False)
    near = jnp.arange(ring.shape[1]) < ring_count[:, None]
    visible = None
    if entries is not None:
        assert entry_count is not None
        batch, count = entries.shape[1:3]
        is_sparse = selection is not None and gather_from is not None and count > gather_from * selection.shape[-1]
        if selection is not None and (is_partial or is_sparse):
            rows = jnp.maximum(selection, 0)
            visible = (selection >= 0) & (rows < entry_count[:, None])
            taken = entries.at[layer, jnp.arange(batch)[:, None], rows].get(mode="clip")
            selection = None
        else:
            taken = jax.lax.dynamic_index_in_dim(entries, layer, 0, keepdims=False)
            visible = jnp.arange(count) < entry_count[:, None]
        entries = taken.reshape(batch, taken.shape[1], -1)
    if not is_partial:
        return function(q, ring, near, sink, entries, visible, selection, scale=scale)
    if entries is None or visible is None:
        return attend_partial(q, ring, near, scale)
    return attend_partial(
        q, jnp.concatenate([ring, entries], axis=1), jnp.concatenate([near, visible], axis=1), scale
    )  # fmt: skip
