import jax
import jax.numpy as jnp
import numpy as np

from v4jax.model.moe import sqrt_softplus


def test_router_scores_give_the_published_values():
    got = sqrt_softplus(jnp.array([-1.0, 0.0, 1.0, 10.0]))
    np.testing.assert_allclose(got, [0.5596979, 0.8325546, 1.1459763, 3.1622848], rtol=3e-7)


def test_router_scores_have_finite_gradients_everywhere():
    z = jnp.array([-1e4, -200.0, -88.0, -20.001, -19.999, 0.0, 50.0, 1e4])
    gradient = jax.vmap(jax.grad(sqrt_softplus))(z)
    assert np.isfinite(gradient).all()
    want = 1 / (1 + np.exp(-np.asarray(z[3:6], np.float64))) / (2 * np.sqrt(np.log1p(np.exp(np.asarray(z[3:6])))))
    np.testing.assert_allclose(gradient[3:6], want, rtol=1e-4)
