"""Prefill: scores and selection of many queries over the keys of their sequence.

One grid step scores a tile of queries against a chunk of keys: 16 queries × 64 heads are rows of the matrix product, in
the order (group of 8 queries, head, query), so that ReLU, weight and the sum over heads are element-wise on whole
registers. The tile's scores stay in VMEM; after the last chunk `kernel_threshold` finds each query's k-th and
`kernel_select` or `kernel_list` writes what is chosen. Chunks that no query of the tile may see are neither read nor
scored.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from kernels_pallas.index_topk import kernel_list, kernel_scores, kernel_select, kernel_threshold
from kernels_pallas.index_topk.block_sizes import Blocks
from kernels_pallas.tpu import (
    LANES,
    SUBLANES,
    Chip,
    array_bytes,
    compiler_params,
    mean_visible,
    round_up,
    vmem_with_room,
)

_COLUMNS = 512
"""Keys per matrix product: its sums over heads stay in registers."""
_PAIR = 2 * SUBLANES


def _scores(q: jax.Array, weights: Any, first_weight: Any, keys: jax.Array, heads: int) -> Float[Array, "16 C"]:
    """Unmasked scores of 16 queries: q [16·heads, H], weights: reference [·, 8, 128], keys [C, H]."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    products = jax.lax.dot_general(
        q, keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    lanes = products.shape[1] // LANES
    halves = []
    for half in range(2):
        total = jnp.zeros((SUBLANES, products.shape[1]), jnp.float32)
        for head in range(heads):
            row = half * heads + head
            weight = jnp.concatenate([weights[first_weight + row]] * lanes, axis=1)
            total = total + jnp.maximum(products[SUBLANES * row : SUBLANES * (row + 1)], 0.0) * weight
        halves.append(total)
    return jnp.concatenate(halves, axis=0)


