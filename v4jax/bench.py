"""`v4jax bench`: what this machine can do, what share of it a model reaches, and what a peer reaches, all in one run.

Every figure is the median of repetitions in which we, the peer and the limits take turns, so that a busy moment of the
machine hits them alike. Both sides run the same float32 weights through the calls that their users make.
"""

import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from v4jax.checkpoint.names import Spelling, Storage, section_parameters, sections, stored_tensors
from v4jax.config import AttentionKind, ModelConfig, layer_plan
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UserError
from v4jax.model.transformer import Transformer
from v4jax.serve.decoder import Decoder
from v4jax.serve.generate import generate
from v4jax.serve.sampling import Sampling
from v4jax.train.recipes import TrainOptions
from v4jax.train.step import make_train_step, take_apart

Run = Callable[[], None]
"""One timed piece of work; returns when its result is there."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures prefill, decoding and training of the 137M-parameter model `ModelConfig.bench()` in float32."""

    what: tyro.conf.Positional[Literal["model"]]
    """What to measure."""
    against: Literal["transformers"] | None = None
    """Measure this peer too, on the same weights, taking turns."""
    repetitions: int = 3
    """Timed repetitions of each figure, of which the median counts."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row: `batch` sequences; `length` is a prompt's, a row's, or of the context that `steps` tokens are added to."""

    kind: Literal["prefill", "decode", "train"]
    batch: int
    length: int
    steps: int = 1

    @property
    def name(self) -> str:
        """As the tables call it."""
        if self.kind == "prefill":
            return f"prefill {self.length}"
        return f"decode {self.batch} at {self.length}" if self.kind == "decode" else f"train {self.batch}×{self.length}"

    @property
    def tokens(self) -> int:
        """Tokens that one repetition counts."""
        return self.batch * (self.steps if self.kind == "decode" else self.length)


WORKLOADS = (
    Workload("prefill", 1, 2048),
    Workload("prefill", 1, 512),
    Workload("decode", 1, 1024, steps=48),
    Workload("decode", 16, 1024, steps=16),
    Workload("train", 4, 512),
)


class Side(Protocol):
    """An implementation under measurement: makes a workload ready and returns the part that is timed."""

    def prefill(self, work: Workload) -> Run:
        """Fills a new cache with a prompt and picks the next token."""
        ...

    def decode(self, work: Workload) -> Run:
        """Adds greedy tokens to a cache that holds the context."""
        ...

    def train(self, work: Workload) -> Run:
        """Forward, backward and AdamW on one batch."""
        ...


def run(options: Options) -> None:
    """The verb."""
    if options.repetitions < 1:
        raise UserError(f"--repetitions: got {options.repetitions}, need at least 1")
    report = bench_model(
        ModelConfig.bench().without_mtp(), WORKLOADS, against=options.against, repetitions=options.repetitions
    )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    _print_report(report)


def bench_model(
    config: ModelConfig, workloads: tuple[Workload, ...], *, against: str | None = None, repetitions: int = 3
) -> dict[str, Any]:
    """Measures `workloads` on a model with random weights.

    Returns:
        A JSON object: `limits{gemm_flops, read_bytes_per_second}`, `rows[]` of `what ours peer ratio share_of_limit`
        (tokens per second; null without a peer), `peer_logit_difference`, `threads`, `repetitions`, `versions`.

    Raises:
        UserError: the peer is not installed.
    """
    model = Transformer.random(config, DTypePolicy.named("float32"))
    sides: dict[str, Side] = {}
    difference = None
    if against is not None:
        sides["peer"] = peer = _Transformers(config, model)
        difference = peer.logit_difference(model)
    sides["ours"] = ours = _Ours(config, model, calls=repetitions + 1)
    limits, rows = _Limits(), []
    for work in workloads:
        experts = ours.distinct_experts(work) if work.kind == "decode" else 0.0
        seconds = _take_turns(
            {name: getattr(side, work.kind)(work) for name, side in sides.items()}, limits, repetitions
        )
        if work.kind == "decode":
            needed = work.steps * decode_bytes(config, experts) / limits.read_bytes_per_second
        else:
            needed = workload_flops(config, work) / limits.gemm_flops
        peer_seconds = seconds.get("peer")
        rows.append(
            {
                "what": work.name,
                "ours": work.tokens / seconds["ours"],
                "peer": peer_seconds and work.tokens / peer_seconds,
                "ratio": peer_seconds and peer_seconds / seconds["ours"],
                "share_of_limit": needed / seconds["ours"],
            }
        )
        gc.collect()
    return {
        "limits": {"gemm_flops": limits.gemm_flops, "read_bytes_per_second": limits.read_bytes_per_second},
        "rows": rows,
        "peer_logit_difference": difference,
        "threads": THREADS,
        "repetitions": repetitions,
        "versions": _versions(["jax", "flax", *(("torch", "transformers") if against else ())]),
    }


