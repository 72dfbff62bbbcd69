"""Shapes at which the index_topk kernels are compiled and judged.

Chunk skipping depends on data: a case that is judged by cycles computes every chunk (`skip=False`), which is what a
query at the end of its context does. The time and memory that S costs grow with the grid steps, so it is taken from one
tile: 128 of 2,048 queries, or 16 of 64 sequences. The others do the same again.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Figure, Matmul, Model
from kernels_pallas.index_topk import pallas
from kernels_pallas.tpu import array_bytes, cdiv

_BFLOAT16, _FP8, _FLOAT32 = jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32
_FULL = "every query sees every key: no chunk is skipped"
_PREFILL_BEST = {"v6e": 6_450_000, "tpu7x": 5_180_000}
_DECODE_BEST = {"v6e": 923_000, "tpu7x": 774_000}


def _array(*shape: int, of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, of)


def _prefill(
    name: str, model: Model, queries: int, keys: int, topk: int, *, batch: int = 1, heads: int = 64, width: int = 128,
    dtype: Any = _BFLOAT16, key_dtype: Any = None, output: Literal["list", "mask"] = "mask", skip: bool = False,
    judged: bool = False, **options: Any,
) -> Case:  # fmt: skip
    key_dtype = key_dtype or dtype
    arguments = [
        _array(batch, queries, heads, width, of=dtype),
        _array(batch, queries, heads, of=_FLOAT32),
        _array(batch, keys, width, of=key_dtype),
        *[_array(batch, queries)] * 2,
        *[_array(batch, keys)] * 2,
    ]
    if key_dtype == _FP8:
        arguments.append(_array(batch, keys, of=_FLOAT32))
    columns = cdiv(keys, 32) if output == "mask" else min(topk, keys)
    part = queries / 2048
    return Case(
        op="index_topk",
        name=name,
        model=model,
        build=lambda: (
            functools.partial(pallas.index_topk, topk=topk, output=output, skip=skip),
            tuple(arguments),
        ),
        hbm_bytes=array_bytes(arguments) + batch * queries * columns * 4,
        matmuls=(Matmul(2 * batch * queries * keys * heads * width, width),),
        best={
            chip: Figure(cycles * part, "B", "scores alone; 2,048 queries scaled to these")
            for chip, cycles in _PREFILL_BEST.items()
            if judged
        },
        # 1.15 for the scores and a quarter more for the selection.
        targets={"v6e": 1.15 * 1.25, "tpu7x": 1.15 * 1.25} if judged else {},
        inputs="" if skip else _FULL,
        static=judged,
        counts_bundles=False,  # the selection runs in the last grid step of a tile
        **options,
    )  # fmt: skip


def _decode(
    name: str, model: Model, batch: int, keys: int, topk: int, *, heads: int = 64, width: int = 128, layers: int = 2,
    dtype: Any = _BFLOAT16, key_dtype: Any = _FP8, judged: bool = False, **options: Any,
) -> Case:  # fmt: skip
    arguments = [
        _array(batch, heads, width, of=dtype),
        _array(batch, heads, of=_FLOAT32),
        _array(layers, batch, keys, width, of=key_dtype),
        _array(batch),
        _array(layers, batch, keys, of=_FLOAT32) if key_dtype == _FP8 else None,
        _array(),
    ]

    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial(pallas.index_topk_decode, topk=topk, skip=False), tuple(arguments)

    cache = array_bytes(arguments[2], arguments[4]) // layers
    return Case(
        op="index_topk_decode",
        name=name,
        model=model,
        build=build,
        hbm_bytes=cache + array_bytes(arguments[:2]) + batch * min(topk, keys) * 4,
        matmuls=(Matmul(2 * batch * keys * heads * width, width),),
        best={
            chip: Figure(cycles * batch / 64, "B", "scores alone; 64 sequences scaled to these")
            for chip, cycles in _DECODE_BEST.items()
            if judged
        },
        # 1.3 and 1.6 for the scores and three tenths more for the selection.
        targets={"v6e": 1.3 * 1.3, "tpu7x": 1.6 * 1.3} if judged else {},
        inputs=_FULL,
        static=judged,
        counts_bundles=False,  # the selection runs in the last grid step of a tile
        **options,
    )


CASES: tuple[Case, ...] = (
    _prefill("prefill of 128 at 128K", "flash", 128, 32768, 512, judged=True, in_ci=True),
    _prefill("prefill of 2048 at 128K", "flash", 2048, 32768, 512),
    _prefill("prefill of 2048 at 128K, list", "flash", 2048, 32768, 512, output="list"),
    _prefill("prefill of 2048 at 128K, fp8", "flash", 2048, 32768, 512, key_dtype=_FP8),
    _prefill("prefill of 2048 at 1M", "flash", 2048, 262144, 512),
    _prefill("prefill of 2048 at 1M, fp8, list", "flash", 2048, 262144, 512, key_dtype=_FP8, output="list"),
    _prefill("prefill, queries over 8 devices", "flash", 256, 32769, 512, output="list", skip=True),
    _prefill("prefill, 8 of 64 heads", "flash", 2048, 32768, 512, heads=8),
    _prefill("training at 16K", "flash", 16384, 4096, 512, skip=True),
    _prefill("Pro: prefill of 128 at 128K", "pro", 128, 32768, 1024, judged=True),
    _prefill("Pro: prefill of 2048 at 1M, fp8", "pro", 2048, 262144, 1024, key_dtype=_FP8),
    _prefill("float32", "ugly", 777, 4097, 100, batch=3, heads=24, dtype=_FLOAT32, output="list", skip=True),
    _prefill("odd heads", "ugly", 33, 130, 300, batch=2, heads=17, skip=True),
    _decode("16 at 128K, fp8", "flash", 16, 32768, 512, judged=True, in_ci=True),
    _decode("64 at 128K, fp8", "flash", 64, 32768, 512),
    _decode("64 at 128K", "flash", 64, 32768, 512, key_dtype=_BFLOAT16),
    _decode("8 of 64 at 128K, fp8", "flash", 8, 32768, 512),
    _decode("8 of 64 heads, 128K, fp8", "flash", 64, 32768, 512, heads=8),
    _decode("1 at 1M, fp8", "flash", 1, 262144, 512),
    _decode("Pro: 16 at 128K, fp8", "pro", 16, 32768, 1024, judged=True),
    _decode("Pro: 64 at 128K, fp8", "pro", 64, 32768, 1024),
    _decode("Pro: 16 at 1M", "pro", 16, 262144, 1024, key_dtype=_BFLOAT16),
    _decode("float32, odd sizes", "ugly", 21, 3001, 100, heads=20, dtype=_FLOAT32, key_dtype=_FLOAT32),
)
