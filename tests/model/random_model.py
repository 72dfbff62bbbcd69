"""Models with every parameter random: initial zeros and ones (sinks, biases, scales, `ape`) hide mistakes."""

import math

import numpy as np

from v4jax.checkpoint.names import ParameterSpec, Section, Storage, section_parameters, sections
from v4jax.config import AttentionKind, ModelConfig, RopeScaling, RouterKind
from v4jax.dtypes import DTypePolicy
from v4jax.model.transformer import Transformer

Tensors = dict[str, np.ndarray]
FLOAT32 = DTypePolicy.named("float32")


def small_config(**changes: object) -> ModelConfig:
    """Every mechanism: both routers, a repeated (HCA, CSA) unit to scan over, windows shorter than rows, MTP."""
    csa, hca, sliding = AttentionKind.CSA, AttentionKind.HCA, AttentionKind.SLIDING
    fields: dict = dict(
        vocab_size=96,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        head_dim=24,
        qk_rope_head_dim=8,
        q_lora_rank=20,
        o_groups=2,
        o_lora_rank=12,
        n_routed_experts=6,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        swiglu_limit=1.0,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=5,
        layer_types=(sliding, csa, hca, csa, hca, csa),
        mlp_layer_types=(RouterKind.HASH,) * 2 + (RouterKind.TOPK,) * 4,
        compress_rate_hca=16,
        sliding_window=12,
        rope_scaling=RopeScaling(factor=16, original_max_position_embeddings=64),
        max_position_embeddings=1024,
    )
    return ModelConfig(**fields | changes)


def random_tensors(config: ModelConfig, seed: int) -> dict[Section, Tensors]:
    """Flat dicts by section, as a checkpoint holds them; logits come out with a standard deviation near 1.5."""
    rng = np.random.default_rng(seed)
    return {
        section: {p.key: _random_value(p, config, rng) for p in section_parameters(config, section)}
        for section in sections(config)
    }


def build(config: ModelConfig, tensors: dict[Section, Tensors], policy: DTypePolicy = FLOAT32) -> Transformer:
    """The model that holds these tensors."""
    layers = (tensors["layers", n] for n in range(config.num_hidden_layers))
    return Transformer.from_tensors(
        config, policy, tensors["top"], layers, (tensors["mtp", n] for n in range(config.num_mtp_layers))
    )


def random_model(config: ModelConfig, seed: int = 0, policy: DTypePolicy = FLOAT32) -> Transformer:
    """A model with random tensors."""
    return build(config, random_tensors(config, seed), policy)


def _random_value(parameter: ParameterSpec, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    key, shape = parameter.key, parameter.shape
    if parameter.storage is Storage.TABLE:
        return rng.random((shape[0], config.n_routed_experts)).argsort(1)[:, : shape[1]].astype(np.int32)
    normal = rng.standard_normal(shape, np.float32)
    if parameter.storage is Storage.NORM or key.endswith("scale"):
        return 1 + 0.2 * normal
    if len(shape) == 1 or key.endswith(("ape", "embed.weight")):
        return 0.5 * normal
    return normal * np.float32((1.5 if key == "head.weight" else 1.0) / math.sqrt(shape[-1]))
