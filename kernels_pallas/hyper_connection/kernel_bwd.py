"""Backward kernel of the seam: every gradient in one pass over the residual streams, gates and rounds made again.

It reads what the forward kernel read, and the streams that one wrote, which the next seam keeps as its own input
anyway. A grid step holds `tokens` tokens of all streams in VMEM:

1. Sums of squares of the written streams X', projection fn · X'ᵀ as in the forward kernel, gates.
2. With g = dx · gain and w = Σ_i pre_i · X'_i, the sums over columns A_i = Σ g · X'_i and B_i = Σ w · X'_i give those
   of the norm, Σ w² = Σ_i pre_i · B_i and Σ g · w = Σ_i pre_i · A_i, and the gates' cotangents. Beside these sums the
   Sinkhorn rounds are recorded (`sinkhorn_bwd`).
3. Back through gates and rounds on [1, tokens] rows, to the cotangent dy of the projection.
4. Slab of columns by slab: dyᵀ · fn and the gradient dy · X' on the matrix unit; then on the vector unit, in float32,
   dX'_k = d_new_k + pre_k · dw + (dyᵀ · fn)_k − X'_k · q (q: the share of the RMS). Of what was written the cotangents
   d_out = Σ_k post_k · dX'_k and d_old_j = Σ_k comb[j, k] · dX'_k, and their weights' sums over columns: on the matrix
   unit in groups of tokens, for which dX' is rounded to bf16 (`mixing_bwd`), else on the vector unit.

Sums over tokens (of fn, base, scale, gain) stay in VMEM for the whole grid. Rows behind the last token are cleared
first: their cotangents are 0 then, so that they add nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.hyper_connection import mixing_bwd, sinkhorn_bwd
from kernels_pallas.hyper_connection.kernel import spread
from kernels_pallas.hyper_connection.layout import Spec
from kernels_pallas.hyper_connection.mixing import split_bf16
from kernels_pallas.hyper_connection.sums import (
    PLAIN,
    ROWS,
    clear_rows,
    dot,
    fold_rows,
    lane_sums,
    pack,
    sum_of,
    unpack,
)
from kernels_pallas.tpu import LANES, SUBLANES, sublanes


def backward_kernel(spec: Spec, total: int, *all_refs: Any) -> None:
    """The grid step.

    refs: scale [3 or 1] and base [M] in SMEM; with a write out [tokens, D], maps [M, tokens] and old streams
    [tokens, C · D]; the written streams, d(x) [tokens, D], d(new streams), unless of the head d(new maps), fn
    [rows, C · D], gain [1, D]. Results: with a write d(out) and d(post, comb); d(streams), d(fn), [2 · rows, tokens]
    sums of d(gates) and of d(gates) × what scale multiplies, d(gain). Scratch as `backward.seam_backward` lists it.
    """
    waiting = iter(all_refs)
    scale_ref, base_ref = next(waiting), next(waiting)
    out_ref, maps_ref = (next(waiting) if spec.has_write else None for _ in range(2))
    old_refs = [next(waiting) for _ in range(spec.streams if spec.has_write else 0)]
    new_refs = [next(waiting) for _ in range(spec.streams)]
    dx_ref = next(waiting)
    d_new_refs = [next(waiting) for _ in range(spec.streams)]
    d_new_maps_ref = None if spec.is_head else next(waiting)
    fn_ref, gain_ref = next(waiting), next(waiting)
    d_out_ref, d_maps_ref = (next(waiting) if spec.has_write else None for _ in range(2))
    d_streams_ref, d_fn_ref, d_rows_ref, d_gain_ref = (next(waiting) for _ in range(4))
    columns_ref, weights_ref, sums_ref, through_ref, left_ref, right_ref, *rest = waiting
    dtype = dx_ref.dtype
    parts_ref = rest.pop(0) if dtype == jnp.bfloat16 else None
    rounds_ref = None if spec.is_head else rest.pop(0)
    matrix_ref = rest.pop(0) if rest else None
    size = mixing_bwd.group_tokens(spec.streams, spec.blocks.tokens, dtype) or 0
    count, rows, tokens, columns = spec.streams, spec.fn_rows, spec.blocks.tokens, spec.blocks.columns
    width = gain_ref.shape[-1]
    d_stream_refs = [d_streams_ref.at[:, k * width : (k + 1) * width] for k in range(count)]
    written: list[tuple[Any, Any]] = []
    if spec.has_write:
        written = list(zip([out_ref, *old_refs], [d_out_ref, *d_stream_refs], strict=True))
    step = sublanes(dtype)
    pre_at, norm_at, out_at = 0, count, count + 3  # in weights: pre; rho, pull, q; then post and comb

    def lanes(start: Any, size: int = LANES) -> Any:
        return pl.ds(pl.multiple_of(start, LANES), size)

    def wide(ref: Any, at: Any, start: Any) -> jax.Array:
        return ref[at, lanes(start)].astype(jnp.float32)

    def each_block(body: Any, state: Any = None) -> Any:
        return jax.lax.fori_loop(
            0, tokens // step, lambda t, carried: body(pl.ds(pl.multiple_of(t * step, step), step), carried), state
        )

    def each_group(body: Any, state: Any = None) -> Any:
        def group(t: jax.Array, carried: Any) -> Any:
            return body(pl.ds(pl.multiple_of(t * size, size), size), carried, group=t)

        return jax.lax.fori_loop(0, tokens // size, group, state, unroll=True)

    def fill_group(at: Any, _: None, group: Any) -> None:
        assert matrix_ref is not None
        weights = [[weights_ref[out_at + count * j + k, at] for k in range(count)] for j in range(count + 1)]
        mixing_bwd.fill_weights(matrix_ref.at[group], weights)

    def each_tile(body: Any, state: Any) -> Any:
        return jax.lax.fori_loop(0, width // LANES, lambda c, carried: body(c * LANES, carried), state, unroll=True)

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        for ref in (d_fn_ref, d_rows_ref, d_gain_ref):
            ref[...] = jnp.zeros_like(ref)
        if parts_ref is not None:
            high, middle, low = split_bf16(fn_ref[...])
            for part, value in enumerate((high, middle, low, high)):
                parts_ref[part * rows : (part + 1) * rows] = value

    if total % tokens:

        @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
        def _() -> None:
            for ref in (out_ref, *old_refs, *new_refs, dx_ref, *d_new_refs):
                if ref is not None:
                    clear_rows(ref, total % tokens)

    # 1. Squares, projection, gates.
    zero = jnp.zeros((step, LANES), jnp.float32)

    def squares(at: Any, _: None) -> None:
        def tile(start: Any, found: jax.Array) -> jax.Array:
            return found + sum_of(jnp.square(wide(ref, at, start)) for ref in new_refs)

        columns_ref[at] = lane_sums([each_tile(tile, zero)])

    each_block(squares)
    inverse = jax.lax.rsqrt(jnp.transpose(columns_ref[...])[:1] / (count * spec.width) + spec.norm_eps)
    fn_source = fn_ref if parts_ref is None else parts_ref
    exact = rows if parts_ref is None else 3 * rows
    product = sum_of(dot(fn_source[:exact, k * width : (k + 1) * width], new_refs[k][...], ROWS) for k in range(count))
    if parts_ref is not None:
        product = (product[2 * rows :] + product[rows : 2 * rows]) + product[:rows]
    scales = [scale_ref[0 if i < count else 1 if i < 2 * count else 2] for i in range(spec.maps)]
    scaled = [product[i : i + 1] * inverse for i in range(spec.maps)]
    gates = [scaled[i] * scales[i] + base_ref[i] for i in range(spec.maps)]
    read = [jax.nn.sigmoid(gates[i]) for i in range(count)]
    pre = [gate + spec.eps for gate in read]
    spread(pre, weights_ref.at[pre_at:norm_at])
    matrix = []
    if rounds_ref is not None:
        logits = [[pack(gate) for gate in gates[count * (2 + j) : count * (3 + j)]] for j in range(count)]
        matrix = sinkhorn_bwd.record_first(logits, rounds_ref, spec.eps)

    # 2. The collapse and its norm.
    def collapsed(weights: list[jax.Array], new: list[jax.Array]) -> jax.Array:
        return sum_of(weight * x for weight, x in zip(weights, new, strict=True))

    # The rounds are one long dependent chain: they run beside the collapse, whose tiles do not wait for each other.
    rounds, more = divmod(spec.iterations - 1, tokens // step) if matrix else (0, 0)

    def collapse(rounds: int, first: int, t: Any, matrix: Any) -> Any:
        for i in range(rounds):
            # `first` tiles before had a round more each.
            matrix = sinkhorn_bwd.record_round(first * (rounds + 1) + t * rounds + i, matrix, rounds_ref, spec.eps)
        at = pl.ds(pl.multiple_of((first + t) * step, step), step)
        weights = [weights_ref[pre_at + i, at] for i in range(count)]

        def tile(start: Any, found: list[jax.Array]) -> list[jax.Array]:
            new = [wide(ref, at, start) for ref in new_refs]
            g = wide(dx_ref, at, start) * gain_ref[:, lanes(start)]
            w = collapsed(weights, new)
            return [
                total + factor * x for total, factor, x in zip(found, [g] * count + [w] * count, new * 2, strict=True)
            ]

        columns_ref[at] = lane_sums(each_tile(tile, [zero] * (2 * count)))
        return matrix

    matrix = jax.lax.fori_loop(0, more, functools.partial(collapse, rounds + 1, 0), matrix)
    jax.lax.fori_loop(0, tokens // step - more, functools.partial(collapse, rounds, more), matrix)
    turned = jnp.transpose(columns_ref[...])
    by_g, by_w = ([turned[i : i + 1] for i in range(k, k + count)] for k in (0, count))
    rho = jax.lax.rsqrt(sum_of(p * b for p, b in zip(pre, by_w, strict=True)) / spec.width + spec.norm_eps)
    pull = rho * rho * rho * sum_of(p * a for p, a in zip(pre, by_g, strict=True)) / spec.width

    # 3. Gates and rounds.
    d_gates = [(rho * by_g[i] - pull * by_w[i]) * read[i] * (1 - read[i]) for i in range(count)]
    if d_new_maps_ref is not None:
        assert rounds_ref is not None
        for i in range(count, 2 * count):
            gate = jax.nn.sigmoid(gates[i])
            d_gates.append(2 * d_new_maps_ref[i : i + 1] * gate * (1 - gate))
        d_comb = [
            [pack(d_new_maps_ref[i : i + 1]) for i in range(count * (2 + j), count * (3 + j))] for j in range(count)
        ]  # fmt: skip
        d_gates += [unpack(d) for row in sinkhorn_bwd.differentiate(d_comb, rounds_ref, spec.iterations) for d in row]
    for i in range(spec.maps):
        d_rows_ref[i : i + 1] += d_gates[i]
        d_rows_ref[rows + i : rows + i + 1] += d_gates[i] * scaled[i]
    d_scaled = [d * scale for d, scale in zip(d_gates, scales, strict=True)]
    share = inverse * inverse / (count * spec.width) * sum_of(d * y for d, y in zip(d_scaled, scaled, strict=True))
    spread([rho, pull, share], weights_ref.at[norm_at:out_at])
    if maps_ref is not None:
        spread([maps_ref[i : i + 1] for i in range(count, count * (2 + count))], weights_ref.at[out_at:])
        sums_ref[...] = jnp.zeros_like(sums_ref)
        if matrix_ref is not None:
            each_group(fill_group)
    dy = jnp.concatenate([d * inverse for d in d_scaled] + [jnp.zeros_like(rho)] * (rows - spec.maps), axis=0)
    if parts_ref is None:
        left_ref[...] = jnp.transpose(dy)
        right_ref[...] = dy
    else:
        high, middle, low = (part.astype(jnp.float32) for part in split_bf16(dy))
        # Against fn's high, middle, low, high: what is left out is below 2^-16 of the product.
        left_ref[...] = jnp.transpose(jnp.concatenate([high, high, high, middle], axis=0)).astype(dtype)
        right_ref[...] = jnp.concatenate([high, middle, low], axis=0).astype(dtype)

    # 4. Columns.
    def slab(start: Any) -> None:
        for k in range(count):
            at = pl.ds(pl.multiple_of(k * width + start, LANES), columns)
            through_ref[k] = dot(left_ref[...], fn_source[:, at], PLAIN)
            d_fn = dot(right_ref[...], new_refs[k][:, lanes(start, columns)], PLAIN)
            if parts_ref is not None:
                d_fn = (d_fn[2 * rows :] + d_fn[rows : 2 * rows]) + d_fn[:rows]
            d_fn_ref[:, at] += d_fn
        body, each = (by_vector, each_block) if matrix_ref is None else (by_matrix, each_group)
        zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * (columns // LANES)
        d_gain = each(functools.partial(body, start), zeros)
        for i, value in enumerate(d_gain):
            d_gain_ref[:, lanes(start + i * LANES)] += jnp.sum(value, axis=0, keepdims=True)

    def cotangents(slab_start: Any, lane: int, at: Any) -> tuple[list[jax.Array], jax.Array]:
        """The cotangents X' of a tile of every stream, and dx · w / RMS, whose sum over tokens is d(gain)."""
        start = slab_start + lane
        rho, pull, share = (weights_ref[norm_at + i, at] for i in range(3))
        weights = [weights_ref[pre_at + k, at] for k in range(count)]
        new = [wide(ref, at, start) for ref in new_refs]
        dx = wide(dx_ref, at, start)
        w = collapsed(weights, new)
        dw = rho * (dx * gain_ref[:, lanes(start)]) - pull * w
        found = []
        for k in range(count):
            through = through_ref[k, at, lane : lane + LANES] - share * new[k]
            found.append((wide(d_new_refs[k], at, start) + weights[k] * dw) + through)
        return found, fold_rows(dx * (rho * w))

    def by_vector(start: Any, at: Any, d_gain: list[jax.Array]) -> list[jax.Array]:
        found = []
        for lane in range(0, columns, LANES):
            d_new, by_gain = cotangents(start, lane, at)
            found.append(d_gain[lane // LANES] + by_gain)
            if out_ref is None:
                for k in range(count):
                    d_stream_refs[k][at, lanes(start + lane)] = d_new[k].astype(dtype)
                continue
            for j, (source, target) in enumerate(written):
                old = wide(source, at, start + lane)
                here = [count * j + k for k in range(count)]
                target[at, lanes(start + lane)] = sum_of(
                    weights_ref[out_at + i, at] * d for i, d in zip(here, d_new, strict=True)
                ).astype(dtype)
                for i, d in zip(here, d_new, strict=True):
                    sums_ref[i, at] += old * d
        return found

    def by_matrix(start: Any, at: Any, d_gain: list[jax.Array], group: Any) -> list[jax.Array]:
        assert matrix_ref is not None
        tiles = [cotangents(start, lane, at) for lane in range(0, columns, LANES)]
        d_new = jnp.concatenate(
            [jnp.concatenate([found[k].astype(dtype) for found, _ in tiles], axis=1) for k in range(count)], axis=0
        )
        # Both of the weights' parts meet the same d_new.
        mixed = dot(matrix_ref[group], jnp.concatenate([d_new, d_new], axis=0), PLAIN)
        old = []
        here = lanes(start, columns)
        for j, (source, target) in enumerate(written):
            target[at, here] = mixed[j * size : (j + 1) * size].astype(dtype)
            old.append(source[at, here])
        sums_ref[group] += dot(jnp.concatenate(old, axis=0), d_new, ROWS)
        return [value + by_gain for value, (_, by_gain) in zip(d_gain, tiles, strict=True)]

    jax.lax.fori_loop(0, width // columns, lambda i, _: slab(i * columns), None)
    if d_maps_ref is None:
        return
    if matrix_ref is not None:
        for group in range(tokens // size):
            for j, row in enumerate(mixing_bwd.diagonals(sums_ref[group], size)):
                d_maps_ref[group * (count + 1) + j : group * (count + 1) + j + 1] = row
        return

    def weight_sums(at: Any, _: None) -> None:
        columns_ref[at] = lane_sums([sums_ref[i, at] for i in range(count * (count + 1))])

    each_block(weight_sums)
    d_maps_ref[...] = jnp.transpose(columns_ref[...])[: count * (count + 1)]
