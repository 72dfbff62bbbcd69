"""Operands, blocks and results of the backward seam, around the grid step in `kernel_bwd`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hyper_connection import mixing_bwd, sinkhorn_bwd
from kernels_pallas.hyper_connection.block_sizes_bwd import choose_backward_blocks
from kernels_pallas.hyper_connection.kernel_bwd import backward_kernel
from kernels_pallas.hyper_connection.layout import (
    Layout,
    Spec,
    pad_streams,
    rows_block,
    scalars_block,
    unpad_streams,
    whole_block,
)
from kernels_pallas.tpu import LANES, array_bytes, cdiv, compiler_params, current_chip


def seam_backward(
    out: jax.Array | None,
    streams: jax.Array,
    maps: jax.Array | None,
    new: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    gain: jax.Array,
    d_x: jax.Array,
    d_new: jax.Array,
    d_new_maps: jax.Array | None,
    *,
    is_head: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Any, ...]:
    """Cotangents of out, streams, maps, fn, base, scale and gain, in their dtypes; None where there is no operand.

    Args:
      out, streams, maps, fn, base, scale, gain: as `kernel.seam_forward` has them.
      new: the streams that it gave, the same as `streams` where nothing was written.
      d_x, d_new, d_new_maps: cotangents of its results; None for the maps of the head.

    Raises:
      ValueError: not even one tile of tokens fits into VMEM.
    """
    layout = Layout.of(streams, gain)
    total, count, width, padded = layout.total, layout.streams, layout.width, layout.padded
    chip = current_chip()
    blocks = choose_backward_blocks(
        chip, total, count, width, streams.dtype, iterations=iterations, has_write=out is not None, is_head=is_head
    )
    spec = Spec(count, width, out is not None, is_head, iterations, eps, norm_eps, blocks)
    tokens, rows = blocks.tokens, spec.fn_rows
    grid = cdiv(total, tokens)
    size = mixing_bwd.group_tokens(count, tokens, streams.dtype) if out is not None else None
    groups = tokens // size if size else 0
    d_weights = (groups * (count + 1), LANES) if size else (count * (count + 1), tokens)

    # Blocks of whole lanes are columns of [M, tokens]; narrower ones need a dimension of their own.
    has_lanes = tokens % LANES == 0 or grid == 1

    def by_block(x: jax.Array) -> jax.Array:
        """[M, B, S] → [M, tokens] or [blocks, M, tokens], zeros behind the last token."""
        x = jnp.pad(x.reshape(len(x), total), ((0, 0), (0, grid * tokens - total)))
        return x if has_lanes else jnp.moveaxis(x.reshape(len(x), grid, tokens), 1, 0)

    one, deep = rows_block(tokens, padded), rows_block(tokens, count * padded)
    by_stream = [rows_block(tokens, padded, k) for k in range(count)]
    maps_block = pl.BlockSpec((None, count * (2 + count), tokens), lambda t: (t, 0, 0))
    if has_lanes:
        maps_block = pl.BlockSpec((count * (2 + count), tokens), lambda t: (0, t))
    operands: list[Any] = [scale, base]
    in_specs: list[Any] = [scalars_block()] * 2
    out_specs: list[Any] = []
    shapes: list[Any] = []
    if out is not None:
        assert maps is not None
        operands += [layout.rows(out), by_block(maps), *[layout.rows(streams)] * count]
        in_specs += [one, maps_block, *by_stream]
        out_specs += [one, pl.BlockSpec((None, *d_weights), lambda t: (t, 0, 0))]
        shapes.append(jax.ShapeDtypeStruct((total, padded), out.dtype))
        shapes.append(jax.ShapeDtypeStruct((grid, *d_weights), jnp.float32))
    operands += [*[layout.rows(new)] * count, layout.rows(d_x), *[layout.rows(d_new)] * count]
    in_specs += [*by_stream, one, *by_stream]
    if d_new_maps is not None:
        operands.append(by_block(d_new_maps))
        in_specs.append(maps_block)
    operands += [
        jnp.pad(pad_streams(fn, count, padded), ((0, rows - spec.maps), (0, 0))),
        pad_streams(gain[None], 1, padded),
    ]
    in_specs += [whole_block(rows, count * padded), whole_block(1, padded)]
    sums = [(rows, count * padded), (2 * rows, tokens), (1, padded)]
    out_specs += [deep, *(whole_block(*shape) for shape in sums)]
    shapes.append(jax.ShapeDtypeStruct((total, count * padded), streams.dtype))
    shapes += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums]

    is_split = streams.dtype == jnp.bfloat16
    scratch = [
        pltpu.VMEM((tokens, LANES), jnp.float32),  # sums over columns, one per lane
        pltpu.VMEM((count * (count + 2) + 3, tokens, LANES), jnp.float32),  # a weight in all lanes of its token
        # Partial sums of d(post), d(comb): of columns, or products of groups.
        pltpu.VMEM((groups, (count + 1) * size, LANES) if size else (count * (count + 1), tokens, LANES), jnp.float32),
        pltpu.VMEM((count, tokens, blocks.columns), jnp.float32),  # dyᵀ · fn
        pltpu.VMEM((tokens, 4 * rows if is_split else rows), streams.dtype),  # dyᵀ
        pltpu.VMEM((3 * rows if is_split else rows, tokens), streams.dtype),  # dy
    ]
    if is_split:
        scratch.append(pltpu.VMEM((4 * rows, count * padded), jnp.bfloat16))  # fn
    if not is_head:
        scratch.append(pltpu.VMEM(sinkhorn_bwd.record_shape(count, iterations, tokens), jnp.float32))
    if size:
        scratch.append(pltpu.VMEM((groups, (count + 1) * size, 2 * LANES), jnp.bfloat16))  # maps as matrices
    passes = 10 if is_split else 3  # products with fn's rows; beside them some 25 operations per pair of streams
    positions = grid * tokens * count * padded
    found = list(
        pl.pallas_call(
            functools.partial(backward_kernel, spec, total),
            grid=(grid,),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=shapes,
            scratch_shapes=scratch,
            compiler_params=compiler_params(chip, semantics=("arbitrary",), vmem_bytes=blocks.vmem_limit),
            cost_estimate=pl.CostEstimate(
                flops=positions * (2 * passes * rows + 30 + (4 * (count + 1) if spec.has_write else 0)),
                transcendentals=grid * tokens * (spec.maps + 2),
                bytes_accessed=array_bytes(*{id(x): x for x in operands}.values(), *shapes),
            ),
            name="hyper_connection_head_backward" if is_head else "hyper_connection_seam_backward",
        )(*operands)
    )
    d_out, d_maps = None, None
    if maps is not None:
        d_out = found.pop(0)[:, :width].reshape(layout.batch, layout.length, width)
        by_weight = found.pop(0)
        if size:
            by_weight = mixing_bwd.by_token(by_weight.reshape(grid, groups, count + 1, LANES), count, total)
        else:
            by_weight = jnp.moveaxis(by_weight, 0, 1).reshape(count * (count + 1), -1)[:, :total]
        d_maps = jnp.pad(by_weight, ((count, 0), (0, 0))).reshape(maps.shape)
    d_streams, d_fn, by_token, d_gain = found
    # A scan over layers stacks these: fused with that, the kernel would lose its own VMEM limit.
    d_fn = jax.lax.optimization_barrier(d_fn)
    d_base, d_scaled = jnp.sum(by_token.reshape(2, rows, tokens)[:, : spec.maps], axis=-1)
    group = np.zeros(spec.maps, int) if is_head else np.repeat(range(3), [count, count, count * count])
    members = group == np.arange(len(scale))[:, None]
    return (
        d_out,
        unpad_streams(d_streams, count, width).reshape(streams.shape),
        d_maps,
        unpad_streams(d_fn[: spec.maps], count, width),
        d_base,
        jnp.sum(jnp.where(members, d_scaled, 0.0), axis=-1),
        d_gain[0, :width],
    )
