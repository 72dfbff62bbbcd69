"""The step of a request as the TPU compiler gets it: a function, and where each of its arguments lies."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import dispatch
from v4jax import ops
from v4jax.cache import Cache, init_cache
from v4jax.model.transformer import Transformer
from v4jax.plan.request import Request, leaf_bytes
from v4jax.sharding import (
    Placement,
    batch_sharding,
    cache_shardings,
    entry_multiple,
    make_mesh,
    optimizer_shardings,
    parameter_specs,
)
from v4jax.train.step import TrainState, make_train_step, take_apart


@dataclasses.dataclass(frozen=True)
class Program:
    """A step ready to be lowered."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Trees of `ShapeDtypeStruct`s with shardings."""
    donated: tuple[int, ...]
    out_shardings: Any
    weight_bytes: int
    """Per device, as the following ones."""
    optimizer_bytes: int
    cache_bytes: int


def implementations(request: Request) -> dict[str, str]:
    """What runs on a TPU for each operation."""
    forced = dispatch.parse_overrides(request.implementation)
    return {name: one.resolve(forced.get(name), "tpu") for name, one in dispatch.operations().items()}


def build(request: Request) -> Program:
    """The step of a request on its slice. `lower` traces it with a TPU's implementations.

    Raises:
      UserError: the mesh does not fit the slice or the model.
    """
    mesh = make_mesh(request.mesh, request.topology.describe())
    model = request.model().place(mesh, request.step)
    return _train(request, model, mesh) if request.step == "train" else _inference(request, model, mesh)


def lower(request: Request, program: Program) -> Any:
    """The lowered step."""
    device = program_device(program)
    jitted = jax.jit(program.function, donate_argnums=program.donated, out_shardings=program.out_shardings)
    chosen = (f"{name}={implementation}" for name, implementation in implementations(request).items())
    # Kernels ask the default device which chip they are for.
    with ops.implementations(chosen), jax.default_device(device):
        return jitted.trace(*program.arguments).lower(lowering_platforms=("tpu",))


def program_device(program: Program) -> Any:
    """A device of the slice."""
    sharding = jax.tree.leaves(program.arguments)[0].sharding
    return min(sharding.device_set, key=lambda device: device.id)


# ---- inference -------------------------------------------------------------------------------------------------------
def _inference(request: Request, model: Transformer, mesh: Mesh) -> Program:
    placement = Placement(mesh, request.step)
    leaves, structure = jax.tree.flatten(model)
    specs = parameter_specs(model, placement)
    weights = [_like(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, specs, strict=True)]

    def empty() -> Cache:
        return init_cache(
            model.config, request.batch, request.cache_length, model.policy, entry_multiple=entry_multiple(placement)
        )

    shapes = jax.eval_shape(empty)
    places = cache_shardings(shapes, mesh, request.step)
    cache = jax.tree.map(_like, shapes, places)
    size = (request.batch, request.tokens)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=batch_sharding(size, mesh, request.step))

    def step(weights: list[jax.Array], tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits after the last token, and the cache."""
        own: Transformer = jax.tree.unflatten(structure, weights)
        output, cache = own.extend(tokens, cache)
        return own.logits(output.hidden[:, -1:])[:, 0], cache

    return Program(step, (weights, tokens, cache), (2,), (None, places), leaf_bytes(weights), 0, leaf_bytes(cache))


# ---- training --------------------------------------------------------------------------------------------------------
def _train(request: Request, model: Transformer, mesh: Mesh) -> Program:
    options = request.train_options
    leaves, structure = jax.tree.flatten(model)
    layouts = []

    def apart(leaves: list[jax.Array]) -> tuple[TrainState, Any]:
        own: Transformer = jax.tree.unflatten(structure, leaves)
        own.placement = None  # nothing here has a place to be looked up
        layout, state, frozen = take_apart(own, options)
        layouts.append(layout)
        return state, frozen

    state, frozen = jax.eval_shape(apart, leaves)
    layout = layouts[0]._replace(structure=nnx.split(model)[0])
    specs = dict(zip(_names(model), parameter_specs(model, Placement(mesh, "train")), strict=True))
    place = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    everywhere = NamedSharding(mesh, PartitionSpec())
    optimizer = optimizer_shardings(state.optimizer, {name: place[name] for name in state.parameters}, mesh)
    places = TrainState(
        step=everywhere,  # pyright: ignore
        parameters={name: place[name] for name in state.parameters},  # pyright: ignore
        router_biases={name: place[name] for name in state.router_biases},  # pyright: ignore
        optimizer=optimizer,
    )
    size = (request.batch, request.context)
    rows = jax.ShapeDtypeStruct(size, jnp.int32, sharding=batch_sharding(size, mesh, "train"))
    state = jax.tree.map(_like, state, places)
    frozen = {name: _like(leaf, place[name]) for name, leaf in frozen.items()}
    step = make_train_step(layout, model.config, options, like=state)
    return Program(
        step, (state, frozen, {"tokens": rows, "segment_ids": rows}), (0,), (places, None),
        leaf_bytes((state.parameters, state.router_biases, frozen)), leaf_bytes(state.optimizer), 0,
    )  # fmt: skip


def _names(model: Transformer) -> list[str]:
    """Dotted names in the order of the leaves."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]]
    return [".".join(_key(key) for key in path if _key(key) != "value") for path in paths]


def _key(key: Any) -> str:
    return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))


def _like(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
