"""A model directory with a byte tokenizer, and texts, for whole training runs of seconds."""

from pathlib import Path

import numpy as np
import tokenizers
from model.random_model import random_tensors, small_config

from v4jax.checkpoint.writer import save_model
from v4jax.config import AttentionKind, ModelConfig, RouterKind
from v4jax.train.recipes import TrainOptions

SETTINGS = TrainOptions(
    steps=6,
    warmup_steps=1,
    batch_size=2,
    sequence_length=24,
    learning_rate=1e-3,
    bias_update_speed=1e-3,
    eval_every=3,
    save_every=2,
    held_out_tokens=200,
    held_out_fraction=0.3,
)


def run_config(vocab_size: int = 258) -> ModelConfig:
    return small_config(
        vocab_size=vocab_size,
        num_hidden_layers=2,
        layer_types=(AttentionKind.CSA, AttentionKind.HCA),
        mlp_layer_types=(RouterKind.HASH, RouterKind.TOPK),
    )


def write_model(path: Path, config: ModelConfig | None = None) -> Path:
    """Random weights, and a tokenizer of 256 bytes and the two end tokens, ids 0 and 1."""
    config = config or run_config()
    tensors = random_tensors(config, seed=0)
    layers = (tensors["layers", n] for n in range(config.num_hidden_layers))
    mtp = (tensors["mtp", n] for n in range(config.num_mtp_layers))
    save_model(path, config, tensors["top"], layers, mtp)
    ends = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*ends, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(ends)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_texts(path: Path) -> Path:
    path.mkdir(parents=True)
    words = np.asarray(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"])
    rng = np.random.default_rng(0)
    for n in range(40):
        (path / f"{n:02d}.txt").write_text(" ".join(rng.choice(words, rng.integers(3, 30))) + "\n")
    return path
