import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.formats import fp4_round_trip, fp8_round_trip
from v4jax.config import ConfigError, ModelConfig
from v4jax.quant import check_simulation, hadamard_transform, simulate_index, simulate_kv


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("width", [1, 2, 32, 128])
def test_hadamard_is_sylvesters_matrix(width: int):
    index = np.arange(width)
    parity = np.vectorize(lambda n: n.bit_count() % 2)(index[:, None] & index)
    want = (1 - 2 * parity) * width**-0.5
    np.testing.assert_allclose(hadamard_transform(jnp.eye(width)), want, rtol=1e-6)


def test_hadamard_undoes_itself():
    x = normal(5, 128)
    # 128 sums of float32 terms, twice.
    np.testing.assert_allclose(hadamard_transform(hadamard_transform(x)), x, atol=4e-6)


def test_hadamard_refuses_other_widths():
    with pytest.raises(ValueError, match="need a power of two"):
        hadamard_transform(jnp.ones((2, 96)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keys_are_rounded_but_for_the_rotated_channels(dtype):
    x = normal(3, 5, 192).astype(dtype)
    y = jax.jit(simulate_kv, static_argnums=1)(x, 128)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y[..., :128], fp8_round_trip(x[..., :128], 64))
    np.testing.assert_array_equal(y[..., 128:], x[..., 128:])
    assert (y[..., :128] != x[..., :128]).any()


def test_index_vectors_are_rotated_then_rounded():
    x = normal(3, 5, 64)
    np.testing.assert_array_equal(simulate_index(x), fp4_round_trip(hadamard_transform(x)))


def test_gradients_pass_straight_through():
    x, weight = normal(4, 128), jax.random.normal(jax.random.key(1), (4, 128))
    grad = jax.jit(jax.grad(lambda v: (simulate_kv(v, 64) * weight).sum()))(x)
    np.testing.assert_array_equal(grad, weight)
    grad = jax.jit(jax.grad(lambda v: (simulate_index(v) * weight).sum()))(x)
    np.testing.assert_allclose(grad, hadamard_transform(weight), rtol=1e-5, atol=1e-6)


def test_the_released_sizes_can_be_simulated():
    for config in (ModelConfig.flash(), ModelConfig.pro(), ModelConfig.tiny()):
        check_simulation(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qk_rope_head_dim", 62, "head_dim - qk_rope_head_dim is 66, need a multiple of 64"),
        ("index_head_dim", 96, "index_head_dim is 96, need a power of two"),
        ("index_head_dim", 80, "need a power of two that is at least 32"),
    ],
)
def test_other_sizes_are_refused_with_the_remedy(field: str, value: int, message: str):
    config = dataclasses.replace(ModelConfig.tiny(), **{field: value})
    with pytest.raises(ConfigError, match=message) as error:
        check_simulation(config)
    assert "--quant-sim off" in str(error.value)
