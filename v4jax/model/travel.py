"""Tokens travel to the devices of their experts and back, none dropped whatever the routing.

Every pick, a token and one of its experts, is a row. A device sorts its rows by expert, so that the rows for a device
lie together, and each device's rows arrive one sender after another. A round has room for somewhat more rows than an
even load brings; what exceeds it comes in further rounds, as many as the fullest device needs. The backward pass sends
the rows again instead of keeping them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import ops
from v4jax.sharding import Names

BUFFER_BYTES = 512 << 20
"""Of rows that one device sends at a time; longer runs of tokens go in several parts."""
_PART_MULTIPLE = 128
"""Tokens of a part: odd sizes are copied from one layout into another, which is slow to compile too."""
_ROOM = 1.125
"""Rows of a round over those of an even load."""
_ROW_MULTIPLE = 8

Compute = Callable[[jax.Array, jax.Array, jax.Array, Any, float], jax.Array]
"""(rows [R, D], experts [R, 1] by local number, weights [R, 1], matrices, rows with an expert under an even load)
→ float32 [R, D], any R."""


class Exchange(NamedTuple):
    """What does not change between parts and rounds. Hashable."""

    compute: Compute
    names: Names
    """Mesh axes of the exchange."""
    devices: int
    experts: int
    """Of one device."""
    is_ragged: bool
    """Whether the devices implement `ragged_all_to_all`; else buffers travel whole."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def routed(x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: Any, exchange: Exchange) -> jax.Array:
    """Σ over the picks of each token, computed where the experts are.

    Args:
      x: [T, D], this device's tokens.
      experts: int32 [T, K] numbers among all devices' experts; as many as there are, or more, names none.
      weights: float32 [T, K].
      matrices: of this device's experts, handed to `compute`.

    Returns:
      float32 [T, D]. Differentiable in x, weights and matrices where `compute` is.
    """

    def part(arguments: tuple[jax.Array, ...]) -> jax.Array:
        x, experts, weights = arguments
        return _there_and_back(x, experts, weights, matrices, exchange)

    return _joined(jax.lax.map(part, _split((x, experts, weights), exchange)), x.shape[0])


def _forward(
    x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: Any, exchange: Exchange
) -> tuple[jax.Array, tuple]:
    return routed(x, experts, weights, matrices, exchange), (x, experts, weights, matrices)


