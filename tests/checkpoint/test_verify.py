"""What `convert --verify` and `verify` find, and what they accept."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import as_stored, plain_config, quantised_config, write_hf_directory

from v4jax import cli, verify
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.reader import open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError
from v4jax.verify import verify_and_print


def base_checkpoint(path: Path) -> Path:
    """FP8 experts with float32 scales that are no powers of two, so that bfloat16 holds few of the values."""
    config = quantised_config(expert_dtype="fp8")
    random = np.random.default_rng(0)

    def changed(name: str, array: np.ndarray) -> np.ndarray:
        if not name.endswith(".scale"):
            return array
        return array * random.uniform(1, 2, array.shape).astype(np.float32)

    tensors = as_stored(config, scale_dtype="F32", float_dtype=ml_dtypes.bfloat16)
    return write_hf_directory(path, config, {name: changed(name, array) for name, array in tensors.items()})


def verified(path: Path, source: Path) -> list[str]:
    lines: list[str] = []
    verify_and_print(str(path), source=str(source), write=lines.append)
    return lines


# ---- what had to be rounded -----------------------------------------------------------------------------------------
def test_weights_that_bf16_cannot_hold_are_verified_there_and_back(tmp_path: Path):
    base_checkpoint(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", weights="bf16")
    assert ", rounded" in verified(tmp_path / "b", tmp_path / "a")[0]
    convert(tmp_path / "b", tmp_path / "c", to="hf", base=tmp_path / "a")
    assert ", rounded" in verified(tmp_path / "c", tmp_path / "b")[0]
    exact = verified(tmp_path / "c", tmp_path / "a")
    assert "rounded" not in exact[0]
    assert "differ by at most 0 standard deviations" in exact[1]


def test_float32_weights_are_verified_after_rounding(tmp_path: Path):
    config = plain_config()
    random = np.random.default_rng(1)
    tensors = {
        name: array if array.dtype == np.int64 else random.standard_normal(array.shape).astype(np.float32)
        for name, array in as_stored(config).items()
    }
    write_hf_directory(tmp_path / "a", config, tensors)
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--weights", "bf16", "--verify"]) == 0


# ---- flipped bits ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "stem", ["embed", "norm", "layers.0.ffn.gate.tid2eid", "layers.2.attn_norm", "layers.1.attn.wq_a", "layers.2.ffn"
             ".experts.3.w2", "layers.3.ffn.gate.bias", "layers.3.attn.indexer.compressor.ape", "mtp.0.e_proj"],
)  # fmt: skip
@pytest.mark.parametrize("to", ["v4jax", "hf"])
@pytest.mark.parametrize("side", ["source", "output"])
def test_a_flipped_bit_is_found_under_the_name_of_its_tensor(tmp_path: Path, monkeypatch, stem: str, to: Any, side):
    monkeypatch.setattr(verify, "_compare_forward", lambda *_, **__: "")
    config = quantised_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config, float_dtype=ml_dtypes.bfloat16), shards=2)
    convert(tmp_path / "a", tmp_path / "b", to=to)
    verified(tmp_path / "b", tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / ("a" if side == "source" else "b"))
    stacked = stem.replace("experts.3.", "experts.") if to == "v4jax" and side == "output" else stem
    names = [name for name in checkpoint.inventory if name in (stacked, f"{stacked}.weight", f"{stacked}.scale")]
    assert names
    for name in names:
        info = checkpoint.inventory[name]
        whole = info.file.read_bytes()
        content = bytearray(whole)
        content[info.offset + info.nbytes - 1] ^= 2
        info.file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            verified(tmp_path / "b", tmp_path / "a")
        assert name in str(caught.value)
        info.file.write_bytes(whole)
    verified(tmp_path / "b", tmp_path / "a")


# ---- beside the weights ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 77),
        ("index_topk", 999),
        ("eos_token_id", 7),
        ("compress_rope_theta", 1e5),
        ("swiglu_limit", 9),
    ],
)
def test_a_config_that_says_something_else_is_found(tmp_path: Path, key: str, value: Any):
    config = plain_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    convert(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=rf"(?s)config.json: says something else.*{key}: got {value}"):
        verified(tmp_path / "b", tmp_path / "a")


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_a_tokenizer_that_is_not_the_sources_is_found(tmp_path: Path, change: str):
    config = plain_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    (tmp_path / "a" / "encoding").mkdir()
    (tmp_path / "a" / "encoding" / "encoding_dsv4.py").write_text("x = 1")
    convert(tmp_path / "a", tmp_path / "b", to="hf")
    file = tmp_path / "b" / "encoding" / "encoding_dsv4.py"
    file.write_text("x = 2") if change == "changed" else file.unlink()
    with pytest.raises(CheckpointError, match=r"encoding/encoding_dsv4.py: (differs|is not in the output)"):
        verified(tmp_path / "b", tmp_path / "a")


def test_a_lost_mtp_block_is_said(tmp_path: Path):
    config = plain_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    without = {name: array for name, array in as_stored(config).items() if not name.startswith("mtp.")}
    write_hf_directory(tmp_path / "b", config, without)
    assert "has no MTP block" in verified(tmp_path / "b", tmp_path / "a")[0]


def test_tokens_with_a_damaged_header_are_refused(tmp_path: Path, capfd):
    source = str(write_hf_directory(tmp_path / "a", plain_config(), as_stored(plain_config())))
    (tmp_path / "tokens.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{garbage(((((((\n")
    assert cli.main(["verify", source, "--source", source, "--tokens", str(tmp_path / "tokens.npy")]) == 1
    assert "tokens.npy is not a readable .npy file" in capfd.readouterr().err
