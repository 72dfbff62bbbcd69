"""A tiny model directory with a tokenizer, and a way to call verbs in-process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from model.random_model import random_tensors, small_config

from scripts.make_tiny_checkpoint import train_tokenizer
from v4jax.checkpoint.writer import save_hf
from v4jax.cli import main
from v4jax.config import AttentionKind, ModelConfig, RouterKind

TEXT = ["def add(a, b):\n    return a + b\n", "class Point:\n    def __init__(self, x):\n        self.x = x\n"] * 4
CONTEXT = 64


class Result(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error output below the list of options."""
        return "\n".join(line for line in self.err.splitlines() if not line.startswith(("v4jax ", "  ")))


@pytest.fixture
def v4jax(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs one command line."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


def _config() -> ModelConfig:
    """All layer and router kinds, with more entries than are selected from the 25th token on."""
    return small_config(
        vocab_size=300,
        num_hidden_layers=4,
        layer_types=(AttentionKind.SLIDING, AttentionKind.CSA, AttentionKind.HCA, AttentionKind.CSA),
        mlp_layer_types=(RouterKind.HASH,) * 3 + (RouterKind.TOPK,),
        max_position_embeddings=CONTEXT,
    )


def _write(path: Path, config: ModelConfig) -> Path:
    tensors = random_tensors(config, seed=0)
    layers = (tensors["layers", n] for n in range(config.num_hidden_layers))
    mtp = (tensors["mtp", n] for n in range(config.num_mtp_layers))
    save_hf(path, config, tensors["top"], layers, mtp, weights="fp32")
    train_tokenizer(TEXT, config.vocab_size).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with every weight random. Tests only read it."""
    return _write(tmp_path_factory.mktemp("model") / "tiny", _config())


@pytest.fixture(scope="session")
def model_without_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same backbone as transformers saves it: no MTP block, and a config that still announces one."""
    config = _config()
    path = _write(tmp_path_factory.mktemp("model") / "no_mtp", config.without_mtp())
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    return path
