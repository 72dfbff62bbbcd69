"""A module's variables by name, and how a checkpoint's tensors become theirs."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.formats import FP4_BLOCK
from v4jax import ops, parallel
from v4jax.errors import UserError
from v4jax.quant import Codes, PackedCodes, PackedScales, Scales
from v4jax.sharding import Placement, division_of


def named_variables(module: nnx.Module, skip: tuple[str, ...] = ()) -> dict[str, nnx.Variable]:
    """A module's variables themselves, by dotted path: inside a layer the official tensor name."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable) and path[0] not in skip
    }


def flatten(module: nnx.Module, skip: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """NumPy copies of a module's variables by name."""
    return {
        name: in_file_order(variable, parallel.on_host(variable[...]))
        for name, variable in named_variables(module, skip).items()
    }


def in_file_order(variable: nnx.Variable, array: Any) -> Any:
    """From a variable's order of axes to a file's, or back: packed FP4 experts have their last two swapped."""
    return ops.k_major(array) if isinstance(variable, PackedCodes | PackedScales) else array


def check_tensors(variables: Mapping[str, nnx.Variable], tensors: Mapping[str, Any]) -> None:
    """Refuses tensors that are not exactly those of the variables, by name."""
    missing, unknown = sorted(variables.keys() - tensors.keys()), sorted(tensors.keys() - variables.keys())
    if missing or unknown:
        raise ValueError(f"tensors: missing {missing or 'none'}, unknown {unknown or 'none'}")


def fill(module: nnx.Module, tensors: Mapping[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Gives an abstract module its arrays, checked by name and shape and cast to the declared dtypes."""
    variables = named_variables(module, skip)
    check_tensors(variables, tensors)
    for name, variable in variables.items():
        want, given = variable.get_value(), in_file_order(variable, tensors[name])
        if given.shape != want.shape:
            raise ValueError(f"tensor {name}: got shape {given.shape}, need {want.shape}")
        variable.set_value(jnp.asarray(given, dtype=declared_dtype(variable, given.dtype)))


def declared_dtype(variable: nnx.Variable, given: Any) -> Any:
    """The dtype that a variable takes a checkpoint's values in.

    Scales keep any float type: rounding one would change every value that it scales.
    """
    return given if isinstance(variable, Scales) else variable.get_value().dtype


def check_whole_blocks(module: nnx.Module, tile: tuple[int, int], placement: Placement) -> None:
    """Refuses a mesh that would cut quantised matrices where a scale has values on both sides.

    Args:
        module: of whole arrays or `ShapeDtypeStruct`s.
        tile: rows and columns per scale of FP8 codes.

    Raises:
        UserError: naming the matrix, both numbers and what would do.
    """
    for path, node in nnx.iter_graph(module):
        if not isinstance(node, Codes):
            continue
        block = (FP4_BLOCK // 2, 1) if isinstance(node, PackedCodes) else tile
        sizes, divided = node.get_value().shape[-2:], division_of(node, placement).compute[-2:]
        for size, length, axes in zip(sizes, block, divided, strict=True):
            parts = placement.size(axes)
            if parts > 1 and (size // parts) % length:
                raise UserError(
                    f"mesh: {'·'.join(axes)}={parts} cuts {'.'.join(map(str, path))} of {size} into {size // parts}, "
                    f"native weights have a scale for every {length}; choose other axes, or weights bf16"
                )
