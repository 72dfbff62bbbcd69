"""Conversions that change how weights are stored, and the tensors that must come through untouched."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import as_stored, plain_config, quantised_config, random_model, write_hf_directory

from v4jax.checkpoint.compare import compare_tensors
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.names import Spelling, Storage, section_parameters, sections
from v4jax.checkpoint.progress import describe_source
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError
from v4jax.checkpoint.writer import save_model
from v4jax.config import ModelConfig


def stored_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = open_checkpoint(path).inventory
    return {name: (info.dtype, info.shape, info.read().tobytes()) for name, info in found.items()}


def assert_same_values(got: Checkpoint, want: Checkpoint) -> None:
    for section in sections(want.config):
        ours, theirs = got.section(section), want.section(section)
        for key in theirs:
            np.testing.assert_array_equal(
                ours[key].view(np.uint32), theirs[key].view(np.uint32), err_msg=f"{section} {key}"
            )


def adversarial(tensors: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same tensors with any bytes that are allowed: subnormals, largest values, both zeros, extreme scales."""
    random = np.random.default_rng(seed)

    def change(array: np.ndarray) -> np.ndarray:
        codes = np.frombuffer(random.bytes(array.nbytes), np.uint8).copy()
        if array.dtype == ml_dtypes.float8_e4m3fn:
            codes[codes & 0x7F == 0x7F] ^= 1
            codes[: min(6, len(codes))] = [0x00, 0x80, 0x01, 0x81, 0x7E, 0xFE][: min(6, len(codes))]
        elif array.dtype in (ml_dtypes.float8_e8m0fnu, np.uint8):
            codes = codes % 40 + 100
            codes[:2] = [1, 244][: min(2, len(codes))]
        elif array.dtype == np.float32:
            words = codes.view(np.uint32)
            words[words & 0x7F800000 == 0x7F800000] ^= 0x40000000
            words[:4] = [0, 0x80000000, 1, 0x7F7FFFFF][: min(4, len(words))]
        elif array.dtype == ml_dtypes.bfloat16:
            halves = codes.view(np.uint16)
            halves[halves & 0x7F80 == 0x7F80] ^= 0x4000
        elif array.dtype == np.int64:
            return array
        return codes.view(array.dtype).reshape(array.shape)

    return {name: change(np.ascontiguousarray(array)) for name, array in tensors.items()}


# ---- byte for byte --------------------------------------------------------------------------------------------------
@settings(max_examples=6)
@given(
    hidden=st.integers(17, 150).map(lambda n: 2 * n),
    inner=st.integers(3, 80).map(lambda n: 2 * n),
    experts=st.sampled_from(["fp4", "fp8", None]),
    scale=st.sampled_from(["F8_E8M0", "F32", "U8"]),
    seed=st.integers(0, 1000),
)
def test_any_bytes_survive_native_conversion_there_and_back(tmp_path_factory, hidden, inner, experts, scale, seed):
    tmp_path = tmp_path_factory.mktemp("native")
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner}
    config = quantised_config(expert_dtype=experts, **sizes) if experts else plain_config(**sizes)
    tensors = adversarial(as_stored(config, scale_dtype=scale, float_dtype=ml_dtypes.bfloat16), seed)
    write_hf_directory(tmp_path / "a", config, tensors)
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to="hf", max_shard_bytes=50_000)
    assert stored_bytes(tmp_path / "c") == stored_bytes(tmp_path / "a")


@settings(max_examples=5)
@given(
    hidden=st.integers(17, 150).map(lambda n: 2 * n),
    inner=st.integers(3, 140).map(lambda n: 2 * n),
    weights=st.sampled_from(["bf16", "fp32"]),
    layout=st.sampled_from(["official", "transformers"]),
    seed=st.integers(0, 1000),
)
def test_dequantised_exports_have_the_same_values_in_any_layout(tmp_path_factory, hidden, inner, weights, layout, seed):
    tmp_path = tmp_path_factory.mktemp("values")
    config = quantised_config(hidden_size=hidden, moe_intermediate_size=inner)
    tensors = as_stored(config, float_dtype=ml_dtypes.bfloat16)
    codes = {n: a for n, a in tensors.items() if a.dtype.itemsize == 1 and a.dtype != ml_dtypes.float8_e8m0fnu}
    write_hf_directory(tmp_path / "a", config, tensors | adversarial(codes, seed))
    convert(tmp_path / "a", tmp_path / "b", to="hf", weights=weights, layout=layout)
    convert(tmp_path / "b", tmp_path / "c")  # and that spelling is read again
    for name in "bc":
        assert_same_values(open_checkpoint(tmp_path / name), open_checkpoint(tmp_path / "a"))


