"""Matrices by groups of channels: plain, and dequantised group by group."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.dtypes import DTypePolicy, NativeWeights
from v4jax.model.params import FEW_ROWS, Declare, Linear, float32_dot, in_tiles

GROUPS, IN = 3, 40


def grouped_matrices(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Σ over the inputs of each group, float64."""
    parts = weight.astype(np.float64).reshape(GROUPS, -1, IN)
    return np.einsum("bsgi,goi->bsgo", x, parts).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("tokens", [7, FEW_ROWS])
@pytest.mark.parametrize("out", [8, 5])
@pytest.mark.parametrize("scales", [None, jnp.float8_e8m0fnu, jnp.float32])
def test_each_group_goes_through_its_own_rows(out: int, scales: object, tokens: int) -> None:
    """With tiles of 4 rows, groups of 8 begin at a tile and groups of 5 do not. Few rows of inputs take the scales."""
    rng = np.random.default_rng(out)
    policy = DTypePolicy.named("float32")
    if scales is not None:
        policy = dataclasses.replace(policy, native=NativeWeights("fp8", (4, 16)))
    linear = Linear(IN, GROUPS * out, ("o_groups", None), Declare(policy), released_in_fp8=True)
    if scales is None:
        linear.weight.set_value(jnp.asarray(rng.standard_normal((GROUPS * out, IN)), jnp.float32))
    else:
        codes = rng.standard_normal((GROUPS * out, IN))
        linear.weight.set_value(jnp.asarray(codes, jnp.float8_e4m3fn))
        tiles = -(-GROUPS * out // 4), -(-IN // 16)
        linear.scale.set_value(jnp.asarray(2.0 ** rng.integers(-3, 4, tiles), scales))
    x = rng.standard_normal((2, tokens, GROUPS, IN)).astype(np.float32)
    want = grouped_matrices(np.asarray(linear.matrix, np.float32), x)
    np.testing.assert_allclose(linear.grouped(jnp.asarray(x)), want, rtol=1e-5, atol=1e-5)
    if scales is jnp.float8_e8m0fnu:
        np.testing.assert_allclose(in_tiles(linear).grouped(jnp.asarray(x)), want, rtol=1e-5, atol=1e-5)
        whole = np.asarray(linear.matrix, np.float64)
        np.testing.assert_array_equal(in_tiles(linear).matrix, whole)
        np.testing.assert_allclose(
            in_tiles(linear)(jnp.asarray(x[:, :, 0])), x[:, :, 0] @ whole.T, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_in_float32_and_its_gradients(dtype):
    rng = np.random.default_rng(5)
    x, weight, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 16), (8, 16), (2, 3, 8)))
    x = jnp.asarray(x, dtype)
    wide = np.asarray(x, np.float64)
    out, pull = jax.vjp(float32_dot, x, jnp.asarray(weight))
    d_x, d_weight = pull(jnp.asarray(d_out))
    assert (out.dtype, d_x.dtype, d_weight.dtype) == (jnp.float32, dtype, jnp.float32)
    np.testing.assert_allclose(out, wide @ weight.T.astype(np.float64), atol=1e-5)
    np.testing.assert_allclose(d_weight, np.einsum("bto,bti->oi", d_out, wide), atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(d_x, np.float32), d_out @ weight, atol=1e-5, rtol=2**-8 * (dtype != np.float32)
    )
