"""FP8 (e4m3), FP4 (e2m1) and E8M0 codecs, for NumPy and JAX arrays alike (architecture.md §12).

Every codec takes either kind of array and returns the same kind: NumPy for checkpoints, JAX inside `jit` and kernels.
(Only `fp4_to_fp8` and `fp8_to_fp4`, which refuse some values, are for NumPy alone.)
The two agree bit for bit, because all rounding is explicit integer and power-of-two arithmetic: no `log2`, no division,
no dependence on how a backend casts float32 to an 8- or 4-bit type. NumPy decodes by table, in pieces that fit a
processor's cache; JAX by arithmetic, which vectorises.

Layouts. FP8 weights have one scale per 128×128 tile, edge tiles being smaller. FP4 weights hold two codes per byte, the
even index in the low nibble, and one scale per 32 consecutive inputs. Leading axes (stacked experts) are batch axes.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Shaped

from kernels_pallas import tables

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_TILE = (128, 128)
FP4_BLOCK = 32

_ROUND_TRIP_FLOOR = 1e-4
_TINY = 2.0**-126

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


def _namespace(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _bitcast(x: Any, dtype: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, dtype) if isinstance(x, jax.Array) else x.view(dtype)


def _power_of_two(field: Any) -> Any:
    """2^(field - 127) for an int32 exponent field in [0, 254]; field 0 gives 0."""
    return _bitcast(field << 23, np.float32)


# ---- scales ----------------------------------------------------------------------------------------------------------
def decode_e8m0(codes: Shaped[AnyArray, "..."]) -> Float32[AnyArray, "..."]:
    """2^(byte - 127) as float32; byte 255 is NaN (architecture.md §12.1).

    Args:
        codes: uint8 or float8_e8m0fnu.
    """
    if codes.dtype == np.uint8:
        codes = _bitcast(codes, ml_dtypes.float8_e8m0fnu)
    return codes.astype(np.float32)


def encode_e8m0(scale: Float32[AnyArray, "..."]) -> Shaped[AnyArray, "..."]:
    """Powers of two in [2^-127, 2^127] as float8_e8m0fnu; NaN becomes byte 255.

    The mantissa of a JAX array is ignored, since its values cannot be checked.

    Raises:
        ValueError: a NumPy value is not a power of two.
    """
    bits = _bitcast(scale, np.uint32)
    if isinstance(scale, np.ndarray):
        is_power = (bits & 0x807FFFFF == 0) & (bits != 0) & np.isfinite(scale)
        exact = is_power | (bits == 0x00400000) | np.isnan(scale)  # 2^-127 is subnormal
        if not exact.all():
            raise ValueError(f"E8M0 scale: got {scale[~exact].flat[0]}, need a positive power of two")
    return _bitcast((bits >> 23).astype(np.uint8), ml_dtypes.float8_e8m0fnu)


def _scale_field(amax: Any, largest: float, floor: float) -> Any:
    """Exponent field of 2^⌈log2(amax / largest)⌉: the float32 quotient's, one up if any mantissa bit is set."""
    xp = _namespace(amax)
    # The official kernels multiply by the float32 reciprocal; dividing would round a few scales differently.
    bits = _bitcast(xp.maximum(amax, np.float32(floor)) * np.float32(1 / largest), np.int32)
    field = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return xp.clip(field, 1, 253)


def _round_to_grid(x: Any, mantissa_bits: int, min_exponent: int) -> Any:
    """Nearest value, ties to even, with that many mantissa bits; below 2^min_exponent the spacing stays constant."""
    xp = _namespace(x)
    field = xp.maximum((_bitcast(x, np.int32) >> 23) & 0xFF, 127 + min_exponent) - mantissa_bits
    return xp.round(x * _power_of_two(254 - field)) * _power_of_two(field)


def _round_e4m3(x: Any) -> Any:
    return _round_to_grid(_namespace(x).clip(x, -E4M3_MAX, E4M3_MAX), mantissa_bits=3, min_exponent=-6)


