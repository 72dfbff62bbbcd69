"""The rows of one expert in blocks: one of a size that leaves little padding, and the largest ones for what is left."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kernels_pallas.loops import data_loop
from kernels_pallas.tpu import current_platform

_State = TypeVar("_State")
_MAX_UNIT, _MIN_UNIT = 128, 4
_LARGE_UNIT = 16
"""With a mean load from here on there are larger blocks too."""
_MOST_UNITS = 8


class Blocks(NamedTuple):
    """What the loops over experts and their blocks look like."""

    sizes: tuple[int, ...]
    """Rows of a block, largest first, down to the unit in steps of it: experts begin at multiples of the unit."""
    experts: float
    """Experts with work, under an even load."""
    first: tuple[float, ...]
    """Share of the experts with work whose first block has each size, under an even load."""
    further: float
    """Blocks of the largest size after the first one per expert with work, under an even load."""

    @property
    def unit(self) -> int:
        """Rows of the smallest block."""
        return self.sizes[-1]


def blocks_for(picks: float, experts: int, most: int) -> Blocks:
    """For about `picks` rows that fall on `experts` at random, and never more than `most`.

    The unit is a power of two. A GPU has one size of block, up to half the mean load: it waits for every loop, whether
    that turns or not. A CPU with few rows per expert has two, up to the mean load and up to twice that: its time is
    that of reading matrices. With many rows it has sizes in steps of up to a quarter of the mean load.
    """
    mean = picks / experts
    quarter = 1 << max(int(mean).bit_length() - 3, 0)
    if current_platform() != "cpu":
        return _blocks(picks, experts, (min(max(2 * quarter, _MIN_UNIT), _MAX_UNIT),))
    if mean < _LARGE_UNIT:
        unit = max(4 * quarter, _MIN_UNIT)
        return _blocks(picks, experts, (2 * unit, unit) if 2 * unit <= min(2 * mean, most) else (unit,))
    unit = min(max(quarter, _LARGE_UNIT), _MAX_UNIT)
    larger = (unit * i for i in range(_MOST_UNITS, 1, -1))
    return _blocks(picks, experts, (*(size for size in larger if size <= most), unit))


def active_experts(picks: float, experts: int) -> float:
    """Experts with work, by the Poisson law of an expert's load."""
    return max(-experts * math.expm1(-picks / experts), 1e-9)  # a divisor, even where nothing is expected


def expected_tiles(picks: float, experts: int, rows: int) -> float:
    """Tiles of `rows` rows in all, under an even load: some experts are empty, and each other pads half a tile."""
    active = active_experts(picks, experts)
    return active * max(1.0, picks / active / rows + 0.5)


def over_blocks(
    start: jax.Array,
    end: jax.Array,
    blocks: Blocks,
    body: Callable[[jax.Array, int, bool, _State], _State],
    state: _State,
) -> _State:
    """Runs `body(row, rows, is_first, state)` over the blocks of one expert, which has rows.

    Args:
      start: unit at which the expert begins.
      end: unit at which it ends.
      body: `row` is the first of `rows` rows, one of `blocks.sizes`; `is_first` says whether it is the expert's first.
    """
    most = blocks.sizes[0] // blocks.unit
    begin, head = start * blocks.unit, (end - start - 1) % most + 1
    if len(blocks.sizes) == 1:
        state = body(begin, blocks.unit, True, state)
    else:
        for size, share in zip(blocks.sizes, blocks.first, strict=True):
            turns = (head * blocks.unit == size).astype(jnp.int32)
            # What does not depend on the loop's index the compiler would compute whether the loop turns or not.
            one = lambda i, state, size=size: body(begin + i * size, size, True, state)  # noqa: E731
            state = data_loop(0, turns, one, state, expected=share)

    def one_more(i: jax.Array, state: _State) -> _State:
        return body(begin + head * blocks.unit + i * blocks.sizes[0], blocks.sizes[0], False, state)

    return data_loop(0, (end - start - head) // most, one_more, state, expected=blocks.further)


def _blocks(picks: float, experts: int, sizes: tuple[int, ...]) -> Blocks:
    """Expectations by the Poisson law of an expert's load; of the passes, given that it has any."""
    mean = max(picks / experts, 1e-6)  # nothing may be expected, but its logarithm is wanted
    spread = 8 * math.sqrt(mean) + 8
    unit, most = sizes[-1], sizes[0] // sizes[-1]
    first, further, total = [0.0] * len(sizes), 0.0, 0.0
    for load in range(max(int(mean - spread), 1), int(mean + spread) + 1):
        share = math.exp(load * math.log(mean) - mean - math.lgamma(load + 1))
        total += share
        rest, head = divmod(-(-load // unit) - 1, most)
        first[most - 1 - head] += share
        further += share * rest
    total = max(total, 1e-30)
    return Blocks(sizes, active_experts(picks, experts), tuple(share / total for share in first), further / total)
