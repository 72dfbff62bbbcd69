"""What a DeepSeek-V4 model is: sizes and the layer schedule.

Field names are those of the released `config.json` (architecture.md §1), which `hf_config` reads and writes. The
schedule is data: `layer_plan` gives one `LayerSpec` per layer and `plan_segments` folds it into repeated units; nothing
else branches on a layer index.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4jax.errors import UserError


class ConfigError(UserError):
    """A configuration that no V4 model can have; the message names the field, the value and the remedy."""


DSPARK_STAGES = 3
"""Layers of a DSpark head, where `num_nextn_predict_layers` stays 1 (architecture.md §19.1)."""


class AttentionKind(enum.StrEnum):
    """What a query sees besides its sliding window (architecture.md §1.2, §5)."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"
    HCA = "heavily_compressed_attention"


class RouterKind(enum.StrEnum):
    """How a layer picks experts: by a table over token ids, or by biased top-k scores (architecture.md §9.1)."""

    HASH = "hash_moe"
    TOPK = "moe"


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSpec:
    """Everything about a layer that is static: fields, so that other schedules need no new code."""

    attention: AttentionKind
    router: RouterKind
    ratio: int = 0
    """Tokens per compressed entry; 0 where there are none."""

    @property
    def is_overlapped(self) -> bool:
        """CSA entries mix their own window with the previous one (architecture.md §6.1)."""
        return self.attention is AttentionKind.CSA

    @property
    def has_indexer(self) -> bool:
        """CSA queries select entries; HCA queries see them all."""
        return self.attention is AttentionKind.CSA


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentSpec:
    """`unit` repeated `repeats` times: what one `lax.scan` runs over."""

    unit: tuple[LayerSpec, ...]
    repeats: int


