"""Decode: scores and selection of one query per sequence, each over its own cached keys.

One grid step scores up to 16 sequences against a chunk of their keys. A sequence's keys are the stationary operand and
its heads stream past them, so that FP8 codes go to the matrix unit as they are and no key is converted. Heads lie on
sublanes: 8 sequences' sums are folded into the 8 rows of one register. Stacked caches are read in place: the layer is
a prefetched scalar.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32, Shaped

from kernels_pallas.index_topk import kernel_list, kernel_scores, kernel_threshold
from kernels_pallas.index_topk.block_sizes import SEQUENCES, Blocks
from kernels_pallas.tpu import LANES, SUBLANES, Chip, array_bytes, cdiv, compiler_params, vmem_with_room

_COLUMNS = 512
"""Keys per matrix product: the sums of 8 sequences stay in registers."""


def _fold(sums: list[jax.Array]) -> Float[Array, "8 C"]:
    """Row b is the sum over the 8 rows of sums[b]."""
    row = jax.lax.broadcasted_iota(jnp.int32, sums[0].shape, 0)
    distance = SUBLANES // 2
    while distance:
        is_upper = (row & distance) != 0
        half = len(sums) // 2
        sums = [
            jnp.where(is_upper, b + pltpu.roll(b, distance, 0), a + pltpu.roll(a, SUBLANES - distance, 0))
            for a, b in zip(sums[:half], sums[half:], strict=True)
        ]
        distance //= 2
    return sums[0]


def _scores(q: jax.Array, weights: jax.Array, keys: jax.Array) -> Float[Array, "8 C"]:
    """Scores of one query, still to be summed over the rows: q [N, H], weights [N, 128] (lanes alike), keys [C, H]."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    products = jax.lax.dot_general(
        q, keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    total = jnp.zeros((SUBLANES, products.shape[1]), jnp.float32)
    for head in range(0, products.shape[0], SUBLANES):
        weight = jnp.concatenate([weights[head : head + SUBLANES]] * (products.shape[1] // LANES), axis=1)
        total = total + jnp.maximum(products[head : head + SUBLANES], 0.0) * weight
    return total


def _kernel(
    layer: Any, ends: Any, q: Any, weights: Any, visible: Any, *others: Any,
    blocks: Blocks, sequences: int, has_scale: bool, skip: bool,
) -> None:  # fmt: skip
    del layer
    spec, step = blocks.rows, blocks.keys
    keys, rest = others[:sequences], list(others[sequences:])
    scale = rest.pop(0) if has_scale else None
    out, scores, spread, threshold, room, words = rest
    chunk = pl.program_id(1)
    end = ends[pl.program_id(0)] if skip else blocks.chunks

    @pl.when(chunk == 0)
    def _() -> None:
        for b in range(sequences):
            spread[b] = jnp.broadcast_to(weights[0, :, b : b + 1], spread.shape[1:])
        kernel_scores.clear_padding(scores, spec, blocks.chunks * step)

    def eight(first: int, window: Any, size: int) -> jax.Array:
        """Scores of 8 sequences; zero for those that no group has."""
        if first >= sequences:
            return jnp.zeros((SUBLANES, size), jnp.float32)
        sums = [
            _scores(q[b], spread[b], keys[b][0, 0, window, :]) if b < sequences
            else jnp.zeros((SUBLANES, size), jnp.float32)
            for b in range(first, first + SUBLANES)
        ]  # fmt: skip
        return _fold(sums)

    def columns(index: Any, _: None) -> None:
        for at in range(0, blocks.columns, min(_COLUMNS, blocks.columns)):
            size = min(_COLUMNS, blocks.columns - at)
            start = pl.multiple_of(index * blocks.columns + at, LANES)
            window = pl.ds(start, size)
            value = jnp.concatenate([eight(b, window, size) for b in (0, SUBLANES)], axis=0)
            if scale is not None:
                value = value * scale[0, :, window]
            entry = chunk * step + start + jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
            value = kernel_scores.mask_where(entry < visible[...], value)
            kernel_scores.store(scores, spec, 0, chunk * step + start, value)

    if skip:

        @pl.when(chunk >= end)
        def _() -> None:
            kernel_scores.clear(scores, spec, chunk * step, step)

        @pl.when(chunk < end)
        def _() -> None:
            jax.lax.fori_loop(0, step // blocks.columns, columns, None)
    else:
        jax.lax.fori_loop(0, step // blocks.columns, columns, None)

    @pl.when(chunk == blocks.chunks - 1)
    def _() -> None:
        groups = kernel_scores.groups_of(spec, 0, end, step)
        kernel_threshold.find_threshold(scores, threshold, room, spec, *groups)
        kernel_list.write_list(scores, threshold, room, words, out, spec, *groups)


def select_decode(
    layer: Int32[Array, "1"],
    ends: Int32[Array, " G"],
    q: Float[Array, "B N H"],
    weights: Float[Array, "G N 16"],
    visible: Int32[Array, "B 1"],
    keys: Shaped[Array, "L B P H"],
    scale: Float[Array, "L B P"] | None,
    *,
    blocks: Blocks,
    chip: Chip,
    skip: bool = True,
) -> Int[Array, "B K"]:
    """The kernel on arranged operands; `pallas` arranges.

    Args:
      layer: which of the stacked caches is read.
      ends: per group of 16 sequences, the chunk after the last with a visible key.
      q: N is a multiple of 8.
      weights: float32, sequences of a group last.
      visible: how many of its first keys each sequence sees.
      scale: of each key, where `keys` are codes.
      skip: whether chunks beyond `ends` are left out. False gives the fixed trip counts that a cycle figure needs.

    Returns:
      int32, slots padded to whole lanes.
    """
    batch, heads, width = q.shape
    spec, step = blocks.rows, blocks.keys

    def chunk_of(g: Any, c: Any, ends: Any) -> Any:
        return jnp.maximum(jnp.minimum(c, ends[g] - 1), 0) if skip else c

    # One window per sequence: contiguous, and none beyond the last sequence.
    def keys_of(b: int, g: Any, c: Any, layer: Any, ends: Any) -> Any:
        return layer[0], jnp.minimum(g * SEQUENCES + b, batch - 1), chunk_of(g, c, ends), 0

    sequences = min(batch, SEQUENCES)
    in_specs = [
        pl.BlockSpec((SEQUENCES, heads, width), lambda g, c, layer, ends: (g, 0, 0)),
        pl.BlockSpec((1, heads, SEQUENCES), lambda g, c, layer, ends: (g, 0, 0)),
        pl.BlockSpec((SEQUENCES, 1), lambda g, c, layer, ends: (g, 0)),
        *[pl.BlockSpec((1, 1, step, width), functools.partial(keys_of, b)) for b in range(sequences)],
    ]
    operands = [q, weights, visible, *[keys] * sequences]
    if scale is not None:
        in_specs.append(
            pl.BlockSpec((1, SEQUENCES, step), lambda g, c, layer, ends: (layer[0], g, chunk_of(g, c, ends)))
        )
        operands.append(scale)
    slots = kernel_list.list_width(spec.topk)
    body = functools.partial(_kernel, blocks=blocks, sequences=sequences, has_scale=scale is not None, skip=skip)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cdiv(batch, SEQUENCES), blocks.chunks),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((SEQUENCES, slots), lambda g, c, layer, ends: (g, 0)),
            scratch_shapes=[
                kernel_scores.scratch(spec),
                pltpu.VMEM((SEQUENCES, heads, LANES), jnp.float32),
                *kernel_threshold.level_scratch(spec),
                kernel_list.list_scratch(spec),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, slots), jnp.int32),
        compiler_params=compiler_params(
            chip, semantics=("parallel", "arbitrary"), vmem_bytes=vmem_with_room(blocks.vmem_bytes, chip)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * cdiv(batch, SEQUENCES) * SEQUENCES * blocks.chunks * step * heads * width,
            transcendentals=0,
            bytes_accessed=_layer_bytes(keys)
            + (0 if scale is None else _layer_bytes(scale))
            + array_bytes(q, weights, visible)
            + 4 * batch * slots,
        ),
        name="index_topk_decode",
    )(layer, ends, *operands)


def _layer_bytes(stacked: jax.Array) -> int:
    """Of the one layer that is read."""
    return array_bytes(stacked) // stacked.shape[0]
