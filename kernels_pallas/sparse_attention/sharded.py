"""`sparse_attention` on a mesh: batch and heads divided, keys and entries whole on every device of the head axes."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import Implementation
from kernels_pallas.sparse_attention.api import sparse_attention

Axes = str | Sequence[str] | None


def sharded_sparse_attention(
    q: Float[Array, "B S N H"],
    keys: Float[Array, "B WS H"],
    sink: Float[Array, " N"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    key_segment: Int[Array, "B WS"],
    entries: Float[Array, "B P H"] | None = None,
    entry_end: Int[Array, "B P"] | None = None,
    entry_segment: Int[Array, "B P"] | None = None,
    selection: Int[Array, "B S K"] | None = None,
    selection_mask: Int[Array, "B S D"] | None = None,
    *,
    mesh: Mesh,
    batch_axes: Axes = None,
    head_axes: Axes = None,
    window: int,
    scale: float,
    sound_topk: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B S N H"]:
    """`sparse_attention` inside `shard_map`; gradients to keys and entries are summed over the head axes.

    Args:
      batch_axes, head_axes: mesh axes that divide B and N; None leaves a dimension whole.

    Raises:
      ValueError: axes that the mesh lacks or that do not divide, and as `sparse_attention`.
    """
    for name, axes, size in (("batch", batch_axes, q.shape[0]), ("head", head_axes, q.shape[2])):
        parts = 1
        for axis in _listed(axes):
            if axis not in mesh.shape:
                raise ValueError(f"{name} axes: got {axis!r}, the mesh has {', '.join(mesh.shape)}")
            parts *= mesh.shape[axis]
        if size % parts:
            raise ValueError(f"{name} axes: {parts} devices do not divide {size}; use fewer or other axes")
    batch, heads = (tuple(_listed(axes)) or None for axes in (batch_axes, head_axes))
    row = PartitionSpec(batch)
    arrays: dict[str, Any] = dict(
        q=q, keys=keys, sink=sink, q_position=q_position, q_segment=q_segment, key_segment=key_segment,
        entries=entries, entry_end=entry_end, entry_segment=entry_segment, selection=selection,
        selection_mask=selection_mask,
    )  # fmt: skip
    arrays = {name: array for name, array in arrays.items() if array is not None}
    specs = {name: row for name in arrays}
    specs |= dict(q=PartitionSpec(batch, None, heads), sink=PartitionSpec(heads))

    def local(arrays: dict[str, Any]) -> jax.Array:
        return sparse_attention(
            **arrays, window=window, scale=scale, sound_topk=sound_topk, implementation=implementation
        )

    # A kernel's results carry no record of what varies over which axis, so the check of it has to be off.
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs["q"], check_vma=False)(arrays)


def _listed(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
