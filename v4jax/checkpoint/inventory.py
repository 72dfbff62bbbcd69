"""Whether the tensors of a checkpoint are exactly those of its config: all differences found in one error."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kernels_pallas.formats import fp4_scale_shape, fp8_scale_shape
from v4jax.checkpoint.names import (
    ParameterSpec,
    Spelling,
    Storage,
    StoredTensor,
    section_parameters,
    sections,
    stored_tensors,
)
from v4jax.checkpoint.tensor_file import CheckpointError, TensorInfo, summarise
from v4jax.config import ModelConfig

_FLOATS = ("F32", "BF16", "F16")
_DTYPES = {
    Storage.DENSE: (*_FLOATS, "F8_E4M3"),
    Storage.EXPERT: (*_FLOATS, "F8_E4M3", "I8"),
    Storage.PLAIN: _FLOATS,
    Storage.NORM: _FLOATS,
    Storage.EXACT: _FLOATS,
    Storage.TABLE: ("I64", "I32"),
}
_QUANTISED = ("F8_E4M3", "I8")
_SCALE_DTYPES = ("F8_E8M0", "U8", "F32")

_Problem = tuple[str, str]
"""Its kind (missing, extra, mis-shaped, mis-typed) and the details."""


def fp8_tile(config: ModelConfig) -> tuple[int, int]:
    """Rows and columns of a weight that share an FP8 scale.

    Raises:
        CheckpointError: `weight_block_size` is not two positive integers.
    """
    block = (config.quantization_config or {}).get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"quantization_config.weight_block_size: got {block!r}, need two positive integers; V4 has [128, 128]"
        )
    return block[0], block[1]


def check_inventory(
    path: Any,
    config: ModelConfig,
    spelling: Spelling,
    inventory: Mapping[str, TensorInfo],
    ignored: Collection[str] = (),
) -> list[str]:
    """Compares all names, shapes and dtypes with what the config needs.

    Args:
        path: named in the error.
        config: what the tensors must fit.
        spelling: of the tensor names.
        inventory: the tensors of the files.
        ignored: those that may be there.

    Returns:
        What a user should know although nothing is wrong.

    Raises:
        CheckpointError: tensors are missing, extra, mis-shaped or mis-typed.
    """
    tile = fp8_tile(config)
    problems: list[_Problem] = []
    used = set(ignored)
    rounded_biases = 0
    for section in sections(config):
        for parameter in section_parameters(config, section):
            dtype: str | None = None
            for stored in stored_tensors(section, parameter, spelling):
                if stored.name in used:  # another slab of a stacked tensor
                    continue
                scales = [name for name in stored.scale_names if name in inventory]
                info = inventory.get(stored.name)
                dtype = dtype or (info.dtype if info else None)
                used.add(stored.name)
                if info is None or info.dtype in _QUANTISED:
                    used.update(scales)  # not an extra tensor, whatever else is wrong with it
                problems.extend(_weight_problems(parameter, stored, info, dtype))
                if info is not None and info.dtype in _QUANTISED and info.dtype in _DTYPES[parameter.storage]:
                    problems.extend(_scale_problems(stored, info, [inventory[name] for name in scales], tile))
                if info is not None and parameter.key == "ffn.gate.bias" and info.dtype != "F32":
                    rounded_biases += 1
    problems.extend(("extra", name) for name in sorted(inventory.keys() - used))
    if problems:
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in problems).items())
        raise CheckpointError(
            f"{path}: tensors do not fit config.json: {counts}; fetch config and weights of one revision:\n"
            + summarise([f"{kind}: {text}" for kind, text in problems])
        )
    if not rounded_biases:
        return []
    return [
        f"{rounded_biases} router biases are not stored in F32: who saved them rounded them, which changes some of the "
        "choices of experts"
    ]


def _weight_problems(
    parameter: ParameterSpec, stored: StoredTensor, info: TensorInfo | None, dtype: str | None
) -> Iterator[_Problem]:
    """`dtype` is that of the parameter's first tensor: the experts of a layer share one."""
    if info is None:
        yield "missing", f"{stored.name} {list(stored.shape)}"
        return
    allowed = _DTYPES[parameter.storage]
    if info.dtype not in allowed:
        yield "mis-typed", f"{info.name}: got {info.dtype}, need {' or '.join(allowed)}"
        return
    if info.dtype != dtype:
        yield "mis-typed", f"{info.name}: got {info.dtype}, need {dtype} as in the layer's first expert"
    *leading, inputs = stored.shape
    if info.dtype == "I8" and inputs % 2:
        yield "mis-shaped", f"{info.name}: got FP4 for an odd number of inputs, {inputs}, need another dtype"
        return
    need = (*leading, inputs // 2) if info.dtype == "I8" else stored.shape
    if info.shape != need:
        yield "mis-shaped", f"{info.name}: got {list(info.shape)}, need {list(need)}"


def _scale_problems(
    stored: StoredTensor, info: TensorInfo, scales: list[TensorInfo], tile: tuple[int, int]
) -> Iterator[_Problem]:
    if not scales:
        yield "missing", f"{stored.scale_names[0]}, the scale of {info.name} ({info.dtype})"
        return
    for unneeded in scales[1:]:
        yield "extra", f"{unneeded.name}: {info.name} has another scale, {scales[0].name}"
    scale = scales[0]
    need = fp4_scale_shape(stored.shape) if info.dtype == "I8" else fp8_scale_shape(stored.shape, tile)
    if scale.dtype not in _SCALE_DTYPES:
        yield "mis-typed", f"{scale.name}: got {scale.dtype}, need {' or '.join(_SCALE_DTYPES)}"
    if scale.shape != need:
        yield "mis-shaped", f"{scale.name}: got {list(scale.shape)}, need {list(need)}"
