import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.hyper_connection import Maps, head, read, sinkhorn, write

SETTINGS = dict(iterations=20, eps=1e-6, norm_eps=1e-6)
LOGITS = jnp.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 0, 1], [0, 0, 2, 0]], jnp.float32)


def streams(seed=0, width=16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, 4, width)), jnp.float32)


def test_sinkhorn_gives_the_published_values():
    first = np.asarray(sinkhorn(LOGITS[..., None], 1, 1e-6))[..., 0]
    np.testing.assert_allclose(first[0], [0.028178, 0.157087, 0.202510, 0.565949], atol=1e-6)
    last = np.asarray(sinkhorn(LOGITS[..., None], 20, 1e-6))[..., 0]
    want = [
        [0.032561, 0.174889, 0.207692, 0.584857],
        [0.529587, 0.384961, 0.061871, 0.023580],
        [0.340278, 0.247352, 0.108064, 0.304305],
        [0.097572, 0.192797, 0.622372, 0.087257],
    ]
    np.testing.assert_allclose(last, want, atol=1e-6)
    # The epsilon in every denominator leaves the sums just below 1.
    np.testing.assert_allclose(last.sum(0), 0.999999, atol=2e-7)


def test_zero_logits_give_the_published_maps():
    x = streams()
    out, maps = read(x, jnp.zeros((24, 64), np.float32), jnp.zeros(24, np.float32), jnp.ones(3, np.float32), **SETTINGS)
    np.testing.assert_allclose(maps.post, 1.0)
    np.testing.assert_allclose(maps.comb, 0.25, atol=1e-6)
    np.testing.assert_allclose(out, 0.500001 * x.sum(axis=2), rtol=1e-5)


def test_read_equals_the_definition():
    rng, x = np.random.default_rng(1), streams(1)
    fn, base, scale = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((24, 64), (24,), (3,)))
    out, maps = read(x, fn, base, scale, **SETTINGS)
    flat = np.asarray(x, np.float64).reshape(2, 3, 64)
    z = flat @ fn.T / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    pre = sigmoid(scale[0] * z[..., :4] + base[:4]) + 1e-6
    np.testing.assert_allclose(out, np.einsum("bsc,bscd->bsd", pre, x), atol=1e-5)
    post = 2 * sigmoid(scale[1] * z[..., 4:8] + base[4:8])
    np.testing.assert_allclose(np.moveaxis(maps.post, 0, -1), post, atol=1e-5)
    logits = np.moveaxis((scale[2] * z[..., 8:] + base[8:]).reshape(2, 3, 4, 4), (2, 3), (0, 1))
    np.testing.assert_allclose(maps.comb, sinkhorn(jnp.asarray(logits, jnp.float32), 20, 1e-6), atol=1e-5)


def test_write_sums_over_the_first_axis_of_comb():
    rng, x = np.random.default_rng(2), streams(2)
    out, post, comb = (jnp.asarray(rng.random(s), jnp.float32) for s in ((2, 3, 16), (4, 2, 3), (4, 4, 2, 3)))
    want = np.einsum("kbs,bsd->bskd", post, out) + np.einsum("jkbs,bsjd->bskd", comb, x)
    np.testing.assert_allclose(write(out, x, Maps(post, comb)), want, atol=1e-5)
    transposed = Maps(post, jnp.swapaxes(comb, 0, 1))
    assert np.abs(write(out, x, transposed) - want).max() > 0.1


def test_head_has_neither_factor_two_nor_softmax():
    x = streams(3)
    out = head(
        x, jnp.zeros((4, 64), np.float32), jnp.zeros(4, np.float32), jnp.ones(1, np.float32), eps=0, norm_eps=1e-6
    )
    np.testing.assert_allclose(out, 0.5 * x.sum(axis=2), rtol=1e-5)


def test_bfloat16_streams_are_mixed_in_float32():
    rng, x = np.random.default_rng(4), jnp.asarray(streams(4), jnp.bfloat16)
    fn, base, scale = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((24, 64), (24,), (3,)))
    out, maps = read(x, fn, base, scale, **SETTINGS)
    exact, exact_maps = read(x.astype(jnp.float32), fn, base, scale, **SETTINGS)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(maps.comb, exact_maps.comb)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_write_has_the_reference_value_and_gradient_when_differentiated():
    rng, x = np.random.default_rng(3), streams(3)
    out, post, comb = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 16), (4, 2, 3), (4, 4, 2, 3)))
    weight = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def loss(implementation):
        return lambda *args: (write(*args, implementation=implementation) * weight).sum()

    results = [jax.value_and_grad(loss(name), (0, 1, 2))(out, x, Maps(post, comb)) for name in ("xla", "reference")]
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5), *results)
