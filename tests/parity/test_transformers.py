"""Our numbers beside transformers', on random models with every weight random (architecture.md §18.2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances

from v4jax.config import AttentionKind, ModelConfig
from v4jax.dtypes import DTypePolicy
from v4jax.model.inputs import Choices
from v4jax.model.transformer import Transformer
from v4jax.train.loss import next_token_labels, token_loss
from v4jax.train.optimizer import make_optimizer
from v4jax.train.recipes import TrainOptions
from v4jax.train.step import Arrays, Layout, take_apart

torch = pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")

import peer  # noqa: E402
from peer import Peer, Tensors  # noqa: E402

pytestmark = pytest.mark.parity

CONFIG_SEEDS = (1, 5, 7)
MAX_DRAWS = 5
BFLOAT16_SEEDS = range(7)
OPTIONS = TrainOptions(
    steps=10,
    learning_rate=1e-4,
    final_learning_rate=1.0,
    warmup_steps=0,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    clip=1.0,
    train_indexer=True,
)


class Training(NamedTuple):
    """Our model as training has it: `gradient(parameters, biases, frozen)` → ((loss, (logits, choices)), gradients)."""

    layout: Layout
    parameters: Arrays
    rest: tuple[Arrays, Arrays]
    gradient: Callable[..., Any]


class Case(NamedTuple):
    """A model and batch on which both sides made the same choices, and what both computed in float32."""

    config: ModelConfig
    seed: int
    tokens: np.ndarray
    theirs: peer.Gradients
    training: Training
    loss: float
    logits: np.ndarray
    gradients: Arrays
    redrawn: int


def _model(other: Peer, dtype: str = "float32", *, stacked: bool = True) -> Transformer:
    top, layers = other.tensors()
    return Transformer.from_tensors(other.config, DTypePolicy.named(dtype), top, layers, stacked=stacked)


def _take_apart(model: Transformer, compiled: Callable[..., Any] | None) -> Training:
    layout, start, frozen = take_apart(model, OPTIONS)

    def loss(parameters: Arrays, biases: Arrays, frozen: Arrays, tokens: jax.Array) -> Any:
        model = layout.assemble(parameters, biases, frozen)
        output = model.hidden(tokens, record=True)
        labels, mask = next_token_labels(tokens, jnp.ones_like(tokens))
        total = token_loss(output.hidden, model.head_weight, labels, mask).loss
        return total / mask.sum(), (model.logits(output.hidden), output.choices)

    gradient = compiled or jax.jit(jax.value_and_grad(loss, has_aux=True))
    return Training(layout, start.parameters, (start.router_biases, frozen), gradient)


def _stack_choices(choices: tuple[Choices, ...], like: peer.Choices) -> peer.Choices:
    """Ours, a tuple over layers with None where nothing is selected, in the peer's form."""
    topk = [np.full_like(like.topk[0], -1) if layer.entries is None else layer.entries for layer in choices]
    return peer.Choices(np.stack([layer.experts for layer in choices]), np.stack(topk))


def _replay(choices: peer.Choices, config: ModelConfig) -> tuple[Choices, ...]:
    """The peer's choices in our form."""
    return tuple(
        Choices(experts, topk if kind is AttentionKind.CSA else None)
        for experts, topk, kind in zip(*map(jnp.asarray, choices), config.layer_types, strict=True)
    )


@pytest.fixture(scope="module", params=CONFIG_SEEDS, ids=lambda seed: f"config{seed}")
def case(request: pytest.FixtureRequest) -> Case:
    """Draws weights and tokens until no choice falls differently; every difference must be a near tie of the scores."""
    config = peer.random_config(request.param)
    compiled = None
    for redrawn in range(MAX_DRAWS):
        seed = 100 * request.param + redrawn
        other, tokens = Peer.random(config, seed), peer.random_tokens(config, seed)
        run = other.run(tokens)
        training = _take_apart(_model(other), compiled)
        compiled = training.gradient
        (loss, (logits, choices)), gradients = compiled(training.parameters, *training.rest, tokens)
        differs = run.choices.differs(_stack_choices(choices, like=run.choices))
        if not differs.any():
            theirs = other.gradients(tokens)
            return Case(config, seed, tokens, theirs, training, float(loss), np.asarray(logits), gradients, redrawn)
        # Later layers inherit a difference, so the first layer that has one is where it arose.
        first = np.argmax(differs.any((1, 2)))
        gap = run.margin[first][differs[first]].max()
        assert gap < tolerances.FLIP_SCORE_GAP, f"layer {first} chose differently at a score gap of {gap:.3g}"
    pytest.fail(f"near ties in {MAX_DRAWS} draws in a row")


# ---- float32 ---------------------------------------------------------------------------------------------------------
def test_logits_agree(case: Case, record_property: Any) -> None:
    worst = np.abs(case.logits - case.theirs.logits).max()
    record_property("figure", f"max |Δ| {worst:.2g} at std {case.logits.std():.2f}; cases redrawn: {case.redrawn}")
    tolerances.assert_logits_close(case.logits, case.theirs.logits, tolerances.OTHERS)


