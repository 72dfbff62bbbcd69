"""All tensors of the released Flash and Pro, written down here anew from architecture.md §14.2 and §14.3: through
`names.py` into v4jax's keys and every other spelling, and back. `python released_names.py flash` checks one model.
"""

import dataclasses
import gc
import math
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from v4jax.checkpoint.inventory import check_inventory
from v4jax.checkpoint.names import (
    Spelling,
    detect_spelling,
    released_tensors,
    section_parameters,
    section_prefix,
    sections,
    stored_tensors,
)
from v4jax.checkpoint.tensor_file import DTYPES, CheckpointError, TensorInfo
from v4jax.config import ModelConfig

Table = dict[str, tuple[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Release:
    d: int
    q: int
    H: int
    g: int
    E: int
    I: int
    ratios: tuple[int, ...]
    tensors: int
    nbytes: int


RELEASES = {
    "flash": Release(4096, 1024, 64, 8, 256, 2048, (0, 0, *(4, 128) * 20, 4), 69_187, 159_609_485_896),
    "pro": Release(7168, 1536, 128, 16, 384, 3072, (128, 128, *(4, 128) * 29, 4), 145_116, 864_704_792_696),
}


def config_of(model: str) -> ModelConfig:
    return {"flash": ModelConfig.flash, "pro": ModelConfig.pro}[model]()


# ---- the published table --------------------------------------------------------------------------------------------
def fp8(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.scale", "F8_E8M0", (rows // 128, columns // 128)


def fp4(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield f"{name}.weight", "I8", (rows, columns // 2)
    yield f"{name}.scale", "F8_E8M0", (rows, columns // 32)


def published_block(r: Release, ratio: int, is_hashed: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for part in ("attn", "ffn"):
        yield f"{part}_norm.weight", "BF16", (r.d,)
        yield f"hc_{part}_fn", "F32", (24, 4 * r.d)
        yield f"hc_{part}_base", "F32", (24,)
        yield f"hc_{part}_scale", "F32", (3,)
    yield "attn.attn_sink", "F32", (r.H,)
    yield "attn.q_norm.weight", "BF16", (r.q,)
    yield "attn.kv_norm.weight", "BF16", (512,)
    yield from fp8("attn.wq_a", r.q, r.d)
    yield from fp8("attn.wq_b", 512 * r.H, r.q)
    yield from fp8("attn.wkv", 512, r.d)
    yield from fp8("attn.wo_a", 1024 * r.g, 4096)
    yield from fp8("attn.wo_b", r.d, 1024 * r.g)
    if ratio:
        channels = {4: 1024, 128: 512}[ratio]
        yield "attn.compressor.ape", "F32", (ratio, channels)
        yield "attn.compressor.wkv.weight", "BF16", (channels, r.d)
        yield "attn.compressor.wgate.weight", "BF16", (channels, r.d)
        yield "attn.compressor.norm.weight", "BF16", (512,)
    if ratio == 4:
        yield from fp8("attn.indexer.wq_b", 8192, r.q)
        yield "attn.indexer.weights_proj.weight", "BF16", (64, r.d)
        yield "attn.indexer.compressor.ape", "F32", (4, 256)
        yield "attn.indexer.compressor.wkv.weight", "BF16", (256, r.d)
        yield "attn.indexer.compressor.wgate.weight", "BF16", (256, r.d)
        yield "attn.indexer.compressor.norm.weight", "BF16", (128,)
    yield "ffn.gate.weight", "BF16", (r.E, r.d)
    if is_hashed:
        yield "ffn.gate.tid2eid", "I64", (129280, 6)
    else:
        yield "ffn.gate.bias", "F32", (r.E,)
    for expert in range(r.E):
        for name, rows, columns in (("w1", r.I, r.d), ("w2", r.d, r.I), ("w3", r.I, r.d)):
            yield from fp4(f"ffn.experts.{expert}.{name}", rows, columns)
    for name, rows, columns in (("w1", r.I, r.d), ("w2", r.d, r.I), ("w3", r.I, r.d)):
        yield from fp8(f"ffn.shared_experts.{name}", rows, columns)


def published_output(r: Release) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield "norm.weight", "BF16", (r.d,)
    yield "hc_head_fn", "F32", (4, 4 * r.d)
    yield "hc_head_base", "F32", (4,)
    yield "hc_head_scale", "F32", (1,)


@cache
def published(model: str) -> Table:
    r = RELEASES[model]
    rows = [("embed.weight", "BF16", (129280, r.d)), ("head.weight", "BF16", (129280, r.d)), *published_output(r)]
    for n, ratio in enumerate(r.ratios):
        rows += [(f"layers.{n}.{name}", dtype, shape) for name, dtype, shape in published_block(r, ratio, n < 3)]
    mtp = [*published_block(r, 0, False), *published_output(r)]
    mtp += [*fp8("e_proj", r.d, r.d), *fp8("h_proj", r.d, r.d)]
    mtp += [("enorm.weight", "BF16", (r.d,)), ("hnorm.weight", "BF16", (r.d,))]
    rows += [(f"mtp.0.{name}", dtype, shape) for name, dtype, shape in mtp]
    table = {name: (dtype, shape) for name, dtype, shape in rows}
    assert len(table) == len(rows)
    return table


# ---- the published renames (§14.3) ----------------------------------------------------------------------------------
RENAMES = [
    (r"\.scale$", ".weight_scale_inv"),
    (r"^embed\.weight$", "model.embed_tokens.weight"),
    (r"^head\.weight$", "lm_head.weight"),
    (r"^norm\.weight$", "model.norm.weight"),
    (r"^hc_head_(\w+)$", r"model.hc_head.hc_\1"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(\w+)$", r".\1_hc.\2"),
    (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.compressor\.", ".self_attn.compressor."),
    (r"(compressor(?:\.indexer)?)\.wkv\.", r"\1.kv_proj."),
    (r"(compressor(?:\.indexer)?)\.wgate\.", r"\1.gate_proj."),
    (r"(compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.attn\.attn_sink$", ".self_attn.sinks"),
    (r"\.attn\.wq_a\.", ".self_attn.q_a_proj."),
    (r"\.attn\.q_norm\.", ".self_attn.q_a_norm."),
    (r"\.attn\.wq_b\.", ".self_attn.q_b_proj."),
    (r"\.attn\.wkv\.", ".self_attn.kv_proj."),
    (r"\.attn\.kv_norm\.", ".self_attn.kv_norm."),
    (r"\.attn\.wo_(a|b)\.", r".self_attn.o_\1_proj."),
    (r"\.ffn\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.gate\.", ".mlp.gate."),
    (r"\.ffn\.experts\.\d+\.w[13]\.weight$", ".mlp.experts.gate_up_proj"),
    (r"\.ffn\.experts\.\d+\.w2\.weight$", ".mlp.experts.down_proj"),
    (r"\.ffn\.experts\.\d+\.w[13]\.weight_scale_inv$", ".mlp.experts.gate_up_proj_scale_inv"),
    (r"\.ffn\.experts\.\d+\.w2\.weight_scale_inv$", ".mlp.experts.down_proj_scale_inv"),
    (r"\.ffn\.shared_experts\.w1\.", ".mlp.shared_experts.gate_proj."),
    (r"\.ffn\.shared_experts\.w2\.", ".mlp.shared_experts.down_proj."),
    (r"\.ffn\.shared_experts\.w3\.", ".mlp.shared_experts.up_proj."),
]


COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in RENAMES]


def in_transformers(name: str) -> str:
    """MTP tensors, which transformers ignores, keep their names."""
    if name.startswith("mtp."):
        return name
    for pattern, replacement in COMPILED:
        name = pattern.sub(replacement, name)
    return name


# ---- through names.py -----------------------------------------------------------------------------------------------
Place = tuple[str, int, int]
"""A tensor's name in some spelling, the slab of its leading axis and the first row that is meant (0 if all)."""


@cache
def places(model: str, spelling: Spelling) -> dict[str, Place]:
    """Parameter (an expert's with its number, a scale's with its own name) → where a spelling stores it."""
    config, found = config_of(model), {}
    for section in sections(config):
        for parameter in section_parameters(config, section):
            is_stack = ".experts." in parameter.key
            for expert, stored in enumerate(stored_tensors(section, parameter, spelling)):
                key = section_prefix(section) + parameter.key
                key = f"{key}[{expert}]" if is_stack else key
                place = (stored.slab or 0, stored.rows.start if stored.rows else 0)
                found[key] = (stored.name, *place)
                scale = stored.scale_names[-1 if spelling is Spelling.TRANSFORMERS and section[0] != "mtp" else 0]
                found[f"{key} scale"] = (scale, *place)
    return found


def parameter_of(official: str) -> str:
    """A published name as `places` calls it."""
    weight = re.sub(r"\.scale$", ".weight", official)
    key = re.sub(r"\.ffn\.experts\.(\d+)\.(w\d)\.weight$", r".ffn.experts.\2.weight[\1]", weight)
    return key if weight == official else f"{key} scale"


def fake(table: Table) -> dict[str, TensorInfo]:
    """Tensors with a size and no bytes."""
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, (dtype, shape) in table.items()}
    return {
        name: TensorInfo(name, dtype, shape, Path("released"), 0, sizes[name]) for name, (dtype, shape) in table.items()
    }


def check_names_shapes_dtypes_and_bytes_are_the_published_ones(model: str):
    table = published(model)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in released_tensors(config_of(model))} == table
    assert len(table) == RELEASES[model].tensors
    assert sum(info.nbytes for info in fake(table).values()) == RELEASES[model].nbytes


def check_the_published_inventory_is_accepted_and_no_other(model: str):
    inventory, config = fake(published(model)), config_of(model)
    assert detect_spelling(inventory) is Spelling.OFFICIAL
    assert check_inventory(Path(model), config, Spelling.OFFICIAL, inventory) == []
    lost = ("layers.2.attn.indexer.wq_b.scale", "layers.42.ffn.experts.255.w2.weight", "mtp.0.hnorm.weight")
    rest = {name: info for name, info in inventory.items() if name not in lost}
    with pytest.raises(CheckpointError) as error:
        check_inventory(Path(model), config, Spelling.OFFICIAL, rest)
    lines = str(error.value).splitlines()
    assert "3 missing;" in lines[0], lines
    assert [line.split()[1].strip(",") for line in lines[1:]] == list(lost)


def check_every_published_tensor_has_one_place_in_each_spelling_and_comes_back(model: str, spelling: Spelling):
    official, other = places(model, Spelling.OFFICIAL), places(model, spelling)
    back = {place: parameter for parameter, place in other.items()}
    assert len(back) == len(other)
    for name in published(model):
        parameter = parameter_of(name)
        assert official[parameter] == (name, 0, 0)
        # To the other spelling, from it to the parameter, and on to the official name.
        assert official[back[other[parameter]]][0] == name


def check_transformers_names_are_the_published_ones(model: str):
    found, inner = places(model, Spelling.TRANSFORMERS), RELEASES[model].I
    for name in published(model):
        stored, slab, row = found[parameter_of(name)]
        assert stored == in_transformers(name), (stored, name, in_transformers(name))
        expert = re.search(r"^layers.*\.ffn\.experts\.(\d+)\.w(\d)", name)
        is_up = expert is not None and expert[2] == "3"
        assert (slab, row) == (int(expert[1]) if expert else 0, inner if is_up else 0)


def check_v4jax_names_are_the_official_ones_with_the_experts_stacked(model: str):
    for name in published(model):
        stored, slab, row = places(model, Spelling.V4JAX)[parameter_of(name)]
        expert = re.search(r"\.ffn\.experts\.(\d+)\.", name)
        stacked = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        assert (stored, slab, row) == (stacked, int(expert[1]) if expert else 0, 0)


def check_stacked_inventories_of_the_released_size_are_accepted(model: str, spelling: Spelling):
    r, table = RELEASES[model], {}
    for name, (dtype, shape) in published(model).items():
        stored, _, _ = places(model, spelling)[parameter_of(name)]
        is_stack = ".experts." in stored and ".ffn.experts.0" not in re.sub(r"experts\.\d+", "experts.0", stored)
        is_fused = "gate_up_proj" in stored and is_stack
        rows = 2 * shape[0] if is_fused else shape[0]
        table[stored] = (dtype, (r.E, rows, *shape[1:]) if is_stack else shape)
    inventory = fake(table)
    assert detect_spelling(inventory) is spelling
    assert check_inventory(Path(model), config_of(model), spelling, inventory) == []
    assert sum(info.nbytes for info in inventory.values()) == r.nbytes


def check_all(model: str) -> None:
    check_names_shapes_dtypes_and_bytes_are_the_published_ones(model)
    check_the_published_inventory_is_accepted_and_no_other(model)
    for spelling in Spelling:
        check_every_published_tensor_has_one_place_in_each_spelling_and_comes_back(model, spelling)
    check_transformers_names_are_the_published_ones(model)
    check_v4jax_names_are_the_official_ones_with_the_experts_stacked(model)
    for spelling in (Spelling.V4JAX, Spelling.TRANSFORMERS):
        check_stacked_inventories_of_the_released_size_are_accepted(model, spelling)
    print(f"{len(published(model))} tensors checked")


if __name__ == "__main__":
    gc.disable()  # millions of objects, and no cycles
    check_all(sys.argv[1])
