"""Running one device's part of a step: `shard_map` over the whole mesh, and the collectives that its parts need.

The model's code runs unchanged on the part of one device. Where parts must meet it calls a function of this file, which
reads how the running step is divided (`current()`) and does nothing at all where no axis divides it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from v4jax.cache import ring_extend
from v4jax.sharding import Names, Placement, division_of, parameter_specs, variables


@dataclasses.dataclass(frozen=True)
class Shard:
    """How the running step is divided; axes of one device are left out."""

    placement: Placement
    batch: Names
    """Axes that divide the rows."""
    sequence: Names
    """Axes that divide the tokens of each row."""

    @property
    def tokens(self) -> Names:
        """Axes whose devices hold different tokens."""
        return self.batch + self.sequence

    def axes(self, logical: str) -> Names:
        """The axes that divide this logical axis while it is used."""
        return self.placement.live(self.placement.rules.compute[logical])

    def size(self, names: Names) -> int:
        """Devices along several axes."""
        return self.placement.size(names)


_CURRENT: ContextVar[Shard | None] = ContextVar("the running step's division", default=None)


def current() -> Shard | None:
    """The division of the step being traced, or None outside `run`."""
    return _CURRENT.get()


def axes(logical: str) -> Names:
    """The axes that divide a logical axis in the step being traced; () outside."""
    shard = current()
    return () if shard is None else shard.axes(logical)


def sequence_axes() -> Names:
    """The axes that divide the tokens of a row in the step being traced."""
    shard = current()
    return () if shard is None else shard.sequence


def batch_axes() -> Names:
    """The axes that divide the rows in the step being traced."""
    shard = current()
    return () if shard is None else shard.batch


def token_axes() -> Names:
    """The axes whose devices hold different tokens in the step being traced."""
    shard = current()
    return () if shard is None else shard.tokens


def device_count(names: Names) -> int:
    """Devices along these axes."""
    shard = current()
    return 1 if shard is None else shard.size(names)


# ---- placing ---------------------------------------------------------------------------------------------------------
def annotate(module: Any, placement: Placement) -> None:
    """Notes in every variable of a module of whole arrays (or `ShapeDtypeStruct`s) how it is divided."""
    for variable in variables(module):
        variable.set_metadata(division=division_of(variable, placement))


def put(module: Any, placement: Placement) -> Any:
    """The module with its arrays on the mesh."""
    leaves, structure = jax.tree.flatten(module)
    specs = parameter_specs(module, placement)
    moved = [jax.device_put(a, NamedSharding(placement.mesh, s)) for a, s in zip(leaves, specs, strict=True)]
    return jax.tree.unflatten(structure, moved)


def on_host(array: Any) -> np.ndarray:
    """The whole array in this process's memory; all processes that hold a part must ask for it together."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def run(
    function: Callable[..., Any], shard: Shard, module: Any, arguments: Sequence[Any], specs: Any, out_specs: Any
) -> Any:
    """`function(module, *arguments)` on every device's parts.

    Args:
      module: whole arrays; each device gets its parts by the module's own specs.
      specs: of the arguments, a tree (or its prefix) of `PartitionSpec`.
      out_specs: of the result.
    """
    leaves, structure = jax.tree.flatten(module)

    def body(leaves: list[jax.Array], arguments: Sequence[Any]) -> Any:
        token = _CURRENT.set(shard)
        try:
            return function(jax.tree.unflatten(structure, leaves), *arguments)
        finally:
            _CURRENT.reset(token)

    in_specs = (parameter_specs(module, shard.placement), tuple(specs))
    # Loops of the operations start from constants, which the check of varying axes would refuse.
    mapped = jax.shard_map(body, mesh=shard.placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(leaves, tuple(arguments))


def gathered(module: Any) -> Any:
    """The module with every parameter as the step uses it: parts that are only stored apart are brought together.

    The gradient of a gathered parameter is reduced and scattered back to where the parts are kept.
    """
    if current() is None:
        return module

    def whole(variable: nnx.Variable) -> nnx.Variable:
        division = variable.get_metadata().get("division")
        if division is None or not any(division.storage):
            return variable
        value: Any = variable.get_value()
        for i, names in enumerate(division.storage):
            value = join(value, names, value.ndim - len(division.storage) + i)
        return variable.replace(value, division=None)

    return jax.tree.map(whole, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


# ---- collectives that vanish where nothing is divided ----------------------------------------------------------------
def add(x: jax.Array, names: Names) -> jax.Array:
    """The sum over the devices along these axes."""
    return jax.lax.psum(x, names) if names else x


def highest(x: jax.Array, names: Names) -> jax.Array:
    """The maximum over the devices along these axes; without a gradient."""
    return jax.lax.pmax(jax.lax.stop_gradient(x), names) if names else x


def join(x: jax.Array, names: Names, axis: int) -> jax.Array:
    """The parts of all devices along these axes, one after another."""
    # Axis by axis, the last one first: the TPU compiler makes an all-reduce of a gather over several at once.
    for name in reversed(names):
        x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def trade(x: jax.Array, names: Names, axis: int) -> jax.Array:
    """All devices' parts of `axis`, for this device's part of the tokens [B, S, …] that all of them hold."""
    return jax.lax.all_to_all(x, names, split_axis=1, concat_axis=axis, tiled=True)


def index(names: Names) -> jax.Array:
    """This device's place along these axes."""
    return jax.lax.axis_index(names)


def own_part(x: jax.Array, names: Names, axis: int) -> jax.Array:
    """This device's part of an array that all devices along these axes hold."""
    if not names:
        return x
    size = x.shape[axis] // device_count(names)
    return jax.lax.dynamic_slice_in_dim(x, index(names) * size, size, axis)


# ---- neighbours along the sequence -----------------------------------------------------------------------------------
def rows_before(rows: jax.Array, count: int, fill: float = 0) -> jax.Array:
    """The `count` rows before the first of this device's [B, S, …]; `fill` where the row of tokens begins."""
    names = sequence_axes()
    length = rows.shape[1]
    pieces: list[jax.Array] = []
    missing, devices = count, device_count(names)
    for hop in range(1, devices):
        if not missing:
            break
        taken = min(missing, length)
        moves = [(i, i + hop) for i in range(devices - hop)]
        piece = jax.lax.ppermute(rows[:, length - taken :], names, moves)
        pieces.insert(0, jnp.where(index(names) >= hop, piece, jnp.asarray(fill, rows.dtype)))
        missing -= taken
    if missing:
        pieces.insert(0, jnp.full((rows.shape[0], missing, *rows.shape[2:]), fill, rows.dtype))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def ring_before(ring: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """The ring [B, W, …] of the W tokens before this device's rows [B, S, …], S ≥ W, which begin at `start` [B].

    The first device's is the cache's own.
    """
    names = sequence_axes()
    if not names:
        return ring
    slots = ring.shape[1]
    before = rows_before(rows, slots).astype(ring.dtype)
    return jnp.where(index(names) == 0, ring, ring_extend(ring, before, start - slots, start))


def ring_after(ring: jax.Array, start: jax.Array, end: jax.Array, length: int) -> jax.Array:
    """The ring after all devices' rows, on all devices: that of the last device with a real token.

    Args:
      ring: the ring after this device's `length` rows, of which those of positions `start` to `end` [B] are real.
    """
    names = sequence_axes()
    if not names:
        return ring
    total = jax.lax.psum(end - start, names)
    owner = jnp.maximum((total + length - 1) // length - 1, 0)
    is_owner = (owner == index(names)).reshape(-1, *[1] * (ring.ndim - 1))
    return jax.lax.psum(jnp.where(is_owner, ring, 0), names)
