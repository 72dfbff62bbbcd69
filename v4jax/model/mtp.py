"""Multi-token prediction: one more block that sees the next token and predicts the one after (architecture.md §11)."""

import jax
from jaxtyping import Array, Float

from v4jax.cache import LayerCache
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.inputs import LayerInputs
from v4jax.model.layer import DecoderLayer, HeadMixer, LayerMetrics, Residual
from v4jax.model.params import Declare, Linear, RMSNorm


class MTPBlock(DecoderLayer, HeadMixer):
    """A decoder layer with its own input projection, head mixer and norm; embedding and head are the backbone's.

    Inherits the layer so that parameter paths equal the official names (`mtp.0.attn…` beside `mtp.0.e_proj`).
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, declare: Declare) -> None:
        super().__init__(config, spec, declare)
        hidden = config.hidden_size
        self.e_proj = Linear(hidden, hidden, ("hidden_out", "hidden"), declare, released_in_fp8=True)
        self.h_proj = Linear(hidden, hidden, ("hidden_out", "hidden"), declare, released_in_fp8=True)
        self.enorm = RMSNorm(hidden, config.rms_norm_eps, declare)
        self.hnorm = RMSNorm(hidden, config.rms_norm_eps, declare)
        self.norm = RMSNorm(hidden, config.rms_norm_eps, declare)
        self._init_mixer(config, declare)

    def predict(
        self,
        streams: Float[Array, "B S C D"],
        embedded: Float[Array, "B S D"],
        inputs: LayerInputs,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None, LayerMetrics]:
        """What the shared head reads to predict token t + 2.

        Args:
          streams: the backbone's streams after its last layer, at positions t.
          embedded: embedding of the tokens at t + 1.
          inputs: positions and documents of t.
        """
        x = self.e_proj(self.enorm(embedded))[:, :, None] + self.h_proj(self.hnorm(streams))
        residual, cache, metrics = self.advance(Residual.of(x), inputs, cache)
        return self._collapse(self.config, self.norm, residual)[0], cache, metrics


def next_tokens(tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens at t + 1 for t = 0 … S−2, and the documents of t, 0 where t + 1 is in another document."""
    here, after = segments[:, :-1], segments[:, 1:]
    return tokens[:, 1:], jax.numpy.where(here == after, here, 0)
