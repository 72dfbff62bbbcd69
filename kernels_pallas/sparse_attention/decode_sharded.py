"""Decode on a mesh: sequences and heads each on their devices, and a cache whose entries several devices share."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas.sparse_attention.api import sparse_attention_decode

Axes = str | tuple[str, ...] | None


def merge_partials(
    out: Float[Array, "B N H"],
    top: Float[Array, "B N"],
    total: Float[Array, "B N"],
    sink: Float[Array, " N"],
    axis: Axes,
) -> Float[Array, "B N H"]:
    """The softmax over the keys of all devices of a mesh axis and the sink, from each one's (o, m, l); float32."""
    highest = jnp.maximum(jax.lax.pmax(top, axis), sink)
    share = jnp.exp(top - highest)
    total = jax.lax.psum(total * share, axis) + jnp.exp(sink - highest)
    return jax.lax.psum(out * share[..., None], axis) / total[..., None]


def sharded_sparse_attention_decode(
    mesh: Mesh,
    q: Float[Array, "B N H"],
    ring: Float[Array, "*L B W H"],
    ring_count: Int[Array, " B"],
    sink: Float[Array, " N"],
    entries: Float[Array, "..."] | None = None,
    entry_count: Int[Array, " B"] | None = None,
    selection: Int[Array, "B K"] | None = None,
    *,
    batch_axes: Axes = None,
    head_axes: Axes = None,
    sequence_axes: Axes = None,
    layer: Int[Array, ""] | int | None = None,
    **options: Any,
) -> Float[Array, "B N H"]:
    """`sparse_attention_decode` under `shard_map`.

    Args:
      batch_axes: mesh axes over which sequences are split, with their caches.
      head_axes: over which heads are split; every such device reads the caches of its sequences.
      sequence_axes: over which the entries of each sequence are split, P in equal consecutive parts. Each device
        attends to those of the selection that it holds (the first one to the window too), and partial softmaxes are
        joined exactly.
      options: `scale`, `block_sizes`, `implementation`.
    """
    lead = () if layer is None else (None,)
    per_sequence = P(batch_axes)
    tail = (None,) * (0 if entries is None else entries.ndim - len(lead) - 2)
    specs = (
        P(batch_axes, head_axes), P(*lead, batch_axes), per_sequence, P(head_axes),
        P(*lead, batch_axes, sequence_axes, *tail), per_sequence, per_sequence, P(),
    )  # fmt: skip
    arguments = (
        q,
        ring,
        ring_count,
        sink,
        entries,
        entry_count,
        selection,
        jnp.asarray(0 if layer is None else layer, jnp.int32),
    )
    is_given = [argument is not None for argument in arguments]
    has_layer = layer is not None

    def local(*given: jax.Array) -> Any:
        remaining: Iterator[Any] = iter(given)
        here: list[Any] = [next(remaining) if there else None for there in is_given]
        q, ring, ring_count, sink, entries, entry_count, selection, layer = here
        call = functools.partial(sparse_attention_decode, layer=layer if has_layer else None, **options)
        if sequence_axes is None or entries is None:
            return call(q, ring, ring_count, sink, entries, entry_count, selection)
        device, size = jax.lax.axis_index(sequence_axes), entries.shape[len(lead) + 1]
        first = device * size
        entry_count = jnp.clip(entry_count - first, 0, size)
        ring_count = jnp.where(device == 0, ring_count, 0)
        if selection is not None:
            selection = jnp.where((selection >= first) & (selection < first + size), selection - first, -1)
        out, top, total = call(q, ring, ring_count, sink, entries, entry_count, selection, is_partial=True)
        return merge_partials(out, top, total, sink, sequence_axes).astype(q.dtype)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(spec for spec, there in zip(specs, is_given, strict=True) if there),
        out_specs=P(batch_axes, head_axes),
        check_vma=False,  # the kernels say nothing of how their results vary over the mesh
    )(*(argument for argument in arguments if argument is not None))