def test_small_memory_makes_small_pieces_and_the_same_bytes(tmp_path: Path):
    config = quantised_config(hidden_size=400, moe_intermediate_size=300, vocab_size=3000)
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    for weights in ("native", "bf16", "fp8"):
        large = convert(tmp_path / "a", tmp_path / f"large-{weights}", weights=weights)
        small = convert(tmp_path / "a", tmp_path / f"small-{weights}", weights=weights, max_memory=12 << 20)
        assert small.files == large.files
    with pytest.raises(CheckpointError, match=r"--max-memory: got 1,000 bytes, need at least \d+ MiB"):
        convert(tmp_path / "a", tmp_path / "b", max_memory=1000)


# ---- FP4 and FP8 ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_fp4_experts_become_fp8_and_fp4_again(tmp_path: Path, layout: Any):
    config = quantised_config(moe_intermediate_size=128)
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    convert(tmp_path / "a", tmp_path / "b", to="hf", layout=layout, weights="fp8")
    eight = open_checkpoint(tmp_path / "b")
    assert eight.config.expert_storage == "fp8"
    assert "I8" not in {info.dtype for info in eight.inventory.values()}
    assert_same_values(eight, open_checkpoint(tmp_path / "a"))
    convert(tmp_path / "b", tmp_path / "c", weights="fp4")
    four = open_checkpoint(tmp_path / "c")
    assert four.config.expert_storage == "fp4"
    assert {info.dtype for n, info in four.inventory.items() if "ffn.experts" in n} == {"I8", "F8_E8M0"}
    assert_same_values(four, open_checkpoint(tmp_path / "a"))


def test_what_cannot_change_its_format_exactly_is_refused_by_name(tmp_path: Path):
    config = quantised_config(expert_dtype="fp8")
    write_hf_directory(tmp_path / "a", config, as_stored(config))  # random FP8 values are no FP4 values
    with pytest.raises(CheckpointError, match=r"layers\.\d\.ffn\.experts\.\d\.w\d\.weight.*FP8 → FP4"):
        convert(tmp_path / "a", tmp_path / "b", weights="fp4")
    config = quantised_config()
    tensors = as_stored(config)
    tensors["layers.1.ffn.experts.2.w1.scale"].view(np.uint8)[0, :2] = [90, 130]
    tensors["layers.1.ffn.experts.2.w1.weight"][0] = 0x11
    write_hf_directory(tmp_path / "c", config, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.2\.w1\.weight.*FP4 → FP8"):
        convert(tmp_path / "c", tmp_path / "d", weights="fp8")


def test_fused_names_need_whole_fp8_tiles(tmp_path: Path):
    config = quantised_config(expert_dtype="fp8")  # 40 rows of w1, then w3
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    with pytest.raises(CheckpointError, match=r"gate_up_proj: 40 rows of each of w1 and w3.*multiple of the 128"):
        convert(tmp_path / "a", tmp_path / "b", to="hf", layout="transformers")
    with pytest.raises(CheckpointError, match="give to=hf"):
        convert(tmp_path / "a", tmp_path / "b", layout="transformers")


# ---- after fine-tuning ----------------------------------------------------------------------------------------------
def checksums(path: Path) -> dict[str, str]:
    return {name: hashlib.sha256(repr(entry).encode()).hexdigest() for name, entry in stored_bytes(path).items()}


@pytest.mark.parametrize("tuned", ["bf16", "fp32"])
@pytest.mark.parametrize("weights", ["native", "fp4"])
def test_a_fine_tuned_model_goes_back_with_the_bytes_of_all_that_did_not_change(tmp_path: Path, tuned, weights):
    config = quantised_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config, float_dtype=ml_dtypes.bfloat16), shards=2)
    original = open_checkpoint(tmp_path / "a")
    model = {section: original.section(section) for section in sections(config)}
    changed = {"layers.1.attn.wq_a", "layers.2.attn_norm", *(f"layers.3.ffn.experts.{e}.w2" for e in (0, 3))}
    model["layers", 1]["attn.wq_a.weight"] = model["layers", 1]["attn.wq_a.weight"] * 1.5
    model["layers", 2]["attn_norm.weight"] = model["layers", 2]["attn_norm.weight"] + 1
    model["layers", 3]["ffn.experts.w2.weight"][[0, 3]] *= 1.25
    layers = [model["layers", n] for n in range(config.num_hidden_layers)]
    save_model(tmp_path / "tuned", config, model["top"], layers, [model["mtp", 0]], weights=tuned)
    summary = convert(tmp_path / "tuned", tmp_path / "b", weights=weights, to="hf", base=tmp_path / "a")
    assert "were quantised anew" in " ".join(summary.notes)
    before, after = checksums(tmp_path / "a"), checksums(tmp_path / "b")
    assert before.keys() == after.keys()
    differing = {name for name in before if before[name] != after[name]}
    assert {name.removesuffix(".weight").removesuffix(".scale") for name in differing} == changed
    assert open_checkpoint(tmp_path / "b").config.to_hf() == original.config.to_hf()
    layer = open_checkpoint(tmp_path / "b").layer(3)["ffn.experts.w2.weight"]
    np.testing.assert_allclose(layer, model["layers", 3]["ffn.experts.w2.weight"], rtol=0.25, atol=0.5)
    assert compare_tensors(open_checkpoint(tmp_path / "b"), open_checkpoint(tmp_path / "tuned")).lines == []
    untouched = convert(tmp_path / "a", tmp_path / "bf16", weights="bf16")
    assert untouched.tensors
    convert(tmp_path / "bf16", tmp_path / "back", weights=weights, to="hf", base=tmp_path / "a")
    assert checksums(tmp_path / "back") == before


