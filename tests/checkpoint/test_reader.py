import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import as_stored, plain_config, quantised_config, random_model, write_hf_directory

from kernels_pallas.formats import decode_fp4, decode_fp8, encode_fp4, encode_fp8
from v4jax.checkpoint.names import Section, Spelling, Storage, section_parameters, sections
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError
from v4jax.checkpoint.writer import save_hf, save_model
from v4jax.config import ModelConfig

HF_SPELLINGS = [Spelling.OFFICIAL, Spelling.SAVED, Spelling.TRANSFORMERS]


def expected(config: ModelConfig, section: Section) -> dict[str, np.ndarray]:
    """The random model after the quantisation of its storage."""
    tensors = random_model(config)[section]
    for parameter in section_parameters(config, section):
        if config.quantization_config and parameter.storage in (Storage.EXPERT, Storage.DENSE):
            is_fp4 = parameter.storage is Storage.EXPERT and config.expert_storage == "fp4"
            encode, decode = (encode_fp4, decode_fp4) if is_fp4 else (encode_fp8, decode_fp8)
            tensors[parameter.key] = decode(*encode(tensors[parameter.key]))
    return tensors


def assert_reads(checkpoint: Checkpoint, config: ModelConfig) -> None:
    for section in sections(checkpoint.config):
        want = expected(config, section)
        got, short = checkpoint.section(section), checkpoint.section(section, "bfloat16")
        assert got.keys() == short.keys() == want.keys()
        for parameter in section_parameters(config, section):
            key, is_table = parameter.key, parameter.storage is Storage.TABLE
            assert got[key].dtype == (np.int32 if is_table else np.float32), key
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)
            exact = is_table or parameter.storage.is_float32
            assert short[key].dtype == (got[key].dtype if exact else ml_dtypes.bfloat16), key
            np.testing.assert_array_equal(short[key].astype(got[key].dtype), want[key], err_msg=key)


# ---- what is read ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spelling", HF_SPELLINGS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [plain_config(), quantised_config()], ids=["plain", "quantised"])
def test_every_spelling_reads_as_the_same_model(tmp_path: Path, spelling: Spelling, shards: int, config: ModelConfig):
    checkpoint = open_checkpoint(write_hf_directory(tmp_path, config, as_stored(config, spelling), shards))
    assert checkpoint.spelling is spelling
    assert_reads(checkpoint, config)


@pytest.mark.parametrize("spelling", HF_SPELLINGS)
@pytest.mark.parametrize("scale_dtype", ["F32", "U8"])
def test_fp8_experts_and_all_scale_dtypes_are_read(tmp_path: Path, spelling: Spelling, scale_dtype: str):
    # An inner size of 128, or transformers' fused tensor would share scales between w1 and w3.
    config = quantised_config(expert_dtype="fp8", moe_intermediate_size=128)
    tensors = as_stored(config, spelling, scale_dtype=scale_dtype)
    assert_reads(open_checkpoint(write_hf_directory(tmp_path, config, tensors)), config)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_checkpoints_are_upcast_exactly(tmp_path: Path, dtype: Any):
    config = plain_config()
    path = write_hf_directory(tmp_path, config, as_stored(config, float_dtype=dtype))
    for section in sections(config):
        tensors = open_checkpoint(path).section(section)
        for key, want in random_model(config)[section].items():
            is_rounded = want.dtype == np.float32 and not key.endswith("bias")
            np.testing.assert_array_equal(tensors[key], want.astype(dtype).astype(np.float32) if is_rounded else want)


def test_a_single_file_is_a_checkpoint_too(tmp_path: Path):
    config = plain_config()
    path = write_hf_directory(tmp_path, config, as_stored(config)) / "model.safetensors"
    assert_reads(open_checkpoint(path), config)


