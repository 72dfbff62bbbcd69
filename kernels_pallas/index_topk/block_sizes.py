"""Block sizes of the index_topk kernels, from the chip and the shapes."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.index_topk import kernel_list, kernel_scores, kernel_select
from kernels_pallas.index_topk.kernel_scores import Rows
from kernels_pallas.tpu import LANES, SUBLANES, Chip, cdiv, check_vmem, round_up, tile_bytes

SEQUENCES = 16
"""Decoding sequences per tile: the rows of a bfloat16 register."""
_QUERIES = (128, 64, 32, 16)
_PREFILL_KEYS = (4096, 2048, 1024)
_KEYS = 2048
_BFLOAT16_COMPARES = ("v6e", "tpu7x")
"""Chips whose vector unit compares bfloat16; elsewhere rounded scores are held as float32."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One choice."""

    keys: int
    """Keys per grid step."""
    chunks: int
    """Grid steps over the keys."""
    columns: int
    """Keys per unrolled body."""
    rows: Rows
    vmem_bytes: int


def score_dtype(chip: Chip, dtype: DTypeLike) -> DTypeLike:
    """How scores of queries of this dtype are held in VMEM."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 and chip.name in _BFLOAT16_COMPARES else jnp.float32


def prefill_blocks(
    chip: Chip, queries: int, heads: int, width: int, keys: int, topk: int, dtype: DTypeLike, key_dtype: DTypeLike,
    output: str,
) -> Blocks:  # fmt: skip
    """As many queries per tile as fit VMEM with the scores of all their keys, at most 128.

    A tile reads all its keys once: 64 queries already do 16 times more matrix cycles than that takes to read, so that
    nothing is gained beyond 128; 16 are needed for whole bfloat16 tiles.

    Args:
      width: channels of a key.
      dtype, key_dtype: of queries and keys.

    Raises:
      ValueError: not even 16 queries fit.
    """
    # Long chunks fill the matrix pipeline; four of them at least, so that causal skipping has something to skip.
    shortest = min(_PREFILL_KEYS[-1], round_up(keys, kernel_scores.TILE))
    step = next((step for step in _PREFILL_KEYS if keys >= 4 * step), shortest)
    padded = kernel_scores.padded_width(round_up(keys, step))
    held = score_dtype(chip, dtype)

    def needed(tile: int) -> int:
        fixed = (
            tile_bytes((tile, padded), held) + tile * heads * LANES * 4 + tile_bytes((tile * heads, width), dtype)
            + tile_bytes((16 * round_up(heads, SUBLANES), width), jnp.float32)
            + 2 * tile_bytes((tile, LANES), jnp.float32)
        )  # fmt: skip
        if output == "list":
            fixed += tile_bytes((16 * padded // LANES, LANES), jnp.int32)
        columns = kernel_select.mask_words(padded) if output == "mask" else kernel_list.list_width(topk)
        moving = (
            tile_bytes((tile, heads, width), dtype) + tile_bytes((step, width), key_dtype)
            + tile_bytes((tile, columns), jnp.int32) + tile_bytes((tile, heads), jnp.float32)
            + tile_bytes((tile, 2), jnp.int32) + 3 * tile_bytes((SUBLANES, step), jnp.float32)
        )  # fmt: skip
        return fixed + 2 * moving

    most = round_up(queries, 16)
    fitting = [tile for tile in _QUERIES if tile <= most or tile == 16]
    tile = next((tile for tile in fitting if needed(tile) <= 0.9 * chip.vmem_bytes), 16)
    check_vmem(f"index_topk of {keys} keys, {heads} heads", needed(tile), chip, "shard the keys' context or use `xla`")
    rows = Rows(tile, padded, topk, dtype == jnp.bfloat16, held)
    return Blocks(step, cdiv(keys, step), step, rows, needed(tile))


def decode_blocks(
    chip: Chip, heads: int, width: int, keys: int, topk: int, dtype: DTypeLike, key_dtype: DTypeLike
) -> Blocks:
    """16 sequences, and the longest chunk of keys up to 2048 for which two buffers fit beside the scores.

    Raises:
      ValueError: not even chunks of 256 keys fit.
    """
    held = score_dtype(chip, dtype)
    shortest = kernel_scores.TILE
    longest = min(_KEYS, round_up(keys, shortest))

    def choose(step: int) -> Blocks:
        padded = kernel_scores.padded_width(round_up(keys, step))
        fixed = (
            tile_bytes((SEQUENCES, padded), held) + tile_bytes((SEQUENCES, heads, LANES), jnp.float32)
            + tile_bytes((SEQUENCES * padded // LANES, LANES), jnp.int32)
            + 2 * tile_bytes((SEQUENCES, LANES), jnp.float32)
        )  # fmt: skip
        moving = (
            tile_bytes((SEQUENCES, step, width), key_dtype) + tile_bytes((SEQUENCES, step), jnp.float32)
            + tile_bytes((SEQUENCES, heads, width), dtype) + tile_bytes((heads, SEQUENCES), jnp.float32)
            + tile_bytes((SEQUENCES, 1), jnp.int32)
            + tile_bytes((SEQUENCES, kernel_list.list_width(topk)), jnp.int32)
        )  # fmt: skip
        columns = next(c for c in (2048, 1024, 512, 256) if step % c == 0)
        rows = Rows(SEQUENCES, padded, topk, dtype == jnp.bfloat16, held)
        return Blocks(step, cdiv(keys, step), columns, rows, fixed + 2 * moving)

    steps = [step for step in (2048, 1024, 512, 256) if step <= longest] or [shortest]
    if longest < _KEYS:
        steps.insert(0, longest)
    blocks = next((b for b in map(choose, steps) if b.vmem_bytes <= 0.8 * chip.vmem_bytes), choose(shortest))
    check_vmem(
        f"index_topk decode of {keys} keys, {heads} heads", blocks.vmem_bytes, chip, "shorten the context or use `xla`"
    )
    return blocks
