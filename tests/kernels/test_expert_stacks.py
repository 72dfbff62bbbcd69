"""Experts where they lie: of one layer among many, in released bytes, in every form of the products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.formats import decode_fp4, decode_fp8, encode_fp4, encode_fp8
from kernels_pallas.grouped_experts import grouped_experts
from kernels_pallas.grouped_experts.stacks import ExpertStack, k_major

LAYERS, EXPERTS, WIDTH, HIDDEN, LIMIT = 3, 5, 48, 64, 1.0


def stacks(kind, layer):
    """(stacks of all layers, plain float32 matrices of the one layer) for w1, w3, w2."""
    rng = np.random.default_rng(0)
    made, plain = [], []
    for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        values = rng.standard_normal((LAYERS, EXPERTS, *shape)).astype(np.float32) * 0.3
        index = jnp.int32(layer)
        if kind == "plain":
            made.append(ExpertStack(jnp.asarray(values), None, index))
        elif kind == "fp4":
            codes, scale = encode_fp4(values)
            values = decode_fp4(codes, scale)
            made.append(ExpertStack(jnp.asarray(k_major(codes)), jnp.asarray(k_major(scale)), index))
        else:
            codes, scale = encode_fp8(values, (32, 32))
            values = decode_fp8(codes, scale, (32, 32))
            made.append(ExpertStack(jnp.asarray(codes), jnp.asarray(scale), index, (32, 32)))
        plain.append(jnp.asarray(values[layer]))
    return made, plain


@pytest.mark.parametrize("kind", ["plain", "fp4", "fp8"])
@pytest.mark.parametrize("tokens", [2, 20, 400])
def test_a_layer_of_a_stack_gives_what_its_own_matrices_give(kind, tokens):
    """Few picks one by one, tiles of 8 rows, and blocks of many rows."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((tokens, HIDDEN)), jnp.float32)
    chosen = jnp.asarray(np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :2].astype(np.int32))
    chosen = chosen.at[0].set(EXPERTS)  # none of these
    weights = jnp.asarray(rng.random((tokens, 2)) + 0.1, jnp.float32)
    made, plain = stacks(kind, layer=1)
    for stack, matrix in zip(made, plain, strict=True):
        assert stack.shape == matrix.shape
        np.testing.assert_array_equal(stack.one(jnp.int32(3), jnp.float32), matrix[3])
    run = jax.jit(grouped_experts, static_argnames=("limit", "implementation", "expected_picks"))
    want = run(x, *plain, chosen, weights, limit=LIMIT, implementation="reference")
    for picks in (None, 24.0):
        got = run(x, *made, chosen, weights, limit=LIMIT, implementation="xla", expected_picks=picks)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert not np.asarray(want[0]).any()


def test_only_the_bytes_of_experts_in_use_are_read():
    """Other experts' bytes may be anything: here they are NaN."""
    made, plain = stacks("plain", layer=2)
    used = np.array([1, 4])
    broken = []
    for stack in made:
        values = np.full(stack.values.shape, np.nan, np.float32)
        values[2, used] = np.asarray(stack.values)[2, used]
        broken.append(ExpertStack(jnp.asarray(values), None, stack.layer))
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((12, HIDDEN)), jnp.float32)
    chosen = jnp.broadcast_to(jnp.asarray(used, jnp.int32), (12, 2))
    weights = jnp.ones((12, 2))
    want = grouped_experts(x, *plain, chosen, weights, limit=LIMIT, implementation="reference")
    got = grouped_experts(x, *broken, chosen, weights, limit=LIMIT, implementation="xla")
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
