"""Next-token cross entropy, for the backbone and for the MTP block, without logits of a whole batch in memory.

Logits are formed in float32 for a block of positions at a time. Where a gradient is wanted it is computed in the same
visit (softmax minus one-hot, times the head and times the hidden state), so nothing is formed twice and memory beyond
the gradients themselves does not grow with the sequence.

On a mesh each device holds some rows of the vocabulary matrix, as everywhere in training (`v4jax.sharding`). The tokens
of a block come to them; neither the matrix nor a logit travels, only each token's maximum, sum and own logit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from v4jax import parallel, sharding
from v4jax.model.inputs import numbered_documents
from v4jax.sharding import Names, Placement

DEFAULT_BLOCK_BYTES = 64 << 20
_TILE = 128


class _Axes(NamedTuple):
    """Mesh axes of a running step; all empty on one device."""

    tokens: Names = ()
    """What divides the tokens."""
    vocabulary: Names = ()
    """What divides the vocabulary matrix."""

    @property
    def shared(self) -> Names:
        """Axes whose devices have different tokens and different rows of the matrix: the tokens come together."""
        return tuple(name for name in self.vocabulary if name in self.tokens)

    @property
    def all(self) -> Names:
        return self.tokens + tuple(name for name in self.vocabulary if name not in self.tokens)


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
    documents = numbered_documents(segment_ids)
    later = jnp.pad(documents[:, ahead:], ((0, 0), (0, ahead)))
    return labels, (documents == later) & (documents != 0)


def token_loss(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    *,
    placement: Placement | None = None,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
) -> TokenLoss:
    """Cross entropy of `softmax(hidden · headᵀ)`, summed over the positions in `mask`.

    Args:
        hidden: states after the final norm, in any float dtype.
        head: the vocabulary matrix, in any float dtype; logits are float32 (architecture.md §10).
        labels: int32 ids below V.
        mask: positions that count; what the others hold is never read.
        placement: where a model's arrays lie, if on a mesh.
        block_bytes: float32 logits held at once per device, at least those of one position of every row.

    Returns:
        float32 sums. Differentiable in `hidden` and `head`; `correct` has no gradient.
    """
    if placement is None:
        loss, correct = _local_loss(hidden, head, labels, mask, _Axes(), block_bytes)
    else:
        loss, correct = _placed_loss(hidden, head, labels, mask, placement, block_bytes)
    return TokenLoss(loss, jax.lax.stop_gradient(correct))


def _placed_loss(
    hidden: Array, head: Array, labels: Array, mask: Array, placement: Placement, block_bytes: int
) -> tuple[Array, Array]:
    batch, length = labels.shape
    rows, sequence = placement.dividing("batch", batch), placement.live(placement.rules.compute["sequence"])
    if length % placement.size(sequence):
        sequence = ()
    division = sharding.divide(head.shape, ("head_vocab", None), placement)
    axes = _Axes(rows + sequence, division.compute[0])

    def local(hidden: Array, head: Array, labels: Array, mask: Array) -> tuple[Array, Array]:
        return _local_loss(hidden, head, labels, mask, axes, block_bytes)

    tokens = PartitionSpec(sharding.axis_entry(rows), sharding.axis_entry(sequence))
    in_specs, everywhere = (tokens, division.spec(2), tokens, tokens), PartitionSpec()
    mapped = jax.shard_map(
        local, mesh=placement.mesh, in_specs=in_specs, out_specs=(everywhere, everywhere), check_vma=False
    )
    return mapped(hidden, head, labels, mask)


def _local_loss(
    hidden: Array, head: Array, labels: Array, mask: Array, axes: _Axes, block_bytes: int
) -> tuple[Array, Array]:
    """The sums over all devices' tokens, from one device's tokens and rows of the matrix."""
    batch, length = labels.shape
    gathered = batch * (jax.lax.axis_size(axes.shared) if axes.shared else 1)
    positions = block_bytes // (4 * head.shape[0] * gathered)
    # Whole tiles of the matrix units, where there is room for one.
    positions -= positions % _TILE if positions > _TILE else 0
    positions = max(1, min(length, positions))
    return _differentiable_sums(hidden, head, labels, mask, positions, axes)


def _come_together(block: tuple[Array, Array, Array], head: Array, axes: _Axes) -> tuple[Array, Array, Array]:
    """A block of all tokens that concern this device's rows of the matrix, with labels among these rows."""
    x, label, is_counted = (parallel.join(a, axes.shared, 0) for a in block)
    if axes.vocabulary:
        label = label - parallel.index(axes.vocabulary) * head.shape[0]
    return x, label, is_counted


