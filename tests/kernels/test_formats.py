import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.formats import (
    decode_e8m0,
    decode_fp4,
    decode_fp8,
    encode_e8m0,
    encode_fp4,
    encode_fp8,
    fp4_round_trip,
    fp8_round_trip,
    pack_fp4,
    unpack_fp4,
)

BYTES = np.arange(256, dtype=np.uint8)
SHAPES = st.lists(st.integers(1, 3), max_size=1).flatmap(
    lambda batch: st.tuples(*map(st.just, batch), st.integers(1, 300), st.integers(1, 150).map(lambda n: 2 * n))
)


def random_matrix(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Magnitudes over the whole range in which scales are normal numbers, and some zeros."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * 2.0 ** random.integers(-80, 80, (*shape[:-1], 1))
    return np.where(random.random(shape) < 0.1, 0, values).astype(np.float32)


def same_bits(got: jax.Array, want: np.ndarray) -> bool:
    return np.asarray(got).dtype == want.dtype and np.asarray(got).tobytes() == want.tobytes()


# ---- the published examples -----------------------------------------------------------------------------------------
def test_fp8_round_trip_gives_the_published_values():
    x = jnp.asarray(0.1 * np.arange(64) - 3.0, jnp.bfloat16)
    y = jax.jit(fp8_round_trip, static_argnums=1)(x, 64)
    assert y.dtype == jnp.bfloat16
    assert np.asarray(y, np.float32)[[1, 7, 31, 33, 63]].tolist() == [-3.0, -2.25, 0.1015625, 0.3125, 3.25]


def test_fp4_round_trip_gives_the_published_values():
    y = jax.jit(fp4_round_trip)(jnp.linspace(-1, 1, 32))
    assert y[:10].tolist() == [-1, -1, -0.75, -0.75, -0.75, -0.75, -0.5, -0.5, -0.5, -0.375]


def test_low_nibble_is_the_even_index():
    assert unpack_fp4(np.array([0xA0], np.uint8)).tolist() == [0.0, -1.0]


def test_fp4_ties_go_to_the_published_neighbours():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], np.float32)
    got = decode_fp4(*encode_fp4(np.concatenate([ties, -ties])))
    assert got.tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -1, -2, -2, -4, -4, -6]


# ---- every code, every rounding -------------------------------------------------------------------------------------
def test_every_fp8_code_has_its_value():
    values = BYTES.view(ml_dtypes.float8_e4m3fn)
    scale = np.full((2, 1), 2.0, np.float32)
    want = values.reshape(2, 128).astype(np.float32) * 2
    for got in (
        decode_fp8(values.reshape(2, 128), scale, tile=(1, 128)),
        jax.jit(decode_fp8, static_argnums=2)(jnp.asarray(values).reshape(2, 128), jnp.asarray(scale), (1, 128)),
    ):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_every_fp4_byte_unpacks_and_packs_again():
    low, high = BYTES & 15, BYTES >> 4
    grid = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    want = np.stack([grid[low], grid[high]], axis=-1).reshape(-1)
    assert unpack_fp4(BYTES).tobytes() == want.tobytes()
    assert same_bits(jax.jit(unpack_fp4)(jnp.asarray(BYTES)), want)
    assert pack_fp4(want).tobytes() == BYTES.tobytes()
    assert same_bits(jax.jit(pack_fp4)(want), BYTES.view(np.int8))


def test_every_e8m0_byte_decodes_and_encodes_again():
    want = 2.0 ** (BYTES.astype(np.float64) - 127)
    for got in (decode_e8m0(BYTES), decode_e8m0(BYTES.view(ml_dtypes.float8_e8m0fnu)), decode_e8m0(jnp.asarray(BYTES))):
        np.testing.assert_array_equal(np.asarray(got)[:255], want[:255])
        assert np.isnan(np.asarray(got)[255])
        assert np.asarray(encode_e8m0(np.asarray(got))).tobytes() == BYTES.tobytes()


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, np.inf, 2.0**-128])
def test_e8m0_refuses_what_it_cannot_hold(value: float):
    with pytest.raises(ValueError, match="need a positive power of two"):
        encode_e8m0(np.array([1.0, value], np.float32))


