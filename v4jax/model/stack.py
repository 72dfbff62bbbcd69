"""Segments of repeated layers: one generic scan, and the per-layer view of the same parameters.

Stacked, a segment holds one copy of its unit whose arrays have a leading `repeats` axis. Unstacked, every layer is a
segment of its own without that axis, which is what CPU and GPU decoding want: a scan would copy each layer's weights.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.cache import LayerCache
from v4jax.config import LayerSpec, ModelConfig, SegmentSpec, layer_plan, plan_segments
from v4jax.dtypes import DTypePolicy
from v4jax.model.inputs import Choices, LayerInputs
from v4jax.model.layer import DecoderLayer, LayerMetrics
from v4jax.model.params import Declare

UnitCaches = tuple[LayerCache, ...]


class Segment(nnx.Module):
    """`spec.unit` repeated `spec.repeats` times."""

    def __init__(self, spec: SegmentSpec, layers: Iterable[DecoderLayer], *, stacked: bool) -> None:
        if not stacked and spec.repeats != 1:
            raise ValueError(f"an unstacked segment repeats once, got {spec.repeats}")
        self.spec, self.stacked = spec, stacked
        self.layers = nnx.List(layers)

    def __call__(
        self,
        streams: jax.Array,
        inputs: LayerInputs,
        caches: UnitCaches | None = None,
        replay: tuple[Choices, ...] | None = None,
        *,
        record: bool = False,
        remat: bool = False,
    ) -> tuple[jax.Array, UnitCaches | None, list[LayerMetrics]]:
        """The streams after the segment, its caches, and per unit position the metrics with a leading repeats axis.

        `replay` is per layer in order and needs an unstacked segment.
        """
        run = functools.partial(_run_unit, record=record, remat=remat)
        if not self.stacked:
            streams, caches, metrics = run(list(self.layers), streams, inputs, caches, replay)
            return streams, caches, [jax.tree.map(lambda a: a[None], m) for m in metrics]
        if replay is not None:
            raise ValueError("replay needs the per-layer view of the model: call unstack() first")
        if self.spec.repeats == 1:
            first = [jax.tree.map(lambda a: a[0], layer) for layer in self.layers]
            one = None if caches is None else jax.tree.map(lambda a: a[0], caches)
            streams, one, metrics = run(first, streams, inputs, one, None)
            return streams, jax.tree.map(lambda a: a[None], one), [jax.tree.map(lambda a: a[None], m) for m in metrics]

        def body(carry: tuple[jax.Array, Any], xs: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], Any]:
            streams, caches = carry
            layers, index = xs
            # Caches ride in the carry and are read and written by slice: as xs and ys they would exist twice.
            one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False), caches)
            streams, one, metrics = run(layers, streams, inputs, one, None)
            caches = jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, index, 0), caches, one)
            return (streams, caches), metrics

        xs = (list(self.layers), jnp.arange(self.spec.repeats))
        (streams, caches), metrics = jax.lax.scan(body, (streams, caches), xs)
        return streams, caches, metrics

    def iter_layers(self) -> Iterator[DecoderLayer]:
        """The layers in order, each without the repeats axis."""
        for repeat in range(self.spec.repeats):
            for layer in self.layers:
                yield jax.tree.map(lambda a, r=repeat: a[r], layer) if self.stacked else layer


def _run_unit(
    layers: list[DecoderLayer],
    streams: jax.Array,
    inputs: LayerInputs,
    caches: UnitCaches | None,
    replay: tuple[Choices, ...] | None,
    *,
    record: bool,
    remat: bool,
) -> tuple[jax.Array, UnitCaches | None, list[LayerMetrics]]:
    """The layers of one unit in turn; with `remat` each is recomputed in the backward pass."""
    after, metrics = [], []
    for i, layer in enumerate(layers):
        cache = None if caches is None else caches[i]
        call = functools.partial(DecoderLayer.__call__, record=record)
        if remat:
            call = jax.checkpoint(call, prevent_cse=False)
        streams, cache, metric = call(layer, streams, inputs, cache, None if replay is None else replay[i])
        after.append(cache)
        metrics.append(metric)
    return streams, None if caches is None else tuple(after), metrics


def declare_segments(config: ModelConfig, policy: DTypePolicy, *, stacked: bool = True) -> list[Segment]:
    """The backbone's segments, without arrays: folded and stacked, or one per layer."""
    plan = layer_plan(config)
    segments = []
    for spec in plan_segments(plan) if stacked else per_layer_specs(plan):
        declare = Declare(policy, (spec.repeats,) if stacked else ())
        layers = [DecoderLayer(config, layer, declare) for layer in spec.unit]
        segments.append(Segment(spec, layers, stacked=stacked))
    return segments


def per_layer_specs(plan: tuple[LayerSpec, ...]) -> tuple[SegmentSpec, ...]:
    """The unfolded plan: one segment per layer."""
    return tuple(SegmentSpec((spec,), 1) for spec in plan)