def test_native_sections_hold_the_stored_bytes(tmp_path: Path):
    config = quantised_config()
    stored = as_stored(config)
    layer = open_checkpoint(write_hf_directory(tmp_path, config, stored)).native(("layers", 2))
    for kind in ("weight", "scale"):
        stack = np.stack([stored[f"layers.2.ffn.experts.{e}.w2.{kind}"] for e in range(config.n_routed_experts)])
        assert layer[f"ffn.experts.w2.{kind}"].dtype == stack.dtype
        assert layer[f"ffn.experts.w2.{kind}"].tobytes() == stack.tobytes()
        assert layer[f"attn.wq_a.{kind}"].tobytes() == stored[f"layers.2.attn.wq_a.{kind}"].tobytes()


def test_fused_fp8_experts_that_share_a_scale_have_no_native_bytes(tmp_path: Path):
    config = quantised_config(expert_dtype="fp8")
    checkpoint = open_checkpoint(write_hf_directory(tmp_path, config, as_stored(config, Spelling.TRANSFORMERS)))
    with pytest.raises(CheckpointError, match="one FP8 scale spans the 128 rows where w1 meets w3"):
        checkpoint.native(("layers", 0))
    assert checkpoint.layer(0)["ffn.experts.w3.weight"].shape == (4, 40, 136)


def test_the_quantised_golden_is_read(shared):
    checkpoint = open_checkpoint(shared / "goldens" / "flash_like_quantized")
    assert (checkpoint.notes, checkpoint.ignored, checkpoint.config.num_mtp_layers) == ((), (), 1)
    assert checkpoint.nbytes == sum(info.nbytes for info in checkpoint.inventory.values()) == 4_736_884
    layer = checkpoint.layer(2, "bfloat16")
    assert layer["ffn.experts.w1.weight"].shape == (8, 128, 128)
    assert 0 < np.abs(layer["attn.wq_a.weight"].astype(np.float32)).max() < 448


@pytest.mark.parametrize("save", [save_model, save_hf])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_saved_model_follows_the_umask(tmp_path: Path, save: Any, umask: int, mode: int):
    config, model = plain_config(), random_model(plain_config())
    before = os.umask(umask)
    try:
        save(tmp_path / "a", config, model["top"], (model["layers", n] for n in range(4)), [model["mtp", 0]])
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


# ---- MTP and DSpark -------------------------------------------------------------------------------------------------
def test_a_wholly_absent_mtp_block_is_reported(tmp_path: Path):
    config = plain_config()
    tensors = {name: array for name, array in as_stored(config).items() if not name.startswith("mtp.")}
    checkpoint = open_checkpoint(write_hf_directory(tmp_path, config, tensors))
    assert checkpoint.config.num_mtp_layers == 0
    assert "no MTP block" in checkpoint.notes[0]
    with pytest.raises(CheckpointError, match="has no MTP block"):
        checkpoint.mtp(0)
    with pytest.raises(IndexError, match="the model has 4 layers"):
        checkpoint.layer(4)


def test_a_partly_absent_mtp_block_is_an_error(tmp_path: Path):
    tensors = as_stored(plain_config())
    del tensors["mtp.0.e_proj.weight"], tensors["mtp.0.hc_head_fn"]
    with pytest.raises(CheckpointError, match=r"2 missing.*\n.*mtp\.0\.(e_proj|hc_head)"):
        open_checkpoint(write_hf_directory(tmp_path, plain_config(), tensors))


def test_a_dspark_head_is_counted_and_left_alone(tmp_path: Path):
    config = plain_config(extra=json.dumps({"dspark_block_size": 5}))
    heads = {f"mtp.{n}.markov_w1": np.ones((3, 2), np.float32) for n in range(3)}
    checkpoint = open_checkpoint(write_hf_directory(tmp_path, config, as_stored(config) | heads))
    assert checkpoint.ignored == tuple(heads)
    assert "3 tensors (mtp.*), 72 bytes" in checkpoint.notes[0]
    assert_reads(checkpoint, config)


