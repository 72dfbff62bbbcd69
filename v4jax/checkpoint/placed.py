"""A checkpoint straight onto a mesh: layer by layer, each process reading the experts that its devices hold.

One layer is in host memory at a time. Segments are filled in place on the devices, so no second copy of a model exists.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from v4jax.checkpoint.names import Section
from v4jax.checkpoint.reader import Checkpoint, ParameterDType
from v4jax.dtypes import DTypePolicy
from v4jax.model.tensors import check_tensors, declared_dtype, in_file_order, named_variables
from v4jax.model.transformer import Transformer
from v4jax.sharding import Placement, division_of

Index = tuple[slice, ...]


def read_section(
    checkpoint: Checkpoint, policy: DTypePolicy, section: Section, experts: range | None = None
) -> dict[str, np.ndarray]:
    """One section, or some of its experts, in the form that a model of this policy takes."""
    if policy.native is not None:
        return checkpoint.native(section, experts=experts)
    dtype: ParameterDType = "float32" if policy.param == jnp.float32 else "bfloat16"
    return checkpoint.section(section, dtype, experts=experts)


def load_placed(checkpoint: Checkpoint, policy: DTypePolicy, placement: Placement, *, stacked: bool) -> Transformer:
    """The model of an open checkpoint, on a mesh.

    Raises:
      CheckpointError: as `Checkpoint.section`. UserError: the mesh does not divide the model.
    """
    model = Transformer(checkpoint.config, policy, stacked=stacked).place(placement.mesh, placement.recipe)
    _fill(model, checkpoint, "top", policy, placement, skip=("segments", "mtp"))
    number = 0
    for segment in model.segments:
        buffers: list[dict[str, jax.Array]] = [{} for _ in segment.layers]
        for repeat in range(segment.spec.repeats):
            for layer, buffer in zip(segment.layers, buffers, strict=True):
                if segment.stacked:
                    _put_layer(buffer, layer, checkpoint, ("layers", number), policy, placement, repeat)
                else:
                    _fill(layer, checkpoint, ("layers", number), policy, placement)
                number += 1
        for layer, buffer in zip(segment.layers, buffers, strict=True):
            for name, value in buffer.items():
                named_variables(layer)[name].set_value(value)
    for depth, block in enumerate(model.mtp):
        _fill(block, checkpoint, ("mtp", depth), policy, placement)
    return model


def needed_experts(variables: Mapping[str, nnx.Variable], placement: Placement) -> range | None:
    """The experts of which this process's devices hold something; None where a section has none."""
    for name, variable in variables.items():
        if name.endswith("ffn.experts.w1.weight"):
            value, axes = variable.get_value(), variable.get_metadata()["axes"]
            shape = value.shape[len(value.shape) - len(axes) :]
            parts = _sharding(variable, placement, len(axes)).addressable_devices_indices_map(shape).values()
            spans = [index[0].indices(shape[0]) for index in parts if index is not None]
            return range(min(span[0] for span in spans), max(span[1] for span in spans))
    return None


def _sharding(variable: nnx.Variable, placement: Placement, ndim: int) -> NamedSharding:
    return NamedSharding(placement.mesh, division_of(variable, placement).spec(ndim))


def _read(
    module: nnx.Module, checkpoint: Checkpoint, section: Section, policy: DTypePolicy, placement: Placement,
    skip: tuple[str, ...],
) -> dict[str, tuple[nnx.Variable, jax.Array]]:  # fmt: skip
    """One section on the devices, each array without a repeats axis."""
    variables = named_variables(module, skip)
    experts = needed_experts(variables, placement)
    tensors = read_section(checkpoint, policy, section, experts)
    check_tensors(variables, tensors)
    placed = {}
    for name, variable in variables.items():
        axes, want = variable.get_metadata()["axes"], variable.get_value()
        tensor, shape = in_file_order(variable, tensors[name]), want.shape[len(want.shape) - len(axes) :]
        first = experts.start if experts is not None and axes[0] == "experts" else 0
        if tensor.shape[1:] != shape[1:] or (not first and axes[0] != "experts" and tensor.shape != shape):
            raise ValueError(f"tensor {name}: got shape {tensor.shape}, need {shape}")
        host = tensor.astype(declared_dtype(variable, tensor.dtype), copy=False)
        placed[name] = variable, _on_devices(host, shape, first, _sharding(variable, placement, len(axes)))
    return placed


def _on_devices(host: np.ndarray, shape: tuple[int, ...], first: int, sharding: NamedSharding) -> jax.Array:
    """The array of this shape of which `host` holds the rows from `first` on."""

    def part(index: Index | None) -> np.ndarray:
        if not index:
            return host
        start, stop, _ = index[0].indices(shape[0])
        return host[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)


def _fill(
    module: nnx.Module, checkpoint: Checkpoint, section: Section, policy: DTypePolicy, placement: Placement,
    skip: tuple[str, ...] = (),
) -> None:  # fmt: skip
    for variable, value in _read(module, checkpoint, section, policy, placement, skip).values():
        variable.set_value(value)


def _put_layer(
    buffer: dict[str, jax.Array], module: nnx.Module, checkpoint: Checkpoint, section: Section,
    policy: DTypePolicy, placement: Placement, repeat: int,
) -> None:  # fmt: skip
    """Writes one layer into its place of the stacked arrays, which are made at the first."""
    for name, (variable, value) in _read(module, checkpoint, section, policy, placement, ()).items():
        if name not in buffer:
            want: Any = variable.get_value()
            sharding = _sharding(variable, placement, len(want.shape))
            buffer[name] = jax.jit(functools.partial(jnp.empty, want.shape, value.dtype), out_shardings=sharding)()
        buffer[name] = _put(buffer[name], value, repeat)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)