def _order(q: Any, ordered: Any, staged: Any, heads: int, pair: Any, _: None) -> None:
    """Copies 16 queries into the order (group of 8, head, query).

    Rows are picked by strided loads, which only 32-bit values have: hence the float32 stage.
    """
    stride = staged.shape[0] // _PAIR
    for query in range(_PAIR):
        rows = q[0, pair * _PAIR + query].astype(jnp.float32)
        staged[query * stride : query * stride + heads, :] = rows
    for unit in range(0, 2 * heads, 2):
        picked = [
            staged[pl.ds(u // heads * SUBLANES * stride + u % heads, SUBLANES, stride=stride), :]
            for u in (unit, unit + 1)
        ]
        at = pl.multiple_of(pair * (_PAIR * heads) + unit * SUBLANES, _PAIR)
        ordered[pl.ds(at, _PAIR), :] = jnp.concatenate(picked, axis=0).astype(ordered.dtype)


def _kernel(
    span: Any, q: Any, weights: Any, queries: Any, keys: Any, entries: Any, *others: Any,
    blocks: Blocks, heads: int, has_scale: bool, output: str, skip: bool,
) -> None:  # fmt: skip
    spec, step = blocks.rows, blocks.keys
    rest = list(others)
    scale = rest.pop(0) if has_scale else None
    out, scores, ordered, staged, spread, threshold, room, *words = rest
    chunk = pl.program_id(2)
    tile = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    first, end = (span[2 * tile], span[2 * tile + 1]) if skip else (0, blocks.chunks)

    @pl.when(chunk == 0)
    def _() -> None:
        def spread_group(group: Any, _: None) -> None:
            rows = weights[0, pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES), :]
            for head in range(heads):
                spread[group * heads + head] = jnp.broadcast_to(rows[:, head : head + 1], (SUBLANES, LANES))

        jax.lax.fori_loop(0, spec.rows // SUBLANES, spread_group, None)
        jax.lax.fori_loop(0, spec.rows // _PAIR, functools.partial(_order, q, ordered, staged, heads), None)
        kernel_scores.clear_padding(scores, spec, blocks.chunks * step)

    def pair(index: Any, _: None) -> None:
        row = pl.multiple_of(index * _PAIR, _PAIR)
        these = queries[0, pl.ds(row, _PAIR), :]
        rows = ordered[pl.ds(pl.multiple_of(index * (_PAIR * heads), _PAIR), _PAIR * heads), :]
        for at in range(0, step, _COLUMNS):
            columns = slice(at, min(at + _COLUMNS, step))
            value = _scores(rows, spread, index * (2 * heads), keys[0, columns, :], heads)
            if scale is not None:
                value = value * scale[0, :, columns]
            value = kernel_scores.mask_scores(value, entries[0, :, columns], these)
            kernel_scores.store(scores, spec, row, chunk * step + at, value)

    if skip:
        is_seen = (chunk >= first) & (chunk < end)

        @pl.when(jnp.logical_not(is_seen))
        def _() -> None:
            kernel_scores.clear(scores, spec, chunk * step, step)

        @pl.when(is_seen)
        def _() -> None:
            jax.lax.fori_loop(0, spec.rows // _PAIR, pair, None)
    else:
        jax.lax.fori_loop(0, spec.rows // _PAIR, pair, None)

    @pl.when(chunk == blocks.chunks - 1)
    def _() -> None:
        groups = kernel_scores.groups_of(spec, first, end, step)
        kernel_threshold.find_threshold(scores, threshold, room, spec, *groups)
        if output == "mask":
            kernel_select.write_mask(scores, threshold, room, out.at[0], spec, *groups)
        else:
            kernel_list.write_list(scores, threshold, room, words[0], out.at[0], spec, *groups)


def select_prefill(
    span: Int32[Array, " spans"],
    q: Float[Array, "B S N H"],
    weights: Float[Array, "B S N"],
    queries: Int32[Array, "B S 2"],
    keys: Float[Array, "B P H"],
    entries: Int32[Array, "B 2 PP"],
    scale: Float[Array, "B 1 PP"] | None,
    *,
    blocks: Blocks,
    output: str,
    chip: Chip,
    skip: bool = True,
) -> Int[Array, "B S W"]:
    """The kernel on arranged operands; `pallas` arranges.

    Args:
      span: per batch row and tile of queries, the first chunk of keys with a visible one and the one after the last.
      q: S is a multiple of the tile.
      queries: position and segment. entries: end and segment, padded to whole chunks with some that are never visible.
      scale: of each key, where `keys` are codes.
      output: "mask" or "list".
      skip: whether chunks outside of `span` are left out. False gives the fixed trip counts that a cycle figure needs.

    Returns:
      int32, words of the bit mask or slots of the list, padded to whole lanes.
    """
    batch, queries_padded, heads = weights.shape
    spec, step, width = blocks.rows, blocks.keys, keys.shape[2]
    tiles = queries_padded // spec.rows

    def chunk_of(b: Any, i: Any, c: Any, span: Any) -> Any:
        if not skip:
            return c
        at = 2 * (b * tiles + i)
        return jnp.maximum(jnp.minimum(c, span[at + 1] - 1), span[at])

    def block(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), index)

    in_specs = [
        block((spec.rows, heads, width), lambda b, i, c, span: (b, i, 0, 0)),
        block((spec.rows, heads), lambda b, i, c, span: (b, i, 0)),
        block((spec.rows, 2), lambda b, i, c, span: (b, i, 0)),
        block((step, width), lambda b, i, c, span: (b, chunk_of(b, i, c, span), 0)),
        block((2, step), lambda b, i, c, span: (b, 0, chunk_of(b, i, c, span))),
    ]
    operands = [q, weights, queries, keys, entries]
    if scale is not None:
        in_specs.append(block((1, step), lambda b, i, c, span: (b, 0, chunk_of(b, i, c, span))))
        operands.append(scale)
    met = mean_visible(blocks.chunks) if skip else blocks.chunks
    is_mask = output == "mask"
    columns = kernel_select.mask_words(spec.width) if is_mask else kernel_list.list_width(spec.topk)
    body = functools.partial(_kernel, blocks=blocks, heads=heads, has_scale=scale is not None, output=output, skip=skip)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, tiles, blocks.chunks),
            in_specs=in_specs,
            out_specs=block((spec.rows, columns), lambda b, i, c, span: (b, i, 0)),
            scratch_shapes=[
                kernel_scores.scratch(spec),
                pltpu.VMEM((spec.rows * heads, width), q.dtype),
                pltpu.VMEM((_PAIR * round_up(heads, SUBLANES), width), jnp.float32),
                pltpu.VMEM((spec.rows // SUBLANES * heads, SUBLANES, LANES), jnp.float32),
                *kernel_threshold.level_scratch(spec),
                *([] if is_mask else [kernel_list.list_scratch(spec)]),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, queries_padded, columns), jnp.int32),
        compiler_params=compiler_params(
            chip, semantics=("parallel", "parallel", "arbitrary"), vmem_bytes=vmem_with_room(blocks.vmem_bytes, chip)
        ),
        cost_estimate=pl.CostEstimate(
            flops=round(2 * batch * tiles * spec.rows * heads * met * step * width),
            transcendentals=0,
            # Every tile of queries reads the keys that it meets again.
            bytes_accessed=array_bytes(q, weights, queries)
            + round(tiles * met / blocks.chunks * array_bytes(*operands[3:]))
            + 4 * batch * queries_padded * columns,
        ),
        name=f"index_topk_{output}",
    )(span, *operands)
