import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import vectors
from v4jax.dtypes import DTypePolicy
from v4jax.model.dots import full_dot, grouped_dot, joint_dots


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (3,), (2, 1), (4, 8), (33,)])
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


@pytest.mark.parametrize("leading", [(1,), (2, 1), (4, 8), (3, 11)])
def test_grouped_product_of_any_number_of_rows(leading):
    x, weight = draw(0, *leading, 3, 40), draw(1, 3, 24, 40)
    policy = DTypePolicy.named("float32")

    def loss(product):
        return lambda x, weight: jnp.sum(jnp.sin(product(x, weight)))

    def plain(x, weight):
        return jnp.einsum("...gi,goi->...go", x, weight, precision="highest").reshape(*leading, -1)

    def ours(x, weight):
        return grouped_dot(x, weight, policy)

    np.testing.assert_allclose(jax.jit(ours)(x, weight), plain(x, weight), rtol=1e-5, atol=1e-5)
    got, want = (jax.jit(jax.grad(loss(f), argnums=(0, 1)))(x, weight) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize(("rows", "matrix_first"), [(2, True), (32, True), (33, False)])
def test_few_rows_come_second_in_the_compiled_product(rows, matrix_first):
    """XLA's CPU rearranges the second operand in memory, and swaps the operands of a product that is transposed."""
    x, weight = draw(0, rows, 128), draw(1, 256, 128)
    program = jax.jit(lambda x, weight: jnp.sin(full_dot(x, weight))).lower(x, weight).compile().as_text()
    result = f"f32[256,{rows}]" if matrix_first else f"f32[{rows},256]"
    products = [line for line in program.splitlines() if " dot(" in line]
    assert [result in line.split(" dot(")[0] for line in products] == [True]


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
