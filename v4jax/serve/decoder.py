"""Prefill and decode steps of one model, compiled once per shape and called with little overhead."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from v4jax.cache import Cache
from v4jax.compilation import jit
from v4jax.errors import UserError
from v4jax.model.transformer import Transformer
from v4jax.serve.sampling import sample, sequence_keys

_MIN_CHUNK = 16
MAX_STEPS = 32
"""Steps that one call of `Decoder.decode` may take."""


class Drawing(NamedTuple):
    """How the next tokens are drawn, and which of them end a sequence."""

    keys: jax.Array
    """One per sequence."""
    temperature: float | jax.Array
    top_p: float | jax.Array
    ends: Int[np.ndarray | Array, " E"]


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

    def decode(
        self, tokens: Int[np.ndarray, " B"], is_open: Bool[np.ndarray, " B"], cache: Cache, drawing: Drawing, count: int
    ) -> tuple[Int[Array, "N B"], Cache]:
        """Draws up to `count` more tokens of each sequence, fewer once all have ended. The cache given is consumed.

        One call for all of them: to start a program with hundreds of arrays takes over a millisecond, a fifth of a step
        of a small model, and on a TPU the host would be waited for after each token.

        Args:
            tokens: the last ones, which the model has yet to see.
            is_open: False for sequences that have ended.
            count: 1 to `MAX_STEPS`.

        Returns:
            The tokens of each step, in `MAX_STEPS` rows of which those of steps not taken hold 0, and the cache.
        """
        if not 1 <= count <= MAX_STEPS:
            raise ValueError(f"count: got {count}, need 1 to {MAX_STEPS}")
        return _decode(self._structure, self._leaves, tokens, is_open, cache, drawing, count)

    def lower_prefill(self, batch: int, length: int, max_length: int) -> jax.stages.Lowered:
        """The program of the first chunk of `batch` prompts of `length` tokens."""
        size = min(self.chunk, _bucket(length))
        tokens, count = jax.ShapeDtypeStruct((batch, size), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
        hidden = jax.ShapeDtypeStruct((batch, self.model.config.hidden_size), self.model.policy.compute)
        cache = jax.eval_shape(lambda: self.model.init_cache(batch, max_length))
        return _prefill.lower(self._structure, self._leaves, tokens, count, hidden, cache)

    def lower_decode(self, batch: int, max_length: int) -> jax.stages.Lowered:
        """The program of `decode`, whose loop a cost reader counts once: one step."""
        cache = jax.eval_shape(lambda: self.model.init_cache(batch, max_length))
        tokens, is_open = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.bool)
        keys = jax.eval_shape(lambda: sequence_keys(0, batch))
        drawing = Drawing(keys, 1.0, 1.0, np.zeros(1, np.int32))
        return _decode.lower(self._structure, self._leaves, tokens, is_open, cache, drawing, 1)


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


class _Loop(NamedTuple):
    """What one step of `_decode` hands to the next."""

    step: jax.Array
    last: jax.Array
    is_open: jax.Array
    cache: Cache
    tokens: jax.Array


@functools.partial(jit, static_argnums=0, donate_argnames="cache")
def _decode(
    structure: Any, leaves: tuple, tokens: jax.Array, is_open: jax.Array, cache: Cache, drawing: Drawing,
    count: jax.Array,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    model: Transformer = jax.tree.unflatten(structure, leaves)
    temperature, top_p = jnp.float32(drawing.temperature), jnp.float32(drawing.top_p)

    def goes_on(state: _Loop) -> jax.Array:
        return (state.step < count) & jnp.any(state.is_open)

    def one_step(state: _Loop) -> _Loop:
        logits, cache = model.decode_step(state.last, state.cache)
        last = sample(logits, drawing.keys, cache.length, temperature, top_p)
        is_open = state.is_open & ~jnp.isin(last, drawing.ends)
        return _Loop(state.step + 1, last, is_open, cache, state.tokens.at[state.step].set(last))

    start = _Loop(jnp.int32(0), tokens, is_open, cache, jnp.zeros((MAX_STEPS, *tokens.shape), jnp.int32))
    end = jax.lax.while_loop(goes_on, one_step, start)
    return end.tokens, end.cache


first_sample = jit(sample)
