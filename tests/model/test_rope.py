import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import ModelConfig, RopeScaling
from v4jax.model.rope import frequencies, layer_frequencies, over_heads, rotate, rotation

YARN = RopeScaling(factor=16, original_max_position_embeddings=65536)


def test_yarn_gives_the_published_frequencies():
    table = frequencies(64, 160000.0, YARN)
    want = {0: 1.0, 1: 0.6876560, 15: 3.635539e-3, 16: 2.265625e-3, 20: 2.969778e-4, 25: 5.372313e-6, 31: 5.680529e-7}
    for i, value in want.items():
        np.testing.assert_allclose(table[i], value, rtol=3e-7)


def test_yarn_bounds_that_cross_blend_as_the_reference_does():
    base, scaling = frequencies(16, 100.0, None), RopeScaling(4.0, 64, beta_fast=1.0, beta_slow=32.0)
    ramp = np.clip((np.arange(8) - 4) / (-1 - 4), 0, 1)  # from channel 4 down to −1
    np.testing.assert_allclose(frequencies(16, 100.0, scaling), base * (1 - ramp) + base / 4 * ramp, rtol=1e-6)


def test_only_layers_with_entries_use_yarn_and_its_base():
    config = ModelConfig.flash()
    np.testing.assert_array_equal(layer_frequencies(config, 0), frequencies(64, 10000.0, None))
    for ratio in (4, 128):
        np.testing.assert_array_equal(layer_frequencies(config, ratio), frequencies(64, 160000.0, YARN))


def test_rotates_interleaved_pairs_of_the_last_channels():
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    table, positions = frequencies(8, 100.0, None), np.array([0, 1, 7, 1000, 2**20 - 1])
    got = np.asarray(rotate(jnp.asarray(x), rotation(jnp.asarray(positions), table)))
    np.testing.assert_array_equal(got[:, :4], x[:, :4])
    angles = (positions[:, None].astype(np.float32) * table).astype(np.float64)
    pairs = (x[:, 4::2] + 1j * x[:, 5::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(got[:, 4::2], pairs.real, atol=2e-6)
    np.testing.assert_allclose(got[:, 5::2], pairs.imag, atol=2e-6)


def test_the_inverse_undoes_the_rotation():
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    turn = rotation(jnp.array([3, 70, 999]), frequencies(8, 100.0, None))
    np.testing.assert_allclose(rotate(rotate(jnp.asarray(x), turn), turn.inverse), x, atol=1e-6)


def test_the_gradient_is_the_inverse_rotation_also_in_bfloat16():
    rng = np.random.default_rng(2)
    x, d_out = (rng.standard_normal((3, 2, 12)).astype(np.float32) for _ in range(2))
    turn = over_heads(rotation(jnp.array([3, 70, 999]), frequencies(8, 100.0, None)))

    def explicit(x):
        even, odd = x[..., 4::2], x[..., 5::2]
        cos, sin = turn.cos[..., ::2], turn.sin[..., 1::2]
        turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        return jnp.concatenate([x[..., :4], turned.reshape(*x.shape[:-1], -1)], axis=-1)

    want = jax.vjp(explicit, jnp.asarray(x))[1](jnp.asarray(d_out))[0]
    got = jax.vjp(lambda x: rotate(x, turn), jnp.asarray(x))[1](jnp.asarray(d_out))[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    got = jax.vjp(lambda x: rotate(x, turn), half)[1](jnp.asarray(d_out, jnp.bfloat16))[0]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03)
