"""Tiny random checkpoints, in every spelling and storage that the reader takes."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from kernels_pallas.formats import encode_fp4, encode_fp8
from v4jax.checkpoint.names import (
    ParameterSpec,
    Section,
    Spelling,
    Storage,
    StoredTensor,
    section_parameters,
    sections,
    stored_tensors,
)
from v4jax.config import RELEASED_QUANTIZATION, AttentionKind, ModelConfig, RouterKind

# Sizes that divide neither 128 nor (inputs of the experts) 32; every kind of layer and router once or twice.
SIZES = dict(
    vocab_size=50,
    hidden_size=136,
    moe_intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=48,
    qk_rope_head_dim=16,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    index_n_heads=2,
    index_head_dim=32,
    layer_types=(AttentionKind.SLIDING, AttentionKind.CSA, AttentionKind.HCA, AttentionKind.CSA),
    mlp_layer_types=(RouterKind.HASH, RouterKind.HASH, RouterKind.TOPK, RouterKind.TOPK),
)


def plain_config(**changes: Any) -> ModelConfig:
    return ModelConfig.tiny(**(SIZES | changes))


def quantised_config(**changes: Any) -> ModelConfig:
    extra = json.dumps({"quantization_config": RELEASED_QUANTIZATION, "torch_dtype": "bfloat16"})
    return plain_config(**({"expert_dtype": "fp4", "extra": extra} | changes))


def random_section(config: ModelConfig, section: Section, seed: int = 0) -> dict[str, np.ndarray]:
    """Values that are exact in bfloat16 (float16, where not huge) as well; experts of a hash table distinct."""
    random = np.random.default_rng([seed, sections(config).index(section)])

    def values(parameter: ParameterSpec) -> np.ndarray:
        if parameter.storage is Storage.TABLE:
            scores = random.random((config.vocab_size, config.n_routed_experts))
            return scores.argsort(axis=-1)[:, : config.num_experts_per_tok].astype(np.int32)
        return random.standard_normal(parameter.shape).astype(ml_dtypes.bfloat16).astype(np.float32)

    return {parameter.key: values(parameter) for parameter in section_parameters(config, section)}


def random_model(config: ModelConfig, seed: int = 0) -> dict[Section, dict[str, np.ndarray]]:
    return {section: random_section(config, section, seed) for section in sections(config)}


def as_stored(
    config: ModelConfig,
    spelling: Spelling = Spelling.OFFICIAL,
    *,
    scale_dtype: str = "F8_E8M0",
    float_dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """The random model as files hold it: quantised as the config says, its other floats but router biases as asked."""
    files: dict[str, np.ndarray] = {}
    for section, tensors in random_model(config).items():
        if section[0] == "mtp" and spelling in (Spelling.SAVED, Spelling.TRANSFORMERS):
            continue  # transformers drops it
        whole: dict[str, tuple[Storage, StoredTensor, np.ndarray]] = {}
        for parameter in section_parameters(config, section):
            values, storage = tensors[parameter.key], parameter.storage
            slabs = values if storage is Storage.EXPERT else [values]
            for stored, slab in zip(stored_tensors(section, parameter, spelling), slabs, strict=True):
                empty = (storage, stored, np.zeros(stored.shape, values.dtype))
                target = whole.setdefault(stored.name, empty)[2]
                target = target if stored.slab is None else target[stored.slab]
                target[stored.rows or slice(None)] = slab
        for storage, stored, values in whole.values():
            files |= _encoded(config, storage, stored, values, scale_dtype, float_dtype)
    return files


def _encoded(
    config: ModelConfig, storage: Storage, stored: StoredTensor, values: np.ndarray, scale_dtype: str, float_dtype: Any
) -> dict[str, np.ndarray]:
    if storage is Storage.TABLE:
        return {stored.name: values.astype(np.int64)}
    if storage is Storage.EXPERT and config.expert_storage == "fp4":
        codes, scale = encode_fp4(values)
    elif storage in (Storage.EXPERT, Storage.DENSE) and config.quantization_config is not None:
        codes, scale = encode_fp8(values)
    else:
        return {stored.name: values if stored.name.endswith("bias") else values.astype(float_dtype)}
    scales = {"F8_E8M0": scale, "U8": scale.view(np.uint8), "F32": scale.astype(np.float32)}
    # The last of the accepted names is transformers' own.
    name = stored.scale_names[0 if stored.name.startswith(("layers", "mtp")) else -1]
    return {stored.name: codes, name: scales[scale_dtype]}


def write_hf_directory(path: Path, config: ModelConfig, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = list(tensors)
    parts = [names[start::shards] for start in range(shards)]
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path
