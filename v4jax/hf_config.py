"""The two Hugging Face spellings of a `ModelConfig`, read and written (architecture.md §1.1, §1.4).

The released spelling has `compress_ratios`, `num_hash_layers`, `qk_rope_head_dim` and `rope_scaling`; transformers ≥ 5
writes `layer_types`, `mlp_layer_types`, `compress_rates` and nested `rope_parameters`. Keys with one supported value
are checked, keys that do not shape the model are kept for writing back; nothing is ignored silently.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4jax.config import DSPARK_STAGES, AttentionKind, ConfigError, ModelConfig, RopeScaling, RouterKind

_RATIO_TO_KIND = {0: AttentionKind.SLIDING, 4: AttentionKind.CSA, 128: AttentionKind.HCA}
_CSA_FALLBACK, _HCA_FALLBACK = 4, 128

# Keys with one supported value each: what the released models have. Anything else is refused, never ignored.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_PLAIN = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "swiglu_limit",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
]
_DEFAULTED = [
    "sliding_window",
    "max_position_embeddings",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "initializer_range",
    "num_nextn_predict_layers",
    "bos_token_id",
    "eos_token_id",
    "expert_dtype",
]
_SCHEDULE = [
    "compress_ratios",
    "layer_types",
    "mlp_layer_types",
    "compress_rates",
    "compress_rate_csa",
    "compress_rate_hca",
    "num_hash_layers",
    "mtp_layer_types",
    "qk_rope_head_dim",
    "partial_rotary_factor",
    "rope_theta",
    "compress_rope_theta",
    "rope_scaling",
    "rope_parameters",
]
_FLOATS = {"routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "initializer_range"}
_LARGEST = {"n_routed_experts": 1 << 16, "num_nextn_predict_layers": 1 << 10}
"""Far above any model: every one of them costs memory before the files are looked at."""
_LARGEST_ROPE = 1e12
"""Of the numbers that make the rotary tables, and the inverse of the least: float32 has room for what is between."""
_MAY_BE_NULL = {"bos_token_id", "eos_token_id", "expert_dtype"}


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_config(source: "str | Path | Mapping[str, Any]") -> ModelConfig:
    """The config of a `config.json`: a path, its directory, or the parsed object, in either spelling.

    Raises:
        ConfigError: no such file, no JSON object, a missing or mistyped key, or a value that no V4 model has.
    """
    data = _without_nulls(_load_json(source))
    _check_json_types(data)
    for key, value in _FIXED.items():
        if key in data and data[key] != value:
            raise ConfigError(f"{key}: got {data[key]!r}, need {value!r}; no released V4 model has another value")
    missing = [key for key in _PLAIN if key not in data]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; V4's sizes have no safe default")
    fields: dict[str, Any] = {key: data[key] for key in _PLAIN}
    fields |= {key: data[key] for key in _DEFAULTED if key in data}
    _check_types(fields)
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    fields |= _read_schedule(data, fields)
    fields |= _read_rope(data, fields)
    known = {*_PLAIN, *_DEFAULTED, *_SCHEDULE}
    fields["extra"] = json.dumps({k: v for k, v in data.items() if k not in known}, sort_keys=True)
    return ModelConfig(**fields)


def _load_json(source: "str | Path | Mapping[str, Any]") -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"no config.json at {path}; give a model directory or a config.json")
    if path.suffix == ".safetensors":
        raise ConfigError(f"{path}: is a file of weights, need a model directory or a config.json; give {path.parent}")
    try:
        return _parse(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the permissions") from None


def _parse(text: bytes, place: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1] if len(set(keys)) < len(keys) else []
        if twice:
            raise ConfigError(f"{place}: has {twice[0]!r} twice; remove one")
        return dict(pairs)

    try:
        data = json.loads(text.decode(), object_pairs_hook=unique)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not valid JSON ({error}); download the file again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: expected a JSON object, found {type(data).__name__}")
    return data


def _without_nulls(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys of the schedule and the rotary tables that are null, nested ones too: null means absent."""
    return {
        key: _without_nulls(value) if key in _NESTED and isinstance(value, Mapping) else value
        for key, value in data.items()
        if value is not None or key not in _SCHEDULE_KEYS
    }


