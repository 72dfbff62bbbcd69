"""The union path of prefill in TPU interpret mode: memory that nobody wrote is NaN, reads out of bounds raise."""

import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from test_sparse_attention_pallas import SCALE, interpreted, problem, reference, relative, with_gradients

from kernels_pallas.index_topk.reference import pack_mask
from kernels_pallas.sparse_attention import prefill, sparse_attention
from kernels_pallas.sparse_attention.block_sizes import default_block_sizes
from kernels_pallas.sparse_attention.block_sizes_union import (
    UnionSizes,
    check_backward,
    check_forward,
    default_union_sizes,
)
from kernels_pallas.sparse_attention.kernel_union import padded_topk, unions
from kernels_pallas.sparse_attention.kernel_union_bits import unions_of_bits
from kernels_pallas.tpu import CHIPS

SMALL = (UnionSizes(8, 4, 128), UnionSizes(8, 4, 128))


# ---- unions ----------------------------------------------------------------------------------------------------------
def wanted_union(lists):
    found: dict[int, int] = {}
    for query, chosen in enumerate(lists):
        for entry in chosen[chosen >= 0]:
            found[int(entry)] = found.get(int(entry), 0) | 1 << query
    return found


def assert_unions_are_right(selection, queries, size=None):
    """Of lists; or of bits, where there is a size."""
    if size is None:
        given, group = jnp.asarray(selection, jnp.int32), None
        call = lambda x: unions(x, queries, CHIPS["v6e"])  # noqa: E731
    else:
        given, group = pack_mask(jnp.asarray(selection), size), 1
        call = lambda x: unions_of_bits(x, selection.shape[-1], queries, CHIPS["v6e"])  # noqa: E731
    found = interpreted(lambda: jax.jit(call)(given))
    count, group = np.asarray(found.size), group or found.words.shape[2]
    index, words = (np.asarray(x).reshape(*count.shape, -1) for x in (found.members, found.words))
    for row, lists in enumerate(selection):
        for tile in range(index.shape[1]):
            want = wanted_union(lists[tile * queries : (tile + 1) * queries])
            members = np.flatnonzero(words[row, tile])
            got = {int(index[row, tile, m]): int(words[row, tile, m]) & 0xFFFFFFFF for m in members}
            assert len(got) == len(members) == count[row, tile]
            assert got == want
            # Whole groups of places are filled from the front, and what follows repeats a member.
            assert members.size == 0 or members[-1] // group == (len(want) - 1) // group
            assert set(index[row, tile]) <= (set(want) or {0})


def test_unions_list_each_chosen_entry_once_with_its_queries():
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(1 << 18)[:200] for _ in range(2 * 36)]).reshape(2, 36, 200)
    lists[:, 3:9] = lists[:, 2:3]  # the same for several queries
    lists[0, 8:16], lists[1, :, 50:] = -1, -1  # nothing, a few
    lists[1, 16:24] = np.arange(8 * 200).reshape(8, 200)  # nothing in common
    assert_unions_are_right(lists, 8)


def test_unions_of_32_queries_use_every_bit():
    rng = np.random.default_rng(1)
    assert_unions_are_right(np.stack([rng.permutation(60)[:40] for _ in range(32)])[None], 32)


def test_unions_of_32_queries_with_1024_entries_each():
    rng = np.random.default_rng(2)
    lists = np.stack([rng.permutation(2048)[:1024] for _ in range(32)])[None]
    lists[0, 5, 900:], lists[0, 31] = -1, np.arange(1 << 20, (1 << 20) + 1024)  # fewer, and nothing in common
    assert_unions_are_right(lists, 32)


def test_unions_of_bits_list_each_chosen_entry_once_with_its_queries():
    rng = np.random.default_rng(3)
    lists = np.stack([rng.permutation(3000)[:200] for _ in range(2 * 36)]).reshape(2, 36, 200)
    lists[:, 3:9] = lists[:, 2:3]  # the same for several queries
    lists[0, 8:16], lists[1, :, 50:] = -1, -1  # nothing, a few
    lists[1, 16:24, :50] = np.arange(8 * 50).reshape(8, 50)  # nothing in common
    assert_unions_are_right(lists, 8, 3000)


