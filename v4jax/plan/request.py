"""What is to be planned, and the abstract model that it is about."""

import dataclasses
from typing import Any, Literal

from v4jax.config import ModelConfig
from v4jax.dtypes import DTypePolicy
from v4jax.loading import WeightsAtRunTime, native_weights
from v4jax.model.transformer import Transformer
from v4jax.plan.topology import Topology
from v4jax.sharding import MeshSizes
from v4jax.train.recipes import TrainOptions

Step = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One step of one model on one mesh of one slice."""

    config: ModelConfig
    topology: Topology
    step: Step
    context: int
    """Tokens of a row (train), of the prompt (prefill), or before the new token (decode)."""
    batch: int
    """Sequences of one step."""
    mesh: MeshSizes
    weights: WeightsAtRunTime = "native"
    chunk: int = 8192
    """Tokens of a sequence that one prefill step takes."""
    implementation: tuple[str, ...] = ()

    @property
    def policy(self) -> DTypePolicy:
        """bfloat16; in training float32 parameters, else with the simulation that the released weights want."""
        if self.step == "train":
            return DTypePolicy.named("bfloat16", param="float32")
        policy = DTypePolicy.named("bfloat16", quant_sim=self.config.expert_storage == "fp4")
        if self.weights == "native":
            policy = dataclasses.replace(policy, native=native_weights(self.config))
        return policy

    @property
    def train_options(self) -> TrainOptions:
        """Full fine-tuning with AdamW, every layer recomputed in the backward pass."""
        return TrainOptions(
            remat=True, dtype="bfloat16", sequence_length=self.context, batch_size=self.batch, warmup_steps=1
        )

    @property
    def tokens(self) -> int:
        """Tokens of every sequence that one step takes."""
        return {"train": self.context, "prefill": min(self.chunk, self.context), "decode": 1}[self.step]

    @property
    def steps_per_sequence(self) -> int:
        """Steps that make up a whole prompt; 1 but for prefill."""
        return -(-self.context // self.tokens) if self.step == "prefill" else 1

    @property
    def cache_length(self) -> int:
        """Tokens that the cache has room for."""
        return self.context if self.step != "decode" else self.context + 1

    def model(self) -> Transformer:
        """The model without arrays, stacked; in inference without MTP blocks, which these steps do not run."""
        config = self.config if self.step == "train" else self.config.without_mtp()
        return Transformer(config, self.policy, stacked=True)


def leaf_bytes(tree: Any) -> int:
    """Bytes of the arrays, or of what their shardings leave to each device."""
    import jax
    import numpy as np

    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total
