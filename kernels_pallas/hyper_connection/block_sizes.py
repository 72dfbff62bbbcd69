"""How many tokens and columns a grid step of the hyper-connection kernels takes on each chip."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.hyper_connection import mixing
from kernels_pallas.tpu import LANES, Chip, check_vmem, round_up, sublanes, tile_bytes, vmem_budget


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one grid step."""

    tokens: int
    columns: int
    """Of the slabs in which the matrix unit follows the vector unit."""
    vmem_limit: int
    """What the compiler may use: the blocks and a quarter more for its spills. The rest is XLA's to place arrays in."""
    has_matrix_mix: bool = False
    """Whether the matrix unit mixes the streams (`mixing`), not the vector unit."""


def choose_blocks(
    chip: Chip, total: int, count: int, width: int, dtype: DTypeLike, *, has_write: bool, is_head: bool
) -> Blocks:
    """The largest block of tokens that fits, up to 256; whole tiles of rows, also where there are fewer tokens.

    Raises:
      ValueError: not even one vector register of tokens fits; says how many bytes it needs.
    """
    padded = round_up(width, LANES)
    has_matrix_mix = has_write and _fills_matrix_unit(chip, total, count, dtype)
    # The matrix unit loads the next tile of a product while it multiplies by this one only where a product has two.
    widest = 512 if has_matrix_mix else 256
    columns = next(size for size in (widest, 256, 128) if padded % size == 0)
    step = sublanes(dtype)
    whole = round_up(total, step)
    sizes = [size for size in (256, 128) if size <= round_up(total, LANES)]
    candidates = [size for size in sizes if size < whole] + [whole] if whole <= 256 else sizes
    tokens = LANES
    for tokens in sorted(candidates, reverse=True):
        needed = vmem_bytes(tokens, count, padded, dtype, has_write=has_write, is_head=is_head)
        if needed <= vmem_budget(chip):
            limit = min(needed + needed // 4 + (4 << 20), vmem_budget(chip))
            return Blocks(tokens, columns, limit, has_matrix_mix)
    check_vmem(
        f"hyper_connection: {count} streams × {width} {jnp.dtype(dtype).name}, blocks of {tokens} tokens",
        vmem_bytes(tokens, count, padded, dtype, has_write=has_write, is_head=is_head),
        chip,
        "use fewer streams or columns, or implementation='reference'",
    )
    raise AssertionError("check_vmem raises where no block fits")


def vmem_bytes(tokens: int, count: int, padded: int, dtype: DTypeLike, *, has_write: bool, is_head: bool) -> int:
    """VMEM of the forward kernel: its blocks twice, and its scratch."""
    maps = count if is_head else count * (2 + count)
    wide, deep = tile_bytes((tokens, padded), dtype), tile_bytes((tokens, count * padded), dtype)
    blocks = wide * (2 if has_write else 1) + deep * (2 if has_write else 1) + 2 * tile_bytes((maps, tokens), "float32")
    lanes = tile_bytes((tokens, LANES), "float32")
    scratch = tile_bytes((3 * round_up(maps, 8), count * padded), "bfloat16") + lanes * (count * (count + 2) + 1)
    return 2 * blocks + 2 * tile_bytes((maps, count * padded), "float32") + scratch


def _fills_matrix_unit(chip: Chip, total: int, count: int, dtype: DTypeLike) -> bool:
    """Whether a tile of tokens is one pass of the matrix unit, and every tile is full.

    float32 streams would be six passes, and the rows of an incomplete tile hold anything, which spoils the others.
    """
    return dtype == jnp.bfloat16 and total % mixing.TILE == 0 and mixing.depth(count) <= chip.mxu_depth
