"""The schedule, and which parameters decay, train or stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from v4jax.errors import UserError
from v4jax.train.optimizer import learning_rate_schedule, make_optimizer, trainable_names
from v4jax.train.recipes import RECIPES, TrainOptions, resolve

ROLES = {
    "embed.weight": "embedding",
    "norm.weight": "norm",
    "segments.0.layers.0.attn.attn_sink": "sink",
    "segments.0.layers.0.attn.indexer.wq_b.weight": "matrix",
    "segments.0.layers.0.attn.wq_a.weight": "matrix",
    "segments.0.layers.0.hc_attn_base": "bias",
    "segments.0.layers.0.hc_attn_scale": "gain",
    "mtp.0.e_proj.weight": "matrix",
}


def test_schedule_rises_to_the_peak_and_falls_to_the_final_share() -> None:
    options = TrainOptions(steps=100, warmup_steps=10, learning_rate=2e-3, final_learning_rate=0.25)
    schedule = learning_rate_schedule(options)
    rates = np.asarray([float(schedule(jnp.int32(n))) for n in range(100)])
    np.testing.assert_allclose(rates[:10], 2e-3 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[54], 2e-3 * (0.25 + 0.75 * 0.5), rtol=1e-5)
    np.testing.assert_allclose(rates[-1], 5e-4, rtol=1e-6)
    assert np.all(np.diff(rates[9:]) < 0)


def test_schedule_without_warm_up_starts_near_the_peak() -> None:
    schedule = learning_rate_schedule(TrainOptions(steps=1000, warmup_steps=0, learning_rate=1.0))
    assert 0.999 < float(schedule(jnp.int32(0))) <= 1.0


def test_decay_shrinks_matrices_and_embeddings_alone() -> None:
    options = TrainOptions(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, steps=10)
    parameters = {name: jnp.ones((2, 2)) for name in ROLES}
    optimizer = make_optimizer(options, ROLES)
    zero = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(zero, optimizer.init(parameters), parameters)
    decayed = {name for name, update in updates.items() if np.any(update)}
    assert decayed == {name for name, role in ROLES.items() if role in ("matrix", "embedding")}


def test_a_long_gradient_is_scaled_to_the_clip() -> None:
    roles = {"a": "norm", "b": "norm"}
    options = TrainOptions(learning_rate=1e-3, warmup_steps=0, beta1=0.0, beta2=0.0, epsilon=1.0, clip=0.5, steps=10)
    optimizer = make_optimizer(options, roles)
    parameters = {name: jnp.zeros(1) for name in roles}
    gradients = {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    # With both betas 0 and epsilon 1 the update is −lr · g / (|g| + 1) of the clipped g = (0.3, 0.4).
    rate = float(learning_rate_schedule(options)(jnp.int32(0)))
    np.testing.assert_allclose([float(updates[n][0]) for n in roles], [-rate * 0.3 / 1.3, -rate * 0.4 / 1.4], rtol=1e-5)


def test_the_indexer_is_left_alone_unless_asked_for() -> None:
    indexer = {name for name in ROLES if "indexer" in name}
    assert set(ROLES) - trainable_names(TrainOptions(), ROLES) == indexer
    assert trainable_names(TrainOptions(train_indexer=True), ROLES) == set(ROLES)


def test_mtp_is_left_alone_where_its_loss_has_no_weight() -> None:
    assert "mtp.0.e_proj.weight" not in trainable_names(TrainOptions(mtp_weight=0.0), ROLES)


def test_freeze_takes_roles_and_patterns() -> None:
    trained = trainable_names(TrainOptions(freeze=("norm", "*.attn.*")), ROLES)
    assert trained == {n for n, role in ROLES.items() if role != "norm" and ".attn." not in n}


@pytest.mark.parametrize(("freeze", "message"), [(("*.wq_z.*",), "matches no parameter"), (("*",), "every parameter")])
def test_rejects_freezing(freeze: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainable_names(TrainOptions(freeze=freeze), ROLES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=6, accumulate=4), r"batch_size: got 6, need a multiple of accumulate \(4\)"),
        (dict(warmup_steps=1000), r"warmup_steps: got 1000, need below steps \(1000\)"),
        (dict(steps=0), "steps: got 0, need at least 1"),
        (dict(sequence_length=1), "sequence_length: got 1, need at least 2"),
        (dict(learning_rate=-1.0), "learning_rate: got -1.0, need a positive number"),
        (dict(learning_rate=float("nan")), "learning_rate: got nan, need a positive number"),
        (dict(learning_rate=float("inf")), "learning_rate: got inf, need a positive number"),
        (dict(weight_decay=float("inf")), "weight_decay: got inf, need 0 or more, and finite"),
        (dict(held_out_fraction=0.0), "held_out_fraction: got 0.0, need between 0 and 1"),
        (dict(seed=-1), "seed: got -1, need a number of 32 bits"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("full", **changes)


def test_recipes_are_valid_and_flags_replace_their_fields() -> None:
    for name in RECIPES:
        assert resolve(name, steps=3000, seed=None) == resolve(name, steps=3000)
        assert resolve(name, steps=3000).steps == 3000


def test_rejects_an_unknown_recipe_and_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean quickstart"):
        resolve("quikstart")


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_clipping_is_optax(size: float) -> None:
    options = TrainOptions(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, steps=10, clip=1.0, epsilon=1e-2)
    rng = np.random.default_rng(0)
    gradients = {name: jnp.asarray(size * rng.standard_normal((3, 4)), jnp.float32) for name in ("a", "b")}
    parameters = jax.tree.map(jnp.zeros_like, gradients)
    ours = make_optimizer(options, {"a": "matrix", "b": "norm"})
    theirs = optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(
            learning_rate_schedule(options), b1=options.beta1, b2=options.beta2, eps=options.epsilon, weight_decay=0.0
        ),
    )
    got, want = (jax.jit(o.update)(gradients, o.init(parameters), parameters)[0] for o in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
