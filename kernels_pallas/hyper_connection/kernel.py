"""One pass over the residual streams between two sublayers: write, read, and the next sublayer's RMSNorm.

A grid step holds `tokens` tokens of all streams in VMEM, so that each stream crosses HBM once each way:

1. Mix: X'_k = post_k · out + Σ_j comb[j, k] · X_j on the vector unit, in float32, rounded once; sums of squares.
2. Project: fn · X'ᵀ on the matrix unit lands tokens on lanes. With bf16 streams `fn` is the sum of three bf16 parts,
   stacked in rows: exact to float32, in one pass.
3. Gates on [1, tokens] rows.
4. Collapse Σ_i pre_i · X'_i, rounded, then its RMSNorm; beside the collapse the Sinkhorn rounds, 128 tokens a row.

Tokens never mix, so that rows and sequences are one dimension here, and the rows of an incomplete block only spoil
themselves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hyper_connection import mixing
from kernels_pallas.hyper_connection.block_sizes import choose_blocks
from kernels_pallas.hyper_connection.layout import (
    Layout,
    Spec,
    pad_streams,
    rows_block,
    scalars_block,
    unpad_streams,
    whole_block,
)
from kernels_pallas.hyper_connection.mixing import split_bf16
from kernels_pallas.hyper_connection.sums import ROWS, dot, pack, sum_of, unpack
from kernels_pallas.tpu import LANES, array_bytes, compiler_params, current_chip, round_up, sublanes


def spread(rows: list[jax.Array], target: Any) -> None:
    """Turns [1, tokens] rows into [tokens, lanes] arrays of equal lanes: `target[i]` gets rows[i]."""
    padded = rows + [rows[0]] * (round_up(len(rows), 8) - len(rows))
    columns = jnp.transpose(jnp.concatenate(padded, axis=0))
    for i in range(len(rows)):
        target[i] = jnp.broadcast_to(columns[:, i : i + 1], target.shape[1:])


def sinkhorn_round(matrix: list[list[jax.Array]], eps: float) -> list[list[jax.Array]]:
    """Normalises rows, then columns; entries [source][target]."""
    return normalise_columns([[c * r for c in row] for row in matrix for r in (1.0 / (sum(row) + eps),)], eps)


def normalise_columns(matrix: list[list[jax.Array]], eps: float) -> list[list[jax.Array]]:
    """Divides each column by its sum + eps."""
    factors = [1.0 / (sum(column) + eps) for column in zip(*matrix, strict=True)]
    return [[c * f for c, f in zip(row, factors, strict=True)] for row in matrix]


def first_round(logits: list[list[jax.Array]], eps: float) -> list[list[jax.Array]]:
    """Softmax over targets, + eps, then columns."""
    matrix = []
    for row in logits:
        highest = functools.reduce(jnp.maximum, row)
        exponentials = [jnp.exp(c - highest) for c in row]
        factor = 1.0 / sum(exponentials)
        matrix.append([c * factor + eps for c in exponentials])
    return normalise_columns(matrix, eps)


def _seam_kernel(spec: Spec, *all_refs: Any) -> None:
    refs = list(all_refs)
    scale_ref, base_ref = refs.pop(0), refs.pop(0)
    out_ref, maps_ref = (refs.pop(0), refs.pop(0)) if spec.has_write else (refs[0], refs[0])
    places_ref = refs.pop(0) if spec.blocks.has_matrix_mix else None
    count, tokens, columns = spec.streams, spec.blocks.tokens, spec.blocks.columns
    stream_refs = [refs.pop(0) for _ in range(count)]
    fn_ref, gain_ref, x_ref = (refs.pop(0) for _ in range(3))
    new_ref = refs.pop(0) if spec.has_write else None
    new_maps_ref = None if spec.is_head else refs.pop(0)
    parts_ref, weights_ref, pre_ref, square_ref = refs
    width = gain_ref.shape[-1]
    dtype = x_ref.dtype
    new_refs = stream_refs
    if new_ref is not None:
        new_refs = [new_ref.at[:, k * width : (k + 1) * width] for k in range(count)]
    step = sublanes(dtype)
    rows = spec.fn_rows

    if dtype == jnp.bfloat16:

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            for part, value in enumerate(split_bf16(fn_ref[...])):
                parts_ref[part * rows : part * rows + spec.maps] = value

    fn_source = parts_ref if dtype == jnp.bfloat16 else fn_ref

    def lanes(start: jax.Array, size: int = LANES) -> Any:
        return pl.ds(pl.multiple_of(start, LANES), size)

    if spec.blocks.has_matrix_mix:
        mixing.fill_matrices(maps_ref, places_ref, weights_ref)
    elif spec.has_write:
        spread([maps_ref[i : i + 1] for i in range(count, count * (2 + count))], weights_ref)

    def mix_on_matrix_unit(at: Any, start: jax.Array) -> None:
        """Step 1 on the tile of tokens `at` in the slab of columns from `start`."""
        rows = [out_ref[at, lanes(start, columns)]]
        rows += [stream_refs[j][at, lanes(start, columns)] for j in range(count)]
        mixed = mixing.mix_tile([weights_ref[k, at] for k in range(count)], rows)
        squares = square_ref[at]
        for k in range(count):
            rounded = mixed[k * mixing.TILE : (k + 1) * mixing.TILE].astype(dtype)
            new_refs[k][at, lanes(start, columns)] = rounded
            wide = jnp.square(rounded.astype(jnp.float32))
            for lane in range(0, columns, LANES):
                squares += wide[:, lane : lane + LANES]
        square_ref[at] = squares

    def mix_on_vector_unit(at: Any, start: jax.Array) -> None:
        squares = square_ref[at]
        for lane in range(0, columns, LANES):
            if not spec.has_write:
                for k in range(count):
                    squares += jnp.square(stream_refs[k][at, lanes(start + lane)].astype(jnp.float32))
                continue
            out = out_ref[at, lanes(start + lane)].astype(jnp.float32)
            old = [stream_refs[j][at, lanes(start + lane)].astype(jnp.float32) for j in range(count)]
            for k in range(count):
                new = weights_ref[k, at] * out
                for j in range(count):
                    new = new + weights_ref[count + count * j + k, at] * old[j]
                rounded = new.astype(dtype)
                new_refs[k][at, lanes(start + lane)] = rounded
                squares += jnp.square(rounded.astype(jnp.float32))
        square_ref[at] = squares

    def mix(start: jax.Array) -> None:
        mix_tile = mix_on_matrix_unit if spec.blocks.has_matrix_mix else mix_on_vector_unit
        for t in range(0, tokens, step):
            mix_tile(pl.ds(t, step), start)

    square_ref[...] = jnp.zeros_like(square_ref)
    jax.lax.fori_loop(0, width // columns, lambda i, _: mix(i * columns), None)
    product = sum_of(dot(fn_source[:, k * width : (k + 1) * width], new_refs[k][...], ROWS) for k in range(count))
    if dtype == jnp.bfloat16:
        product = (product[2 * rows : 3 * rows] + product[rows : 2 * rows]) + product[:rows]
    squares = dot(jnp.ones((8, LANES), jnp.float32), square_ref[...], ROWS)[:1]
    inverse = jax.lax.rsqrt(squares / (count * spec.width) + spec.norm_eps)

    def row(i: int) -> jax.Array:
        scale = scale_ref[0 if i < count else 1 if i < 2 * count else 2]
        return product[i : i + 1] * inverse * scale + base_ref[i]

    pre = [jax.nn.sigmoid(row(i)) + spec.eps for i in range(count)]
    spread(pre, pre_ref)
    matrix: list[list[jax.Array]] = []
    if new_maps_ref is not None:
        logits = [[pack(row(2 * count + count * j + k)) for k in range(count)] for j in range(count)]
        matrix = first_round(logits, spec.eps)

    def collapse(rounds: int, first: int, t: jax.Array, matrix: list[list[jax.Array]]) -> list[list[jax.Array]]:
        at = pl.ds(pl.multiple_of((first + t) * step, step), step)
        weights = [pre_ref[i, at] for i in range(count)]
        for _ in range(rounds):
            matrix = sinkhorn_round(matrix, spec.eps)

        def tile(c: jax.Array, squares: jax.Array) -> jax.Array:
            parts = [weights[i] * new_refs[i][at, lanes(c * LANES)].astype(jnp.float32) for i in range(count)]
            x = functools.reduce(jnp.add, parts).astype(dtype)
            x_ref[at, lanes(c * LANES)] = x
            return squares + jnp.square(x.astype(jnp.float32))

        zero = jnp.zeros((step, LANES), jnp.float32)
        square_ref[at] = jax.lax.fori_loop(0, width // LANES, tile, zero, unroll=True)
        return matrix

    # The rounds are one long dependent chain: they run beside the collapse, whose tiles do not wait for each other.
    tiles = tokens // step
    rounds, more = divmod(spec.iterations - 1, tiles) if matrix else (0, 0)
    matrix = jax.lax.fori_loop(0, more, functools.partial(collapse, rounds + 1, 0), matrix)
    matrix = jax.lax.fori_loop(0, tiles - more, functools.partial(collapse, rounds, more), matrix)
    if new_maps_ref is not None:
        for i in range(count):
            new_maps_ref[i : i + 1] = pre[i]
            new_maps_ref[count + i : count + i + 1] = 2 * jax.nn.sigmoid(row(count + i))
            for k in range(count):
                at = 2 * count + count * i + k
                new_maps_ref[at : at + 1] = unpack(matrix[i][k])
    mean = jnp.sum(square_ref[...], axis=1, keepdims=True) / spec.width
    square_ref[...] = jnp.broadcast_to(jax.lax.rsqrt(mean + spec.norm_eps), square_ref.shape)

    def normalise(t: jax.Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(t * step, step), step)
        inverse = square_ref[at]

        def tile(c: jax.Array, _: None) -> None:
            cols = lanes(c * LANES)
            x_ref[at, cols] = (x_ref[at, cols].astype(jnp.float32) * inverse * gain_ref[:, cols]).astype(dtype)

        jax.lax.fori_loop(0, width // LANES, tile, None, unroll=True)

    jax.lax.fori_loop(0, tokens // step, normalise, None)


def seam_forward(
    out: jax.Array | None,
    streams: jax.Array,
    maps: jax.Array | None,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    gain: jax.Array,
    *,
    is_head: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The normed input of the next sublayer, the streams, and the maps (None for the head).

    Args:
      out: [B, S, D], with maps [M, B, S]: what to write first, or None.
      streams: [B, S, C · D], stream-major.
      fn: [M, C · D] or, for the head, [C, C · D]; base likewise; scale [3] or [1].
      gain: [D], of the norm.
    """
    layout = Layout.of(streams, gain)
    total, count, width, padded = layout.total, layout.streams, layout.width, layout.padded
    chip = current_chip()
    blocks = choose_blocks(chip, total, count, width, streams.dtype, has_write=out is not None, is_head=is_head)
    spec = Spec(count, width, out is not None, is_head, iterations, eps, norm_eps, blocks)
    tokens = blocks.tokens
    # Maps have tokens on lanes, where a block is either whole lanes or all there is: a single block is all there is.
    on_lanes = max(total, tokens)

    def lanes(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((size, tokens), lambda t: (0, t))

    operands: list[Any] = [scale, base]
    in_specs: list[Any] = [scalars_block()] * 2
    if out is not None:
        assert maps is not None
        operands += [
            layout.rows(out),
            jnp.pad(maps.reshape(len(maps), total), ((0, round_up(len(maps), 8) - len(maps)), (0, on_lanes - total))),
        ]
        in_specs += [rows_block(tokens, padded), lanes(round_up(len(maps), 8))]
    if blocks.has_matrix_mix:
        places = jnp.asarray(mixing.places(count), jnp.bfloat16)
        operands.append(places)
        in_specs.append(whole_block(*places.shape))
    operands += [
        *[layout.rows(streams)] * count,  # a block and so a copy for each: the first block's are in flight together
        pad_streams(fn, count, padded),
        pad_streams(gain[None], 1, padded),
    ]
    in_specs += [
        *(rows_block(tokens, padded, k) for k in range(count)),
        whole_block(spec.maps, count * padded),
        whole_block(1, padded),
    ]
    shapes: list[Any] = [jax.ShapeDtypeStruct((total, padded), streams.dtype)]
    out_specs: list[Any] = [rows_block(tokens, padded)]
    if out is not None:
        shapes.append(jax.ShapeDtypeStruct((total, count * padded), streams.dtype))
        out_specs.append(rows_block(tokens, count * padded))
    if not is_head:
        shapes.append(jax.ShapeDtypeStruct((spec.maps, on_lanes), jnp.float32))
        out_specs.append(lanes(spec.maps))
    parts = (3 * spec.fn_rows, count * padded) if streams.dtype == jnp.bfloat16 else (16, LANES)
    weights = pltpu.VMEM((count * (count + 1), tokens, LANES), jnp.float32)
    if blocks.has_matrix_mix:
        weights = pltpu.VMEM((count, tokens, round_up(mixing.depth(count), LANES)), jnp.bfloat16)
    results = pl.pallas_call(
        functools.partial(_seam_kernel, spec),
        grid=(pl.cdiv(total, tokens),),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM(parts, jnp.bfloat16),
            weights,
            pltpu.VMEM((count, tokens, LANES), jnp.float32),
            pltpu.VMEM((tokens, LANES), jnp.float32),
        ],
        compiler_params=compiler_params(chip, semantics=("arbitrary",), vmem_bytes=blocks.vmem_limit),
        cost_estimate=_cost(spec, pl.cdiv(total, tokens), operands, shapes),
        name="hyper_connection_head" if is_head else "hyper_connection_seam",
    )(*operands)
    results = list(results)
    x = results.pop(0)[:, :width].reshape(layout.batch, layout.length, width)
    new = streams if out is None else unpad_streams(results.pop(0), count, width).reshape(streams.shape)
    return x, new, None if is_head else results.pop(0)[:, :total].reshape(spec.maps, layout.batch, layout.length)


def _cost(spec: Spec, steps: int, operands: list[Any], results: list[Any]) -> pl.CostEstimate:
    """Work of the whole grid: the products with `fn`, with the maps written and with those read, each counted once."""
    tokens = steps * spec.blocks.tokens
    per_value = spec.maps + (spec.streams + 1 if spec.has_write else 0) + 1
    return pl.CostEstimate(
        flops=2 * tokens * spec.streams * round_up(spec.width, LANES) * per_value,
        transcendentals=tokens * (spec.maps + 2 * spec.streams * spec.iterations),
        bytes_accessed=array_bytes(*{id(x): x for x in operands}.values(), *results),  # of streams, all in one
    )
