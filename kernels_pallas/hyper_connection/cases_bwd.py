"""Shapes at which the backward hyper-connection kernels are compiled and judged."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Model
from kernels_pallas.hyper_connection.kernel_bwd import seam_backward
from kernels_pallas.tpu import array_bytes

_TARGETS = {"v6e": 1.3, "tpu7x": 1.8}
"""They were set against three reads and two writes of the streams; here one write is the floor."""


def _build(
    batch: int, length: int, count: int, width: int, dtype: Any, has_write: bool, is_head: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    rows = count * (2 + count)
    fn_rows = count if is_head else rows

    def array(*shape: int, of: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    wide, deep = (array(batch, length, size, of=dtype) for size in (width, count * width))
    written = dict(out=wide, streams=deep, maps=array(rows, batch, length)) if has_write else {}
    arguments = written | dict(
        new=deep,
        fn=array(fn_rows, count * width),
        base=array(fn_rows),
        scale=array(1 if is_head else 3),
        gain=array(width),
        d_x=wide,
        d_new=deep,
    )
    if not is_head:
        arguments["d_new_maps"] = array(rows, batch, length)

    def backward(given: dict[str, Any]) -> Any:
        absent: dict[str, Any] = dict(out=None, maps=None, d_new_maps=None, streams=given["new"])
        return seam_backward(
            **(absent | given), is_head=is_head, iterations=0 if is_head else 20, eps=1e-6, norm_eps=1e-6
        )

    return backward, (arguments,)


def _case(
    kind: str,
    model: Model,
    length: int,
    count: int,
    width: int,
    dtype: Any = jnp.bfloat16,
    *,
    batch: int = 1,
    name: str | None = None,
    judged: bool = False,
    in_ci: bool = False,
) -> Case:
    has_write, is_head = kind != "enter", kind == "leave"
    build = functools.partial(_build, batch, length, count, width, dtype, has_write, is_head)
    arrays = build()[1][0]
    results = ("out", "streams", "maps", "fn", "base", "scale", "gain") if has_write else ("new", "fn", "gain")
    return Case(
        op=f"hyper_connection_{'leave' if is_head else 'seam'}",
        name=name or f"{model}-{kind}-backward-{batch * length}",
        model=model,
        build=build,
        hbm_bytes=array_bytes(arrays, [arrays[key] for key in results]),
        targets=_TARGETS if judged else {},
        in_ci=in_ci,
    )


BACKWARD_CASES = (
    _case("seam", "flash", 2048, 4, 4096, judged=True, in_ci=True),
    _case("seam", "pro", 2048, 4, 7168, judged=True),
    _case("seam", "flash", 1, 4, 4096, batch=64),
    _case("seam", "pro", 1, 4, 7168, batch=64),
    _case("enter", "flash", 2048, 4, 4096),
    _case("enter", "pro", 2048, 4, 7168),
    _case("leave", "flash", 2048, 4, 4096),
    _case("leave", "pro", 2048, 4, 7168),
    _case("seam", "ugly", 1, 4, 512, batch=3),
    _case("seam", "ugly", 150, 3, 1000, jnp.float32, batch=2, name="ugly-three-streams-backward-float32"),
    _case("leave", "ugly", 5, 4, 200, batch=3),
)
