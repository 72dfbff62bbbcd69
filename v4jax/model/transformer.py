"""The whole model: embed → residual streams → segments → head, with and without a decode cache (architecture.md §2)."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from v4jax import parallel
from v4jax.cache import Cache, MTPCache, init_cache
from v4jax.compilation import jit
from v4jax.config import ModelConfig, SegmentSpec, mtp_plan
from v4jax.dtypes import DTypePolicy
from v4jax.model import placed
from v4jax.model.dots import full_dot
from v4jax.model.inputs import Choices, LayerInputs, cached_inputs, full_inputs
from v4jax.model.layer import HeadMixer, Residual
from v4jax.model.mtp import MTPBlock, next_tokens
from v4jax.model.params import Declare, Embedding, RMSNorm
from v4jax.model.stack import Segment, declare_segments
from v4jax.model.tensors import check_whole_blocks, fill, flatten, named_variables
from v4jax.quant import check_simulation
from v4jax.sharding import Placement, Recipe, check_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """Results of the backbone before the head."""

    hidden: jax.Array
    """[B, S, D] in the compute dtype, after the final norm."""
    streams: jax.Array
    """[B, S, C, D] after the last layer: what MTP reads."""
    expert_load: jax.Array
    """float32 [L, E]: tokens per routed expert, padding not counted."""
    balance: jax.Array
    """float32 [L]: sequence-wise balance loss."""
    choices: tuple[Choices, ...] | None = None
    """Per layer, if recording was asked for."""


class Transformer(HeadMixer):
    """DeepSeek-V4. A pytree of typed parameters; every method is pure and can be jitted.

    Parameter paths inside a layer equal the official names; `to_tensors` and `from_tensors` convert.
    """

    def __init__(self, config: ModelConfig, policy: DTypePolicy | None = None, *, stacked: bool = True) -> None:
        """Lays the model out without arrays: `random` and `from_tensors` make a usable one."""
        policy = policy or DTypePolicy()
        if policy.quant_sim:
            check_simulation(config)
        self.config, self.policy = config, policy
        self.placement: Placement | None = None
        declare = Declare(policy)
        self.embed = Embedding(config.vocab_size, config.hidden_size, declare, stddev=config.initializer_range)
        self.segments = nnx.List(declare_segments(config, policy, stacked=stacked))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, declare)
        self.head = Embedding(
            config.vocab_size, config.hidden_size, declare, axes=("head_vocab", None), stddev=config.initializer_range
        )
        self._init_mixer(config, declare)
        self.mtp = nnx.List([MTPBlock(config, spec, declare) for spec in mtp_plan(config)])

    @classmethod
    def random(
        cls, config: ModelConfig, policy: DTypePolicy | None = None, *, seed: int = 0, stacked: bool = True
    ) -> "Transformer":
        """A model with freshly drawn parameters, the same for a seed on every machine; drawn on the host."""
        model = cls(config, policy, stacked=stacked)
        generator = np.random.default_rng(seed)
        for variable in named_variables(model).values():
            want = variable.get_value()
            drawn = variable.get_metadata()["init"](generator, want.shape)
            variable.set_value(jnp.asarray(drawn, dtype=want.dtype))
        return model

    def place(self, mesh: Mesh, recipe: Recipe) -> "Transformer":
        """The same model divided over a mesh: its arrays move, and every method then runs on all devices.

        A model without arrays (`ShapeDtypeStruct`s) is only told where its arrays will lie.

        Raises:
          UserError: an axis does not divide what it must.
        """
        placement = Placement(mesh, recipe)
        check_mesh(self.config, placement.sizes)
        clone = nnx.merge(*nnx.split(self))
        clone.placement = placement
        if self.policy.native is not None:
            check_whole_blocks(clone, self.policy.native.tile, placement)
        parallel.annotate(clone, placement)
        is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(clone))
        return clone if is_abstract else parallel.put(clone, placement)

    # ---- whole rows -----------------------------------------------------------------------------------------------
    def __call__(
        self, tokens: Int[Array | np.ndarray, "B S"], segment_ids: Int[Array | np.ndarray, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """Logits float32 of every position, compiled. `segment_ids`: 0 is padding, documents from 1, each alone."""
        # On a mesh of several processes an array of one's own would not do, and a NumPy one is everybody's.
        return _call(self, tokens if self.placement else jnp.asarray(tokens), segment_ids)

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        *,
        replay: tuple[Choices, ...] | None = None,
        record: bool = False,
        remat: bool = False,
    ) -> ForwardOutput:
        """The backbone without its head.

        Args:
          replay: choices of an earlier run, per layer, in place of routers and indexers (needs `unstack()`).
          record: whether to return the choices (needs `unstack()`).
          remat: whether to recompute each layer in the backward pass instead of keeping its intermediates.
        """
        inputs = full_inputs(self.config, tokens, segment_ids)
        return placed.backbone(self, inputs, None, replay=replay, record=record, remat=remat)[0]

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """The head: both operands in float32."""
        return placed.logits(self, hidden)

    def head_logits(self, streams: Float[Array, "B S C D"]) -> Float[Array, "B S V"]:
        """Logits of the streams after the last layer."""
        return self.logits(self._collapse(self.config, self.norm, Residual.of(streams))[0])

    @property
    def head_weight(self) -> jax.Array:
        """[V, D] in the parameter dtype."""
        return self.head.weight[...]

    def local_logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """The head, as far as one device holds it."""
        dtype = self.policy.island
        return full_dot(hidden.astype(dtype), self.head.weight[...].astype(dtype))

    def mtp_hidden(
        self,
        streams: Float[Array, "B S C D"],
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        *,
        depth: int = 0,
    ) -> Float[Array, "B S1 D"]:
        """What the head reads to predict token t + 2, for t = 0 … S−2; `streams` are those of `hidden`."""
        block = self._mtp_block(depth)
        if tokens.shape[1] == 1:
            return jnp.zeros((len(tokens), 0, self.config.hidden_size), self.policy.compute)
        inputs = full_inputs(self.config, tokens, segment_ids)
        following, segments = next_tokens(tokens, inputs.segments)
        if self.placement is not None:
            # Whole rows stay divided as they are: a last position that predicts nothing, instead of one fewer.
            last = [(0, 0), (0, 1)]
            inputs = dataclasses.replace(inputs, segments=jnp.pad(segments, last))
            return placed.predict(self, block, streams, jnp.pad(following, last), inputs)[0][:, :-1]
        inputs = jax.tree.map(lambda a: a[:, :-1], inputs)
        inputs = dataclasses.replace(inputs, segments=segments)
        return block.predict(streams[:, :-1], self.embed(following), inputs)[0]

    def mtp_logits(
        self, tokens: Int[Array | np.ndarray, "B S"], segment_ids: Int[Array | np.ndarray, "B S"] | None = None
    ) -> Float[Array, "B S1 V"]:
        """Logits float32 for token t + 2 at positions t = 0 … S−2, compiled."""
        return _call_mtp(self, tokens if self.placement else jnp.asarray(tokens), segment_ids)

    # ---- with a cache ---------------------------------------------------------------------------------------------
    def init_cache(self, batch: int, max_length: int) -> Cache:
        """Empty decode state that fits this model's segments."""
        stacked = any(segment.stacked for segment in self.segments)
        if self.placement is None:
            return init_cache(self.config, batch, max_length, self.policy, stacked=stacked)
        return placed.init_cache(self, batch, max_length, stacked=stacked)

    def extend(
        self, tokens: Int[Array, "B S"], cache: Cache, lengths: Int[Array, " B"] | None = None
    ) -> tuple[ForwardOutput, Cache]:
        """Continues every sequence by a chunk of any length.

        Args:
          tokens: padded on the right where `lengths` is given.
          lengths: real tokens per sequence, 0 to S; None means all.

        Returns:
          The backbone's output for the chunk, and the cache. MTP blocks are not advanced: see `extend_mtp`.
        """
        inputs = cached_inputs(self.config, tokens, cache.length, lengths)
        output, segments = placed.backbone(self, inputs, cache.segments)
        assert segments is not None
        assert inputs.end is not None
        return output, dataclasses.replace(cache, segments=segments, length=inputs.end)

    def prefill(
        self, tokens: Int[Array, "B S"], cache: Cache, lengths: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """`extend`, with the logits of every position of the chunk."""
        output, cache = self.extend(tokens, cache, lengths)
        return self.logits(output.hidden), cache

    def decode_step(self, tokens: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one more token of every sequence."""
        logits, cache = self.prefill(tokens[:, None], cache)
        return logits[:, 0], cache

    def extend_mtp(
        self,
        tokens: Int[Array, "B S"],
        streams: Float[Array, "B S C D"],
        before: Int[Array, " B"],
        cache: Cache,
        lengths: Int[Array, " B"] | None = None,
        *,
        depth: int = 0,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Advances the MTP block after `extend` of the same chunk.

        The block lags by one token, since it needs the successor: row i of the result belongs to position
        `before − 1 + i` (`i` where `before` is 0, and then the last row is padding).

        Args:
          streams: those that `extend` returned.
          before: lengths of the sequences before the chunk.
          cache: the cache that `extend` returned.
        """
        block, state = self._mtp_block(depth), cache.mtp[depth]
        batch, size = tokens.shape
        lengths = jnp.full(batch, size) if lengths is None else lengths
        is_first = (before == 0).astype(jnp.int32)[:, None]
        row = jnp.arange(size)[None] + is_first
        rows = jnp.concatenate([state.streams[:, None], streams], axis=1)
        shifted = jnp.take_along_axis(rows, row[..., None, None], axis=1)
        following = jnp.take_along_axis(tokens, jnp.minimum(row, size - 1), axis=1)
        start = jnp.maximum(before - 1, 0)
        count = jnp.maximum(lengths - is_first[:, 0], 0)
        inputs = cached_inputs(self.config, following, start, count)
        hidden, layer = placed.predict(self, block, shifted, following, inputs, state.layer)
        assert layer is not None
        last = jnp.take_along_axis(rows, lengths[:, None, None, None], axis=1)[:, 0]
        mtp = tuple(MTPCache(layer, last) if i == depth else old for i, old in enumerate(cache.mtp))
        return hidden, dataclasses.replace(cache, mtp=mtp)

    # ---- parts ----------------------------------------------------------------------------------------------------
    def local_backbone(
        self,
        inputs: LayerInputs,
        caches: tuple | None,
        *,
        replay: tuple[Choices, ...] | None = None,
        record: bool = False,
        remat: bool = False,
    ) -> tuple[ForwardOutput, tuple | None]:
        """All layers, on the tokens and parameters of one device."""
        embedded = self.embed(inputs.tokens)
        residual = Residual(jnp.tile(embedded, self.config.hc_mult))
        after, loads, balances, choices, done = [], [], [], [], 0
        for i, segment in enumerate(self.segments):
            width = len(segment.spec.unit)
            residual, cache, metrics = segment.advance(
                residual,
                inputs,
                None if caches is None else caches[i],
                None if replay is None else replay[done : done + width],
                record=record,
                remat=remat,
            )
            done += width
            after.append(cache)
            loads.append(_in_layer_order([m.expert_load for m in metrics]))
            balances.append(_in_layer_order([m.balance for m in metrics]))
            if record:
                choices += _choices_in_layer_order(metrics)
        hidden, streams = self._collapse(self.config, self.norm, residual)
        output = ForwardOutput(
            hidden, streams, jnp.concatenate(loads), jnp.concatenate(balances), tuple(choices) if record else None
        )
        return output, None if caches is None else tuple(after)

    def _mtp_block(self, depth: int) -> MTPBlock:
        if depth >= len(self.mtp):
            raise ValueError(f"MTP depth {depth}: this model has {len(self.mtp)} MTP blocks")
        return self.mtp[depth]

    # ---- layers and tensors ---------------------------------------------------------------------------------------
    def unstack(self) -> "Transformer":
        """The per-layer view: the same numbers, one segment per layer. Keep one view; each holds all the weights."""
        clone = nnx.merge(*nnx.split(self))
        clone.segments = nnx.List(
            Segment(SegmentSpec((layer.spec,), 1), [layer], stacked=False)
            for segment in self.segments
            for layer in segment.iter_layers()
        )
        return clone

    def to_tensors(self) -> tuple[dict[str, np.ndarray], Iterator[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
        """Flat dicts by official name: the top, each layer in turn, each MTP block. Experts stay stacked."""
        layers = (flatten(layer) for segment in self.segments for layer in segment.iter_layers())
        return flatten(self, skip=("segments", "mtp")), layers, [flatten(block) for block in self.mtp]

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        policy: DTypePolicy,
        top: Mapping[str, Any],
        layers: Iterable[Mapping[str, Any]],
        mtp: Iterable[Mapping[str, Any]] = (),
        *,
        stacked: bool = True,
    ) -> "Transformer":
        """Builds a model from flat dicts in the form of `to_tensors`; `layers` is consumed one at a time.

        Raises:
          ValueError: a tensor is missing, unknown, or of another shape.
        """
        model = cls(config, policy, stacked=stacked)
        fill(model, top, skip=("segments", "mtp"))
        iterator = iter(layers)
        for segment in model.segments:
            width, repeats = len(segment.spec.unit), segment.spec.repeats
            buffers: list[dict[str, np.ndarray]] = [{} for _ in range(width)]
            for repeat in range(repeats):
                for position in range(width):
                    tensors = next(iterator)
                    if segment.stacked:
                        _stack_into(buffers[position], tensors, repeat, repeats)
                    else:
                        buffers[position] = dict(tensors)
            for layer, tensors in zip(segment.layers, buffers, strict=True):
                fill(layer, tensors)
        for block, tensors in zip(model.mtp, mtp, strict=True):
            fill(block, tensors)
        return model


@jit
def _call(model: Transformer, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return model.logits(model.hidden(tokens, segment_ids).hidden)


@jit
def _call_mtp(model: Transformer, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return model.logits(model.mtp_hidden(model.hidden(tokens, segment_ids).streams, tokens, segment_ids))


def _in_layer_order(per_position: list[jax.Array]) -> jax.Array:
    """Arrays [repeats, …] of each unit position → [repeats · unit, …] in the order of the layers."""
    stacked = jnp.stack(per_position, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _choices_in_layer_order(metrics: list[Any]) -> list[Choices]:
    repeats = metrics[0].choices.experts.shape[0]
    return [jax.tree.map(lambda a, r=r: a[r], m.choices) for r in range(repeats) for m in metrics]


def _stack_into(buffer: dict[str, np.ndarray], tensors: Mapping[str, Any], index: int, count: int) -> None:
    for name, value in tensors.items():
        array = np.asarray(value)
        if name not in buffer:
            buffer[name] = np.empty((count, *array.shape), array.dtype)
        buffer[name][index] = array
