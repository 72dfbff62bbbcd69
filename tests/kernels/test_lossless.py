"""FP4 ↔ FP8 without loss, and decoding at the ends of the formats, against float64 arithmetic on the codes."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.formats import (
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    fp4_scale_shape,
    fp4_to_fp8,
    fp8_scale_shape,
    fp8_to_fp4,
)

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
SHAPES = st.lists(st.integers(1, 3), max_size=2).flatmap(
    lambda batch: st.tuples(*map(st.just, batch), st.integers(1, 270), st.integers(1, 140).map(lambda n: 2 * n))
)


def exact_fp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values in float64, from the published grid alone."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    byte = codes.view(np.uint8)
    values = np.stack([grid[byte & 15], grid[byte >> 4]], axis=-1).reshape(*codes.shape[:-1], -1)
    powers = 2.0 ** (scales.view(np.uint8).astype(np.float64) - 127)
    return values * np.repeat(powers, 32, axis=-1)[..., : values.shape[-1]]


def exact_fp8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    powers = 2.0 ** (scales.view(np.uint8).astype(np.float64) - 127)
    spread = powers.repeat(128, axis=-2)[..., : codes.shape[-2], :].repeat(128, axis=-1)[..., : codes.shape[-1]]
    return codes.view(E4M3).astype(np.float64) * spread


def same_values(got: np.ndarray, want: np.ndarray) -> bool:
    """Signs of zeros included."""
    return np.array_equal(got, want) and np.array_equal(np.signbit(got), np.signbit(want))


def random_fp4(shape: tuple[int, ...], seed: int, lowest: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (*shape[:-1], shape[-1] // 2), dtype=np.int8)
    return codes, random.integers(lowest, highest + 1, fp4_scale_shape(shape), dtype=np.uint8).view(E8M0)


# ---- FP4 → FP8 ------------------------------------------------------------------------------------------------------
@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(0, 240))
def test_scales_within_2_to_the_14_lose_nothing(shape: tuple[int, ...], seed: int, lowest: int):
    codes, scales = random_fp4(shape, seed, lowest, lowest + 14)
    eight, tiles = fp4_to_fp8(codes, scales)
    assert (eight.dtype, eight.shape, tiles.dtype, tiles.shape) == (E4M3, shape, E8M0, fp8_scale_shape(shape))
    assert same_values(exact_fp8(eight, tiles), exact_fp4(codes, scales))


def test_a_tiles_scale_is_that_of_the_official_converter():
    _, scales = random_fp4((200, 300), 0, 100, 114)
    _, tiles = fp4_to_fp8(np.zeros((200, 150), np.int8), scales)
    for row in range(2):
        for column in range(3):
            largest = scales.view(np.uint8)[row * 128 :][:128, column * 4 :][:, :4].max()
            assert tiles.view(np.uint8)[row, column] == largest - 6


@pytest.mark.parametrize("sign", [0, 8])
@pytest.mark.parametrize("code", range(1, 8))
def test_every_code_is_kept_down_to_the_last_exact_scale_and_refused_below(code: int, sign: int):
    # FP8's last bit is worth 2^-9 of a tile's scale, so 2^-15 of its largest FP4 scale: 0.5 reaches it 14 powers down.
    end = 120 - {1: 14, 2: 15, 3: 14, 4: 16, 5: 15, 6: 17, 7: 16}[code]
    codes = np.zeros((2, 32), np.int8)
    codes[1, 20] = np.uint8((code | sign) << 4).view(np.int8)
    scales = np.full((2, 2), 120, np.uint8)
    for byte in range(end, 121):
        scales[1, 1] = byte
        assert same_values(exact_fp8(*fp4_to_fp8(codes, scales)), exact_fp4(codes, scales))
    scales[1, 1] = end - 1
    with pytest.raises(ValueError, match=rf"row 1, columns from 32: got a scale of 2\^{end - 128} in .* is 2\^-7"):
        fp4_to_fp8(codes, scales)


@pytest.mark.parametrize("byte", [0, 1, 5, 6, 7, 253, 254])
def test_scales_at_the_ends_of_e8m0_lose_nothing(byte: int):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128).view(np.int8)
    scales = np.full((2, 8), byte, np.uint8)
    eight, tiles = fp4_to_fp8(codes, scales)
    assert same_values(exact_fp8(eight, tiles), exact_fp4(codes, scales))
    assert tiles.view(np.uint8).tolist() == [[max(byte - 6, 0)] * 2]


def test_a_block_of_zeros_may_have_any_scale_below():
    codes = np.array([[0x22] * 16 + [0x80] * 16], np.uint8)
    scales = np.array([[120, 1]], np.uint8)
    assert same_values(exact_fp8(*fp4_to_fp8(codes, scales)), exact_fp4(codes, scales))


def test_tiles_of_stacked_experts_are_their_own():
    codes, scales = random_fp4((2, 5, 64), 0, 100, 100)
    scales.view(np.uint8)[1] = 20
    one = [fp4_to_fp8(codes[n], scales[n]) for n in range(2)]
    both = fp4_to_fp8(codes, scales)
    for part, parts in zip(both, zip(*one, strict=True), strict=True):
        assert part.tobytes() == np.stack(parts).tobytes()


def test_the_first_inexact_block_is_named_with_its_matrix():
    codes = np.full((3, 140, 40), 0x11, np.uint8)
    scales = np.full((3, 140, 3), 100, np.uint8)
    scales[2, 130, 1] = scales[2, 131, 0] = 85
    with pytest.raises(ValueError, match=r"matrix \[2\], row 130, columns from 32: got a scale of 2\^-42"):
        fp4_to_fp8(codes, scales)


# ---- FP8 → FP4 ------------------------------------------------------------------------------------------------------
@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(0, 240))
def test_there_and_back_keeps_values(shape: tuple[int, ...], seed: int, lowest: int):
    four = random_fp4(shape, seed, lowest, lowest + 14)
    back = fp8_to_fp4(*fp4_to_fp8(*four))
    assert [(x.dtype, x.shape) for x in back] == [(x.dtype, x.shape) for x in four]
    assert same_values(exact_fp4(*back), exact_fp4(*four))


@given(SHAPES, st.integers(0, 2**32 - 1))
def test_there_and_back_keeps_the_bytes_of_quantised_values(shape: tuple[int, ...], seed: int):
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * 2.0 ** random.integers(-60, -57, (*shape[:-1], 1))
    values[..., : shape[-1] // 2] *= random.random() < 0.8  # some blocks are zero
    codes, scales = encode_fp4(values.astype(np.float32))
    got_codes, got_scales = fp8_to_fp4(*fp4_to_fp8(codes, scales))
    grid = np.abs(decode_fp4(codes, np.full_like(scales, 1)))
    starts = np.arange(0, shape[-1], 32)
    has_fine = np.logical_or.reduceat((grid == 0.5) | (grid == 1.5), starts, axis=-1)
    is_ambiguous = (np.maximum.reduceat(grid, starts, axis=-1) == 6) & ~has_fine
    same = got_scales.view(np.uint8) == scales.view(np.uint8)
    assert (same != is_ambiguous).all()
    is_kept = same.repeat(16, axis=-1)[..., : codes.shape[-1]]
    assert (got_codes == codes)[is_kept].all()


def test_the_scales_of_normal_weights_come_back():
    four = encode_fp4(np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32))
    assert [x.tobytes() for x in fp8_to_fp4(*fp4_to_fp8(*four))] == [x.tobytes() for x in four]


@given(st.integers(0, 254), st.integers(0, 254), st.booleans())
def test_any_pair_of_fp8_values_is_kept_or_refused(first: int, second: int, is_lowest: bool):
    codes = np.zeros((1, 64), np.uint8)
    codes[0, [40, 50]] = first, second
    tile = np.array([[0 if is_lowest else 127]], np.uint8)
    values = exact_fp8(codes.view(E4M3), tile)
    # The oracle: every power of two that E8M0 has.
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    fits = any(np.isin(np.abs(values), grid * 2.0**power).all() for power in range(-127, 20))
    if not fits:
        with pytest.raises(ValueError, match=r"FP8 → FP4: row 0, columns from 32: got the magnitudes"):
            fp8_to_fp4(codes.view(E4M3), tile)
        return
    assert same_values(exact_fp4(*fp8_to_fp4(codes.view(E4M3), tile)), values)


def test_fp8_values_too_large_for_any_fp4_scale_are_refused():
    codes = np.full((1, 32), 384, E4M3)
    assert (fp8_to_fp4(codes, np.array([[248]], np.uint8))[1].view(np.uint8) == 254).all()
    with pytest.raises(ValueError, match=r"384 times 2\^122, need"):
        fp8_to_fp4(codes, np.array([[249]], np.uint8))


def test_tiles_of_other_sizes_are_read():
    eight, tiles = encode_fp8(decode_fp4(*random_fp4((70, 160), 0, 120, 121)), (32, 64))
    back = fp8_to_fp4(eight, tiles, (32, 64))
    np.testing.assert_array_equal(decode_fp4(*back), decode_fp8(eight, tiles, (32, 64)))


# ---- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [np.uint8(255), np.float32(3), np.float32(0), np.float32("nan"), np.float32("inf")])
def test_scales_that_are_no_power_of_two_are_named(scale):
    scales = np.full((130, 5), 120 if scale.dtype == np.uint8 else 1, scale.dtype)
    scales[129, 4] = scale
    with pytest.raises(ValueError, match=r"FP4 → FP8: row 129, columns from 128: got a scale of (255|3|0|nan|inf)"):
        fp4_to_fp8(np.ones((130, 72), np.int8), scales)
    with pytest.raises(ValueError, match=r"FP8 → FP4: rows from 128, columns from 128: got a scale"):
        fp8_to_fp4(np.zeros((130, 144), E4M3), scales[-2:, -2:])


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_an_fp8_nan_is_named(byte: int):
    codes = np.zeros((3, 70), np.uint8)
    codes[2, 65] = byte
    with pytest.raises(ValueError, match=r"row 2, columns from 64: got the magnitudes .*nan"):
        fp8_to_fp4(codes.view(E4M3), np.full((1, 1), 127, np.uint8))


def test_float_scales_are_taken_as_powers_of_two():
    codes, scales = random_fp4((40, 80), 0, 120, 130)
    eight, tiles = fp4_to_fp8(codes, scales)
    got = fp4_to_fp8(codes, scales.astype(np.float32))
    assert [x.tobytes() for x in got] == [eight.tobytes(), tiles.tobytes()]
    assert fp8_to_fp4(eight, tiles.astype(np.float32))[0].tobytes() == fp8_to_fp4(eight, tiles)[0].tobytes()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got scales of shape \(2, 1\), need \(2, 2\)"):
        fp4_to_fp8(np.zeros((2, 32), np.int8), np.ones((2, 1), np.uint8))
    with pytest.raises(ValueError, match=r"got scales of shape \(2, 2\), need \(1, 1\)"):
        fp8_to_fp4(np.zeros((2, 32), E4M3), np.ones((2, 2), np.uint8))
    with pytest.raises(ValueError, match="got 33 inputs and 128 per scale"):
        fp8_to_fp4(np.zeros((2, 33), E4M3), np.ones((1, 1), np.uint8))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 3, 64), (2, 0, 0)])
def test_empty_matrices_have_empty_conversions(shape: tuple[int, ...]):
    four = np.zeros((*shape[:-1], shape[-1] // 2), np.int8), np.zeros(fp4_scale_shape(shape), E8M0)
    eight = fp4_to_fp8(*four)
    assert [x.shape for x in eight] == [shape, fp8_scale_shape(shape)]
    assert [x.shape for x in fp8_to_fp4(*eight)] == [x.shape for x in four]
    assert decode_fp4(*four).shape == decode_fp8(*eight).shape == shape


# ---- decoding -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_code_with_every_scale_decodes_to_its_value(dtype):
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    with np.errstate(over="ignore"):
        want8 = (codes.view(E4M3).astype(np.float64) * 2.0 ** (scales.astype(np.float64) - 127)).astype(dtype)
        want4 = exact_fp4(codes, scales.repeat(16, axis=-1)).astype(dtype)
    got8 = decode_fp8(codes.view(E4M3), scales, tile=(1, 256), dtype=dtype)
    got4 = decode_fp4(codes, scales, block=512, dtype=dtype)
    for got, want in ((got8, want8), (got4, want4)):
        assert got.dtype == dtype
        assert got[:255].tobytes() == np.where(np.isnan(want), got, want)[:255].tobytes()
        assert (np.isnan(got[:255].astype(np.float32)) == np.isnan(want[:255].astype(np.float32))).all()
        assert np.isnan(got[255].astype(np.float32)).all()


@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from(["E8M0", "F32 powers", "F32"]), st.booleans())
def test_decoding_is_one_product_whatever_the_shape(shape: tuple[int, ...], seed: int, kind: str, is_short: bool):
    random = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if is_short else np.float32
    for decode, scale_shape, codes in (
        (decode_fp4, fp4_scale_shape(shape), random.integers(-128, 128, (*shape[:-1], shape[-1] // 2), np.int8)),
        (decode_fp8, fp8_scale_shape(shape), random.integers(0, 0x7F, shape, np.uint8).view(E4M3)),
    ):
        scales = random.integers(100, 150, scale_shape, np.uint8).view(E8M0)
        given = scales if kind == "E8M0" else scales.astype(np.float32)
        given = given * random.random(scale_shape).astype(np.float32) if kind == "F32" else given
        unit = np.full(scale_shape, 127, np.uint8).view(E8M0)
        block = (1, 32) if decode is decode_fp4 else (128, 128)
        spread = given.astype(np.float32).repeat(block[0], axis=-2)[..., : shape[-2], :]
        spread = spread.repeat(block[1], axis=-1)[..., : shape[-1]]
        want = (exact_fp4 if decode is decode_fp4 else exact_fp8)(codes, unit).astype(np.float32) * spread
        assert decode(codes, given, dtype=dtype).tobytes() == want.astype(dtype).tobytes()


def test_views_and_strides_do_not_matter():
    codes, scales = random_fp4((64, 128), 0, 100, 110)
    turned = np.asfortranarray(codes), np.asfortranarray(scales)
    assert decode_fp4(*turned).tobytes() == decode_fp4(codes, scales).tobytes()
    assert [x.tobytes() for x in fp4_to_fp8(*turned)] == [x.tobytes() for x in fp4_to_fp8(codes, scales)]
    half = decode_fp4(codes[:, ::2].copy(), scales[:, ::2].copy())
    assert decode_fp4(codes[:, ::2], scales[:, ::2]).tobytes() == half.tobytes()
    eight, tiles = fp4_to_fp8(codes, scales)
    assert decode_fp8(np.asfortranarray(eight), tiles).tobytes() == decode_fp8(eight, tiles).tobytes()
    assert fp8_to_fp4(np.asfortranarray(eight), tiles)[0].tobytes() == fp8_to_fp4(eight, tiles)[0].tobytes()
