"""Grouped products of many rows, interpreted as a TPU would run them, against every expert over every token."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.aot import compile_for
from kernels_pallas.grouped_experts import grouped_experts, pallas
from kernels_pallas.grouped_experts.stacks import ExpertStack
from kernels_pallas.tpu import chip_named
from v4jax.config import ModelConfig

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
LIMIT, EXPERTS, HIDDEN, WIDTH = 1.0, 3, 256, 128


def problem(tokens: int, choices: int, load: str) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """x, w1, w3, w2, weights in bfloat16 (weights float32), experts, and a cotangent."""
    rng = np.random.default_rng(tokens)
    shapes = (tokens, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    floats = [jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-1]), jnp.bfloat16) for shape in shapes]
    experts = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :choices].astype(np.int32)
    if load == "one expert":
        experts[:, 0], experts[:, 1:] = 1, EXPERTS
    elif load == "some of none":
        experts[rng.random(experts.shape) < 0.4] = EXPERTS
    elif load == "none":
        experts[:] = EXPERTS
    weights = jnp.asarray(rng.random((tokens, choices)) + 0.1, jnp.float32)
    return (*floats, weights), jnp.asarray(experts), jnp.asarray(rng.standard_normal((tokens, HIDDEN)), jnp.float32)


@functools.cache
def gradient(implementation: str):
    def objective(floats, experts, cotangent):
        x, w1, w3, w2, weights = floats
        out = grouped_experts(x, w1, w3, w2, experts, weights, limit=LIMIT, implementation=implementation)
        return jnp.sum(out * cotangent), out

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


@pytest.mark.parametrize("load", ["random", "one expert", "some of none", "none"])
@pytest.mark.parametrize(("tokens", "choices"), [(700, 1), (300, 2)])
def test_output_and_gradients_equal_the_references(tokens: int, choices: int, load: str) -> None:
    floats, experts, cotangent = problem(tokens, choices, load)
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        (_, out), gradients = gradient("pallas")(floats, experts, cotangent)
    exact = tuple(a.astype(jnp.float32) for a in floats)
    (_, want), wanted = gradient("reference")(exact, experts, cotangent)
    (_, rounded), plain = gradient("xla")(floats, experts, cotangent)
    assert out.dtype == jnp.float32
    for got, exact, other in zip((out, *gradients), (want, *wanted), (rounded, *plain), strict=True):
        got, other, exact = (np.asarray(a, np.float32) for a in (got, other, exact))
        assert np.isfinite(got).all()
        bound = tolerances.KERNEL_BFLOAT16_RATIO * np.linalg.norm(other - exact)
        assert np.linalg.norm(got - exact) <= bound + 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("change", [None, "float32", "few rows", "layers"])
def test_what_the_products_do_not_take_runs_in_loops(change: str | None) -> None:
    (x, w1, w3, w2, weights), experts, _ = problem(700, 1, "random")
    stacks = [ExpertStack(matrix) for matrix in (w1, w3, w2)]
    if change == "float32":
        x = x.astype(jnp.float32)
    elif change == "few rows":
        x, experts, weights = x[:60], experts[:60], weights[:60]
    elif change == "layers":
        stacks = [ExpertStack(stack.values[None], None, jnp.int32(0)) for stack in stacks]
    call = functools.partial(pallas.grouped_experts, limit=LIMIT)
    assert ("pallas_call" in str(jax.make_jaxpr(call)(x, *stacks, experts, weights))) == (change is None)


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_products_of_the_released_widths_fit_the_smallest_vmem(preset: str) -> None:
    config = getattr(ModelConfig, preset)()
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shapes = (EXPERTS, width, hidden), (EXPERTS, width, hidden), (EXPERTS, hidden, width)
    x, *matrices = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, hidden), *shapes))
    experts, weights = (jax.ShapeDtypeStruct((1024, 6), dtype) for dtype in (jnp.int32, jnp.float32))

    def objective(x, matrices, experts, weights):
        w1, w3, w2 = map(ExpertStack, matrices)
        return jnp.sum(pallas.grouped_experts(x, w1, w3, w2, experts, weights, limit=LIMIT))

    compiled = compile_for(chip_named("v5p"), jax.grad(objective, argnums=(0, 1)), (x, matrices, experts, weights))
    assert compiled.as_text().count("tpu_custom_call") >= 8, "five products with rows, three over rows"
