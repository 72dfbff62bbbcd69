import pytest
from random_checkpoint import plain_config, quantised_config

from v4jax.checkpoint.names import (
    Spelling,
    Storage,
    detect_spelling,
    released_tensors,
    section_file,
    section_parameters,
    sections,
    stored_tensors,
)
from v4jax.checkpoint.reader import open_checkpoint
from v4jax.config import ModelConfig


@pytest.mark.parametrize(
    ("config", "tensors", "nbytes"),
    [(ModelConfig.flash(), 69_187, 159_609_485_896), (ModelConfig.pro(), 145_116, 864_704_792_696)],
    ids=["flash", "pro"],
)
def test_the_released_inventories_have_their_published_size(config: ModelConfig, tensors: int, nbytes: int):
    table = released_tensors(config)
    assert len({tensor.name for tensor in table}) == len(table) == tensors
    assert sum(tensor.nbytes for tensor in table) == nbytes


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_the_released_configs_give_the_parameters_of_the_presets(shared, model: str):
    def parameters(config: ModelConfig) -> list:
        return [(section, section_parameters(config, section)) for section in sections(config)]

    config, preset = ModelConfig.from_hf(shared / "reference" / f"config_{model}.json"), getattr(ModelConfig, model)()
    assert parameters(config) == parameters(preset)
    assert (config.expert_storage, config.quantization_config) == (preset.expert_storage, preset.quantization_config)


def test_fp8_experts_have_float32_scales_per_tile():
    table = {tensor.name: tensor for tensor in released_tensors(quantised_config(expert_dtype="fp8"))}
    weight, scale = (table[f"layers.3.ffn.experts.3.w2.{kind}"] for kind in ("weight", "scale"))
    assert (weight.shape, weight.dtype) == ((136, 40), "F8_E4M3")
    assert (scale.shape, scale.dtype) == ((2, 1), "F32")


def test_an_unquantised_model_has_no_scales():
    table = {tensor.name: tensor for tensor in released_tensors(plain_config())}
    assert {tensor.dtype for tensor in table.values()} == {"BF16", "F32", "I64"}
    assert not [name for name in table if name.endswith(".scale")]


@pytest.mark.parametrize("golden", ["flash_like_f32", "flash_like_quantized"])
def test_the_goldens_have_exactly_the_tensors_of_the_table(shared, golden: str):
    checkpoint = open_checkpoint(shared / "goldens" / golden)
    table = {tensor.name: (tensor.shape, tensor.dtype) for tensor in released_tensors(checkpoint.config)}
    if golden == "flash_like_f32":
        table = {name: (shape, "F32" if dtype == "BF16" else dtype) for name, (shape, dtype) in table.items()}
    assert {name: (info.shape, info.dtype) for name, info in checkpoint.inventory.items()} == table


@pytest.mark.parametrize("spelling", Spelling)
def test_every_spelling_names_each_tensor_once_and_is_recognised(spelling: Spelling):
    config = quantised_config()
    places = [
        (stored.name, stored.slab, stored.rows and stored.rows.start)
        for section in sections(config)
        for parameter in section_parameters(config, section)
        for stored in stored_tensors(section, parameter, spelling)
    ]
    assert len(set(places)) == len(places)
    assert detect_spelling([name for name, _, _ in places]) is spelling


def test_names_of_another_model_are_no_spelling():
    assert detect_spelling(["model.embed_tokens.weight", "transformer.h.0.attn.weight"]) is None


def test_spellings_of_one_tensor():
    config = plain_config()

    def names(key: str) -> list[str]:
        section = ("layers", 3)
        parameter = next(p for p in section_parameters(config, section) if p.key == key)
        return [next(stored_tensors(section, parameter, spelling)).name for spelling in Spelling]

    assert names("attn.kv_norm.weight") == [
        "layers.3.attn.kv_norm.weight",
        "model.layers.3.attn.norm.weight",
        "model.layers.3.self_attn.kv_norm.weight",
        "layers.3.attn.kv_norm.weight",
    ]
    assert names("attn.indexer.compressor.ape") == [
        "layers.3.attn.indexer.compressor.ape",
        "model.layers.3.attn.indexer.compressor.ape",
        "model.layers.3.self_attn.compressor.indexer.position_bias",
        "layers.3.attn.indexer.compressor.ape",
    ]
    assert names("ffn.experts.w3.weight") == [
        "layers.3.ffn.experts.0.w3.weight",
        "model.layers.3.ffn.experts.0.w3.weight",
        "model.layers.3.mlp.experts.gate_up_proj",
        "layers.3.ffn.experts.w3.weight",
    ]


def test_sections_have_a_file_each():
    files = [section_file(section) for section in sections(plain_config())]
    assert files == ["top.safetensors", *(f"layers/0{n}.safetensors" for n in range(4)), "mtp/0.safetensors"]


def test_only_exact_parameters_are_float32_in_memory():
    parameters = [p for section in sections(plain_config()) for p in section_parameters(plain_config(), section)]
    exact = {p.key for p in parameters if p.storage.is_float32}
    assert {"attn.attn_sink", "ffn.gate.bias", "hc_attn_fn", "attn.compressor.ape", "norm.weight"} <= exact
    assert not {"attn.wq_a.weight", "embed.weight", "ffn.gate.weight", "ffn.experts.w1.weight"} & exact
    assert [p.key for p in parameters if p.storage is Storage.TABLE] == ["ffn.gate.tid2eid"] * 2
