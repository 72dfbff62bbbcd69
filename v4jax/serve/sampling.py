"""The next token from logits: greedy, temperature, top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The released models recommend temperature 1 and top-p 1."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature: got {self.temperature}, need 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: got {self.top_p}, need a probability above 0 and at most 1")
        if not 0 <= self.seed < 2**32:  # JAX keeps 32 bits of a seed
            raise UserError(f"seed: got {self.seed}, need 0 or more, below 2^32")


def sequence_keys(seed: int, count: int) -> jax.Array:
    """One key per sequence, so that its draws do not depend on what else is in the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def sample(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    positions: Int[Array, " B"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    """Draws one token per sequence.

    Args:
        logits: float32.
        keys: one per sequence; folded with the sequence's position, so that a continued sequence draws the same.
        positions: tokens that each sequence has so far.
        temperature: 0 for greedy.
        top_p: the most likely token always stays.
    """

    def draw() -> jax.Array:
        # The likeliest first: what is exactly 0 stays 0 at any temperature.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        ordered = jnp.sort(jax.nn.softmax(scaled), axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        # The least probability that is kept: that of the last token whose predecessors stay below top_p.
        is_kept = (before < top_p) | (before == 0)  # a top_p that float32 rounds to 0 keeps the first
        floor = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True)
        kept = jnp.where(jax.nn.softmax(scaled) >= floor, scaled, -jnp.inf)
        return jax.vmap(lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row))(
            keys, positions, kept
        )

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)
