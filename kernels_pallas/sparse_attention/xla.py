"""Window + compressed entries + sink by blocks of queries: differentiable, memory linear in the sequence.

A block of queries sees two blocks of window keys (its own and the one before) and either all entries, masked, or its
own gathered selection. Each block is recomputed in the backward pass, so nothing quadratic is ever kept.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.sparse_attention.reference import unpacked_mask
from kernels_pallas.tpu import cdiv

_MIN_BLOCK = 64
_ELEMENTS = 1 << 23
"""Scores over entries, or elements of gathered entries, that exist at a time: 32 MiB of float32."""
_PARTS = 2
"""Parts of a block of queries: each multiplies 1.5 blocks of window keys instead of 2; more parts cost more than they
save."""
GATHER_FROM = 8
"""Gathering pays once there are this many entries per selected one: a dense product wastes 8× the arithmetic, and a
gather costs about that much more per row than a contiguous read (measured on CPU; the same order on GPU)."""


def _attend_two(
    q: jax.Array,
    near: jax.Array,
    near_mask: jax.Array,
    far: jax.Array | None,
    far_mask: jax.Array | None,
    sink: jax.Array,
    scale: float,
) -> jax.Array:
    """Softmax over window keys, entries and the sink without joining the two key arrays.

    q [B, Q, N, H]; near [B, K, H], near_mask [B, Q, K]; far [B, P, H] shared by all queries or [B, Q, P, H] their own,
    far_mask [B, Q, P].
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)

    q = q * jnp.asarray(scale, q.dtype) if q.dtype == jnp.float32 else q
    rest = 1.0 if q.dtype == jnp.float32 else scale
    near_logits = jnp.where(near_mask[:, :, None], product("bqnh,bkh->bqnk", q, near) * rest, -jnp.inf)
    top = jnp.maximum(jnp.max(near_logits, axis=-1), sink)
    far_logits = jnp.zeros(())
    own = "q" if far is not None and far.ndim == 4 else ""
    if far is not None and far_mask is not None:
        far_logits = product(f"bqnh,b{own}ph->bqnp", q, far) * rest
        far_logits = jnp.where(far_mask[:, :, None], far_logits, -jnp.inf)
        top = jnp.maximum(top, jnp.max(far_logits, axis=-1))
    top = jax.lax.stop_gradient(top)[..., None]
    near_weights = jnp.exp(near_logits - top)
    total = jnp.sum(near_weights, axis=-1) + jnp.exp(sink - top[..., 0])
    out = product("bqnk,bkh->bqnh", near_weights.astype(q.dtype), near)
    if far is not None:
        far_weights = jnp.exp(far_logits - top)
        total = total + jnp.sum(far_weights, axis=-1)
        out = out + product(f"bqnp,b{own}ph->bqnh", far_weights.astype(q.dtype), far)
    return (out / total[..., None]).astype(q.dtype)


