"""Which mesh axis divides which dimension: of parameters, optimiser state, caches and batches.

A dimension is divided in two ways. `compute` axes divide it while it is used: every device works on its own part
(experts, heads, vocabulary, tokens). `storage` axes divide it only where it is kept (FSDP): a layer's parts are
gathered when the layer runs, and its gradients come back by reduce-scatter. `v4jax.parallel` runs the steps.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from v4jax.cache import Cache, CompressorState, LayerCache, MTPCache
from v4jax.config import ModelConfig
from v4jax.errors import UsageError, UserError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
Recipe = Literal["train", "prefill", "decode"]
MeshSizes = dict[str, int]
Names = tuple[str, ...]

# Experts' tokens move between neighbours on `expert`, rows of a batch stay where they are on `data`; `fsdp` comes last
# because logits of the rows gathered over it are then contiguous.
_COMPUTE: Mapping[str, Names] = {
    "batch": ("data", "expert", "fsdp"),
    "sequence": ("sequence",),
    "entries": ("sequence",),
    "experts": ("expert",),
    "expert_hidden": ("tensor",),
    "heads": ("tensor",),
    "index_heads": ("tensor",),
    "o_groups": ("tensor",),
    "vocab": ("tensor",),
    "head_vocab": ("tensor", "fsdp"),
}
_MAY_STAY_WHOLE = frozenset({("head_vocab", "fsdp")})
"""Compute axes that a dimension goes without where they do not divide it; anything else is an error."""
_STORED = ("hidden", "hidden_out", "q_lora", "o_groups", "heads", "compressed", "index_heads")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis → mesh axes, of one recipe."""

    compute: Mapping[str, Names]
    storage: Mapping[str, Names]


def _rules(storage: Names) -> Rules:
    return Rules(_COMPUTE, dict.fromkeys(_STORED, storage))


RULES: Mapping[Recipe, Rules] = {
    # In training all devices but those of `tensor` hold other tokens: what is gathered anyway is divided over more.
    "train": _rules(("fsdp", "expert", "sequence")),
    # Prefill and decode share the parameters of one process: the same table, and no gathers but over `fsdp`.
    "prefill": _rules(("fsdp",)),
    "decode": _rules(("fsdp",)),
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the recipe by which a model lies on it. Static: it belongs to a model's structure."""

    mesh: Any
    """A `Mesh`; or an `AbstractMesh`, where only sizes are asked for."""
    recipe: Recipe

    @property
    def sizes(self) -> MeshSizes:
        """Devices along each axis."""
        return dict(self.mesh.shape)

    @property
    def rules(self) -> Rules:
        """The table in force."""
        return RULES[self.recipe]

    @property
    def has_ragged_exchange(self) -> bool:
        """Whether the devices implement `ragged_all_to_all`."""
        return self.mesh.devices.flat[0].platform == "tpu"

    def live(self, names: Iterable[str]) -> Names:
        """The axes with more than one device."""
        return tuple(name for name in names if self.sizes[name] > 1)

    def size(self, names: Iterable[str]) -> int:
        """Devices along several axes."""
        return math.prod(self.sizes[name] for name in names)

    def dividing(self, logical: str, count: int) -> Names:
        """The compute axes of `logical`, in order, each only if it still divides `count`."""
        chosen: Names = ()
        for name in self.live(self.rules.compute[logical]):
            if count % self.size((*chosen, name)) == 0:
                chosen = (*chosen, name)
        return chosen


# ---- meshes ----------------------------------------------------------------------------------------------------------
def parse_mesh(text: str) -> MeshSizes:
    """`data=2,expert=4` → sizes of all axes, 1 where not named.

    Raises:
      UsageError: an unknown axis, one named twice, or a size that is no positive integer.
    """
    sizes: MeshSizes = dict.fromkeys(AXES, 1)
    seen: set[str] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\w+)\s*", part)
        if match is None:
            raise UsageError(f"--mesh: got {text!r}; need axis=size, comma-separated, such as data=2,expert=4")
        name, size = match.groups()
        if name not in AXES:
            raise UsageError(f"--mesh: unknown axis {name!r} in {text!r}; need some of {', '.join(AXES)}")
        if name in seen:
            raise UsageError(f"--mesh: axis {name} is used twice in {text!r}; name each axis once")
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--mesh: {name}={size} in {text!r}; need a positive number of devices")
        seen.add(name)
        sizes[name] = int(size)
    return sizes


