"""The rows of one expert in blocks whose sizes double: large products for most rows, little padding for the rest."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax

from kernels_pallas.loops import data_loop

_State = TypeVar("_State")
_MAX_UNIT, _MIN_UNIT = 128, 4
_LARGE_UNIT = 16
"""From here on there are larger blocks too."""
_DOUBLINGS = 3


class Blocks(NamedTuple):
    """What the loops over experts and their blocks look like."""

    sizes: tuple[int, ...]
    """Rows of a block, largest first, each twice the next. The last is the unit: experts begin at multiples of it."""
    experts: float
    """Experts with work, under an even load."""
    passes: tuple[float, ...]
    """Blocks of each size per expert with work, under an even load."""

    @property
    def unit(self) -> int:
        """Rows of the smallest block."""
        return self.sizes[-1]


def blocks_for(picks: float, experts: int, most: int) -> Blocks:
    """For about `picks` rows that fall on `experts` at random, and never more than `most`.

    The unit is a power of two, up to half the mean load if that is small, else up to a quarter.
    """
    mean = picks / experts
    quarter = 1 << max(int(mean).bit_length() - 3, 0)
    unit = min(max(quarter, _LARGE_UNIT), _MAX_UNIT) if mean >= _LARGE_UNIT else max(2 * quarter, _MIN_UNIT)
    larger = (unit * i for i in range(1 << _DOUBLINGS, 1, -1)) if unit >= _LARGE_UNIT else ()
    return _blocks(mean, experts, (*(size for size in larger if size <= most), unit))


def single_rows(picks: float, experts: int) -> Blocks:
    """The same rows one by one."""
    return _blocks(picks / experts, experts, (1,))


def expected_tiles(picks: float, experts: int, rows: int) -> float:
    """Tiles of `rows` rows in all, under an even load: some experts are empty, and each other pads half a tile."""
    active = _active(picks / experts, experts)
    return active * max(1.0, picks / max(active, 1e-9) / rows + 0.5)


def over_blocks(
    first: jax.Array, last: jax.Array, blocks: Blocks, body: Callable[[jax.Array, int, _State], _State], state: _State
) -> _State:
    """Runs `body(row, rows, state)` over the blocks of one expert, the largest first.

    Args:
      first: unit at which the expert begins.
      last: unit at which it ends.
      body: `row` is the first of `rows` rows; `rows` is one of `blocks.sizes`.
    """
    for size, passes in zip(blocks.sizes, blocks.passes, strict=True):
        units = size // blocks.unit
        count = (last - first) // units

        def one_block(i: jax.Array, state: _State, first: jax.Array = first, size: int = size) -> _State:
            return body(first * blocks.unit + i * size, size, state)

        state = data_loop(0, count, one_block, state, expected=passes)
        first = first + count * units
    return state


def _active(mean: float, experts: int) -> float:
    """Experts with work, by the Poisson law of an expert's load."""
    return experts * -math.expm1(-mean)


def _blocks(mean: float, experts: int, sizes: tuple[int, ...]) -> Blocks:
    """Expectations by the Poisson law of an expert's load; of the passes, given that it has any."""
    mean = max(mean, 1e-6)  # nothing may be expected, but its logarithm is wanted
    spread = 8 * math.sqrt(mean) + 8
    passes, total = [0.0] * len(sizes), 0.0
    for load in range(max(int(mean - spread), 1), int(mean + spread) + 1):
        share = math.exp(load * math.log(mean) - mean - math.lgamma(load + 1))
        total += share
        rest = -(-load // sizes[-1]) * sizes[-1]
        for i, size in enumerate(sizes):
            passes[i] += share * (rest // size)
            rest %= size
    return Blocks(sizes, _active(mean, experts), tuple(number / max(total, 1e-30) for number in passes))
