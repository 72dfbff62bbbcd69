"""Every tensor of a V4 model: its name, shape and storage, in each spelling found on disk (architecture.md §14).

`section_parameters` is the one table. A *section* is the top of the model, a backbone layer or an MTP block; a *key* is
a parameter's official name within its section, with the experts of a layer stacked: `ffn.experts.w1.weight` [E, I, d].
`stored_tensors` says which tensors of a checkpoint hold a parameter; `released_tensors` lists the released files.
"""

import dataclasses
import enum
import math
import re
from collections.abc import Iterable, Iterator

from kernels_pallas.formats import fp4_scale_shape, fp8_scale_shape
from v4jax.checkpoint.tensor_file import DTYPES
from v4jax.config import LayerSpec, ModelConfig, RouterKind, layer_plan, mtp_plan

Section = str | tuple[str, int]
"""`"top"`, `("layers", n)` or `("mtp", n)`."""


class Storage(enum.Enum):
    """How the released checkpoints store a parameter (architecture.md §10) and what that makes it in memory."""

    DENSE = "FP8 with a scale per 128×128 tile"
    EXPERT = "FP4 with a scale per 32 inputs, or FP8"
    PLAIN = "BF16"
    NORM = "BF16, float32 in memory"
    EXACT = "F32, float32 in memory"
    TABLE = "I64, int32 in memory"

    @property
    def is_float32(self) -> bool:
        """Whether the parameter is float32 in memory, whatever the model's parameter dtype."""
        return self in (Storage.NORM, Storage.EXACT)


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of a section."""

    key: str
    shape: tuple[int, ...]
    storage: Storage


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Safetensors' name of it."""

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


# ---- the table -------------------------------------------------------------------------------------------------------
def sections(config: ModelConfig) -> list[Section]:
    """All sections, in the order of the forward pass."""
    layers = [("layers", n) for n in range(config.num_hidden_layers)]
    return ["top", *layers, *(("mtp", n) for n in range(config.num_mtp_layers))]


def section_prefix(section: Section) -> str:
    """What official names of the section begin with: `""`, `"layers.3."`, `"mtp.0."`."""
    return "" if isinstance(section, str) else f"{section[0]}.{section[1]}."


def section_parameters(config: ModelConfig, section: Section) -> list[ParameterSpec]:
    """The parameters of one section."""
    if isinstance(section, str):
        matrix = (config.vocab_size, config.hidden_size)
        return [
            ParameterSpec("embed.weight", matrix, Storage.PLAIN),
            ParameterSpec("head.weight", matrix, Storage.PLAIN),
            *_output_parameters(config),
        ]
    kind, index = section
    if kind == "layers":
        return list(_block_parameters(config, layer_plan(config)[index]))
    width = config.hidden_size
    return [
        *_block_parameters(config, mtp_plan(config)[index]),
        ParameterSpec("e_proj.weight", (width, width), Storage.DENSE),
        ParameterSpec("h_proj.weight", (width, width), Storage.DENSE),
        ParameterSpec("enorm.weight", (width,), Storage.NORM),
        ParameterSpec("hnorm.weight", (width,), Storage.NORM),
        *_output_parameters(config),
    ]


def _output_parameters(config: ModelConfig) -> Iterator[ParameterSpec]:
    streams, width = config.hc_mult, config.hidden_size
    yield ParameterSpec("norm.weight", (width,), Storage.NORM)
    yield ParameterSpec("hc_head_fn", (streams, streams * width), Storage.EXACT)
    yield ParameterSpec("hc_head_base", (streams,), Storage.EXACT)
    yield ParameterSpec("hc_head_scale", (1,), Storage.EXACT)


def _block_parameters(config: ModelConfig, spec: LayerSpec) -> Iterator[ParameterSpec]:
    width, streams = config.hidden_size, config.hc_mult
    maps = streams * (streams + 2)
    for part in ("attn", "ffn"):
        yield ParameterSpec(f"{part}_norm.weight", (width,), Storage.NORM)
        yield ParameterSpec(f"hc_{part}_fn", (maps, streams * width), Storage.EXACT)
        yield ParameterSpec(f"hc_{part}_base", (maps,), Storage.EXACT)
        yield ParameterSpec(f"hc_{part}_scale", (3,), Storage.EXACT)
    yield from _attention_parameters(config, spec)
    yield from _moe_parameters(config, spec)


