"""Prefill and decode steps of one model, compiled once per shape and called with little overhead."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v4jax.cache import Cache
from v4jax.compilation import jit
from v4jax.errors import UserError
from v4jax.model.transformer import Transformer
from v4jax.serve.sampling import sample, sequence_keys

_MIN_CHUNK = 16


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses an empty batch, an empty prompt, and token ids outside the vocabulary."""
    if not prompts:
        raise UserError("prompts: got none, need at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise UserError(f"prompt {i}: token id {wrong}, need 0 to {vocab_size - 1}; use the model's own tokenizer")


class Decoder:
    """A model laid out for decoding: stacked on TPU, one set of arrays per layer elsewhere.

    Only arrays cross the jit boundary at each call, as a flat tuple: flattening the module would cost milliseconds.
    """

    def __init__(self, model: Transformer, *, chunk: int = 2048) -> None:
        """Prompts are prefilled in pieces of `chunk` tokens."""
        is_stacked = any(segment.stacked for segment in model.segments)
        if is_stacked and jax.default_backend() != "tpu":
            model = model.unstack()
        self.model, self.chunk = model, chunk
        leaves, self._structure = jax.tree.flatten(model)
        self._leaves = tuple(leaves)

    def prefill(self, prompts: Sequence[Sequence[int]], max_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Runs prompts of any lengths.

        Args:
            max_length: tokens that each sequence may have in all.

        Returns:
            Logits after each prompt's last token, and the cache.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, or a sequence beyond the model's context.
        """
        config = self.model.config
        check_prompts(prompts, config.vocab_size)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        if max_length > config.max_position_embeddings or lengths.max() > max_length:
            raise UserError(
                f"the prompt has {lengths.max()} tokens and the sequence may have {max_length}; the model's context is "
                f"{config.max_position_embeddings} tokens: shorten the prompt or ask for fewer new tokens"
            )
        cache = self.model.init_cache(len(prompts), max_length)
        hidden = jnp.zeros((len(prompts), config.hidden_size), self.model.policy.compute)
        for start in range(0, lengths.max(), self.chunk):
            size = min(self.chunk, _bucket(int(lengths.max()) - start))
            tokens = np.zeros((len(prompts), size), np.int32)
            count = np.clip(lengths - start, 0, size).astype(np.int32)
            for row, prompt in enumerate(prompts):
                tokens[row, : count[row]] = prompt[start : start + count[row]]
            hidden, cache = _prefill(self._structure, self._leaves, tokens, count, hidden, cache)
        return _head(self._structure, self._leaves, hidden), cache

    def step(self, tokens: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one more token of each sequence. The cache given is consumed."""
        return _step(self._structure, self._leaves, tokens, cache)

    def step_and_sample(
        self, tokens: Int[Array, " B"], cache: Cache, keys: jax.Array, temperature: float, top_p: float
    ) -> tuple[Int[Array, " B"], Cache]:
        """One more token of each sequence, and the drawn next one. The cache given is consumed."""
        return _step_and_sample(self._structure, self._leaves, tokens, cache, keys, temperature, top_p)

    def lower_prefill(self, batch: int, length: int, max_length: int) -> jax.stages.Lowered:
        """The program of the first chunk of `batch` prompts of `length` tokens."""
        size = min(self.chunk, _bucket(length))
        tokens, count = jax.ShapeDtypeStruct((batch, size), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
        hidden = jax.ShapeDtypeStruct((batch, self.model.config.hidden_size), self.model.policy.compute)
        cache = jax.eval_shape(lambda: self.model.init_cache(batch, max_length))
        return _prefill.lower(self._structure, self._leaves, tokens, count, hidden, cache)

    def lower_step_and_sample(self, batch: int, max_length: int) -> jax.stages.Lowered:
        """The program of `step_and_sample`."""
        cache = jax.eval_shape(lambda: self.model.init_cache(batch, max_length))
        tokens, keys = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.eval_shape(lambda: sequence_keys(0, batch))
        return _step_and_sample.lower(self._structure, self._leaves, tokens, cache, keys, 1.0, 1.0)


def _bucket(length: int) -> int:
    """The next power of two: prompts of similar lengths share one compiled program."""
    return max(_MIN_CHUNK, 1 << (length - 1).bit_length())


@functools.partial(jit, static_argnums=0, donate_argnames=("hidden", "cache"))
def _prefill(
    structure: Any, leaves: tuple, tokens: jax.Array, lengths: jax.Array, hidden: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One chunk; `hidden` keeps the state after each sequence's last token so far."""
    model: Transformer = jax.tree.unflatten(structure, leaves)
    output, cache = model.extend(tokens, cache, lengths)
    last = jnp.take_along_axis(output.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(lengths[:, None] > 0, last, hidden), cache


@functools.partial(jit, static_argnums=0)
def _head(structure: Any, leaves: tuple, hidden: jax.Array) -> jax.Array:
    return jax.tree.unflatten(structure, leaves).logits(hidden)


@functools.partial(jit, static_argnums=0, donate_argnames="cache")
def _step(structure: Any, leaves: tuple, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return jax.tree.unflatten(structure, leaves).decode_step(tokens, cache)


@functools.partial(jit, static_argnums=0, donate_argnames="cache")
def _step_and_sample(
    structure: Any, leaves: tuple, tokens: jax.Array, cache: Cache, keys: jax.Array, temperature: jax.Array,
    top_p: jax.Array,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    logits, cache = jax.tree.unflatten(structure, leaves).decode_step(tokens, cache)
    return sample(logits, keys, cache.length, jnp.float32(temperature), jnp.float32(top_p)), cache


first_sample = jit(sample)
