"""Arrays that are written once: the same values, and no reader computes them again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import materialize
from kernels_pallas.materialize import materialized, with_materialized_gradient


def three_readers(x, *, keep):
    wave = keep(jnp.sin(x))
    return jnp.sum(wave[:, None] * x, axis=0), jnp.outer(wave, wave).T, jnp.cumsum(wave)


def sines(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text().count(" sine(")


def test_readers_on_a_cpu_do_not_compute_again():
    x = jnp.arange(64.0)
    assert sines(lambda x: three_readers(x, keep=lambda a: a), x) >= 3, "else this test shows nothing"
    # The array, and the one number that says that the loop does not turn.
    assert sines(lambda x: three_readers(x, keep=materialized), x) == 2


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_values_are_those_that_came(monkeypatch, platform):
    monkeypatch.setattr(materialize, "current_platform", lambda: platform)
    tree = {
        "a": jnp.array([jnp.inf, -jnp.inf, jnp.nan, -0.0]),
        "b": jnp.ones((2, 3), jnp.bfloat16),
        "none": jnp.zeros((0, 5)),
    }
    got = jax.jit(materialized)(tree)
    for name, array in tree.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(got[name], np.float32), np.asarray(array, np.float32))
    assert np.signbit(got["a"][3])
    assert materialized(tree["none"]).shape == (0, 5)


def test_gradient_is_the_same_and_read_from_memory():
    def objective(x, keep):
        y = keep(x @ x.T)
        return jnp.sum(jnp.cos(y))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)), jnp.float32)
    want = jax.jit(jax.grad(lambda x: objective(x, lambda y: y)))(x)
    got = jax.jit(jax.grad(lambda x: objective(x, with_materialized_gradient)))(x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert "about_0.000_trips" in jax.jit(jax.grad(lambda x: objective(x, with_materialized_gradient))).lower(
        x
    ).as_text(debug_info=True)
