"""The backward seam kernels, interpreted as a TPU would run them, against the derivative of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hyper_connection import leave, seam
from kernels_pallas.hyper_connection.block_sizes_bwd import choose_backward_blocks
from kernels_pallas.tpu import chip_named

NAMES = ("out", "streams", "maps", "fn", "base", "scale", "gain")
EPSILONS = dict(eps=1e-6, norm_eps=1e-6)


def operands(batch, length, count, width, dtype=jnp.float32, *, seed=0, has_write=True, is_head=False):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    rows = count * (2 + count)
    fn_rows = count if is_head else rows
    return {
        "out": normal(batch, length, width).astype(dtype) if has_write else None,
        "streams": normal(batch, length, count * width).astype(dtype),
        "maps": jnp.abs(normal(rows, batch, length)) / count if has_write else None,
        # Logits of the size of 1, so that no gate and no round is saturated and its derivative 0.
        "fn": normal(fn_rows, count * width) / np.sqrt(count * width),
        "base": normal(fn_rows),
        "scale": 1 + 0.1 * normal(1 if is_head else 3),
        "gain": 1 + 0.1 * normal(width),
    }


def derivative(name, args, cotangents, *, is_head=False, iterations=3):
    """Cotangents of the operands that are there, by their names."""
    settings = EPSILONS if is_head else EPSILONS | {"iterations": iterations}
    function = functools.partial(leave if is_head else seam, implementation=name, **settings)
    return dict(zip(NAMES, jax.vjp(function, *(args[key] for key in NAMES))[1](cotangents), strict=True))


def random_cotangents(args, *, is_head=False, seed=100):
    batch, length, _ = args["streams"].shape
    rng = np.random.default_rng(seed)
    dtype = args["streams"].dtype
    shapes = [(batch, length, len(args["gain"])), args["streams"].shape]
    found = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    if not is_head:
        found.append(jnp.asarray(rng.standard_normal((len(args["fn"]), batch, length)), jnp.float32))
    return tuple(found)


def interpreted(function, *args):
    """Runs kernels as on a TPU: memory not yet written holds NaN, rows behind the arrays too."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(out_of_bounds_reads="uninitialized")):
        return jax.block_until_ready(function(*args))


def both_derivatives(args, **kwargs):
    cotangents = random_cotangents(args, is_head=kwargs.get("is_head", False))
    got = interpreted(jax.jit(functools.partial(derivative, "pallas", **kwargs)), args, cotangents)
    want = jax.jit(functools.partial(derivative, "reference", **kwargs))(args, cotangents)
    return got, want, cotangents


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@pytest.mark.parametrize(
    ("batch", "length", "count", "width"),
    [
        (1, 8, 4, 128),
        (2, 5, 4, 120),  # 10 tokens in tiles of 8, columns that do not fill a tile
        (1, 1, 3, 256),
        (2, 150, 2, 128),  # the last block of 256 tokens is incomplete
    ],
)
def test_every_gradient_of_a_seam_is_that_of_the_reference(batch, length, count, width):
    got, want, _ = both_derivatives(operands(batch, length, count, width))
    assert all(np.abs(w).max() > 0 for w in jax.tree.leaves(want))
    tolerances.assert_gradients_close(got, want, tolerances.GRADIENT_REORDERING)


def test_every_gradient_of_the_entry_is_that_of_the_reference():
    got, want, _ = both_derivatives(operands(1, 12, 4, 120, seed=1, has_write=False))
    assert got["out"] is None
    assert got["maps"] is None
    tolerances.assert_gradients_close(got, want, tolerances.GRADIENT_REORDERING)


@pytest.mark.parametrize("has_write", [True, False])
def test_every_gradient_of_leaving_is_that_of_the_reference(has_write):
    args = operands(1, 12, 4, 120, seed=2, has_write=has_write, is_head=True)
    got, want, _ = both_derivatives(args, is_head=True)
    tolerances.assert_gradients_close(got, want, tolerances.GRADIENT_REORDERING)


@pytest.mark.parametrize(
    ("batch", "length", "count", "width", "has_write", "is_head"),
    [
        (3, 20, 4, 200, True, False),  # two groups of the matrix unit, four rows behind the last token
        (1, 64, 2, 128, True, True),  # one group
        (3, 7, 2, 200, True, False),  # no whole group
        (1, 16, 2, 128, False, False),
    ],
)
def test_bfloat16_gradients_err_no_more_than_those_of_the_reference(batch, length, count, width, has_write, is_head):
    args = operands(batch, length, count, width, jnp.bfloat16, seed=3, has_write=has_write, is_head=is_head)
    got, want, cotangents = both_derivatives(args, is_head=is_head)
    exact = derivative("reference", wide(args), wide(cotangents), is_head=is_head)
    for name, value in exact.items():
        if value is None:
            continue
        assert got[name].dtype == want[name].dtype, name
        error, allowed = (np.linalg.norm(np.asarray(x[name], np.float32) - value) for x in (got, want))
        assert error <= tolerances.KERNEL_BFLOAT16_RATIO * allowed, (name, error, allowed)


@pytest.mark.parametrize("iterations", [1, 20])
def test_any_number_of_sinkhorn_rounds_is_differentiated(iterations):
    got, want, _ = both_derivatives(operands(1, 8, 2, 128, seed=4), iterations=iterations)
    tolerances.assert_gradients_close(got, want, tolerances.GRADIENT_REORDERING)


def test_blocks_that_cannot_fit_are_refused_with_the_bytes():
    with pytest.raises(ValueError, match=r"backward: .* needs [\d,]+ bytes of VMEM, v5p has [\d,]+ available"):
        choose_backward_blocks(
            chip_named("v5p"), 4096, 4, 65536, jnp.bfloat16, iterations=20, has_write=True, is_head=False
        )