def _take_turns(runs: dict[str, Run], limits: "_Limits", repetitions: int) -> dict[str, float]:
    """Median seconds of each, after one untimed call."""
    for function in runs.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        limits.measure()
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---- our side ---------------------------------------------------------------------------------------------------------
_GREEDY = Sampling(temperature=0.0)
_TRAINING = TrainOptions(learning_rate=1e-4, final_learning_rate=1.0, warmup_steps=0, weight_decay=0.0)


class _Ours:
    """The functions behind `v4jax generate` and `v4jax finetune`."""

    def __init__(self, config: ModelConfig, model: Transformer, calls: int):
        self.config = config
        self.calls = calls
        self._model: Transformer | None = model
        self._decoder = Decoder(model)

    def prefill(self, work: Workload) -> Run:
        """Starts generation: fills a new cache with a prompt and picks the next token."""
        prompts = _tokens(self.config, work.batch, work.length).tolist()

        def prefill() -> None:
            next(generate(self._decoder, prompts, max_new_tokens=1, sampling=_GREEDY, stop=()))

        return prefill

    def decode(self, work: Workload) -> Run:
        """Goes on with a generation whose prompt is the context."""
        prompts = _tokens(self.config, work.batch, work.length).tolist()
        stream = generate(
            self._decoder, prompts, max_new_tokens=1 + self.calls * work.steps, sampling=_GREEDY, stop=()
        )
        next(stream)

        def decode() -> None:
            for _ in range(work.steps):
                next(stream)

        return decode

    def train(self, work: Workload) -> Run:
        """Takes training steps on one batch. Training owns its model's arrays, so this comes last."""
        assert self._model is not None
        layout, state, frozen = take_apart(self._model, _TRAINING)
        self._model = None
        step = make_train_step(layout, self.config, _TRAINING)
        tokens = jnp.asarray(_tokens(self.config, work.batch, work.length))
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}

        def train() -> None:
            nonlocal state
            state, metrics = step(state, frozen, batch)
            metrics.loss.block_until_ready()

        return train

    def distinct_experts(self, work: Workload) -> float:
        """Routed experts that one decoding step reads, per layer: what the last tokens of a batch of prompts picked."""
        tokens = _tokens(self.config, work.batch, min(work.length, 128))
        choices = jax.jit(lambda model, tokens: model.hidden(tokens, record=True).choices)(self._decoder.model, tokens)
        return statistics.mean(len(np.unique(layer.experts[:, -1])) for layer in choices)


# ---- the peer ---------------------------------------------------------------------------------------------------------
_CONTEXT_CHUNK = 128
"""The peer's eager attention holds [batch, heads, chunk, context] scores: a context is filled in chunks of this length."""


