"""`v4jax bench`: what this machine can do, what share of it a model reaches, and what a peer reaches, all in one run.

Every figure is the median of repetitions in which we, the peer and the limits take turns, so that a busy moment of the
machine hits them alike. Both sides run the same float32 weights through the calls that their users make.
"""

import dataclasses
import gc
import importlib.metadata
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from v4jax.compilation import jit
from v4jax.config import ModelConfig
from v4jax.cost import Run, Workload, decode_bytes, workload_flops
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UserError
from v4jax.model.transformer import Transformer
from v4jax.peer import Transformers
from v4jax.serve.decoder import Decoder
from v4jax.serve.generate import generate
from v4jax.serve.sampling import Sampling
from v4jax.train.recipes import TrainOptions
from v4jax.train.step import make_train_step, take_apart


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
    model = Transformer.random(config, DTypePolicy.named("float32"), stacked=jax.default_backend() == "tpu")
    sides: dict[str, Side] = {}
    difference = None
    if against is not None:
        sides["peer"] = peer = Transformers(config, model, _TRAINING, THREADS)
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


# ---- our side --------------------------------------------------------------------------------------------------------
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
        prompts = work.draw(self.config.vocab_size).tolist()

        def prefill() -> None:
            next(generate(self._decoder, prompts, max_new_tokens=1, sampling=_GREEDY, stop=()))

        return prefill

    def decode(self, work: Workload) -> Run:
        """Goes on with a generation whose prompt is the context."""
        prompts = work.draw(self.config.vocab_size).tolist()
        stream = generate(self._decoder, prompts, max_new_tokens=1 + self.calls * work.steps, sampling=_GREEDY, stop=())
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
        tokens = jnp.asarray(work.draw(self.config.vocab_size))
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}

        def train() -> None:
            nonlocal state
            state, metrics = step(state, frozen, batch)
            metrics.loss.block_until_ready()

        return train

    def distinct_experts(self, work: Workload) -> float:
        """Routed experts that one decoding step reads, per layer: what the last tokens of a batch of prompts picked."""
        tokens = dataclasses.replace(work, length=min(work.length, 128)).draw(self.config.vocab_size)
        choices = jit(lambda model, tokens: model.hidden(tokens, record=True).choices)(self._decoder.model, tokens)
        return statistics.mean(len(np.unique(layer.experts[:, -1])) for layer in choices)


# ---- limits ----------------------------------------------------------------------------------------------------------
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


# ---- report ----------------------------------------------------------------------------------------------------------
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
