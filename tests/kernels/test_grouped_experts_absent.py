"""Picks of no expert: what a device does with tokens whose experts are elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_experts import grouped_experts

TOKENS, CHOICES, EXPERTS, HIDDEN, WIDTH = 40, 3, 4, 8, 6


def case(seed: int, share: float, tokens: int = TOKENS) -> tuple:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, HIDDEN), np.float32)
    matrices = [
        rng.standard_normal(s, np.float32) for s in ((EXPERTS, WIDTH, HIDDEN),) * 2 + ((EXPERTS, HIDDEN, WIDTH),)
    ]
    experts = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :CHOICES].astype(np.int32)
    weights = rng.random((tokens, CHOICES)).astype(np.float32)
    absent = rng.random((tokens, CHOICES)) < share
    return x, matrices, np.where(absent, EXPERTS, experts), np.where(absent, 3.0, weights).astype(np.float32), absent


def run(x: np.ndarray, matrices: list, experts: np.ndarray, weights: np.ndarray, implementation: str) -> tuple:
    """Output, and gradients of x, the matrices and the weights."""

    chosen = jnp.asarray(experts, jnp.int32)

    def loss(x: jax.Array, matrices: list, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = grouped_experts(x, *matrices, chosen, weights, limit=1.0, implementation=implementation)
        return (out * np.cos(np.arange(HIDDEN))).sum(), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = step(jnp.asarray(x), matrices, jnp.asarray(weights, jnp.float32))
    return out, gradients


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("seed", "share", "tokens"), [(0, 0.5, 40), (1, 0.97, 40), (2, 1.0, 40), (3, 0.03, 40), (4, 0.5, 2)]
)
def test_absent_experts_add_nothing_and_get_no_gradient(
    implementation: str, seed: int, share: float, tokens: int
) -> None:
    x, matrices, experts, weights, absent = case(seed, share, tokens)
    got, gradients = run(x, matrices, experts, weights, implementation)
    # The same as some expert with weight 0.
    want, wanted = run(x, matrices, np.where(absent, 0, experts), np.where(absent, 0, weights), "reference")
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients[:2]), jax.tree.leaves(wanted[:2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(gradients[2], np.where(absent, 0, wanted[2]), atol=1e-4)
