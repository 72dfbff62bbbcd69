"""`index_topk` and `index_topk_decode` on a mesh: queries and sequences are divided, heads and keys are not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.index_topk import api

Axes = str | tuple[str, ...] | None


def _check(mesh: Mesh, axes: Axes, length: int, what: str) -> None:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    parts = 1
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"index_topk: got mesh axis {name!r} for {what}, the mesh has {', '.join(mesh.shape)}")
        parts *= mesh.shape[name]
    if length % parts:
        raise ValueError(
            f"index_topk: got {length} {what} over {parts} devices ({', '.join(names)}), "
            f"need a multiple of {parts}; pad them"
        )


def index_topk(mesh: Mesh, *, batch: Axes = None, queries: Axes = None) -> Callable[..., Any]:
    """`api.index_topk` with its batch rows and queries divided over mesh axes.

    A query needs the scores of all its heads and of all keys before it can choose. Heads that arrive divided (over a
    tensor axis) are therefore gathered: 16 KiB per query, where a sum of partial scores would be 4 P bytes. Give that
    axis to `queries` instead, so that every device selects for its share. Keys divided over a context axis are
    gathered as well.

    Args:
      batch, queries: mesh axes over which B and S are divided.

    Returns:
      A function of the arguments of `api.index_topk`, to be called with whole arrays.

    Raises:
      ValueError: (from that function) an axis that the mesh lacks, or a size that it does not divide.
    """

    def call(q: jax.Array, weights: jax.Array, keys: jax.Array, *rest: jax.Array, **options: Any) -> jax.Array:
        _check(mesh, batch, q.shape[0], "rows")
        _check(mesh, queries, q.shape[1], "queries")
        by_query, by_row = P(batch, queries), P(batch)
        specs = (by_query, by_query, by_row, by_query, by_query, by_row, by_row, by_row)[: 3 + len(rest)]
        function = functools.partial(api.index_topk, **options)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=by_query, check_vma=False)
        return mapped(q, weights, keys, *rest)

    return call


def index_topk_decode(mesh: Mesh, *, batch: Axes) -> Callable[..., Any]:
    """`api.index_topk_decode` with its sequences divided over mesh axes; heads and entries are gathered.

    Returns:
      A function of the arguments of `api.index_topk_decode`.

    Raises:
      ValueError: (from that function) an axis that the mesh lacks, or a size that it does not divide.
    """

    def call(
        q: jax.Array,
        weights: jax.Array,
        keys: jax.Array,
        visible: jax.Array,
        key_scale: jax.Array | None = None,
        layer: jax.Array | int | None = None,
        **options: Any,
    ) -> jax.Array:
        _check(mesh, batch, q.shape[0], "sequences")
        caches = P(batch) if layer is None else P(None, batch)

        def local(
            q: jax.Array, weights: jax.Array, visible: jax.Array, keys: jax.Array, key_scale: jax.Array | None = None
        ) -> jax.Array:
            return api.index_topk_decode(q, weights, keys, visible, key_scale, layer, **options)

        given = (keys,) if key_scale is None else (keys, key_scale)
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(P(batch),) * 3 + (caches,) * len(given), out_specs=P(batch), check_vma=False
        )
        return mapped(q, weights, visible, *given)

    return call
