"""Shapes at which the decode kernels are compiled and judged: caches stacked over three layers, one of them read."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Figure, Matmul, Model
from kernels_pallas.sparse_attention.kernel_decode import sparse_attention_decode
from kernels_pallas.tpu import array_bytes

_LAYERS = 3


def _build(
    batch: int, heads: int, dim: int, window: int, entries: int, topk: int, dtype: Any, is_partial: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def array(*shape: int, of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    def attend(layer: jax.Array, *arguments: Any) -> Any:
        options = {"scale": dim**-0.5, "is_partial": is_partial, "block_sizes": None}
        return sparse_attention_decode(*arguments, layer=layer, **options)

    row = (dim // 128, 128) if topk and dim % 128 == 0 else (dim,)
    return attend, (
        array(),
        array(batch, heads, dim, of=dtype),
        array(_LAYERS, batch, window, dim, of=dtype),
        array(batch),
        array(heads, of=jnp.float32),
        array(_LAYERS, batch, entries, *row, of=dtype) if entries else None,
        array(batch) if entries else None,
        array(batch, topk) if topk else None,
    )


def _case(
    name: str,
    model: Model,
    *,
    batch: int = 64,
    heads: int = 64,
    dim: int = 512,
    window: int = 128,
    entries: int = 0,
    topk: int = 0,
    dtype: Any = jnp.bfloat16,
    is_partial: bool = False,
    **judged: Any,
) -> Case:
    build = functools.partial(_build, batch, heads, dim, window, entries, topk, dtype, is_partial)
    keys = window + (topk or entries)
    rows = jax.ShapeDtypeStruct((batch, keys + 2 * heads, dim), dtype)  # keys, queries in, results out
    inputs = "every window full" + (", every entry visible" if entries else "") + (", any selection" if topk else "")
    return Case(
        "sparse_attention_decode",
        name,
        model,
        build,
        hbm_bytes=array_bytes(rows),
        matmuls=(Matmul(4.0 * batch * heads * keys * dim, depth=dim),),
        inputs=inputs,
        **judged,
    )


_CSA = {
    "best": {
        "v6e": Figure(65_400, "S", "without its gather"),
        "tpu7x": Figure(32_000, "B", "without its gather"),
    },
    "targets": {"v6e": 1.4, "tpu7x": 1.5},
}
_WINDOW = {
    "best": {"v6e": Figure(61_000, "B"), "tpu7x": Figure(53_000, "B")},
    "targets": {"v6e": 1.5, "tpu7x": 2.0},
}
_HCA = {
    "best": {"v6e": Figure(398_000, "B"), "tpu7x": Figure(149_000, "B")},
    "targets": {"v6e": 1.3, "tpu7x": 1.5},
}

# A cache has one entry more than its context, rounded up to 16.
DECODE_CASES = (
    _case("flash_csa_64", "flash", entries=8192, topk=512, in_ci=True, **_CSA),
    _case("flash_csa_64_heads_8", "flash", heads=8, entries=8192, topk=512),
    _case("flash_csa_1m", "flash", batch=1, entries=262_160, topk=512),
    _case("flash_csa_partial", "flash", entries=8192, topk=512, is_partial=True),
    _case("pro_csa_64", "pro", heads=128, entries=8192, topk=1024),
    _case("pro_csa_64_heads_16", "pro", heads=16, entries=8192, topk=1024),
    _case("flash_window_64", "flash", in_ci=True, **_WINDOW),
    _case("flash_window_64_heads_8", "flash", heads=8),
    _case("pro_window_64", "pro", heads=128),
    # 1024 keys in all, as the figures beside it: the window and 896 entries.
    _case("flash_hca_64_keys_1024", "flash", entries=896, **_HCA),
    _case("flash_hca_64", "flash", entries=1040, in_ci=True),
    _case("flash_hca_64_heads_8", "flash", heads=8, entries=1040),
    _case("flash_hca_1m", "flash", batch=1, entries=8208),
    _case("pro_hca_64", "pro", heads=128, entries=1040),
    _case("pro_hca_64_heads_16", "pro", heads=16, entries=8208),
    _case("ugly_rows", "ugly", batch=3, heads=5, dim=384, window=100, entries=37, topk=30),
    _case("ugly_rows_float32", "ugly", batch=9, heads=3, dim=128, window=12, entries=1000, topk=200, dtype=jnp.float32),
    _case("ugly_window", "ugly", batch=13, heads=3, dim=200, window=20),
    _case("ugly_pages", "ugly", batch=1, heads=7, dim=200, window=20, entries=1237),
    _case("ugly_pages_float32", "ugly", batch=2, heads=1, dim=64, window=1, entries=3, dtype=jnp.float32),
)