def _round_e2m1(x: Any) -> Any:
    return _round_to_grid(_namespace(x).clip(x, -E2M1_MAX, E2M1_MAX), mantissa_bits=1, min_exponent=0)


# ---- FP8 -------------------------------------------------------------------------------------------------------------
def decode_fp8(
    weight: Shaped[AnyArray, "*batch o i"],
    scale: Shaped[AnyArray, "*batch row_tiles column_tiles"],
    tile: tuple[int, int] = FP8_TILE,
    dtype: Any = np.float32,
) -> Float[AnyArray, "*batch o i"]:
    """Values of an FP8 matrix with one scale per tile.

    Args:
        weight: float8_e4m3fn.
        scale: uint8 or float8_e8m0fnu (both read as E8M0) or a float type, [⌈o/tile⌉, ⌈i/tile⌉].
        tile: rows and columns per scale; edge tiles are cut off.
        dtype: of the result, to which the float32 products are rounded: bfloat16 holds all but the smallest exactly.

    Raises:
        ValueError: `scale` does not have one value per tile.
    """
    rows, columns = weight.shape[-2:]
    tiles = fp8_scale_shape(weight.shape, tile)
    if scale.shape != tiles:
        raise ValueError(f"FP8 scale: got shape {scale.shape}, need {tiles} for a weight of shape {weight.shape}")
    spread = _namespace(weight).repeat(scale, tile[0], axis=-2)[..., :rows, :]
    if isinstance(weight, np.ndarray):
        return _decode_by_table(tables.e4m3_table, weight.view(np.uint8), spread, tile[1], dtype)
    return (weight.astype(np.float32) * jnp.repeat(_scale_values(spread), tile[1], axis=-1)[..., :columns]).astype(
        dtype
    )


def fp8_scale_shape(shape: tuple[int, ...], tile: tuple[int, int] = FP8_TILE) -> tuple[int, ...]:
    """Shape of the scale of an FP8 weight of this shape."""
    return (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))


def encode_fp8(
    x: Float[AnyArray, "*batch o i"], tile: tuple[int, int] = FP8_TILE
) -> tuple[Shaped[AnyArray, "*batch o i"], Shaped[AnyArray, "*batch row_tiles column_tiles"]]:
    """float8_e4m3fn codes and float8_e8m0fnu scales of a matrix; a scale is the smallest power of two that fits.

    Raises:
        ValueError: a NumPy value is not finite.
    """
    xp = _namespace(x)
    x = _finite(x)
    rows, columns = x.shape[-2:]
    *batch, row_tiles, column_tiles = fp8_scale_shape(x.shape, tile)
    edge = ((0, row_tiles * tile[0] - rows), (0, column_tiles * tile[1] - columns))
    padded = xp.pad(x, ((0, 0),) * len(batch) + edge).reshape(*batch, row_tiles, tile[0], column_tiles, tile[1])
    field = _scale_field(xp.abs(padded).max(axis=(-3, -1)), E4M3_MAX, E4M3_MAX * _TINY)
    codes = _round_e4m3(padded * _power_of_two(254 - field)[..., :, None, :, None]).reshape(
        *batch, row_tiles * tile[0], column_tiles * tile[1]
    )
    return codes[..., :rows, :columns].astype(ml_dtypes.float8_e4m3fn), encode_e8m0(_power_of_two(field))


def _finite(x: Any) -> Any:
    x = x.astype(np.float32)
    if isinstance(x, np.ndarray) and not np.isfinite(x).all():
        raise ValueError("quantisation: got NaN or infinity, need finite values")
    return x


def _scale_values(scale: Any) -> Any:
    is_e8m0 = scale.dtype == np.uint8 or scale.dtype == ml_dtypes.float8_e8m0fnu
    return decode_e8m0(scale) if is_e8m0 else scale.astype(np.float32)


