"""The other implementation: transformers' DeepSeek-V4 with random weights, seen through the official tensor names.

`random_config` draws a model that transformers can build, `Peer` builds it and randomises every parameter and buffer
(transformers' zeros hide bugs, architecture.md §18.2). A peer hands out its weights and gradients as the flat official
dictionaries of `Transformer.from_tensors`, says what its routers and indexers chose and by what margin, and can be told
what to choose.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from v4jax.config import AttentionKind, ModelConfig, RopeScaling, RouterKind

Tensors = dict[str, np.ndarray]

# Experts in eager mode: torch's grouped matmul, transformers' default, refuses widths that are not multiples of 4.
PLAIN_FORWARD = {"attn_implementation": "eager", "experts_implementation": "eager", "use_cache": False}


class Choices(NamedTuple):
    """What every layer picked: `experts` [L,B,S,K], and `topk` [L,B,S,K2] with -1 for none (all of it outside CSA)."""

    experts: np.ndarray
    topk: np.ndarray

    def differs(self, other: "Choices") -> np.ndarray:
        """[L,B,S] bool: where the two picked different sets; the order inside a set means nothing."""
        return np.any(np.sort(self.experts) != np.sort(other.experts), -1) | np.any(
            np.sort(self.topk) != np.sort(other.topk), -1
        )


class PeerRun(NamedTuple):
    """One forward pass: logits [B,S,V] float32, the choices, and per choice [L,B,S] its distance to another choice."""

    logits: np.ndarray
    choices: Choices
    margin: np.ndarray
    """The last picked score minus the first left out, the smaller of router and indexer; inf where all is picked."""


class Gradients(NamedTuple):
    """Loss, logits [B,S,V] and gradients under the official names; `absent` lists the weights that received none."""

    loss: float
    logits: np.ndarray
    top: Tensors
    layers: list[Tensors]
    absent: list[str]


# ---- configurations --------------------------------------------------------------------------------------------------
def random_config(seed: int) -> ModelConfig:
    """A small model with odd sizes: every attention and router kind in any order, other windows, rates and streams."""
    rng = np.random.default_rng(seed)
    kinds = [*AttentionKind, *rng.choice(list(AttentionKind), 2)]
    routers = [*RouterKind, *rng.choice(list(RouterKind), 3)]
    groups, heads_per_group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    rope, nope, index_nope = (2 * int(rng.integers(low, high)) for low, high in ((2, 6), (3, 9), (1, 6)))
    while int((rope + nope) * (rope / (rope + nope))) != rope:  # transformers truncates such a pair to a narrower rope
        nope += 2
    experts = int(rng.integers(5, 12))
    factor = int(rng.integers(2, 17))
    rate_csa, rate_hca = [(4, 16), (8, 32), (5, 24), (3, 20)][int(rng.integers(4))]
    return ModelConfig(
        vocab_size=int(rng.integers(80, 130)),
        hidden_size=int(rng.integers(20, 50)),
        moe_intermediate_size=int(rng.integers(10, 40)),
        num_hidden_layers=len(kinds),
        num_attention_heads=groups * heads_per_group,
        head_dim=nope + rope,
        qk_rope_head_dim=rope,
        q_lora_rank=int(rng.integers(10, 40)),
        o_groups=groups,
        o_lora_rank=int(rng.integers(5, 20)),
        n_routed_experts=experts,
        num_experts_per_tok=int(rng.integers(2, experts - 1)),
        routed_scaling_factor=float(rng.uniform(1, 2.5)),
        swiglu_limit=float(rng.uniform(0.5, 2)),
        index_n_heads=int(rng.integers(16, 24)),
        index_head_dim=index_nope + rope,
        index_topk=int(rng.integers(3, 8)),
        layer_types=tuple(AttentionKind(kind) for kind in rng.permutation(kinds)),
        mlp_layer_types=tuple(RouterKind(router) for router in rng.permutation(routers)),
        mtp_layer_types=(),
        num_nextn_predict_layers=0,
        compress_rate_csa=rate_csa,
        compress_rate_hca=rate_hca,
        sliding_window=int(rng.integers(7, 40)),
        rope_theta=float(rng.choice([1e3, 1e4])),
        compress_rope_theta=float(rng.choice([4e4, 1.6e5])),
        rope_scaling=RopeScaling(factor=factor, original_max_position_embeddings=64),
        max_position_embeddings=64 * factor,
        hc_mult=int(rng.integers(3, 6)),
        hc_sinkhorn_iters=int(rng.integers(3, 21)),
        hc_eps=1e-5,
        rms_norm_eps=2e-6,
    )


def random_tokens(config: ModelConfig, seed: int, batch: int = 2, length: int = 90) -> np.ndarray:
    """[B,S] int32. The default length closes several windows of every rate and leaves open ones."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


