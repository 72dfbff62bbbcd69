"""The TPU kernels of index_topk, interpreted: what they choose against the reference, memory filled with NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.index_topk import index_topk, index_topk_decode, kernel_scores, pallas, reference
from kernels_pallas.sparse_attention.reference import unpacked_mask

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


@functools.cache
def _prefill(topk, output, chip):
    return jax.jit(functools.partial(pallas.index_topk, topk=topk, output=output, chip=chip))


@functools.cache
def _decode(topk, chip):
    return jax.jit(functools.partial(pallas.index_topk_decode, topk=topk, chip=chip))


def prefill(*inputs, topk, output="list", chip=None):
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        return np.asarray(_prefill(topk, output, chip)(*inputs))


def decode(*inputs, topk, chip=None):
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        return np.asarray(_decode(topk, chip)(*inputs))


def problem(seed, *, batch=1, queries=20, entries=300, heads=16, dim=8, dtype=jnp.float32, offset=500):
    """q, weights, keys, position, segment, end, owner; by default the last queries see all entries but a few."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((batch, queries, heads, dim)), dtype)
    keys = jnp.asarray(rng.standard_normal((batch, entries, dim)), dtype)
    weights = jnp.asarray(rng.standard_normal((batch, queries, heads)), jnp.float32)
    position = np.broadcast_to(np.arange(queries) * 4 + offset, (batch, queries)).astype(np.int32)
    end = np.broadcast_to(2 * np.arange(entries) + 1, (batch, entries)).astype(np.int32)
    ones = np.ones((batch, queries), np.int32), np.ones((batch, entries), np.int32)
    return q, weights, keys, *map(jnp.asarray, (position, ones[0], end, ones[1]))


def values_of(q, weights, keys, scale=None):
    keys = reference.decode_keys(keys, scale, jnp.float32)
    return np.asarray(reference.scores(q.astype(jnp.float32), weights, keys))


def assert_chosen(got, want, values, relative):
    """Both lists [..., K] hold the same entries, but for some whose score lies within the bound of the last chosen."""
    got, want = (np.sort(np.asarray(x)).reshape(-1, x.shape[-1]) for x in (got, want))
    values = values.reshape(len(got), -1)
    for mine, theirs, score in zip(got, want, values, strict=True):
        mine, theirs = mine[mine >= 0], theirs[theirs >= 0]
        assert len(mine) == len(theirs)
        assert len(set(mine)) == len(mine)
        if (mine == theirs).all():
            continue
        last = score[theirs].min()
        swapped = np.setxor1d(mine, theirs)
        assert np.abs(score[swapped] - last).max() <= relative * abs(last) + tolerances.FLIP_SCORE_GAP


# ---- prefill ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("topk", "output"), [(1, "mask"), (7, "list"), (7, "mask"), (400, "list")])
def test_prefill_selects_what_the_reference_selects(topk, output):
    inputs = problem(0, batch=2)
    want = reference.index_topk(*inputs, topk=topk, output=output)
    got = prefill(*inputs, topk=topk, output=output)
    np.testing.assert_array_equal(
        np.sort(got) if output == "list" else got, np.sort(want) if output == "list" else want
    )


@pytest.mark.parametrize("chip", ["v5p", "v6e"], ids=["held as float32", "held as bfloat16"])
def test_bfloat16_differs_only_within_the_rounding_of_the_scores(chip):
    inputs = problem(1, dtype=jnp.bfloat16)
    want = np.asarray(reference.index_topk(*inputs, topk=40))
    values = values_of(*inputs[:3])
    got = prefill(*inputs, topk=40, chip=chip)
    assert_chosen(got, want, values, tolerances.INDEX_SCORE_BFLOAT16)
    mask = prefill(*inputs, topk=40, output="mask", chip=chip)
    np.testing.assert_array_equal(mask, reference.pack_mask(jnp.asarray(got), 300))


def test_bfloat16_ties_go_to_the_lowest_index_of_the_rounded_scores():
    inputs = problem(2, dtype=jnp.bfloat16)
    rounded = jnp.asarray(values_of(*inputs[:3])).astype(jnp.bfloat16).astype(jnp.float32)
    visible = (inputs[5][:, None] <= inputs[3][..., None]) & (inputs[6][:, None] == inputs[4][..., None])
    want = np.asarray(reference.select(rounded, jnp.asarray(visible), 40))
    got = prefill(*inputs, topk=40, chip="v6e")
    # A float32 sum in another order may round to the neighbouring bfloat16: all but a few rows agree to the letter.
    assert (np.sort(got) == np.sort(want)).all(-1).mean() > 0.8


