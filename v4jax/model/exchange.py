"""Expert parallelism: each device of the axis `expert` holds some experts, and tokens come to them.

Three forms with one result, no token ever dropped:

- the devices of `expert` hold the same tokens: each applies its experts, and the results are added;
- they hold different tokens, few of them: every device gathers all, applies its experts, and the sums are scattered;
- they hold different tokens, many of them: each token travels to the devices that hold its experts, once each, and
  back. Buffers have room for every token at every device, so any routing fits; on TPU only the rows in use travel.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax import ops, parallel
from v4jax.sharding import Names

GATHER_TOKENS = 512
"""Up to this many tokens over all devices of `expert` are gathered: latency, not volume, is then the cost, and one
gather and one scatter replace five exchanges."""
_BUFFER_BYTES = 256 << 20
"""Of tokens in exchange at a time; longer runs of tokens go in several rounds."""


def routed_experts(
    x: Float[Array, "T D"],
    w1: ops.ExpertStack,
    w3: ops.ExpertStack,
    w2: ops.ExpertStack,
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    limit: float,
) -> Float[Array, "T D"]:
    """`ops.grouped_experts` of this device's tokens, where it may hold only E of the experts that `experts` names.

    Returns:
      [T, D] float32. Where expert matrices are divided over `tensor` too, this device's part of the sum over it.
    """
    names = parallel.axes("experts")
    count, devices = w1.shape[0], parallel.device_count(names)
    # Every device's share of the picks that its group of devices makes.
    is_apart = bool(set(names) & set(parallel.token_axes()))
    picks = experts.size * (1 if is_apart else 1 / devices)
    compute = functools.partial(_local_experts, matrices=(w1, w3, w2), limit=limit, picks=picks)
    if not names:
        return compute(x, experts, weights)
    if not is_apart:
        return parallel.add(compute(x, _own(experts, parallel.index(names), count), weights), names)
    if x.shape[0] * devices <= GATHER_TOKENS:
        x, experts, weights = (parallel.join(a, names, 0) for a in (x, experts, weights))
        out = compute(x, _own(experts, parallel.index(names), count), weights)
        return jax.lax.psum_scatter(out, names, scatter_dimension=0, tiled=True)
    rounds = _rounds(x, devices)
    compute = functools.partial(compute, picks=picks / rounds)
    travel = functools.partial(_exchange, compute=compute, count=count, names=names, devices=devices)
    if rounds == 1:
        return travel((x, experts, weights))
    parts = tuple(a.reshape(rounds, -1, *a.shape[1:]) for a in (x, experts, weights))
    return jax.lax.map(jax.checkpoint(travel), parts).reshape(x.shape)


def _local_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    *,
    matrices: tuple[ops.ExpertStack, ...],
    limit: float,
    picks: float,
) -> jax.Array:
    return ops.grouped_experts(x, *matrices, experts, weights, limit=limit, expected_picks=picks)


def _rounds(x: jax.Array, devices: int) -> int:
    """The fewest equal parts of the tokens whose buffers stay within bounds."""
    tokens, width = x.shape
    size = devices * width * x.dtype.itemsize
    return next(
        n for n in range(1, tokens + 1) if tokens % n == 0 and (tokens // n * size <= _BUFFER_BYTES or n == tokens)
    )


def _own(experts: jax.Array, device: jax.Array, count: int) -> jax.Array:
    """Local numbers of the experts of one device; `count`, which names none, for the others'."""
    return jnp.where(experts // count == device, experts - device * count, count)


def _exchange(
    parts: tuple[jax.Array, ...],
    *,
    compute: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    count: int,
    names: Names,
    devices: int,
) -> jax.Array:
    """Tokens to the devices of their experts, and their sums back."""
    x, experts, weights = parts
    tokens = x.shape[0]
    device = jnp.arange(devices)[:, None, None]
    is_wanted = jnp.any(experts // count == device, axis=-1)
    # Row j for a device is the j-th token that wants it.
    order = jnp.argsort(~is_wanted, axis=1, stable=True)
    sent = jnp.sum(is_wanted, axis=1, dtype=jnp.int32)
    is_row = jnp.arange(tokens) < sent[:, None]
    received = jax.lax.all_to_all(sent, names, 0, 0, tiled=True)
    # A row that nobody sends arrives as zeros, so local experts travel as 1 + number.
    number = jnp.where(is_row[..., None], (1 + _own(experts, device, count)[jnp.arange(devices)[:, None], order]), 0)
    move = functools.partial(_move, names=names, devices=devices)
    number = move(number, sent, received).reshape(devices * tokens, -1)
    number = jnp.where(number > 0, number - 1, count)
    share = move(weights[order], sent, received).reshape(devices * tokens, -1)
    rows = move(x[order], sent, received).reshape(devices * tokens, -1)
    out = compute(rows, number, share).reshape(devices, tokens, -1)
    back = jnp.where(is_row[..., None], move(out, received, sent), 0)
    return jnp.zeros((tokens, back.shape[-1]), back.dtype).at[order].add(back)


def _move(rows: jax.Array, sent: jax.Array, received: jax.Array, *, names: Names, devices: int) -> jax.Array:
    """The first `sent[d]` of rows[d] to device d; the result's rows[s] are those of device s, then anything finite.

    Args:
      rows: [devices, T, …]. sent, received: int32 [devices], `received[s]` being what device s sends here.
    """
    shard = parallel.current()
    assert shard is not None
    if not shard.placement.has_ragged_exchange:
        return jax.lax.all_to_all(rows, names, 0, 0, tiled=True)
    (name,) = names
    tokens = rows.shape[1]
    flat = rows.reshape(devices * tokens, -1)
    first = jnp.arange(devices, dtype=jnp.int32) * tokens
    place = jnp.full(devices, jax.lax.axis_index(name) * tokens, jnp.int32)
    moved = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), first, sent, place, received, axis_name=name)
    return moved.reshape(rows.shape)
