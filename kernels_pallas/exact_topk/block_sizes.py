"""Block sizes of the exact_topk kernel, from the chip and the shapes."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.exact_topk.kernel_bisect import Turned
from kernels_pallas.index_topk import kernel_list, kernel_scores, kernel_select
from kernels_pallas.index_topk.block_sizes import score_dtype
from kernels_pallas.index_topk.kernel_scores import Rows
from kernels_pallas.tpu import LANES, Chip, check_vmem, round_up, tile_bytes

_ROWS = (256, 128, 64, 32, 16)
_MANY_KEYS = 8192
"""From which on lanes that rows leave over share their keys."""
_PACKED = ("v6e", "tpu7x")
"""Chips whose vector unit compares 16-bit integers."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One choice."""

    rows: Rows
    turned: Turned
    vmem_bytes: int


def choose_blocks(chip: Chip, rows: int, keys: int, topk: int, dtype: DTypeLike, output: str) -> Blocks:
    """As many rows per tile as there are, up to 256 and to what fits VMEM with all their keys.

    Two groups of 128 rows fill each other's waits; more than that gains nothing.

    Raises:
      ValueError: not even 16 rows fit.
    """
    wanted = next((size for size in reversed(_ROWS) if size >= rows), _ROWS[0])
    choices = [_blocks(chip, size, keys, topk, dtype, output) for size in _ROWS if size <= wanted]
    blocks = next((b for b in choices if b.vmem_bytes <= 0.9 * chip.vmem_bytes), choices[-1])
    check_vmem(f"exact_topk of {keys} keys", blocks.vmem_bytes, chip, "use fewer keys or implementation='reference'")
    return blocks


def _blocks(chip: Chip, rows: int, keys: int, topk: int, dtype: DTypeLike, output: str) -> Blocks:
    parts = max(1, LANES // rows) if keys >= _MANY_KEYS else 1
    width = round_up(kernel_scores.padded_width(keys), kernel_scores.TILE * parts)
    spec = Rows(rows, width, topk, dtype == jnp.bfloat16, score_dtype(chip, dtype))
    turned = Turned(rows, width, topk, 8 * jnp.dtype(dtype).itemsize, chip.name in _PACKED, parts)
    is_mask = output == "mask"
    columns = kernel_select.mask_words(width) if is_mask else kernel_list.list_width(topk)
    held = tile_bytes((turned.groups, turned.depth, LANES), jnp.int32) * turned.buffers
    held += 3 * tile_bytes((rows, columns), jnp.int32) + 2 * tile_bytes((rows, LANES), jnp.float32)
    if not is_mask:
        held += tile_bytes((16 * width // LANES, LANES), jnp.int32)
    return Blocks(spec, turned, held + 2 * tile_bytes((rows, width), dtype))