class _Transformers:
    """transformers' DeepseekV4ForCausalLM in eager attention, its only one, with the grouped matmul for experts."""

    def __init__(self, config: ModelConfig, model: Transformer):
        try:
            import torch
            from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
        except ImportError as error:
            raise UserError(
                f"--against transformers: {error.name} is not installed; pip install 'v4jax[parity]'"
            ) from None
        torch.set_num_threads(THREADS)
        self._torch = torch
        self.config = config
        with torch.no_grad():
            self.module = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_hf(), attn_implementation="eager")).float()
            _copy_weights(model, config, self.module.state_dict(), torch.from_numpy)

    def _tokens(self, batch: int, length: int) -> Any:
        return self._torch.from_numpy(_tokens(self.config, batch, length)).long()

    def logit_difference(self, model: Transformer) -> float:
        """The largest difference of any logit from ours, on one prompt: whether both sides do the same work."""
        tokens = _tokens(self.config, 1, 256)
        with self._torch.inference_mode():
            theirs = self.module(self._torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
        return float(np.abs(np.asarray(jax.jit(lambda model: model(tokens))(model)) - theirs).max())

    def prefill(self, work: Workload) -> Run:
        """A forward pass into a new cache, logits of the last position."""
        tokens = self._tokens(work.batch, work.length)

        def prefill() -> None:
            with self._torch.inference_mode():
                self._next_token(tokens, self._new_cache())

        return prefill

    def decode(self, work: Workload) -> Run:
        """One forward pass per token, with the model's own cache."""
        cache = self._new_cache()
        with self._torch.inference_mode():
            for chunk in self._tokens(work.batch, work.length).split(_CONTEXT_CHUNK, dim=1):
                token = self._next_token(chunk, cache)

        def decode() -> None:
            nonlocal token
            with self._torch.inference_mode():
                for _ in range(work.steps):
                    token = self._next_token(token, cache)

        return decode

    def train(self, work: Workload) -> Run:
        """transformers' own loss, and torch's fused AdamW, its Trainer's default."""
        tokens = self._tokens(work.batch, work.length)
        adamw = self._torch.optim.AdamW(
            self.module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.module.train()

        def train() -> None:
            adamw.zero_grad(set_to_none=True)
            self.module(tokens, labels=tokens, use_cache=False).loss.backward()
            self._torch.nn.utils.clip_grad_norm_(self.module.parameters(), _TRAINING.clip)
            adamw.step()

        return train

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.module.config)

    def _next_token(self, tokens: Any, cache: Any) -> Any:
        logits = self.module(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def _copy_weights(
    model: Transformer, config: ModelConfig, state: dict[str, Any], as_tensor: Callable[[np.ndarray], Any]
) -> None:
    """Writes our weights into transformers' tensors, whose expert matrices hold all experts, w1 over w3."""
    top, layers, _ = model.to_tensors()
    for section, tensors in zip(sections(config), (top, *layers), strict=True):
        for parameter in section_parameters(config, section):
            for index, stored in enumerate(stored_tensors(section, parameter, Spelling.TRANSFORMERS)):
                target, value = state[stored.name], tensors[parameter.key]
                if stored.slab is not None:
                    target, value = target[stored.slab], value[index]
                target = target if stored.rows is None else target[stored.rows]
                target.copy_(as_tensor(np.ascontiguousarray(value)))


def _tokens(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


# ---- limits -----------------------------------------------------------------------------------------------------------
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_GEMM_SIZE = 2048
_READ_BYTES = 1 << 30


class _Limits:
    """The machine's own figures, sampled between the others: a large matrix product, and a read of memory."""

    def __init__(self) -> None:
        key = jax.random.key(0)
        self._matrix = jax.random.normal(key, (_GEMM_SIZE, _GEMM_SIZE), jnp.float32)
        self._multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
        self._multiply(self._matrix).block_until_ready()
        self._memory = np.ones((THREADS, _READ_BYTES // THREADS // 4), np.float32)
        self._gemm_seconds: list[float] = []
        self._read_seconds: list[float] = []

    def measure(self) -> None:
        """Takes one sample of each."""
        start = time.perf_counter()
        self._multiply(self._matrix).block_until_ready()
        middle = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(np.max, self._memory))
        self._gemm_seconds.append(middle - start)
        self._read_seconds.append(time.perf_counter() - middle)

    @property
    def gemm_flops(self) -> float:
        """Median float32 multiply-adds of a square matrix product on all threads, in FLOP/s."""
        return 2 * _GEMM_SIZE**3 / statistics.median(self._gemm_seconds)

    @property
    def read_bytes_per_second(self) -> float:
        """Median speed of reading 1 GiB once, a share per thread."""
        return self._memory.nbytes / statistics.median(self._read_seconds)


# ---- what the work needs ------------------------------------------------------------------------------------------------
def decode_bytes(config: ModelConfig, distinct_experts: float) -> float:
    """float32 weight bytes that a decoding step must read: all but the embedding and the experts that no sequence picked."""
    return 4 * _active_weights(config, distinct_experts, is_counted=lambda key, shape: True)


def workload_flops(config: ModelConfig, work: Workload) -> float:
    """FLOPs that a prefill or a training step needs: products with weights, attention over visible keys, index scores.

    A prefill forms logits of the last position. A training step counts three forward passes (one forward, two in the
    backward), but one for the indexer, which gets no gradient. Nothing recomputed counts.
    """
    tokens = work.batch * work.length
    head = 2 * config.vocab_size * config.hidden_size
    weights = 2 * _active_weights(config, config.num_experts_per_tok, is_counted=_is_multiplied) - head
    attention, index = _attention_flops(config, work.length)
    index_weights = 2 * _active_weights(
        config, 0, is_counted=lambda key, shape: ".indexer." in key and _is_multiplied(key, shape)
    )
    forward = tokens * weights + work.batch * (attention + index)
    if work.kind == "prefill":
        return forward + work.batch * head
    return 3 * (forward + tokens * head) - 2 * (tokens * index_weights + work.batch * index)


def _active_weights(config: ModelConfig, experts: float, is_counted: Callable[[str, tuple[int, ...]], bool]) -> float:
    """Elements of the parameters that one pass touches, with so many routed experts per layer."""
    total = 0.0
    for section in sections(config.without_mtp()):
        for parameter in section_parameters(config, section):
            if parameter.key == "embed.weight" or parameter.storage is Storage.TABLE:
                continue
            if is_counted(parameter.key, parameter.shape):
                share = experts / config.n_routed_experts if parameter.storage is Storage.EXPERT else 1.0
                total += share * math.prod(parameter.shape)
    return total


def _is_multiplied(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not key.endswith("ape")


def _attention_flops(config: ModelConfig, length: int) -> tuple[int, int]:
    """(attention, indexer) FLOPs of one sequence: scores and values per visible key, index scores per visible entry."""
    position = np.arange(1, length + 1)
    window = np.minimum(position, config.sliding_window).sum()
    keys, entries = 0, 0
    for spec in layer_plan(config):
        visible = position // spec.ratio if spec.ratio else np.zeros_like(position)
        if spec.attention is AttentionKind.CSA:
            entries += visible.sum()
            visible = np.minimum(visible, config.index_topk)
        keys += window + visible.sum()
    per_key = 4 * config.num_attention_heads * config.head_dim
    return int(keys * per_key), int(entries * 2 * config.index_n_heads * config.index_head_dim)


# ---- report -----------------------------------------------------------------------------------------------------------
def _versions(packages: list[str]) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    limits = report["limits"]
    table = Table(title=f"tokens per second, float32, {report['threads']} threads, medians of {report['repetitions']}")
    has_peer = report["rows"][0]["peer"] is not None
    for column in ("what", "v4jax", *(("transformers", "ratio") if has_peer else ()), "share of limit", "limit"):
        table.add_column(column, justify="left" if column in ("what", "limit") else "right")
    for row in report["rows"]:
        peer = (f"{row['peer']:.1f}", f"{row['ratio']:.2f}×") if has_peer else ()
        limit = "memory" if row["what"].startswith("decode") else "matrix products"
        table.add_row(row["what"], f"{row['ours']:.1f}", *peer, f"{row['share_of_limit']:.0%}", limit)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"limits in this run: {limits['gemm_flops'] / 1e9:.1f} GFLOP/s in a float32 matrix product, "
        f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s read"
    )
    if has_peer:
        console.print(f"same weights: the largest logit differs by {report['peer_logit_difference']:.1e}")
    console.print("  ".join(f"{package} {version}" for package, version in report["versions"].items()), style="dim")
