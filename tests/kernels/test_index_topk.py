import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.index_topk import index_topk, xla


def problem(seed, *, batch=2, queries=37, entries=24, heads=16, dim=8, ties=False):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, heads, dim)).astype(np.float32)
    keys = rng.standard_normal((batch, entries, dim)).astype(np.float32)
    weights = rng.standard_normal((batch, queries, heads)).astype(np.float32)
    if ties:
        keys[:] = keys[:, :1]
    position = np.broadcast_to(np.arange(queries), (batch, queries)).astype(np.int32)
    segment = np.ones((batch, queries), np.int32)
    end = np.broadcast_to(2 * np.arange(entries) + 1, (batch, entries)).astype(np.int32)
    owner = np.ones((batch, entries), np.int32)
    return q, weights, keys, position, segment, end, owner


def by_definition(q, weights, keys, position, segment, end, owner, topk):
    batch, queries = position.shape
    chosen = np.full((batch, queries, min(topk, keys.shape[1])), -1)
    for b in range(batch):
        for t in range(queries):
            score = np.maximum(q[b, t].astype(np.float64) @ keys[b].T.astype(np.float64), 0).T @ weights[b, t]
            visible = [s for s in range(len(score)) if end[b, s] <= position[b, t] and owner[b, s] == segment[b, t]]
            best = sorted(visible, key=lambda s: (-score[s], s))[:topk]
            chosen[b, t, : len(best)] = best
    return chosen


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("topk", [1, 7, 40], ids=["one", "some", "more than there are"])
def test_selects_the_best_visible_entries(implementation, topk):
    inputs = problem(0)
    got = index_topk(*map(jnp.asarray, inputs), topk=topk, implementation=implementation)
    np.testing.assert_array_equal(np.sort(got), np.sort(by_definition(*inputs, topk)))


def test_ties_go_to_the_lowest_index():
    inputs = problem(1, ties=True)
    got = np.asarray(index_topk(*map(jnp.asarray, inputs), topk=5))
    visible = np.minimum((inputs[3] + 1) // 2, 5)
    for rank in range(5):
        np.testing.assert_array_equal(got[..., rank], np.where(rank < visible, rank, -1))


def test_other_documents_and_empty_slots_are_never_selected():
    q, weights, keys, position, segment, end, owner = problem(2)
    segment, owner = segment.copy(), owner.copy()
    segment[:, 20:], owner[:, 10:], owner[:, 20:] = 2, 2, -1
    got = np.asarray(index_topk(*map(jnp.asarray, (q, weights, keys, position, segment, end, owner)), topk=6))
    for b in range(2):
        for t in range(37):
            assert all(owner[b, s] == segment[b, t] for s in got[b, t] if s >= 0)


def test_blocks_do_not_change_the_selection(monkeypatch):
    inputs = tuple(map(jnp.asarray, problem(3, queries=50)))
    whole = index_topk(*inputs, topk=6)
    monkeypatch.setattr(xla, "_SCORE_ELEMENTS", 1)
    np.testing.assert_array_equal(index_topk(*inputs, topk=6), whole)
