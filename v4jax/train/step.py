"""The pure training step, and the evaluation step.

The model is split once into what the optimiser moves, what the load rule moves (router biases), and the rest; the three
are flat dicts by dotted parameter name, which is also how they are saved. Inside the step they are merged again.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from v4jax.compilation import Jitted, jit
from v4jax.config import ModelConfig, RouterKind, layer_plan
from v4jax.model.params import RouterBias
from v4jax.model.transformer import Transformer
from v4jax.sharding import Placement, optimizer_shardings
from v4jax.train import loss as losses
from v4jax.train.optimizer import learning_rate_schedule, make_optimizer, trainable_names
from v4jax.train.recipes import TrainOptions

Arrays = dict[str, Array]
Batch = Mapping[str, Any]
"""`tokens` and `segment_ids`, int32 [B, S], of jax or NumPy."""


class TrainState(NamedTuple):
    """Everything that training changes. Nothing in a step is random, so there is no key."""

    step: Int[Array, ""]
    """Steps done."""
    parameters: Arrays
    """What the optimiser moves, float32."""
    router_biases: Arrays
    """What the load rule moves."""
    optimizer: Any
    """optax's state."""


class Layout(NamedTuple):
    """A model without its arrays: how to put it together again, and what moves which of them."""

    structure: Any
    paths: dict[str, tuple[Any, ...]]
    """Of every variable, by dotted name."""
    roles: dict[str, str]
    """Of the trained parameters."""
    bias_layers: dict[str, np.ndarray]
    """The backbone layers of each router bias that the load rule moves, in the order of its leading axis."""

    def assemble(self, parameters: Arrays, router_biases: Arrays, frozen: Arrays) -> Transformer:
        """The model with these arrays in it; nothing is copied."""
        arrays = parameters | router_biases | frozen
        return nnx.merge(self.structure, nnx.from_flat_state([(self.paths[name], arrays[name]) for name in self.paths]))


def take_apart(model: Transformer, options: TrainOptions) -> tuple[Layout, TrainState, Arrays]:
    """Splits a model into its layout, the state before the first step, and the arrays that stay as they are.

    The state takes over the model's arrays (the trained ones as float32). A training step donates them, so the model
    must not be used afterwards.
    """
    structure, state = nnx.split(model)
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    kinds = {name: type(variable) for name, (_, variable) in variables.items()}
    roles = {
        name: str(variable.get_metadata()["role"])
        for name, (_, variable) in variables.items()
        if issubclass(kinds[name], nnx.Param)
    }
    trained = trainable_names(options, roles, has_mtp=model.config.num_mtp_layers > 0)
    arrays: Arrays = {name: variable[...] for name, (_, variable) in variables.items()}
    placement = model.placement
    parameters = {name: jnp.asarray(arrays[name], jnp.float32) for name in arrays if name in trained}
    layout = Layout(
        structure=structure,
        paths={name: path for name, (path, _) in variables.items()},
        roles={name: roles[name] for name in parameters},
        bias_layers=router_bias_layers(model, [name for name in kinds if issubclass(kinds[name], RouterBias)]),
    )
    start = TrainState(
        step=jnp.int32(0),
        parameters=parameters,
        router_biases={name: arrays[name] for name in layout.bias_layers},
        optimizer=_initial_optimizer(make_optimizer(options, layout.roles), parameters, placement),
    )
    if placement is not None:
        start = start._replace(step=jax.device_put(start.step, NamedSharding(placement.mesh, PartitionSpec())))
    return layout, start, {name: arrays[name] for name in arrays if name not in parameters | start.router_biases}


def _initial_optimizer(
    optimizer: optax.GradientTransformation, parameters: Arrays, placement: Placement | None
) -> optax.OptState:
    """On a mesh the moments lie as their parameters do."""
    if placement is None:
        return optimizer.init(parameters)
    abstract = jax.eval_shape(optimizer.init, parameters)
    shardings = optimizer_shardings(abstract, {k: _named(v) for k, v in parameters.items()}, placement.mesh)
    return jax.jit(optimizer.init, out_shardings=shardings)(parameters)


