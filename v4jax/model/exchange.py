"""Expert parallelism: each device of the axis `expert` holds some experts, and tokens come to them.

Three forms with one result, no token ever dropped:

- the devices of `expert` hold the same tokens: each applies its experts, and the results are added;
- they hold different tokens, few of them: every device gathers all, applies its experts, and the sums are scattered;
- they hold different tokens, many of them: each travels to the devices of its experts and back (`travel`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax import ops, parallel
from v4jax.model import travel

GATHER_TOKENS = 512
"""Up to this many tokens over all devices of `expert` are gathered: latency, not volume, is then the cost, and one
gather and one scatter replace the exchanges."""


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
    matrices, structure = jax.tree.flatten((w1, w3, w2))
    # Every device's share of the picks that its group of devices makes.
    is_apart = bool(set(names) & set(parallel.token_axes()))
    picks = experts.size * (1 if is_apart else 1 / devices)
    compute = functools.partial(_local_experts, structure=structure, limit=limit)
    if not names:
        return compute(x, experts, weights, matrices, picks)
    if not is_apart:
        return parallel.add(compute(x, _own(experts, parallel.index(names), count), weights, matrices, picks), names)
    if x.shape[0] * devices <= GATHER_TOKENS:
        x, experts, weights = (parallel.join(a, names, 0) for a in (x, experts, weights))
        out = compute(x, _own(experts, parallel.index(names), count), weights, matrices, picks)
        return jax.lax.psum_scatter(out, names, scatter_dimension=0, tiled=True)
    shard = parallel.current()
    assert shard is not None
    exchange = travel.Exchange(compute, names, devices, count, shard.placement.has_ragged_exchange)
    return travel.routed(x, experts, weights, matrices, exchange)


def _local_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    matrices: list[jax.Array],
    picks: float,
    *,
    structure: Any,
    limit: float,
) -> jax.Array:
    w1, w3, w2 = jax.tree.unflatten(structure, matrices)
    return ops.grouped_experts(x, w1, w3, w2, experts, weights, limit=limit, expected_picks=picks)


def _own(experts: jax.Array, device: jax.Array, count: int) -> jax.Array:
    """Local numbers of the experts of one device; `count`, which names none, for the others'."""
    return jnp.where(experts // count == device, experts - device * count, count)
