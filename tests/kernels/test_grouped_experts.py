import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels_pallas.grouped_experts import blocks as blocks_module
from kernels_pallas.grouped_experts import grouped_experts, xla
from kernels_pallas.grouped_experts.blocks import blocks_for, over_blocks

LIMIT = 1.0


def problem(seed, experts, tokens, choices, *, width=8, hidden=16):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :choices].astype(np.int32)
    weights = jnp.asarray(rng.random((tokens, choices)) + 0.1, jnp.float32)
    matrices = (draw(experts, width, hidden), draw(experts, width, hidden), draw(experts, hidden, width))
    return draw(tokens, hidden), matrices, chosen, weights


def by_definition(x, matrices, chosen, weights):
    x, (w1, w3, w2) = np.asarray(x, np.float64), (np.asarray(m, np.float64) for m in matrices)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in zip(chosen[t], np.asarray(weights)[t], strict=True):
            gate, up = np.minimum(w1[expert] @ x[t], LIMIT), np.clip(w3[expert] @ x[t], -LIMIT, LIMIT)
            out[t] += w2[expert] @ (weight * gate / (1 + np.exp(-gate)) * up)
    return out


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 20, 40, 300])
def test_equals_the_definition(implementation, tokens):
    x, matrices, chosen, weights = problem(0, 6, tokens, 3)
    got = grouped_experts(x, *matrices, jnp.asarray(chosen), weights, limit=LIMIT, implementation=implementation)
    np.testing.assert_allclose(got, by_definition(x, matrices, chosen, weights), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [7, 20, 60, 401])  # blocks of one size, of two, of many
@pytest.mark.parametrize("load", ["even", "one takes all", "some have none"])
def test_gradients_equal_the_references_for_any_load(load, tokens):
    x, matrices, chosen, weights = problem(1, 5, tokens, 2)
    if load == "one takes all":
        chosen[:, 0], chosen[:, 1] = 3, 1
    elif load == "some have none":
        chosen[:, 0] = 1 + chosen[:, 0] % 3
        chosen[:, 1] = 1 + chosen[:, 0] % 3
    out = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)

    def gradients(implementation):
        def objective(x, matrices, weights):
            y = grouped_experts(x, *matrices, jnp.asarray(chosen), weights, limit=LIMIT, implementation=implementation)
            return jnp.sum(y * out)

        return jax.tree.leaves(jax.grad(objective, argnums=(0, 1, 2))(x, matrices, weights))

    for got, want in zip(gradients("xla"), gradients("reference"), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want) + 1e-7


@settings(max_examples=8, deadline=None)
@given(
    experts=st.integers(2, 9),
    tokens=st.integers(1, 50),
    block=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 99),
    skew=st.floats(0, 4),
)
def test_every_pick_gets_its_own_row_and_its_experts_block(experts, tokens, block, seed, skew):
    rng = np.random.default_rng(seed)
    choices = min(2, experts)
    chosen = np.argsort(rng.random((tokens, experts)) - skew * np.eye(1, experts), axis=1)[:, :choices].astype(np.int32)
    weights = rng.random((tokens, choices)).astype(np.float32) + 0.5
    groups = xla._group(jnp.asarray(chosen), jnp.asarray(weights), experts, block)
    slot, share = np.asarray(groups.slot), np.asarray(groups.share)
    assert len(np.unique(slot)) == slot.size
    np.testing.assert_array_equal(np.asarray(groups.token)[slot], np.repeat(np.arange(tokens)[:, None], choices, 1))
    np.testing.assert_array_equal(share[slot], weights)
    assert np.count_nonzero(share) == slot.size
    first, last = np.asarray(groups.first), np.asarray(groups.last)
    assert ((first[chosen] <= slot // block) & (slot // block < last[chosen])).all()
    assert set(np.asarray(groups.expert)[: int(groups.active)]) == set(np.unique(chosen))


def test_a_gpu_has_blocks_of_one_size(monkeypatch):
    assert len(blocks_for(8192, 32, 8192).sizes) == 8
    monkeypatch.setattr(blocks_module, "current_platform", lambda: "gpu")
    assert blocks_for(8192, 32, 8192).sizes == (128,)


@pytest.mark.parametrize(
    ("picks", "experts"), [(9, 256), (64, 32), (170, 32), (300, 32), (700, 7), (2048, 32), (8192, 32), (90_000, 8)]
)
def test_blocks_cover_every_unit_once_and_run_as_often_as_expected(picks, experts):
    blocks = blocks_for(picks, experts, picks)
    assert all(size == smaller + blocks.unit for size, smaller in zip(blocks.sizes, blocks.sizes[1:], strict=False))
    assert blocks.sizes[0] <= max(picks, blocks.unit)
    most = 3 * picks // experts // blocks.unit + 9  # units

    def mark(row, size, is_first, state):
        seen, heads, further = state
        seen = jax.lax.dynamic_update_slice(seen, 1 + jax.lax.dynamic_slice(seen, (row,), (size,)), (row,))
        return (seen, heads.at[blocks.sizes.index(size)].add(1), further) if is_first else (seen, heads, further + 1)

    @jax.jit
    def run(start, end):
        heads = jnp.zeros(len(blocks.sizes), jnp.int32)
        return over_blocks(start, end, blocks, mark, (jnp.zeros(most * blocks.unit, jnp.int32), heads, 0))

    for start, end in ((0, 1), (1, most), (2, 7), (3, most - 1)):
        want = np.zeros(most * blocks.unit, np.int32)
        want[start * blocks.unit : end * blocks.unit] = 1
        seen, heads, _ = run(start, end)
        np.testing.assert_array_equal(seen, want)
        assert heads.sum() == 1

    rng = np.random.default_rng(0)
    loads = rng.multinomial(picks, np.full(experts, 1 / experts), size=2000 // experts + 10).ravel()
    loads = loads[loads > 0]
    counts = [run(0, int(load))[1:] for load in -(-loads // blocks.unit)]
    np.testing.assert_allclose(blocks.first, np.mean([heads for heads, _ in counts], axis=0), rtol=0.1, atol=0.05)
    np.testing.assert_allclose(blocks.further, np.mean([further for _, further in counts]), rtol=0.1, atol=0.05)
