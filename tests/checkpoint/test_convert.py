import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import as_stored, plain_config, quantised_config, random_model, write_hf_directory
from safetensors import SafetensorError, safe_open

from v4jax.checkpoint import writer
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.names import Spelling, Storage, section_file, section_parameters, sections
from v4jax.checkpoint.reader import MANIFEST, Checkpoint, open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError
from v4jax.checkpoint.writer import save_hf, save_model
from v4jax.config import ModelConfig

CONFIGS = [plain_config(), quantised_config(), quantised_config(expert_dtype="fp8")]


def source(path: Path, config: ModelConfig | None = None, **options: Any) -> Path:
    config = config or plain_config()
    return write_hf_directory(path, config, as_stored(config, **options), shards=2)


def stored_bytes(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (info.dtype, info.shape, info.read().tobytes()) for name, info in checkpoint.inventory.items()}


def assert_same_values(got: Checkpoint, want: Checkpoint) -> None:
    for section in sections(want.config):
        ours, theirs = got.section(section), want.section(section)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


# ---- there and back -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "fp4", "fp8"])
def test_native_bytes_survive_the_way_there_and_back(tmp_path: Path, config: ModelConfig):
    original = open_checkpoint(source(tmp_path / "a", config))
    there = convert(tmp_path / "a", tmp_path / "b")
    back = convert(tmp_path / "b", tmp_path / "c", to="hf", max_shard_bytes=100_000)
    assert there.nbytes == back.nbytes == original.nbytes
    assert back.tensors == len(original.inventory)
    assert stored_bytes(open_checkpoint(tmp_path / "c")) == stored_bytes(original)
    assert (tmp_path / "c" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == config.to_hf()
    assert_same_values(open_checkpoint(tmp_path / "b"), original)


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
@pytest.mark.parametrize("to", ["v4jax", "hf"])
def test_dequantised_weights_are_exact_and_the_config_says_so(tmp_path: Path, weights: Any, to: Any):
    original = open_checkpoint(source(tmp_path / "a", quantised_config()))
    convert(tmp_path / "a", tmp_path / "b", weights=weights, to=to)
    got = open_checkpoint(tmp_path / "b")
    assert_same_values(got, original)
    data = json.loads((tmp_path / "b" / "config.json").read_text())
    assert data["torch_dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[weights]
    assert not {"quantization_config", "expert_dtype"} & data.keys()
    dtypes = {info.name: info.dtype for info in got.inventory.values()}
    assert dtypes["layers.1.attn.wq_a.weight"] == {"bf16": "BF16", "fp32": "F32"}[weights]
    assert dtypes["layers.2.ffn.gate.bias"] == dtypes["layers.2.attn_norm.weight"] == "F32"
    assert dtypes["layers.1.ffn.gate.tid2eid"] == "I64"


@pytest.mark.parametrize("spelling", [Spelling.SAVED, Spelling.TRANSFORMERS])
def test_transformers_spellings_come_out_official(tmp_path: Path, spelling: Spelling):
    original = open_checkpoint(source(tmp_path / "a", spelling=spelling))
    summary = convert(tmp_path / "a", tmp_path / "b", to="hf")
    got = open_checkpoint(tmp_path / "b")
    assert (got.spelling, got.config) == (Spelling.OFFICIAL, original.config)
    assert "no MTP block" in summary.notes[0]
    assert got.notes == ()
    assert_same_values(got, original)


# ---- the directories ------------------------------------------------------------------------------------------------
def test_a_v4jax_directory_has_a_checked_file_per_section(tmp_path: Path):
    summary = convert(source(tmp_path / "a", quantised_config()), tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    assert manifest["status"] == "complete"
    assert manifest["files"] == summary.files
    assert manifest["source"]["tensors"] == len(as_stored(quantised_config()))
    assert list(summary.files) == [section_file(section) for section in sections(quantised_config())]
    for name, record in summary.files.items():
        content = (tmp_path / "b" / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with safe_open(tmp_path / "b" / "layers" / "03.safetensors", framework="numpy") as file:
        assert file.get_slice("layers.3.ffn.experts.w1.weight").get_shape() == [4, 40, 68]
        assert file.get_slice("layers.3.ffn.experts.w1.scale").get_dtype() == "F8_E8M0"
    assert not list((tmp_path / "b").rglob("*.partial"))


def test_hugging_face_shards_stay_below_their_size(tmp_path: Path):
    summary = convert(source(tmp_path / "a"), tmp_path / "b", to="hf", max_shard_bytes=150_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == summary.nbytes
    assert len(index["weight_map"]) == summary.tensors
    assert sorted(summary.files) == sorted(set(index["weight_map"].values()))
    largest = max(info.nbytes for info in open_checkpoint(tmp_path / "b").inventory.values())
    assert len(summary.files) > 3
    assert all(record["bytes"] < max(150_000, largest) + 20_000 for record in summary.files.values())
    one = convert(tmp_path / "a", tmp_path / "c", to="hf")
    assert list(one.files) == ["model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]


def test_tokenizer_and_encoding_come_along(tmp_path: Path):
    path = source(tmp_path / "a")
    files = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "encoding/encoding_dsv4.py"]
    for name in files:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    (path / "encoding" / "loop").symlink_to(path / "encoding")
    convert(path, tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    for directory in ("b", "c"):
        assert [(tmp_path / directory / name).read_text() for name in files] == files
        assert not (tmp_path / directory / "encoding" / "loop").exists()


def test_progress_counts_the_sections(tmp_path: Path):
    calls = []
    convert(source(tmp_path / "a"), tmp_path / "b", progress=lambda *call: calls.append(call))
    names = ["top", *(f"layers.{n}" for n in range(4)), "mtp.0"]
    assert calls == [(n, 6, name) for n, name in enumerate(names, start=1)]


# ---- from memory ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("save", [save_model, save_hf])
@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_parameters_in_memory_are_saved_as_they_are(tmp_path: Path, save: Any, weights: Any):
    config = quantised_config()
    model = random_model(config)
    layers = (model["layers", n] for n in range(config.num_hidden_layers))
    top: dict[str, Any] = dict(model["top"])
    top["embed.weight"] = jnp.asarray(top["embed.weight"], jnp.bfloat16)
    top["hc_head_fn"] = np.asfortranarray(top["hc_head_fn"])
    save(tmp_path / "b", config, top, layers, [model["mtp", 0]], weights=weights)
    checkpoint = open_checkpoint(tmp_path / "b")
    for section in sections(config):
        for key, value in checkpoint.section(section).items():
            np.testing.assert_array_equal(value, model[section][key], err_msg=key)


def test_float32_islands_are_not_rounded(tmp_path: Path):
    config = plain_config(num_nextn_predict_layers=0, mtp_layer_types=())
    model = random_model(config)
    third = np.float32(1) / 3
    for section in sections(config):
        for parameter in section_parameters(config, section):
            if parameter.storage is not Storage.TABLE:
                model[section][parameter.key] = np.full(parameter.shape, third)
    for save, name in ((save_model, "v"), (save_hf, "h")):
        layers = [model["layers", n] for n in range(config.num_hidden_layers)]
        save(tmp_path / name, config, model["top"], layers, weights="bf16")
        layer = open_checkpoint(tmp_path / name).layer(2)
        for key in ("attn_norm.weight", "hc_attn_fn", "attn.attn_sink", "ffn.gate.bias", "attn.compressor.ape"):
            assert (layer[key] == third).all(), key
        assert (layer["ffn.gate.weight"] == third.astype(ml_dtypes.bfloat16).astype(np.float32)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["top"].pop("hc_head_fn"), "top: 1 parameters .* hc_head_fn: got none"),
        (lambda model: model["layers", 1].update(extra=np.ones(1)), r"layers.1: .* extra: got \[1\], need none"),
        (lambda model: model["layers", 1].update({"attn_norm.weight": np.ones(3)}), r"got \[3\], need \[136\]"),
        (lambda model: model.pop(("mtp", 0)), "got too few layers or MTP blocks, need 4 and 1"),
        (lambda model: model.update({("mtp", 1): {}}), "got too many layers or MTP blocks, need 4 and 1"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str):
    config = plain_config()
    model = random_model(config)
    change(model)
    layers = [value for key, value in model.items() if key[0] == "layers"]
    mtp = [value for key, value in model.items() if key[0] == "mtp"]
    with pytest.raises(CheckpointError, match=message):
        save_model(tmp_path / "b", config, model["top"], layers, mtp)
    with pytest.raises(CheckpointError, match=r"did not finish|safetensors files and no"):
        open_checkpoint(tmp_path / "b")


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_outputs_that_would_destroy_something_are_refused(tmp_path: Path):
    path = source(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is the checkpoint to be converted"):
        convert(path, tmp_path / "x" / ".." / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for to in ("v4jax", "hf"):
        with pytest.raises(CheckpointError, match="exists and is not empty; remove it or give another"):
            convert(path, tmp_path / "full", to=to)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_a_directory_is_refused(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written \((File exists|Not a directory)\)"):
        convert(source(tmp_path / "a"), tmp_path / place)


def test_an_output_without_permission_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writer.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match="no permission to write"):
        convert(source(tmp_path / "a"), tmp_path / "b")


def test_a_bad_source_leaves_no_output(tmp_path: Path):
    path = source(tmp_path / "a")
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of its 2 files are missing"):
        convert(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
@pytest.mark.parametrize("save", [save_model, save_hf])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch, error, save: Any
):
    library, calls = writer.save_file, []

    def fill_up(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3 or save is save_hf:
            raise error
        library(*arguments)

    monkeypatch.setattr(writer, "save_file", fill_up)
    config = plain_config()
    model = random_model(config)
    layers = [model["layers", n] for n in range(config.num_hidden_layers)]
    with pytest.raises(CheckpointError, match=r"No space left on device.*free disk space"):
        save(tmp_path / "b", config, model["top"], layers, [model["mtp", 0]])
    with pytest.raises(ValueError, match=r"did not finish|safetensors files and no"):
        open_checkpoint(tmp_path / "b")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / MANIFEST).unlink(), "its conversion did not finish"),
        (lambda path: (path / MANIFEST).write_text('{"status": "running"}'), "its conversion did not finish"),
        (lambda path: (path / MANIFEST).write_text('{"status": "complete"}'), "need the sizes of the files"),
        (lambda path: (path / MANIFEST).write_text("{"), "cannot be read"),
        (lambda path: (path / "layers" / "02.safetensors").unlink(), "02.safetensors: got no such file"),
        (lambda path: (path / "top.safetensors").write_bytes(b"x"), r"top.safetensors: got 1 bytes, need \d+"),
    ],
)
def test_an_incomplete_v4jax_directory_is_refused(tmp_path: Path, damage: Any, message: str):
    convert(source(tmp_path / "a"), tmp_path / "b")
    damage(tmp_path / "b")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "b")


@pytest.fixture
def _no_type_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_no_type_checks")
@pytest.mark.parametrize(("option", "value"), [("weights", "int4"), ("to", "gguf")])
def test_unknown_choices_are_refused(tmp_path: Path, option: str, value: Any):
    with pytest.raises(CheckpointError, match=f"{option}: got '{value}', need"):
        convert(source(tmp_path / "a"), tmp_path / "b", **{option: value})
