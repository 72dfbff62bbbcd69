"""The decode kernels in TPU interpret mode: slots that hold nothing are NaN, as is memory that nobody wrote; reads out
of bounds raise."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from kernels_pallas.sparse_attention import sharded_sparse_attention_decode, sparse_attention_decode
from kernels_pallas.sparse_attention.block_sizes_decode import DecodeBlockSizes

SCALE = 0.1


def problem(seed, *, batch=3, heads=4, dim=128, window=16, entries=0, topk=0, layers=2, lengths=None):
    """Arguments of `sparse_attention_decode` on stacked caches, sequences of different lengths, NaN in empty slots."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    seen = rng.integers(0, entries + 1, batch) if lengths is None else np.array(lengths)
    filled = np.where(seen > 0, window, rng.integers(1, window + 1, batch))
    ring = np.where(np.arange(window)[:, None] < filled[:, None, None], draw(layers, batch, window, dim), np.nan)
    inputs = dict(q=draw(batch, heads, dim), ring=ring, ring_count=filled.astype(np.int32), sink=draw(heads))
    if entries:
        values = draw(layers, batch, entries, dim)
        inputs["entries"] = np.where(np.arange(entries)[:, None] < seen[:, None, None], values, np.nan)
        inputs["entry_count"] = seen.astype(np.int32)
    if topk:
        order = np.argsort(rng.random((batch, entries)), axis=-1)[:, :topk]
        chosen = np.full((batch, topk), -1)
        chosen[:, : order.shape[1]] = order
        inputs["selection"] = np.where(rng.random((batch, topk)) < 0.1, -1, chosen).astype(np.int32)
    return {name: jnp.asarray(value, jnp.float32 if value.dtype == float else None) for name, value in inputs.items()}


def cast(inputs, dtype):
    return {name: x.astype(dtype) if name in ("q", "ring", "entries") else x for name, x in inputs.items()}


def kernel(inputs, *, races=False, layer=1, **options):
    mode = pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=races, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(mode):
        call = functools.partial(
            sparse_attention_decode, layer=layer, scale=SCALE, implementation="pallas", **options
        )  # fmt: skip
        return jax.block_until_ready(jax.jit(lambda x: call(**x))(inputs))


def reference(inputs, **options):
    finite = {name: jnp.nan_to_num(x) for name, x in inputs.items()}  # a mask multiplies what it hides by zero
    return sparse_attention_decode(**finite, layer=1, scale=SCALE, implementation="reference", **options)