def _sums(hidden: Array, head: Array, labels: Array, mask: Array, positions: int, axes: _Axes) -> tuple[Array, Array]:
    def visit(sums: tuple[Array, Array], block: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        x, label, is_counted = _come_together(block, head, axes)
        loss, correct, _ = _block_loss(_logits(x, head), label, is_counted, axes.vocabulary)
        return (sums[0] + loss, sums[1] + correct), None

    sums, _ = _scan(visit, (jnp.float32(0), jnp.float32(0)), _blocks((hidden, labels, mask), positions))
    return _total(sums, axes)


def _total(sums: tuple[Array, Array], axes: _Axes) -> tuple[Array, Array]:
    """Sums over all tokens: the devices of a vocabulary have the same ones already."""
    others = tuple(name for name in axes.tokens if name not in axes.vocabulary)
    return parallel.add(sums[0], others), parallel.add(sums[1], others)


def _sums_forward(
    hidden: Array, head: Array, labels: Array, mask: Array, positions: int, axes: _Axes
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Besides the sums: their gradients, which the backward pass only scales."""
    # A bfloat16 gradient keeps 8 of the 16 bits to which these products are then exact, in half the passes.
    precision = jax.lax.Precision.HIGH if hidden.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

    def visit(carry: tuple[Array, Array, Array], block: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        x, label, is_counted = _come_together(block, head, axes)
        logits = _logits(x, head)
        loss, correct, normaliser = _block_loss(logits, label, is_counted, axes.vocabulary)
        is_label = label[..., None] == jnp.arange(head.shape[0])
        d_logits = jnp.where(is_counted[..., None], jnp.exp(logits - normaliser[..., None]) - is_label, 0.0)
        d_x = _einsum("bsv,vd->bsd", d_logits, head, precision)
        if axes.shared:
            d_x = jax.lax.psum_scatter(d_x, axes.shared, scatter_dimension=0, tiled=True)
        d_x = d_x.astype(hidden.dtype)
        # The narrow operand comes first: XLA transposes that one in memory on CPU.
        d_head = _einsum("bsd,bsv->dv", jnp.where(is_counted[..., None], x, 0), d_logits, precision).T
        return (carry[0] + loss, carry[1] + correct, carry[2] + d_head), d_x

    start = (jnp.float32(0), jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (loss, correct, d_head), d_blocks = _scan(visit, start, _blocks((hidden, labels, mask), positions))
    d_hidden = jnp.moveaxis(d_blocks, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
    return _total((loss, correct), axes), (d_hidden, d_head.astype(head.dtype))


def _sums_backward(
    positions: int, axes: _Axes, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    del positions
    # Every device of these axes returned the same sum: together their cotangents are its cotangent.
    cotangent = parallel.add(cotangents[0], axes.all)
    d_hidden, d_head = ((gradient * cotangent).astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_head, None, None


_differentiable_sums = jax.custom_vjp(_sums, nondiff_argnums=(4, 5))
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
    count = max(-(-length // positions), 1)

    def cut(array: Array) -> Array:
        padding = [(0, 0), (0, count * positions - length)] + [(0, 0)] * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, count, positions, *array.shape[2:]), 1, 0)

    return tuple(cut(array) for array in arrays)


def _block_loss(logits: Array, labels: Array, mask: Array, vocabulary: Names = ()) -> tuple[Array, Array, Array]:
    """Summed loss, number correct, and log Σ exp per position; labels outside this device's rows are elsewhere."""
    highest = parallel.highest(jnp.max(logits, axis=-1), vocabulary)
    normaliser = highest + jnp.log(parallel.add(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1), vocabulary))
    if vocabulary:
        is_here = (labels >= 0) & (labels < logits.shape[-1])
        own = jnp.take_along_axis(logits, jnp.where(is_here, labels, 0)[..., None], axis=-1)[..., 0]
        of_label = parallel.add(jnp.where(is_here, own, 0.0), vocabulary)
    else:
        of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = jnp.sum(jnp.where(mask, normaliser - of_label, 0.0))
    return loss, jnp.sum(mask & (of_label == highest), dtype=jnp.float32), normaliser


def _logits(hidden: Array, head: Array) -> Array:
    return _einsum("bsd,vd->bsv", hidden, head)


def _einsum(
    equation: str, left: Array, right: Array, precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
) -> Array:
    return jnp.einsum(equation, left.astype(jnp.float32), right.astype(jnp.float32), precision=precision)