_NESTED = {"rope_scaling", "rope_parameters", "compress_rates", "main", "compress"}
_JSON_TYPES: tuple[tuple[str, Any, str], ...] = (
    ("rope_scaling rope_parameters compress_rates quantization_config main compress", Mapping, "an object"),
    ("compress_ratios layer_types mlp_layer_types mtp_layer_types", (list, tuple), "a list"),
    ("rope_theta compress_rope_theta partial_rotary_factor factor beta_fast beta_slow", (int, float), "a number"),
    ("num_hash_layers qk_rope_head_dim compress_rate_csa compress_rate_hca", int, "an integer"),
    ("compressed_sparse_attention heavily_compressed_attention", int, "an integer"),
    ("original_max_position_embeddings", int, "an integer"),
)
_SCHEDULE_KEYS = {key for keys, *_ in _JSON_TYPES for key in keys.split()} - {"quantization_config"}


def _check_json_types(data: Mapping[str, Any]) -> None:
    """Of the schedule and the rotary tables, nested objects included; `_check_types` has the plain fields."""
    for keys, kinds, name in _JSON_TYPES:
        for key in keys.split():
            value = data.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise ConfigError(f"{key}: got {value!r}, need {name}")
            if isinstance(value, Mapping):
                _check_json_types(value)


