"""Places of a list in whole registers, and moving some of them to the front.

A place in the order is (lane, sublane, register), the register's number running fastest: most steps of a network, and
prefix sums, then go between whole registers.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu import LANES, SUBLANES

Registers = jax.Array
"""int32 [V, 8, 128], V a power of two: place p = (8 · lane + sublane) · V + register."""


def iota(axis: int) -> jax.Array:
    """Number of the sublane (1) or lane (2), for a register: [1, 8, 128]."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, SUBLANES, LANES), axis)


def _rows_ahead(x: Registers, count: int) -> Registers:
    if count >= SUBLANES:
        return pltpu.roll(x, LANES - count // SUBLANES, 2)
    turned = pltpu.roll(x, SUBLANES - count, 1)
    return jnp.where(iota(1) < SUBLANES - count, turned, pltpu.roll(turned, LANES - 1, 2))


def ahead(x: Registers, count: int) -> Registers:
    """What lies `count` places, a power of two, further on; the end goes on at the start."""
    if count < x.shape[0]:
        return jnp.concatenate([x[count:], _rows_ahead(x[:count], 1)])
    return _rows_ahead(x, count // x.shape[0])


def one_behind(x: Registers) -> Registers:
    """What lies one place before; the start goes on at the end."""
    turned = pltpu.roll(x[-1:], 1, 1)
    first = jnp.where(iota(1) > 0, turned, pltpu.roll(turned, 1, 2))
    return jnp.concatenate([first, x[:-1]])


def zeros_before(words: Registers) -> Registers:
    """How many zeros lie before each place."""
    zeros = jnp.where(words == 0, 1, 0)
    within, total = [], jnp.zeros((1, SUBLANES, LANES), jnp.int32)
    for number in range(words.shape[0]):
        within.append(total)
        total = total + zeros[number : number + 1]
    rows = total
    for step in (1, 2, 4):
        rows = rows + jnp.where(iota(1) >= step, pltpu.roll(rows, step, 1), 0)
    of_lane = jnp.broadcast_to(rows[:, SUBLANES - 1 :], rows.shape)
    lanes = of_lane
    for step in (1, 2, 4, 8, 16, 32, 64):
        lanes = lanes + jnp.where(iota(2) >= step, pltpu.roll(lanes, step, 2), 0)
    return jnp.concatenate(within) + (lanes - of_lane + rows - total)


def to_front(
    left: Registers, words: Registers, others: tuple[Registers, ...] = (), *, shift: int = 0
) -> tuple[Registers, Registers, tuple[Registers, ...]]:
    """Moves what has a word to the front, in order, one bit of the distance at a time.

    Args:
      left: from bit `shift` on, how many places without a word lie before each place that has one; 0 for the others.
        The bits below move along.
      words: 0 for what does not move, and for what is left behind.
      others: move with the words; what is left behind means nothing.

    Returns:
      The three, moved.
    """
    step = 1
    while step < words.size:
        # What moves by `step` finds its place empty: the lower bits of both distances have been moved already.
        arriving = ahead(left, step)
        arrives, leaves = arriving & (step << shift) != 0, left & (step << shift) != 0
        others = tuple(jnp.where(arrives, ahead(x, step), x) for x in others)
        words = jnp.where(arrives, ahead(words, step), jnp.where(leaves, 0, words))
        left = jnp.where(arrives, arriving, jnp.where(leaves, 0, left))
        step *= 2
    return left, words, others
