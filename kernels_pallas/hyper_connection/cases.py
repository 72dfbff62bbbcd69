"""Shapes at which the hyper-connection kernels are compiled and judged."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Figure, Model
from kernels_pallas.hyper_connection import pallas
from kernels_pallas.hyper_connection.backward import seam_backward
from kernels_pallas.tpu import array_bytes

_SETTINGS: dict[str, Any] = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
_BEST = {
    "v6e": Figure(243_800, "S", "without the Sinkhorn rounds; 719k with them"),
    "tpu7x": Figure(249_300, "S", "without the Sinkhorn rounds"),
}
_TARGETS = {"v6e": 1.05, "tpu7x": 1.5}
_BACKWARD_TARGETS = {"v6e": 1.3, "tpu7x": 1.8}
"""They were set against three reads and two writes of the streams; here one write is the floor."""


Built = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the operands of every variant follow from."""

    kind: Literal["seam", "enter", "leave"]
    batch: int
    length: int
    count: int
    width: int
    dtype: Any

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.batch * self.length

    @property
    def is_head(self) -> bool:
        """Whether only the reading gates exist."""
        return self.kind == "leave"

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the kernel."""
        return {name: value for name, value in _SETTINGS.items() if not self.is_head or name != "iterations"}

    def operands(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of the forward kernel with a write, by name."""
        rows = self.count * (2 + self.count)
        fn_rows = self.count if self.is_head else rows
        flat = self.count * self.width
        shapes = {
            "out": (self.batch, self.length, self.width), "streams": (self.batch, self.length, flat),
            "maps": (rows, self.batch, self.length), "fn": (fn_rows, flat), "base": (fn_rows,),
            "scale": (1 if self.is_head else 3,), "gain": (self.width,),
        }  # fmt: skip
        return {
            name: jax.ShapeDtypeStruct(shape, self.dtype if name in ("out", "streams") else jnp.float32)
            for name, shape in shapes.items()
        }


# ---- forward ---------------------------------------------------------------------------------------------------------
def _forward(shape: _Shape) -> Built:
    operands = shape.operands()
    if shape.kind == "leave":
        return functools.partial(pallas.leave, **shape.settings), tuple(operands.values())
    if shape.kind == "seam":
        return functools.partial(pallas.seam, **shape.settings), tuple(operands.values())

    def enter(streams: jax.Array, *parameters: jax.Array) -> Any:
        x, _, maps = pallas.seam(None, streams, None, *parameters, **shape.settings)
        return x, maps

    return enter, tuple(value for name, value in operands.items() if name not in ("out", "maps"))


def _forward_bytes(shape: _Shape) -> int:
    """Streams crossed, out and x (one when nothing is written), fn; maps are small."""
    crossings = 1 if shape.kind == "enter" else 2
    size = jnp.dtype(shape.dtype).itemsize
    return shape.tokens * shape.width * size * (shape.count + 1) * crossings + array_bytes(shape.operands()["fn"])


# ---- backward --------------------------------------------------------------------------------------------------------
def _cotangents(shape: _Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """The operands of the backward kernel, by name."""
    operands = shape.operands()
    written = {name: operands[name] for name in ("out", "streams", "maps") if shape.kind != "enter"}
    parameters = {name: operands[name] for name in ("fn", "base", "scale", "gain")}
    arrays = written | {"new": operands["streams"]} | parameters
    arrays |= {"d_x": operands["out"], "d_new": operands["streams"]}
    return arrays if shape.is_head else arrays | {"d_new_maps": operands["maps"]}


def _backward(shape: _Shape) -> Built:
    def backward(given: dict[str, Any]) -> Any:
        absent: dict[str, Any] = {"out": None, "maps": None, "d_new_maps": None, "streams": given["new"]}
        settings: dict[str, Any] = {"iterations": 0} | shape.settings
        return seam_backward(**(absent | given), is_head=shape.is_head, **settings)

    return backward, (_cotangents(shape),)


def _backward_bytes(shape: _Shape) -> int:
    """Everything read once, and the cotangents of what the forward kernel read."""
    arrays = _cotangents(shape)
    has_write = shape.kind != "enter"
    results = ("out", "streams", "maps", "fn", "base", "scale", "gain") if has_write else ("new", "fn", "gain")
    return array_bytes(arrays, [arrays[name] for name in results])


def _case(
    kind: Literal["seam", "enter", "leave"],
    model: Model,
    length: int,
    count: int,
    width: int,
    dtype: Any = jnp.bfloat16,
    *,
    batch: int = 1,
    backward: bool = False,
    name: str | None = None,
    judged: bool = False,
    in_ci: bool = False,
) -> Case:
    shape = _Shape(kind, batch, length, count, width, dtype)
    targets = _BACKWARD_TARGETS if backward else _TARGETS
    return Case(
        op=f"hyper_connection_{'leave' if shape.is_head else 'seam'}",
        name=name or f"{model}-{kind}-{'backward-' if backward else ''}{shape.tokens}",
        model=model,
        build=functools.partial(_backward if backward else _forward, shape),
        hbm_bytes=(_backward_bytes if backward else _forward_bytes)(shape),
        best=_BEST if judged and not backward and model == "flash" else {},
        targets=targets if judged else {},
        in_ci=in_ci,
    )


CASES = (
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
    _case("seam", "flash", 2048, 4, 4096, judged=True, in_ci=True, backward=True),
    _case("seam", "pro", 2048, 4, 7168, judged=True, backward=True),
    _case("seam", "flash", 1, 4, 4096, batch=64, backward=True),
    _case("seam", "pro", 1, 4, 7168, batch=64, backward=True),
    _case("enter", "flash", 2048, 4, 4096, backward=True),
    _case("enter", "pro", 2048, 4, 7168, backward=True),
    _case("leave", "flash", 2048, 4, 4096, backward=True),
    _case("leave", "pro", 2048, 4, 7168, backward=True),
    _case("seam", "ugly", 1, 4, 512, batch=3, backward=True),
    _case(
        "seam", "ugly", 150, 3, 1000, jnp.float32, batch=2, name="ugly-three-streams-backward-float32", backward=True
    ),
    _case("leave", "ugly", 5, 4, 200, batch=3, backward=True),
)
