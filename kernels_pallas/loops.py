"""Loops and kernel grids whose length depends on data, and what to expect of it.

A compiled program does not say how often such a loop runs, nor how much of its grid a kernel visits. Whoever writes one
states the expectation under an even load in a named scope, which ends up in the program's metadata, where a cost reader
finds it.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import jax
from jax.typing import ArrayLike

_State = TypeVar("_State")
_SCOPE = re.compile(r"about_(\d+(?:\.\d+)?)_trips\)*/while$")
"""Transformations close their brackets behind the scope: `transpose(jvp(about_2.000_trips))/while`."""
_GRID = re.compile(r"about_(\d+(?:\.\d+)?)_of_grid(?!.*_of_grid)")


def data_loop(
    lower: ArrayLike, upper: ArrayLike, body: Callable[[jax.Array, _State], _State], state: _State, *, expected: float
) -> _State:
    """`fori_loop` with bounds that depend on data.

    Args:
      expected: passes under an even load; only read out of the compiled program.
    """
    with jax.named_scope(f"about_{expected:.3f}_trips"):
        return jax.lax.fori_loop(lower, upper, body, state)


def expected_trips(op_name: str) -> float | None:
    """What the author of a loop expects, given the `op_name` of its `while`; None if nothing was said."""
    found = _SCOPE.search(op_name)
    return float(found[1]) if found else None


def part_of_grid(share: float) -> AbstractContextManager[object]:
    """Says of the kernels called inside which share of their grid they visit under an even load, 0 to 1."""
    return jax.named_scope(f"about_{share:.3f}_of_grid")


def expected_share(op_name: str) -> float:
    """What the author of a kernel expects, given the `op_name` of its call; 1 if nothing was said."""
    found = _GRID.search(op_name)
    return float(found[1]) if found else 1.0
