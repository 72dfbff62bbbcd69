"""One decoder layer: attention, then experts, each between a read and a write of the residual streams."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4jax import ops
from v4jax.cache import LayerCache
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.attention import Attention
from v4jax.model.inputs import Choices, LayerInputs
from v4jax.model.moe import MoE
from v4jax.model.params import Constant, Declare, Normal, RMSNorm, Role


class LayerMetrics(NamedTuple):
    """Small results of a layer, for training rules and tests."""

    expert_load: jax.Array
    """float32 [E]: tokens per routed expert."""
    balance: jax.Array
    """float32 scalar: sequence-wise balance loss."""
    choices: Choices | None
    """What was chosen, if recording was asked for."""


class Residual(NamedTuple):
    """What runs from sublayer to sublayer: the streams, and the last output, written when the next sublayer reads."""

    streams: jax.Array
    """[B, S, C · D] in the compute dtype, stream-major."""
    out: jax.Array | None = None
    """[B, S, D]: to be written, or None."""
    maps: jax.Array | None = None
    """float32 [C · (2 + C), B, S]: how."""

    @classmethod
    def of(cls, streams: Float[Array, "B S C D"]) -> "Residual":
        """Streams to which nothing is to be written."""
        return cls(streams.reshape(*streams.shape[:2], -1))

    def with_pending(self, count: int) -> "Residual":
        """The same state in the form that every layer returns: at the start, a write that changes nothing."""
        if self.out is not None:
            return self
        batch, length, flat = self.streams.shape
        rows = jnp.concatenate([jnp.zeros(2 * count), jnp.eye(count).reshape(-1)]).astype(jnp.float32)
        out = jnp.zeros((batch, length, flat // count), self.streams.dtype)
        return Residual(self.streams, out, jnp.broadcast_to(rows[:, None, None], (len(rows), batch, length)))

    def written(self, count: int) -> Float[Array, "B S C D"]:
        """The streams with the pending output in them."""
        streams = self.streams.reshape(*self.streams.shape[:2], count, -1)
        if self.out is None or self.maps is None:
            return streams
        return ops.hyper_connection_write(self.out, streams, ops.unpack_maps(self.maps, count))


class DecoderLayer(nnx.Module):
    """Hyper-connected attention, then hyper-connected experts (architecture.md §2, §3)."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, declare: Declare) -> None:
        self.config, self.spec = config, spec
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, declare)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, declare)
        count = config.hc_mult
        rows, width = count * (2 + count), count * config.hidden_size
        for name in ("attn", "ffn"):
            fn = declare((rows, width), axes=(None, None), role=Role.MATRIX, init=Normal(0.02))
            setattr(self, f"hc_{name}_fn", fn)
            setattr(self, f"hc_{name}_base", declare((rows,), axes=(None,), role=Role.BIAS, init=Constant(0.0)))
            setattr(self, f"hc_{name}_scale", declare((3,), axes=(None,), role=Role.GAIN, init=Constant(1.0)))
        self.attn = Attention(config, spec, declare)
        self.ffn = MoE(config, spec, declare)

    def __call__(
        self,
        streams: Float[Array, "B S C D"],
        inputs: LayerInputs,
        cache: LayerCache | None = None,
        replay: Choices | None = None,
        *,
        record: bool = False,
    ) -> tuple[Float[Array, "B S C D"], LayerCache | None, LayerMetrics]:
        """`advance` from streams to streams, for a layer that stands alone."""
        residual, cache, metrics = self.advance(Residual.of(streams), inputs, cache, replay, record=record)
        return residual.written(self.config.hc_mult), cache, metrics

    def advance(
        self,
        residual: Residual,
        inputs: LayerInputs,
        cache: LayerCache | None = None,
        replay: Choices | None = None,
        *,
        record: bool = False,
    ) -> tuple[Residual, LayerCache | None, LayerMetrics]:
        """The residual state after this layer, its cache, and its metrics.

        Args:
          cache: the layer's state if the tokens continue one, else None.
          replay: choices to use instead of the router's and the indexer's.
          record: whether to return the choices made.
        """
        x, streams, maps = self.seam("attn", residual)
        entries = None if replay is None else replay.entries
        x, cache, entries = self.attn(x, inputs, cache, entries, record=record)
        x, streams, maps = self.seam("ffn", Residual(streams, x, maps))
        x, routing = self.ffn(x, inputs, None if replay is None else replay.experts)
        choices = Choices(routing.experts, entries) if record else None
        return Residual(streams, x, maps), cache, LayerMetrics(routing.load, routing.balance, choices)

    def seam(self, name: str, residual: Residual) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Writes what is pending and reads the sublayer's normed input: the input, the streams, its maps."""
        fn, base, scale = (getattr(self, f"hc_{name}_{part}")[...] for part in ("fn", "base", "scale"))
        norm: RMSNorm = getattr(self, f"{name}_norm")
        return ops.hyper_connection_seam(
            residual.out, residual.streams, residual.maps, fn, base, scale, norm.weight[...],
            iterations=self.config.hc_sinkhorn_iters, eps=self.config.hc_eps, norm_eps=norm.eps,
        )  # fmt: skip


class HeadMixer(nnx.Module):
    """Base of the two places where streams collapse for the head: the transformer and an MTP block (§3.3).

    A base class, not a child module, so that parameter paths equal the official names.
    """

    def _init_mixer(self, config: ModelConfig, declare: Declare) -> None:
        count = config.hc_mult
        self.hc_head_fn = declare(
            (count, count * config.hidden_size), axes=(None, None), role=Role.MATRIX, init=Normal(0.02)
        )
        self.hc_head_base = declare((count,), axes=(None,), role=Role.BIAS, init=Constant(0.0))
        self.hc_head_scale = declare((1,), axes=(None,), role=Role.GAIN, init=Constant(1.0))

    def _collapse(
        self, config: ModelConfig, norm: RMSNorm, residual: Residual
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S C D"]]:
        """What the head reads, normed, and the streams with everything written."""
        x, streams = ops.hyper_connection_leave(
            residual.out, residual.streams, residual.maps, self.hc_head_fn[...], self.hc_head_base[...],
            self.hc_head_scale[...], norm.weight[...], eps=config.hc_eps, norm_eps=norm.eps,
        )  # fmt: skip
        return x, streams.reshape(*streams.shape[:2], config.hc_mult, -1)