def _attention_parameters(config: ModelConfig, spec: LayerSpec) -> Iterator[ParameterSpec]:
    width, head, rank = config.hidden_size, config.head_dim, config.q_lora_rank
    output = config.o_groups * config.o_lora_rank
    yield ParameterSpec("attn.attn_sink", (config.num_attention_heads,), Storage.EXACT)
    yield ParameterSpec("attn.wq_a.weight", (rank, width), Storage.DENSE)
    yield ParameterSpec("attn.q_norm.weight", (rank,), Storage.NORM)
    yield ParameterSpec("attn.wq_b.weight", (config.num_attention_heads * head, rank), Storage.DENSE)
    yield ParameterSpec("attn.wkv.weight", (head, width), Storage.DENSE)
    yield ParameterSpec("attn.kv_norm.weight", (head,), Storage.NORM)
    yield ParameterSpec("attn.wo_a.weight", (output, config.heads_per_group * head), Storage.DENSE)
    yield ParameterSpec("attn.wo_b.weight", (width, output), Storage.DENSE)
    if spec.ratio:
        yield from _compressor_parameters("attn.compressor", config, spec, head)
    if spec.has_indexer:
        heads, head = config.index_n_heads, config.index_head_dim
        yield ParameterSpec("attn.indexer.wq_b.weight", (heads * head, rank), Storage.DENSE)
        yield ParameterSpec("attn.indexer.weights_proj.weight", (heads, width), Storage.PLAIN)
        yield from _compressor_parameters("attn.indexer.compressor", config, spec, head)


def _compressor_parameters(prefix: str, config: ModelConfig, spec: LayerSpec, head: int) -> Iterator[ParameterSpec]:
    channels = 2 * head if spec.is_overlapped else head
    yield ParameterSpec(f"{prefix}.ape", (spec.ratio, channels), Storage.EXACT)
    yield ParameterSpec(f"{prefix}.wkv.weight", (channels, config.hidden_size), Storage.PLAIN)
    yield ParameterSpec(f"{prefix}.wgate.weight", (channels, config.hidden_size), Storage.PLAIN)
    yield ParameterSpec(f"{prefix}.norm.weight", (head,), Storage.NORM)


