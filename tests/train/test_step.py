"""The training step: what it moves, what it leaves alone, and that parts add up to the whole.

A step takes long to compile, so most tests share one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from model.random_model import random_model, small_config
from tolerances import GRADIENT_REORDERING, assert_gradients_close

from v4jax.config import AttentionKind, ModelConfig, RouterKind
from v4jax.dtypes import DTypePolicy
from v4jax.model.transformer import Transformer
from v4jax.train.recipes import TrainOptions
from v4jax.train.step import (
    Arrays,
    StepMetrics,
    TrainState,
    TrainStep,
    balanced_biases,
    evaluation_step,
    make_train_step,
    router_bias_layers,
    summed_losses,
    take_apart,
)

CONFIG = small_config(
    num_hidden_layers=2,
    layer_types=(AttentionKind.CSA, AttentionKind.HCA),
    mlp_layer_types=(RouterKind.HASH, RouterKind.TOPK),
)
OPTIONS = TrainOptions(
    steps=20,
    warmup_steps=0,
    batch_size=4,
    sequence_length=32,
    learning_rate=3e-3,
    balance_weight=0.01,
    bias_update_speed=0.25,
)


def packed_batch() -> dict[str, jax.Array]:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 32))
    segment_ids = np.concatenate([np.full((4, 15), 1), np.full((4, 12), 2), np.full((4, 5), 0)], 1)
    segment_ids[1] = 1
    return dict(tokens=jnp.asarray(tokens, jnp.int32), segment_ids=jnp.asarray(segment_ids, jnp.int32))


BATCH = packed_batch()


@functools.cache
def compiled_step(options: TrainOptions) -> TrainStep:
    return make_train_step(take_apart(random_model(CONFIG), options)[0], CONFIG, options)


def first_step(options: TrainOptions = OPTIONS) -> tuple[TrainState, TrainState, StepMetrics, Arrays, Arrays]:
    """The state before and after, the metrics, and the frozen arrays before and after."""
    _, state, frozen = take_apart(random_model(CONFIG), options)
    before, frozen_before = jax.tree.map(np.array, (state, frozen))
    after, metrics = compiled_step(options)(state, frozen, BATCH)
    return before, after, metrics, frozen_before, frozen


def gradient(state: TrainState) -> Arrays:
    """The clipped gradient of the first step, from AdamW's running mean."""
    return state.optimizer[1][0].mu


def plain_losses(model: Transformer) -> tuple[float, float]:
    """Means over documents, one token at a time."""
    tokens, segments = np.asarray(BATCH["tokens"]), np.asarray(BATCH["segment_ids"])
    logits = jax.jit(lambda m, t, s: (m(t, s), m.mtp_logits(t, s)))(model, BATCH["tokens"], BATCH["segment_ids"])
    means = []
    for ahead, log_probability in zip((1, 2), map(jax.nn.log_softmax, logits), strict=True):
        terms = [
            -float(log_probability[row, t, tokens[row, t + ahead]])
            for row, t in np.ndindex(4, 32 - ahead)
            if segments[row, t] == segments[row, t + ahead] != 0
        ]
        means.append(float(np.mean(terms)))
    return means[0], means[1]


def test_reports_the_mean_losses_of_the_batch() -> None:
    expected = plain_losses(random_model(CONFIG))
    metrics = first_step()[2]
    np.testing.assert_allclose([metrics.loss, metrics.mtp_loss], expected, rtol=1e-5)
    sums = evaluation_step(random_model(CONFIG), BATCH)
    np.testing.assert_allclose([sums.loss / sums.tokens, sums.mtp_loss / sums.mtp_tokens], expected, rtol=1e-5)
    assert metrics.tokens == sums.tokens == 3 * (14 + 11) + 31


def test_moves_every_trained_parameter_and_no_other() -> None:
    before, after, _, frozen_before, frozen = first_step()
    assert int(after.step) == 1
    assert not [name for name, value in after.parameters.items() if np.array_equal(value, before.parameters[name])]
    assert any(".indexer." in name for name in frozen)
    assert any(name.endswith("tid2eid") for name in frozen)
    assert not any(".indexer." in name for name in after.parameters)
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)


def test_router_biases_move_against_the_load_of_their_layer() -> None:
    before, after, *_ = first_step()
    load = np.asarray(evaluation_step(random_model(CONFIG), BATCH).expert_load)[1]
    moves = [after.router_biases[name] - before.router_biases[name] for name in before.router_biases]
    assert len(moves) == 1
    np.testing.assert_allclose(moves[0].reshape(-1), 0.25 * np.sign(load.mean() - load), atol=1e-6)


