"""Pads scores to whole tiles of keys for the TPU kernel."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.exact_topk import kernel
from kernels_pallas.exact_topk.block_sizes import choose_blocks
from kernels_pallas.index_topk.kernel_select import WORD
from kernels_pallas.tpu import cdiv, current_chip


def exact_topk(
    scores: Float[Array, "T N"],
    *,
    topk: int,
    output: Literal["list", "mask"] = "list",
    chip: str | None = None,
) -> Int[Array, "T W"]:
    """See `api.exact_topk`.

    Args:
      chip: a name of `tpu.CHIPS` whose blocks and formats are used; None means the device compiled for.

    Raises:
      ValueError: 16 rows of scores do not fit VMEM.
    """
    rows, count = scores.shape
    slots = min(topk, count)
    target = current_chip(chip)
    blocks = choose_blocks(target, rows, count, slots, scores.dtype, output)
    if blocks.rows.width > count:
        scores = jnp.pad(scores, ((0, 0), (0, blocks.rows.width - count)), constant_values=-jnp.inf)
    columns = slots if output == "list" else cdiv(count, WORD)
    return kernel.select(scores, columns, blocks=blocks, output=output, chip=target)