def format_mesh(sizes: Mapping[str, int]) -> str:
    """The axes with more than one device, as `parse_mesh` reads them."""
    return ",".join(f"{name}={sizes[name]}" for name in AXES if sizes[name] > 1) or "data=1"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all five axes. `tensor` varies fastest: its traffic is the most frequent.

    Args:
      sizes: by axis, 1 where missing.
      devices: all of the process's, if None.

    Raises:
      UserError: the sizes need another number of devices than there are.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UserError(f"mesh: unknown axis {unknown[0]!r}; need some of {', '.join(AXES)}")
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) != len(devices):
        named = " × ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True) if size > 1) or "1"
        raise UserError(
            f"mesh: {named} needs {math.prod(shape)} devices, there are {len(devices)}; "
            "choose sizes whose product is the number of devices"
        )
    order = _by_topology(shape, devices) if devices[0].platform == "tpu" else np.asarray(devices).reshape(shape)
    return Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _by_topology(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Neighbours on the torus along each mesh axis, where the shape allows it."""
    from jax.experimental import mesh_utils

    return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)


_SMALL_PARAMETERS = 2_000_000_000
"""A model up to this size fits every device whole: rows alone are divided."""


def default_mesh(config: ModelConfig, device_count: int, recipe: Recipe = "decode") -> MeshSizes:
    """Sizes for a model on so many devices.

    A small model is copied to every device (`data`; in training `fsdp`). A large one divides its experts first, then in
    training everything else (`fsdp`), and in inference heads and vocabulary (`tensor`); what is left is `data`.
    """
    sizes: MeshSizes = dict.fromkeys(AXES, 1)
    rest = device_count
    experts = config.num_hidden_layers * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    if experts > _SMALL_PARAMETERS:
        sizes["expert"] = math.gcd(rest, config.n_routed_experts)
        rest //= sizes["expert"]
    if recipe == "train":
        sizes["fsdp"] = math.gcd(rest, config.hidden_size)
        rest //= sizes["fsdp"]
    elif experts > _SMALL_PARAMETERS:
        widths = (config.o_groups, config.num_attention_heads, config.moe_intermediate_size, config.vocab_size)
        sizes["tensor"] = math.gcd(rest, config.index_n_heads, *widths)
        rest //= sizes["tensor"]
    sizes["data"] = rest
    return sizes


def choose_mesh(text: str | None, config: ModelConfig, recipe: Recipe) -> Mesh | None:
    """The mesh that `--mesh` asks for, or the default one; None means one device.

    The default is `default_mesh` of all devices. One process on CPU has one device for this purpose: its virtual
    devices share the same cores. A mesh of fewer devices than there are takes the first ones.

    Raises:
      UserError: a mesh of more devices than there are, or one that does not divide the model.
    """
    devices, is_alone = jax.devices(), jax.process_count() == 1
    if text is not None:
        sizes = parse_mesh(text)
    elif is_alone and devices[0].platform == "cpu":
        return None
    else:
        sizes = default_mesh(config, len(devices), recipe)
    check_mesh(config, sizes)
    count = math.prod(sizes.values())
    if count == 1 and is_alone:
        return None
    return make_mesh(sizes, devices[:count] if is_alone and count < len(devices) else devices)


def check_mesh(config: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh whose axes do not divide what they must.

    Raises:
      UserError: naming the axis, both numbers and what would do.
    """
    needs = {
        "expert": {"n_routed_experts": config.n_routed_experts},
        "tensor": {
            "num_attention_heads": config.num_attention_heads,
            "o_groups": config.o_groups,
            "index_n_heads": config.index_n_heads,
            "moe_intermediate_size": config.moe_intermediate_size,
            "vocab_size": config.vocab_size,
        },
    }
    for axis, fields in needs.items():
        size = sizes.get(axis, 1)
        for field, count in fields.items():
            if count % size:
                common = math.gcd(*fields.values())
                fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                raise UserError(f"mesh: {axis}={size} does not divide {field}={count}; {axis} may be {fitting}")


# ---- specs -----------------------------------------------------------------------------------------------------------
def axis_entry(names: Names) -> str | Names | None:
    """These axes as one entry of a `PartitionSpec`."""
    return None if not names else names[0] if len(names) == 1 else names


@dataclasses.dataclass(frozen=True)
class Division:
    """How one parameter is divided: per trailing dimension, the axes of its use and the further ones of its storage."""

    compute: tuple[Names, ...]
    storage: tuple[Names, ...]

    def spec(self, ndim: int) -> PartitionSpec:
        """Where it is kept."""
        leading = ndim - len(self.compute)
        parts = (axis_entry((*a, *b)) for a, b in zip(self.compute, self.storage, strict=True))
        return PartitionSpec(*[None] * leading, *parts)


def divide(shape: Sequence[int], axes: Sequence[str | None], placement: Placement) -> Division:
    """The division of a parameter with these trailing logical axes.

    No mesh axis divides two of its dimensions. A storage axis goes to the first dimension that it divides and to none
    where there is no such dimension: the parameter is then held whole along that axis.

    Raises:
      UserError: a compute axis does not divide its dimension.
    """
    rules = placement.rules
    sizes = tuple(shape[len(shape) - len(axes) :])
    compute: list[Names] = []
    used: set[str] = set()
    for size, logical in zip(sizes, axes, strict=True):
        chosen: Names = ()
        for name in placement.live(rules.compute.get(logical or "", ())):
            if name in used:
                continue
            if size % placement.size((*chosen, name)):
                if (logical, name) in _MAY_STAY_WHOLE:
                    continue
                raise UserError(
                    f"mesh: {name}={placement.sizes[name]} does not divide a dimension {logical} of {size} "
                    f"(shape {tuple(shape)}); choose a divisor of {size // placement.size(chosen)}"
                )
            chosen = (*chosen, name)
        used |= set(chosen)
        compute.append(chosen)
    storage: list[Names] = [()] * len(sizes)
    # Vectors stay whole: they are too small to be worth a gather.
    wanted = {name for logical in axes for name in rules.storage.get(logical or "", ()) if len(axes) > 1}
    for name in (name for name in AXES[::-1] if name in wanted and placement.sizes[name] > 1 and name not in used):
        for i, (size, logical) in enumerate(zip(sizes, axes, strict=True)):
            whole = placement.size((*compute[i], *storage[i], name))
            if name in rules.storage.get(logical or "", ()) and size % whole == 0:
                storage[i] = (*storage[i], name)
                break
    return Division(tuple(compute), tuple(storage))


def variables(module: Any) -> list[nnx.Variable]:
    """The variables of a module in the order of its leaves."""
    return jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def division_of(variable: nnx.Variable, placement: Placement) -> Division:
    """`divide` of a whole variable: one that is not itself a part."""
    return divide(variable.get_value().shape, variable.get_metadata()["axes"], placement)


def parameter_specs(module: Any, placement: Placement) -> list[PartitionSpec]:
    """One spec per leaf of a module of whole arrays or `ShapeDtypeStruct`s."""
    return [division_of(v, placement).spec(len(v.get_value().shape)) for v in variables(module)]


def parameter_shardings(module: Any, mesh: Mesh, recipe: Recipe) -> Any:
    """A tree like `module` (arrays or `ShapeDtypeStruct`s) with a `NamedSharding` in place of each array."""
    specs = parameter_specs(module, Placement(mesh, recipe))
    return jax.tree.unflatten(jax.tree.structure(module), [NamedSharding(mesh, spec) for spec in specs])


def optimizer_shardings(state: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of optax's state: what has a parameter's name in its path lies as the parameter, the rest everywhere.

    Args:
      state: optax's state of a flat dict of parameters by name.
      parameters: their shardings by the same names.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        own = [parameters[key] for key in keys if key in parameters]
        if own and len(own[0].spec) <= len(leaf.shape):
            return own[0]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def token_spec(shape: Sequence[int], placement: Placement, *, sequence: bool) -> PartitionSpec:
    """Spec of an array [B, …], or of [B, S, …] whose tokens are divided too."""
    batch = axis_entry(placement.dividing("batch", shape[0]))
    if len(shape) < 2 or not sequence:
        return PartitionSpec(batch)
    return PartitionSpec(batch, axis_entry(placement.live(placement.rules.compute["sequence"])))


def batch_sharding(shape: Sequence[int], mesh: Mesh, recipe: Recipe) -> NamedSharding:
    """Of tokens or segment ids [B, S]: rows over data, expert and fsdp as far as these divide B, tokens over sequence
    where that divides S.
    """
    placement = Placement(mesh, recipe)
    is_divided = len(shape) > 1 and shape[1] % placement.size(placement.rules.compute["sequence"]) == 0
    return NamedSharding(mesh, token_spec(shape, placement, sequence=is_divided))


def entry_multiple(placement: Placement | None) -> int:
    """What the number of compressed entries of a cache must be a multiple of."""
    return 1 if placement is None else placement.size(placement.rules.compute["entries"])


def cache_specs(cache: Any, placement: Placement, batch: int) -> Any:
    """A tree like `cache` (or a part of one) of specs: rows as in a batch, entries and index keys over `sequence`."""
    rows = axis_entry(placement.dividing("batch", batch))
    entries = axis_entry(placement.live(placement.rules.compute["entries"]))

    def spec(array: Any, *trailing: Any) -> PartitionSpec:
        return PartitionSpec(*[None] * (len(array.shape) - len(trailing)), *trailing)

    def layer(one: LayerCache) -> LayerCache:
        def state(old: CompressorState | None) -> CompressorState | None:
            return None if old is None else CompressorState(*(spec(a, rows, None, None) for a in (old.kv, old.gate)))

        lead = len(one.window.shape) - 3  # entries may lie with their rows cut into lanes

        def slots(array: Any) -> Any:
            return None if array is None else spec(array, rows, entries, *[None] * (len(array.shape) - lead - 2))

        return LayerCache(
            spec(one.window, rows, None, None), slots(one.entries), state(one.state),
            slots(one.index_keys), state(one.index_state),
        )  # fmt: skip

    def visit(node: Any) -> Any:
        if isinstance(node, LayerCache):
            return layer(node)
        if isinstance(node, MTPCache):
            return MTPCache(layer(node.layer), spec(node.streams, rows, None, None))
        if isinstance(node, Cache):
            parts = {name: visit(getattr(node, name)) for name in ("segments", "mtp", "length")}
            return dataclasses.replace(node, **parts)
        if isinstance(node, tuple):
            return tuple(visit(part) for part in node)
        return PartitionSpec(rows)

    return visit(cache)


def cache_shardings(cache: Cache, mesh: Mesh, recipe: Recipe = "decode") -> Any:
    """A tree like `cache` (arrays or `ShapeDtypeStruct`s) of `NamedSharding`s."""
    specs = cache_specs(cache, Placement(mesh, recipe), cache.length.shape[0])
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