def _decode_by_table(table: Any, codes: Any, scale: Any, group: int, dtype: Any) -> np.ndarray:
    """Values of bytes [*batch, n] with one scale per `group` of them, [*batch, ⌈n/group⌉]."""
    powers = _as_e8m0(scale)
    if powers is not None:
        return tables.gather(table(np.dtype(dtype)), powers.view(np.uint8), codes, group)
    values = tables.gather(table(np.dtype(np.float32)), np.full(scale.shape, 127, np.uint8), codes, group)
    width = values.shape[-1]
    spread = np.repeat(scale.astype(np.float32), group * (width // codes.shape[-1]), axis=-1)[..., :width]
    with np.errstate(over="ignore"):  # to infinity, which readers refuse
        return np.multiply(values, spread, out=values).astype(dtype, copy=False)


def _as_e8m0(scale: np.ndarray) -> np.ndarray | None:
    """The scale as float8_e8m0fnu, or None where it is a float with a value that E8M0 lacks."""
    if scale.dtype == np.uint8 or scale.dtype == ml_dtypes.float8_e8m0fnu:
        return scale.view(ml_dtypes.float8_e8m0fnu)
    try:
        return encode_e8m0(scale.astype(np.float32))
    except ValueError:
        return None


# ---- FP4 -------------------------------------------------------------------------------------------------------------
def _e2m1_values(codes: Any) -> Any:
    """Values of 4-bit codes held in int32: bit 3 is the sign, bits 0-2 index 0, .5, 1, 1.5, 2, 3, 4, 6."""
    magnitude = codes & 7
    # From code 2 on, the three bits are the tail of a float32's exponent and the head of its mantissa.
    normal = _bitcast((magnitude << 22) + (126 << 23), np.float32)
    value = _namespace(codes).where(magnitude < 2, magnitude.astype(np.float32) * 0.5, normal)
    return _namespace(codes).where(codes & 8 != 0, -value, value).astype(np.float32)


def unpack_fp4(packed: Shaped[AnyArray, "*batch half"]) -> Float32[AnyArray, "*batch n"]:
    """Unscaled values of packed FP4 (int8 or uint8), low nibble first: 0xA0 → (0.0, -1.0) (architecture.md §12.4)."""
    if isinstance(packed, np.ndarray):
        unit = np.full((*packed.shape[:-1], 1), 127, np.uint8)
        return _decode_by_table(tables.e2m1_table, packed.view(np.uint8), unit, packed.shape[-1], np.float32)
    codes = _bitcast(packed, np.uint8).astype(np.int32)
    pairs = jnp.stack([_e2m1_values(codes & 15), _e2m1_values(codes >> 4)], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def pack_fp4(values: Float32[AnyArray, "*batch n"]) -> Int8[AnyArray, "*batch half"]:
    """Packs values of the FP4 grid, two per byte; the sign of zero is kept. Off the grid the result means nothing."""
    xp = _namespace(values)
    magnitude = xp.abs(values)
    normal = (_bitcast(magnitude, np.int32) >> 22) - (126 << 1)
    sign = xp.signbit(values).astype(np.int32)
    code = xp.where(magnitude < 1, (magnitude * 2).astype(np.int32), normal) | (sign << 3)
    return _bitcast((code[..., 0::2] | (code[..., 1::2] << 4)).astype(np.uint8), np.int8)


def decode_fp4(
    packed: Shaped[AnyArray, "*batch half"],
    scale: Shaped[AnyArray, "*batch blocks"],
    block: int = FP4_BLOCK,
    dtype: Any = np.float32,
) -> Float[AnyArray, "*batch n"]:
    """Values of packed FP4 with one scale per `block` consecutive values of the last axis.

    Args:
        packed: int8 or uint8, two codes per byte.
        scale: uint8 or float8_e8m0fnu (both read as E8M0) or a float type.
        block: values per scale, an even number.
        dtype: of the result, float32 or bfloat16, which both hold every product exactly.

    Raises:
        ValueError: `scale` does not have one value per block.
    """
    inputs = 2 * packed.shape[-1]
    need = fp4_scale_shape((*packed.shape[:-1], inputs), block)
    if scale.shape != need:
        raise ValueError(f"FP4 scale: got shape {scale.shape}, need {need} for {inputs} inputs")
    if isinstance(packed, np.ndarray):
        return _decode_by_table(tables.e2m1_table, packed.view(np.uint8), scale, block // 2, dtype)
    spread = jnp.repeat(_scale_values(scale), block, axis=-1)[..., :inputs]
    return (unpack_fp4(packed) * spread).astype(dtype)


def fp4_scale_shape(shape: tuple[int, ...], block: int = FP4_BLOCK) -> tuple[int, ...]:
    """Shape of the scale of an FP4 weight whose unpacked shape is this."""
    return (*shape[:-1], -(-shape[-1] // block))


def encode_fp4(
    x: Float[AnyArray, "*batch n"], block: int = FP4_BLOCK
) -> tuple[Int8[AnyArray, "*batch half"], Shaped[AnyArray, "*batch blocks"]]:
    """Packed FP4 codes and float8_e8m0fnu scales; the last axis must be even, its last block may be short.

    Raises:
        ValueError: the last axis is odd, or a NumPy value is not finite.
    """
    xp = _namespace(x)
    x = _finite(x)
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"FP4 packs two values per byte: got a last axis of {width}, need an even one")
    blocks = fp4_scale_shape(x.shape, block)
    padded = xp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, blocks[-1] * block - width),)).reshape(*blocks, block)
    field = _scale_field(xp.abs(padded).max(axis=-1), E2M1_MAX, E2M1_MAX * _TINY)
    values = _round_e2m1(padded * _power_of_two(254 - field)[..., None]).reshape(*x.shape[:-1], -1)
    return pack_fp4(values[..., :width]), encode_e8m0(_power_of_two(field))


# ---- FP4 ↔ FP8 without loss (NumPy) ----------------------------------------------------------------------------------
_ZERO_BLOCK = 1
"""The scale byte that `encode_fp4` gives a block of zeros."""


def fp4_to_fp8(
    codes: Shaped[np.ndarray, "*batch o half"], scales: Shaped[np.ndarray, "*batch o blocks"]
) -> tuple[Shaped[np.ndarray, "*batch o i"], Shaped[np.ndarray, "*batch row_tiles column_tiles"]]:
    """The same values as FP8, signs of zeros included (architecture.md §12.5).

    A 128×128 tile's scale is the largest of its FP4 scales divided by 2^6, as in the official converter.

    Args:
        codes: packed FP4, int8 or uint8.
        scales: uint8 or float8_e8m0fnu (both read as E8M0), or a float type with powers of two; one per 32 inputs.

    Returns:
        float8_e4m3fn codes and float8_e8m0fnu scales.

    Raises:
        ValueError: `scales` has another shape, or a block is named, the first whose values have no FP8 codes beside
            its tile's largest scale, or whose scale is NaN or no power of two.
    """
    *batch, rows, half = codes.shape
    fp4 = _exact_scales("FP4 → FP8", scales, fp4_scale_shape((*batch, rows, 2 * half)), (1, FP4_BLOCK))
    blocks = FP8_TILE[1] // FP4_BLOCK
    top = _group_max(_group_max(fp4, blocks, -1), FP8_TILE[0], -2)
    fp8 = np.maximum(top, tables.HIGHEST) - np.uint8(tables.HIGHEST)
    spread = _spread(fp8, (FP8_TILE[0], blocks), fp4.shape).astype(np.int16)
    level = np.minimum(spread + tables.HIGHEST - fp4, tables.LEVELS - 1).astype(np.uint8)
    out = tables.gather(tables.e2m1_to_e4m3(), level, codes.view(np.uint8), FP4_BLOCK // 2)
    inexact = out & 0x7F == tables.E4M3_NAN
    if inexact.any():
        block = _first_block(inexact, (1, FP4_BLOCK))
        raise ValueError(
            f"FP4 → FP8: {_place(block, (1, FP4_BLOCK))}: got a scale of 2^{int(fp4[block]) - 127} in a tile whose "
            f"largest is 2^{spread[block] + tables.HIGHEST - 127}, need one at most 2^14 times smaller, or FP8 cannot "
            "hold the values; keep the tensor in FP4 or dequantise it"
        )
    return out.view(ml_dtypes.float8_e4m3fn), fp8.view(ml_dtypes.float8_e8m0fnu)


def fp8_to_fp4(
    codes: Shaped[np.ndarray, "*batch o i"],
    scales: Shaped[np.ndarray, "*batch row_tiles column_tiles"],
    tile: tuple[int, int] = FP8_TILE,
) -> tuple[Int8[np.ndarray, "*batch o half"], Shaped[np.ndarray, "*batch o blocks"]]:
    """The same values as FP4, signs of zeros included, where 32 consecutive inputs have a common FP4 scale.

    A block gets a scale by which its largest value is 3, 4 or 6, as it is after `encode_fp4`, and 3 rather than 6 where
    no value needs the finer steps. So quantised blocks that became FP8 come back byte for byte, but for those with a 6
    and neither 0.5 nor 1.5, whose equals have twice the scale.

    Args:
        codes: float8_e4m3fn.
        scales: uint8 or float8_e8m0fnu (both read as E8M0), or a float type with powers of two; one per tile.
        tile: rows and columns per scale.

    Returns:
        int8 codes, two per byte, and float8_e8m0fnu scales, one per 32 inputs.

    Raises:
        ValueError: `scales` has another shape, the inputs are odd, the tile's columns are no multiple of 32; or a
            block is named, the first whose values have no FP4 codes, or a tile whose scale is NaN or no power of two.
    """
    inputs = codes.shape[-1]
    if inputs % 2 or tile[1] % FP4_BLOCK:
        raise ValueError(
            f"FP8 → FP4: got {inputs} inputs and {tile[1]} per scale, need an even number and a multiple of {FP4_BLOCK}"
        )
    fp8 = _exact_scales("FP8 → FP4", scales, fp8_scale_shape(codes.shape, tile), tile)
    blocks = fp4_scale_shape(codes.shape)
    spread = _spread(fp8, (tile[0], tile[1] // FP4_BLOCK), blocks).astype(np.int16)
    source = codes.view(np.uint8)
    largest = _group_max(source & 0x7F, FP4_BLOCK, -1)  # without their signs, codes are ordered like their values
    fp4 = np.clip(spread + _FITTING[largest], 0, 254)
    nibbles = _fp4_codes(source, fp4 - spread)
    is_fine = _group_max(nibbles & 5 == 1, FP4_BLOCK, -1)  # has a 0.5 or 1.5
    is_coarse = (_group_max(nibbles & 7, FP4_BLOCK, -1) == 7) & ~is_fine & (fp4 < 254)
    if is_coarse.any():
        fp4 += is_coarse
        nibbles = _fp4_codes(source, fp4 - spread)
    inexact = nibbles == tables.NOT_FP4
    if inexact.any():
        block = _first_block(inexact, (1, FP4_BLOCK))
        found = codes[block[:-1]][block[-1] * FP4_BLOCK :][:FP4_BLOCK].astype(np.float32)
        values = ", ".join(f"{value:g}" for value in np.unique(np.abs(found))[-4:])
        raise ValueError(
            f"FP8 → FP4: {_place(block, (1, FP4_BLOCK))}: got the magnitudes (largest last) {values} times "
            f"2^{spread[block] - 127}, need 0, 0.5, 1, 1.5, 2, 3, 4 or 6 times a power of two; keep the tensor in FP8 "
            "or quantise it anew"
        )
    fp4[largest == 0] = _ZERO_BLOCK
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return packed.view(np.int8), fp4.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)


def _fp4_codes(source: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """FP4 codes, one per byte, for block scales that are 2^exponent times their tile's."""
    level = np.clip(exponents - tables.LOWEST, 0, tables.LEVELS - 1).astype(np.uint8)
    return tables.gather(tables.e4m3_to_e2m1(), level, source, FP4_BLOCK)


def _fitting_exponents() -> np.ndarray:
    """Of each FP8 code without its sign: log2 of the smallest FP4 scale that reaches its value."""
    values = np.minimum(np.nan_to_num(tables.E4M3_VALUES[:128], nan=E4M3_MAX), E4M3_MAX)
    return (_scale_field(values, E2M1_MAX, E2M1_MAX * 2.0**tables.LOWEST) - 127).astype(np.int16)


_FITTING = _fitting_exponents()


def _group_max(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    if not x.size:
        shape = list(x.shape)
        shape[axis] = -(-shape[axis] // size)
        return np.zeros(shape, x.dtype)
    return np.maximum.reduceat(x, np.arange(0, x.shape[axis], size), axis=axis)


def _spread(x: np.ndarray, sizes: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    return x.repeat(sizes[0], axis=-2)[..., : shape[-2], :].repeat(sizes[1], axis=-1)[..., : shape[-1]]


def _exact_scales(what: str, scales: np.ndarray, need: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """Bytes of E8M0 scales, all finite."""
    if scales.shape != need:
        raise ValueError(f"{what}: got scales of shape {scales.shape}, need {need}")
    powers = _as_e8m0(scales)
    if powers is None:
        is_power = np.frexp(scales.astype(np.float32))[0] == 0.5
        wrong = ~is_power | ~np.isfinite(scales)
    else:
        wrong = powers.view(np.uint8) == 255
    if powers is None or wrong.any():
        first = _first_block(wrong, (1, 1))
        raise ValueError(
            f"{what}: {_place(first, block)}: got a scale of {scales[first]}, need a power of two from 2^-127 to "
            "2^127; dequantise the tensor, or fetch it again if it is damaged"
        )
    return powers.view(np.uint8)


def _first_block(wrong: np.ndarray, block: tuple[int, int]) -> tuple[int, ...]:
    *batch, row, column = (int(n) for n in np.unravel_index(wrong.argmax(), wrong.shape))
    return (*batch, row // block[0], column // block[1])


def _place(block: tuple[int, ...], size: tuple[int, int]) -> str:
    *batch, row, column = block
    rows = f"row {row}" if size[0] == 1 else f"rows from {row * size[0]}"
    return f"{f'matrix {batch}, ' if batch else ''}{rows}, columns from {column * size[1]}"


# ---- simulated quantisation ------------------------------------------------------------------------------------------
def fp8_round_trip(x: Float[Array, "*batch n"], block: int) -> Float[Array, "*batch n"]:
    """Rounds to FP8 and back, one scale per `block` channels of the last axis (architecture.md §12.2).

    Computed in float32, returned in the dtype of `x`. Its derivative is zero: pass gradients straight through.

    Raises:
        ValueError: `block` does not divide the last axis.
    """
    return _round_trip(x, block, E4M3_MAX, _ROUND_TRIP_FLOOR, _round_e4m3)


def fp4_round_trip(x: Float[Array, "*batch n"], block: int = FP4_BLOCK) -> Float[Array, "*batch n"]:
    """Rounds to FP4 and back, one scale per `block` channels of the last axis (architecture.md §12.3).

    Computed in float32, returned in the dtype of `x`. Its derivative is zero: pass gradients straight through.

    Raises:
        ValueError: `block` does not divide the last axis.
    """
    return _round_trip(x, block, E2M1_MAX, E2M1_MAX * _TINY, _round_e2m1)


def _round_trip(x: Any, block: int, largest: float, floor: float, rounding: Any) -> Any:
    if x.shape[-1] % block:
        raise ValueError(f"round trip: got a last axis of {x.shape[-1]}, need a multiple of the block, {block}")
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block)
    field = _scale_field(_namespace(x).abs(blocks).max(axis=-1, keepdims=True), largest, floor)
    return (rounding(blocks * _power_of_two(254 - field)) * _power_of_two(field)).reshape(x.shape).astype(x.dtype)