@dataclasses.dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN parameters of the compressed layers' rotary table (architecture.md §4)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one model. Frozen and hashable, so that it can key a jit cache.

    `layer_types`, `mlp_layer_types` and the two compression rates are canonical; the released `compress_ratios` list is
    derived from them (`compress_ratios`). Raises `ConfigError` for values that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    layer_types: tuple[AttentionKind, ...]
    mlp_layer_types: tuple[RouterKind, ...]
    mtp_layer_types: tuple[AttentionKind, ...] = (AttentionKind.SLIDING,)
    compress_rate_csa: int = 4
    compress_rate_hca: int = 128
    sliding_window: int = 128
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 1048576
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    num_nextn_predict_layers: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    expert_dtype: str | None = None
    extra: str = "{}"
    """JSON object of the `config.json` keys that do not shape the model, kept so that `to_hf` loses nothing."""

    def __post_init__(self) -> None:
        if self.num_nextn_predict_layers == 0 and len(self.mtp_layer_types) == 1 and not self.has_dspark:
            object.__setattr__(self, "mtp_layer_types", ())  # left over where the MTP block was taken out
        _validate(self)

    # ---- derived --------------------------------------------------------------------------------------------------
    @property
    def extra_fields(self) -> dict[str, Any]:
        """`extra`, parsed."""
        return json.loads(self.extra)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """The released `quantization_config`, or None for an unquantised checkpoint."""
        return self.extra_fields.get("quantization_config")

    @property
    def expert_storage(self) -> str | None:
        """How a released checkpoint of this config stores experts: "fp4", "fp8", or None where nothing is quantised.

        The first upload of Flash had no `expert_dtype` and FP4 experts; transformers moves the key into
        `quantization_config` (architecture.md §13).
        """
        quantization = self.quantization_config
        if quantization is None:
            return self.expert_dtype
        return self.expert_dtype or quantization.get("expert_dtype", "fp4")

    @property
    def has_dspark(self) -> bool:
        """Whether the checkpoint carries the DSpark speculative head in place of MTP (architecture.md §19.1)."""
        return any(key.startswith("dspark") for key in self.extra_fields) or (
            self.num_nextn_predict_layers == 1 and len(self.mtp_layer_types) == DSPARK_STAGES
        )

    @property
    def num_mtp_layers(self) -> int:
        """MTP blocks that this package runs: none for a DSpark head, which is reported and not used."""
        return 0 if self.has_dspark else self.num_nextn_predict_layers

    @property
    def num_hash_layers(self) -> int:
        """How many layers route by token id."""
        return sum(kind is RouterKind.HASH for kind in self.mlp_layer_types)

    @property
    def nope_head_dim(self) -> int:
        """Channels of a head that are not rotated; they come first."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def heads_per_group(self) -> int:
        """Query heads per group of the output projection."""
        return self.num_attention_heads // self.o_groups

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids as a tuple, possibly empty."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """One ratio per layer, then one per MTP block, as the released configs list them."""
        return tuple(self.ratio_of(kind) for kind in self.layer_types + self.mtp_layer_types)

    def ratio_of(self, kind: AttentionKind) -> int:
        """Tokens per compressed entry of a layer of this kind."""
        rates = {AttentionKind.CSA: self.compress_rate_csa, AttentionKind.HCA: self.compress_rate_hca}
        return rates.get(kind, 0)

    def without_mtp(self) -> "ModelConfig":
        """The same backbone with no MTP block (transformers drops it when saving)."""
        return dataclasses.replace(self, num_nextn_predict_layers=0, mtp_layer_types=())

    # ---- Hugging Face ---------------------------------------------------------------------------------------------
    @classmethod
    def from_hf(cls, source: "str | Path | Mapping[str, Any]") -> "ModelConfig":
        """Reads a `config.json` (a path, its directory, or the parsed object) in either spelling.

        The released spelling has `compress_ratios`, `num_hash_layers`, `qk_rope_head_dim` and `rope_scaling`; the
        transformers ≥ 5 spelling has `layer_types`, `mlp_layer_types`, `compress_rates` and nested `rope_parameters`.
        """
        from v4jax.hf_config import read_config

        return read_config(source)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` object. In the released spelling where `compress_ratios` can express the schedule."""
        from v4jax.hf_config import write_config

        return write_config(self)

    # ---- presets --------------------------------------------------------------------------------------------------
    @classmethod
    def flash(cls) -> "ModelConfig":
        """DeepSeek-V4-Flash: 284B parameters, 13B active (architecture.md §1)."""
        csa, hca, sliding = AttentionKind.CSA, AttentionKind.HCA, AttentionKind.SLIDING
        return cls(
            **_released(hidden_size=4096, moe_intermediate_size=2048, num_attention_heads=64, q_lora_rank=1024),
            num_hidden_layers=43,
            o_groups=8,
            n_routed_experts=256,
            routed_scaling_factor=1.5,
            index_topk=512,
            layer_types=(sliding, sliding) + (csa, hca) * 20 + (csa,),
            mlp_layer_types=(RouterKind.HASH,) * 3 + (RouterKind.TOPK,) * 40,
        )

    @classmethod
    def pro(cls) -> "ModelConfig":
        """DeepSeek-V4-Pro: 1.6T parameters, 49B active (architecture.md §1)."""
        csa, hca = AttentionKind.CSA, AttentionKind.HCA
        return cls(
            **_released(hidden_size=7168, moe_intermediate_size=3072, num_attention_heads=128, q_lora_rank=1536),
            num_hidden_layers=61,
            o_groups=16,
            n_routed_experts=384,
            routed_scaling_factor=2.5,
            index_topk=1024,
            layer_types=(hca, hca) + (csa, hca) * 29 + (csa,),
            mlp_layer_types=(RouterKind.HASH,) * 3 + (RouterKind.TOPK,) * 58,
        )

    @classmethod
    def tiny(cls, **changes: Any) -> "ModelConfig":
        """Every mechanism at small widths: 3 hash layers, both compressed kinds, YaRN, MTP; 7 layers."""
        csa, hca, sliding = AttentionKind.CSA, AttentionKind.HCA, AttentionKind.SLIDING
        base = cls(
            vocab_size=2048,
            hidden_size=128,
            moe_intermediate_size=128,
            num_hidden_layers=7,
            num_attention_heads=4,
            head_dim=128,
            qk_rope_head_dim=64,
            q_lora_rank=128,
            o_groups=2,
            o_lora_rank=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            routed_scaling_factor=1.5,
            swiglu_limit=10.0,
            index_n_heads=16,
            index_head_dim=128,
            index_topk=16,
            layer_types=(sliding, sliding, csa, hca, csa, hca, csa),
            mlp_layer_types=(RouterKind.HASH,) * 3 + (RouterKind.TOPK,) * 4,
            sliding_window=64,
            compress_rate_hca=128,
            rope_scaling=RopeScaling(factor=16, original_max_position_embeddings=65536),
            max_position_embeddings=4096,
        )
        return dataclasses.replace(base, **changes)

    @classmethod
    def bench(cls) -> "ModelConfig":
        """The 137M-parameter model of `v4jax bench model`: large enough that matrix products dominate on a CPU."""
        csa, hca, sliding = AttentionKind.CSA, AttentionKind.HCA, AttentionKind.SLIDING
        return cls(
            vocab_size=8192,
            hidden_size=512,
            moe_intermediate_size=256,
            num_hidden_layers=9,
            num_attention_heads=8,
            head_dim=128,
            qk_rope_head_dim=64,
            q_lora_rank=256,
            o_groups=4,
            o_lora_rank=128,
            n_routed_experts=32,
            num_experts_per_tok=4,
            routed_scaling_factor=1.5,
            swiglu_limit=10.0,
            index_n_heads=16,
            index_head_dim=64,
            index_topk=64,
            layer_types=(sliding, sliding) + (csa, hca) * 3 + (csa,),
            mlp_layer_types=(RouterKind.HASH,) * 3 + (RouterKind.TOPK,) * 6,
            rope_scaling=RopeScaling(factor=16, original_max_position_embeddings=65536),
        )