@settings(max_examples=12)
@given(st.data())
def test_any_documents_lengths_and_ties(data):
    """Packed documents, empty slots, scores drawn from few values, −inf among them: one compiled program for all."""
    q, weights, keys, *_ = problem(data.draw(st.integers(0, 99)), queries=20, entries=300)
    cuts = sorted(data.draw(st.lists(st.integers(0, 20), min_size=0, max_size=3)))
    edges = sorted(data.draw(st.lists(st.integers(0, 300), min_size=len(cuts), max_size=len(cuts))))
    segment = 1 + np.searchsorted(cuts, np.arange(20), side="right")[None].astype(np.int32)
    owner = 1 + np.searchsorted(edges, np.arange(300), side="right")[None].astype(np.int32)
    owner[0, data.draw(st.integers(0, 300)) :] = -1
    segment[0, data.draw(st.integers(1, 20)) :] = 0
    position = np.asarray(data.draw(st.lists(st.integers(0, 700), min_size=20, max_size=20)), np.int32)[None]
    end = (2 * np.arange(300) + 1)[None].astype(np.int32)
    kind = data.draw(st.sampled_from(["random", "equal", "few values", "zero", "minus infinity"]))
    if kind == "equal":
        keys = jnp.broadcast_to(keys[:, :1], keys.shape)
    elif kind == "few values":
        keys = keys[:, jnp.arange(300) % 3]
    elif kind == "zero":
        weights = weights * 0.0
    elif kind == "minus infinity":
        weights = weights.at[:, ::2, 3].set(-jnp.inf)
    inputs = (q, weights, keys, *map(jnp.asarray, (position, segment, end, owner)))
    want = np.sort(reference.index_topk(*inputs, topk=7))
    if kind != "minus infinity":  # there a relu of 0 times −inf is NaN
        np.testing.assert_array_equal(np.sort(prefill(*inputs, topk=7)), want)
    else:
        finite = (q, jnp.where(jnp.isinf(weights), -1e38, weights), keys * 1e3, *inputs[3:])
        np.testing.assert_array_equal(np.sort(prefill(*finite, topk=7)), np.sort(reference.index_topk(*finite, topk=7)))


@pytest.mark.slow
@pytest.mark.nightly
def test_several_chunks_groups_and_a_tail():
    """4,500 keys: three chunks, two groups, the last chunk partly beyond the keys; the first queries see one chunk."""
    inputs = problem(3, queries=16, entries=4500, dim=8, offset=0)
    position = jnp.linspace(0, 8999, 16).astype(jnp.int32)[None]
    inputs = (*inputs[:3], position, *inputs[4:])
    want = np.sort(reference.index_topk(*inputs, topk=200))
    np.testing.assert_array_equal(np.sort(prefill(*inputs, topk=200)), want)


def test_fp8_keys_and_their_scales():
    q, weights, keys, *rest = problem(4, dtype=jnp.bfloat16)
    codes = keys.astype(jnp.float8_e4m3fn)
    scale = jnp.exp2(jnp.asarray(np.random.default_rng(0).integers(-3, 4, (1, 300)), jnp.float32))
    want = reference.index_topk(q, weights, codes, *rest, scale, topk=40)
    got = prefill(q, weights, codes, *rest, scale, topk=40, chip="v6e")
    assert_chosen(got, want, values_of(q, weights, codes, scale), tolerances.INDEX_SCORE_BFLOAT16)


