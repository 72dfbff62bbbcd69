"""What transformers really writes is read, and what we write it reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoint import as_stored, plain_config, quantised_config, write_hf_directory

from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.names import Spelling, sections
from v4jax.checkpoint.reader import open_checkpoint

pytestmark = pytest.mark.parity

# transformers wants rotary channels that int(head_dim · r/head_dim) gives back: 16 of 48 would become 15.
SIZES = {"head_dim": 64}


def load(path: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(path, dtype="float32", output_loading_info=True)
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith(("mtp.", "model.mtp."))]
    assert (set(report["missing_keys"]), unexpected, set(report["mismatched_keys"])) == (set(), [], set())
    return model


@pytest.mark.parametrize("original_format", [True, False])
def test_all_that_transformers_saves_is_read(tmp_path: Path, original_format: bool):
    config = plain_config(**SIZES)
    path = write_hf_directory(tmp_path / "a", config, as_stored(config))
    load(path).save_pretrained(tmp_path / "b", save_original_format=original_format)
    got, want = open_checkpoint(tmp_path / "b"), open_checkpoint(path)
    assert got.spelling is (Spelling.SAVED if original_format else Spelling.TRANSFORMERS)
    assert "no MTP block" in got.notes[0]
    for section in sections(got.config):
        ours, theirs = got.section(section), want.section(section)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_transformers_loads_every_tensor_of_an_export(tmp_path: Path, weights: Any):
    config = quantised_config(**SIZES)
    path = write_hf_directory(tmp_path / "a", config, as_stored(config))
    convert(path, tmp_path / "v4jax")
    convert(tmp_path / "v4jax", tmp_path / "hf", weights=weights, to="hf", max_shard_bytes=200_000)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    state, want = load(tmp_path / "hf").state_dict(), open_checkpoint(path)
    layer = want.layer(3)
    prefix = "model.layers.3"
    pairs = {
        "lm_head.weight": want.top()["head.weight"],
        f"{prefix}.self_attn.kv_norm.weight": layer["attn.kv_norm.weight"],
        f"{prefix}.self_attn.compressor.indexer.q_b_proj.weight": layer["attn.indexer.wq_b.weight"],
        f"{prefix}.mlp.gate.e_score_correction_bias": layer["ffn.gate.bias"],
        f"{prefix}.mlp.experts.down_proj": layer["ffn.experts.w2.weight"],
        f"{prefix}.mlp.experts.gate_up_proj": np.concatenate(
            [layer["ffn.experts.w1.weight"], layer["ffn.experts.w3.weight"]], axis=1
        ),
        "model.layers.0.mlp.gate.tid2eid": want.layer(0)["ffn.gate.tid2eid"],
    }
    for name, value in pairs.items():
        np.testing.assert_array_equal(state[name].numpy(), value, err_msg=name)
