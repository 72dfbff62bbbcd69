"""The derivative of the write on the matrix unit: both of its products for a group of tokens at a time.

Of a group of 128 / C tokens, d_new_k stacked over streams is [128, columns], rounded to the streams' dtype. What was
written, out and old streams, has the cotangents W · d_new: W is a block of diagonals, row (j, t), column (k, t), of
post_k (j = 0) and comb[j - 1, k]. The weights' cotangents are the same diagonals of [out; old] · d_newᵀ. The matrix
unit does 128 / C times the work, and yet less of it than the vector unit would have.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.hyper_connection.mixing import split_bf16
from kernels_pallas.tpu import LANES, sublanes


def group_tokens(count: int, tokens: int, dtype: DTypeLike) -> int | None:
    """Tokens of a group; None where the vector unit does it: float32 streams, blocks that are not whole groups."""
    size = LANES // count
    fits = LANES % count == 0 and tokens % size == 0 and size % sublanes(dtype) == 0
    return size if fits and dtype == jnp.bfloat16 else None


def fill_weights(target: Any, weights: list[list[jax.Array]]) -> None:
    """W in two bf16 parts, side by side in the [(C + 1) · size, 2 · 128] `target`.

    Args:
      weights: entries [j][k], a token's weight in all lanes of its row: [size, 128].
    """
    size = weights[0][0].shape[0]
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (size, LANES), axis) for axis in (0, 1))
    for j, of_source in enumerate(weights):
        block = jnp.zeros((size, LANES), jnp.float32)
        for k, weight in enumerate(of_source):
            block = jnp.where(lane == row + k * size, weight, block)
        for part, value in enumerate(split_bf16(block, 2)):
            target[j * size : (j + 1) * size, part * LANES : (part + 1) * LANES] = value


def diagonals(product: jax.Array, size: int) -> list[jax.Array]:
    """Of [out; old] · d_newᵀ, [(C + 1) · size, 128]: a row per source, lane (k, t)."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (size, LANES), axis) for axis in (0, 1))
    is_same_token = lane % size == row
    sources = product.shape[0] // size
    blocks = [product[j * size : (j + 1) * size] for j in range(sources)]
    return [jnp.sum(jnp.where(is_same_token, block, 0.0), axis=0, keepdims=True) for block in blocks]


def by_token(diagonals_of_blocks: jax.Array, count: int, total: int) -> jax.Array:
    """[blocks, groups, C + 1, 128] of `diagonals` → [C · (C + 1), tokens]: post's rows, then comb's."""
    blocks, groups, sources, _ = diagonals_of_blocks.shape
    apart = diagonals_of_blocks.reshape(blocks, groups, sources, count, LANES // count)
    return apart.transpose(2, 3, 0, 1, 4).reshape(sources * count, -1)[:, :total]