@pytest.mark.parametrize("queries", [16, 32])
def test_unions_of_bits_over_several_stretches_of_entries(queries):
    rng = np.random.default_rng(queries)
    size = 3 * 16384 + 37
    lists = np.stack([rng.permutation(size)[:400] for _ in range(queries + 5)])[None]
    lists[:, :queries] = np.where(lists[:, :queries] // 16384 == 1, -1, lists[:, :queries])  # a stretch without any
    lists[0, 0, :4], lists[0, queries - 1, :2] = (0, 16383, size - 1, -1), (16384 + 8191, size - 1)
    assert_unions_are_right(lists, queries, size)


@pytest.mark.parametrize("topk", [512, 1024])
def test_unions_of_bits_without_anything_in_common_fill_every_place(topk):
    lists = np.random.default_rng(topk).permutation(32 * topk).reshape(1, 32, topk)
    assert_unions_are_right(lists, 32, 32 * topk)


def test_unions_of_bits_end_where_a_mask_has_more_than_was_said():
    mask = jnp.full((1, 8, 40000 // 32), -1, jnp.int32)
    found = interpreted(lambda: jax.jit(lambda x: unions_of_bits(x, 1, 8, CHIPS["v6e"]))(mask))
    members = np.asarray(found.members).reshape(-1)
    assert int(found.size[0, 0]) == members.size == 16384
    assert len(set(members)) == members.size
    assert members.max() < 40000
    np.testing.assert_array_equal(found.words, 0xFF)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"union of masks of 33,554,432 entries: needs [\d,]+ bytes .* give lists"):
        jax.eval_shape(
            lambda x: unions_of_bits(x, 512, 32, CHIPS["v6e"]), jax.ShapeDtypeStruct((1, 32, 1 << 20), jnp.int32)
        )


# ---- attention -------------------------------------------------------------------------------------------------------
def sound_problem(seed, **sizes):
    """`problem` without the entries that are not visible."""
    inputs, window = problem(seed, **sizes)
    chosen = np.asarray(inputs["selection"])
    end, owner = (np.asarray(inputs[name]) for name in ("entry_end", "entry_segment"))
    row = np.arange(len(chosen))[:, None, None]
    seen = (end[row, chosen] <= np.asarray(inputs["q_position"])[..., None]) & (
        owner[row, chosen] == np.asarray(inputs["q_segment"])[..., None]
    )
    return inputs | {"selection": jnp.asarray(np.where(seen & (chosen >= 0), chosen, -1))}, window


def masked(inputs):
    """The same problem with bits instead of lists."""
    mask = pack_mask(inputs["selection"], inputs["entries"].shape[1])
    return inputs | {"selection": None, "selection_mask": mask}


def kernel(topk, sizes=SMALL):
    return functools.partial(prefill.sparse_attention, sound_topk=topk, union_sizes=sizes)


CASES = {
    "several blocks, rows": dict(entries=290, past=520, topk=40, queries=16, batch=2),
    "packed documents, ragged": dict(entries=300, documents=3, queries=61, topk=120, heads=5),
    "one token, fewer entries than top-k": dict(queries=1, entries=9, past=19, topk=9),
    "nothing visible": dict(queries=20, entries=130, documents=20, topk=7),
    "window of two tiles": dict(window=150, queries=10, past=500, heads=3, entries=200, topk=20),
}


SLOW = {"nothing visible", "window of two tiles"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_output_and_gradients_equal_the_references(case):
    inputs, window = sound_problem(0, **CASES[case])
    assert_all_equal(kernel(CASES[case]["topk"]), masked(inputs), with_gradients(reference, inputs, window), window)


def test_output_and_gradients_over_lists_equal_the_references():
    inputs, window = sound_problem(0, **CASES["several blocks, rows"])
    assert_all_equal(kernel(40), inputs, with_gradients(reference, inputs, window), window)


def assert_all_equal(function, inputs, want, window):
    got = interpreted(lambda: with_gradients(function, inputs, window))
    for name in want:
        if np.any(want[name]):
            assert relative(got[name], want[name]) <= tolerances.ATTENTION_FLOAT32, name
        else:
            np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.slow
def test_tiles_of_32_queries_with_up_to_1024_entries_each():
    inputs, window = sound_problem(4, queries=37, entries=600, past=1300, topk=520, heads=8)
    call = functools.partial(
        kernel(520, (UnionSizes(32, 16, 256), UnionSizes(16, 8, 128))), **inputs, window=window, scale=SCALE
    )
    assert relative(interpreted(call), reference(**inputs, window=window, scale=SCALE)) <= tolerances.ATTENTION_FLOAT32


@pytest.mark.slow
def test_bfloat16_errs_hardly_more_than_the_reference_in_bfloat16():
    inputs, window = sound_problem(1, entries=290, past=520, topk=40, queries=16)
    exact = with_gradients(reference, inputs, window)
    theirs = with_gradients(reference, inputs, window, jnp.bfloat16)
    ours = interpreted(lambda: with_gradients(kernel(40), masked(inputs), window, jnp.bfloat16))
    for name, want in exact.items():
        error, allowed = relative(ours[name], want), tolerances.ATTENTION_BFLOAT16_RATIO * relative(theirs[name], want)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.slow
@settings(max_examples=3)
@given(
    queries=st.integers(1, 40), past=st.integers(0, 300), entries=st.integers(1, 200), topk=st.integers(1, 200),
    documents=st.integers(1, 4), window=st.integers(1, 140), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_lengths_documents_and_selections(queries, past, entries, topk, documents, window, seed):
    inputs, window = sound_problem(
        seed, queries=queries, past=past, entries=entries, topk=min(topk, entries), documents=documents, window=window
    )
    given = inputs if seed % 4 == 0 else masked(inputs)
    got = interpreted(lambda: kernel(topk)(**given, window=window, scale=SCALE))
    want = reference(**inputs, window=window, scale=SCALE)
    assert relative(got, want) <= tolerances.ATTENTION_FLOAT32


@pytest.mark.slow
def test_default_blocks_and_the_public_function_give_the_same():
    inputs, window = sound_problem(3, queries=70, entries=700, past=1400, topk=20)
    call = functools.partial(sparse_attention, **masked(inputs), window=window, scale=SCALE, sound_topk=20)
    got = interpreted(lambda: call(implementation="pallas"))
    assert relative(got, call(implementation="reference")) <= tolerances.ATTENTION_FLOAT32


@pytest.mark.slow
def test_the_copies_do_not_race(capfd):
    inputs, window = sound_problem(2, queries=16, entries=290, past=580, topk=30)
    interpreted(lambda: with_gradients(kernel(30), masked(inputs), window), races=True)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


# ---- which path, and what it counts ----------------------------------------------------------------------------------
def traced(
    topk, entries, *, sound=True, form="mask", width=None, heads=64, queries=64, dim=512, is_training=False
):  # fmt: skip
    """The jaxpr of the public function's kernels."""
    a, i, b = jax.ShapeDtypeStruct, jnp.int32, jnp.bfloat16
    arrays = dict(
        q=a((1, queries, heads, dim), b), keys=a((1, 128 + queries, dim), b), sink=a((heads,), jnp.float32),
        q_position=a((1, queries), i), q_segment=a((1, queries), i), key_segment=a((1, 128 + queries), i),
        entries=a((1, entries, dim), b), entry_end=a((1, entries), i), entry_segment=a((1, entries), i),
    )  # fmt: skip
    if form == "list":
        arrays["selection"] = a((1, queries, width or topk), i)
    else:
        arrays["selection_mask"] = a((1, queries, -(-entries // 32)), i)

    def run(arrays):
        out = sparse_attention(
            **arrays, window=128, scale=0.1, sound_topk=topk if sound else None, implementation="pallas"
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32))

    function = jax.grad(run, allow_int=True) if is_training else run
    return str(jax.make_jaxpr(function)(arrays))


def kernels_of(text):
    return set(re.findall(r"name=(sparse_attention_\w+)", text))


def test_unions_are_taken_for_sound_selections_where_there_are_many_entries_per_selected_one():
    assert {"sparse_attention_gather", "sparse_attention_union_bits"} <= kernels_of(traced(512, 4096))
    assert {"sparse_attention_gather", "sparse_attention_union"} <= kernels_of(traced(512, 4096, form="list"))
    assert "sparse_attention_gather" not in traced(512, 4095)
    assert "sparse_attention_gather" not in traced(512, 8192, sound=False)
    assert "sparse_attention_gather" not in traced(1025, 1 << 18)
    assert "sparse_attention_gather" not in traced(512, 1 << 14, form="list", width=2048)
    assert "sparse_attention_gather" not in traced(512, 8191, heads=8)
    assert "sparse_attention_gather" in traced(512, 8192, heads=8)


@pytest.mark.parametrize(
    ("heads", "topk", "entries", "form"), [(64, 512, 1 << 14, "mask"), (128, 1024, 1 << 18, "list")]
)
def test_costs_count_twice_the_selected_entries_whatever_the_context(heads, topk, entries, form):
    text = traced(topk, entries, form=form, heads=heads, is_training=True)
    found = {
        name: int(flops)
        for flops, name in re.findall(r"CostEstimate\(flops=(\d+),.*?name=(sparse_attention_\w+)", text, re.DOTALL)
    }
    pairs = 64 * heads * (256 + 2 * topk)  # a window of 128 in whole tiles
    assert found == {
        "sparse_attention_union" if form == "list" else "sparse_attention_union_bits": 0,
        "sparse_attention_gather": 2 * 2 * pairs * 512,
        "sparse_attention_scatter": 2 * 5 * pairs * 512,
    }


def test_costs_of_the_dense_path_count_the_tiles_that_causality_leaves():
    entries, tile = 4096, default_block_sizes(64, 4096, jnp.bfloat16).entries
    (flops,) = re.findall(
        r"CostEstimate\(flops=(\d+),.*?name=sparse_attention_forward", traced(512, entries, sound=False), re.DOTALL
    )
    assert int(flops) == 2 * 2 * 64 * 64 * (256 + (entries // tile + 1) / 2 * tile) * 512


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need queries 8, 16 or 32"):
        UnionSizes(64, 8, 128)
    forward, backward = default_union_sizes(64, jnp.bfloat16, CHIPS["v5p"])
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes of VMEM, v5p has 62,914,560 available"):
        check_forward(forward, 512, 512, 128, 16384, jnp.bfloat16, CHIPS["v5p"])
    with pytest.raises(ValueError, match=r"backward over unions.* v5p has 62,914,560 available"):
        check_backward(backward, 512, 512, 128, 16384, jnp.bfloat16, CHIPS["v5p"])
    with pytest.raises(ValueError, match="members a multiple of 1024 for 131072 places"):
        check_forward(forward, 64, 512, 128, 1 << 17, jnp.bfloat16, CHIPS["v5p"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("heads", [8, 16, 24, 64, 128])
def test_default_blocks_fit_every_chip(heads, dtype):
    for chip in CHIPS.values():
        forward, backward = default_union_sizes(heads, dtype, chip)
        for topk in (7, 512, 1024):
            check_forward(forward, heads, 512, 128, _places(forward, topk), dtype, chip)
            check_backward(backward, heads, 512, 128, _places(backward, topk), dtype, chip)


def _places(sizes, topk):
    return sizes.queries * padded_topk(topk, sizes.queries)


@pytest.mark.parametrize("chip", CHIPS)
def test_128_heads_share_a_copy_among_32_queries(chip):
    forward, backward = default_union_sizes(128, jnp.bfloat16, CHIPS[chip])
    assert (forward.queries, forward.rows, backward.queries) == (32, 1024, 16)
