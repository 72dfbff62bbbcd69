"""Directories that transformers writes and we read, and the other way, compared by the logits of both models."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tolerances

from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.names import Spelling
from v4jax.checkpoint.reader import open_checkpoint
from v4jax.config import ModelConfig
from v4jax.dtypes import DTypePolicy
from v4jax.model.transformer import Transformer
from v4jax.verify import compare_with_transformers

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

import peer  # noqa: E402
from peer import Peer  # noqa: E402

pytestmark = pytest.mark.parity

CONFIG_SEED = 1


@pytest.fixture(scope="module")
def original() -> Peer:
    return Peer.random(peer.random_config(CONFIG_SEED), seed=CONFIG_SEED)


@pytest.fixture(scope="module")
def tokens(original: Peer) -> np.ndarray:
    return peer.random_tokens(original.config, CONFIG_SEED)


@jax.jit
def _logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _read(path: Path) -> tuple[ModelConfig, Spelling, Transformer]:
    checkpoint = open_checkpoint(path)
    layers = (checkpoint.layer(n) for n in range(checkpoint.config.num_hidden_layers))
    model = Transformer.from_tensors(checkpoint.config, DTypePolicy.named("float32"), checkpoint.top(), layers)
    return checkpoint.config, checkpoint.spelling, model


@pytest.mark.parametrize(
    ("original_format", "spelling"),
    [(True, Spelling.SAVED), (False, Spelling.TRANSFORMERS)],
    ids=["saved", "in-memory"],
)
def test_what_transformers_saves_gives_its_logits_here(
    original: Peer, tokens: np.ndarray, tmp_path: Path, original_format: bool, spelling: Spelling
) -> None:
    original.module.save_pretrained(tmp_path, save_original_format=original_format)
    config, found, model = _read(tmp_path)
    assert found is spelling
    assert config.layer_types == original.config.layer_types
    tolerances.assert_logits_close(_logits(model, tokens), original.run(tokens).logits, tolerances.OTHERS)


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_what_we_export_gives_our_logits_in_transformers(
    original: Peer, tokens: np.ndarray, tmp_path: Path, record_property: Any, layout: Any
) -> None:
    original.module.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "v4jax", weights="fp32")
    convert(tmp_path / "v4jax", tmp_path / "exported", weights="fp32", to="hf", layout=layout, max_shard_bytes=100_000)
    module = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, **peer.PLAIN_FORWARD
    )
    theirs = Peer(original.config, module).run(tokens).logits
    ours = _logits(_read(tmp_path / "v4jax")[2], tokens)
    record_property("figure", f"exported: max |Δ| {np.abs(np.asarray(ours) - theirs).max():.2g}")
    tolerances.assert_logits_close(ours, theirs, tolerances.OTHERS)
    np.testing.assert_array_equal(theirs, original.run(tokens).logits)


def test_a_streamed_pass_beside_transformers_agrees_layer_by_layer(
    original: Peer, tokens: np.ndarray, tmp_path: Path, capsys: Any
) -> None:
    original.module.save_pretrained(tmp_path)
    found = compare_with_transformers(open_checkpoint(tmp_path), tokens[:1, :40], print)
    layers = original.config.num_hidden_layers
    assert len(found["error"]) == len(found["experts"]) == layers
    assert max(found["error"]) <= 1e-4
    assert min(found["experts"]) == 1
    assert found["max"][0] <= 2e-4
    assert found["top"][0] == 1
    assert len(capsys.readouterr().out.splitlines()) == layers + 2
