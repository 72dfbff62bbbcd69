"""V4 attention (architecture.md §5): low-rank queries, one shared key-value head, window + compressed entries + sink.

One class for every layer kind; the static `LayerSpec` decides which parts exist.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from v4jax import ops, parallel
from v4jax.cache import CompressorState, LayerCache, ring_extend, ring_put, ring_rows
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.compressor import Compressor, Entries
from v4jax.model.indexer import Indexer
from v4jax.model.inputs import LayerInputs
from v4jax.model.params import Constant, Declare, Linear, RMSNorm, Role, unit_rms
from v4jax.model.placed_attention import (
    first_place,
    join_entries,
    merged_attention,
    merged_selection,
    own_selection,
    put_entries,
)
from v4jax.model.recomputation import kept
from v4jax.model.rope import over_heads, rotate
from v4jax.quant import simulate_kv


class _Selection(NamedTuple):
    """The entries that each query is restricted to, as a list or as bits; all visible ones where it has neither."""

    indices: Int[Array, "B S K"] | None = None
    mask: Int[Array, "B S W"] | None = None


class Attention(nnx.Module):
    """Attention of one layer, over whole rows, over a chunk that continues a cache, or over one token."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, declare: Declare) -> None:
        self.config, self.spec, self.policy = config, spec, declare.policy
        heads, dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        group_in = config.heads_per_group * dim
        self.wq_a = Linear(hidden, config.q_lora_rank, ("q_lora", "hidden"), declare, released_in_fp8=True)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps, declare)
        self.wq_b = Linear(config.q_lora_rank, heads * dim, ("heads", "q_lora"), declare, released_in_fp8=True)
        self.wkv = Linear(hidden, dim, (None, "hidden"), declare, released_in_fp8=True)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps, declare)
        self.attn_sink = declare((heads,), axes=("heads",), role=Role.SINK, init=Constant(0.0))
        self.wo_a = Linear(
            group_in, config.o_groups * config.o_lora_rank, ("o_groups", None), declare, released_in_fp8=True
        )
        self.wo_b = Linear(
            config.o_groups * config.o_lora_rank, hidden, ("hidden", "o_groups"), declare, released_in_fp8=True
        )
        if spec.ratio:
            self.compressor = Compressor(config, spec, dim, declare, is_index=False)
        if spec.has_indexer:
            self.indexer = Indexer(config, spec, declare)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        inputs: LayerInputs,
        cache: LayerCache | None = None,
        selection: Int[Array, "B S K"] | None = None,
        *,
        record: bool = False,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None, Int[Array, "B S K"] | None]:
        """Output for the normed input x, the cache after it, and the entries that were selected.

        Args:
          cache: None for a whole forward pass. With one, x continues it.
          selection: entries to attend to instead of the indexer's (replay).
          record: whether the entries that were selected are wanted; else None may stand for them. Where kernels would
            take bits they get a list then, and may sum in another order.
        """
        turn = inputs.turn(self.spec.ratio)
        latent, kv = Linear.joint(x.astype(self.policy.compute), (self.wq_a, self.wkv))
        latent = self.q_norm(kept(latent.astype(self.policy.compute)))
        q = self.wq_b(latent).reshape(*x.shape[:2], -1, self.config.head_dim)
        if cache is None:
            # The widest array of a layer: the compiler would keep the product, and its gradient, in float32.
            q = jax.lax.optimization_barrier(q)
        q = rotate(unit_rms(q, self.config.rms_norm_eps, self.policy.island), over_heads(turn))
        kv = rotate(self.kv_norm(kept(kv.astype(self.policy.compute))), turn)
        if self.policy.quant_sim:
            kv = simulate_kv(kv, self.config.nope_head_dim)
        parts, chosen = (x, latent, q, kv, inputs), _Selection(selection)
        if cache is None:
            out, chosen = self._attend(*parts, chosen, record=record)
        elif inputs.is_step:
            out, cache, chosen = self._step(*parts, cache, chosen)
        else:
            out, cache, chosen = self._extend(*parts, cache, chosen, record=record)
        return kept(self._project_out(rotate(out, over_heads(turn.inverse)))), cache, chosen.indices

    def _project_out(self, out: Float[Array, "B S N H"]) -> Float[Array, "B S D"]:
        """Each group of heads through its own matrix, then all groups together."""
        groups = self.wo_a.out_size // self.config.o_lora_rank
        latent = self.wo_a.grouped(out.reshape(*out.shape[:2], groups, -1))
        return self.wo_b(latent, summed_over=parallel.axes("o_groups"))

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5

    def _select(
        self, x: jax.Array, latent: jax.Array, inputs: LayerInputs, entries: Entries, keys: jax.Array, *, record: bool
    ) -> _Selection:
        q, weights = self.indexer.queries(x, latent, inputs.turn(self.spec.ratio))
        names, is_divided = parallel.axes("index_heads"), False
        positions, segments = inputs.positions, inputs.segments
        if names:
            # Selection needs the scores of all heads: each device takes all heads of its part of the tokens.
            is_divided = q.shape[1] % parallel.device_count(names) == 0
            bring = parallel.trade if is_divided else parallel.join
            q, weights = bring(q, names, 2), bring(weights, names, 2)
        if is_divided:
            positions, segments = (parallel.own_part(a, names, 1) for a in (positions, segments))
        topk = self.indexer.topk
        form = "list" if record else ops.selection_form(topk, keys.shape[1])
        chosen = ops.index_topk(
            q, weights, keys, positions, segments, entries.end, entries.segment, topk=topk, output=form
        )
        chosen = kept(parallel.join(chosen, names, 1) if is_divided else chosen)
        return _Selection(chosen) if form == "list" else _Selection(mask=chosen)

    def _select_step(self, x: jax.Array, latent: jax.Array, inputs: LayerInputs, cache: LayerCache) -> jax.Array:
        """`_select` of one token per sequence: its cached entries are in order, so that it sees the first ones."""
        keys, topk = cache.index_keys, self.indexer.topk
        assert keys is not None
        q, weights = self.indexer.queries(x, latent, inputs.turn(self.spec.ratio))
        q, weights = (parallel.join(a, parallel.axes("index_heads"), 2) for a in (q, weights))
        count = keys.shape[-2]
        visible = jnp.clip((inputs.positions[:, 0] + 1) // self.spec.ratio - first_place(count), 0, count)
        chosen = ops.index_topk_decode(q[:, 0], weights[:, 0], keys, visible, layer=cache.layer, topk=topk)[:, None]
        return merged_selection(chosen, q, weights, keys, cache.layer, topk) if parallel.axes("entries") else chosen

    def _has_selection(self, count: int) -> bool:
        return self.spec.has_indexer and self.indexer.needs_selection(count)

    def _over_entries(
        self, q: jax.Array, keys: jax.Array, key_segment: jax.Array, inputs: LayerInputs, entries: Entries | None,
        selection: _Selection,
    ) -> jax.Array:  # fmt: skip
        far = (None, None, None) if entries is None or entries.values.shape[1] == 0 else entries
        return ops.sparse_attention(
            q, keys, self.attn_sink[...], inputs.positions, inputs.segments, key_segment, *far, *selection,
            window=self.config.sliding_window, scale=self._scale,
            sound_topk=self.indexer.topk if self.spec.has_indexer else None,
        )  # fmt: skip

    def _attend(
        self, x: jax.Array, latent: jax.Array, q: jax.Array, kv: jax.Array, inputs: LayerInputs,
        selection: _Selection, *, record: bool,
    ) -> tuple[jax.Array, _Selection]:  # fmt: skip
        """Whole rows: nothing precedes the first token."""
        window = self.config.sliding_window
        # A row shorter than one window completes no entry.
        entries = self.compressor(x, inputs) if 0 < self.spec.ratio <= x.shape[1] else None
        if selection.indices is None and entries is not None and self._has_selection(entries.values.shape[1]):
            keys = self.indexer.compressor(jax.lax.stop_gradient(x), inputs).values
            selection = self._select(x, latent, inputs, entries, keys, record=record)
        keys = jnp.concatenate([parallel.rows_before(kv, window), kv], axis=1)
        key_segment = jnp.concatenate([parallel.rows_before(inputs.segments, window, -1), inputs.segments], axis=1)
        return self._over_entries(q, keys, key_segment, inputs, entries, selection), selection

    def _extend(
        self, x: jax.Array, latent: jax.Array, q: jax.Array, kv: jax.Array, inputs: LayerInputs, cache: LayerCache,
        selection: _Selection, *, record: bool,
    ) -> tuple[jax.Array, LayerCache, _Selection]:  # fmt: skip
        """A chunk of any length after the cached tokens of each sequence."""
        assert inputs.start is not None
        assert inputs.end is not None
        window = self.config.sliding_window
        positions = inputs.start[:, None] + jnp.arange(-window, 0)
        before = parallel.ring_before(cache.window, kv, inputs.start)
        keys = jnp.concatenate([ring_rows(before, kv, inputs.start, positions), kv], axis=1)
        key_segment = jnp.concatenate([jnp.where(positions < 0, -1, 1), inputs.segments], axis=1)
        cache = self._compress(x, inputs, cache)
        values = join_entries(cache.entries)
        entries = None if values is None else self._in_slots(values)
        if selection.indices is None and entries is not None and self._has_selection(entries.values.shape[1]):
            index_keys = join_entries(cache.index_keys)
            assert index_keys is not None
            selection = self._select(x, latent, inputs, entries, index_keys, record=record)
        out = self._over_entries(q, keys, key_segment, inputs, entries, selection)
        ring = ring_extend(before, kv, inputs.start, inputs.end)
        ring = parallel.ring_after(ring, inputs.start, inputs.end, kv.shape[1])
        return out, dataclasses.replace(cache, window=ring), selection

    def _step(
        self, x: jax.Array, latent: jax.Array, q: jax.Array, kv: jax.Array, inputs: LayerInputs, cache: LayerCache,
        selection: _Selection,
    ) -> tuple[jax.Array, LayerCache, _Selection]:  # fmt: skip
        """One token for every sequence: the ring is attended to as it lies."""
        assert inputs.start is not None
        assert inputs.end is not None
        cache = self._compress(x, inputs, cache)
        ring = ring_put(cache.window, kv[:, 0], inputs.start, cache.layer)
        chosen, entry_count = selection.indices, None
        attend: Callable[..., jax.Array] = ops.sparse_attention_decode
        if cache.entries is not None:
            # Entries are in order, so that a query sees the first of them; this device holds those from `first` on.
            count = cache.entries.shape[1 if cache.layer is None else 2]
            first, divided = first_place(count), parallel.axes("entries")
            entry_count = jnp.clip(inputs.end // self.spec.ratio - first, 0, count)
            attend = merged_attention if divided else attend
            if chosen is not None:
                chosen = own_selection(chosen, count)
            elif self._has_selection(count * parallel.device_count(divided)):
                chosen = self._select_step(x, latent, inputs, cache)
        out = attend(
            q[:, 0], ring, jnp.minimum(inputs.end, self.config.sliding_window), self.attn_sink[...], cache.entries,
            entry_count, None if chosen is None else chosen[:, 0], layer=cache.layer, scale=self._scale,
        )  # fmt: skip
        return out[:, None], dataclasses.replace(cache, window=ring), _Selection(chosen)

    def _compress(self, x: jax.Array, inputs: LayerInputs, cache: LayerCache) -> LayerCache:
        """The cache with the entries that these tokens complete: they are visible to the tokens that complete them."""
        if not self.spec.ratio:
            return cache

        def advance(
            compressor: Compressor, values: jax.Array | None, state: CompressorState | None
        ) -> tuple[jax.Array, CompressorState]:
            assert values is not None
            assert state is not None
            if inputs.is_step:
                new, state = compressor.step(x, inputs, state, cache.layer)
            else:
                new, state = compressor.extend(x, inputs, state)
            return put_entries(values, new.values, new.place, new.valid, cache.layer), state

        entries, state = advance(self.compressor, cache.entries, cache.state)
        cache = dataclasses.replace(cache, entries=entries, state=state)
        if not self.spec.has_indexer:
            return cache
        keys, state = advance(self.indexer.compressor, cache.index_keys, cache.index_state)
        return dataclasses.replace(cache, index_keys=keys, index_state=state)

    def _in_slots(self, values: Float[Array, "B P *R"]) -> Entries:
        """All slots of a cache; the ends of empty ones lie beyond every query."""
        batch, count = values.shape[:2]
        end = jnp.broadcast_to((jnp.arange(count) + 1) * self.spec.ratio - 1, (batch, count))
        return Entries(values.reshape(batch, count, -1), end, jnp.ones_like(end))
