"""Drawing the next token: every draw lies in the nucleus, in the right proportions, whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.errors import UserError
from v4jax.serve.sampling import Sampling, sample, sequence_keys

VOCABULARY = 7
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=VOCABULARY, max_size=VOCABULARY)
draw_jitted = jax.jit(sample)


def draw(logits: np.ndarray, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
    """One token per row of `logits` [B, V]."""
    logits = np.asarray(logits, np.float32)
    positions = jnp.zeros(len(logits), jnp.int32)
    keys = sequence_keys(seed, len(logits))
    return np.asarray(draw_jitted(logits, keys, positions, jnp.float32(temperature), jnp.float32(top_p)))


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return shifted / shifted.sum()


@given(LOGITS)
def test_temperature_0_takes_the_likeliest_and_of_equals_the_first(logits):
    assert draw([logits], temperature=0)[0] == np.argmax(np.asarray(logits, np.float32))


@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-12, 1e-37])
def test_near_temperature_0_is_the_likeliest_too(temperature):
    logits = np.random.default_rng(0).standard_normal((64, 11))
    np.testing.assert_array_equal(draw(logits, temperature), np.argmax(logits, axis=-1))


@pytest.mark.parametrize("top_p", [1e-9, 1e-39, 1e-46])
def test_the_likeliest_stays_in_any_nucleus(top_p):
    logits = np.random.default_rng(0).standard_normal((64, 11))
    np.testing.assert_array_equal(draw(logits, top_p=top_p), np.argmax(logits, axis=-1))


@settings(max_examples=20)
@given(LOGITS, st.floats(0.05, 1.0), st.floats(0.3, 3.0))
def test_draws_lie_in_the_nucleus(logits, top_p, temperature):
    probability = softmax(np.asarray(logits, np.float32) / np.float32(temperature))
    drawn = draw(np.tile(logits, (64, 1)), temperature, top_p)
    likelier = np.array([probability[probability > probability[token] + 1e-6].sum() for token in drawn])
    assert (likelier < top_p + 1e-5).all()


@pytest.mark.parametrize(("temperature", "top_p", "kept"), [(1.0, 1.0, 7), (0.5, 1.0, 7), (2.0, 1.0, 7), (1.0, 0.8, 3)])
def test_draws_come_in_proportion_to_their_probabilities(temperature, top_p, kept):
    logits = np.log([0.4, 0.25, 0.2, 0.06, 0.04, 0.03, 0.02])
    want = softmax(logits / temperature)
    want[kept:] = 0
    want /= want.sum()
    count = 20_000
    got = np.bincount(draw(np.tile(logits, (count, 1)), temperature, top_p), minlength=VOCABULARY) / count
    # Five standard deviations of a binomial share.
    np.testing.assert_array_less(np.abs(got - want), 5 * np.sqrt(want * (1 - want) / count) + 1e-9)


def test_a_sequence_draws_alike_alone_and_in_a_batch():
    logits = np.random.default_rng(0).standard_normal((5, VOCABULARY))
    np.testing.assert_array_equal(draw(logits)[:2], draw(logits[:2]))


def test_draws_differ_between_positions_and_sequences():
    logits, keys = jnp.zeros((200, 1000)), sequence_keys(0, 200)
    one, two = jnp.float32(1), jnp.zeros(200, jnp.int32)
    first, second = (np.asarray(draw_jitted(logits, keys, two + n, one, one)) for n in (0, 1))
    assert len(np.unique(first)) > 150
    assert (first != second).mean() > 0.95


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"seed": -1}]
)
def test_impossible_settings(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)
