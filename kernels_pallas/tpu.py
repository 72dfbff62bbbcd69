"""Numbers and helpers that every kernel shares: what each chip has, tiles, the VMEM budget, compiler parameters.

All figures are per jax device: on tpu7x that is one of the chip's two TensorCores with its half of the memory.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
"""Columns of a vector register, and the unit of a last dimension."""
SUBLANES = 8
"""Rows of a vector register of 32-bit values."""
_MIB = 1 << 20


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉ for non-negative a and positive b."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `a`."""
    return cdiv(a, multiple) * multiple


def sublanes(dtype: DTypeLike) -> int:
    """Rows of a tile of this dtype: 8 for 32-bit values, 16 for 16-bit, 32 for 8-bit."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


def tile_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array in VMEM, its last two dimensions padded to whole tiles."""
    *leading, rows, columns = (1, *shape) if len(shape) == 1 else shape
    size = round_up(rows, sublanes(dtype)) * round_up(columns, LANES)
    for length in leading:
        size *= length
    return size * jnp.dtype(dtype).itemsize


def mean_visible(tiles: int) -> float:
    """Of so many tiles of keys, those that a causal query meets on average over all queries of the whole context.

    What a cost estimate counts: how far a chunk of a prompt has come is not known when its step is compiled.
    """
    return (tiles + 1) / 2 if tiles else 0.0


def array_bytes(*arrays: Any) -> int:
    """Bytes of `ShapeDtypeStruct`s or trees of them."""
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(arrays))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one jax device of a TPU generation has."""

    name: str
    device_kinds: tuple[str, ...]
    """How JAX names such a device (`device_kind`)."""
    topology: str
    """The smallest topology that its compiler describes."""
    vmem_bytes: int
    mxu_flops: int
    """Matrix-unit operations per cycle on bf16 (a multiply and an add are two)."""
    mxu_flops_fp8: int
    mxu_depth: int
    """Contraction depth that fills the matrix unit: a shallower product wastes the rest."""
    hbm_bytes_per_cycle: int


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), "v5e:2x2", 128 * _MIB, 131072, 131072, 128, 546),
        Chip("v5p", ("TPU v5", "TPU v5p"), "v5p:2x2x1", 64 * _MIB, 262144, 262144, 128, 1580),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), "v6e:2x2", 128 * _MIB, 524288, 524288, 256, 937),
        Chip("tpu7x", ("TPU7x", "TPU v7x"), "tpu7x:2x2x1", 64 * _MIB, 524288, 1048576, 256, 1677),
    )
}
_INTERPRETED = "v5p"


def chip_named(name: str) -> Chip:
    """A chip of the table.

    Raises:
      ValueError: no such chip.
    """
    if name not in CHIPS:
        raise ValueError(f"chip: got {name!r}, need one of {', '.join(CHIPS)}")
    return CHIPS[name]


def current_platform() -> str:
    """The platform that is compiled for, "cpu", "gpu" or "tpu": that of `jax.default_device`, or else the default's."""
    return _current_device().platform


def current_chip(chip: str | Chip | None = None) -> Chip:
    """The chip that a kernel is compiled for.

    Args:
      chip: wins if given. Otherwise the device of `jax.default_device`, which may belong to a described topology,
        otherwise the default backend's. Where no TPU is in sight a kernel can only be interpreted: then the blocks are
        those of v5p, whose limits hold on every chip.

    Raises:
      ValueError: an unknown name, or a TPU that the table lacks.
    """
    if isinstance(chip, Chip):
        return chip
    if chip is not None:
        return chip_named(chip)
    device = _current_device()
    for known in CHIPS.values():
        if device.device_kind in known.device_kinds:
            return known
    if device.platform == "tpu":
        raise ValueError(f"TPU kind: got {device.device_kind!r}, kernels know {', '.join(CHIPS)}; name one as `chip`")
    return CHIPS[_INTERPRETED]


def _current_device() -> Any:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.devices(device)[0] if device is None or isinstance(device, str) else device


def vmem_budget(chip: Chip) -> int:
    """VMEM that a kernel may plan for: the compiler keeps 1/16 for its own scratch and spills."""
    return chip.vmem_bytes - chip.vmem_bytes // 16


def vmem_with_room(planned: int, chip: Chip) -> int:
    """A limit for a kernel that plans for so many bytes: room for spills; XLA keeps arrays of its own in the rest."""
    return min(vmem_budget(chip), planned + planned // 4 + (8 << 20))


def check_vmem(kernel: str, needed: int, chip: Chip, remedy: str) -> None:
    """Refuses a kernel whose blocks do not fit.

    Args:
      kernel: its name with the shapes that count, for the message.
      needed: bytes of all blocks (twice for what the pipeline double-buffers) and scratch, tiles padded.
      remedy: what to change.

    Raises:
      ValueError: with the bytes needed and available.
    """
    available = vmem_budget(chip)
    if needed > available:
        raise ValueError(f"{kernel}: needs {needed:,} bytes of VMEM, {chip.name} has {available:,} available; {remedy}")


def compiler_params(
    chip: Chip, *, semantics: tuple[str, ...] = (), vmem_bytes: int | None = None, **others: Any
) -> pltpu.CompilerParams:
    """Parameters for `pallas_call`.

    Args:
      semantics: "parallel" or "arbitrary" per grid dimension.
      vmem_bytes: limit, by default all that `vmem_budget` grants: the compiler's own default is far lower.
    """
    return pltpu.CompilerParams(
        dimension_semantics=semantics or None,  # pyright: ignore[reportArgumentType]
        vmem_limit_bytes=vmem_bytes or vmem_budget(chip),
        **others,
    )
