"""A checkpoint with the real dimensions of V4-Flash: one CSA layer, one HCA layer, the top; random bytes, no holes."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from v4jax.checkpoint.names import TensorSpec, released_tensors
from v4jax.config import AttentionKind, ModelConfig, RouterKind


def flash_slice() -> ModelConfig:
    return dataclasses.replace(
        ModelConfig.flash(),
        num_hidden_layers=2,
        layer_types=(AttentionKind.CSA, AttentionKind.HCA),
        mlp_layer_types=(RouterKind.TOPK, RouterKind.TOPK),
        num_nextn_predict_layers=0,
        mtp_layer_types=(),
    )


def random_bytes(spec: TensorSpec, random: np.random.Generator) -> np.ndarray:
    """Any bytes that are no NaN, infinity or absurd scale in the dtype; uint8 [nbytes]."""
    content = np.frombuffer(random.bytes(spec.nbytes), np.uint8).copy()
    if spec.dtype == "F8_E4M3":
        content[content & 0x7F == 0x7F] ^= 1
    elif spec.dtype == "F8_E8M0":
        content = content % 40 + 100
    elif spec.dtype in ("BF16", "F32"):
        width = 2 if spec.dtype == "BF16" else 4
        content[width - 1 :: width] &= 0xBF  # below 2
    return content


def write_checkpoint(path: Path, config: ModelConfig, seed: int = 0, shard_bytes: int = 3_000_000_000) -> int:
    """Writes a sharded Hugging Face directory, a tensor in memory at a time; returns the bytes of its tensors."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    shards: list[list[TensorSpec]] = [[]]
    for spec in released_tensors(config):
        if sum(one.nbytes for one in shards[-1][-1:]) and sum(one.nbytes for one in shards[-1]) > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    random, weight_map = np.random.default_rng(seed), {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for spec in specs:
            end = offset + spec.nbytes
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            weight_map[spec.name], offset = name, end
        text = json.dumps(header).encode()
        with (path / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spec in specs:
                file.write(random_bytes(spec, random).data)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(spec.nbytes for specs in shards for spec in specs)