# ---- the model -------------------------------------------------------------------------------------------------------
class Peer:
    """A transformers model in float32 (or the bfloat16 of `to_bfloat16`), eager attention, without a cache."""

    def __init__(self, config: ModelConfig, module: DeepseekV4ForCausalLM):
        self.config = config
        self.module = module

    @classmethod
    def random(cls, config: ModelConfig, seed: int, *, is_bfloat16_exact: bool = False) -> "Peer":
        """Every weight random; `is_bfloat16_exact` rounds those that `to_bfloat16` narrows: both hold the same."""
        hf_config = DeepseekV4Config(**config.to_hf(), **PLAIN_FORWARD)
        module = DeepseekV4ForCausalLM(hf_config).float().train()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                value = _random_value(name, tensor, config, generator)
                if is_bfloat16_exact and _is_narrowed(name):
                    value = value.bfloat16()
                tensor.copy_(value)
        return cls(config, module)

    def to_bfloat16(self) -> "Peer":
        """A copy as `from_pretrained(dtype=torch.bfloat16)` gives it: norms, sinks, ape, biases, mHC stay float32."""
        module = copy.deepcopy(self.module)
        for name, parameter in module.named_parameters():
            if _is_narrowed(name):
                parameter.data = parameter.data.bfloat16()
        return Peer(self.config, module)

    def tensors(self) -> tuple[Tensors, list[Tensors]]:
        """(top, layers): the weights under the official names, experts stacked, float32 (hash tables int32)."""
        return to_official({name: _numpy(tensor) for name, tensor in self.module.state_dict().items()})

    def run(self, tokens: np.ndarray, forced: Choices | None = None) -> PeerRun:
        """A forward pass, with the given choices in place of its own where `forced` is given."""
        with torch.inference_mode(), _watch(self.module, tokens.shape, forced) as watched:
            logits = self.module(_torch(tokens)).logits.float().numpy()
        return PeerRun(logits, watched.choices(), watched.margin)

    def gradients(self, tokens: np.ndarray) -> Gradients:
        """Backward of the mean next-token cross-entropy, transformers' own loss."""
        self.module.zero_grad(set_to_none=True)
        output = self.module(_torch(tokens), labels=_torch(tokens))
        output.loss.backward()
        parameters = dict(self.module.named_parameters())
        absent = [name for name, parameter in parameters.items() if parameter.grad is None]
        values = {n: _numpy(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in parameters.items()}
        top, layers = to_official(values)
        return Gradients(output.loss.item(), output.logits.detach().numpy(), top, layers, absent)


def _random_value(name: str, tensor: torch.Tensor, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(tensor.shape, generator=generator)
    if name.endswith("tid2eid"):
        rows = torch.rand(tensor.shape[0], config.n_routed_experts, generator=generator)
        return rows.argsort(dim=1)[:, : tensor.shape[1]]
    if "norm.weight" in name or name.endswith("scale"):
        return 1 + 0.2 * normal
    if name.endswith("e_score_correction_bias"):
        return 0.2 * normal
    if tensor.ndim == 1 or name.endswith(("position_bias", "embed_tokens.weight")):
        return 0.7 * normal
    return normal * tensor.shape[-1] ** -0.5 * (1.5 if name == "lm_head.weight" else 1.0)


_KEPT_IN_FLOAT32 = set(modeling.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict)


def _is_narrowed(name: str) -> bool:
    return "tid2eid" not in name and _KEPT_IN_FLOAT32.isdisjoint(name.split("."))


def _torch(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens).long()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.int().numpy() if not tensor.is_floating_point() else tensor.float().numpy().copy()


# ---- names (architecture.md §14.3) -----------------------------------------------------------------------------------
_TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.experts.down_proj": "ffn.experts.w2.weight",
}
for _theirs, _ours in (
    ("self_attn.compressor", "attn.compressor"),
    ("self_attn.compressor.indexer", "attn.indexer.compressor"),
):
    for _part, _name in (("kv_proj", "wkv"), ("gate_proj", "wgate"), ("kv_norm", "norm")):
        _LAYER[f"{_theirs}.{_part}.weight"] = f"{_ours}.{_name}.weight"
    _LAYER[f"{_theirs}.position_bias"] = f"{_ours}.ape"
for _site in ("attn", "ffn"):
    for _part in ("fn", "base", "scale"):
        _LAYER[f"{_site}_hc.{_part}"] = f"hc_{_site}_{_part}"


def to_official(values: Mapping[str, np.ndarray]) -> tuple[Tensors, list[Tensors]]:
    """transformers' flat names to (top, layers); `gate_up_proj` [E,2F,D] is split into w1, its first rows, and w3."""
    top: Tensors = {}
    layers: dict[int, Tensors] = {}
    for name, value in values.items():
        if name in _TOP:
            top[_TOP[name]] = value
            continue
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        layer = layers.setdefault(int(index), {})
        if rest == "mlp.experts.gate_up_proj":
            layer["ffn.experts.w1.weight"], layer["ffn.experts.w3.weight"] = np.split(value, 2, axis=1)
        else:
            layer[_LAYER[rest]] = value
    return top, [layers[index] for index in range(len(layers))]


# ---- choices ---------------------------------------------------------------------------------------------------------
class _Watched:
    """Fills in what the hooks see: one row of the arrays per layer."""

    def __init__(self, config: Any, shape: tuple[int, int]):
        layers, (batch, length) = config.num_hidden_layers, shape
        rate = config.compress_rates[str(AttentionKind.CSA)]
        self.experts = np.full((layers, batch, length, config.num_experts_per_tok), -1, np.int32)
        self.topk = np.full((layers, batch, length, min(config.index_topk, max(1, length // rate))), -1, np.int32)
        self.margin = np.full((layers, batch, length), np.inf, np.float32)
        self.visible = (torch.arange(length) + 1) // rate

    def choices(self) -> Choices:
        return Choices(self.experts, self.topk)

    def narrow_margin(self, layer: int, scores: torch.Tensor, count: int) -> None:
        """Scores [..., N] of which `count` are picked."""
        if scores.shape[-1] <= count:
            return
        ordered = scores.sort(-1, descending=True).values
        gap = ordered[..., count - 1] - ordered[..., count]
        gap = torch.where(ordered[..., count].isneginf(), torch.inf, gap)
        self.margin[layer] = np.minimum(self.margin[layer], gap.reshape(self.margin[layer].shape).float().numpy())


@contextlib.contextmanager
def _watch(module: DeepseekV4ForCausalLM, shape: tuple[int, ...], forced: Choices | None) -> Iterator[_Watched]:
    watched = _Watched(module.config, (shape[0], shape[1]))
    handles: list[RemovableHandle] = []
    for index, layer in enumerate(module.model.layers):
        handles.append(layer.mlp.gate.register_forward_hook(_router_hook(watched, index, forced)))
        if layer.self_attn.layer_type == AttentionKind.CSA:
            indexer = layer.self_attn.compressor.indexer
            handles.append(indexer.scorer.register_forward_hook(_scorer_hook(watched, index, indexer.index_topk)))
            handles.append(indexer.register_forward_hook(_indexer_hook(watched, index, forced)))
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _router_hook(watched: _Watched, layer: int, forced: Choices | None) -> Callable[..., Any]:
    def hook(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        logits, _, indices = output
        if isinstance(router, modeling.DeepseekV4TopKRouter):
            watched.narrow_margin(layer, router.score_fn(logits) + router.e_score_correction_bias, router.top_k)
        watched.experts[layer] = indices.reshape(watched.experts[layer].shape).numpy()
        if forced is None:
            return None
        indices = torch.from_numpy(forced.experts[layer]).long().flatten(0, 1)
        weights = router.score_fn(logits).gather(1, indices)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * router.routed_scaling_factor, indices

    return hook


def _scorer_hook(watched: _Watched, layer: int, count: int) -> Callable[..., None]:
    def hook(_: Any, __: Any, scores: torch.Tensor) -> None:
        is_hidden = torch.arange(scores.shape[-1]) >= watched.visible[:, None]
        watched.narrow_margin(layer, scores.masked_fill(is_hidden, -torch.inf), count)

    return hook


def _indexer_hook(watched: _Watched, layer: int, forced: Choices | None) -> Callable[..., torch.Tensor | None]:
    def hook(_: Any, __: Any, indices: torch.Tensor) -> torch.Tensor | None:
        watched.topk[layer][..., : indices.shape[-1]] = indices.numpy()
        return None if forced is None else torch.from_numpy(forced.topk[layer]).long()

    return hook
