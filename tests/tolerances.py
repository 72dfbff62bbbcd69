"""The bounds of whole models and of kernels, each with its reason, and the comparisons that use them."""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class LogitBound:
    """`None` leaves a measure unbounded; the relative ones are in units of the wanted logits' standard deviation."""

    max_absolute: float | None = None
    max_relative: float | None = None
    rms_relative: float | None = None


# ---- logits ---------------------------------------------------------------------------------------------------------
# The same sums in another order (chunks, packing, padding, scan, sharding): float32 rounding through ~10 layers.
# The worst logit of millions is some ten times the RMS.
REORDERING = LogitBound(max_relative=1e-4, rms_relative=1e-5)
# Other people's code, whose every intermediate is rounded elsewhere; agreement of two of them was 1.6e-5 at a logit
# standard deviation of 1.5, and exact top-k choices let no discontinuity in.
OTHERS = LogitBound(max_absolute=2e-4)

# With simulated quantisation float32 re-ordering alone flips top-k picks at about 1 % of positions, so positions are
# compared by the RMS over the vocabulary divided by the logit standard deviation. (Without simulation the medians are
# 5.4 and 2.9 %.)
QUANT_SIM_MEDIAN = 0.005
QUANT_SIM_POSITION = 0.05  # at least QUANT_SIM_FRACTION of the positions stay below this
QUANT_SIM_FRACTION = 0.98
QUANT_SIM_TOTAL = 0.06  # what flipped picks may add up to

# ---- gradients: ‖Δ‖₂ ≤ relative · ‖g‖₂ + GRADIENT_FLOOR · ‖g of all parameters‖₂, per parameter ---------------------
# Backward sums run over tokens and experts, in another order in other people's code.
GRADIENT_OTHERS = 1e-4
# The same code with its sums in another order.
GRADIENT_REORDERING = 1e-5
# A parameter whose gradient is a near-complete cancellation (a sink, a bias) has an error of the size of its terms.
GRADIENT_FLOOR = 1e-7

# ---- kernels --------------------------------------------------------------------------------------------------------
# Interpreted float32 kernels against their reference: the same sums in another order, values of size 1.
KERNEL_FLOAT32 = 2e-5
# Error against float32 as a multiple of the bf16 reference's, the oracle rule: the largest of thousands of roundings.
KERNEL_BFLOAT16_RATIO = 1.5
# Logits of a whole float32 model through interpreted kernels; its gradients, relative to their norm.
KERNEL_MODEL = 5e-4

# ---- training -------------------------------------------------------------------------------------------------------
# A mean over thousands of token losses averages the logits' rounding away.
LOSS_RELATIVE = 1e-6
# Ten AdamW steps: the first divides by |g|, so a gradient near 0 may step either way.
TRAJECTORY_RELATIVE = 1e-4

# ---- discontinuities ------------------------------------------------------------------------------------------------
# A router or top-k choice may differ between two float32 computations only where the scores nearly tie.
FLIP_SCORE_GAP = 1e-5

# Index scores of bfloat16 queries are rounded to bfloat16 before the choice: two that differ by one spacing, 2^-7 of
# the value at most, may become equal or swap; the sum itself is float32.
INDEX_SCORE_BFLOAT16 = 2.0**-7

# ---- low precision --------------------------------------------------------------------------------------------------
# Error against float32 as a multiple of the other implementation's: the float32 islands should make ours the smaller
# one, and the median over seeds still scatters by some percent.
BFLOAT16_ERROR_RATIO = 1.1

# ---- attention kernels against their reference: ‖Δ‖₂ ≤ bound · ‖wanted‖₂ ---------------------------------------------
# The same float32 sums in another order, and exp2 of a product where the reference has exp; seen: 3e-7.
ATTENTION_FLOAT32 = 2e-6
# Error against float32 as a multiple of the reference's in bfloat16. Both round weights and output; the kernel's
# backward pass also rounds d(scores) to bfloat16 between two products, as any matrix unit asks for.
ATTENTION_BFLOAT16_RATIO = 1.5


def assert_logits_close(got: Any, want: Any, bound: LogitBound = REORDERING) -> None:
    """Compares two float arrays of one shape. Select the valid positions first: both must be finite everywhere."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, f"shape: got {got.shape}, want {want.shape}"
    for name, array in (("got", got), ("want", want)):
        assert np.isfinite(array).all(), f"{name}: {np.size(array) - np.isfinite(array).sum()} values are not finite"
    error, std = np.abs(got - want), want.std()
    assert std > 0, "the wanted logits are constant, so closeness to them shows nothing"
    worst, rms = error.max(), np.sqrt((error**2).mean())
    where = np.unravel_index(error.argmax(), error.shape)
    text = f"max {worst:.3g} = {worst / std:.3g} std at {tuple(map(int, where))}, RMS {rms / std:.3g} std; need {bound}"
    assert bound.max_absolute is None or worst <= bound.max_absolute, text
    assert bound.max_relative is None or worst <= bound.max_relative * std, text
    assert bound.rms_relative is None or rms <= bound.rms_relative * std, text


def assert_gradients_close(got: Any, want: Any, relative: float) -> None:
    """Compares two trees of gradients of one structure, parameter by parameter, and lists all that differ too much."""
    want_leaves, structure = jax.tree_util.tree_flatten_with_path(want)
    got_leaves, got_structure = jax.tree_util.tree_flatten_with_path(got)
    assert got_structure == structure, f"structure: got {got_structure}, want {structure}"
    pairs = [
        (jax.tree_util.keystr(path), np.asarray(g, np.float64), np.asarray(w, np.float64))
        for (path, w), (_, g) in zip(want_leaves, got_leaves, strict=True)
    ]
    norm_of_all = np.sqrt(sum(float((w**2).sum()) for _, _, w in pairs))
    assert 0 < norm_of_all < np.inf, f"norm of the wanted gradients: {norm_of_all}"
    wrong = []
    for name, g, w in pairs:
        assert g.shape == w.shape, f"{name}: got shape {g.shape}, want {w.shape}"
        error, norm = np.linalg.norm(g - w), np.linalg.norm(w)
        allowed = relative * norm + GRADIENT_FLOOR * norm_of_all
        if not error <= allowed:  # a NaN is wrong too
            wrong.append(f"{name}: ‖Δ‖ {error:.3g}, ‖g‖ {norm:.3g}, allowed {allowed:.3g}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(pairs)} gradients differ", *wrong])


def assert_quant_sim_close(got: Any, want: Any) -> None:
    """Logits [..., V] under simulated quantisation, by the rule above."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, f"shape: got {got.shape}, want {want.shape}"
    std = want.std()
    per_position = np.sqrt(((got - want) ** 2).mean(-1)) / std
    total = np.sqrt(((got - want) ** 2).mean()) / std
    median, inside = np.median(per_position), (per_position <= QUANT_SIM_POSITION).mean()
    text = f"median {median:.4f}, {inside:.4f} of positions within {QUANT_SIM_POSITION}, total {total:.4f}"
    assert median <= QUANT_SIM_MEDIAN, text
    assert inside >= QUANT_SIM_FRACTION, text
    assert total <= QUANT_SIM_TOTAL, text