def test_the_note_on_base_names_the_quantised_checkpoint_at_the_beginning(tmp_path: Path):
    config = quantised_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    convert(tmp_path / "a", tmp_path / "plain", weights="bf16")
    plain = open_checkpoint(tmp_path / "plain")
    layers = [plain.layer(n) for n in range(config.num_hidden_layers)]
    origin = describe_source(plain)
    save_model(tmp_path / "tuned", plain.config, plain.top(), layers, [plain.mtp(0)], source=origin)
    for name in ("plain", "tuned"):
        notes = convert(tmp_path / name, tmp_path / f"{name}-out", to="hf").notes
        assert f"--base {tmp_path / 'a'} keeps the bytes" in notes[-1]
    (tmp_path / "plain").rename(tmp_path / "moved")
    notes = convert(tmp_path / "tuned", tmp_path / "out", to="hf").notes
    assert f"--base {tmp_path / 'plain'} keeps the bytes" in notes[-1]


def test_a_base_of_another_model_is_refused(tmp_path: Path):
    write_hf_directory(tmp_path / "a", plain_config(), as_stored(plain_config()))
    other = quantised_config(hidden_size=160)
    write_hf_directory(tmp_path / "b", other, as_stored(other))
    with pytest.raises(CheckpointError, match=r"--base: has no embed.weight \[50, 136\]"):
        convert(tmp_path / "a", tmp_path / "c", base=tmp_path / "b")


def test_plain_weights_are_quantised_to_the_released_formats(tmp_path: Path):
    config = plain_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    convert(tmp_path / "a", tmp_path / "b", weights="fp4", to="hf")
    want = quantised_config()
    reference = as_stored(want, float_dtype=ml_dtypes.bfloat16)
    got = stored_bytes(tmp_path / "b")
    assert got.keys() == reference.keys()
    for section in sections(config):
        for parameter in section_parameters(config, section):
            if parameter.storage in (Storage.DENSE, Storage.EXPERT):
                name = (
                    parameter.key.replace("experts.w", "experts.1.w")
                    if parameter.storage is Storage.EXPERT
                    else parameter.key
                )
                prefix = "" if section == "top" else f"{section[0]}.{section[1]}."
                assert got[prefix + name][2] == reference[prefix + name].tobytes(), name
    assert open_checkpoint(tmp_path / "b").config.expert_storage == "fp4"


