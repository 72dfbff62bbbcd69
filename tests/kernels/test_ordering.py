"""Orders by counting against a stable sort."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.ordering import by_key


@settings(max_examples=25, deadline=None)
@given(items=st.sampled_from([1, 2, 127, 128, 129, 300, 1000]), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_equals_a_stable_sort(items: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, max(1, count - seed % 3), items).astype(np.int32)
    place, item, sizes = map(np.asarray, by_key(jnp.asarray(keys), count))
    order = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(item, order)
    np.testing.assert_array_equal(item[place], np.arange(items))
    np.testing.assert_array_equal(sizes, np.bincount(keys, minlength=count))


@pytest.mark.parametrize("items", [70_000, 140_000])
@pytest.mark.parametrize("key", [0, 4])
def test_one_key_for_all(key: int, items: int) -> None:
    order = by_key(jnp.full(items, key, jnp.int32), 5)
    np.testing.assert_array_equal(order.item, np.arange(items))
