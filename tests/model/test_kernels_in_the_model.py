"""The whole model with TPU kernels forced, interpreted on the CPU, against the goldens."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tolerances
from jax.experimental.pallas import tpu as pltpu

from v4jax import ops
from v4jax.loading import load

SEAMS = ["hyper_connection_seam=pallas", "hyper_connection_leave=pallas"]


@pytest.mark.nightly
def test_seam_kernels_in_every_layer_equal_the_goldens(shared: Path) -> None:
    folder = shared / "goldens" / "flash_like_f32"
    expected = dict(np.load(folder / "expected.npz"))
    model = load(folder, stacked=False)
    tokens = expected["tokens"]
    with ops.implementations(SEAMS), pltpu.force_tpu_interpret_mode():
        logits = jax.jit(lambda model, tokens: model.logits(model.hidden(tokens).hidden))(model, tokens)
        logits.block_until_ready()
    difference = np.abs(np.asarray(logits) - expected["logits"]).max()
    assert difference <= tolerances.KERNEL_MODEL
