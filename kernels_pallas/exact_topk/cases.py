"""Shapes at which the exact_topk kernel is compiled and judged."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Figure, Model
from kernels_pallas.exact_topk import pallas
from kernels_pallas.tpu import array_bytes, cdiv

_BEST = {64: 9_500, 2048: 127_000}
"""Cycles by rows; the table does not say whether S or B."""


def _case(
    model: Model, rows: int, keys: int, topk: int, dtype: Any = jnp.float32, output: Literal["list", "mask"] = "mask",
    *, judged: bool = False, in_ci: bool = False,
) -> Case:  # fmt: skip
    scores = jax.ShapeDtypeStruct((rows, keys), dtype)
    columns = cdiv(keys, 32) if output == "mask" else min(topk, keys)
    return Case(
        op="exact_topk",
        name=f"{model} {topk} of {rows} × {keys}, {jnp.dtype(dtype).name}, {output}",
        model=model,
        build=lambda: (functools.partial(pallas.exact_topk, topk=topk, output=output), (scores,)),
        hbm_bytes=array_bytes(scores) + 4 * rows * columns,
        best={"v6e": Figure(_BEST[rows], "S", "its scores' dtype is not known")} if judged else {},
        targets={"v6e": 4.0, "tpu7x": 4.0} if judged else {},
        in_ci=in_ci,
    )


CASES = (
    _case("flash", 64, 2048, 512, judged=True, in_ci=True),
    _case("flash", 2048, 2048, 512, judged=True, in_ci=True),
    _case("flash", 64, 2048, 512, jnp.bfloat16),
    _case("flash", 2048, 2048, 512, jnp.bfloat16),
    _case("flash", 64, 2048, 512, output="list", in_ci=True),
    _case("flash", 2048, 2048, 512, output="list"),
    _case("flash", 64, 32768, 512, jnp.bfloat16, "list"),
    _case("pro", 64, 2048, 1024),
    _case("pro", 2048, 2048, 1024),
    _case("pro", 16, 262144, 1024, jnp.bfloat16, "list"),
    _case("ugly", 5, 300, 7),
    _case("ugly", 300, 4097, 100, jnp.bfloat16),
)
