"""The seam kernels, interpreted as a TPU would run them, against the reference; the sublayers' order around them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hyper_connection import head, kernel, leave, mixing, read, seam, sharded_seam, unpack_maps, write
from kernels_pallas.hyper_connection.block_sizes import choose_blocks
from kernels_pallas.tpu import chip_named

SETTINGS = dict(iterations=20, eps=1e-6, norm_eps=1e-6)
LEAVE = dict(eps=1e-6, norm_eps=1e-6)
NAMES = ("out", "streams", "maps", "fn", "base", "scale", "gain")


def operands(batch, length, count, width, dtype=jnp.float32, *, seed=0, is_head=False):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    rows = count * (2 + count)
    fn_rows = count if is_head else rows
    return (
        normal(batch, length, width).astype(dtype),
        normal(batch, length, count * width).astype(dtype),
        jnp.abs(normal(rows, batch, length)) / count,
        0.2 * normal(fn_rows, count * width),
        normal(fn_rows),
        normal(1 if is_head else 3),
        1 + 0.1 * normal(width),
    )


def interpreted(function, *args):
    """Runs kernels as on a TPU: memory not yet written holds NaN, rows behind the arrays too."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(out_of_bounds_reads="uninitialized")):
        return jax.block_until_ready(function(*args))


def run_seam(args, name, **kwargs):
    return seam(*args, implementation=name, **(SETTINGS | kwargs))


def writing_rows(maps, count):
    return maps[count:]


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=tolerances.KERNEL_FLOAT32, atol=tolerances.KERNEL_FLOAT32)


@pytest.mark.parametrize(
    ("batch", "length", "count", "width"), [(1, 10, 4, 120), (1, 1, 2, 128), (17, 1, 2, 128), (3, 5, 4, 128)]
)
def test_the_seam_kernel_equals_the_reference(batch, length, count, width):
    args = operands(batch, length, count, width)
    x, streams, maps = interpreted(run_seam, args, "pallas")
    want_x, want_streams, want_maps = run_seam(args, "reference")
    assert_close(streams, want_streams)
    assert_close(x, want_x)
    assert_close(writing_rows(maps, count), writing_rows(want_maps, count))


@pytest.mark.parametrize(("batch", "length"), [(1, 8), (4, 1)])
def test_the_entry_kernel_equals_the_reference_and_leaves_the_streams_alone(batch, length):
    _, streams, _, *parameters = operands(batch, length, 4, 128, seed=1)
    args = (None, streams, None, *parameters)
    x, same, maps = interpreted(run_seam, args, "pallas")
    want_x, _, want_maps = run_seam(args, "reference")
    np.testing.assert_array_equal(same, streams)
    assert_close(x, want_x)
    assert_close(writing_rows(maps, 4), writing_rows(want_maps, 4))


@pytest.mark.parametrize(("batch", "length"), [(1, 8), (4, 1)])
def test_the_head_kernel_equals_the_reference(batch, length):
    args = operands(batch, length, 4, 120, seed=2, is_head=True)
    got = interpreted(lambda: leave(*args, implementation="pallas", **LEAVE))
    for a, b in zip(got, leave(*args, implementation="reference", **LEAVE), strict=True):
        assert_close(a, b)


@pytest.mark.nightly
@settings(max_examples=4, deadline=None)
@given(length=st.integers(1, 150), batch=st.integers(1, 3))
def test_any_number_of_tokens_gives_each_token_its_own_result(length, batch):
    args = operands(batch, length, 2, 128, seed=3)
    x, streams, _ = interpreted(run_seam, args, "pallas")
    want_x, want_streams, _ = run_seam(args, "reference")
    assert_close(streams, want_streams)
    assert_close(x, want_x)


def test_tokens_beyond_a_block_keep_to_their_own_rows_in_every_sequence():
    args = operands(2, 130, 2, 128, seed=9)
    x, streams, maps = interpreted(run_seam, args, "pallas")
    want_x, want_streams, want_maps = run_seam(args, "reference")
    assert_close(streams, want_streams)
    assert_close(x, want_x)
    assert_close(writing_rows(maps, 2), writing_rows(want_maps, 2))


@pytest.mark.parametrize(
    ("chip", "batch", "length", "count", "width"),
    # v6e mixes full tiles of tokens on the matrix unit, v5p and incomplete tiles on the vector unit.
    [
        ("v5p", 1, 16, 4, 128), ("v6e", 1, 16, 4, 256), ("v6e", 3, 16, 3, 120), ("v6e", 2, 8, 2, 128),
        ("v6e", 3, 5, 4, 128),
    ],
)  # fmt: skip
def test_bfloat16_streams_lose_nothing_but_their_own_rounding(monkeypatch, chip, batch, length, count, width):
    monkeypatch.setattr(kernel, "current_chip", lambda: chip_named(chip))
    args = list(operands(batch, length, count, width, jnp.bfloat16, seed=4))
    args[2] = args[2].at[:count].set(jnp.nan)  # nobody may read the reading rows
    x, streams, maps = interpreted(run_seam, args, "pallas")
    want_x, want_streams, _ = run_seam(args, "reference")
    # The same float32 sums in another order: a value next to a rounding boundary may round the other way, rarely.
    differing = np.mean(np.asarray(streams != want_streams))
    assert differing < 1e-3
    exact = run_seam(tuple(a.astype(jnp.float32) for a in args), "reference")
    error = lambda value: float(jnp.abs(value.astype(jnp.float32) - exact[0]).max())  # noqa: E731
    assert error(x) <= tolerances.KERNEL_BFLOAT16_RATIO * error(want_x)
    # Maps of the very streams that came out: fn in three bf16 parts is exact.
    _, _, want_maps = run_seam((None, streams.astype(jnp.float32), None, *args[3:]), "reference")
    assert_close(writing_rows(maps, count), writing_rows(want_maps, count))


