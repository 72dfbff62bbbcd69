"""The whole model with the indexer's TPU kernels forced on, interpreted, against the goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.experimental.pallas import tpu as pltpu

from v4jax import ops
from v4jax.loading import load
from v4jax.logits import all_logits

FORCED = ["index_topk=pallas", "index_topk_decode=pallas"]


@pytest.mark.slow
@pytest.mark.nightly
def test_prefill_with_the_kernel_equals_the_goldens(shared):
    folder = shared / "goldens" / "flash_like_f32"
    expected = np.load(folder / "expected.npz")
    model = load(folder, stacked=False)
    with ops.implementations(FORCED), pltpu.force_tpu_interpret_mode():
        logits = jax.jit(lambda model, x: model(x))(model, jnp.asarray(expected["tokens"]))
    tolerances.assert_logits_close(logits, expected["logits"], tolerances.OTHERS)


@pytest.mark.slow
@pytest.mark.nightly
def test_decoding_with_the_kernel_equals_the_goldens(shared):
    folder = shared / "goldens" / "flash_like_f32"
    expected = np.load(folder / "expected.npz")
    model, tokens = load(folder, stacked=False), expected["tokens"]
    with ops.implementations(FORCED), pltpu.force_tpu_interpret_mode():
        logits = all_logits(model, tokens, chunks=[tokens.shape[1] - 4, 1, 1, 1, 1])["logits"]
    tolerances.assert_logits_close(logits, expected["logits"], tolerances.OTHERS)
