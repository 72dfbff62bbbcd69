"""The golden checkpoints in the released layout: outputs by the official semantics, whole and through the cache."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from v4jax.loading import load
from v4jax.logits import all_logits
from v4jax.model.inputs import full_inputs
from v4jax.model.transformer import Transformer

FOLDERS = ("flash_like_f32", "flash_like_quantized")


class Golden(NamedTuple):
    """A checkpoint's folder, its model with every layer on its own, and what it should give."""

    folder: Path
    model: Transformer
    expected: dict[str, np.ndarray]

    @property
    def tokens(self) -> np.ndarray:
        return self.expected["tokens"]


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    folder = shared / "goldens" / request.param
    return Golden(folder, load(folder, stacked=False), dict(np.load(folder / "expected.npz")))


# ---- whole rows ------------------------------------------------------------------------------------------------------
@jax.jit
def _everything(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, MTP logits, and the streams after every layer [L,B,S,C,D] of an unstacked model."""
    inputs = full_inputs(model.config, tokens, None)
    x = jnp.repeat(model.embed(tokens)[:, :, None], model.config.hc_mult, axis=2)
    streams = []
    for segment in model.segments:
        x, _, _ = segment(x, inputs)
        streams.append(x)
    return model.head_logits(x), model.logits(model.mtp_hidden(x, tokens)), jnp.stack(streams)


def test_logits_mtp_logits_and_streams_of_every_layer_equal_the_goldens(golden: Golden, record_property: Any) -> None:
    logits, mtp_logits, streams = _everything(golden.model, golden.tokens)
    got = {"logits": logits, "mtp_logits": mtp_logits, "streams": streams[:, :, golden.expected["stream_positions"]]}
    for name, value in got.items():
        record_property("figure", f"{name}: max |Δ| {np.abs(np.asarray(value) - golden.expected[name]).max():.2g}")
        tolerances.assert_logits_close(value, golden.expected[name], tolerances.OTHERS)


def test_scanned_segments_equal_the_goldens(shared: Path) -> None:
    folder = shared / "goldens" / FOLDERS[0]
    expected = np.load(folder / "expected.npz")
    logits, mtp_logits = jax.jit(lambda model, x: (model(x), model.mtp_logits(x)))(
        load(folder, stacked=True), expected["tokens"]
    )
    tolerances.assert_logits_close(logits, expected["logits"], tolerances.OTHERS)
    tolerances.assert_logits_close(mtp_logits, expected["mtp_logits"], tolerances.OTHERS)


def test_simulated_quantisation_follows_the_goldens(golden: Golden) -> None:
    expected = golden.expected["logits_quant_sim"]
    logits = jax.jit(lambda model, x: model(x))(load(golden.folder, stacked=False, quant_sim="on"), golden.tokens)
    tolerances.assert_quant_sim_close(logits, expected)
    with pytest.raises(AssertionError, match="median"):  # the rule tells the simulation from its absence
        tolerances.assert_quant_sim_close(golden.expected["logits"], expected)


# ---- through the cache -----------------------------------------------------------------------------------------------
SPLITS = {
    "ones": [1] * 300,
    "threes": [3] * 100,
    "127 and 128": [127, 1, 128, 1, 3, 1] + [3] * 13,
    "131 and 129": [131, 3, 129] + [1] * 37,
}


# Each length needs a program of its own, so one checkpoint goes through all of them and the other through one.
@pytest.mark.parametrize(
    ("golden", "split"), [(FOLDERS[0], name) for name in SPLITS] + [(FOLDERS[1], "ones")], indirect=["golden"]
)
def test_chunks_of_any_length_equal_the_goldens_and_the_whole(golden: Golden, split: str) -> None:
    ends = np.minimum(np.cumsum(SPLITS[split]), golden.tokens.shape[1])
    chunks = [int(size) for size in np.diff(ends, prepend=0) if size]
    got = all_logits(golden.model, golden.tokens, mtp=True, chunks=chunks)
    _check(golden, got["logits"], got["mtp_logits"])


# Per chunk the lengths of both sequences; what is missing to their ends is one more chunk.
RAGGED = {
    "around the window": [[127, 128], [1, 3], [129, 1], [0, 0], [1, 121]],
    "0 and 1": [[1, 0], [0, 1], [3, 130], [131, 4], [1, 0]],
    "random 0": None,
    "random 1": None,
    "random 2": None,
}


@pytest.mark.parametrize("name", RAGGED)
def test_chunks_that_differ_between_sequences_equal_the_goldens(golden: Golden, name: str) -> None:
    batch, length = golden.tokens.shape
    chunks = RAGGED[name]
    if chunks is None:
        rng = np.random.default_rng(int(name[-1]))
        cuts = np.sort([rng.choice(np.arange(1, length), 12, replace=False) for _ in range(batch)])
        chunks = np.diff(cuts, axis=1, prepend=0).T
    rest = length - np.sum(chunks, axis=0)
    _check(golden, *_run_ragged(golden.model, golden.tokens, np.concatenate([chunks, [rest]]), padded=192))


def _check(golden: Golden, logits: np.ndarray, mtp_logits: np.ndarray) -> None:
    whole, mtp_whole, _ = _everything(golden.model, golden.tokens)
    tolerances.assert_logits_close(logits, golden.expected["logits"], tolerances.OTHERS)
    tolerances.assert_logits_close(mtp_logits, golden.expected["mtp_logits"], tolerances.OTHERS)
    tolerances.assert_logits_close(logits, whole)
    tolerances.assert_logits_close(mtp_logits, mtp_whole)


@functools.partial(jax.jit, donate_argnums=2)
def _chunk(model: Transformer, tokens: jax.Array, cache: Any, lengths: jax.Array) -> Any:
    """(logits, MTP logits, cache); MTP rows begin one position before the chunk, at the start of a sequence with it."""
    before = cache.length
    output, cache = model.extend(tokens, cache, lengths)
    mtp_hidden, cache = model.extend_mtp(tokens, output.streams, before, cache, lengths)
    return model.logits(output.hidden), model.logits(mtp_hidden), cache


def _run_ragged(
    model: Transformer, tokens: np.ndarray, chunks: np.ndarray, padded: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B,S,V] and MTP logits [B,S−1,V] through chunks [N,B], padded to one length with a real token id."""
    batch, length = tokens.shape
    assert chunks.max() <= padded
    cache = model.init_cache(batch, length)
    logits = np.full((batch, length, model.config.vocab_size), np.nan, np.float32)
    mtp_logits = logits[:, 1:].copy()
    done = np.zeros(batch, int)
    for sizes in chunks:
        piece = np.ones((batch, padded), np.int32)
        for row, (start, size) in enumerate(zip(done, sizes, strict=True)):
            piece[row, :size] = tokens[row, start : start + size]
        head, mtp, cache = _chunk(model, piece, cache, jnp.asarray(sizes, jnp.int32))
        for row, (start, size) in enumerate(zip(done, sizes, strict=True)):
            logits[row, start : start + size] = head[row, :size]
            first, end = max(start - 1, 0), max(start + size - 1, 0)
            mtp_logits[row, first:end] = mtp[row, : end - first]
        done += sizes
    return logits, mtp_logits
