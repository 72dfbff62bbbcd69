"""Next-token cross entropy, for the backbone and for the MTP block, without logits of a whole batch in memory.

Logits are formed in float32 for a block of positions at a time. Where a gradient is wanted it is computed in the same
visit (softmax minus one-hot, times the head and times the hidden state), so nothing is formed twice and memory beyond
the gradients themselves does not grow with the sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DEFAULT_BLOCK_BYTES = 64 << 20


class TokenLoss(NamedTuple):
    """Sums over the tokens that a mask picks; divide by how many there are."""

    loss: Float[Array, ""]
    """Cross entropy in nats."""
    correct: Float[Array, ""]
    """Tokens that got the highest logit."""


def next_token_labels(
    tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"], *, ahead: int = 1
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """What position t should predict, and whether it counts.

    The label is the token `ahead` places later (1 for the head, 2 for MTP: architecture.md §11). It counts where both
    positions belong to the same document; padding (segment 0) and the last `ahead` tokens of a document do not.
    """
    labels = jnp.pad(tokens[:, ahead:], ((0, 0), (0, ahead)))
    later = jnp.pad(segment_ids[:, ahead:], ((0, 0), (0, ahead)))
    return labels, (segment_ids == later) & (segment_ids != 0)


def token_loss(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    *,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
) -> TokenLoss:
    """Cross entropy of `softmax(hidden · headᵀ)`, summed over the positions in `mask`.

    Args:
        hidden: states after the final norm, in any float dtype.
        head: the vocabulary matrix, in any float dtype; logits are float32 (architecture.md §10).
        labels: int32 ids below V.
        mask: positions that count; what the others hold is never read.
        block_bytes: float32 logits held at once, at least those of one position of every row.

    Returns:
        float32 sums. Differentiable in `hidden` and `head`; `correct` has no gradient.
    """
    batch, length = labels.shape
    positions = max(1, min(length, block_bytes // (4 * head.shape[0] * batch)))
    loss, correct = _differentiable_sums(hidden, head, labels, mask, positions)
    return TokenLoss(loss, jax.lax.stop_gradient(correct))


def _sums(hidden: Array, head: Array, labels: Array, mask: Array, positions: int) -> tuple[Array, Array]:
    def visit(sums: tuple[Array, Array], block: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        loss, correct, _ = _block_loss(_logits(block[0], head), *block[1:])
        return (sums[0] + loss, sums[1] + correct), None

    sums, _ = _scan(visit, (jnp.float32(0), jnp.float32(0)), _blocks((hidden, labels, mask), positions))
    return sums


def _sums_forward(
    hidden: Array, head: Array, labels: Array, mask: Array, positions: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Besides the sums: their gradients, which the backward pass only scales."""

    def visit(carry: tuple[Array, Array, Array], block: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        x, label, is_counted = block
        logits = _logits(x, head)
        loss, correct, normaliser = _block_loss(logits, label, is_counted)
        is_label = label[..., None] == jnp.arange(head.shape[0])
        d_logits = jnp.where(is_counted[..., None], jnp.exp(logits - normaliser[..., None]) - is_label, 0.0)
        d_x = _einsum("bsv,vd->bsd", d_logits, head).astype(hidden.dtype)
        # The narrow operand comes first: XLA transposes that one in memory on CPU.
        d_head = _einsum("bsd,bsv->dv", jnp.where(is_counted[..., None], x, 0), d_logits).T
        return (carry[0] + loss, carry[1] + correct, carry[2] + d_head), d_x

    start = (jnp.float32(0), jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (loss, correct, d_head), d_blocks = _scan(visit, start, _blocks((hidden, labels, mask), positions))
    d_hidden = jnp.moveaxis(d_blocks, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
    return (loss, correct), (d_hidden, d_head.astype(head.dtype))


def _sums_backward(
    positions: int, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    del positions
    d_hidden, d_head = ((gradient * cotangents[0]).astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_head, None, None


_differentiable_sums = jax.custom_vjp(_sums, nondiff_argnums=(4,))
_differentiable_sums.defvjp(_sums_forward, _sums_backward)


def _scan(visit: Callable[[Any, Any], tuple[Any, Any]], start: Any, blocks: tuple[Array, ...]) -> tuple[Any, Any]:
    """`lax.scan`, without the loop where there is one block."""
    if blocks[0].shape[0] > 1:
        return jax.lax.scan(visit, start, blocks)
    end, out = visit(start, tuple(block[0] for block in blocks))
    return end, None if out is None else out[None]


def _blocks(arrays: tuple[Array, ...], positions: int) -> tuple[Array, ...]:
    """[B, S, …] → [blocks, B, positions, …]; what is added at the end is masked out by its zeros."""
    batch, length = arrays[0].shape[:2]
    count = -(-length // positions)

    def cut(array: Array) -> Array:
        padding = [(0, 0), (0, count * positions - length)] + [(0, 0)] * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, count, positions, *array.shape[2:]), 1, 0)

    return tuple(cut(array) for array in arrays)


def _block_loss(logits: Array, labels: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Summed loss, number correct, and log Σ exp per position."""
    highest = jnp.max(logits, axis=-1)
    normaliser = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1))
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = jnp.sum(jnp.where(mask, normaliser - of_label, 0.0))
    return loss, jnp.sum(mask & (of_label == highest), dtype=jnp.float32), normaliser


def _logits(hidden: Array, head: Array) -> Array:
    return _einsum("bsd,vd->bsv", hidden, head)


def _einsum(equation: str, left: Array, right: Array) -> Array:
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(equation, left, right, precision=jax.lax.Precision.HIGHEST)
