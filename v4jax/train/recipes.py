"""Complete settings of a training run, and named sets of them.

A recipe is a function that returns `TrainOptions`; the command line's flags replace single fields of it.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, Literal

from v4jax.errors import UserError

ComputeDType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What decides the numbers of a run, model and data aside. Raises `UserError` for values that cannot be."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Rows per step."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after another, to save memory; the result is that of the whole batch."""
    sequence_length: int = 2048
    """Tokens per row; documents are packed into rows, longer ones are cut."""
    learning_rate: float = 2e-5
    """Peak learning rate."""
    final_learning_rate: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: int = 50
    """Steps of linear rise to the peak, before the cosine."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; for matrices and embeddings alone."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    clip: float = 1.0
    """Largest global norm of a gradient; longer ones are scaled down."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss; 0 leaves the block as it is."""
    balance_weight: float = 0.0
    """Weight of the sequence-wise balance loss of the routers (0.0001 in pre-training)."""
    bias_update_speed: float = 0.0
    """Step of the router biases towards equal load (0.001 in pre-training); 0 leaves them as they are."""
    freeze: tuple[str, ...] = ()
    """Parameters to leave as they are: roles (`embedding`), or patterns over dotted names (`*.experts.*`)."""
    train_indexer: bool = False
    """Let the optimiser have the indexer too. The loss sends it no gradient, so it would only decay."""
    held_out_fraction: float = 0.05
    """Share of documents kept for evaluation."""
    held_out_tokens: int = 65536
    """Tokens of them that an evaluation during training reads."""
    seed: int = 0
    """Of the order of the data."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its intermediates: a third more work."""
    dtype: ComputeDType = "float32"
    """Compute dtype; parameters and optimiser state are float32."""
    eval_every: int = 100
    """Steps between evaluations."""
    save_every: int = 100
    """Steps between saved states."""
    keep: int = 2
    """Saved states to keep."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "sequence_length", "eval_every", "save_every", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2")
        _require(self.held_out_tokens >= 1, "held_out_tokens", self.held_out_tokens, "at least 1")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a number of 32 bits")
        _require(self.clip > 0, "clip", self.clip, "a positive number")  # infinity never clips
        for name in ("learning_rate", "epsilon"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a positive number")
        for name in ("weight_decay", "mtp_weight", "balance_weight", "bias_update_speed"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more, and finite")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        _require(0 < self.held_out_fraction < 1, "held_out_fraction", self.held_out_fraction, "between 0 and 1")
        _require(0 <= self.final_learning_rate <= 1, "final_learning_rate", self.final_learning_rate, "a share, 0 to 1")
        _require(0 <= self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"below steps ({self.steps})")
        _require(
            self.batch_size % self.accumulate == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulate ({self.accumulate})",
        )


# These may differ when a run is resumed: they do not change what is learned.
FREE_TO_CHANGE = frozenset({"eval_every", "save_every", "keep", "held_out_tokens"})


def _require(is_met: bool, name: str, got: Any, need: str) -> None:
    if not is_met:
        raise UserError(f"{name}: got {got}, need {need}")


def full() -> TrainOptions:
    """Full fine-tuning of a released model: short warm-up, small steps, bfloat16 compute.

    `v4jax finetune MODEL --data my_texts/ --out runs/my_texts`. State: 12 bytes per trained parameter.
    """
    return TrainOptions(remat=True, dtype="bfloat16")


def from_scratch() -> TrainOptions:
    """The technical report's pre-training (architecture.md §16.2), but for AdamW: balance loss, moving router biases.

    `v4jax finetune MODEL --data corpus/ --out runs/pretrain --recipe from-scratch --steps 100000 --batch-size 256`.
    """
    return TrainOptions(
        steps=20_000,
        batch_size=64,
        learning_rate=2.7e-4,
        warmup_steps=2000,
        balance_weight=1e-4,
        bias_update_speed=1e-3,
        remat=True,
        dtype="bfloat16",
    )


def quickstart() -> TrainOptions:
    """The tiny model of `scripts/quickstart.sh`, from random weights, in a few minutes on two CPU cores.

    Small batches, since at this size a step costs what its tokens cost: many steps teach more than large ones.

    `v4jax finetune TINY --data stdlib --out runs/quickstart --recipe quickstart`.
    """
    return TrainOptions(
        steps=1000,
        batch_size=2,
        sequence_length=256,
        learning_rate=6e-3,
        final_learning_rate=0.02,
        warmup_steps=30,
        weight_decay=0.05,
        bias_update_speed=1e-3,
        held_out_fraction=0.03,
        held_out_tokens=16384,
        eval_every=200,
        save_every=400,
    )


RECIPES: dict[str, Callable[[], TrainOptions]] = {
    "full": full,
    "from-scratch": from_scratch,
    "quickstart": quickstart,
}


def resolve(recipe: str, **changes: Any) -> TrainOptions:
    """The recipe of that name with the fields of `changes` that are not None replaced.

    Raises:
        UserError: an unknown recipe, or values that cannot be.
    """
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--recipe: got {recipe!r}, need one of {', '.join(RECIPES)}{hint}")
    return dataclasses.replace(RECIPES[recipe](), **{key: value for key, value in changes.items() if value is not None})