# ---- decode ----------------------------------------------------------------------------------------------------------
def decode_problem(seed, *, batch=5, entries=300, heads=16, dim=8, dtype=jnp.float32, layers=2):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((batch, heads, dim)), dtype)
    weights = jnp.asarray(rng.standard_normal((batch, heads)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((layers, batch, entries, dim)), dtype)
    return q, weights, keys


@settings(max_examples=8)
@given(st.lists(st.integers(0, 310), min_size=5, max_size=5), st.integers(0, 1), st.booleans(), st.integers(0, 99))
def test_decode_of_unequal_lengths_in_stacked_caches(visible, layer, all_equal, seed):
    q, weights, keys = decode_problem(seed)
    keys = jnp.broadcast_to(keys[:, :, :1], keys.shape) if all_equal else keys
    inputs = (q, weights, keys, jnp.asarray(visible, jnp.int32), None, jnp.int32(layer))
    want = np.sort(reference.index_topk_decode(*inputs, topk=40))
    np.testing.assert_array_equal(np.sort(decode(*inputs, topk=40)), want)


@pytest.mark.parametrize("batch", [1, pytest.param(17, marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_decode_of_one_and_of_more_than_a_tile_of_sequences(batch):
    q, weights, keys = decode_problem(5, batch=batch, layers=1)
    inputs = (q, weights, keys[0], jnp.full(batch, 290, jnp.int32))
    want = np.sort(reference.index_topk_decode(*inputs, topk=300))
    np.testing.assert_array_equal(np.sort(decode(*inputs, topk=300)), want)


def test_decode_with_fp8_keys_and_few_heads():
    q, weights, keys = decode_problem(6, dtype=jnp.bfloat16, heads=12)
    codes = keys.astype(jnp.float8_e4m3fn)
    scale = jnp.exp2(jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, 5, 300)), jnp.float32))
    inputs = (q, weights, codes, jnp.full(5, 280, jnp.int32), scale, jnp.int32(1))
    want = reference.index_topk_decode(*inputs, topk=40)
    got = decode(*inputs, topk=40, chip="v6e")
    values = values_of(q[:, None], weights[:, None], codes[1], scale[1])
    assert_chosen(got, want, values, tolerances.INDEX_SCORE_BFLOAT16)


# ---- formats and refusals --------------------------------------------------------------------------------------------
def test_masks_unpack_to_what_was_packed():
    selection = jnp.asarray([[0, 31, 32, 69, -1], [-1] * 5, [5, 4, 3, 68, 1]])
    mask = reference.pack_mask(selection, 70)
    assert mask.shape == (3, 3)
    assert mask.dtype == jnp.int32
    for row, chosen in zip(np.asarray(unpacked_mask(mask, 70)), np.asarray(selection), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), np.sort(chosen[chosen >= 0]))


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"entries": 0}], ids=str)
def test_empty_inputs_select_nothing(sizes, implementation):
    inputs = problem(7, **sizes)
    got = index_topk(*map(jnp.asarray, inputs), topk=5, implementation=implementation)
    assert got.shape == (*inputs[3].shape, min(5, inputs[2].shape[1]))
    assert (np.asarray(got) == -1).all()


def test_what_cannot_be_computed_is_refused():
    inputs = tuple(map(jnp.asarray, problem(8)))
    codes = inputs[2].astype(jnp.float8_e4m3fn)
    for changed, options, message in [
        (inputs, {"topk": 0}, "topk 0, need 1 to"),
        ((*inputs[:2], codes, *inputs[3:]), {"topk": 4}, "without key_scale"),
        ((inputs[0], inputs[1], inputs[2].astype(jnp.bfloat16), *inputs[3:]), {"topk": 4}, "keys of bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            index_topk(*changed, **options)
    with pytest.raises(ValueError, match="without a layer"):
        index_topk_decode(inputs[0][:, 0], inputs[1][:, 0], inputs[2][None], jnp.zeros(1, jnp.int32), topk=4)


def test_scores_that_do_not_fit_are_refused_with_bytes():
    shapes = problem(9, queries=16, entries=16, heads=16)
    big = jax.ShapeDtypeStruct((1, 4 << 20, 8), jnp.float32)
    rows = [jax.ShapeDtypeStruct((1, 4 << 20), jnp.int32)] * 2
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes of VMEM, v5p has"):
        jax.eval_shape(functools.partial(pallas.index_topk, topk=8, chip="v5p"), *shapes[:2], big, *shapes[3:5], *rows)


def test_the_selection_carries_no_gradient():
    inputs = problem(10, queries=16, entries=16)

    def loss(q):
        with pltpu.force_tpu_interpret_mode(INTERPRET):
            chosen = index_topk(q, *inputs[1:], topk=4, implementation="pallas")
        return q.sum() * chosen.sum()

    gradient = jax.grad(loss)(inputs[0])
    assert (gradient == gradient.ravel()[0]).all()


def test_steps_of_a_count_cover_the_scores_exactly():
    for rows, width in [(16, 256), (64, 4096), (16, 32768), (128, 12288), (16, 262144)]:
        spec = kernel_scores.Rows(rows, width, 8, True, jnp.bfloat16)
        assert spec.width % spec.span == 0
        assert spec.span % spec.group == 0
        assert 2 * spec.span // 128 // 2 <= 256  # what a lane counts in bfloat16
