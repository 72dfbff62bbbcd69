"""A forward pass that holds the weights of one layer at a time, and of its experts one by one.

So a model can be run on a host whose memory holds neither the model nor a whole dequantised layer of it: only experts
that some token was sent to are read.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import ops
from v4jax.checkpoint.names import Section
from v4jax.checkpoint.reader import Checkpoint, ParameterDType
from v4jax.compilation import jit
from v4jax.config import layer_plan
from v4jax.dtypes import DTypePolicy
from v4jax.model.dots import full_dot
from v4jax.model.inputs import LayerInputs, full_inputs
from v4jax.model.layer import DecoderLayer, Residual
from v4jax.model.moe import Routing
from v4jax.model.mtp import next_tokens
from v4jax.model.params import Declare
from v4jax.model.tensors import fill
from v4jax.model.transformer import Transformer

_EXPERTS = "ffn.experts."
_LEAST_ROWS = 16


class StreamedLayer(NamedTuple):
    """What a layer made."""

    streams: jax.Array
    """[B, S, C, D] after it."""
    experts: np.ndarray
    """int32 [B, S, K]: where its router sent each token."""


class Stream:
    """One model, read layer by layer.

    Args:
        checkpoint: opened.
        policy: dtypes of parameters and arithmetic.
        tokens: int32 [B, S].
    """

    def __init__(self, checkpoint: Checkpoint, policy: DTypePolicy, tokens: np.ndarray) -> None:
        self._checkpoint, self._policy, self._tokens = checkpoint, policy, jnp.asarray(tokens)
        self._dtype: ParameterDType = "float32" if policy.param == jnp.float32 else "bfloat16"
        self.shell = Transformer(checkpoint.config, policy, stacked=False)
        fill(self.shell, checkpoint.top(self._dtype), skip=("segments", "mtp"))

    def layers(self) -> Iterator[StreamedLayer]:
        """The backbone's layers in order."""
        config = self._checkpoint.config
        inputs = full_inputs(config, self._tokens, None)
        streams = jnp.repeat(self.shell.embed(inputs.tokens)[:, :, None], config.hc_mult, axis=2)
        for n, spec in enumerate(layer_plan(config)):
            layer = DecoderLayer(config, spec, Declare(self._policy))
            result = self._run(layer, ("layers", n), streams, inputs)
            streams = result.streams
            yield result

    def logits(self, streams: jax.Array) -> np.ndarray:
        """float32 [B, S, V] of the streams after the last layer."""
        return np.asarray(self.shell.head_logits(streams))

    def mtp_logits(self, streams: jax.Array) -> np.ndarray:
        """float32 [B, S−1, V] of the first MTP block, from the streams after the last layer."""
        if self._tokens.shape[1] == 1:  # nothing follows
            return np.zeros((len(self._tokens), 0, self._checkpoint.config.vocab_size), np.float32)
        block = self.shell.mtp[0]
        inputs = full_inputs(self._checkpoint.config, self._tokens, None)
        following, segments = next_tokens(self._tokens, inputs.segments)
        inputs = full_inputs(self._checkpoint.config, self._tokens[:, :-1], segments)
        self._fill(block, ("mtp", 0))
        x = block.e_proj(block.enorm(self.shell.embed(following)))[:, :, None] + block.h_proj(
            block.hnorm(streams[:, :-1])
        )
        x = self._run(block, ("mtp", 0), x, inputs, is_filled=True).streams
        hidden, _ = block._collapse(self._checkpoint.config, block.norm, Residual.of(x))
        return np.asarray(self.shell.logits(hidden))

    # ---- one layer -----------------------------------------------------------------------------------------------
    def _fill(self, layer: DecoderLayer, section: Section) -> None:
        del layer.ffn.experts  # read one by one
        fill(layer, self._checkpoint.section(section, self._dtype, skip=_EXPERTS))

    def _run(
        self, layer: DecoderLayer, section: Section, streams: jax.Array, inputs: LayerInputs, *, is_filled: bool = False
    ) -> StreamedLayer:
        if not is_filled:
            self._fill(layer, section)
        x, flat, maps, routing = _until_experts(layer, streams, inputs)
        routed = self._routed(section, x.reshape(-1, x.shape[-1]), routing)
        streams = _after_experts(layer, x, flat, maps, routed.reshape(x.shape))
        return StreamedLayer(streams, np.asarray(routing.experts))

    def _routed(self, section: Section, x: jax.Array, routing: Routing) -> jax.Array:
        """float32 [T, D]: the sum over the chosen experts."""
        chosen = np.asarray(routing.experts).reshape(len(x), -1)
        weights = np.asarray(routing.weights).reshape(len(x), -1)
        total = jnp.zeros(x.shape, jnp.float32)
        for expert in np.unique(chosen):
            rows, slot = np.nonzero(chosen == expert)
            spare = max(_LEAST_ROWS, 1 << (len(rows) - 1).bit_length()) - len(rows)  # few sizes to compile
            rows, weight = np.pad(rows, (0, spare)), np.pad(weights[rows, slot], (0, spare))
            w1, w2, w3 = self._checkpoint.expert(section, int(expert), self._dtype)
            total = _add_expert(
                total, x, jnp.asarray(rows), jnp.asarray(weight), w1, w2, w3,
                self._checkpoint.config.swiglu_limit, self._policy.precision,
            )  # fmt: skip
        return total


@jit
def _until_experts(
    layer: DecoderLayer, streams: jax.Array, inputs: LayerInputs
) -> tuple[jax.Array, jax.Array, jax.Array, Routing]:
    """The experts' normed input, the streams, how to write to them, and the routing."""
    x, flat, maps = layer.seam("attn", Residual.of(streams))
    x = layer.attn(x, inputs, None, None)[0]
    x, flat, maps = layer.seam("ffn", Residual(flat, x, maps))
    return x, flat, maps, layer.ffn.gate(x, inputs)


@jit
def _after_experts(layer: DecoderLayer, x: jax.Array, flat: jax.Array, maps: jax.Array, routed: jax.Array) -> jax.Array:
    x = (routed + layer.ffn.shared_experts(x)).astype(x.dtype)
    return Residual(flat, x, maps).written(layer.config.hc_mult)


def _expert(
    x: jax.Array, weight: jax.Array, w1: jax.Array, w2: jax.Array, w3: jax.Array, limit, precision
) -> jax.Array:
    gate, up = (full_dot(x, w.astype(x.dtype), precision) for w in (w1, w3))
    hidden = (ops.swiglu(gate, up, limit) * weight[:, None]).astype(x.dtype)
    return full_dot(hidden, w2.astype(x.dtype), precision)


def _add_expert_rows(total, x, rows, weight, w1, w2, w3, limit, precision) -> jax.Array:
    # A row that only fills up has weight 0 and adds nothing.
    return total.at[rows].add(_expert(x[rows], weight, w1, w2, w3, limit, precision))


_add_expert = jit(_add_expert_rows, static_argnums=(7, 8))
