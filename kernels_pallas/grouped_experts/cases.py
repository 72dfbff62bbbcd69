"""Shapes at which the kernel of few tokens and FP4 experts is compiled: one layer's experts of one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Matmul, Model
from kernels_pallas.formats import FP4_BLOCK
from kernels_pallas.grouped_experts import kernel_fp4, tiles
from kernels_pallas.grouped_experts.stacks import ExpertStack
from kernels_pallas.tpu import array_bytes, current_chip

_LAYERS, _CHOICES, _ROWS = 2, 6, 8


def _run(x: jax.Array, matrices: list[jax.Array], experts: jax.Array, weights: jax.Array, *, active: int) -> jax.Array:
    """The first `active` tiles, each with an expert of its own."""
    count = matrices[0].shape[1]
    w1, w3, w2 = (ExpertStack(matrices[i], matrices[i + 1], jnp.int32(1)) for i in (0, 2, 4))
    grouped = tiles.group(experts, weights, count, _ROWS)
    owner = jnp.arange(grouped.owner.shape[0], dtype=jnp.int32) % count
    grouped = grouped._replace(owner=owner, active=jnp.int32(active))
    chip = current_chip()
    return kernel_fp4.forward(x, (w1, w3, w2), grouped, _ROWS, limit=10.0, expected=active, chip=chip)


def _case(
    model: Model, tokens: int, experts: int, hidden: int, width: int, active: int, *, in_ci: bool = False
) -> Case:
    def stack(inputs: int, outputs: int) -> list[Any]:
        shapes = (_LAYERS, experts, inputs // 2, outputs), (_LAYERS, experts, inputs // FP4_BLOCK, outputs)
        kinds = (jnp.int8, jnp.float8_e8m0fnu)
        return [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]

    x = jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16)
    picks = (tokens, _CHOICES)
    matrices = [*stack(hidden, width), *stack(hidden, width), *stack(width, hidden)]
    arguments = (x, matrices, jax.ShapeDtypeStruct(picks, jnp.int32), jax.ShapeDtypeStruct(picks, jnp.float32))
    used = array_bytes(matrices) * active // (_LAYERS * experts)
    return Case(
        op="grouped_experts",
        name=f"{model} FP4, {tokens} tokens, {active} of {experts} experts × {hidden} × {width}",
        model=model,
        build=lambda: (functools.partial(_run, active=active), arguments),
        hbm_bytes=used + 6 * tokens * hidden,
        matmuls=(Matmul(active * 6.0 * _ROWS * hidden * width, width),),
        inputs=f"{active} tiles of {_ROWS} rows",
        static=False,
        counts_bundles=False,  # the grid ends as the data says
        in_ci=in_ci,
    )


CASES = (
    _case("pro", 64, 48, 7168, 384, 30, in_ci=True),
    _case("flash", 64, 64, 4096, 512, 40),
)