def _take(entries: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of [B, P, H] by [B, Q, K] → [B, Q, K, H]; −1 gives row 0, to be masked."""
    flat = jnp.maximum(index, 0).reshape(index.shape[0], -1, 1)
    return jnp.take_along_axis(entries, flat, axis=1).reshape(*index.shape, entries.shape[-1])


def _scatter_mask(selection: jax.Array, size: int) -> jax.Array:
    """[B, Q, K] indices → [B, Q, size] bool. −1 falls outside and is dropped."""
    batch, queries, _ = selection.shape
    row = jnp.arange(batch * queries).reshape(batch, queries, 1)
    mask = jnp.zeros((batch * queries, size), bool)
    column = jnp.where(selection < 0, size, selection)
    return mask.at[row, column].set(True, mode="drop").reshape(batch, queries, size)


def sparse_attention(
    q: Float[Array, "B S N H"],
    keys: Float[Array, "B WS H"],
    sink: Float[Array, " N"],
    q_position: Int[Array, "B S"],
    q_segment: Int[Array, "B S"],
    key_segment: Int[Array, "B WS"],
    entries: Float[Array, "B P H"] | None,
    entry_end: Int[Array, "B P"] | None,
    entry_segment: Int[Array, "B P"] | None,
    selection: Int[Array, "B S K"] | None,
    selection_mask: Int[Array, "B S D"] | None = None,
    *,
    window: int,
    scale: float,
    is_sound_selection: bool = False,
) -> Float[Array, "B S N H"]:
    """See `api.sparse_attention`."""
    batch, length, heads, dim = q.shape
    block = _PARTS * cdiv(max(window, _MIN_BLOCK), _PARTS)
    count = cdiv(length, block)
    size = 0 if entries is None else entries.shape[1]
    is_gathered = selection is not None and size > GATHER_FROM * selection.shape[-1]
    # Queries that are looked at together: what they touch, scores or gathered rows, stays within bounds.
    touched = heads * size
    if is_gathered:
        assert selection is not None
        touched = selection.shape[-1] * dim
    inner = block // _PARTS
    while inner > 8 and inner % 2 == 0 and batch * inner * touched > _ELEMENTS:
        inner //= 2

    def blocks_of(x: jax.Array, fill: int = 0) -> jax.Array:
        widths = [(0, 0), (0, count * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(padded.reshape(batch, count, block, *x.shape[2:]), 1, 0)

    # Window keys in blocks: those before the first query first, padded in front to a whole block.
    own, own_segment = blocks_of(keys[:, window:]), blocks_of(key_segment[:, window:], -1)
    lead = [(0, 0), (block - window, 0)]
    first = jnp.pad(keys[:, :window], [*lead, (0, 0)])[None]
    first_segment = jnp.pad(key_segment[:, :window], lead, constant_values=-1)[None]
    before = jnp.concatenate([first, own[:-1]])
    before_segment = jnp.concatenate([first_segment, own_segment[:-1]])
    distance = block + jnp.arange(block)[:, None] - jnp.arange(2 * block)[None, :]
    band = (distance >= 0) & (distance < window)

    def attend(
        near: jax.Array, near_mask: jax.Array, q: jax.Array, position: jax.Array, segment: jax.Array, *chosen: jax.Array
    ) -> jax.Array:
        if entries is None:
            return _attend_two(q, near, near_mask, None, None, sink, scale)
        assert entry_end is not None
        assert entry_segment is not None
        if is_gathered:
            end, owner = (_take(x[..., None], chosen[0])[..., 0] for x in (entry_end, entry_segment))
            far = _take(entries, chosen[0])
        else:
            end, owner, far = entry_end[:, None], entry_segment[:, None], entries
        visible = (end <= position[..., None]) & (owner == segment[..., None])
        if chosen:
            if is_gathered:
                visible &= chosen[0] >= 0
            else:
                visible &= unpacked_mask(chosen[0], size) if selection is None else _scatter_mask(chosen[0], size)
        return _attend_two(q, near, near_mask, far, visible, sink, scale)

    @jax.checkpoint
    def one_block(inputs: tuple[jax.Array, ...]) -> jax.Array:
        q_block, position, segment, key_a, key_b, segment_a, segment_b, *chosen = inputs
        near = jnp.concatenate([key_a, key_b], axis=1)
        near_segment = jnp.concatenate([segment_a, segment_b], axis=1)
        parts = []
        for i in range(0, block, inner):
            # The keys that the windows of these queries touch: `block` before the first of them, to the last.
            touched, rows = slice(i, i + block + inner), slice(i, i + inner)
            per_query = (x[:, rows] for x in (q_block, position, segment, *chosen))
            mask = band[rows, touched] & (near_segment[:, None, touched] == segment[:, rows, None])
            parts.append(attend(near[:, touched], mask, *per_query))
        return jnp.concatenate(parts, axis=1)

    inputs = (blocks_of(q), blocks_of(q_position), blocks_of(q_segment), before, own, before_segment, own_segment)
    if selection is not None:
        inputs = (*inputs, blocks_of(selection, -1))
    elif selection_mask is not None:
        inputs = (*inputs, blocks_of(selection_mask))
    out = one_block(tuple(x[0] for x in inputs))[None] if count == 1 else jax.lax.map(one_block, inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * block, heads, dim)[:, :length]


def sparse_attention_decode(
    q: Float[Array, "B N H"],
    ring: Float[Array, "B W H"],
    ring_valid: Bool[Array, "B W"],
    sink: Float[Array, " N"],
    entries: Float[Array, "B P H"] | None,
    visible: Bool[Array, "B P"] | None,
    selection: Int[Array, "B K"] | None,
    *,
    scale: float,
) -> Float[Array, "B N H"]:
    """See `api.sparse_attention_decode`."""
    if entries is not None and visible is not None and selection is not None:
        visible = visible & _scatter_mask(selection[:, None], entries.shape[1])[:, 0]
    far_mask = None if visible is None else visible[:, None]
    return _attend_two(q[:, None], ring, ring_valid[:, None], entries, far_mask, sink, scale)[:, 0]