def dspark_head(config: ModelConfig) -> dict[str, np.ndarray]:
    """Three stages of a window-only block each, quantised like the model, with the extra tensors of the last."""
    block = {name: array for name, array in as_stored(config).items() if name.startswith("mtp.0.")}
    stages = {name.replace("mtp.0.", f"mtp.{n}."): array for n in range(3) for name, array in block.items()}
    return stages | {
        "mtp.2.markov_w1": np.ones((config.vocab_size, 8), ml_dtypes.bfloat16),
        "mtp.2.markov_w2": np.full((8, config.vocab_size), np.nan, ml_dtypes.bfloat16),
        "mtp.2.confidence_head": np.ones((1, 144), np.float32),
    }


@pytest.mark.parametrize("spelling", HF_SPELLINGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_refreshed_release_reads_and_carries_its_head(tmp_path: Path, spelling: Spelling, shards: int):
    plain = quantised_config()
    data: dict[str, Any] = plain.to_hf() | {"dspark_block_size": 5, "dspark_markov_rank": 256}
    data["compress_ratios"] = [*data["compress_ratios"][:-1], 0, 0, 0]
    config = ModelConfig.from_hf(data)
    head = dspark_head(plain)
    backbone = {name: array for name, array in as_stored(plain, spelling).items() if not name.startswith("mtp.")}
    checkpoint = open_checkpoint(write_hf_directory(tmp_path / "a", config, backbone | head, shards))
    assert (checkpoint.spelling, checkpoint.config) == (spelling, config)
    assert {info.name: info.read().tobytes() for info in checkpoint.carried} == {
        name: array.tobytes() for name, array in head.items()
    }
    assert f"{len(head)} tensors (mtp.*)" in checkpoint.notes[0]
    for section in sections(config):
        got = checkpoint.section(section)
        for key, want in expected(plain, section).items():
            np.testing.assert_array_equal(got[key], want, err_msg=key)
    lost = open_checkpoint(write_hf_directory(tmp_path / "b", config, backbone, shards))
    assert lost.carried == ()
    assert lost.notes == ("no DSpark speculative head in the files; the backbone is complete",)


@pytest.mark.parametrize("spelling", HF_SPELLINGS)
@pytest.mark.parametrize(("dense", "experts"), [("F8_E8M0", "F32"), ("F32", "F8_E8M0"), ("U8", "F32")])
def test_base_models_are_read_whatever_their_scales(tmp_path: Path, spelling: Spelling, dense: str, experts: str):
    config = quantised_config(expert_dtype="fp8", moe_intermediate_size=128)
    tensors = as_stored(config, spelling, scale_dtype=dense)
    other = as_stored(config, spelling, scale_dtype=experts)
    tensors |= {name: array for name, array in other.items() if "experts" in name and "shared" not in name}
    checkpoint = open_checkpoint(write_hf_directory(tmp_path, config, tensors))
    for section in sections(checkpoint.config):
        got = checkpoint.section(section)
        for key, want in expected(config, section).items():
            np.testing.assert_array_equal(got[key], want, err_msg=key)


def test_scales_that_are_no_powers_of_two_multiply(tmp_path: Path):
    config = quantised_config(expert_dtype="fp8")
    tensors = as_stored(config, scale_dtype="F32")
    tensors = {name: array * np.float32(1.7) if name.endswith(".scale") else array for name, array in tensors.items()}
    layer = open_checkpoint(write_hf_directory(tmp_path, config, tensors)).layer(1)
    weight, scale = (tensors[f"layers.1.attn.wq_a.{kind}"] for kind in ("weight", "scale"))
    spread = scale.repeat(128, axis=0)[:24].repeat(128, axis=1)[:, :136]
    np.testing.assert_array_equal(layer["attn.wq_a.weight"], weight.astype(np.float32) * spread)


def test_a_config_of_the_first_upload_has_fp4_experts(tmp_path: Path):
    config = quantised_config()
    data = {key: value for key, value in config.to_hf().items() if key != "expert_dtype"}
    path = write_hf_directory(tmp_path, config, as_stored(config))
    (path / "config.json").write_text(json.dumps(data))
    checkpoint = open_checkpoint(path)
    want = expected(config, ("layers", 1))["ffn.experts.w2.weight"]
    np.testing.assert_array_equal(checkpoint.layer(1)["ffn.experts.w2.weight"], want)


def test_odd_indices_are_noted(tmp_path: Path):
    path = write_hf_directory(tmp_path, plain_config(), as_stored(plain_config()), shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    (path / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": {"total_size": 5}}))
    (path / "old.safetensors").write_bytes(b"never opened")
    notes = open_checkpoint(path).notes
    assert "states total_size 5, its tensors have" in notes[0]
    assert "old.safetensors" in notes[1]


# ---- what is refused ------------------------------------------------------------------------------------------------
def wrong(tensors: dict[str, np.ndarray], name: str, value: np.ndarray | None) -> None:
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value


ZEROS = np.zeros((4,), np.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.attn.wq_a.weight", None, r"missing: layers.1.attn.wq_a.weight \[24, 136\]"),
        ("layers.1.attn.wq_a.scale", None, "missing: layers.1.attn.wq_a.scale, the scale of .*wq_a.weight"),
        ("layers.1.ffn.experts.3.w2.scale", None, "missing: layers.1.ffn.experts.3.w2.scale"),
        ("layers.2.ffn.gate.bias", None, "missing: layers.2.ffn.gate.bias"),
        ("layers.0.ffn.gate.tid2eid", None, "missing: layers.0.ffn.gate.tid2eid"),
        ("layers.9.attn.wq_a.weight", ZEROS, "extra: layers.9.attn.wq_a.weight"),
        ("layers.2.ffn.gate.tid2eid", np.zeros((50, 2), np.int64), "extra: layers.2.ffn.gate.tid2eid"),
        ("embed.scale", ZEROS, "extra: embed.scale"),
        ("layers.1.attn.wq_a.weight_scale_inv", ZEROS, "extra: .*wq_a.weight_scale_inv: .* has another scale"),
        ("hc_head_scale", np.float32(1), r"mis-shaped: hc_head_scale: got \[\], need \[1\]"),
        ("norm.weight", np.zeros((8,), np.float32), r"mis-shaped: norm.weight: got \[8\], need \[136\]"),
        ("layers.0.ffn.experts.1.w1.weight", np.zeros((40, 136), np.int8), r"got \[40, 136\], need \[40, 68\]"),
        ("layers.1.attn.wq_a.scale", ZEROS, r"mis-shaped: layers.1.attn.wq_a.scale: got \[4\], need \[1, 2\]"),
        ("layers.1.attn.wq_a.scale", np.zeros((1, 2), np.float16), "got F16, need F8_E8M0 or U8 or F32"),
        ("layers.2.ffn.gate.bias", np.zeros(4, np.int64), "mis-typed: layers.2.ffn.gate.bias: got I64, need F32"),
        ("layers.0.ffn.gate.tid2eid", np.zeros((50, 2), np.float32), "got F32, need I64 or I32"),
        ("layers.0.ffn.experts.1.w1.weight", np.zeros((40, 136), np.float32), "need I8 as in the layer's first"),
        ("norm.weight", np.zeros(136, ml_dtypes.float8_e4m3fn), "mis-typed: norm.weight: got F8_E4M3"),
        ("layers.1.attn.wq_a.weight", np.zeros((24, 68), np.int8), "mis-typed: .*got I8, need F32 or BF16"),
        ("head.weight", np.zeros((50, 136), np.float64), "mis-typed: head.weight: got F64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, name: str, value: np.ndarray | None, message: str):
    tensors = as_stored(quantised_config())
    wrong(tensors, name, value)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(write_hf_directory(tmp_path, quantised_config(), tensors))
    assert "fetch config and weights of one revision" in str(error.value)


def test_all_differences_are_in_one_error(tmp_path: Path):
    tensors = as_stored(plain_config())
    wrong(tensors, "norm.weight", None)
    wrong(tensors, "nonsense", ZEROS)
    wrong(tensors, "head.weight", ZEROS)
    wrong(tensors, "embed.weight", np.zeros((50, 136), np.int8))
    with pytest.raises(CheckpointError, match=r"fit config\.json: 1 mis-typed, 1 mis-shaped, 1 missing, 1 extra"):
        open_checkpoint(write_hf_directory(tmp_path, plain_config(), tensors))


def test_a_long_list_of_differences_fits_on_a_screen(tmp_path: Path):
    path = write_hf_directory(tmp_path, plain_config(num_hidden_layers=3, **LAYERS_3), as_stored(plain_config()))
    with pytest.raises(CheckpointError, match=r"… and \d+ more$") as error:
        open_checkpoint(path)
    assert len(str(error.value).splitlines()) == 22


LAYERS_3 = {key: getattr(plain_config(), key)[:3] for key in ("layer_types", "mlp_layer_types")}


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("layers.1.attn.wq_a.weight", (3, 5), 0x7F, "layers.1.attn.wq_a.weight: 1 of 3264 values are NaN"),
        ("layers.1.attn.wq_a.scale", (0, 0), 255, "layers.1.attn.wq_a"),
        ("layers.1.ffn.experts.2.w1.scale", (0, 0), 255, "layers.1.ffn.experts.2.w1"),
        ("layers.1.attn_norm.weight", (0,), np.nan, "layers.1.attn_norm.weight: 1 of 136 values are NaN or infinite"),
        ("layers.1.ffn.gate.tid2eid", (7, 0), 4, "tid2eid: got expert 4, need 0 to 3"),
        ("layers.1.ffn.gate.tid2eid", (7, 0), -1, "tid2eid: got expert -1, need 0 to 3"),
        ("layers.1.ffn.gate.tid2eid", 7, 2, r"tid2eid: token 7 has one expert twice \(\[2, 2\]\)"),
    ],
)
def test_a_value_that_cannot_be_right_is_named(tmp_path: Path, name: str, index: Any, value: Any, message: str):
    tensors = as_stored(quantised_config())
    is_code = tensors[name].dtype.itemsize == 1
    (tensors[name].view(np.uint8) if is_code else tensors[name])[index] = value
    checkpoint = open_checkpoint(write_hf_directory(tmp_path, quantised_config(), tensors))
    checkpoint.layer(0)
    for read in (checkpoint.section, checkpoint.native):
        with pytest.raises(CheckpointError, match=message):
            read(("layers", 1))


def test_rounded_router_biases_are_reported(tmp_path: Path):
    config = plain_config()
    tensors = as_stored(config)
    tensors["layers.2.ffn.gate.bias"] = tensors["layers.2.ffn.gate.bias"].astype(ml_dtypes.bfloat16)
    notes = open_checkpoint(write_hf_directory(tmp_path, config, tensors)).notes
    assert len(notes) == 1
    assert "1 router biases are not stored in F32" in notes[0]


@pytest.mark.parametrize("block", [[128], "128", [128, 0], [128, 1.5]])
def test_a_block_size_that_is_none_is_refused(tmp_path: Path, block: Any):
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    config = quantised_config(extra=json.dumps({"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match="weight_block_size: got"):
        open_checkpoint(write_hf_directory(tmp_path, config, as_stored(quantised_config())))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no names of a V4 model"):
        open_checkpoint(write_hf_directory(tmp_path / "other", plain_config(), {"transformer.wte": ZEROS}))


def test_a_truncated_shard_is_refused(tmp_path: Path):
    path = write_hf_directory(tmp_path, plain_config(), as_stored(plain_config()), shards=2)
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: truncated: got .* fetch it again"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["/etc/top.safetensors", "../top.safetensors", "layers/../../top.safetensors"])
def test_a_record_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str):
    record = {"status": "complete", "files": {name: {"bytes": 3}}}
    (tmp_path / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="need files of this directory"):
        open_checkpoint(tmp_path)
