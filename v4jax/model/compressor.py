"""Gated pooling of tokens into compressed entries (architecture.md §6): 4 tokens with overlap, or 128 without.

Three forms that agree: over whole rows of documents, over a chunk that continues a cache, and over one token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from v4jax import parallel
from v4jax.cache import CompressorState, ring_extend, ring_put, ring_rows
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.dots import float32_dot
from v4jax.model.inputs import LayerInputs
from v4jax.model.params import Constant, Declare, Linear, RMSNorm, Role
from v4jax.model.rope import layer_frequencies, rotate, rotation
from v4jax.quant import simulate_index, simulate_kv


class Entries(NamedTuple):
    """Compressed entries of a batch of rows, in order."""

    values: jax.Array
    """[B, P, H] in the compute dtype: normed, rotated, and rounded where the simulation is on."""
    end: jax.Array
    """int32 [B, P]: position of the last token of each entry's own window."""
    segment: jax.Array
    """int32 [B, P]: document of each entry, −1 for an empty slot."""


class NewEntries(NamedTuple):
    """Entries that a chunk completes."""

    values: jax.Array
    """[B, N, H]."""
    place: jax.Array
    """int32 [B, N]: the place of each among the sequence's entries."""
    valid: jax.Array
    """bool [B, N]."""


def _of_all(entries: Entries) -> Entries:
    """The entries of all devices that hold a row, in order."""
    return Entries(*(parallel.join(part, parallel.sequence_axes(), 1) for part in entries))


def _positions(chosen: Bool[Array, "B S"], count: int) -> Int[Array, "B P"]:
    """Where the first `count` chosen places of each row are; beyond the last one anything."""
    rank = jnp.cumsum(chosen, axis=1) - 1
    rows, places = jnp.indices(chosen.shape, jnp.int32)
    rank = jnp.where(chosen, rank, count)
    return jnp.zeros((chosen.shape[0], count), jnp.int32).at[rows, rank].set(places, mode="drop")


def _windows(
    rows: Float[Array, "B S C"], ends: Int[Array, "B N"], valid: Bool[Array, "B N"], ratio: int
) -> Float[Array, "B N ratio C"]:
    """The `ratio` rows up to each of ascending, disjoint windows' `ends`; zeros for those that are not valid."""
    batch, length, channels = rows.shape
    count = ends.shape[1]
    index = ends[..., None] + jnp.arange(1 - ratio, 1)
    # Ascending beyond the last row: no index twice and all in order, which spares the gradient a sort.
    beyond = length + jnp.arange(count * ratio).reshape(count, ratio)
    index = jnp.where(valid[..., None], index, beyond).reshape(batch, -1)

    def of_row(row: jax.Array, index: jax.Array) -> jax.Array:
        return row.at[index].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)

    return jax.vmap(of_row)(rows, index).reshape(batch, count, ratio, channels)


