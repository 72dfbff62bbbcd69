"""V4 attention (architecture.md §5): low-rank queries, one shared key-value head, window + compressed entries + sink.

One class for every layer kind; the static `LayerSpec` decides which parts exist.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from v4jax import ops
from v4jax.cache import CompressorState, LayerCache, put_rows, ring_extend, ring_positions, ring_put, ring_rows
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.compressor import Compressor, Entries
from v4jax.model.indexer import Indexer
from v4jax.model.inputs import LayerInputs
from v4jax.model.params import Constant, Declare, Linear, RMSNorm, Role, dot, rms_scale
from v4jax.model.rope import over_heads, rotate
from v4jax.quant import simulate_kv


class Attention(nnx.Module):
    """Attention of one layer, over whole rows, over a chunk that continues a cache, or over one token."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, declare: Declare) -> None:
        self.config, self.spec, self.policy = config, spec, declare.policy
        heads, dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        group_in = config.heads_per_group * dim
        self.wq_a = Linear(hidden, config.q_lora_rank, ("q_lora", "hidden"), declare)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps, declare)
        self.wq_b = Linear(config.q_lora_rank, heads * dim, ("heads", "q_lora"), declare)
        self.wkv = Linear(hidden, dim, (None, "hidden"), declare)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps, declare)
        self.attn_sink = declare((heads,), axes=("heads",), role=Role.SINK, init=Constant(0.0))
        self.wo_a = Linear(group_in, config.o_groups * config.o_lora_rank, ("o_groups", None), declare)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, hidden, ("hidden", "o_groups"), declare)
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
    ) -> tuple[Float[Array, "B S D"], LayerCache | None, Int[Array, "B S K"] | None]:
        """Output for the normed input x, the cache after it, and the entries that were selected.

        Args:
          cache: None for a whole forward pass. With one, x continues it.
          selection: entries to attend to instead of the indexer's (replay).
        """
        turn = inputs.turn(self.spec.ratio)
        latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(latent).reshape(*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        q = q.astype(self.policy.norm)
        q = (q * rms_scale(q, self.config.rms_norm_eps)).astype(self.policy.compute)
        q = rotate(q, over_heads(turn))
        kv = rotate(self.kv_norm(self.wkv(x)), turn)
        if self.policy.quant_sim:
            kv = simulate_kv(kv, self.config.nope_head_dim)
        parts = (x, latent, q, kv, inputs)
        if cache is None:
            out, selection = self._attend(*parts, selection)
        else:
            advance = self._step if inputs.is_step else self._extend
            out, cache, selection = advance(*parts, cache, selection)
        return self._project_out(rotate(out, over_heads(turn.inverse))), cache, selection

    def _project_out(self, out: Float[Array, "B S N H"]) -> Float[Array, "B S D"]:
        """Each group of heads through its own matrix, then all groups together."""
        groups, rank = self.config.o_groups, self.config.o_lora_rank
        grouped = out.reshape(*out.shape[:2], groups, -1)
        weight = self.wo_a.weight[...].reshape(groups, rank, -1)
        latent = [dot(grouped[:, :, g], weight[g], self.policy) for g in range(groups)]
        return self.wo_b(jnp.concatenate(latent, axis=-1))

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5

    def _select(
        self, x: jax.Array, latent: jax.Array, inputs: LayerInputs, entries: Entries, keys: jax.Array
    ) -> jax.Array:
        q, weights = self.indexer.queries(x, latent, inputs.turn(self.spec.ratio))
        return ops.index_topk(
            q, weights, keys, inputs.positions, inputs.segments, entries.end, entries.segment, topk=self.indexer.topk
        )

    def _has_selection(self, count: int) -> bool:
        return self.spec.has_indexer and self.indexer.needs_selection(count)

    def _over_entries(
        self, q: jax.Array, keys: jax.Array, key_segment: jax.Array, inputs: LayerInputs, entries: Entries | None,
        selection: jax.Array | None,
    ) -> jax.Array:  # fmt: skip
        far = (None, None, None) if entries is None or entries.values.shape[1] == 0 else entries
        return ops.sparse_attention(
            q, keys, self.attn_sink[...], inputs.positions, inputs.segments, key_segment, *far, selection,
            window=self.config.sliding_window, scale=self._scale,
        )  # fmt: skip

    def _attend(
        self, x: jax.Array, latent: jax.Array, q: jax.Array, kv: jax.Array, inputs: LayerInputs,
        selection: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        """Whole rows: nothing precedes the first token."""
        window = self.config.sliding_window
        # A row shorter than one window completes no entry.
        entries = self.compressor(x, inputs) if 0 < self.spec.ratio <= x.shape[1] else None
        if selection is None and entries is not None and self._has_selection(entries.values.shape[1]):
            keys = self.indexer.compressor(jax.lax.stop_gradient(x), inputs).values
            selection = self._select(x, latent, inputs, entries, keys)
        before = [(0, 0), (window, 0)]
        keys, key_segment = jnp.pad(kv, [*before, (0, 0)]), jnp.pad(inputs.segments, before, constant_values=-1)
        return self._over_entries(q, keys, key_segment, inputs, entries, selection), selection

    def _extend(
        self, x: jax.Array, latent: jax.Array, q: jax.Array, kv: jax.Array, inputs: LayerInputs, cache: LayerCache,
        selection: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache, jax.Array | None]:  # fmt: skip
        """A chunk of any length after the cached tokens of each sequence."""
        assert inputs.start is not None
        assert inputs.end is not None
        window = self.config.sliding_window
        positions = inputs.start[:, None] + jnp.arange(-window, 0)
        keys = jnp.concatenate([ring_rows(cache.window, kv, inputs.start, positions), kv], axis=1)
        key_segment = jnp.concatenate([jnp.where(positions < 0, -1, 1), inputs.segments], axis=1)
        cache = self._compress(x, inputs, cache)
        entries = self._cached_entries(cache, inputs)
        if selection is None and entries is not None and self._has_selection(entries.values.shape[1]):
            assert cache.index_keys is not None
            selection = self._select(x, latent, inputs, entries, cache.index_keys)
        out = self._over_entries(q, keys, key_segment, inputs, entries, selection)
        ring = ring_extend(cache.window, kv, inputs.start, inputs.end)
        return out, dataclasses.replace(cache, window=ring), selection

    def _step(
        self, x: jax.Array, latent: jax.Array, q: jax.Array, kv: jax.Array, inputs: LayerInputs, cache: LayerCache,
        selection: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache, jax.Array | None]:  # fmt: skip
        """One token for every sequence: the ring is attended to as it lies."""
        assert inputs.start is not None
        assert inputs.end is not None
        cache = self._compress(x, inputs, cache)
        ring = ring_put(cache.window, kv[:, 0], inputs.start)
        entries = self._cached_entries(cache, inputs)
        far = (None, None)
        if entries is not None:
            far = (entries.values, entries.end <= inputs.positions)
            if selection is None and self._has_selection(entries.values.shape[1]):
                assert cache.index_keys is not None
                selection = self._select(x, latent, inputs, entries, cache.index_keys)
        out = ops.sparse_attention_decode(
            q[:, 0], ring, ring_positions(inputs.end, ring.shape[1]) >= 0, self.attn_sink[...], *far,
            None if selection is None else selection[:, 0], scale=self._scale,
        )  # fmt: skip
        return out[:, None], dataclasses.replace(cache, window=ring), selection

    def _compress(self, x: jax.Array, inputs: LayerInputs, cache: LayerCache) -> LayerCache:
        """The cache with the entries that these tokens complete: they are visible to the tokens that complete them."""
        if not self.spec.ratio:
            return cache

        def advance(
            compressor: Compressor, values: jax.Array | None, state: CompressorState | None
        ) -> tuple[jax.Array, CompressorState]:
            assert values is not None
            assert state is not None
            form = compressor.step if inputs.is_step else compressor.extend
            new, state = form(x, inputs, state)
            return put_rows(values, new.values, new.place, new.valid), state

        entries, state = advance(self.compressor, cache.entries, cache.state)
        cache = dataclasses.replace(cache, entries=entries, state=state)
        if not self.spec.has_indexer:
            return cache
        keys, state = advance(self.indexer.compressor, cache.index_keys, cache.index_state)
        return dataclasses.replace(cache, index_keys=keys, index_state=state)

    def _cached_entries(self, cache: LayerCache, inputs: LayerInputs) -> Entries | None:
        """All slots of the cache; the ends of empty ones lie beyond every query."""
        if cache.entries is None:
            return None
        batch, count, _ = cache.entries.shape
        end = jnp.broadcast_to((jnp.arange(count) + 1) * self.spec.ratio - 1, (batch, count))
        return Entries(cache.entries, end, jnp.ones_like(end))
