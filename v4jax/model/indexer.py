"""The lightning indexer: which compressed entries a CSA query attends to (architecture.md §7)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.compressor import Compressor
from v4jax.model.params import Declare, Linear
from v4jax.model.rope import Rotation, over_heads, rotate
from v4jax.quant import simulate_index


class Indexer(nnx.Module):
    """Index queries and per-head weights of the tokens, and its own compressor for the index keys.

    Top-k carries no gradient, so a language-model loss gives every parameter here exactly zero.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, declare: Declare) -> None:
        self.heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.policy = declare.policy
        width = self.heads * self.head_dim
        self.wq_b = Linear(config.q_lora_rank, width, ("index_heads", "q_lora"), declare, released_in_fp8=True)
        self.weights_proj = Linear(config.hidden_size, self.heads, ("index_heads", "hidden"), declare)
        self.compressor = Compressor(config, spec, self.head_dim, declare, is_index=True)

    def queries(
        self, x: Float[Array, "B S D"], query_latent: Float[Array, "B S Q"], turn: Rotation
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N"]]:
        """Rotated index queries of this device's heads, and their weights with both scales (head_dim^−½ · heads^−½) in.

        Without the simulation the Hadamard rotation is left out on both sides: it is orthogonal and cancels.
        """
        q = self.wq_b(query_latent).reshape(*query_latent.shape[:2], -1, self.head_dim)
        q = rotate(q, over_heads(turn))
        if self.policy.quant_sim:
            q = simulate_index(q)
        scale = jnp.float32((self.head_dim * self.heads) ** -0.5)
        return q, self.weights_proj(x).astype(jnp.float32) * scale

    def needs_selection(self, entries: int) -> bool:
        """Whether `entries` can exceed what a query may see: otherwise every visible entry is selected."""
        return entries > self.topk