def test_a_product_on_the_matrix_unit_is_exact_to_float32():
    rng = np.random.default_rng(0)
    maps = jnp.asarray(rng.standard_normal((24, mixing.TILE)), jnp.float32)
    rows = jnp.asarray(rng.standard_normal((5, mixing.TILE, 128)), jnp.bfloat16)
    matrices = jnp.zeros((4, mixing.TILE, 256), jnp.bfloat16)
    filled = pl.pallas_call(
        mixing.fill_matrices, out_shape=jax.ShapeDtypeStruct(matrices.shape, matrices.dtype), interpret=True
    )(maps, jnp.asarray(mixing.places(4), jnp.bfloat16))
    mixed = mixing.mix_tile(list(filled), list(rows)).reshape(4, mixing.TILE, 128)
    weights = np.asarray(maps[4:], np.float64).reshape(5, 4, mixing.TILE)
    want = np.einsum("skt,std->ktd", weights, np.asarray(rows, np.float64))
    # Five float32 products and their sum, of values up to about 16.
    np.testing.assert_allclose(mixed, want, rtol=0, atol=16 * 5 * 2.0**-24)


def test_the_kernels_gradient_equals_that_of_the_reference():
    args = operands(1, 8, 2, 128, seed=5)
    weights = [jnp.asarray(np.random.default_rng(i).standard_normal(s), jnp.float32) for i, s in enumerate(
        [(1, 8, 128), (1, 8, 256), (6, 1, 8)])]  # fmt: skip

    def loss(name, *args):
        x, streams, maps = run_seam(args, name, iterations=4)
        parts = (x, streams, writing_rows(maps, 2))
        return sum(jnp.sum(a * w) for a, w in zip(parts, weights, strict=True))

    every = tuple(range(7))
    got = interpreted(jax.jit(jax.grad(functools.partial(loss, "pallas"), every)), *args)
    want = jax.jit(jax.grad(functools.partial(loss, "reference"), every))(*args)
    for name, a, b in zip(NAMES, got, want, strict=True):
        bound = tolerances.GRADIENT_REORDERING * np.linalg.norm(b) + 1e-6
        assert np.linalg.norm(np.asarray(a - b)) <= bound, name


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_seam_is_a_write_then_a_read_then_a_norm(name):
    out, streams, maps, fn, base, scale, gain = args = operands(2, 5, 4, 16, seed=6)
    x, new, new_maps = run_seam(args, name)
    apart = write(out, streams.reshape(2, 5, 4, 16), unpack_maps(maps, 4), implementation="reference")
    want, want_maps = read(apart, fn, base, scale, **SETTINGS)
    assert_close(new, apart.reshape(new.shape))
    assert_close(x, want / np.sqrt(np.mean(np.square(want), -1, keepdims=True) + 1e-6) * gain)
    assert_close(unpack_maps(new_maps, 4).comb, want_maps.comb)
    assert_close(unpack_maps(new_maps, 4).post, want_maps.post)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_leaving_is_a_write_then_the_head_mix_then_a_norm(name):
    out, streams, maps, fn, base, scale, gain = args = operands(2, 5, 4, 16, seed=7, is_head=True)
    x, new = leave(*args, implementation=name, **LEAVE)
    apart = write(out, streams.reshape(2, 5, 4, 16), unpack_maps(maps, 4), implementation="reference")
    want = head(apart, fn, base, scale, **LEAVE)
    assert_close(new, apart.reshape(new.shape))
    assert_close(x, want / np.sqrt(np.mean(np.square(want), -1, keepdims=True) + 1e-6) * gain)


def test_the_cost_is_that_of_all_blocks():
    args = operands(1, 300, 2, 128, jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda *args: run_seam(args, "pallas"))(*args))
    steps, block = 2, 256
    assert f"grid=({steps},)" in text
    flops = 2 * steps * block * 2 * 128 * (8 + 3 + 1)  # fn's rows, output and streams of each new one, the reading
    size = 300 * 128 * 2 * (2 * 2 + 2)  # streams twice, out and x
    cost = re.search(r"CostEstimate\(flops=(\d+), transcendentals=\d+, bytes_accessed=(\d+)", text)
    assert cost is not None
    assert int(cost[1]) == flops
    assert size < int(cost[2]) < 1.2 * size


def test_on_a_mesh_every_device_keeps_to_its_rows():
    args = operands(2, 8, 2, 128, seed=8)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    got = interpreted(jax.jit(sharded_seam(mesh, ("data",), implementation="pallas", **SETTINGS)), *args)
    for a, b in zip(got[:2], run_seam(args, "reference")[:2], strict=True):
        assert_close(a, b)


def test_shapes_that_do_not_belong_together_are_named():
    out, streams, maps, fn, base, scale, gain = operands(1, 4, 4, 16)
    with pytest.raises(ValueError, match=r"fn has shape \(23, 64\), need \(24, 64\)"):
        run_seam((out, streams, maps[1:], fn[1:], base[1:], scale, gain), "reference")
    with pytest.raises(ValueError, match="out and maps come together"):
        run_seam((None, *operands(1, 4, 4, 16)[1:]), "reference")


def test_blocks_that_cannot_fit_are_refused_with_the_bytes():
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes of VMEM, v5p has [\d,]+ available"):
        choose_blocks(chip_named("v5p"), 4096, 4, 65536, jnp.bfloat16, has_write=True, is_head=False)
