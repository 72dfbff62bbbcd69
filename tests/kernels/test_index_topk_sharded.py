import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.index_topk import index_topk, index_topk_decode, sharded


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))


def arrays(seed=0, batch=2, queries=16, entries=40, heads=16, dim=8):
    rng = np.random.default_rng(seed)
    q, weights, keys = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((batch, queries, heads, dim), (batch, queries, heads), (batch, entries, dim))
    )
    position = jnp.broadcast_to(jnp.arange(queries) * 5, (batch, queries))
    end = jnp.broadcast_to(2 * jnp.arange(entries) + 1, (batch, entries))
    return q, weights, keys, position, jnp.ones_like(position), end, jnp.ones_like(end)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_divided_queries_select_what_one_device_selects(mesh, implementation):
    inputs = arrays()
    want = np.sort(index_topk(*inputs, topk=6, implementation="reference"))
    by_heads = NamedSharding(mesh, P("data", None, "tensor"))
    divided = (*(jax.device_put(x, by_heads) for x in inputs[:2]), *inputs[2:])
    function = sharded.index_topk(mesh, batch="data", queries="tensor")
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(lambda *x: function(*x, topk=6, implementation=implementation))(*divided)
    np.testing.assert_array_equal(np.sort(got), want)


def test_divided_sequences_decode_what_one_device_decodes(mesh):
    q, weights, keys, *_ = arrays(1, batch=4, queries=1)
    stacked = jnp.stack([keys * 0, keys])
    visible = jnp.asarray([0, 3, 40, 20])
    want = index_topk_decode(q[:, 0], weights[:, 0], keys, visible, topk=6)
    function = sharded.index_topk_decode(mesh, batch=("data", "tensor"))
    got = function(q[:, 0], weights[:, 0], stacked, visible, layer=1, topk=6)
    np.testing.assert_array_equal(np.sort(got), np.sort(want))


def test_what_does_not_divide_is_refused(mesh):
    inputs = arrays(queries=15)
    with pytest.raises(ValueError, match="got 15 queries over 2 devices"):
        sharded.index_topk(mesh, queries="tensor")(*inputs, topk=4)
    with pytest.raises(ValueError, match="got mesh axis 'expert' for rows"):
        sharded.index_topk(mesh, batch="expert")(*inputs, topk=4)
