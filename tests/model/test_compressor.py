"""Entries of packed rows and their gradients equal those of each document alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.random_model import small_config
from tolerances import GRADIENT_REORDERING, assert_gradients_close

from v4jax.model.compressor import Compressor
from v4jax.model.inputs import full_inputs
from v4jax.model.transformer import Transformer

CONFIG = small_config()
# A document shorter than any window, ends inside and at the end of windows, padding between and behind.
ROWS = [[(1, 37), (0, 2), (2, 3), (3, 20), (4, 16)], [(1, 4), (2, 70), (0, 4)]]


def compressor_of(ratio: int) -> Compressor:
    layers = Transformer.random(CONFIG, seed=3, stacked=False).segments
    return next(s.layers[0].attn.compressor for s in layers if s.layers[0].spec.ratio == ratio)


def weighted_sum(compressor: Compressor, x: jax.Array, segments: jax.Array | None, weights: jax.Array) -> jax.Array:
    inputs = full_inputs(CONFIG, jnp.zeros(x.shape[:2], jnp.int32), segments)
    entries = compressor(x, inputs)
    is_real = entries.segment >= (1 if segments is not None else 0)
    # Weighed by the position that an entry ends at, so that it matters which entry is which.
    own = weights[jnp.clip(entries.end, 0, len(weights) - 1)]
    return jnp.sum(jnp.where(is_real[..., None], entries.values * own, 0))


@pytest.mark.parametrize("ratio", [4, 16])
def test_packed_rows_have_the_entries_and_gradients_of_each_document(ratio: int) -> None:
    compressor, rng = compressor_of(ratio), np.random.default_rng(ratio)
    segments = np.array([[number for number, size in row for _ in range(size)] for row in ROWS], np.int32)
    x = jnp.asarray(rng.standard_normal((*segments.shape, CONFIG.hidden_size)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((segments.shape[1], compressor.width)), jnp.float32)
    gradient = jax.value_and_grad(weighted_sum, argnums=(0, 1), allow_int=True)
    got, (got_parameters, got_x) = gradient(compressor, x, jnp.asarray(segments), weights)

    want, want_parameters, want_x = 0.0, jax.tree.map(jnp.zeros_like, got_parameters), np.zeros_like(x)
    for row, own in enumerate(segments):
        for number in set(own[own > 0].tolist()):
            places = np.flatnonzero(own == number)
            if len(places) < ratio:
                continue
            value, (parameters, d_x) = gradient(compressor, x[row : row + 1, places], None, weights)
            want += value
            want_parameters = jax.tree.map(jnp.add, want_parameters, parameters)
            want_x[row, places] = d_x[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(got_parameters)[0]]
    assert len(names) == 4
    assert_gradients_close(
        dict(zip(names, map(np.asarray, jax.tree.leaves(got_parameters)), strict=True)) | {"x": np.asarray(got_x)},
        dict(zip(names, map(np.asarray, jax.tree.leaves(want_parameters)), strict=True)) | {"x": want_x},
        GRADIENT_REORDERING,
    )
    assert np.abs(want_x).max() > 0
