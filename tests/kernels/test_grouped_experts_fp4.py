"""Few tokens through FP4 experts, interpreted as a TPU would run them, against the form in plain XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.formats import encode_fp4
from kernels_pallas.grouped_experts import grouped_experts, kernel_fp4
from kernels_pallas.grouped_experts.stacks import ExpertStack, k_major
from kernels_pallas.tpu import CHIPS

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
LAYERS, EXPERTS, HIDDEN, WIDTH, LIMIT = 2, 5, 1024, 128, 1.0


def stacks() -> tuple[ExpertStack, ...]:
    """w1, w3, w2 of the second layer; another's bytes are not to be read."""
    rng, made = np.random.default_rng(0), []
    for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        codes, scale = encode_fp4(rng.standard_normal((LAYERS, EXPERTS, *shape)).astype(np.float32) / 16)
        codes, scale = jnp.asarray(k_major(codes)), jax.lax.bitcast_convert_type(k_major(scale), jnp.float8_e8m0fnu)
        made.append(ExpertStack(codes, scale.at[0].set(jnp.nan), jnp.int32(1)))
    return tuple(made)


def picks(tokens: int, load: str) -> jax.Array:
    """Two experts per token."""
    experts = np.argsort(np.random.default_rng(tokens).random((tokens, EXPERTS)), axis=1)[:, :2].astype(np.int32)
    if load == "one expert":
        experts[:, 0], experts[:, 1] = 3, EXPERTS
    elif load == "some of none":
        experts[::3, 0] = EXPERTS
    elif load == "none":
        experts[:] = EXPERTS
    return jnp.asarray(experts)


@pytest.mark.parametrize("load", ["random", "one expert", "some of none", "none"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_a_tile_at_a_time_gives_what_xla_gives(tokens: int, load: str) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((tokens, HIDDEN)), jnp.bfloat16)
    weights = jnp.asarray(rng.random((tokens, 2)) + 0.1, jnp.float32)
    matrices, experts = stacks(), picks(tokens, load)
    assert kernel_fp4.is_for(x, matrices, 8, CHIPS["v5p"])
    run = functools.partial(grouped_experts, x, *matrices, experts, weights, limit=LIMIT)
    want = run(implementation="xla")
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        got = run(implementation="pallas")
    # Both round the same products of bfloat16 to the same places; sums in float32 are ordered otherwise, and a rare
    # channel between two bfloat16 values then falls to the other side.
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
    assert np.abs(want).max() > 0.1 or load == "none"
