"""A tiny model with every mechanism, and its steps in few programs that compile fast: what the sharding tests share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from model.random_model import random_model, small_config

from v4jax import ops
from v4jax.cache import Cache
from v4jax.config import AttentionKind, ModelConfig, RouterKind
from v4jax.model.transformer import Transformer
from v4jax.sharding import Recipe, make_mesh, parse_mesh
from v4jax.train.loss import next_token_labels, token_loss

CONFIG: ModelConfig = small_config(
    num_hidden_layers=3,
    layer_types=(AttentionKind.CSA, AttentionKind.HCA, AttentionKind.HCA),
    mlp_layer_types=(RouterKind.HASH, RouterKind.TOPK, RouterKind.TOPK),
    num_attention_heads=8,
    o_groups=8,
    n_routed_experts=8,
    hc_mult=2,
    hc_sinkhorn_iters=2,
)
ROWS, LENGTH = 4, 128
STEPS = 40
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32)
# Optimising such programs takes most of a test's time and changes no result beyond rounding.
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def fast_jit(function: Callable[..., Any], **options: Any) -> Any:
    return jax.jit(function, compiler_options=_FAST, **options)


def packed_documents() -> np.ndarray:
    """Documents that begin and end on both sides of every shard's boundary, one alone, and padding."""
    segment_ids = np.ones((ROWS, LENGTH), np.int32)
    for row, starts in enumerate(((), (13, 31, 33, 66), (1, 2, 97), (64, 90))):
        for number, start in enumerate(starts):
            segment_ids[row, start:] = number + 2
    segment_ids[2, 121:] = 0
    return segment_ids


SEGMENTS = packed_documents()


def tiny_model(seed: int = 1) -> Transformer:
    return random_model(CONFIG, seed=seed)


def placed(model: Transformer, mesh: str, recipe: Recipe) -> Transformer:
    sizes = parse_mesh(mesh)
    return model.place(make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]), recipe)


class Result(NamedTuple):
    """Of one training step's forward and backward pass."""

    logits: Any
    mtp_logits: Any
    sums: dict[str, Any]
    gradients: dict[str, Any]


def _objective(model: Transformer, tokens: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, tuple]:
    """The objective of a step, with logits beside it."""
    output = model.hidden(tokens, segment_ids, remat=True)
    mtp_hidden = model.mtp_hidden(output.streams, tokens, segment_ids)
    padded = jnp.pad(mtp_hidden, ((0, 0), (0, 1), (0, 0)))
    sums: dict[str, Any] = {"expert_load": output.expert_load, "balance": output.balance}
    for name, hidden, ahead in (("main", output.hidden, 1), ("mtp", padded, 2)):
        labels, mask = next_token_labels(tokens, segment_ids, ahead=ahead)
        loss = token_loss(hidden, model.head_weight, labels, mask, placement=model.placement, block_bytes=1 << 14)
        sums |= {f"{name}_loss": loss.loss, f"{name}_correct": loss.correct}
    total = sums["main_loss"] + 0.3 * sums["mtp_loss"] + 0.1 * jnp.sum(output.balance)
    return total, (model.logits(output.hidden), model.logits(mtp_hidden), sums)


@fast_jit
def _train(model: Transformer, tokens: jax.Array, segment_ids: jax.Array) -> tuple:
    return jax.value_and_grad(_objective, has_aux=True, allow_int=True)(model, tokens, segment_ids)


def train(model: Transformer, tokens: np.ndarray = TOKENS, segment_ids: np.ndarray = SEGMENTS) -> Result:
    """Logits, sums and the gradient of every parameter."""
    with ops.implementations(("sparse_attention=reference", "index_topk=reference")):
        (_, (logits, mtp_logits, sums)), gradient = _train(model, tokens, segment_ids)
    leaves = jax.tree_util.tree_flatten_with_path(gradient)[0]
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves if leaf.dtype == jnp.float32}
    return Result(np.asarray(logits), np.asarray(mtp_logits), jax.tree.map(np.asarray, sums), named)


@functools.partial(fast_jit, donate_argnums=2)
def _prefill(model: Transformer, tokens: jax.Array, cache: Cache, lengths: jax.Array | None) -> tuple:
    before = cache.length
    output, cache = model.extend(tokens, cache, lengths)
    hidden, cache = model.extend_mtp(tokens, output.streams, before, cache, lengths)
    return model.logits(output.hidden), model.logits(hidden), cache


@functools.partial(fast_jit, donate_argnums=2)
def _step(model: Transformer, tokens: jax.Array, cache: Cache) -> tuple:
    return model.decode_step(tokens, cache)


def generate(
    model: Transformer, chunks: tuple[int, ...], lengths: np.ndarray, steps: int = STEPS
) -> tuple[list[np.ndarray], np.ndarray]:
    """Prefills rows of unequal lengths in chunks, then decodes.

    Returns:
      Logits of every chunk [B, S, V], and of the steps [steps, B, V].
    """
    cache = model.init_cache(len(lengths), int(lengths.max()) + steps)
    prefilled, start = [], 0
    for size in chunks:
        count = np.clip(lengths - start, 0, size).astype(np.int32)
        logits, mtp_logits, cache = _prefill(model, TOKENS[: len(lengths), start : start + size], cache, count)
        prefilled += [np.asarray(logits), np.asarray(mtp_logits)]
        start += size
    rows, decoded = np.arange(len(lengths)), []
    for step in range(steps):
        logits, cache = _step(model, jnp.asarray(TOKENS[rows, (lengths + step) % LENGTH]), cache)
        decoded.append(np.asarray(logits))
    return prefilled, np.stack(decoded)
