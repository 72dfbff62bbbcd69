"""Products of a compiled program: which, how often, and what one takes."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.loops import data_loop
from v4jax import bench
from v4jax.bench_products import product_alone, products_alone
from v4jax.errors import UserError
from v4jax.plan.costs import program_costs


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def step(x, w, other, count):
    """Six products with w in a scan of three, some with `other` in a loop that depends on data, and one batched."""

    def twice(x, matrix):
        return jnp.tanh(jnp.tanh(x @ matrix) @ matrix.T), None

    x = jax.lax.scan(twice, x, w)[0]
    x = data_loop(0, count, lambda i, x: jnp.tanh(x @ other), x, expected=2.5)
    return jnp.einsum("bij,bkj->bik", x.reshape(4, 64, 256), x.reshape(4, 64, 256))


@pytest.fixture(scope="module")
def lowered():
    return jax.jit(step).lower(zeros(256, 256), zeros(3, 256, 256), zeros(256, 256), zeros(dtype=jnp.int32))


def test_each_product_counts_as_often_as_it_runs(lowered):
    runs = program_costs(lowered.compile().as_text()).products
    square = {product: count for product, count in runs.items() if not product.batch[0]}
    assert sum(square.values()) == 6 + 2.5
    assert {product.flops for product in square} == {2 * 256**3}
    (batched,) = runs.keys() - square.keys()
    assert (batched.flops, runs[batched], batched.nbytes) == (2 * 4 * 64 * 64 * 256, 1, 2 * 4 * 256 * 256)


@pytest.mark.parametrize("is_cold", [False, True])
def test_the_products_alone_take_what_they_take_one_by_one(lowered, is_cold):
    runs = program_costs(lowered.compile().as_text()).products
    one = min(product_alone(product, is_cold=is_cold) for product in runs if not product.batch[0])
    # Between two measurements on a busy machine; no product takes a tenth of another of its size.
    assert products_alone(lowered, is_cold=is_cold) > 8.5 * one / 10


def test_products_alone_are_refused_where_programs_do_not_show_them(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="--products: got a gpu, need a CPU"):
        bench.run(bench.Options(products=True))
