"""The whole model with the attention kernels forced (interpret mode), against the goldens and the plain gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.sparse_attention import api, prefill_union
from v4jax import ops
from v4jax.loading import load

FORCED = ["sparse_attention=pallas"]


@pytest.fixture(scope="module")
def golden(shared: Path):
    folder = shared / "goldens" / "flash_like_f32"
    return load(folder, stacked=True), np.load(folder / "expected.npz")


@pytest.mark.slow
def test_logits_equal_the_goldens(golden) -> None:
    assert_logits_equal(*golden)


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["mask", "list"])
def test_logits_over_unions_of_selections_equal_the_goldens(golden, monkeypatch, form) -> None:
    monkeypatch.setattr(prefill_union, "is_worth_it", lambda *sizes: True)
    if form == "list":
        monkeypatch.setattr(api, "_MOST_PER_SELECTED", 0)
    assert_logits_equal(*golden)


def assert_logits_equal(model, expected) -> None:
    with ops.implementations(FORCED), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        logits, mtp_logits = jax.block_until_ready(
            jax.jit(lambda model, x: (model(x), model.mtp_logits(x)))(model, expected["tokens"])
        )
    tolerances.assert_logits_close(logits, expected["logits"], tolerances.OTHERS)
    tolerances.assert_logits_close(mtp_logits, expected["mtp_logits"], tolerances.OTHERS)


@pytest.mark.nightly
@pytest.mark.parametrize("over", ["all entries", "unions of selections"])
def test_gradients_equal_those_without_kernels(golden, over, monkeypatch) -> None:
    if over == "unions of selections":
        monkeypatch.setattr(prefill_union, "is_worth_it", lambda *sizes: True)
    model, expected = golden
    definition, parameters, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.asarray(expected["tokens"][:, :160])
    segments = jnp.asarray(np.repeat([[1] * 90 + [2] * 60 + [0] * 10], len(tokens), axis=0))
    weights = np.random.default_rng(0).standard_normal((*tokens.shape, model.config.vocab_size)).astype(np.float32)
    weights *= np.asarray(segments > 0)[..., None]

    def gradients(parameters):
        def objective(parameters):
            whole = nnx.merge(definition, parameters, rest)
            return jnp.sum(jnp.where(segments[..., None] > 0, whole(tokens, segments), 0) * weights)

        return jax.block_until_ready(jax.jit(jax.grad(objective))(parameters))

    want = gradients(parameters)
    with ops.implementations(FORCED), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = gradients(parameters)
    tolerances.assert_gradients_close(got, want, tolerances.GRADIENT_REORDERING)
