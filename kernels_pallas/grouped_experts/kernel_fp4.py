"""Few tokens through FP4 experts of one layer of a stack, on a TPU: one grid step per tile of rows and its expert.

The pipeline fetches an expert's bytes from where they lie in the stack while the one before is multiplied; they are
dequantised in VMEM, a chunk at a time. All tokens and their sums stay in VMEM: a tile takes its rows, and adds its
outputs, by products with indicators, which are exact.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.formats import FP4_BLOCK
from kernels_pallas.grouped_experts.reference import swiglu
from kernels_pallas.grouped_experts.stacks import ExpertStack
from kernels_pallas.grouped_experts.tiles import Tiles
from kernels_pallas.tpu import Chip, compiler_params, tile_bytes, vmem_budget, vmem_with_room

_CODES = FP4_BLOCK // 2
"""Rows of bytes per scale."""
_DEPTH, _WIDTH = 512, 1024
"""Of a chunk that is dequantised at once: rows of bytes of w1 and w3, columns of w2."""
MAX_TOKENS = 128

Stacks = tuple[ExpertStack, ExpertStack, ExpertStack]


def _vmem(tokens: int, rows: int, hidden: int, width: int) -> int:
    codes = 2 * tile_bytes((hidden // 2, width), jnp.int8) + tile_bytes((width // 2, hidden), jnp.int8)
    scales = 2 * tile_bytes((hidden // FP4_BLOCK, width), jnp.int8)
    scales += tile_bytes((width // FP4_BLOCK, hidden), jnp.int8)
    whole = 2 * tile_bytes((tokens, hidden), jnp.bfloat16) + tile_bytes((tokens, hidden), jnp.float32)
    chunk = tile_bytes((max(_DEPTH * width, width // 2 * _WIDTH) // 128, 128), jnp.float32)
    return 2 * (codes + scales + whole) + tile_bytes((rows, hidden), jnp.float32) + 6 * chunk


def is_for(x: jax.Array, stacks: Stacks, rows: int, chip: Chip) -> bool:
    """Whether this is where the kernel runs: few bfloat16 tokens, and experts whose chunks are whole and fit VMEM.

    On v5p alone: the compiler divides its work between two cores there, and what one of them spreads or dequantises
    for the other goes through HBM, many times an expert's own bytes. Elsewhere it stays in VMEM (`tiles`).
    """
    if (
        chip.name != "v5p"
        or x.dtype != jnp.bfloat16
        or any(stack.layer is None or not stack.is_fp4 for stack in stacks)
    ):
        return False
    _, width, hidden = stacks[0].shape
    is_whole = width % 128 == 0 and hidden % (2 * _DEPTH) == 0 and hidden % _WIDTH == 0
    return is_whole and x.shape[0] <= MAX_TOKENS and _vmem(x.shape[0], rows, hidden, width) <= vmem_budget(chip)


def _halves(codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 values of the low and the high codes of bytes [R, O], with scales [R / 16, O]."""
    codes, rows = codes.astype(jnp.int32), codes.shape[0]
    spread = jnp.broadcast_to(scale.astype(jnp.float32)[:, None], (rows // _CODES, _CODES, codes.shape[1]))
    spread = spread.reshape(codes.shape)

    def values(code: jax.Array) -> jax.Array:
        # A code's last three bits are those of a float32 from its last exponent bit and first mantissa bits on, but
        # for subnormals: 2^126 puts the exponents right, and both kinds are then exact.
        magnitude = (code & 7) << 22
        bits = jnp.where((code & 7) < 2, 0, magnitude + (126 << 23))
        value = jnp.where((code & 7) == 1, 0.5, jax.lax.bitcast_convert_type(bits, jnp.float32))
        return (jnp.where((code & 8) != 0, -value, value) * spread).astype(jnp.bfloat16)

    return values(codes), values(codes >> 4)


def _dot(a: jax.Array, b: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def _every_other(x: jax.Array, first: int) -> jax.Array:
    """Columns `first`, `first` + 2, … of bfloat16 values, by a product: lanes cannot be strided over."""
    size = x.shape[1]
    column, place = (jax.lax.broadcasted_iota(jnp.int32, (size, size // 2), axis) for axis in (0, 1))
    return _dot(x, (column == 2 * place + first).astype(jnp.float32).astype(x.dtype)).astype(x.dtype)


def _kernel(layer, owner, column, line, share, x, w1, s1, w3, s3, w2, s2, out, even, odd, *, limit: float):
    del layer, owner

    @pl.when(pl.program_id(0) == 0)
    def _():
        out[...] = jnp.zeros_like(out)
        for start in range(0, x.shape[1], 2 * _DEPTH):
            for first, half in enumerate((even, odd)):
                half[:, start // 2 : start // 2 + _DEPTH] = _every_other(x[:, start : start + 2 * _DEPTH], first)

    tokens, rows = x.shape[0], column.shape[1]
    is_token = jax.lax.broadcasted_iota(jnp.int32, (rows, tokens), 1) == column[0]
    pick = is_token.astype(jnp.float32).astype(jnp.bfloat16)
    own_even, own_odd = (_dot(pick, half[...]).astype(jnp.bfloat16) for half in (even, odd))

    def into(codes, scale) -> jax.Array:
        total = jnp.zeros((rows, codes.shape[-1]), jnp.float32)
        for start in range(0, codes.shape[-2], _DEPTH):
            part = slice(start, start + _DEPTH)
            low, high = _halves(codes[0, 0, part], scale[0, 0, start // _CODES : (start + _DEPTH) // _CODES])
            total += _dot(own_even[:, part], low) + _dot(own_odd[:, part], high)
        return total

    z = (swiglu(into(w1, s1), into(w3, s3), limit) * share[0]).astype(jnp.bfloat16)
    z_even, z_odd = _every_other(z, 0), _every_other(z, 1)
    put = (jax.lax.broadcasted_iota(jnp.int32, (tokens, rows), 0) == line[0]).astype(jnp.float32)
    for start in range(0, out.shape[1], _WIDTH):
        part = slice(start, start + _WIDTH)
        low, high = _halves(w2[0, 0, :, part], s2[0, 0, :, part])
        out[:, part] += _dot(put, _dot(z_even, low) + _dot(z_odd, high), jax.lax.Precision.HIGHEST)


def forward(
    x: jax.Array, stacks: Stacks, tiles: Tiles, rows: int, *, limit: float, expected: float, chip: Chip
) -> jax.Array:
    """Sums of the tiles' outputs by token, [T, D] float32.

    Args:
      x: [T, D].
      stacks: w1, w3, w2.
      tiles: of `rows` picks.
      rows: of a tile.
      limit: of gate and up.
      expected: tiles with work under an even load.
      chip: the chip.
    """
    tokens, hidden = x.shape
    place = tiles.begin[:, None] + jnp.arange(rows)
    token = tiles.token[place]
    # Rows of another expert, and past the end, repeat some token without weight.
    share = jnp.where(place < tiles.end[tiles.owner][:, None], tiles.share[place], 0.0)
    width = stacks[0].shape[1]
    layer = stacks[0].layer
    assert layer is not None

    def per_tile(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda i, *_: (i, *(0 for _ in shape)))

    def per_expert(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *array.shape[2:]), lambda i, layer, owner: (layer[0], owner[i], 0, 0))

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i, *_: tuple(0 for _ in shape))

    matrices = [array for stack in stacks for array in (stack.values, stack.scale) if array is not None]
    moved = sum(array.dtype.itemsize * math.prod(array.shape[2:]) for array in matrices)
    in_specs = [per_tile(rows, 1), per_tile(1, rows), per_tile(rows, 1), whole(tokens, hidden)]
    vmem = vmem_with_room(_vmem(tokens, rows, hidden, width), chip)
    return pl.pallas_call(
        functools.partial(_kernel, limit=limit),
        out_shape=jax.ShapeDtypeStruct((tokens, hidden), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(jnp.maximum(tiles.active, 1),),
            in_specs=[*in_specs, *(per_expert(array) for array in matrices)],
            out_specs=whole(tokens, hidden),
            scratch_shapes=[pltpu.VMEM((tokens, hidden // 2), jnp.bfloat16)] * 2,
        ),
        compiler_params=compiler_params(chip, semantics=("arbitrary",), vmem_bytes=vmem),
        cost_estimate=pl.CostEstimate(
            flops=round(expected * 6 * rows * hidden * width),
            transcendentals=round(expected * rows * width),
            bytes_accessed=round(expected * moved) + tokens * hidden * 6,
        ),
        name="grouped_experts_fp4",
    )(layer.reshape(1), tiles.owner, token[:, :, None], token[:, None], share[:, :, None], x, *matrices)