def test_loss_agrees(case: Case, record_property: Any) -> None:
    relative = abs(case.loss - case.theirs.loss) / case.theirs.loss
    record_property("figure", f"loss {case.theirs.loss:.6f}, relative difference {relative:.2g}")
    assert relative <= tolerances.LOSS_RELATIVE


def test_every_gradient_agrees(case: Case, record_property: Any) -> None:
    ours, theirs = _gradient_tensors(case), _flat(case.theirs.top, case.theirs.layers)
    untrained = {name for name in ours if name.endswith(("gate.bias", "gate.tid2eid"))}
    assert ours.keys() - untrained == theirs.keys()
    worst = max(
        np.linalg.norm(ours[name] - value) / np.linalg.norm(value) for name, value in theirs.items() if value.any()
    )
    record_property("figure", f"{len(theirs)} gradients, worst ‖Δ‖/‖g‖ {worst:.2g}")
    tolerances.assert_gradients_close({name: ours[name] for name in theirs}, theirs, tolerances.GRADIENT_OTHERS)


def test_indexer_gradient_is_exactly_zero(case: Case) -> None:
    indexer = {name: value for name, value in _gradient_tensors(case).items() if ".indexer." in name}
    assert indexer
    assert not any(value.any() for value in indexer.values())
    assert all(".indexer." in name for name in case.theirs.absent)


def test_ten_adamw_steps_follow_the_loss(case: Case, record_property: Any) -> None:
    other = Peer.random(case.config, case.seed)
    adamw = torch.optim.AdamW(
        other.module.parameters(),
        lr=OPTIONS.learning_rate,
        betas=(OPTIONS.beta1, OPTIONS.beta2),
        eps=OPTIONS.epsilon,
        weight_decay=0.0,
    )
    layout, parameters, rest, gradient = case.training
    optimizer = make_optimizer(OPTIONS, layout.roles)
    state, losses = optimizer.init(parameters), []

    @jax.jit
    def step(gradients: Arrays, state: Any, parameters: Arrays) -> tuple[Arrays, Any]:
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    for _ in range(OPTIONS.steps):
        theirs = other.gradients(case.tokens).loss
        torch.nn.utils.clip_grad_norm_(other.module.parameters(), OPTIONS.clip)
        adamw.step()
        (ours, _), gradients = gradient(parameters, *rest, case.tokens)
        parameters, state = step(gradients, state, parameters)
        losses.append((float(ours), theirs))
    ours, theirs = np.array(losses).T
    worst = (np.abs(ours - theirs) / theirs).max()
    record_property("figure", f"loss {theirs[0]:.4f} → {theirs[-1]:.4f}, relative difference {worst:.2g}")
    assert theirs[-1] < theirs[0] - 0.01
    assert worst <= tolerances.TRAJECTORY_RELATIVE


def _gradient_tensors(case: Case) -> Tensors:
    top, layers, _ = case.training.layout.assemble(case.gradients, *case.training.rest).to_tensors()
    return _flat(top, list(layers))


def _flat(top: Tensors, layers: list[Tensors]) -> Tensors:
    return top | {f"layers.{i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.items()}


# ---- bfloat16 --------------------------------------------------------------------------------------------------------
@jax.jit
def _logits(model: Transformer, tokens: jax.Array, replay: tuple[Choices, ...] | None) -> jax.Array:
    return model.logits(model.hidden(tokens, replay=replay).hidden)


def test_bfloat16_error_is_at_most_theirs_given_the_same_choices(record_property: Any) -> None:
    config = peer.random_config(5)
    forced, free = np.array([_bfloat16_errors(config, seed) for seed in BFLOAT16_SEEDS]).transpose(1, 0, 2)
    for name, errors in (("float32's choices", forced), ("its own choices", free)):
        ours, theirs = np.median(errors, 0)
        ratio = np.median(errors[:, 0] / errors[:, 1])
        record_property(
            "figure", f"{name}: RMS error {ours:.4f}, transformers {theirs:.4f}, median of the ratios {ratio:.2f}"
        )
    assert np.median(forced[:, 0] / forced[:, 1]) <= tolerances.BFLOAT16_ERROR_RATIO


def _bfloat16_errors(config: ModelConfig, seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """((ours, theirs) with float32's choices, (ours, theirs) with their own): RMS over the logits against float32."""
    exact, tokens = Peer.random(config, seed, is_bfloat16_exact=True), peer.random_tokens(config, seed)
    reference = exact.run(tokens)
    narrow, theirs = _model(exact, "bfloat16", stacked=False), exact.to_bfloat16()

    def rms(logits: Any) -> float:
        return float(np.sqrt(np.mean((np.asarray(logits, np.float32) - reference.logits) ** 2)))

    return (
        (
            rms(_logits(narrow, tokens, _replay(reference.choices, config))),
            rms(theirs.run(tokens, reference.choices).logits),
        ),
        (rms(_logits(narrow, tokens, None)), rms(theirs.run(tokens).logits)),
    )
