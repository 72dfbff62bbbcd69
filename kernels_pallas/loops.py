"""Loops whose length depends on data, and what to expect of it.

A compiled program does not say how often such a loop runs. Whoever writes one states the expectation under an even load
in a named scope, which ends up in the program's metadata, where a cost reader finds it.
"""

import re
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.typing import ArrayLike

_State = TypeVar("_State")
_SCOPE = re.compile(r"about_(\d+(?:\.\d+)?)_trips/while$")


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
