"""`ModelConfig`: both spellings, every released file, every refusal, and the folding of schedules."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.config import (
    AttentionKind,
    ConfigError,
    LayerSpec,
    ModelConfig,
    RopeScaling,
    RouterKind,
    SegmentSpec,
    layer_plan,
    mtp_plan,
    plan_segments,
)

SLIDING, CSA, HCA = AttentionKind.SLIDING, AttentionKind.CSA, AttentionKind.HCA
HASH, TOPK = RouterKind.HASH, RouterKind.TOPK
YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}


def released(**changes):
    """A small config.json in the released spelling; a change to `...` removes the key."""
    data = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 64,
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_hash_layers": 2,
        "swiglu_limit": 10.0,
        "index_n_heads": 16,
        "index_head_dim": 8,
        "index_topk": 4,
        "compress_ratios": [0, 4, 128, 4, 0],
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": YARN,
        "num_nextn_predict_layers": 1,
    }
    return _changed(data, changes)


def transformers_spelling(**changes):
    """The same model as transformers 5 writes it."""
    data = released()
    for key in ("num_hash_layers", "compress_ratios", "rope_scaling", "qk_rope_head_dim"):
        del data[key]
    data |= {
        "layer_types": [SLIDING.value, CSA.value, HCA.value, CSA.value],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "compress_rates": {CSA.value: 4, HCA.value: 128},
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25},
            "compress": YARN
            | {"rope_type": "yarn", "rope_theta": 160000, "partial_rotary_factor": 0.25, "attention_factor": 1.0},
        },
    }
    return _changed(data, changes)


def _changed(data, changes):
    data = data | changes
    return {key: value for key, value in data.items() if value is not ...}


def architecture(config):
    """A config without what the two spellings record differently: keys that do not shape the model."""
    return dataclasses.replace(config, extra="{}", expert_dtype=None)


# ---- the released files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "preset"), [("config_flash", ModelConfig.flash), ("config_pro", ModelConfig.pro)], ids=["flash", "pro"]
)
def test_released_config_equals_its_preset_and_is_written_back_unchanged(shared, name, preset):
    path = shared / "reference" / f"{name}.json"
    config = ModelConfig.from_hf(path)
    assert architecture(config) == architecture(preset())
    assert config.expert_storage == "fp4"
    assert config.to_hf() == json.loads(path.read_text())


@pytest.mark.parametrize("name", ["flash_like_f32", "flash_like_quantized"])
def test_golden_config_is_read_from_its_directory_and_written_back_unchanged(shared, name):
    directory = shared / "goldens" / name
    config = ModelConfig.from_hf(directory)
    assert config.to_hf() == json.loads((directory / "config.json").read_text())
    assert config.expert_storage == ("fp4" if "quantized" in name else None)


@pytest.mark.parametrize("preset", [ModelConfig.flash, ModelConfig.pro, ModelConfig.tiny, ModelConfig.bench])
def test_presets_survive_the_round_trip(preset):
    config = preset()
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert architecture(again) == architecture(config)
    assert again.expert_storage == config.expert_storage


def test_flash_and_pro_fold_into_the_published_segments():
    unit = (LayerSpec(HCA, TOPK, 128), LayerSpec(CSA, TOPK, 4))
    hashed = SegmentSpec((LayerSpec(CSA, HASH, 4),), 1)
    flash, pro = (plan_segments(layer_plan(config)) for config in (ModelConfig.flash(), ModelConfig.pro()))
    assert flash == (SegmentSpec((LayerSpec(SLIDING, HASH),), 2), hashed, SegmentSpec(unit, 20))
    assert pro == (SegmentSpec((LayerSpec(HCA, HASH, 128),), 2), hashed, SegmentSpec(unit, 29))


def test_the_last_released_ratio_belongs_to_the_mtp_block():
    config = ModelConfig.flash()
    assert len(config.compress_ratios) == 44
    assert [list(config.layer_types).count(kind) for kind in (SLIDING, CSA, HCA)] == [2, 21, 20]
    assert mtp_plan(config) == (LayerSpec(SLIDING, TOPK),)


@pytest.mark.parametrize("preset", [ModelConfig.flash, ModelConfig.pro], ids=["0731", "0813"])
def test_dspark_refresh_keeps_the_backbone_and_runs_no_mtp_block(preset):
    data = preset().to_hf()
    data["compress_ratios"] = [*data["compress_ratios"][:-1], 0, 0, 0]
    keys = {"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_markov_rank": 256}
    config = ModelConfig.from_hf(data | keys)
    assert config.has_dspark
    assert config.num_mtp_layers == 0
    assert mtp_plan(config) == ()
    assert layer_plan(config) == layer_plan(preset())
    assert config.to_hf() == data | keys


# ---- spellings -------------------------------------------------------------------------------------------------------
def test_both_spellings_are_one_architecture():
    assert architecture(ModelConfig.from_hf(transformers_spelling())) == architecture(ModelConfig.from_hf(released()))


@pytest.mark.parity
@pytest.mark.parametrize("preset", [ModelConfig.flash, ModelConfig.pro, ModelConfig.tiny])
def test_what_transformers_writes_is_read_back(preset, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**preset().to_hf())
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(tmp_path)
    assert architecture(config) == architecture(preset())
    assert config.expert_storage == preset().expert_storage


@pytest.mark.parity
def test_transformers_reads_what_we_write_with_other_rates():
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.tiny(compress_rate_csa=8, compress_rate_hca=32, mlp_layer_types=(TOPK, HASH) * 3 + (TOPK,))
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    assert theirs.layer_types == [str(kind) for kind in config.layer_types]
    assert theirs.mlp_layer_types == [str(kind) for kind in config.mlp_layer_types]
    assert theirs.compress_rates == {CSA.value: 8, HCA.value: 32}
    assert round(theirs.head_dim * theirs.partial_rotary_factor) == config.qk_rope_head_dim
    assert theirs.rope_parameters["compress"]["rope_type"] == "yarn"


def test_other_ratios_come_from_compress_rates_and_survive_the_round_trip():
    config = ModelConfig.from_hf(transformers_spelling(compress_rates={CSA.value: 8, HCA.value: 32}))
    assert [spec.ratio for spec in layer_plan(config)] == [0, 8, 32, 8]
    assert config.compress_ratios == (0, 8, 32, 8, 0)
    assert "compress_ratios" not in config.to_hf()
    assert architecture(ModelConfig.from_hf(config.to_hf())) == architecture(config)


def test_hash_layers_that_are_not_the_first_ones_survive_the_round_trip():
    config = ModelConfig.from_hf(transformers_spelling(mlp_layer_types=["moe", "hash_moe", "moe", "hash_moe"]))
    assert config.num_hash_layers == 2
    assert architecture(ModelConfig.from_hf(config.to_hf())) == architecture(config)


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, ...], ids=["null", "default", "absent"])
def test_without_yarn_there_is_no_scaling_in_either_spelling(scaling):
    config = ModelConfig.from_hf(released(rope_scaling=scaling))
    assert config.rope_scaling is None
    assert architecture(ModelConfig.from_hf(config.to_hf())) == architecture(config)
    other = dataclasses.replace(config, compress_rate_csa=2)
    assert ModelConfig.from_hf(other.to_hf()).rope_scaling is None


def test_rope_theta_of_each_table_is_found_in_both_spellings():
    flat = ModelConfig.from_hf(released(rope_theta=5000, compress_rope_theta=70000))
    nested = transformers_spelling(rope_theta=1, compress_rope_theta=1)
    nested["rope_parameters"]["main"] |= {"rope_theta": 5000}
    nested["rope_parameters"]["compress"] |= {"rope_theta": 70000}
    for config in (flat, ModelConfig.from_hf(nested)):
        assert (config.rope_theta, config.compress_rope_theta) == (5000.0, 70000.0)


def test_rotary_width_is_rounded_from_the_partial_factor():
    config = ModelConfig.from_hf(
        transformers_spelling(head_dim=44, index_head_dim=44, partial_rotary_factor=30 / 44, num_attention_heads=4)
    )
    assert config.qk_rope_head_dim == 30


def test_unknown_keys_are_kept_and_several_end_tokens_too():
    data = released(eos_token_id=[1, 7], vision_tower={"depth": 32})
    config = ModelConfig.from_hf(data)
    assert config.eos_token_ids == (1, 7)
    assert config.to_hf()["eos_token_id"] == [1, 7]
    assert config.to_hf()["vision_tower"] == {"depth": 32}


@pytest.mark.parametrize(
    ("root", "nested", "want"),
    [("fp4", None, "fp4"), ("fp8", None, "fp8"), (None, "fp8", "fp8"), (None, None, "fp4")],
    ids=["fp4", "fp8", "moved by transformers", "first upload of Flash"],
)
def test_expert_storage_is_found_wherever_it_is_written(root, nested, want):
    quantization = {"quant_method": "fp8"} | ({"expert_dtype": nested} if nested else {})
    data = released(quantization_config=quantization) | ({"expert_dtype": root} if root else {})
    assert ModelConfig.from_hf(data).expert_storage == want


def test_configs_key_a_cache():
    assert hash(ModelConfig.tiny()) == hash(ModelConfig.tiny())
    assert ModelConfig.tiny() != ModelConfig.tiny(num_attention_heads=2)


def test_a_kind_left_over_where_the_mtp_block_was_taken_out_is_none():
    taken_out = ModelConfig.tiny(num_nextn_predict_layers=0)
    assert taken_out == ModelConfig.tiny().without_mtp()
    assert not taken_out.has_dspark
    for data in (taken_out.to_hf(), ModelConfig.tiny().to_hf() | {"num_nextn_predict_layers": 0}):
        assert architecture(ModelConfig.from_hf(data)) == architecture(taken_out)


def test_without_mtp_drops_the_block_and_its_ratio():
    config = ModelConfig.tiny().without_mtp()
    assert mtp_plan(config) == ()
    assert architecture(ModelConfig.from_hf(config.to_hf())) == architecture(config)


# ---- refusals --------------------------------------------------------------------------------------------------------
REFUSED = {
    "ratio list too short": (released(compress_ratios=[0, 4, 128, 4]), "compress_ratios has 4 entries.*is 5"),
    "ratio list too long": (released(compress_ratios=[0] * 6), "compress_ratios has 6 entries.*is 5"),
    "unknown ratio": (released(compress_ratios=[0, 4, 64, 4, 0]), "unknown ratio 64; need 0, 4 or 128"),
    "ratios not a list": (released(compress_ratios=4), "compress_ratios: got 4, need a list"),
    "no schedule": (released(compress_ratios=...), "neither compress_ratios nor layer_types"),
    "no routers": (released(num_hash_layers=...), "neither num_hash_layers nor mlp_layer_types"),
    "scoring function": (released(scoring_func="sigmoid"), "scoring_func: got 'sigmoid', need 'sqrtsoftplus'"),
    "top-k method": (released(topk_method="greedy"), "topk_method: got 'greedy'"),
    "unnormalised weights": (released(norm_topk_prob=False), "norm_topk_prob: got False"),
    "model type": (released(model_type="deepseek_v41"), "model_type: got 'deepseek_v41'"),
    "several KV heads": (released(num_key_value_heads=4), "num_key_value_heads: got 4"),
    "tied embeddings": (released(tie_word_embeddings=True), "tie_word_embeddings: got True"),
    "activation": (released(hidden_act="gelu"), "hidden_act: got 'gelu'"),
    "rope type": (released(rope_scaling=YARN | {"type": "longrope"}), "unknown rope type 'longrope'; need default or"),
    "rope scaling not an object": (released(rope_scaling="yarn"), "rope_scaling: got 'yarn', need an object"),
    "yarn without factor": (released(rope_scaling={"type": "yarn"}), "yarn lacks factor, original_max_position"),
    "yarn factor a string": (released(rope_scaling=YARN | {"factor": "16"}), "factor: got '16', need a number"),
    "m-scale": (released(rope_scaling=YARN | {"mscale": 1.0}), "mscale"),
    "attention factor": (released(rope_scaling=YARN | {"attention_factor": 1.2}), "attention_factor"),
    "untruncated yarn": (released(rope_scaling=YARN | {"truncate": False}), "truncate: got false"),
    "missing size": (released(q_lora_rank=..., o_groups=...), "lacks q_lora_rank, o_groups"),
    "size a string": (released(hidden_size="16"), "hidden_size: got '16', need an integer"),
    "size a boolean": (released(hidden_size=True), "hidden_size: got True, need an integer"),
    "size zero": (released(head_dim=0), "head_dim: got 0, need a positive number"),
    "size negative": (released(index_topk=-1), "index_topk: got -1, need a positive number"),
    "limit not finite": (released(swiglu_limit=float("nan")), "swiglu_limit: got nan, need a finite number"),
    "odd rotary width": (released(qk_rope_head_dim=3), "qk_rope_head_dim: got 3, need an even number"),
    "rotary width above the head": (released(qk_rope_head_dim=18), "qk_rope_head_dim: got 18"),
    "no rotary width": (released(qk_rope_head_dim=...), "neither qk_rope_head_dim nor partial_rotary_factor"),
    "rotary share not finite": (
        transformers_spelling(partial_rotary_factor=float("nan")),
        "partial_rotary_factor: got nan, need a share",
    ),
    "theta a string": (released(rope_theta="1e4"), "rope_theta: got '1e4', need a number"),
    "theta not finite": (released(rope_theta=float("nan")), "^rope_theta: got nan, need a number above 1"),
    "theta one": (released(compress_rope_theta=1), "compress_rope_theta: got 1, need a number above 1"),
    "yarn factor zero": (released(rope_scaling=YARN | {"factor": 0}), "rope_scaling.factor: got 0, need a number"),
    "yarn factor null": (released(rope_scaling=YARN | {"factor": None}), "yarn lacks factor"),
    "yarn beta zero": (released(rope_scaling=YARN | {"beta_fast": 0}), "rope_scaling.beta_fast: got 0"),
    "yarn length zero": (
        released(rope_scaling=YARN | {"original_max_position_embeddings": 0}),
        "original_max_position_embeddings: got 0",
    ),
    "ratio a list": (released(compress_ratios=[[0], 4, 128, 4, 0]), r"unknown ratio \[0\]; need 0, 4 or 128"),
    "ratio an object": (
        released(layer_types=[SLIDING.value, CSA.value, HCA.value, CSA.value], compress_ratios=[{}, 4, 128, 4, 0]),
        "contradict each other",
    ),
    "end token a string": (released(eos_token_id="</s>"), "eos_token_id: got '</s>', need an integer, a list of them"),
    "end token an object": (released(eos_token_id={}), "eos_token_id: got {}"),
    "start tokens in a list": (released(bos_token_id=[0]), r"bos_token_id: got \[0\], need an integer or null"),
    "two scalings": (
        released(rope_parameters={"main": {}, "compress": {"rope_type": "default", "rope_theta": 160000.0}}),
        "rope_scaling and rope_parameters.compress contradict each other; remove all but one",
    ),
    "hash layers negative": (released(num_hash_layers=-1), "num_hash_layers: got -1, need 0 or more"),
    "MTP blocks negative": (released(num_nextn_predict_layers=-1), "num_nextn_predict_layers: got -1, need a positive"),
    "hash layers null": (released(num_hash_layers=None), "neither num_hash_layers nor mlp_layer_types"),
    "groups": (released(o_groups=3), "o_groups: got 3, need a divisor of num_attention_heads \\(4\\)"),
    "more picks than experts": (released(num_experts_per_tok=5), "num_experts_per_tok: got 5, need at most"),
    "expert dtype": (released(expert_dtype="int4"), "expert_dtype: got 'int4', need 'fp4' or 'fp8'"),
    "layer types too short": (transformers_spelling(layer_types=[CSA.value]), "layer_types has 1 entries"),
    "layer type": (transformers_spelling(layer_types=["full_attention"] * 4), "unknown 'full_attention'"),
    "router type": (transformers_spelling(mlp_layer_types=["dense"] * 4), "mlp_layer_types: unknown 'dense'"),
    "router types too short": (transformers_spelling(mlp_layer_types=["moe"]), "mlp_layer_types has 1 entries"),
    "rate a string": (transformers_spelling(compress_rates={CSA.value: "4"}), "got '4', need an integer"),
    "rate zero": (transformers_spelling(compress_rates={HCA.value: 0}), "compress_rate_hca: got 0"),
    "contradiction": (transformers_spelling(compress_ratios=[0, 0, 128, 4, 0]), "contradict each other"),
    "one MTP block, two kinds": (
        transformers_spelling(mtp_layer_types=[SLIDING.value] * 2),
        "mtp_layer_types has 2 entries, num_nextn_predict_layers is 1",
    ),
    "two MTP blocks, one kind": (
        transformers_spelling(num_nextn_predict_layers=2, mtp_layer_types=[SLIDING.value]),
        "mtp_layer_types has 1 entries, num_nextn_predict_layers is 2",
    ),
}


def test_a_null_of_the_schedule_or_the_rotary_tables_means_that_the_key_is_absent():
    nulls = ("rope_theta", "compress_rope_theta", "compress_rate_csa", "compress_rates", "mtp_layer_types")
    data = released(**dict.fromkeys(nulls), layer_types=None, rope_scaling=YARN | {"beta_fast": None})
    assert architecture(ModelConfig.from_hf(data)) == architecture(ModelConfig.from_hf(released()))


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(data, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(data)


def test_refuses_a_file_of_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x90")
    with pytest.raises(ConfigError, match=rf"need a model directory or a config.json; give {tmp_path}$"):
        ModelConfig.from_hf(tmp_path / "model.safetensors")


def test_refuses_a_directory_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"no config.json at .*give a model directory"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list")])
def test_refuses_a_broken_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(tmp_path)


# ---- segments --------------------------------------------------------------------------------------------------------
SPECS = st.sampled_from([LayerSpec(SLIDING, HASH), LayerSpec(CSA, TOPK, 4), LayerSpec(HCA, TOPK, 128)])
PLANS = st.one_of(
    st.lists(SPECS, max_size=30),
    st.tuples(st.lists(SPECS, max_size=3), st.lists(SPECS, min_size=1, max_size=5), st.integers(1, 8)).map(
        lambda parts: parts[0] + parts[1] * parts[2]
    ),
).map(tuple)


@given(plan=PLANS, max_unit=st.integers(1, 5))
def test_segments_concatenate_to_the_plan(plan, max_unit):
    segments = plan_segments(plan, max_unit)
    assert sum((segment.unit * segment.repeats for segment in segments), ()) == plan
    assert all(len(segment.unit) <= max_unit for segment in segments)


@given(unit=st.lists(SPECS, min_size=1, max_size=4).map(tuple), repeats=st.integers(2, 40))
def test_a_periodic_plan_is_one_segment(unit, repeats):
    (segment,) = plan_segments(unit * repeats)
    assert segment.unit * segment.repeats == unit * repeats
    assert segment.repeats >= repeats


def test_rope_scaling_defaults_are_the_released_betas():
    scaling = RopeScaling(factor=16, original_max_position_embeddings=65536)
    assert (scaling.beta_fast, scaling.beta_slow) == (32.0, 1.0)
