import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import vectors
from v4jax.model.dots import full_dot, joint_dots


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (3,), (2, 1)])
@pytest.mark.parametrize("rows", [1024, 1023, 6])
def test_product_of_any_number_of_rows(leading, rows):
    x, weight = draw(0, *leading, 512), draw(1, rows, 512)
    got = jax.jit(full_dot)(x, weight)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert got.shape == (*leading, rows)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_a_vector_is_multiplied_in_parts_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(vectors.os, "cpu_count", lambda: 4)
    assert vectors.parts_of(1024, 512) == 4
    assert vectors.parts_of(1026, 512) == 3
    assert vectors.parts_of(64, 512) == 1
    monkeypatch.setattr(vectors, "current_platform", lambda: "tpu")
    assert vectors.parts_of(1024, 512) == 1


@pytest.mark.parametrize("rows", [3, 300])
def test_joint_products_are_those_of_each_matrix(rows):
    x, weights = draw(0, 2, rows, 64), (draw(1, 24, 64), draw(2, 8, 64), draw(3, 40, 64))

    def total(x, weights):
        return sum(jnp.sum(jnp.sin(out)) for out in joint_dots(x, weights, jax.lax.Precision.HIGHEST))

    def apart(x, weights):
        return sum(jnp.sum(jnp.sin(full_dot(x, weight))) for weight in weights)

    for got, weight in zip(joint_dots(x, weights, jax.lax.Precision.HIGHEST), weights, strict=True):
        np.testing.assert_allclose(got, full_dot(x, weight), rtol=1e-5, atol=1e-5)
    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, weights) for f in (total, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