def test_parts_and_recomputation_give_the_gradient_of_the_whole_batch() -> None:
    _, whole, whole_metrics, *_ = first_step()
    changed = dataclasses.replace(OPTIONS, bias_update_speed=0.0, accumulate=2, remat=True)
    before, found, metrics, *_ = first_step(changed)
    assert_gradients_close(gradient(found), gradient(whole), GRADIENT_REORDERING)
    for name, value in metrics._asdict().items():
        np.testing.assert_allclose(value, getattr(whole_metrics, name), rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, found.router_biases, before.router_biases)


def test_the_indexer_gets_no_gradient_from_the_loss() -> None:
    layout, state, frozen = take_apart(random_model(CONFIG), dataclasses.replace(OPTIONS, train_indexer=True))
    indexer = {name: value for name, value in state.parameters.items() if ".indexer." in name}
    assert indexer

    def loss(indexer: Arrays) -> jax.Array:
        model = layout.assemble(state.parameters | indexer, state.router_biases, frozen)
        return summed_losses(model, BATCH, has_mtp=False).loss

    assert not any(np.any(value) for value in jax.jit(jax.grad(loss))(indexer).values())


def test_assembling_gives_the_same_model_again() -> None:
    model = random_model(CONFIG)
    expected = jax.tree.map(np.array, model)
    layout, state, frozen = take_apart(model, OPTIONS)
    again = layout.assemble(state.parameters, state.router_biases, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_balanced_biases_move_against_the_load() -> None:
    load = jnp.asarray([[4.0, 0.0, 2.0], [9.0, 9.0, 9.0], [0.0, 1.0, 5.0]])
    biases = {"both": jnp.zeros((2, 3)), "middle": jnp.ones(3), "unknown": jnp.ones(3)}
    layers = {"both": np.asarray([0, 2]), "middle": np.asarray([1])}
    moved = balanced_biases(biases, load, layers, 0.5)
    np.testing.assert_array_equal(moved["both"], [[-0.5, 0.5, 0.0], [0.5, 0.5, -0.5]])
    np.testing.assert_array_equal(moved["middle"], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(moved["unknown"], [1.0, 1.0, 1.0])


def test_every_router_bias_knows_its_layers_stacked_or_not() -> None:
    config: ModelConfig = small_config()
    stacked = random_model(config)
    for model in (stacked, stacked.unstack()):
        layout, state, _ = take_apart(model, OPTIONS)
        found = {}
        for name, layers in layout.bias_layers.items():
            rows = np.asarray(state.router_biases[name]).reshape(-1, config.n_routed_experts)
            found |= dict(zip(layers.tolist(), rows, strict=True))
        expected = [layer.get("ffn.gate.bias") for layer in stacked.to_tensors()[1]]
        assert sorted(found) == [n for n, bias in enumerate(expected) if bias is not None] == [2, 3, 4, 5]
        for n, bias in found.items():
            np.testing.assert_array_equal(bias, expected[n])
    assert router_bias_layers(stacked, ["mtp.0.ffn.gate.bias"]) == {}


def test_loss_falls_on_text_that_repeats() -> None:
    tokens = jnp.asarray(np.tile(np.arange(8), (4, 4)), jnp.int32)
    batch = dict(tokens=tokens, segment_ids=jnp.ones_like(tokens))
    _, state, frozen = take_apart(random_model(CONFIG), OPTIONS)
    losses = []
    for _ in range(20):
        state, metrics = compiled_step(OPTIONS)(state, frozen, batch)
        losses.append((float(metrics.loss), float(metrics.mtp_loss)))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_bfloat16_compute_keeps_float32_masters() -> None:
    def loss_and_gradients(policy: DTypePolicy) -> tuple[jax.Array, Arrays]:
        layout, state, frozen = take_apart(random_model(CONFIG, policy=policy), OPTIONS)
        assert {value.dtype for value in state.parameters.values()} == {np.dtype(np.float32)}

        def loss(parameters: Arrays) -> jax.Array:
            return summed_losses(layout.assemble(parameters, state.router_biases, frozen), BATCH, has_mtp=False).loss

        return jax.jit(jax.value_and_grad(loss))(state.parameters)

    expected, _ = loss_and_gradients(DTypePolicy.named("float32"))
    found, gradients = loss_and_gradients(DTypePolicy.named("bfloat16", param="float32"))
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float32)}
    assert abs(float(found / expected) - 1) < 0.05
