"""Segments of repeated layers: one generic scan, and the per-layer view of the same parameters.

Stacked, a segment holds one copy of its unit whose arrays have a leading `repeats` axis. Unstacked, every layer is a
segment of its own without that axis, which is what CPU and GPU decoding want: a scan would copy each layer's weights.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import parallel
from v4jax.cache import LayerCache, layer_view, put_layer
from v4jax.config import LayerSpec, ModelConfig, SegmentSpec, layer_plan, plan_segments
from v4jax.dtypes import DTypePolicy
from v4jax.model.inputs import Choices, LayerInputs
from v4jax.model.layer import DecoderLayer, LayerMetrics, Residual
from v4jax.model.params import FEW_ROWS, Declare, in_tiles
from v4jax.model.recomputation import recomputed
from v4jax.sharding import variables

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
        """`advance` from streams [B, S, C, D] to streams, for a segment that stands alone."""
        residual, caches, metrics = self.advance(
            Residual.of(streams), inputs, caches, replay, record=record, remat=remat
        )  # fmt: skip
        return residual.written(streams.shape[2]), caches, metrics

    def advance(
        self,
        residual: Residual,
        inputs: LayerInputs,
        caches: UnitCaches | None = None,
        replay: tuple[Choices, ...] | None = None,
        *,
        record: bool = False,
        remat: bool = False,
    ) -> tuple[Residual, UnitCaches | None, list[LayerMetrics]]:
        """The state after the segment, its caches, and per unit position the metrics with a leading repeats axis.

        `replay` is per layer in order and needs an unstacked segment.
        """
        run = functools.partial(_run_unit, record=record, remat=remat)
        if not self.stacked:
            residual, caches, metrics = run(list(self.layers), residual, inputs, caches, replay)
            return residual, caches, [jax.tree.map(lambda a: a[None], m) for m in metrics]
        if replay is not None:
            raise ValueError("replay needs the per-layer view of the model: call unstack() first")
        is_few = caches is not None and inputs.tokens.size <= FEW_ROWS
        leaves, structure = jax.tree.flatten(in_tiles(list(self.layers)) if is_few else list(self.layers))
        indexed = self._indexed() if caches is not None else [False] * len(leaves)
        whole = [leaf for leaf, stays in zip(leaves, indexed, strict=True) if stays]
        sliced = [leaf for leaf, stays in zip(leaves, indexed, strict=True) if not stays]

        def layers_of(sliced: list[jax.Array]) -> list[DecoderLayer]:
            parts = (iter(sliced), iter(whole))
            return jax.tree.unflatten(structure, [next(parts[stays]) for stays in indexed])

        def inputs_at(index: Any) -> LayerInputs:
            return dataclasses.replace(inputs, layer=jnp.asarray(index, jnp.int32)) if whole else inputs

        def one_unit(
            sliced: list[jax.Array], residual: Residual, index: Any, caches: UnitCaches | None
        ) -> tuple[Residual, UnitCaches | None, list[LayerMetrics]]:
            layers, own = layers_of(sliced), inputs_at(index)
            if caches is None:
                return run(layers, residual, own, None, None)
            if inputs.is_step:
                # A token touches little of a cache: it is addressed by layer, and no layer's part is cut out.
                views = tuple(layer_view(cache, jnp.asarray(index, jnp.int32)) for cache in caches)
                residual, views, metrics = run(layers, residual, own, views, None)
                assert views is not None
                return residual, tuple(map(put_layer, views)), metrics
            one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False), caches)
            residual, one, metrics = run(layers, residual, own, one, None)
            caches = jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, index, 0), caches, one)
            return residual, caches, metrics

        if self.spec.repeats == 1:
            residual, caches, metrics = one_unit([leaf[0] for leaf in sliced], residual, 0, caches)
            return residual, caches, [jax.tree.map(lambda a: a[None], m) for m in metrics]

        def body(carry: tuple[Residual, Any], xs: tuple[Any, jax.Array]) -> tuple[tuple[Residual, Any], Any]:
            # Caches ride in the carry and are read and written in place: as xs and ys they would exist twice.
            residual, caches, metrics = one_unit(xs[0], carry[0], xs[1], carry[1])
            return (residual, caches), metrics

        residual = residual.with_pending(self.layers[0].config.hc_mult)
        xs = (sliced, jnp.arange(self.spec.repeats))
        (residual, caches), metrics = jax.lax.scan(body, (residual, caches), xs)
        return residual, caches, metrics

    def _indexed(self) -> list[bool]:
        """Which leaves a cached run takes by layer index instead of slices: the experts' matrices.

        Most of a layer's experts have no token in a decoding step, and a slice would read them all. Parts that must be
        brought together first (FSDP) are sliced.
        """
        axes = [variable.get_metadata() for variable in variables(list(self.layers))]
        is_expert = [data["axes"][:1] == ("experts",) for data in axes]
        divisions = [data.get("division") for data in axes]
        is_apart = any(
            expert and division is not None and any(division.storage)
            for expert, division in zip(is_expert, divisions, strict=True)
        )
        return [False] * len(axes) if is_apart else is_expert

    def iter_layers(self) -> Iterator[DecoderLayer]:
        """The layers in order, each without the repeats axis."""
        for repeat in range(self.spec.repeats):
            for layer in self.layers:
                yield jax.tree.map(lambda a, r=repeat: a[r], layer) if self.stacked else layer


def _run_unit(
    layers: list[DecoderLayer],
    residual: Residual,
    inputs: LayerInputs,
    caches: UnitCaches | None,
    replay: tuple[Choices, ...] | None,
    *,
    record: bool,
    remat: bool,
) -> tuple[Residual, UnitCaches | None, list[LayerMetrics]]:
    """The layers of one unit in turn; with `remat` each is recomputed in the backward pass."""
    after, metrics = [], []
    for i, layer in enumerate(layers):
        cache = None if caches is None else caches[i]
        call = functools.partial(_run_layer, record=record)
        if remat:
            call = recomputed(call)
        residual, cache, metric = call(layer, residual, inputs, cache, None if replay is None else replay[i])
        after.append(cache)
        metrics.append(metric)
    return residual, None if caches is None else tuple(after), metrics


def _run_layer(layer: DecoderLayer, *arguments: Any, record: bool) -> tuple[Residual, LayerCache | None, LayerMetrics]:
    """One layer; parameters that are only stored apart are brought together for it alone, and again to recompute it."""
    return parallel.gathered(layer).advance(*arguments, record=record)


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
