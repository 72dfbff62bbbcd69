"""Exact top-k of rows: the reference against its definition, the interpreted TPU kernel against the reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.exact_topk import block_sizes, exact_topk, kernel_bisect, pallas, reference
from kernels_pallas.sparse_attention.reference import unpacked_mask

# Rows behind the last one are read as NaN: they only spoil themselves.
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized")


@functools.cache
def _kernel(topk, output, chip):
    return jax.jit(functools.partial(pallas.exact_topk, topk=topk, output=output, chip=chip))


def run(scores, *, topk, output="mask", chip="v6e"):
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        return np.asarray(_kernel(topk, output, chip)(scores))


def by_definition(scores, topk):
    chosen = np.zeros(scores.shape, bool)
    for row, flags in zip(scores, chosen, strict=True):
        best = sorted((i for i in range(len(row)) if row[i] > -np.inf), key=lambda i: (-row[i], i))
        flags[best[:topk]] = True
    return chosen


def problem(rows, keys, *, seed=0, dtype=jnp.float32):
    """Rows of random scores, equal ones, some and only −inf, few values, and zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, keys)).astype(np.float32)
    special = [
        lambda r: np.full_like(r, 1.5), lambda r: np.where(np.arange(keys) % 3, r, -np.inf),
        lambda r: np.full_like(r, -np.inf), lambda r: np.round(2 * r) / 2, lambda r: np.where(r > 0, 0.0, -0.0),
        lambda r: -np.abs(r) * 1e30,
    ]  # fmt: skip
    for i, change in enumerate(special[: rows - 1]):
        x[i + 1] = change(x[i + 1])
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize(
    "topk", [1, 7, 64, 500], ids=["one", "some", "more than some rows have", "more than there are"]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_reference_follows_the_definition(topk, dtype):
    scores = problem(9, 70, dtype=dtype)
    want = by_definition(np.asarray(scores, np.float32), topk)
    mask = exact_topk(scores, topk=topk, output="mask")
    np.testing.assert_array_equal(unpacked_mask(mask, 70), want)
    chosen = np.sort(exact_topk(scores, topk=topk))
    assert chosen.shape == (9, min(topk, 70))
    for row, flags in zip(chosen, want, strict=True):
        np.testing.assert_array_equal(row[row >= 0], np.flatnonzero(flags))


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [("v5p", jnp.float32), ("v5p", jnp.bfloat16), ("v6e", jnp.float32), ("v6e", jnp.bfloat16)],
    ids=["words", "words of bfloat16", "two halves", "one half"],
)
@pytest.mark.parametrize(("topk", "output"), [(7, "mask"), (40, "list"), (300, "mask")])
def test_the_kernel_chooses_what_the_reference_chooses(chip, dtype, topk, output):
    scores = problem(9, 300, dtype=dtype)
    want = reference.exact_topk(scores, topk=topk, output=output)
    got = run(scores, topk=topk, output=output, chip=chip)
    if output == "list":
        got, want = np.sort(got), np.sort(want)
    np.testing.assert_array_equal(got, want)


@settings(max_examples=20)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2.0**-23, -1.0, -1.0 - 2.0**-23, 3e38, -3e38, -np.inf]),
                    min_size=2, max_size=5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_ties_and_neighbouring_values(values, seed):
    """Values that differ in their upper or only in their lower halves, at both signs; one compiled program for all."""
    scores = jnp.asarray(np.random.default_rng(seed).choice(np.float32(values), (9, 300)))
    got = run(scores, topk=7)
    np.testing.assert_array_equal(got, reference.exact_topk(scores, topk=7, output="mask"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lanes_that_share_a_rows_keys(monkeypatch, dtype):
    monkeypatch.setattr(block_sizes, "_MANY_KEYS", 2048)
    scores = problem(16, 2048, seed=1, dtype=dtype)
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        got = pallas.exact_topk(scores, topk=300, output="mask", chip="v6e")
    np.testing.assert_array_equal(got, reference.exact_topk(scores, topk=300, output="mask"))


def test_several_tiles_of_two_groups_the_last_one_incomplete():
    scores = problem(270, 256, seed=2, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(run(scores, topk=20), reference.exact_topk(scores, topk=20, output="mask"))


@pytest.mark.parametrize("implementation", ["pallas", "reference"])
@pytest.mark.parametrize("shape", [(0, 40), (3, 0)], ids=["no rows", "no scores"])
def test_nothing_is_chosen_of_nothing(shape, implementation):
    scores = jnp.zeros(shape, jnp.float32)
    assert exact_topk(scores, topk=5, implementation=implementation).shape == (shape[0], min(5, shape[1]))
    assert exact_topk(scores, topk=5, output="mask", implementation=implementation).shape == (
        shape[0],
        -(-shape[1] // 32),
    )


def test_what_cannot_be_computed_is_refused():
    scores = jnp.zeros((2, 8), jnp.float32)
    for changed, options, message in [
        (scores, {"topk": 0}, "topk 0, need 1 to"),
        (scores.astype(jnp.float16), {"topk": 1}, "scores of float16, need bfloat16 or float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            exact_topk(changed, **options)
    big = jax.ShapeDtypeStruct((16, 1 << 20), jnp.float32)
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes of VMEM, v5p has"):
        jax.eval_shape(functools.partial(pallas.exact_topk, topk=8, chip="v5p"), big)


def test_the_sorting_network_sorts_every_zero_one_input():
    """Which is enough for every input (the zero-one principle)."""
    values = np.array(list(itertools.product((0, 1), repeat=15))).T
    for a, b in kernel_bisect.sorting_network(15):
        values[a], values[b] = np.maximum(values[a], values[b]), np.minimum(values[a], values[b])
    assert (np.diff(values, axis=0) <= 0).all()


def test_the_selection_carries_no_gradient():
    scores = problem(2, 40)
    gradient = jax.grad(lambda x: x.sum() * exact_topk(x, topk=4).sum())(scores)
    assert (gradient == gradient.ravel()[0]).all()
