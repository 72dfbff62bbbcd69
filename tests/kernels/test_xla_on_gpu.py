"""The operations as a GPU runs them: in bfloat16 against float32, and their times.

On a machine with a GPU and jax[cuda12]: JAX_PLATFORMS=cuda,cpu pytest -m gpu -s tests/kernels/test_xla_on_gpu.py
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from kernels_pallas.grouped_experts import grouped_experts
from kernels_pallas.hyper_connection import seam
from kernels_pallas.index_topk import index_topk, index_topk_decode, reference
from kernels_pallas.sparse_attention import sparse_attention, sparse_attention_decode

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> jax.Device:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU, or hidden from JAX: JAX_PLATFORMS=cuda,cpu shows one")


def on_device(**arrays: np.ndarray) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention(
    length: int = 2048, entries: int = 512, heads: int = 64, dim: int = 512
) -> tuple[Callable[..., Any], Any]:
    """Window, selected entries and sink."""
    position = np.arange(length, dtype=np.int32)[None]
    end = (4 * np.arange(entries, dtype=np.int32) + 3)[None]
    chosen = np.argsort(draw(0, 1, length, entries))[..., : entries // 4].astype(np.int32)
    fixed = on_device(
        q_position=position, q_segment=np.ones_like(position), key_segment=np.ones((1, 128 + length), np.int32),
        entry_end=end, entry_segment=np.ones_like(end), selection=chosen, sink=draw(1, heads),
    )  # fmt: skip
    floats = dict(
        q=draw(2, 1, length, heads, dim), keys=draw(3, 1, 128 + length, dim), entries=draw(4, 1, entries, dim)
    )
    call = functools.partial(sparse_attention, window=128, scale=dim**-0.5)
    return lambda floats, implementation: call(**floats, **fixed, implementation=implementation), floats


def attention_decode(batch: int = 64, entries: int = 2048, heads: int = 64, dim: int = 512) -> tuple[Any, Any]:
    """One query per sequence over its window and its selected entries."""
    chosen = np.argsort(draw(0, batch, entries))[:, : entries // 4].astype(np.int32)
    fixed = on_device(
        ring_count=np.full(batch, 128, np.int32), sink=draw(1, heads), entry_count=np.full(batch, entries, np.int32),
        selection=chosen,
    )  # fmt: skip
    floats = dict(q=draw(2, batch, heads, dim), ring=draw(3, batch, 128, dim), entries=draw(4, batch, entries, dim))
    call = functools.partial(sparse_attention_decode, scale=dim**-0.5)
    return lambda floats, implementation: call(**floats, **fixed, implementation=implementation), floats


def experts(tokens: int = 2048, width: int = 2048, hidden: int = 1024, count: int = 32) -> tuple[Any, Any]:
    """Six of the experts per token."""
    picks = np.argsort(draw(0, tokens, count))[:, :6].astype(np.int32)
    fixed = on_device(experts=picks, weights=np.full((tokens, 6), 1 / 6, np.float32))
    floats = dict(
        x=draw(1, tokens, width), w1=draw(2, count, hidden, width) / width**0.5,
        w3=draw(3, count, hidden, width) / width**0.5, w2=draw(4, count, width, hidden) / hidden**0.5,
    )  # fmt: skip
    call = functools.partial(grouped_experts, limit=10.0)
    return lambda floats, implementation: call(**floats, **fixed, implementation=implementation), floats


def hyper_connection(tokens: int = 2048, count: int = 4, width: int = 4096) -> tuple[Any, Any]:
    """Write, read, norm; parameters stay float32."""
    rows = count * (2 + count)
    fixed = on_device(
        maps=np.abs(draw(0, rows, 1, tokens)) / count, fn=draw(1, rows, count * width) / (count * width) ** 0.5,
        base=draw(2, rows), scale=draw(3, 3), gain=np.ones(width, np.float32),
    )  # fmt: skip
    floats = dict(out=draw(4, 1, tokens, width), streams=draw(5, 1, tokens, count * width))
    call = functools.partial(seam, iterations=20, eps=1e-6, norm_eps=1e-6)
    return lambda floats, implementation: call(**floats, **fixed, implementation=implementation)[:2], floats


PROBLEMS = {f.__name__: f for f in (attention, attention_decode, experts, hyper_connection)}


def seconds(function: Callable[..., Any], *arguments: Any, repetitions: int = 10) -> float:
    """The median of runs after the first."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def check(name: str, device: jax.Device, **sizes: int) -> str:
    """Errs no more than the plain form does in bfloat16; returns the figures."""
    call, floats = PROBLEMS[name](**sizes)
    with jax.default_device(device):
        run = {way: jax.jit(functools.partial(call, implementation=way)) for way in ("xla", "reference")}
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), floats)
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)  # the same numbers, exactly
        with jax.default_matmul_precision("highest"):
            want = jax.tree.leaves(run["reference"](exact))
        errors = {}
        for way, function in run.items():
            pairs = zip(jax.tree.leaves(function(half)), want, strict=True)
            errors[way] = max(float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs)
        assert errors["xla"] <= tolerances.KERNEL_BFLOAT16_RATIO * errors["reference"] + 1e-6
        times = {way: seconds(function, half) for way, function in run.items()}
    return (
        f"{name}: error {errors['xla']:.2e} (reference {errors['reference']:.2e}), "
        f"{1e3 * times['xla']:.2f} ms (reference {1e3 * times['reference']:.2f} ms)"
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_bfloat16_errs_no_more_than_the_plain_form(name: str, device: jax.Device, record_property: Any) -> None:
    figures = check(name, device)
    record_property("figure", figures)
    print(f"\n{device.device_kind}: {figures}")


def check_selection(device: jax.Device, *, queries: int = 512, entries: int = 4096, heads: int = 64) -> str:
    """Of bfloat16 queries, what is chosen scores within the bound of the last chosen by float32."""
    q, keys = (jnp.asarray(x, jnp.bfloat16) for x in (draw(0, 1, queries, heads, 128), draw(1, 1, entries, 128)))
    weights = jnp.asarray(draw(2, 1, queries, heads))
    position = jnp.full((1, queries), 4 * entries, jnp.int32)
    end = jnp.arange(entries, dtype=jnp.int32)[None] * 4
    rows = (position, jnp.ones_like(position), end, jnp.ones_like(end))
    with jax.default_device(device):
        whole = jax.jit(functools.partial(index_topk, topk=512))
        chosen = np.asarray(whole(q, weights, keys, *rows))[0]
        scores = np.asarray(reference.scores(q.astype(jnp.float32), weights, keys.astype(jnp.float32)))[0]
        decode = jax.jit(functools.partial(index_topk_decode, topk=512))
        by_row = np.asarray(decode(q[0], weights[0], jnp.repeat(keys, queries, 0), jnp.full(queries, entries)))
        figure = f"index_topk: {1e3 * seconds(whole, q, weights, keys, *rows):.2f} ms"
    for picked in (chosen, by_row):
        last = np.sort(scores, axis=1)[:, -512]
        got = np.take_along_axis(scores, picked, axis=1).min(axis=1)
        assert (got >= last - tolerances.INDEX_SCORE_BFLOAT16 * np.abs(last)).all()
        assert all(len(set(row)) == 512 for row in picked)
    return figure


def test_a_selection_is_the_best_by_float32(device: jax.Device, record_property: Any) -> None:
    figure = check_selection(device)
    record_property("figure", figure)
    print(f"\n{device.device_kind}: {figure}")
