"""A list of selected entries per query → its bit mask, where the indexer gave a list.

Word and bit of an index are one-hot rows; the matrix unit counts how often each (bit, word) pair occurs, so that the
order of the list and repeated indices do not matter, and nothing wider than the list or the mask leaves VMEM.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from kernels_pallas.sparse_attention.layout import WORD, pad_to
from kernels_pallas.tpu import LANES, SUBLANES, Chip, cdiv, compiler_params, round_up


def _pack(chosen: Any, mask: Any) -> None:
    """chosen: int32 [1, 8, K]. mask: int32 [1, 8, 128], the words of one group of 4096 entries."""
    first = pl.program_id(2) * LANES
    count = chosen.shape[2]
    for query in range(SUBLANES):
        index = chosen[0, query : query + 1]
        place = jnp.right_shift(index, 5) - first
        word = jax.lax.broadcasted_iota(jnp.int32, (LANES, count), 0) == place
        bit = jax.lax.broadcasted_iota(jnp.int32, (WORD, count), 0) == jnp.bitwise_and(index, WORD - 1)
        bit, word = (jnp.where(x, 1.0, 0.0).astype(jnp.bfloat16) for x in (bit, word))
        found = jax.lax.dot_general(bit, word, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        value = jnp.left_shift(jnp.int32(1), jax.lax.broadcasted_iota(jnp.int32, found.shape, 0))
        mask[0, query : query + 1] = jnp.sum(jnp.where(found > 0, value, 0), axis=0, keepdims=True)


def bits_of_selection(selection: Int[Array, "B S K"], size: int, chip: Chip) -> Int[Array, "B S D"]:
    """Sets bit j of word w (D = ⌈size / 32⌉) where entry 32 w + j is listed; −1 is none."""
    batch, length, count = selection.shape
    words, columns = cdiv(size, WORD), round_up(count, LANES)
    padded = pad_to(pad_to(selection.astype(jnp.int32), 1, round_up(length, SUBLANES), -1), 2, columns, -1)
    grid = (batch, padded.shape[1] // SUBLANES, cdiv(words, LANES))
    mask = pl.pallas_call(
        _pack,
        grid=grid,
        in_specs=[pl.BlockSpec((1, SUBLANES, columns), lambda b, i, g: (b, i, 0))],
        out_specs=pl.BlockSpec((1, SUBLANES, LANES), lambda b, i, g: (b, i, g)),
        out_shape=jax.ShapeDtypeStruct((*padded.shape[:2], grid[2] * LANES), jnp.int32),
        compiler_params=compiler_params(chip, semantics=("parallel", "parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * padded.shape[0] * padded.shape[1] * grid[2] * WORD * LANES * columns,
            transcendentals=0,
            bytes_accessed=4 * padded.shape[0] * padded.shape[1] * (columns + grid[2] * LANES),
        ),
        name="sparse_attention_bits",
    )(padded)
    return mask[:, :length, :words]
