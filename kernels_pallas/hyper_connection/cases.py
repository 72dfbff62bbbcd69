"""Shapes at which the hyper-connection kernels are compiled and judged."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Figure, Model
from kernels_pallas.hyper_connection import pallas
from kernels_pallas.hyper_connection.cases_bwd import BACKWARD_CASES

_SETTINGS: dict[str, Any] = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
_BEST = {
    "v6e": Figure(243_800, "S", "without the Sinkhorn rounds; 719k with them"),
    "tpu7x": Figure(249_300, "S", "without the Sinkhorn rounds"),
}
_TARGETS = {"v6e": 1.05, "tpu7x": 1.5}


def _arguments(
    batch: int, length: int, count: int, width: int, dtype: Any, *, is_head: bool = False
) -> tuple[Any, ...]:
    rows = count * (2 + count)
    fn_rows = count if is_head else rows

    def array(*shape: int, of: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    return (
        array(batch, length, width, of=dtype),
        array(batch, length, count * width, of=dtype),
        array(rows, batch, length),
        array(fn_rows, count * width),
        array(fn_rows),
        array(1 if is_head else 3),
        array(width),
    )


def _seam(batch: int, length: int, count: int, width: int, dtype: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return functools.partial(pallas.seam, **_SETTINGS), _arguments(batch, length, count, width, dtype)


def _enter(batch: int, length: int, count: int, width: int, dtype: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def enter(streams: jax.Array, *parameters: jax.Array) -> Any:
        x, _, maps = pallas.seam(None, streams, None, *parameters, **_SETTINGS)
        return x, maps

    _, streams, _, *parameters = _arguments(batch, length, count, width, dtype)
    return enter, (streams, *parameters)


def _leave(batch: int, length: int, count: int, width: int, dtype: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    settings = {name: value for name, value in _SETTINGS.items() if name != "iterations"}
    return functools.partial(pallas.leave, **settings), _arguments(batch, length, count, width, dtype, is_head=True)


def _bytes(tokens: int, count: int, width: int, dtype: Any, streams: int, rows: int) -> int:
    """Streams crossed, out and x (one when nothing is written), fn; maps are small."""
    size = jnp.dtype(dtype).itemsize
    return tokens * width * size * (count * streams + min(streams, 2)) + rows * count * width * 4


_BUILDERS = {"seam": (_seam, 2), "enter": (_enter, 1), "leave": (_leave, 2)}


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
    build, streams = _BUILDERS[kind]
    rows = count if kind == "leave" else count * (2 + count)
    return Case(
        op=f"hyper_connection_{'leave' if kind == 'leave' else 'seam'}",
        name=name or f"{model}-{kind}-{batch * length}",
        model=model,
        build=functools.partial(build, batch, length, count, width, dtype),
        hbm_bytes=_bytes(batch * length, count, width, dtype, streams, rows),
        best=_BEST if judged and model == "flash" else {},
        targets=_TARGETS if judged else {},
        in_ci=in_ci,
    )


CASES = (
    *BACKWARD_CASES,
    _case("seam", "flash", 2048, 4, 4096, judged=True, in_ci=True),
    _case("seam", "pro", 2048, 4, 7168, judged=True),
    _case("seam", "flash", 1, 4, 4096, batch=64),
    _case("seam", "pro", 1, 4, 7168, batch=64),
    _case("enter", "flash", 2048, 4, 4096, judged=True),
    _case("enter", "flash", 1, 4, 4096, batch=64),
    _case("leave", "flash", 2048, 4, 4096, in_ci=True),
    _case("leave", "pro", 2048, 4, 7168),
    _case("leave", "flash", 1, 4, 4096, batch=64),
    _case("seam", "ugly", 1, 4, 4096, in_ci=True),
    _case("seam", "ugly", 1, 4, 512, batch=4),
    _case("enter", "ugly", 1, 4, 512, batch=4, in_ci=True),
    _case("leave", "ugly", 1, 4, 512, batch=4, in_ci=True),
    _case("seam", "ugly", 5, 4, 200, jnp.float32, batch=3, name="ugly-seam-15-float32"),
    _case("enter", "ugly", 5, 4, 200, jnp.float32, batch=3, name="ugly-enter-15-float32"),
    _case("leave", "ugly", 5, 4, 200, jnp.float32, batch=3, name="ugly-leave-15-float32"),
    _case("seam", "ugly", 130, 4, 512, batch=2),
    _case("leave", "ugly", 130, 4, 512, batch=2),
    _case("seam", "ugly", 300, 3, 1000, jnp.float32, name="ugly-three-streams-float32"),
)
