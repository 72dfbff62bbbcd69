"""How many tokens and columns a grid step of the backward hyper-connection kernel takes on each chip."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.hyper_connection.block_sizes import Blocks
from kernels_pallas.hyper_connection.sinkhorn_bwd import record_shape
from kernels_pallas.tpu import LANES, Chip, check_vmem, round_up, sublanes, tile_bytes, vmem_budget


def choose_backward_blocks(
    chip: Chip, total: int, count: int, width: int, dtype: DTypeLike, *, iterations: int, has_write: bool, is_head: bool
) -> Blocks:
    """The largest block of tokens that fits, up to 256 and to `total` tokens in whole tiles.

    Raises:
      ValueError: not even one tile of tokens fits; says how many bytes it needs.
    """
    padded = round_up(width, LANES)
    columns = next(size for size in (512, 256, 128) if padded % size == 0)
    step = sublanes(dtype)
    whole = round_up(total, step)
    needed = 0
    for tokens in (size for size in (256, 128, 64, 32, step) if size < 2 * whole):
        tokens = min(tokens, whole)
        needed = backward_vmem_bytes(
            tokens, columns, count, padded, dtype, iterations=iterations, has_write=has_write, is_head=is_head
        )
        if needed <= vmem_budget(chip):
            return Blocks(tokens, columns, min(needed + needed // 4 + (4 << 20), vmem_budget(chip)))
    check_vmem(
        f"hyper_connection backward: {count} streams × {width} {jnp.dtype(dtype).name}, blocks of {step} tokens",
        needed,
        chip,
        "use fewer streams or columns, or implementation='reference'",
    )
    raise AssertionError("check_vmem raises where no block fits")


def backward_vmem_bytes(
    tokens: int,
    columns: int,
    count: int,
    padded: int,
    dtype: DTypeLike,
    *,
    iterations: int,
    has_write: bool,
    is_head: bool,
) -> int:
    """VMEM of the backward kernel: its blocks twice, and its scratch."""
    rows = round_up(count if is_head else count * (2 + count), 8)
    deep, wide = tile_bytes((tokens, count * padded), dtype), tile_bytes((tokens, padded), dtype)
    maps = tile_bytes((count * (2 + count), tokens), "float32")
    # Read: written streams, their cotangent, that of the input; write: the streams' cotangent. With a write also the
    # streams before it, its output and the cotangent of that, maps and their cotangent.
    blocks = 3 * deep + wide + maps + (deep + 2 * wide + 2 * maps if has_write else 0)
    whole = 2 * tile_bytes((rows, count * padded), "float32") + tile_bytes((2 * rows, tokens), "float32")
    spread = tile_bytes((tokens, LANES), "float32")
    # Partial sums of the vector unit, or weights and products of the matrix unit.
    sums = max(count * (count + 1), 2 * (count + 1))
    scratch = tile_bytes((count, tokens, columns), "float32") + spread * (count * (count + 1) + count + 6 + sums)
    if jnp.dtype(dtype) == jnp.bfloat16:
        scratch += tile_bytes((4 * rows, count * padded), "bfloat16")
    if not is_head:
        scratch += tile_bytes(record_shape(count, iterations, tokens), "float32")
    return 2 * (blocks + whole + 2 * tile_bytes((1, padded), "float32")) + scratch