def layer_plan(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per backbone layer."""
    return tuple(
        LayerSpec(kind, router, config.ratio_of(kind))
        for kind, router in zip(config.layer_types, config.mlp_layer_types, strict=True)
    )


def mtp_plan(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per MTP block: always routed by scores (architecture.md §11)."""
    kinds = config.mtp_layer_types[: config.num_mtp_layers]
    return tuple(LayerSpec(kind, RouterKind.TOPK, config.ratio_of(kind)) for kind in kinds)


def plan_segments(plan: tuple[LayerSpec, ...], max_unit: int = 4) -> tuple[SegmentSpec, ...]:
    """Folds a plan into repeated units: at each point the unit that covers most layers, the shortest on a tie.

    A unit of several layers must repeat, so an irregular schedule simply yields more segments.
    """
    segments: list[SegmentSpec] = []
    start = 0
    while start < len(plan):
        best = SegmentSpec(plan[start : start + 1], 1)
        for width in range(1, min(max_unit, len(plan) - start) + 1):
            unit = plan[start : start + width]
            repeats = 1
            while plan[start + repeats * width : start + (repeats + 1) * width] == unit:
                repeats += 1
            if (repeats > 1 or width == 1) and width * repeats > len(best.unit) * best.repeats:
                best = SegmentSpec(unit, repeats)
        segments.append(best)
        start += len(best.unit) * best.repeats
    return tuple(segments)


# ---- what the presets share ------------------------------------------------------------------------------------------
def _released(**sizes: int) -> dict[str, Any]:
    """Fields that Flash and Pro share."""
    common: dict[str, Any] = dict(
        vocab_size=129280,
        head_dim=512,
        qk_rope_head_dim=64,
        o_lora_rank=1024,
        num_experts_per_tok=6,
        swiglu_limit=10.0,
        index_n_heads=64,
        index_head_dim=128,
        rope_scaling=RopeScaling(factor=16, original_max_position_embeddings=65536),
        expert_dtype="fp4",
        extra=json.dumps({"quantization_config": RELEASED_QUANTIZATION, "torch_dtype": "bfloat16"}, sort_keys=True),
    )
    return common | sizes


RELEASED_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}

# ---- validation ------------------------------------------------------------------------------------------------------
_OPTIONAL = {"bos_token_id", "eos_token_id", "expert_dtype"}


def _validate(config: ModelConfig) -> None:
    may_be_zero = {"num_nextn_predict_layers", "swiglu_limit"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_number = isinstance(value, (int, float)) and field.name not in _OPTIONAL
        if is_number and not (0 < value < float("inf") or (value == 0 and field.name in may_be_zero)):
            raise ConfigError(f"{field.name}: got {value}, need a positive number")
    for name, length in (("layer_types", config.layer_types), ("mlp_layer_types", config.mlp_layer_types)):
        if len(length) != config.num_hidden_layers:
            raise ConfigError(
                f"{name} has {len(length)} entries, num_hidden_layers is {config.num_hidden_layers}; give one per layer"
            )
    blocks = len(config.mtp_layer_types)
    if blocks != config.num_nextn_predict_layers and not (config.has_dspark and blocks == DSPARK_STAGES):
        raise ConfigError(
            f"mtp_layer_types has {blocks} entries, num_nextn_predict_layers is "
            f"{config.num_nextn_predict_layers}; give one per MTP block"
        )
    if config.qk_rope_head_dim > min(config.head_dim, config.index_head_dim) or config.qk_rope_head_dim % 2:
        raise ConfigError(
            f"qk_rope_head_dim: got {config.qk_rope_head_dim}, need an even number that is at most head_dim "
            f"({config.head_dim}) and index_head_dim ({config.index_head_dim})"
        )
    if config.num_attention_heads % config.o_groups:
        raise ConfigError(
            f"o_groups: got {config.o_groups}, need a divisor of num_attention_heads ({config.num_attention_heads})"
        )
    if config.num_experts_per_tok > config.n_routed_experts:
        raise ConfigError(
            f"num_experts_per_tok: got {config.num_experts_per_tok}, need at most n_routed_experts "
            f"({config.n_routed_experts})"
        )
    if config.expert_dtype not in (None, "fp4", "fp8"):
        raise ConfigError(f"expert_dtype: got {config.expert_dtype!r}, need 'fp4' or 'fp8'")
