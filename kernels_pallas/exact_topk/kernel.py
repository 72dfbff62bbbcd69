"""Exact top-k of rows of scores: a grid step holds a tile of rows with all their keys.

Scores cross HBM once. Each row's k-th largest is found with rows on lanes (`kernel_bisect`); what is chosen, lowest
index first where scores are equal, is then written from the scores as they came, by the code that index_topk uses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.exact_topk import kernel_bisect
from kernels_pallas.exact_topk.block_sizes import Blocks
from kernels_pallas.index_topk import kernel_list, kernel_select, kernel_threshold
from kernels_pallas.tpu import Chip, array_bytes, cdiv, compiler_params, vmem_with_room


def _kernel(scores: Any, out: Any, threshold: Any, room: Any, *rest: Any, blocks: Blocks, output: str) -> None:
    spec, turned = blocks.rows, blocks.turned
    words, (staged, *lists) = list(rest[: turned.buffers]), rest[turned.buffers :]
    kernel_bisect.turn(scores, words, turned)
    kernel_bisect.find_threshold(words, threshold, room, turned)
    if output == "mask":
        kernel_select.write_mask(scores, threshold, room, staged, spec, 0, spec.groups)
    else:
        kernel_list.write_list(scores, threshold, room, lists[0], staged, spec, 0, spec.groups)
    out[...] = staged[:, : out.shape[1]]


def select(
    scores: Float[Array, "T N"], columns: int, *, blocks: Blocks, output: str, chip: Chip
) -> Int32[Array, "T W"]:
    """The kernel on scores of whole tiles of keys.

    Args:
      columns: of the result.
      output: "mask" or "list".
    """
    total, width = scores.shape
    spec, turned = blocks.rows, blocks.turned
    grid, is_mask = cdiv(total, spec.rows), output == "mask"
    staged = kernel_select.mask_words(width) if is_mask else kernel_list.list_width(spec.topk)
    result = jax.ShapeDtypeStruct((total, columns), jnp.int32)
    counted = (turned.bits + turned.phases) * grid * spec.rows * width
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, output=output),
        grid=(grid,),
        in_specs=[pl.BlockSpec((spec.rows, width), lambda t: (t, 0))],
        out_specs=pl.BlockSpec((spec.rows, columns), lambda t: (t, 0)),
        out_shape=result,
        scratch_shapes=[
            *kernel_threshold.level_scratch(spec),
            *kernel_bisect.scratch(turned),
            pltpu.VMEM((spec.rows, staged), jnp.int32),
            *([] if is_mask else [kernel_list.list_scratch(spec)]),
        ],
        compiler_params=compiler_params(
            chip, semantics=("parallel",), vmem_bytes=vmem_with_room(blocks.vmem_bytes, chip)
        ),
        cost_estimate=pl.CostEstimate(flops=2 * counted, transcendentals=0, bytes_accessed=array_bytes(scores, result)),
        name=f"exact_topk_{output}",
    )(scores)
