"""What a layer that is recomputed in the backward pass keeps of the forward pass."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"


def kept(array: jax.Array) -> jax.Array:
    """The array, which a recomputed layer does not make again: for what is dear to make and small to hold."""
    return checkpoint_name(array, _KEPT)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose intermediates but the `kept` ones are made again in the backward pass.

    Not before its cotangents are there: else the compiler would make those of several layers at once, or, outside a
    loop, take them from the forward pass after all.
    """
    return jax.checkpoint(function, prevent_cse=True, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
