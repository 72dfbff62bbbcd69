"""AdamW with clipping, warm-up and a cosine, and which parameters get what: decided by role and name, never by rank."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from v4jax.errors import UserError
from v4jax.model.params import Role
from v4jax.train.recipes import TrainOptions

_DECAYED = frozenset({Role.MATRIX, Role.EMBEDDING})
_INDEXER = "*.indexer.*"


def learning_rate_schedule(options: TrainOptions) -> optax.Schedule:
    """Step → learning rate: linear from 0 over `warmup_steps`, then a cosine to the final share of the peak.

    The first step has a rate above 0 and the last one reaches the final rate.
    """
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=options.steps,
        end_value=options.learning_rate * options.final_learning_rate,
    )
    return lambda step: cosine(step + 1)


def make_optimizer(options: TrainOptions, roles: Mapping[str, str]) -> optax.GradientTransformation:
    """AdamW over a flat dict of parameters.

    Args:
        options: rates, decay, betas, clipping.
        roles: the role of each parameter, by the same keys. Matrices and embeddings decay; norms, gains, biases, sinks
            and tables do not.
    """
    return optax.chain(
        _clip_by_global_norm(options.clip),
        optax.adamw(
            learning_rate_schedule(options),
            b1=options.beta1,
            b2=options.beta2,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            mask={name: role in _DECAYED for name, role in roles.items()},
        ),
    )


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Optax's, with one factor for all, which the compiler folds into the moments: no clipped gradients in memory."""

    def clip(updates: Any, _: Any) -> Any:
        factor = limit / jnp.maximum(optax.tree.norm(updates), limit)
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(clip)


def trainable_names(options: TrainOptions, roles: Mapping[str, str], *, has_mtp: bool = True) -> frozenset[str]:
    """The parameters that the optimiser gets.

    Not among them: what `freeze` names; the indexer, whose gradient is exactly zero (architecture.md §18.1: decay would
    shrink it), unless `train_indexer`; and the MTP block where its loss has no weight, for the same reason.

    Raises:
        UserError: a pattern of `freeze` that matches nothing, or nothing left to train.
    """
    frozen: set[str] = set()
    for pattern in options.freeze:
        found = {name for name, role in roles.items() if pattern == role or fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise UserError(f"freeze: {pattern!r} matches no parameter and no role; `v4jax info MODEL` lists them")
        frozen |= found
    if not options.train_indexer:
        frozen |= _matching(roles, _INDEXER)
    if has_mtp and options.mtp_weight == 0:
        frozen |= _matching(roles, "mtp.*")
    trainable = frozenset(roles) - frozen
    if not trainable:
        raise UserError("freeze: every parameter is frozen; leave something to train")
    return trainable


def _matching(names: Iterable[str], pattern: str) -> set[str]:
    return {name for name in names if fnmatch.fnmatchcase(name, pattern)}
