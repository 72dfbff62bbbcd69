"""One decoder layer: attention, then experts, each between a read and a write of the residual streams."""

from typing import NamedTuple

import jax
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
        """The streams after this layer, its cache, and its metrics.

        Args:
          cache: the layer's state if the tokens continue one, else None.
          replay: choices to use instead of the router's and the indexer's.
          record: whether to return the choices made.
        """
        x, maps = self._read("attn", streams)
        selection = None if replay is None else replay.entries
        x, cache, selection = self.attn(self.attn_norm(x), inputs, cache, selection)
        streams = ops.hyper_connection_write(x, streams, maps)
        x, maps = self._read("ffn", streams)
        x, routing = self.ffn(self.ffn_norm(x), inputs, None if replay is None else replay.experts)
        streams = ops.hyper_connection_write(x, streams, maps)
        choices = Choices(routing.experts, selection) if record else None
        return streams, cache, LayerMetrics(routing.load, routing.balance, choices)

    def _read(self, name: str, streams: jax.Array) -> tuple[jax.Array, ops.Maps]:
        fn, base, scale = (getattr(self, f"hc_{name}_{part}")[...] for part in ("fn", "base", "scale"))
        return ops.hyper_connection_read(
            streams, fn, base, scale, iterations=self.config.hc_sinkhorn_iters, eps=self.config.hc_eps,
            norm_eps=self.config.rms_norm_eps,
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

    def _mix(self, config: ModelConfig, streams: Float[Array, "B S C D"]) -> Float[Array, "B S D"]:
        return ops.hyper_connection_head(
            streams, self.hc_head_fn[...], self.hc_head_base[...], self.hc_head_scale[...], eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )  # fmt: skip
