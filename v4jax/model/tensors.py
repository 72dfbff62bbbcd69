"""A module's variables by name, and how a checkpoint's tensors become theirs."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import ops, parallel
from v4jax.quant import PackedCodes, PackedScales, Scales


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