def _moe_parameters(config: ModelConfig, spec: LayerSpec) -> Iterator[ParameterSpec]:
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield ParameterSpec("ffn.gate.weight", (experts, width), Storage.PLAIN)
    if spec.router is RouterKind.HASH:
        yield ParameterSpec("ffn.gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), Storage.TABLE)
    else:
        yield ParameterSpec("ffn.gate.bias", (experts,), Storage.EXACT)
    for name, shape in (("w1", (inner, width)), ("w2", (width, inner)), ("w3", (inner, width))):
        yield ParameterSpec(f"ffn.experts.{name}.weight", (experts, *shape), Storage.EXPERT)
        yield ParameterSpec(f"ffn.shared_experts.{name}.weight", shape, Storage.DENSE)


# ---- the released files ----------------------------------------------------------------------------------------------
def released_tensors(config: ModelConfig) -> list[TensorSpec]:
    """Names, shapes and dtypes of the released files of this config; BF16 weights where it is not quantised.

    Base checkpoints (FP8 experts) have float32 expert scales (architecture.md §14.2).
    """
    return [
        tensor
        for section in sections(config)
        for parameter in section_parameters(config, section)
        for stored in stored_tensors(section, parameter, Spelling.OFFICIAL)
        for tensor in _released(config, parameter.storage, stored)
    ]


def _released(config: ModelConfig, storage: Storage, stored: "StoredTensor") -> list[TensorSpec]:
    name, shape, scale = stored.name, stored.shape, stored.scale_names[0]
    if storage is Storage.EXPERT and config.expert_storage == "fp4":
        packed = (*shape[:-1], -(-shape[-1] // 2))
        return [TensorSpec(name, packed, "I8"), TensorSpec(scale, fp4_scale_shape(shape), "F8_E8M0")]
    if storage is Storage.EXPERT and config.expert_storage == "fp8":
        return [TensorSpec(name, shape, "F8_E4M3"), TensorSpec(scale, fp8_scale_shape(shape), "F32")]
    if storage is Storage.DENSE and config.quantization_config is not None:
        return [TensorSpec(name, shape, "F8_E4M3"), TensorSpec(scale, fp8_scale_shape(shape), "F8_E8M0")]
    dtypes = {Storage.EXACT: "F32", Storage.TABLE: "I64"}
    return [TensorSpec(name, shape, dtypes.get(storage, "BF16"))]


# ---- spellings -------------------------------------------------------------------------------------------------------
class Spelling(enum.Enum):
    """Who named the tensors."""

    OFFICIAL = "official"
    SAVED = "transformers save_pretrained"
    TRANSFORMERS = "transformers in memory"
    V4JAX = "v4jax"


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint that holds a parameter, or one expert of it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor, as if it were not quantised."""
    slab: int | None = None
    """The entry of its leading axis that is meant, if not all of it."""
    rows: slice | None = None
    """The rows that are meant, if not all: transformers fuses w1 and w3."""

    @property
    def scale_names(self) -> tuple[str, ...]:
        """What its scale may be called."""
        if not self.name.endswith(".weight"):
            return (f"{self.name}_scale_inv",)
        stem = self.name.removesuffix(".weight")
        return (f"{stem}.scale", f"{stem}.weight_scale_inv")


# transformers 5.23: official stem → name in memory. What it saves has official stems, but for _SAVED.
_TRANSFORMERS = {
    "embed": "embed_tokens",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
_SAVED = {
    "attn.kv_norm": "attn.norm",
    **{stem: name for stem, name in _TRANSFORMERS.items() if stem == "embed" or stem.startswith("hc_head")},
}


def stored_tensors(section: Section, parameter: ParameterSpec, spelling: Spelling) -> Iterator[StoredTensor]:
    """The tensors that hold a parameter, experts in order: one of each expert, or one for each expert's slab."""
    key, shape = parameter.key, parameter.shape
    if parameter.storage is not Storage.EXPERT:
        yield StoredTensor(_spelled(section, key, spelling), shape)
        return
    # MTP blocks have official names everywhere: transformers neither reads nor writes them.
    if spelling is Spelling.TRANSFORMERS and section[0] == "layers":
        yield from _fused_experts(f"model.{section_prefix(section)}mlp.experts", key, shape)
        return
    for expert in range(shape[0]):
        if spelling is Spelling.V4JAX:
            yield StoredTensor(section_prefix(section) + key, shape, slab=expert)
        else:
            one = key.replace("ffn.experts.", f"ffn.experts.{expert}.")
            yield StoredTensor(_spelled(section, one, spelling), shape[1:])


def _fused_experts(prefix: str, key: str, shape: tuple[int, ...]) -> Iterator[StoredTensor]:
    experts, rows, columns = shape
    if key == "ffn.experts.w2.weight":
        yield from (StoredTensor(f"{prefix}.down_proj", shape, slab=n) for n in range(experts))
        return
    half = slice(0, rows) if key == "ffn.experts.w1.weight" else slice(rows, 2 * rows)
    fused = (experts, 2 * rows, columns)
    yield from (StoredTensor(f"{prefix}.gate_up_proj", fused, slab=n, rows=half) for n in range(experts))


def _spelled(section: Section, key: str, spelling: Spelling) -> str:
    prefix = section_prefix(section)
    if spelling in (Spelling.OFFICIAL, Spelling.V4JAX) or section[0] == "mtp":
        return prefix + key
    stem = key.removesuffix(".weight")
    if stem == "head":
        return "lm_head.weight" if spelling is Spelling.TRANSFORMERS else "head.weight"
    table = _TRANSFORMERS if spelling is Spelling.TRANSFORMERS else _SAVED
    return f"model.{prefix}{table.get(stem, stem)}{key[len(stem) :]}"


_MARKS = {
    Spelling.V4JAX: re.compile(r"layers\.\d+\.ffn\.experts\.w\d\."),
    Spelling.OFFICIAL: re.compile(r"layers\.\d+\."),
    Spelling.SAVED: re.compile(r"model\.layers\.\d+\.attn\."),
    Spelling.TRANSFORMERS: re.compile(r"model\.layers\.\d+\.self_attn\."),
}


def detect_spelling(names: Iterable[str]) -> Spelling | None:
    """The spelling of a checkpoint's tensor names, or None if they are those of no V4 model."""
    names = list(names)
    return next((spelling for spelling, mark in _MARKS.items() if any(map(mark.match, names))), None)


def section_file(section: Section) -> str:
    """Where a v4jax directory keeps a section: `top.safetensors`, `layers/03.safetensors`, `mtp/0.safetensors`."""
    if isinstance(section, str):
        return f"{section}.safetensors"
    kind, index = section
    return f"layers/{index:02d}.safetensors" if kind == "layers" else f"{kind}/{index}.safetensors"


def scale_key(key: str) -> str:
    """The official name of a weight's scale: `attn.wq_a.weight` → `attn.wq_a.scale`."""
    return f"{key.removesuffix('.weight')}.scale"


def section_name(section: Section) -> str:
    """How messages call a section."""
    return section_prefix(section).removesuffix(".") or "top"
