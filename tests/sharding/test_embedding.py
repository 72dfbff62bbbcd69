"""Rows of a divided table: whatever is brought together first, values and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sharding.tiny_steps import CONFIG, placed, tiny_model

from v4jax import parallel
from v4jax.model import params


@pytest.mark.parametrize("least", [1, CONFIG.hidden_size // 4, CONFIG.hidden_size])
def test_rows_of_a_divided_table(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "_LEAST_CHANNELS", least)
    rng = np.random.default_rng(least)
    ids = rng.integers(0, CONFIG.vocab_size, (8, 16)).astype(np.int32)
    weights = rng.standard_normal((*ids.shape, CONFIG.hidden_size)).astype(np.float32)
    model = placed(tiny_model(), "fsdp=2,expert=4", "train")
    placement = model.placement
    shard = parallel.Shard(placement, placement.dividing("batch", len(ids)), ())
    assert len(shard.batch) == 2
    rows = PartitionSpec(shard.batch)
    leaves, structure = jax.tree.flatten(model.embed)

    @jax.jit
    @jax.value_and_grad
    def placed_sum(leaves: list[jax.Array]) -> jax.Array:
        embed = jax.tree.unflatten(structure, leaves)
        out = parallel.run(lambda embed, ids: embed(ids), shard, embed, (ids,), (rows,), rows)
        return jnp.sum(out * weights)

    @jax.value_and_grad
    def plain_sum(table: jax.Array) -> jax.Array:
        return jnp.sum(table[ids] * weights)

    (value, (gradient,)), (want, want_gradient) = placed_sum(leaves), plain_sum(tiny_model().embed.weight[...])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-5)