def _named(array: Array) -> NamedSharding:
    assert isinstance(array.sharding, NamedSharding)
    return array.sharding


def router_bias_layers(model: Transformer, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The backbone layers that share each router bias array, in the order of its leading axis.

    The bias of an MTP block is not among them: the load rule has no figures of its layer.
    """
    layers: dict[str, np.ndarray] = {}
    start = 0
    for index, segment in enumerate(model.segments):
        width, repeats = len(segment.spec.unit), segment.spec.repeats
        for position in range(width):
            prefix = f"segments.{index}.layers.{position}."
            own = start + position + width * np.arange(repeats)
            layers |= {name: own for name in names if name.startswith(prefix)}
        start += width * repeats
    return layers


class Losses(NamedTuple):
    """Sums over the tokens of some rows, float32."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    tokens: Float[Array, ""]
    mtp_tokens: Float[Array, ""]
    expert_load: Float[Array, "L E"]
    balance: Float[Array, ""]
    """Sequence-wise balance losses, summed over rows and layers that choose their experts by scores."""


def summed_losses(model: Transformer, batch: Batch, *, has_mtp: bool, remat: bool = False) -> Losses:
    """Cross entropy of the head, and of the MTP block if asked for, over every token that has a successor.

    `remat` recomputes each layer in the backward pass instead of keeping its intermediates.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    out = model.hidden(tokens, segment_ids, remat=remat)
    labels, mask = losses.next_token_labels(tokens, segment_ids)
    token_loss = functools.partial(losses.token_loss, placement=model.placement)
    main = token_loss(out.hidden, model.head_weight, labels, mask)
    mtp_loss, mtp_tokens = jnp.float32(0), jnp.float32(0)
    if has_mtp:
        labels, mtp_mask = losses.next_token_labels(tokens, segment_ids, ahead=2)
        hidden = model.mtp_hidden(out.streams, tokens, segment_ids)
        # Whole rows where they may be divided: the last position is masked out.
        hidden = jnp.pad(hidden, ((0, 0), (0, 1), (0, 0))) if model.placement is not None else hidden
        size = hidden.shape[1]
        mtp_loss = token_loss(hidden, model.head_weight, labels[:, :size], mtp_mask[:, :size]).loss
        mtp_tokens = _count(mtp_mask)
    routed = np.asarray([spec.router is RouterKind.TOPK for spec in layer_plan(model.config)], np.float32)
    balance = tokens.shape[0] * jnp.sum(out.balance * routed)
    return Losses(main.loss, main.correct, mtp_loss, _count(mask), mtp_tokens, out.expert_load, balance)


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.float32)


class StepMetrics(NamedTuple):
    """What a step reports, float32 scalars."""

    loss: Float[Array, ""]
    """Mean next-token cross entropy of the batch, nats."""
    mtp_loss: Float[Array, ""]
    """The same of the MTP block; 0 without one."""
    accuracy: Float[Array, ""]
    """Share of tokens whose highest logit was right."""
    tokens: Float[Array, ""]
    """Predicted tokens."""
    gradient_norm: Float[Array, ""]
    """Global norm before clipping."""
    learning_rate: Float[Array, ""]
    load_imbalance: Float[Array, ""]
    """Largest expert load of a layer over its mean, averaged over layers: 1 when balanced."""


@runtime_checkable
class TrainStep(Jitted, Protocol):
    """What `make_train_step` returns."""

    def __call__(self, state: TrainState, frozen: Arrays, batch: Batch, /) -> tuple[TrainState, StepMetrics]:
        """Takes one step; the state is donated."""
        ...


def make_train_step(
    layout: Layout, config: ModelConfig, options: TrainOptions, like: TrainState | None = None
) -> TrainStep:
    """The jitted step `(state, frozen, batch) → (state, metrics)`; it donates the state.

    On a mesh `like` is a state (or `ShapeDtypeStruct`s) whose shardings the gradients and the new state get.

    With `accumulate` > 1 the rows are taken in that many parts; every part's loss is divided by the token count of the
    whole batch, so the gradient is that of the whole batch up to the order of sums.
    """
    optimizer = make_optimizer(options, layout.roles)
    schedule = learning_rate_schedule(options)
    has_mtp = config.num_mtp_layers > 0 and options.mtp_weight > 0

    def objective(
        parameters: Arrays, biases: Arrays, frozen: Arrays, batch: Batch, counts: Array, rows: int
    ) -> tuple[Array, Losses]:
        model = layout.assemble(parameters, biases, frozen)
        sums = summed_losses(model, batch, has_mtp=has_mtp, remat=options.remat)
        objective = sums.loss / counts[0] + options.mtp_weight * sums.mtp_loss / counts[1]
        return objective + options.balance_weight * sums.balance / rows, sums

    gradient = jax.grad(objective, has_aux=True)
    shardings: Any = None if like is None else jax.tree.map(lambda leaf: leaf.sharding, like)

    def step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, StepMetrics]:
        rows = batch["tokens"].shape[0]
        counts = jnp.maximum(jnp.stack([_count(_mask(batch, 1)), _count(_mask(batch, 2))]), 1.0)

        def part_gradient(part: Batch) -> tuple[Arrays, Losses]:
            return gradient(state.parameters, state.router_biases, frozen, part, counts, rows)

        gradients, sums = _accumulate(part_gradient, batch, options.accumulate)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings.parameters)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        biases = state.router_biases
        if options.bias_update_speed:
            biases = balanced_biases(biases, sums.expert_load, layout.bias_layers, options.bias_update_speed)
        metrics = StepMetrics(
            loss=sums.loss / counts[0],
            mtp_loss=sums.mtp_loss / counts[1],
            accuracy=sums.correct / counts[0],
            tokens=sums.tokens,
            gradient_norm=optax.tree.norm(gradients),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            load_imbalance=_load_imbalance(sums.expert_load),
        )
        parameters: Any = optax.apply_updates(state.parameters, updates)
        return TrainState(state.step + 1, parameters, biases, optimizer_state), metrics

    if shardings is None:
        return jit(step, is_training=True, donate_argnums=0)
    everywhere = NamedSharding(shardings.step.mesh, PartitionSpec())
    return jit(step, is_training=True, donate_argnums=0, out_shardings=(shardings, everywhere))


def _mask(batch: Batch, ahead: int) -> Array:
    return losses.next_token_labels(batch["tokens"], batch["segment_ids"], ahead=ahead)[1]


def _accumulate(function: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """The sum of `function` over equal parts of the rows."""
    if parts == 1:
        return function(batch)
    stacked = {name: rows.reshape(parts, -1, *rows.shape[1:]) for name, rows in batch.items()}
    out = jax.eval_shape(function, {name: rows[0] for name, rows in stacked.items()})
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zero, stacked)[0]


def balanced_biases(
    biases: Arrays, load: Float[Array, "L E"], layers: Mapping[str, np.ndarray], speed: float
) -> Arrays:
    """Router biases moved by `speed` towards equal load: b ← b + γ·sign(mean load − load) (architecture.md §9.3)."""

    def moved(name: str, bias: Array) -> Array:
        own = load[layers[name]].reshape(bias.shape)
        return bias + speed * jnp.sign(jnp.mean(own, axis=-1, keepdims=True) - own)

    return {name: moved(name, bias) if name in layers else bias for name, bias in biases.items()}


def _load_imbalance(load: Float[Array, "L E"]) -> Float[Array, ""]:
    return jnp.mean(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9))


@jit
def evaluation_step(model: Transformer, batch: Batch) -> Losses:
    """Sums over one batch, MTP included where the model has it."""
    return summed_losses(model, batch, has_mtp=model.config.num_mtp_layers > 0)
