"""The comparisons catch what they should: each bound from both sides."""

import numpy as np
import pytest
from tolerances import (
    GRADIENT_OTHERS,
    GRADIENT_REORDERING,
    OTHERS,
    REORDERING,
    assert_gradients_close,
    assert_logits_close,
    assert_quant_sim_close,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(50, 64)) * 1.5


def with_error(worst=0.0, rms=0.0):
    error = RNG.choice([-1.0, 1.0], size=LOGITS.shape) * rms
    error[3, 5] = worst
    return LOGITS + error


def test_reordering_allows_1e_4_std_at_worst_and_1e_5_in_the_mean():
    std = LOGITS.std()
    assert_logits_close(with_error(worst=0.9e-4 * std), LOGITS, REORDERING)
    with pytest.raises(AssertionError, match=r"at \(3, 5\)"):
        assert_logits_close(with_error(worst=1.1e-4 * std), LOGITS, REORDERING)
    with pytest.raises(AssertionError, match="RMS"):
        assert_logits_close(with_error(rms=1.1e-5 * std), LOGITS, REORDERING)


def test_others_are_allowed_an_absolute_2e_4():
    assert_logits_close(with_error(worst=1.9e-4), LOGITS, OTHERS)
    with pytest.raises(AssertionError, match="max"):
        assert_logits_close(with_error(worst=2.1e-4), LOGITS, OTHERS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_close(value):
    with pytest.raises(AssertionError, match="not finite"):
        assert_logits_close(with_error(worst=value), LOGITS, OTHERS)


def test_constant_logits_prove_nothing():
    with pytest.raises(AssertionError, match="constant"):
        assert_logits_close(np.zeros((2, 2)), np.zeros((2, 2)))


def test_gradients_are_bounded_one_by_one_with_a_floor_from_all():
    want = {"large": RNG.normal(size=1000), "tiny": RNG.normal(size=10) * 1e-9}
    floor = 1e-7 * np.linalg.norm(want["large"])
    unit = np.full(10, 1 / np.sqrt(10))
    assert_gradients_close({**want, "tiny": want["tiny"] + 0.9 * floor * unit}, want, GRADIENT_REORDERING)
    with pytest.raises(AssertionError, match=r"1 of 2 gradients differ\n\['tiny'\]"):
        assert_gradients_close({**want, "tiny": want["tiny"] + 1.1 * floor * unit}, want, GRADIENT_REORDERING)
    scaled = {**want, "large": want["large"] * (1 + 5e-5)}
    assert_gradients_close(scaled, want, GRADIENT_OTHERS)
    with pytest.raises(AssertionError, match="large"):
        assert_gradients_close(scaled, want, GRADIENT_REORDERING)
    with pytest.raises(AssertionError, match="tiny"):
        assert_gradients_close({**want, "tiny": want["tiny"] * np.nan}, want, GRADIENT_OTHERS)


def test_gradients_of_another_structure_are_not_close():
    with pytest.raises(AssertionError, match="structure"):
        assert_gradients_close({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}, GRADIENT_OTHERS)


def test_quant_sim_allows_few_flipped_positions():
    want = RNG.normal(size=(200, 64))
    got = want + 0.001 * RNG.normal(size=want.shape)
    got[:4] += 0.3 * RNG.normal(size=(4, 64))
    assert_quant_sim_close(got, want)
    got[4:6] += 0.3 * RNG.normal(size=(2, 64))
    with pytest.raises(AssertionError, match="of positions within"):
        assert_quant_sim_close(got, want)
    with pytest.raises(AssertionError, match="median"):
        assert_quant_sim_close(want + 0.02 * RNG.normal(size=want.shape), want)
