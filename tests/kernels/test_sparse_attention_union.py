"""The union path of prefill in TPU interpret mode: memory that nobody wrote is NaN, reads out of bounds raise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from test_sparse_attention_pallas import interpreted, problem, reference, relative, with_gradients

from kernels_pallas.sparse_attention import prefill
from kernels_pallas.sparse_attention.block_sizes_union import UnionSizes
from kernels_pallas.sparse_attention.kernel_union import unions
from kernels_pallas.tpu import CHIPS

SMALL = (UnionSizes(8, 4, 128), UnionSizes(8, 4, 128))


# ---- unions ----------------------------------------------------------------------------------------------------------
def wanted_union(lists):
    found: dict[int, int] = {}
    for query, chosen in enumerate(lists):
        for entry in chosen[chosen >= 0]:
            found[int(entry)] = found.get(int(entry), 0) | 1 << query
    return found


def assert_unions_are_right(selection, queries):
    given = jnp.asarray(selection, jnp.int32)
    found = interpreted(lambda: jax.jit(lambda x: unions(x, queries, CHIPS["v6e"]))(given))
    count, group = np.asarray(found.size), found.words.shape[2]
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


def kernel(sizes=SMALL):
    return functools.partial(
        prefill.sparse_attention, is_sound_selection=True, union_sizes=sizes
    )  # fmt: skip


CASES = {
    "several blocks, rows": dict(entries=290, past=520, topk=40, queries=16, batch=2),
    "packed documents, ragged": dict(entries=300, documents=3, queries=61, topk=120, heads=5),
    "one token, fewer entries than top-k": dict(queries=1, entries=9, past=19, topk=9),
    "nothing visible": dict(queries=20, entries=130, documents=20, topk=7),
    "window of two tiles": dict(window=150, queries=10, past=500, heads=3, entries=200, topk=20),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_references(case):
    inputs, window = sound_problem(0, **CASES[case])
    got = interpreted(lambda: with_gradients(kernel(), inputs, window))
    want = with_gradients(reference, inputs, window)
    for name in want:
        if np.any(want[name]):
            assert relative(got[name], want[name]) <= tolerances.ATTENTION_FLOAT32, name
        else:
            np.testing.assert_array_equal(got[name], want[name])


def test_bfloat16_errs_hardly_more_than_the_reference_in_bfloat16():
    inputs, window = sound_problem(1, entries=290, past=520, topk=40, queries=16)
    exact = with_gradients(reference, inputs, window)
    theirs = with_gradients(reference, inputs, window, jnp.bfloat16)
    ours = interpreted(lambda: with_gradients(kernel(), inputs, window, jnp.bfloat16))
    for name, want in exact.items():
        error, allowed = relative(ours[name], want), tolerances.ATTENTION_BFLOAT16_RATIO * relative(theirs[name], want)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


def test_the_copies_do_not_race(capfd):
    inputs, window = sound_problem(2, queries=16, entries=290, past=580, topk=40, batch=2)
    interpreted(lambda: with_gradients(kernel(), inputs, window), races=True)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
