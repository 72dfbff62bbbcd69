"""Labels, and blocked cross entropy against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from v4jax.train.loss import next_token_labels, token_loss

B, S, D, V = 3, 37, 16, 50


@pytest.fixture
def case() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    segment_ids = np.sort(rng.integers(0, 4, (B, S)), axis=1)[:, ::-1]
    tokens = jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
    labels, mask = next_token_labels(tokens, jnp.asarray(segment_ids, jnp.int32))
    return dict(
        hidden=jnp.asarray(rng.standard_normal((B, S, D)), jnp.float32),
        head=jnp.asarray(rng.standard_normal((V, D)), jnp.float32),
        labels=labels,
        mask=mask,
    )


def plain_loss(hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, labels)
    return jnp.sum(jnp.where(mask, losses, 0))


def test_labels_stop_at_the_end_of_a_document() -> None:
    tokens = jnp.asarray([[10, 11, 12, 20, 21, 30, 0, 0]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0]], jnp.int32)
    labels, mask = next_token_labels(tokens, segments)
    np.testing.assert_array_equal(mask[0], [True, True, False, True, False, False, False, False])
    np.testing.assert_array_equal(labels[mask], [11, 12, 21])
    labels, mask = next_token_labels(tokens, segments, ahead=2)
    np.testing.assert_array_equal(mask[0], [True] + [False] * 7)
    np.testing.assert_array_equal(labels[mask], [12])


@pytest.mark.parametrize("positions", [1, 5, 16, 36, 37, 1000])
def test_blocked_loss_is_the_plain_loss(case: dict[str, jax.Array], positions: int) -> None:
    found = token_loss(**case, block_bytes=4 * V * B * positions)
    np.testing.assert_allclose(found.loss, plain_loss(**case), rtol=1e-6)
    highest = jnp.argmax(case["hidden"] @ case["head"].T, -1)
    assert found.correct == jnp.sum(case["mask"] & (highest == case["labels"]))


def test_no_position_at_all_is_a_loss_of_nothing(case: dict[str, jax.Array]) -> None:
    """What an MTP block has of rows of one token."""
    none = case | {name: case[name][:, :0] for name in ("hidden", "labels", "mask")}
    found, gradient = jax.value_and_grad(lambda hidden: token_loss(**none | {"hidden": hidden}).loss)(none["hidden"])
    assert found == 0
    assert gradient.shape == (B, 0, D)


@pytest.mark.parametrize("positions", [1, 5, 36, 1000])
def test_blocked_gradients_are_the_plain_gradients(case: dict[str, jax.Array], positions: int) -> None:
    def blocked(hidden: jax.Array, head: jax.Array) -> jax.Array:
        loss, _ = token_loss(hidden, head, case["labels"], case["mask"], block_bytes=4 * V * B * positions)
        return 0.37 * loss

    def plain(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return 0.37 * plain_loss(hidden, head, case["labels"], case["mask"])

    found = jax.grad(blocked, (0, 1))(case["hidden"], case["head"])
    expected = jax.grad(plain, (0, 1))(case["hidden"], case["head"])
    for ours, theirs in zip(found, expected, strict=True):
        assert jnp.linalg.norm(ours - theirs) <= 1e-6 * jnp.linalg.norm(theirs)


def test_what_the_mask_excludes_is_never_read(case: dict[str, jax.Array]) -> None:
    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return token_loss(hidden, head, case["labels"], case["mask"], block_bytes=4 * V * B * 8).loss

    poisoned = jnp.where(case["mask"][..., None], case["hidden"], jnp.nan)
    clean = jax.value_and_grad(loss, (0, 1))(case["hidden"], case["head"])
    found = jax.value_and_grad(loss, (0, 1))(poisoned, case["head"])
    jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_gradients_keep_the_dtypes_of_what_they_are_for(case: dict[str, jax.Array]) -> None:
    hidden, head = case["hidden"].astype(jnp.bfloat16), case["head"].astype(jnp.bfloat16)
    gradients = jax.grad(lambda *x: token_loss(*x, case["labels"], case["mask"]).loss, (0, 1))(hidden, head)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2


def test_memory_does_not_grow_with_the_logits() -> None:
    batch, length, vocab, width = 2, 2048, 4096, 32
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.bool_),
    )
    block_bytes = 1 << 20

    def loss(*arrays: jax.Array) -> jax.Array:
        return token_loss(*arrays, block_bytes=block_bytes).loss

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    logits = 4 * batch * length * vocab
    assert analysis.temp_size_in_bytes < logits / 5
