"""`v4jax bench`: what this machine can do, what share of it a model reaches, and what a peer reaches, all in one run.

Every figure is the median of repetitions in which we, the peer and the limits take turns, so that a busy moment of the
machine hits them alike. Both sides run the same float32 weights through the calls that their users make, each in a
process of its own (`bench_sides`).
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.bench_sides import Setup, SideProcess
from v4jax.config import ModelConfig
from v4jax.cost import Workload, decode_bytes, workload_flops
from v4jax.errors import UserError, check_json_place


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures prefill, decoding and training of the 137M-parameter model `ModelConfig.bench()` in float32."""

    against: Literal["transformers"] | None = None
    """Measure this peer too, on the same weights, taking turns."""
    repetitions: int = 3
    """Timed repetitions of each figure, of which the median counts."""
    products: bool = False
    """Also time alone each matrix product that XLA makes of a workload: about the best that such products can reach."""
    json: Path | None = None
    """Also write the figures to this file."""


WORKLOADS = (
    Workload("prefill", 1, 2048),
    Workload("prefill", 1, 512),
    Workload("decode", 1, 1024, steps=48),
    Workload("decode", 16, 1024, steps=16),
    Workload("train", 4, 512),
)


def run(options: Options) -> None:
    """The verb."""
    if options.repetitions < 1:
        raise UserError(f"--repetitions: got {options.repetitions}, need at least 1")
    check_json_place(options.json)
    platform = jax.default_backend()
    if options.products and platform != "cpu":
        raise UserError(f"--products: got a {platform}, need a CPU: only there programs keep products apart")
    report = bench_model(
        ModelConfig.bench().without_mtp(), WORKLOADS, against=options.against, repetitions=options.repetitions,
        products=options.products,
    )  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    _print_report(report)


def bench_model(
    config: ModelConfig,
    workloads: tuple[Workload, ...],
    *,
    against: Literal["transformers"] | None = None,
    repetitions: int = 3,
    products: bool = False,
) -> dict[str, Any]:
    """Measures `workloads` on a model with random weights; with `products`, what their products take alone, too.

    Returns:
        A JSON object: `limits{gemm_flops, read_bytes_per_second}`, `rows[]` of `what ours peer ratio share_of_limit
        products_alone` (tokens per second, products without all else included; null for what was not asked for),
        `peer_logit_difference`, `threads`, `repetitions`, `versions`.

    Raises:
        UserError: the peer is not installed.
    """
    limits, rows, needs = _Limits(), [], []
    with contextlib.ExitStack() as stack:
        names = ("ours",) if against is None else ("ours", against)
        sides = {name: stack.enter_context(SideProcess(Setup(name, config, THREADS))) for name in names}
        for work in workloads:
            is_decode = work.kind == "decode"
            experts = sides["ours"].distinct_experts(work) if is_decode else 0.0
            seconds = _take_turns(sides, work, limits, repetitions)
            needs.append(work.steps * decode_bytes(config, experts) if is_decode else workload_flops(config, work))
            peer_seconds = None if against is None else seconds[against]
            rows.append(
                {
                    "what": work.name,
                    "ours": work.tokens / seconds["ours"],
                    "peer": peer_seconds and work.tokens / peer_seconds,
                    "ratio": peer_seconds and peer_seconds / seconds["ours"],
                    "products_alone": work.tokens / sides["ours"].products_alone(work) if products else None,
                }
            )
        difference = None if against is None else sides[against].logit_difference
    for row, work, need in zip(rows, workloads, needs, strict=True):  # when all samples of the limits are there
        limit = limits.read_bytes_per_second if work.kind == "decode" else limits.gemm_flops
        row["share_of_limit"] = need / limit * row["ours"] / work.tokens
    return {
        "limits": {"gemm_flops": limits.gemm_flops, "read_bytes_per_second": limits.read_bytes_per_second},
        "rows": rows,
        "peer_logit_difference": difference,
        "threads": THREADS,
        "repetitions": repetitions,
        "versions": _versions(["jax", "flax", *(("torch", "transformers") if against else ())]),
    }


def _take_turns(sides: dict[str, SideProcess], work: Workload, limits: "_Limits", repetitions: int) -> dict[str, float]:
    """Median seconds of each side, after one untimed call."""
    for side in sides.values():
        side.prepare(work)
        side.run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        limits.measure()
        for name, side in sides.items():
            seconds[name].append(side.run())
    return {name: statistics.median(values) for name, values in seconds.items()}


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
    has_products = report["rows"][0]["products_alone"] is not None
    optional = (*(("transformers", "ratio") if has_peer else ()), *(("products alone",) if has_products else ()))
    for column in ("what", "v4jax", *optional, "share of limit", "limit"):
        table.add_column(column, justify="left" if column in ("what", "limit") else "right")
    for row in report["rows"]:
        peer = (f"{row['peer']:.1f}", f"{row['ratio']:.2f}×") if has_peer else ()
        alone = (f"{row['products_alone']:.1f}",) if has_products else ()
        limit = "memory" if row["what"].startswith("decode") else "matrix products"
        table.add_row(row["what"], f"{row['ours']:.1f}", *peer, *alone, f"{row['share_of_limit']:.0%}", limit)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"limits in this run: {limits['gemm_flops'] / 1e9:.1f} GFLOP/s in a float32 matrix product, "
        f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s read"
    )
    if has_peer:
        console.print(f"same weights, same experts: the largest logit differs by {report['peer_logit_difference']:.1e}")
    console.print("  ".join(f"{package} {version}" for package, version in report["versions"].items()), style="dim")