def _backward(exchange: Exchange, saved: tuple, d_out: jax.Array) -> tuple:
    x, experts, weights, matrices = saved

    def part(total: Any, arguments: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        x, experts, weights, d_out = arguments
        return _back_and_forth(x, experts, weights, matrices, d_out, total, exchange)

    total = jax.tree.map(lambda matrix: jnp.zeros(matrix.shape, jnp.float32), matrices)
    total, d_parts = jax.lax.scan(part, total, _split((x, experts, weights, d_out), exchange))
    d_x, d_weights = (_joined(d, x.shape[0]) for d in d_parts)
    d_matrices = jax.tree.map(lambda d, matrix: d.astype(matrix.dtype), total, matrices)
    return d_x.astype(x.dtype), np.zeros(experts.shape, jax.dtypes.float0), d_weights, d_matrices


routed.defvjp(_forward, _backward)


def _split(arrays: tuple[jax.Array, ...], exchange: Exchange) -> tuple[jax.Array, ...]:
    """Tokens in as few equal parts as keep their rows within bounds; what fills up the last one names no expert."""
    x, experts = arrays[:2]
    tokens = x.shape[0]
    parts = max(1, -(-tokens * experts.shape[1] * x.shape[1] * x.dtype.itemsize // BUFFER_BYTES))
    size = -(-tokens // min(parts, tokens))
    if parts > 1 and size > _PART_MULTIPLE:
        size = -(-size // _PART_MULTIPLE) * _PART_MULTIPLE

    def cut(array: jax.Array) -> jax.Array:
        fill = exchange.devices * exchange.experts if array is experts else 0
        padding = [(0, -tokens % size)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding, constant_values=fill).reshape(-1, size, *array.shape[1:])

    return tuple(map(cut, arrays))


def _joined(parts: jax.Array, tokens: int) -> jax.Array:
    return parts.reshape(-1, *parts.shape[2:])[:tokens]


# ---- who sends what to whom ------------------------------------------------------------------------------------------
class _Route(NamedTuple):
    """Of one part of the tokens; S senders, D = S receivers, both the devices of the exchange."""

    order: jax.Array
    """[P]: picks in the order of their experts."""
    slot: jax.Array
    """[T, K]: place of each pick in that order."""
    loads: jax.Array
    """int32 [S, count]: rows from each sender for each expert of this device."""
    sent: jax.Array
    """int32 [S, D]."""
    start: jax.Array
    """int32 [S, D]: place of each receiver's first row among a sender's."""
    offset: jax.Array
    """int32 [S, D]: place of each sender's first row among a receiver's."""
    me: jax.Array
    room: int
    """Rows that a device takes in one round."""

    @property
    def rounds(self) -> jax.Array:
        """Until the fullest device has seen all its rows."""
        return -(-jnp.max(jnp.sum(self.sent, axis=0)) // self.room)

    @property
    def expected(self) -> float:
        """Rounds under an even load."""
        return math.ceil(self.order.shape[0] / self.room)

    @property
    def expected_rows(self) -> float:
        """Rows that arrive in each of them."""
        return self.order.shape[0] / self.expected


class _Moves(NamedTuple):
    """One round: `rows[s, d]` rows from place `there[s, d]` of sender s to place `here[s, d]` of receiver d."""

    rows: jax.Array
    there: jax.Array
    here: jax.Array


def _route(experts: jax.Array, exchange: Exchange) -> _Route:
    picks, devices = experts.size, exchange.devices
    count = devices * exchange.experts
    order = ops.by_key(jnp.minimum(experts.reshape(-1), count), count + 1)
    loads = jax.lax.all_gather(order.sizes[:count], exchange.names).reshape(devices, devices, exchange.experts)
    sent = jnp.sum(loads, axis=-1)
    me = jax.lax.axis_index(exchange.names)
    own = jax.lax.dynamic_index_in_dim(loads, me, 1, keepdims=False)
    start, offset = (jnp.cumsum(sent, axis=axis) - sent for axis in (1, 0))
    room = math.ceil(_ROOM * picks / _ROW_MULTIPLE) * _ROW_MULTIPLE
    return _Route(order.item, order.place.reshape(experts.shape), own, sent, start, offset, me, room)


def _moves(route: _Route, index: jax.Array) -> _Moves:
    first = index * route.room
    low = jnp.clip(first - route.offset, 0, route.sent)
    high = jnp.clip(first + route.room - route.offset, 0, route.sent)
    here = jnp.clip(route.offset + low - first, 0, route.room)
    return _Moves(high - low, route.start + low, here)


def _numbers(route: _Route, index: jax.Array) -> jax.Array:
    """The local expert [R, 1] of each row that arrives in a round; the number of experts where none does."""
    senders, count = route.loads.shape
    ends = jnp.cumsum(route.loads.reshape(-1))
    place = index * route.room + jnp.arange(route.room)
    block = jnp.searchsorted(ends, place, side="right", method="compare_all")
    return jnp.where(block < senders * count, block % count, count).astype(jnp.int32)[:, None]


def _send(rows: jax.Array, into: jax.Array, moves: _Moves, route: _Route, exchange: Exchange) -> jax.Array:
    """`into` [R, …], zero where something arrives, with the rows of this round in it."""
    return _move(rows, into, moves.there, moves.rows, moves.here, route.me, exchange)


def _return(rows: jax.Array, into: jax.Array, moves: _Moves, route: _Route, exchange: Exchange) -> jax.Array:
    """The way back: what came from a place goes to that place."""
    return _move(rows, into, moves.here.T, moves.rows.T, moves.there.T, route.me, exchange)


def _move(
    rows: jax.Array, into: jax.Array, there: jax.Array, count: jax.Array, here: jax.Array, me: jax.Array,
    exchange: Exchange,
) -> jax.Array:  # fmt: skip
    """`into` with `count[s, d]` rows from place `there[s, d]` of s at place `here[s, d]` of d."""
    names = exchange.names
    mine = (a[me] for a in (there, count, here))
    if exchange.is_ragged:
        begin, size, place = mine
        return jax.lax.ragged_all_to_all(rows, into, begin, size, place, count[:, me], axis_name=names)
    begin, size, place = (a[:, None] for a in mine)
    index = jnp.arange(into.shape[0]) - place
    is_sent = (index >= 0) & (index < size)
    own = rows[jnp.clip(begin + index, 0, rows.shape[0] - 1)]
    own = jnp.where(is_sent.reshape(*is_sent.shape, *[1] * (rows.ndim - 1)), own, 0)
    return into + jnp.sum(jax.lax.all_to_all(own, names, 0, 0, tiled=True), axis=0, dtype=into.dtype)


# ---- one part of the tokens ------------------------------------------------------------------------------------------
def _there_and_back(
    x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: Any, exchange: Exchange
) -> jax.Array:
    route = _route(experts, exchange)
    rows, shares = x[route.order // experts.shape[1]], weights.reshape(-1)[route.order]

    def one_round(index: jax.Array, back: jax.Array) -> jax.Array:
        moves = _moves(route, index)
        own = _send(rows, jnp.zeros((route.room, x.shape[1]), x.dtype), moves, route, exchange)
        share = _send(shares, jnp.zeros(route.room, shares.dtype), moves, route, exchange)
        out = exchange.compute(own, _numbers(route, index), share[:, None], matrices, route.expected_rows)
        return _return(out, back, moves, route, exchange)

    back = jnp.zeros(rows.shape, jnp.float32)
    return ops.gather_sum(ops.data_loop(0, route.rounds, one_round, back, expected=route.expected), route.slot)


def _back_and_forth(
    x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: Any, d_out: jax.Array, total: Any,
    exchange: Exchange,
) -> tuple[Any, tuple[jax.Array, jax.Array]]:  # fmt: skip
    """The gradients of matrices added to `total`, and those of x and weights, from that of the result."""
    route = _route(experts, exchange)
    token = route.order // experts.shape[1]
    rows, shares, d_rows = x[token], weights.reshape(-1)[route.order], d_out.astype(x.dtype)[token]

    def one_round(index: jax.Array, state: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        total, back, back_share = state
        moves, numbers = _moves(route, index), _numbers(route, index)
        empty = jnp.zeros((route.room, x.shape[1]), x.dtype)
        own, d_own = (_send(a, empty, moves, route, exchange) for a in (rows, d_rows))
        share = _send(shares, jnp.zeros(route.room, shares.dtype), moves, route, exchange)

        def compute(own: jax.Array, share: jax.Array, matrices: Any) -> jax.Array:
            return exchange.compute(own, numbers, share[:, None], matrices, route.expected_rows)

        _, pull = jax.vjp(compute, own, share, matrices)
        d_x, d_share, d_matrices = pull(d_own.astype(jnp.float32))
        total = jax.tree.map(lambda sum_, d: sum_ + d.astype(jnp.float32), total, d_matrices)
        return (
            total, _return(d_x, back, moves, route, exchange), _return(d_share, back_share, moves, route, exchange)
        )  # fmt: skip

    state = (total, jnp.zeros_like(rows), jnp.zeros_like(shares))
    total, back, back_share = ops.data_loop(0, route.rounds, one_round, state, expected=route.expected)
    return total, (ops.gather_sum(back, route.slot), back_share[route.slot])