# ---- DSpark ---------------------------------------------------------------------------------------------------------
def dspark(config: ModelConfig) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    extra = json.loads(config.extra) | {"dspark_block_size": 5}
    config = quantised_config(extra=json.dumps(extra), num_nextn_predict_layers=1)
    heads: dict[str, np.ndarray] = {
        "mtp.0.markov_w1": np.frombuffer(np.random.default_rng(0).bytes(24), np.float32).reshape(3, 2),
        "mtp.1.attn.wq_a.weight": np.arange(12, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(3, 4),
        "mtp.2.confidence_head": np.full((1, 5), np.nan, ml_dtypes.bfloat16),
    }
    backbone = {name: array for name, array in as_stored(config).items() if not name.startswith("mtp.")}
    return config, backbone | heads


@pytest.mark.parametrize("weights", ["native", "bf16"])
def test_dspark_tensors_are_carried_and_restored(tmp_path: Path, weights: Any):
    config, tensors = dspark(quantised_config())
    write_hf_directory(tmp_path / "a", config, tensors, shards=2)
    summary = convert(tmp_path / "a", tmp_path / "b", weights=weights)
    assert "mtp/dspark.safetensors" in summary.files
    assert any("DSpark head carried through untouched: 3 tensors" in note for note in summary.notes)
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    before, after = stored_bytes(tmp_path / "a"), stored_bytes(tmp_path / "c")
    for name in before:
        if name.startswith("mtp.") or weights == "native":
            assert after[name] == before[name], name
    assert compare_tensors(open_checkpoint(tmp_path / "c"), open_checkpoint(tmp_path / "a")).lines == []


def test_a_fine_tuned_dspark_model_gets_its_head_back_from_the_base(tmp_path: Path):
    config, tensors = dspark(quantised_config())
    write_hf_directory(tmp_path / "a", config, tensors)
    original = open_checkpoint(tmp_path / "a")
    layers = [original.layer(n) for n in range(config.num_hidden_layers)]
    save_model(tmp_path / "tuned", original.config, original.top(), layers)
    convert(tmp_path / "tuned", tmp_path / "b", to="hf", base=tmp_path / "a")
    before, after = stored_bytes(tmp_path / "a"), stored_bytes(tmp_path / "b")
    assert before.keys() == after.keys()
    heads = [name for name in before if name.startswith("mtp.")]
    assert len(heads) == 3
    assert all(after[name] == before[name] for name in heads)


# ---- verify ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["source", "output"])
@pytest.mark.parametrize(("weights", "to"), [("native", "v4jax"), ("bf16", "v4jax"), ("fp8", "hf")])
def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path: Path, side: str, weights: Any, to: Any):
    config = quantised_config()
    tensors = as_stored(config, float_dtype=ml_dtypes.bfloat16)
    # No block of zeros alone, whose scale means nothing.
    write_hf_directory(tmp_path / "a", config, tensors)
    convert(tmp_path / "a", tmp_path / "b", weights=weights, to=to)
    path = tmp_path / ("a" if side == "source" else "b")
    random = np.random.default_rng(5)
    infos = list(open_checkpoint(path).inventory.values())
    for info in random.choice(np.array(infos, object), 5, replace=False):
        place = info.offset + int(random.integers(info.nbytes))
        content = bytearray(info.file.read_bytes())
        content[place] ^= 1 << int(random.integers(8))
        whole = info.file.read_bytes()
        info.file.write_bytes(content)
        lines = compare_tensors(open_checkpoint(tmp_path / "b"), open_checkpoint(tmp_path / "a")).lines
        stem = info.name.removesuffix(".scale").removesuffix(".weight")
        assert lines, info.name
        assert any(stem.split("experts.")[-1].split(".")[-1] in line for line in lines), (info.name, lines)
        info.file.write_bytes(whole)
    assert compare_tensors(open_checkpoint(tmp_path / "b"), open_checkpoint(tmp_path / "a")).lines == []


def test_random_model_is_what_the_spelling_says(tmp_path: Path):
    config = plain_config()
    write_hf_directory(tmp_path / "a", config, as_stored(config))
    convert(tmp_path / "a", tmp_path / "b", to="hf", layout="transformers")
    got = open_checkpoint(tmp_path / "b")
    assert got.spelling is Spelling.TRANSFORMERS
    for section, tensors in random_model(config).items():
        for key, values in got.section(section).items():
            np.testing.assert_array_equal(values, tensors[key])
