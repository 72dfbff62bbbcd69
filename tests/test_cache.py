import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from v4jax.cache import put_rows, ring_extend, ring_positions, ring_put, ring_rows


def rows(start, count):
    """Rows that carry their position, for two sequences."""
    return jnp.asarray(np.arange(start, start + count, dtype=np.float32)[None, :, None].repeat(2, 0))


@settings(max_examples=12, deadline=None)
@given(slots=st.integers(1, 9), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_a_ring_holds_the_last_tokens_however_they_came(slots, sizes):
    ring, seen = jnp.full((2, slots, 1), -1.0), 0
    for size in sizes:
        start = jnp.full(2, seen)
        if size == 1:
            ring = ring_put(ring, rows(seen, 1)[:, 0], start)
        else:
            ring = ring_extend(ring, rows(seen, size), start, start + size)
        seen += size
    positions = np.asarray(ring_positions(jnp.full(2, seen), slots))
    np.testing.assert_array_equal(ring[..., 0], np.where(positions < 0, -1, positions))
    assert sorted(positions[0]) == list(range(seen - slots, seen))


@settings(max_examples=12, deadline=None)
@given(slots=st.integers(1, 9), before=st.integers(0, 20), size=st.integers(1, 12))
def test_rows_are_found_by_position_in_the_ring_or_the_chunk(slots, before, size):
    start = jnp.full(2, before)
    ring = ring_extend(jnp.full((2, slots, 1), -1.0), rows(0, max(before, 1)), jnp.zeros(2, int), start)
    wanted = np.arange(max(before - slots, 0), before + size)
    got = ring_rows(ring, rows(before, size), start, jnp.asarray(np.tile(wanted, (2, 1))))
    np.testing.assert_array_equal(got[..., 0], np.tile(wanted, (2, 1)))


def test_sequences_of_one_batch_advance_by_their_own_lengths():
    ring, start = ring_extend(jnp.zeros((2, 4, 1)), rows(1, 3), jnp.zeros(2, int), jnp.array([3, 3])), jnp.array([3, 3])
    after = ring_extend(ring, rows(4, 3), start, jnp.array([3, 5]))
    np.testing.assert_array_equal(after[0], ring[0])
    np.testing.assert_array_equal(np.sort(after[1, :, 0]), [2, 3, 4, 5])


def test_only_valid_rows_are_written():
    array = put_rows(
        jnp.zeros((2, 5, 1)), rows(7, 2), jnp.array([[0, 1], [3, 9]]), jnp.array([[True, False], [True, True]])
    )
    np.testing.assert_array_equal(array[..., 0], [[7, 0, 0, 0, 0], [0, 0, 0, 7, 0]])
