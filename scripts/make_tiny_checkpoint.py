#!/usr/bin/env python3
"""Writes a small random V4 model in the released layout, with every mechanism of the real ones.

    python scripts/make_tiny_checkpoint.py DIRECTORY

Dense matrices are FP8 with a scale per 128×128 tile, experts FP4 with a scale per 32 inputs, the rest BF16, F32 and
I64, under the official names, in several shards. The tokenizer is trained on the sources of Python's standard library
and has V4's special tokens.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kernels_pallas.formats import encode_fp4, encode_fp8
from v4jax.chat import ASSISTANT, BOS, DSML, END_THINK, EOS, LATEST_REMINDER, TASKS, THINK, USER
from v4jax.checkpoint.names import ParameterSpec, Section, Storage, scale_key, section_parameters, sections
from v4jax.checkpoint.writer import Summary, write_hf
from v4jax.config import RELEASED_QUANTIZATION, AttentionKind, ModelConfig, RopeScaling, RouterKind
from v4jax.errors import UserError
from v4jax.train.text import TextSource

PAD = "<｜▁pad▁｜>"
SHARD_BYTES = 1_000_000


def tiny_config() -> ModelConfig:
    """Hash and top-k routers, both kinds of compressed layers, YaRN, MTP; widths that fill FP8 tiles."""
    csa, hca, sliding = AttentionKind.CSA, AttentionKind.HCA, AttentionKind.SLIDING
    return ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        swiglu_limit=10.0,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=32,
        layer_types=(sliding, csa, hca, csa),
        mlp_layer_types=(RouterKind.HASH,) * 3 + (RouterKind.TOPK,),
        sliding_window=64,
        rope_scaling=RopeScaling(factor=16, original_max_position_embeddings=65536),
        max_position_embeddings=65536,
        expert_dtype="fp4",
        extra=json.dumps({"quantization_config": RELEASED_QUANTIZATION, "torch_dtype": "bfloat16"}, sort_keys=True),
    )


# ---- tokenizer -------------------------------------------------------------------------------------------------------
def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE. Only BOS, EOS and padding are special; role and task tokens are merely added, as in V4's own."""
    added = [USER, ASSISTANT, THINK, END_THINK, DSML, LATEST_REMINDER, *(f"<｜{task}｜>" for task in TASKS)]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in added])
    return backend


# ---- weights ---------------------------------------------------------------------------------------------------------
def random_section(config: ModelConfig, section: Section, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Initial values: each matrix keeps the size of what it is given, each layer adds a little to the streams."""
    return {p.key: _initial_value(p, config, rng) for p in section_parameters(config, section)}


def _initial_value(parameter: ParameterSpec, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    key, shape = parameter.key, parameter.shape
    if parameter.storage is Storage.TABLE:
        experts = np.tile(np.arange(config.n_routed_experts), (shape[0], 1))
        return rng.permuted(experts, axis=1)[:, : shape[1]]
    if parameter.storage is Storage.NORM or key.endswith("_scale"):
        return np.ones(shape, np.float32)
    if parameter.storage is Storage.EXACT and not key.endswith("_fn"):
        return np.zeros(shape, np.float32)
    # Embeddings that the layers' sums do not drown, and a head near the uniform distribution: both save many steps.
    std = {"embed.weight": 1.0, "head.weight": 0.3 * shape[-1] ** -0.5}.get(key, shape[-1] ** -0.5)
    if key.endswith(("wo_b.weight", "w2.weight")):
        std /= 2
    return rng.standard_normal(shape, np.float32) * np.float32(std)


def released(config: ModelConfig, section: Section, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A section as the released files store it: FP8 and FP4 codes with their scales, BF16, F32 and I64."""
    stored = {}
    for parameter in section_parameters(config, section):
        key, values = parameter.key, tensors[parameter.key]
        match parameter.storage:
            case Storage.DENSE:
                stored[key], stored[scale_key(key)] = encode_fp8(values)
            case Storage.EXPERT:
                stored[key], stored[scale_key(key)] = encode_fp4(values)
            case Storage.TABLE:
                stored[key] = values.astype(np.int64)
            case Storage.EXACT:
                stored[key] = values.astype(np.float32)
            case Storage.PLAIN | Storage.NORM:
                stored[key] = values.astype(ml_dtypes.bfloat16)
    return stored


def write_checkpoint(path: Path, config: ModelConfig, tokenizer: tokenizers.Tokenizer, seed: int = 0) -> Summary:
    """Writes weights, configs and tokenizer into a new directory."""
    rng = np.random.default_rng(seed)

    def stream() -> Iterator[tuple[Section, dict[str, np.ndarray]]]:
        for section in sections(config):
            yield section, released(config, section, random_section(config, section, rng))

    summary = write_hf(path, config, stream(), max_shard_bytes=SHARD_BYTES)
    tokenizer.save(str(path / "tokenizer.json"))
    end = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(path / "generation_config.json", end | {"do_sample": True, "temperature": 1.0, "top_p": 1.0})
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings}
    _write_json(path / "tokenizer_config.json", kind | {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS})
    return summary


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="new or empty directory")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args()
    config = tiny_config()
    try:
        tokenizer = train_tokenizer(TextSource("stdlib").documents(), config.vocab_size)
        summary = write_checkpoint(options.directory, config, tokenizer, options.seed)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{summary.path}: {summary.tensors:,} tensors, {summary.nbytes:,} bytes in {len(summary.files)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