def _check_types(fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if key in _MAY_BE_NULL:
            _check_token_ids(key, value)
            continue
        kinds = (int, float) if key in _FLOATS else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ConfigError(f"{key}: got {value!r}, need {'a number' if key in _FLOATS else 'an integer'}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}: got {value!r}, need a finite number")
        if value < 0:
            raise ConfigError(f"{key}: got {value}, need a positive number, or 0 where that is allowed")
        if value > _LARGEST.get(key, value):
            raise ConfigError(f"{key}: got {value}, need at most {_LARGEST[key]}")


def _check_token_ids(key: str, value: Any) -> None:
    """One id or none, or several that end a text; `expert_dtype` is checked with the config."""
    ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
    if key != "expert_dtype" and any(type(one) is not int for one in ids if value is not None):
        need = "an integer, a list of them" if key == "eos_token_id" else "an integer"
        raise ConfigError(f"{key}: got {value!r}, need {need} or null")


def _read_schedule(data: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    layers = fields["num_hidden_layers"]
    rates = dict(data.get("compress_rates") or {})
    csa = rates.get(str(AttentionKind.CSA), data.get("compress_rate_csa", _CSA_FALLBACK))
    hca = rates.get(str(AttentionKind.HCA), data.get("compress_rate_hca", _HCA_FALLBACK))
    if data.get("layer_types") is not None:
        kinds = _kinds("layer_types", data["layer_types"], AttentionKind)
        if len(kinds) != layers:
            raise ConfigError(
                f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}; give one per layer"
            )
        default = (AttentionKind.SLIDING,) * int(fields.get("num_nextn_predict_layers", 1))
        mtp = (
            _kinds("mtp_layer_types", data["mtp_layer_types"], AttentionKind) if "mtp_layer_types" in data else default
        )
        if data.get("compress_ratios") is not None:
            mtp = _mtp_from_ratios(
                data["compress_ratios"],
                kinds,
                {0: AttentionKind.SLIDING, csa: AttentionKind.CSA, hca: AttentionKind.HCA},
            )
    elif data.get("compress_ratios") is not None:
        kinds, mtp = _split_ratios(data, layers, int(fields.get("num_nextn_predict_layers", 1)))
    else:
        raise ConfigError(
            "config.json has neither compress_ratios nor layer_types; transformers' default schedule is neither "
            "released model, so give one of them"
        )
    if data.get("mlp_layer_types") is not None:
        routers = _kinds("mlp_layer_types", data["mlp_layer_types"], RouterKind)
        if len(routers) != layers:
            raise ConfigError(f"mlp_layer_types has {len(routers)} entries, num_hidden_layers is {layers}")
    elif "num_hash_layers" in data:
        if data["num_hash_layers"] < 0:
            raise ConfigError(f"num_hash_layers: got {data['num_hash_layers']}, need 0 or more")
        hashed = min(int(data["num_hash_layers"]), layers)
        routers = (RouterKind.HASH,) * hashed + (RouterKind.TOPK,) * (layers - hashed)
    else:
        raise ConfigError("config.json has neither num_hash_layers nor mlp_layer_types; the released models have 3")
    return dict(
        layer_types=kinds,
        mlp_layer_types=routers,
        mtp_layer_types=mtp,
        compress_rate_csa=csa,
        compress_rate_hca=hca,
    )


def _kinds(field: str, names: Any, kind: Any) -> tuple[Any, ...]:
    allowed = [str(member) for member in kind]
    wrong = [name for name in names if name not in allowed]
    if wrong:
        raise ConfigError(f"{field}: unknown {wrong[0]!r}; need one of {', '.join(allowed)}")
    return tuple(kind(name) for name in names)


def _split_ratios(data: dict[str, Any], layers: int, nextn: int) -> tuple[tuple[AttentionKind, ...], ...]:
    ratios = data["compress_ratios"]
    is_dspark = any(key.startswith("dspark") for key in data)
    extra = len(ratios) - layers
    # Where the MTP block was taken out its ratio may be left.
    if extra != nextn and not (extra == DSPARK_STAGES and (is_dspark or nextn == 1)) and (nextn, extra) != (0, 1):
        raise ConfigError(
            f"compress_ratios has {len(ratios)} entries, num_hidden_layers + num_nextn_predict_layers is "
            f"{layers + nextn}; give one ratio per layer, then one per MTP block"
        )
    wrong = [ratio for ratio in ratios if type(ratio) is not int or ratio not in _RATIO_TO_KIND]
    if wrong:
        raise ConfigError(
            f"compress_ratios: unknown ratio {wrong[0]!r}; need 0, 4 or 128, or give layer_types and compress_rates"
        )
    kinds = tuple(_RATIO_TO_KIND[ratio] for ratio in ratios)
    return kinds[:layers], kinds[layers:]


def _mtp_from_ratios(
    ratios: list[Any], kinds: tuple[AttentionKind, ...], names: dict[int, AttentionKind]
) -> tuple[AttentionKind, ...]:
    found = tuple(names.get(ratio) if type(ratio) is int else None for ratio in ratios)
    if None in found or found[: len(kinds)] != kinds:
        raise ConfigError(
            "compress_ratios and layer_types contradict each other; remove one, or give compress_rates for other ratios"
        )
    return tuple(kind for kind in found[len(kinds) :] if kind is not None)


def _read_rope(data: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    parameters = data.get("rope_parameters") or {}
    main, compress = parameters.get("main"), parameters.get("compress")
    theta = (main or {}).get("rope_theta", data.get("rope_theta", 10000.0))
    compress_theta = (compress or {}).get("rope_theta", data.get("compress_rope_theta", 160000.0))
    for name, value in (("rope_theta", theta), ("compress_rope_theta", compress_theta)):
        if not 1 < value <= _LARGEST_ROPE:
            raise ConfigError(f"{name}: got {value}, need a number above 1, at most {_LARGEST_ROPE:g}")
    if main is not None:
        _check_rope_type("rope_parameters.main", main, ("default",))
    rope_dim = data.get("qk_rope_head_dim")
    if rope_dim is None:
        factor = data.get("partial_rotary_factor", (main or {}).get("partial_rotary_factor"))
        if factor is None:
            raise ConfigError("config.json has neither qk_rope_head_dim nor partial_rotary_factor")
        if not 0 < factor <= 1:
            raise ConfigError(f"partial_rotary_factor: got {factor}, need a share of the head, above 0, at most 1")
        # Rounded, not truncated: 44 · (30/44) is 29.999… in floating point.
        rope_dim = round(fields["head_dim"] * factor)
    return dict(
        rope_theta=float(theta),
        compress_rope_theta=float(compress_theta),
        qk_rope_head_dim=int(rope_dim),
        rope_scaling=_agreed_scaling(
            {
                "rope_scaling": data.get("rope_scaling"),
                "rope_parameters.compress": compress,
                "rope_parameters": parameters,
            }
        ),
    )


def _agreed_scaling(given: dict[str, dict[str, Any] | None]) -> RopeScaling | None:
    """What all places say that name a type."""
    found = {place: _read_scaling(one) for place, one in given.items() if one and {"rope_type", "type"} & one.keys()}
    if len(set(found.values())) > 1:
        raise ConfigError(f"{' and '.join(found)} contradict each other; remove all but one")
    return next(iter(found.values()), None)


def _read_scaling(scaling: dict[str, Any]) -> RopeScaling | None:
    if _check_rope_type("rope_scaling", scaling, ("default", "yarn")) == "default":
        return None
    if scaling.get("attention_factor") not in (None, 1, 1.0) or scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise ConfigError(
            "rope_scaling: attention_factor, mscale and mscale_all_dim must be absent (or a factor of 1): "
            "V4 multiplies cos and sin by 1"
        )
    if scaling.get("truncate", True) is not True:
        raise ConfigError(
            "rope_scaling.truncate: got false, need true: V4 rounds YaRN's correction range to whole channels"
        )
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in scaling]
    if missing:
        raise ConfigError(f"rope_scaling of type yarn lacks {', '.join(missing)}")
    given = {field.name: scaling[field.name] for field in dataclasses.fields(RopeScaling) if field.name in scaling}
    for name, value in given.items():
        if not 1 / _LARGEST_ROPE <= value <= _LARGEST_ROPE:
            raise ConfigError(
                f"rope_scaling.{name}: got {value}, need a number from {1 / _LARGEST_ROPE:g} to {_LARGEST_ROPE:g}"
            )
    length = given.pop("original_max_position_embeddings")
    return RopeScaling(original_max_position_embeddings=length, **{key: float(one) for key, one in given.items()})


def _check_rope_type(field: str, parameters: dict[str, Any], allowed: tuple[str, ...]) -> str:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in allowed:
        raise ConfigError(f"{field}: unknown rope type {kind!r}; need {' or '.join(allowed)}")
    return kind


# ---- writing ---------------------------------------------------------------------------------------------------------
def write_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` object. In the released spelling where `compress_ratios` can express the schedule."""
    data: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"]} | _FIXED
    data.pop("mlp_bias")
    data |= config.extra_fields
    data |= {key: getattr(config, key) for key in (*_PLAIN, *_DEFAULTED)}
    data["qk_rope_head_dim"] = config.qk_rope_head_dim
    if isinstance(config.eos_token_id, tuple):
        data["eos_token_id"] = list(config.eos_token_id)
    if config.expert_dtype is None:
        del data["expert_dtype"]
    rates = (config.compress_rate_csa, config.compress_rate_hca)
    hashed = config.num_hash_layers
    is_prefix = all(kind is RouterKind.HASH for kind in config.mlp_layer_types[:hashed])
    if rates == (_CSA_FALLBACK, _HCA_FALLBACK) and is_prefix:
        data["compress_ratios"] = list(config.compress_ratios)
        data["num_hash_layers"] = hashed
        data["rope_theta"] = _number(config.rope_theta)
        data["compress_rope_theta"] = _number(config.compress_rope_theta)
        if config.rope_scaling is not None:
            data["rope_scaling"] = {"type": "yarn"} | _scaling_fields(config.rope_scaling)
        return data
    data["layer_types"] = [str(kind) for kind in config.layer_types]
    data["mlp_layer_types"] = [str(kind) for kind in config.mlp_layer_types]
    data["mtp_layer_types"] = [str(kind) for kind in config.mtp_layer_types]
    data["compress_rates"] = {str(AttentionKind.CSA): rates[0], str(AttentionKind.HCA): rates[1]}
    partial = config.qk_rope_head_dim / config.head_dim
    compress: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        compress = {"rope_type": "yarn", "attention_factor": 1.0} | _scaling_fields(config.rope_scaling)
    data["rope_theta"] = _number(config.rope_theta)
    data["compress_rope_theta"] = _number(config.compress_rope_theta)
    data["partial_rotary_factor"] = partial
    data["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": data["rope_theta"], "partial_rotary_factor": partial},
        "compress": compress | {"rope_theta": data["compress_rope_theta"], "partial_rotary_factor": partial},
    }
    return data


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    return {key: _number(value) for key, value in dataclasses.asdict(scaling).items()}


def _number(value: float) -> float | int:
    """Integral floats as integers, as the released files write them."""
    return int(value) if float(value).is_integer() else value