CASES = {
    "window alone": dict(batch=5),
    "one page": dict(entries=37, lengths=[37, 5, 0]),
    "one long page": dict(batch=5, entries=300, lengths=[300, 260, 100, 0, 256]),
    "pages": dict(entries=100, lengths=[0, 100, 33]),
    "selection below what is visible": dict(entries=60, topk=20, lengths=[60, 41, 7]),
    "selection beyond what is visible": dict(entries=12, topk=40, lengths=[12, 0, 1]),
}
SIZES = {
    "pages": DecodeBlockSizes(page=32),
    "window alone": DecodeBlockSizes(sequences=2),
    "one long page": DecodeBlockSizes(paged_sequences=2),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_without_races(case, capfd):
    inputs = problem(0, **CASES[case])
    got = kernel(inputs, races=True, block_sizes=SIZES.get(case))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    np.testing.assert_allclose(got, reference(inputs), atol=tolerances.KERNEL_FLOAT32)


@pytest.mark.parametrize("case", ["pages", "one long page", "selection below what is visible"])
def test_bf16_errs_no_more_than_the_bf16_reference_does(case):
    inputs = cast(problem(1, **CASES[case] | dict(dim=256, heads=16)), jnp.bfloat16)
    exact = reference(cast(inputs, jnp.float32))
    got, oracle = (np.asarray(x, np.float32) for x in (kernel(inputs, block_sizes=SIZES.get(case)), reference(inputs)))
    allowed = tolerances.KERNEL_BFLOAT16_RATIO * np.abs(oracle - exact).max()
    assert np.abs(got - exact).max() <= allowed


@pytest.mark.parametrize("case", ["pages", "one long page", "selection below what is visible"])
def test_partial_results_have_the_sums_maxima_and_totals_of_the_reference(case):
    inputs = problem(2, **CASES[case])
    got = kernel(inputs, is_partial=True, block_sizes=SIZES.get(case))
    for part, wanted in zip(got, reference(inputs, is_partial=True), strict=True):
        np.testing.assert_allclose(part, wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=3, deadline=None)
@given(
    seen=st.lists(st.integers(0, 50), min_size=1, max_size=2),
    topk=st.sampled_from([None, 1, 16, 50, 70]),
    seed=st.integers(0, 99),
)
def test_any_lengths_and_any_selection(seen, topk, seed):
    inputs = problem(seed, batch=len(seen), entries=50, topk=topk or 0, lengths=seen)
    got = kernel(inputs, block_sizes=DecodeBlockSizes(page=16))
    np.testing.assert_allclose(got, reference(inputs), atol=tolerances.KERNEL_FLOAT32)


def test_an_empty_batch_gives_an_empty_result():
    inputs = problem(3, batch=0, entries=4, topk=2)
    assert kernel(inputs).shape == (0, 4, 128)
    assert [part.shape for part in kernel(inputs, is_partial=True)] == [(0, 4, 128), (0, 4), (0, 4)]


def test_a_cache_stored_by_rows_needs_no_selection():
    inputs = problem(4, entries=30, lengths=[30, 2, 11])
    by_rows = inputs | dict(entries=inputs["entries"].reshape(2, 3, 30, 1, 128))
    np.testing.assert_allclose(kernel(by_rows), reference(inputs), atol=tolerances.KERNEL_FLOAT32)


def test_head_sizes_that_do_not_fill_lanes():
    inputs = problem(5, batch=1, dim=40, heads=3, window=5, entries=9, topk=4, lengths=[9])
    np.testing.assert_allclose(kernel(inputs), reference(inputs), atol=tolerances.KERNEL_FLOAT32)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", ["window alone", "one page", "selection below what is visible"])
def test_sequences_heads_and_entries_on_a_mesh_equal_one_device(case, implementation):
    entries = {} if case == "window alone" else dict(entries=60)
    inputs = problem(6, **CASES[case] | entries | dict(batch=4, lengths=[60, 41, 7, 0]))
    inputs = {name: jnp.nan_to_num(x) for name, x in inputs.items()}
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "tensor", "sequence"))
    got = sharded_sparse_attention_decode(
        mesh, **inputs, batch_axes="data", head_axes="tensor", sequence_axes="sequence", layer=1, scale=SCALE,
        implementation=implementation,
    )  # fmt: skip
    np.testing.assert_allclose(got, reference(inputs), atol=tolerances.KERNEL_FLOAT32)


def test_the_kernels_on_a_mesh_equal_the_reference():
    inputs = problem(7, batch=1, entries=20, topk=6, lengths=[15])
    mode = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
    mesh = Mesh(np.array(jax.devices()[:2]), ("sequence",))
    with pltpu.force_tpu_interpret_mode(mode):
        got = sharded_sparse_attention_decode(
            mesh, **inputs, sequence_axes="sequence", layer=1, scale=SCALE, implementation="pallas"
        )
    np.testing.assert_allclose(got, reference(inputs), atol=tolerances.KERNEL_FLOAT32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scale=0.0), "scale: got 0.0"),
        (dict(layer=None), "ring: got shape"),
        (dict(entries=jnp.zeros((2, 3, 30, 64))), "entries: got shape"),
        (dict(entry_count=None), "go together"),
        (dict(entries=jnp.zeros((2, 3, 30, 128), jnp.bfloat16)), "need one of bfloat16, float32"),
    ],
)
def test_unfit_arguments_are_refused(change, message):
    inputs = problem(8, entries=30) | dict(scale=SCALE, layer=1, implementation="pallas") | change
    with pytest.raises(ValueError, match=message):
        sparse_attention_decode(**inputs)


def test_blocks_beyond_a_chips_memory_are_refused_with_the_bytes():
    inputs = problem(9, entries=30) | dict(entries=jax.ShapeDtypeStruct((2, 3, 1 << 20, 128), jnp.float32))
    call = functools.partial(
        sparse_attention_decode, layer=1, scale=SCALE, implementation="pallas",
        block_sizes=DecodeBlockSizes(page=1 << 20),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes of VMEM, v5p has [\d,]+ available; give smaller"):
        jax.eval_shape(lambda x: call(**x), inputs)
