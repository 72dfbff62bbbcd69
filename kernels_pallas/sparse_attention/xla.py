"""Window + compressed entries + sink by blocks of queries: differentiable, memory linear in the sequence.

A block of queries sees two blocks of window keys (its own and the one before) and either all entries, masked, or its
own gathered selection. The backward pass makes each block's weights again from its statistics, so nothing quadratic
is ever kept; on a CPU it has those over few keys from the forward pass, which is memory for time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.materialize import materialized
from kernels_pallas.sparse_attention.reference import unpacked_mask
from kernels_pallas.tpu import cdiv, current_platform

_MIN_BLOCK = 64
_ELEMENTS = 1 << 23
"""Scores over entries, or elements of gathered entries, that exist at a time: 32 MiB of float32."""
_KEPT_KEYS = 512
"""Weights over up to so many keys per query are kept for the backward pass on a CPU: a training step of the
137M-parameter model is 2 to 4 % faster for 5 % more memory."""
_PARTS = 2
"""Parts of a block of queries: each multiplies 1.5 blocks of window keys instead of 2; more parts cost more than they
save."""
GATHER_FROM = 8
"""Gathering pays once there are this many entries per selected one: a dense product wastes 8× the arithmetic, and a
gather costs about that much more per row than a contiguous read (measured on CPU; the same order on GPU)."""


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _logits(q: jax.Array, keys: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """[B, Q, N, K] of keys [B, K, H] that all queries share or [B, Q, K, H] their own; mask [B, Q, K]."""
    q, rest = (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)
    return jnp.where(mask[:, :, None], _product(f"bqnh,{_axes(keys)}->bqnk", q, keys) * rest, -jnp.inf)


def _axes(keys: jax.Array) -> str:
    return "bqkh" if keys.ndim == 4 else "bkh"


_Groups = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys, which are the values too, and their masks, as `_logits` takes them."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Float[Array, "B Q N H"], groups: _Groups, sink: Float[Array, " N"], scale: float) -> jax.Array:
    """One softmax over all groups of keys and the sink, without joining them."""
    return _attend_forward(q, groups, sink, scale)[0]


def _attend_forward(q: jax.Array, groups: _Groups, sink: jax.Array, scale: float) -> tuple[jax.Array, tuple]:
    logits = [_logits(q, keys, mask, scale) for keys, mask in groups]
    top = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1) for x in logits), sink)
    weights = [jnp.exp(x - top[..., None]) for x in logits]
    total = sum((jnp.sum(x, axis=-1) for x in weights), jnp.exp(sink - top))
    values = (
        _product(f"bqnk,{_axes(keys)}->bqnh", x.astype(q.dtype), keys)
        for x, (keys, _) in zip(weights, groups, strict=True)
    )
    out = (sum(values, jnp.zeros(())) / total[..., None]).astype(q.dtype)
    most = _KEPT_KEYS if current_platform() == "cpu" else 0
    own = [x / total[..., None] if x.shape[-1] <= most else None for x in weights]
    return out, (q, groups, sink, *checkpoint_name((out, top + jnp.log(total), own), _KEPT))


def _attend_backward(scale: float, saved: tuple, d_out: jax.Array) -> tuple[jax.Array, tuple, jax.Array]:
    q, groups, sink, out, log_total, kept = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_q, d_groups = jnp.zeros(()), []  # masks have no gradient
    for (keys, mask), weights in zip(groups, kept, strict=True):
        if weights is None:
            weights = jnp.exp(_logits(q, keys, mask, scale) - log_total[..., None])
        d_weights = _product(f"bqnh,{_axes(keys)}->bqnk", d_out, keys)
        d_logits = (weights * (d_weights - delta[..., None]) * scale).astype(q.dtype)
        weights, d_logits = materialized((weights.astype(q.dtype), d_logits))
        d_q = d_q + _product(f"bqnk,{_axes(keys)}->bqnh", d_logits, keys)
        d_keys = _product(f"bqnk,bqnh->{_axes(keys)}", d_logits, q)
        d_keys = d_keys + _product(f"bqnk,bqnh->{_axes(keys)}", weights, d_out)
        d_groups.append((d_keys.astype(keys.dtype), None))
    d_sink = -jnp.sum(jnp.exp(sink - log_total) * delta, axis=(0, 1))
    return d_q.astype(q.dtype), tuple(d_groups), d_sink.astype(sink.dtype)


_KEPT = "sparse_attention_output"
_attend.defvjp(_attend_forward, _attend_backward)


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
    sound_topk: int | None = None,
) -> Float[Array, "B S N H"]:
    """See `api.sparse_attention`."""
    batch, length, heads, dim = q.shape
    block = _PARTS * cdiv(max(window, _MIN_BLOCK), _PARTS)
    count = cdiv(length, block)
    size = 0 if entries is None else entries.shape[1]
    is_gathered = selection is not None and size > GATHER_FROM * selection.shape[-1]
    # Queries that are looked at together: what they touch, scores or gathered rows, stays within bounds.
    touched = heads * max(size, block)
    if is_gathered:
        assert selection is not None
        touched = max(selection.shape[-1] * dim, heads * block)
    inner = block // _PARTS
    while inner > 8 and inner % 2 == 0 and (batch * inner * touched > _ELEMENTS or inner >= 2 * length):
        inner //= 2
    queries = min(block, cdiv(length, inner) * inner)  # that are looked at, of each block

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
    distance = block + jnp.arange(inner)[:, None] - jnp.arange(block + inner)[None, :]
    band = (distance >= 0) & (distance < window)  # the same for every part: its keys begin where its queries do

    def attend_to(
        near: jax.Array, near_mask: jax.Array, q: jax.Array, position: jax.Array, segment: jax.Array, *chosen: jax.Array
    ) -> jax.Array:
        if entries is None:
            return _attend(q, ((near, near_mask),), sink, scale)
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
        return _attend(q, ((near, near_mask), (far, visible)), sink, scale)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
    def one_block(inputs: tuple[jax.Array, ...]) -> jax.Array:
        q_block, position, segment, key_a, key_b, segment_a, segment_b, *chosen = inputs
        near = jnp.concatenate([key_a, key_b], axis=1)
        near_segment = jnp.concatenate([segment_a, segment_b], axis=1)
        parts = []
        for i in range(0, queries, inner):
            # The keys that the windows of these queries touch: `block` before the first of them, to the last.
            touched, rows = slice(i, i + block + inner), slice(i, i + inner)
            per_query = (x[:, rows] for x in (q_block, position, segment, *chosen))
            mask = band & (near_segment[:, None, touched] == segment[:, rows, None])
            parts.append(attend_to(near[:, touched], mask, *per_query))
        return jnp.concatenate(parts, axis=1)

    inputs = (blocks_of(q), blocks_of(q_position), blocks_of(q_segment), before, own, before_segment, own_segment)
    if selection is not None:
        inputs = (*inputs, blocks_of(selection, -1))
    elif selection_mask is not None:
        inputs = (*inputs, blocks_of(selection_mask))
    out = one_block(tuple(x[0] for x in inputs))[None] if count == 1 else jax.lax.map(one_block, inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * queries, heads, dim)[:, :length]


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
    groups = ((ring, ring_valid[:, None]),)
    if entries is not None and visible is not None:
        groups = (*groups, (entries, visible[:, None]))
    return jnp.squeeze(_attend(q[:, None], groups, sink, scale), axis=1)
