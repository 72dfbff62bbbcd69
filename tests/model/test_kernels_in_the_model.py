"""The whole model with the kernels of attention, selection and hyper-connections forced, interpreted on the CPU:
logits of a prefill and of decoding against the goldens, gradients against those of the plain model.

Logits are causal, so that the goldens' first tokens stand for a shorter sequence: one that exceeds the window and has
a complete entry of every kind of compression. Layers are stacked: each kind of them is compiled once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from v4jax import ops
from v4jax.loading import load

LENGTH = 140
FORCED = {
    f"{name}=pallas"
    for name in (
        "hyper_connection_seam", "hyper_connection_leave", "index_topk", "index_topk_decode", "sparse_attention",
        "sparse_attention_decode",
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "goldens" / "flash_like_f32"
    return load(folder, stacked=True), np.load(folder / "expected.npz")


@contextmanager
def kernels() -> Iterator[None]:
    with ops.implementations(FORCED), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


def assert_close(got: Any, want: np.ndarray) -> None:
    assert np.abs(np.asarray(got) - want).max() <= tolerances.KERNEL_MODEL


@pytest.mark.slow
def test_a_prefill_equals_the_goldens(golden) -> None:
    model, expected = golden
    tokens = jnp.asarray(expected["tokens"][:1, :LENGTH])
    with kernels():
        logits, mtp_logits = jax.block_until_ready(jax.jit(lambda m, x: (m(x), m.mtp_logits(x)))(model, tokens))
    assert_close(logits, expected["logits"][:1, :LENGTH])
    assert_close(mtp_logits, expected["mtp_logits"][:1, : LENGTH - 1])


@pytest.mark.slow
def test_a_chunk_after_others_equals_the_goldens(golden) -> None:
    model, expected = golden
    tokens, start = expected["tokens"][:1, :LENGTH], LENGTH - 30
    _, cache = jax.jit(lambda m, x, c: m.extend(x, c))(model, tokens[:, :start], model.init_cache(1, LENGTH))
    with kernels():
        extend = jax.jit(lambda m, x, c: m.logits(m.extend(x, c)[0].hidden))
        logits = jax.block_until_ready(extend(model, tokens[:, start:], cache))
    assert_close(logits, expected["logits"][:1, start:LENGTH])


@pytest.mark.slow
def test_decoding_equals_the_goldens(golden) -> None:
    """Through the end of the window and of an entry, which both come with the 128th token."""
    model, expected = golden
    tokens, start, end = expected["tokens"], 126, 131
    cache = model.init_cache(len(tokens), end)
    _, cache = jax.jit(lambda m, x, c: m.extend(x, c))(model, tokens[:, :start], cache)
    step = jax.jit(lambda m, x, c: m.decode_step(x, c))
    with kernels():
        for position in range(start, end):
            logits, cache = jax.block_until_ready(step(model, tokens[:, position], cache))
            assert_close(logits, expected["logits"][:, position])


@pytest.mark.nightly
def test_gradients_equal_those_of_the_plain_model(golden) -> None:
    model, expected = golden
    definition, parameters, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.asarray(expected["tokens"][:1, :LENGTH])
    weights = np.random.default_rng(0).standard_normal((*tokens.shape, model.config.vocab_size)).astype(np.float32)

    def gradients(parameters: Any) -> Any:
        def objective(parameters: Any) -> jax.Array:
            return jnp.sum(nnx.merge(definition, parameters, rest)(tokens) * weights)

        return jax.block_until_ready(jax.jit(jax.grad(objective))(parameters))

    want = gradients(parameters)
    with kernels():
        got = gradients(parameters)
    tolerances.assert_gradients_close(got, want, tolerances.KERNEL_MODEL)
