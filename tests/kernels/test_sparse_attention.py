import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels_pallas.sparse_attention import sparse_attention, sparse_attention_decode, xla

SCALE = 0.3


def problem(seed, *, batch=2, queries=70, heads=3, dim=8, window=12, entries=20, topk=None, packed=False):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, keys, sink = draw(batch, queries, heads, dim), draw(batch, window + queries, dim), draw(heads)
    position = np.tile(np.arange(queries), (batch, 1)).astype(np.int32)
    segment = np.ones((batch, queries), np.int32)
    if packed:
        cut = queries // 3
        segment[:, cut:] = 2
        position[:, cut:] -= cut
        segment[:, -3:] = 0
    key_segment = np.concatenate([np.full((batch, window), -1, np.int32), segment], axis=1)
    inputs = dict(q=q, keys=keys, sink=sink, q_position=position, q_segment=segment, key_segment=key_segment)
    if entries:
        end = np.tile(3 * np.arange(entries) + 2, (batch, 1)).astype(np.int32)
        owner = np.ones((batch, entries), np.int32)
        if packed:
            owner[:, entries // 2 :] = 2
            owner[:, -2:] = -1
        inputs |= dict(entries=draw(batch, entries, dim), entry_end=end, entry_segment=owner)
    if topk:
        chosen = np.argsort(rng.random((batch, queries, entries)), axis=-1)[..., :topk].astype(np.int32)
        chosen[:, :, -1] = -1
        inputs |= dict(selection=chosen)
    return {name: jnp.asarray(value) for name, value in inputs.items()}, window


def by_definition(inputs, window):
    i = {name: np.asarray(value, np.float64 if value.dtype == jnp.float32 else None) for name, value in inputs.items()}
    out = np.zeros_like(i["q"])
    for b, t, n in np.ndindex(*i["q"].shape[:3]):
        segment, position = i["q_segment"][b, t], i["q_position"][b, t]
        near = [k for k in range(t + 1, t + window + 1) if i["key_segment"][b, k] == segment]
        rows = [i["keys"][b, k] for k in near]
        if "entries" in i:
            seen = range(i["entries"].shape[1])
            if "selection" in i:
                seen = [s for s in i["selection"][b, t] if s >= 0]
            rows += [
                i["entries"][b, s]
                for s in seen
                if i["entry_end"][b, s] <= position and i["entry_segment"][b, s] == segment
            ]
        rows = np.array(rows)
        weights = np.exp(np.append(SCALE * rows @ i["q"][b, t, n], i["sink"][n]))
        out[b, t, n] = (weights[:-1] / weights.sum()) @ rows
    return out


CASES = {
    "window alone": dict(entries=0),
    "all entries": {},
    "selection, masked": dict(topk=6),
    "selection, gathered": dict(entries=60, topk=4),
    "packed, all entries": dict(packed=True),
    "packed, selection": dict(packed=True, topk=5),
    "packed, gathered": dict(packed=True, entries=60, topk=3),
    "one query": dict(queries=1),
    "fewer queries than a part": dict(queries=11, window=80),
    "few queries, gathered": dict(queries=9, window=130, entries=60, topk=4),
    "window beyond a block": dict(window=80, queries=100),
}


@pytest.mark.parametrize("window", [128, 2048])
def test_memory_of_a_few_queries_is_that_of_their_windows(window):
    inputs, window = problem(0, batch=1, queries=10, window=window, entries=0)
    run = jax.jit(lambda inputs: sparse_attention(**inputs, window=window, scale=SCALE, implementation="xla"))
    scores = 4 * inputs["q"][..., 0].size * (window + 10)
    assert run.lower(inputs).compile().memory_analysis().temp_size_in_bytes < 8 * scores


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, implementation):
    inputs, window = problem(0, **CASES[case])
    got = sparse_attention(**inputs, window=window, scale=SCALE, implementation=implementation)
    np.testing.assert_allclose(got, by_definition(inputs, window), atol=5e-6)


@pytest.mark.parametrize("kept_keys", [0, 40, 512])  # none of the weights kept, those of the fewer keys, all
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_references(case, kept_keys, monkeypatch):
    monkeypatch.setattr(xla, "_KEPT_KEYS", kept_keys)
    inputs, window = problem(1, **CASES[case])
    names = [name for name in ("q", "keys", "sink", "entries") if name in inputs]
    cotangent = np.random.default_rng(2).standard_normal(inputs["q"].shape).astype(np.float32)

    def gradients(implementation):
        def objective(some):
            out = sparse_attention(**inputs | some, window=window, scale=SCALE, implementation=implementation)
            return jnp.sum(out * cotangent)

        return jax.jit(jax.grad(objective))({name: inputs[name] for name in names})

    got, want = gradients("xla"), gradients("reference")
    for name in names:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-5 * np.linalg.norm(want[name]) + 1e-7, name


@settings(max_examples=5, deadline=None)
@given(queries=st.integers(1, 90), window=st.integers(1, 70), topk=st.integers(1, 5), seed=st.integers(0, 99))
def test_blocked_equals_whole_for_any_length(queries, window, topk, seed):
    inputs, _ = problem(seed, batch=1, queries=queries, window=window, topk=topk, packed=queries > 9)
    whole = sparse_attention(**inputs, window=window, scale=SCALE, implementation="reference")
    np.testing.assert_allclose(sparse_attention(**inputs, window=window, scale=SCALE), whole, atol=5e-6)


@pytest.mark.parametrize("case", ["all entries", "selection, masked", "selection, gathered"])
def test_smaller_blocks_over_entries_do_not_change_the_result(case, monkeypatch):
    inputs, window = problem(3, **CASES[case])
    whole = sparse_attention(**inputs, window=window, scale=SCALE)
    monkeypatch.setattr(xla, "_ELEMENTS", 1)
    np.testing.assert_allclose(sparse_attention(**inputs, window=window, scale=SCALE), whole, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_decode_equals_the_last_query(case, implementation):
    inputs, window = problem(4, **{**CASES[case], "packed": False})
    want = sparse_attention(**inputs, window=window, scale=SCALE, implementation="reference")[:, -1]
    # Slots in the order of a ring: those that are filled come first.
    slots = np.mod(inputs["q"].shape[1] - 1 - np.arange(window), window)
    ring = jnp.zeros_like(inputs["keys"][:, -window:]).at[:, slots].set(inputs["keys"][:, ::-1][:, :window])
    count = jnp.full(2, min(inputs["q"].shape[1], window))
    far = {}
    if "entries" in inputs:
        seen = inputs["entry_end"] <= inputs["q_position"][:, -1:]
        far = dict(entries=inputs["entries"], entry_count=jnp.sum(seen, axis=1))
    if "selection" in inputs:
        far |= dict(selection=inputs["selection"][:, -1])
    ring = jnp.where(jnp.arange(window)[:, None] < count[0], ring, 1e4)  # an empty slot may hold anything
    got = sparse_attention_decode(
        inputs["q"][:, -1], ring, count, inputs["sink"], **far, scale=SCALE, implementation=implementation
    )
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_a_huge_sink_takes_all_the_weight_without_overflow():
    inputs, window = problem(5)
    inputs["sink"] = jnp.full(3, 1e4, jnp.float32)
    np.testing.assert_array_equal(sparse_attention(**inputs, window=window, scale=SCALE), 0)