@pytest.mark.parametrize("xp", [np, jnp])
def test_rounding_is_to_nearest_even_as_in_ml_dtypes(xp):
    # 448 and 6 in each block fix the scale at 1; the rest sweeps the range, every tie between two codes included.
    def sweep(dtype, limit: float) -> np.ndarray:
        bits = np.arange(2 ** (8 if limit > 6 else 4), dtype=np.uint8)
        codes = np.unique(bits.view(dtype).astype(np.float32))
        codes = codes[np.isfinite(codes)]
        ties = (codes[1:] + codes[:-1]) / 2
        values = np.concatenate([codes, ties, np.nextafter(ties, np.float32(-9)), np.nextafter(ties, np.float32(9))])
        blocks = np.resize(values, (-(-len(values) // 31), 31)).astype(np.float32)
        return np.concatenate([blocks, np.full((len(blocks), 1), limit, np.float32)], axis=-1)

    for encode, dtype, limit in ((encode_fp8, ml_dtypes.float8_e4m3fn, 448), (encode_fp4, ml_dtypes.float4_e2m1fn, 6)):
        x = sweep(dtype, limit)
        codes, scale = encode(xp.asarray(x))
        assert (np.asarray(scale, np.float32) == 1).all()
        got = np.asarray(codes, np.float32) if encode is encode_fp8 else np.asarray(unpack_fp4(codes))
        np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))


# ---- matrices -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(128, 128), (1, 2), (2, 130, 90), (3, 40, 300)])
def test_numpy_and_jax_agree_bit_for_bit(shape: tuple[int, ...]):
    x = random_matrix(shape, 0)
    for encode, decode in ((encode_fp8, decode_fp8), (encode_fp4, decode_fp4)):
        codes, scale = encode(x)
        jax_codes, jax_scale = jax.jit(encode)(x)
        assert same_bits(jax_codes, codes)
        assert same_bits(jax_scale, scale)
        assert same_bits(jax.jit(decode)(jax_codes, jax_scale), decode(codes, scale))


@given(SHAPES, st.integers(0, 9))
def test_quantising_again_changes_nothing(shape: tuple[int, ...], seed: int):
    for encode, decode in ((encode_fp8, decode_fp8), (encode_fp4, decode_fp4)):
        once = decode(*encode(random_matrix(shape, seed)))
        np.testing.assert_array_equal(decode(*encode(once)), once)


@given(SHAPES, st.integers(0, 9))
def test_error_is_at_most_half_a_step_of_the_tile(shape: tuple[int, ...], seed: int):
    x = random_matrix(shape, seed)
    amax = np.abs(x).max(axis=(-2, -1), keepdims=True)
    # Half a step at the top of a format: 16 of at least 224 (e4m3 after scaling), 1 of at least 3 (e2m1).
    assert (np.abs(decode_fp8(*encode_fp8(x)) - x) <= amax * 16 / 224).all()
    assert (np.abs(decode_fp4(*encode_fp4(x)) - x) <= amax * 1 / 3).all()


def test_decoded_weights_are_exact_in_bfloat16():
    random = np.random.default_rng(0)
    codes = random.integers(0, 0x7F, (256, 256), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = random.integers(100, 150, (2, 2), dtype=np.uint8)
    values = decode_fp8(codes, scale)
    np.testing.assert_array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), values)


def test_each_tile_has_its_own_scale_at_the_edges_too():
    weight = np.ones((130, 257), ml_dtypes.float8_e4m3fn)
    scale = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    want = np.array([[scale[i // 128, j // 128] for j in range(257)] for i in range(130)])
    np.testing.assert_array_equal(decode_fp8(weight, scale), want)
    packed = np.full((2, 20), 0x22, np.uint8)  # forty ones
    np.testing.assert_array_equal(
        decode_fp4(packed, scale[:, :2]), np.repeat(scale[:, :2], [32, 8], axis=1).reshape(2, 40)
    )


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_a_scale_of_another_shape_is_refused(columns: int):
    scale = np.ones((2, columns), np.float32)
    with pytest.raises(ValueError, match="FP8 scale: got shape"):
        decode_fp8(np.zeros((256, 300), ml_dtypes.float8_e4m3fn), scale)
    with pytest.raises(ValueError, match="FP4 scale: got shape"):
        decode_fp4(np.zeros((2, 48), np.int8), scale)


def test_values_that_have_no_code_are_refused():
    for encode in (encode_fp8, encode_fp4):
        for value in (np.nan, np.inf):
            with pytest.raises(ValueError, match="need finite values"):
                encode(np.full((2, 2), value, np.float32))
    with pytest.raises(ValueError, match="need an even one"):
        encode_fp4(np.ones((2, 3), np.float32))


# ---- round trips ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_round_trip_is_encoding_and_decoding(dtype):
    rows, blocks = 100, 3
    x = jnp.asarray(random_matrix((rows, 64 * blocks), 0)).astype(dtype)
    wide = np.asarray(x, np.float32)
    eight = decode_fp8(*encode_fp8(wide, tile=(1, 64)), tile=(1, 64))
    # The simulation stops scaling below 1e-4, so smaller blocks round to zero or subnormals.
    is_scaled = np.abs(wide).reshape(rows, blocks, 64).max(-1).repeat(64, axis=-1) >= 1e-4
    got = np.asarray(jax.jit(fp8_round_trip, static_argnums=1)(x, 64), np.float32)
    np.testing.assert_array_equal(got[is_scaled], eight[is_scaled])
    assert (np.abs(got[~is_scaled]) <= 1e-4).all()
    np.testing.assert_array_equal(np.asarray(jax.jit(fp4_round_trip)(x), np.float32), decode_fp4(*encode_fp4(wide)))


def test_a_round_trip_is_the_same_inside_jit_as_outside():
    x = jnp.asarray(random_matrix((64, 128), 3), jnp.bfloat16)
    for function in (lambda v: fp8_round_trip(v, 64), fp4_round_trip):
        assert same_bits(jax.jit(function)(x), np.asarray(function(x)))


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="need a multiple of the block, 64"):
        fp8_round_trip(jnp.ones((2, 96)), 64)
    with pytest.raises(ValueError, match="need a multiple of the block, 32"):
        fp4_round_trip(jnp.ones((2, 48)))