class Compressor(nnx.Module):
    """Pools `spec.ratio` tokens into one entry of `width` channels, each channel with its own softmax over tokens.

    With overlap an entry also pools the window before its own: the FIRST half of the projections' channels feeds the
    next window's entry, the second half the token's own.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, width: int, declare: Declare, *, is_index: bool) -> None:
        self.width, self.ratio, self.policy, self.is_index = width, spec.ratio, declare.policy, is_index
        self.overlap = 2 if spec.is_overlapped else 1
        self.config = config
        channels = self.overlap * width
        self.wkv = Linear(config.hidden_size, channels, ("compressed", "hidden"), declare)
        self.wgate = Linear(config.hidden_size, channels, ("compressed", "hidden"), declare)
        self.ape = declare((spec.ratio, channels), axes=(None, None), role=Role.BIAS, init=Constant(0.0))
        self.norm = RMSNorm(width, config.rms_norm_eps, declare)

    def project(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]) -> tuple[jax.Array, jax.Array]:
        """Rows of kv and gate [B, S, overlap · H] in float32; the gate includes `ape` of the place in the window."""
        gate = self.wgate.in_float32(x) + self.ape[...][jnp.mod(positions, self.ratio)]
        return self.wkv.in_float32(x), gate

    def __call__(self, x: Float[Array, "B S D"], inputs: LayerInputs) -> Entries:
        """All entries of rows of documents; tails shorter than a window give none.

        Where several devices hold a row, each forms the entries that end in its tokens, and all get all.
        """
        rows = self._rows(x, inputs.positions)
        batch, length = inputs.tokens.shape
        count = length // self.ratio
        names = parallel.sequence_axes()
        if not inputs.is_packed:
            starts = jnp.broadcast_to(self.ratio * jnp.arange(count)[None], (batch, count))
            if names:
                starts = starts + parallel.index(names) * length
            own = rows[:, : count * self.ratio].reshape(batch, count, self.ratio, -1)
            before = jnp.concatenate([parallel.rows_before(own, 1), own[:, :-1]], axis=1)
            values = self._finish(self._pool(self._halves(own), self._halves(before), starts > 0), starts)
            return _of_all(Entries(values, starts + self.ratio - 1, jnp.ones_like(starts)))
        is_last = (jnp.mod(inputs.positions, self.ratio) == self.ratio - 1) & (inputs.segments > 0)
        last = _positions(is_last, count)
        valid = jnp.arange(count) < jnp.sum(is_last, axis=1, keepdims=True)
        # Where several devices hold a row, windows reach back beyond this device's first token.
        reach = (self.overlap if names else self.overlap - 1) * self.ratio
        if reach:
            rows = jnp.concatenate([parallel.rows_before(rows, reach), rows], axis=1)
        ends, have = last + reach, valid
        if self.overlap == 2:
            # The window before an entry's own is that of the entry before it, but for the first one of this device.
            ends = jnp.concatenate([ends[:, :1] - self.ratio, ends], axis=1)
            have = jnp.concatenate([valid[:, :1], valid], axis=1)
        windows = _windows(rows, ends, have, self.ratio)
        own = self._halves(windows[:, -count:])
        before = self._halves(windows[:, :count]) if self.overlap == 2 else None
        end = jnp.take_along_axis(inputs.positions, last, axis=1)
        starts = end - (self.ratio - 1)
        pooled = self._pool(own, before, starts > 0)
        segment = jnp.where(valid, jnp.take_along_axis(inputs.segments, last, axis=1), -1)
        return _of_all(Entries(self._finish(pooled, starts), end, segment))

    def _rows(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]) -> Float[Array, "B S C2"]:
        """`project` as one product: kv and gate side by side."""
        both = jnp.concatenate([self.wkv.matrix, self.wgate.matrix])
        ape = jnp.pad(self.ape[...], ((0, 0), (both.shape[0] // 2, 0)))
        return float32_dot(x, both) + ape[jnp.mod(positions, self.ratio)]

    @staticmethod
    def _halves(rows: Float[Array, "*T C2"]) -> tuple[Float[Array, "*T C"], Float[Array, "*T C"]]:
        """The halves kv and gate."""
        return tuple(jnp.split(rows, 2, axis=-1))  # pyright: ignore

    def extend(
        self, x: Float[Array, "B S D"], inputs: LayerInputs, state: CompressorState
    ) -> tuple[NewEntries, CompressorState]:
        """Entries that a chunk completes, and the state after it."""
        assert inputs.start is not None
        assert inputs.end is not None
        start, end = inputs.start, inputs.end
        new = self.project(x, inputs.positions)
        before = (parallel.ring_before(old, rows, start) for old, rows in zip((state.kv, state.gate), new, strict=True))
        state = CompressorState(*before)
        count = x.shape[1] // self.ratio + 1
        index = start[:, None] // self.ratio + jnp.arange(count)
        starts = index * self.ratio
        positions = starts[..., None] + jnp.arange(self.ratio)

        def windows(positions: jax.Array) -> tuple[jax.Array, ...]:
            flat = positions.reshape(len(positions), -1)
            old = (state.kv, state.gate)
            rows = (ring_rows(a, b, start, flat) for a, b in zip(old, new, strict=True))
            return tuple(a.reshape(*positions.shape, -1) for a in rows)

        pooled = self._pool(
            windows(positions), windows(positions - self.ratio) if self.overlap == 2 else None, starts > 0
        )
        valid = starts + self.ratio <= end[:, None]
        rings = (ring_extend(old, rows, start, end) for old, rows in zip((state.kv, state.gate), new, strict=True))
        after = CompressorState(*(parallel.ring_after(ring, start, end, x.shape[1]) for ring in rings))
        return NewEntries(self._finish(pooled, starts), index, valid), after

    def step(
        self, x: Float[Array, "B 1 D"], inputs: LayerInputs, state: CompressorState, layer: Int[Array, ""] | None
    ) -> tuple[NewEntries, CompressorState]:
        """`extend` by one token for every sequence: one row of the state is written, and read where a window ends.

        With `layer` the state is that of a stack of layers, of which this is one.
        """
        assert inputs.start is not None
        kv, gate = self.project(x, inputs.positions)
        position = inputs.start
        state = CompressorState(
            ring_put(state.kv, kv[:, 0], position, layer), ring_put(state.gate, gate[:, 0], position, layer)
        )
        index = position // self.ratio
        starts = (index * self.ratio)[:, None]
        valid = jnp.mod(position + 1, self.ratio) == 0

        def pool() -> jax.Array:
            # Slots of the ring are in order up to the window's parity: rows by place, current window last.
            def windows(first: jax.Array) -> tuple[jax.Array, ...]:
                slot = jnp.mod(first + jnp.arange(self.ratio), self.overlap * self.ratio)
                place = (*(() if layer is None else (layer,)), jnp.arange(len(slot))[:, None], slot)
                return tuple(a.at[place].get(mode="clip")[:, None] for a in (state.kv, state.gate))

            before = windows(starts - self.ratio) if self.overlap == 2 else None
            return self._finish(self._pool(windows(starts), before, starts > 0), starts)

        empty = jnp.zeros((x.shape[0], 1, self.width), self.policy.compute)
        values = jax.lax.cond(jnp.any(valid), pool, lambda: empty)
        return NewEntries(values, index[:, None], valid[:, None]), state

    def _pool(
        self, own: tuple[jax.Array, ...], before: tuple[jax.Array, ...] | None, has_before: jax.Array
    ) -> jax.Array:
        """Softmax over tokens, channel by channel: rows [B, P, ratio, channels] → [B, P, width] float32."""
        kv, gate = own
        if self.overlap == 2:
            assert before is not None
            gate_before = jnp.where(has_before[..., None, None], before[1][..., : self.width], -jnp.inf)
            kv = jnp.concatenate([before[0][..., : self.width], kv[..., self.width :]], axis=2)
            gate = jnp.concatenate([gate_before, gate[..., self.width :]], axis=2)
        # As one row of windows: XLA's CPU takes several times as long over the middle axis of a batch of rows.
        batch, count = gate.shape[:2]
        kv, gate = (x.reshape(batch * count, *x.shape[2:]) for x in (kv, gate))
        weights = jnp.exp(gate - jax.lax.stop_gradient(jnp.max(gate, axis=1, keepdims=True)))
        return (jnp.sum(weights * kv, axis=1) / jnp.sum(weights, axis=1)).reshape(batch, count, -1)

    def _finish(self, pooled: Float[Array, "B P H"], starts: Int[Array, "B P"]) -> Float[Array, "B P H"]:
        """Norm, rotation at the window's first position, simulated quantisation."""
        values = self.norm(pooled.astype(self.policy.compute))
        values = rotate(values, rotation(starts, layer_frequencies(self.config, self.ratio)))
        if not self.policy.quant_sim:
            return values
        return simulate_index(values) if self.is_index else simulate_kv(values, self.config.nope_head_dim)
