"""TPU chips and the pod slices that exist: `v6e:8x8`, `tpu7x:4x4x4`.

Limits are those of one JAX device: a chip, but for tpu7x, whose chips are two devices each. Rates are the makers'
published peaks; the memory limit is what the compiler itself allows (it names it when a program does not fit).
"""

import dataclasses
import itertools
import math
from typing import Any

from v4jax.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip; the rates are per JAX device."""

    name: str
    flops: float
    """bfloat16 FLOP/s of the matrix units."""
    hbm_bytes_per_second: float
    hbm_limit: int
    """Bytes that a program may use."""
    ici_bytes_per_second: float
    """Bytes per second that one device can send over all its links together."""
    devices_per_chip: int
    small: tuple[tuple[int, ...], ...]
    """Slices that no rule covers, smallest first."""
    largest: tuple[int, ...]
    """The largest slice; where it has three axes, every one of 4×4×4 cubes is a slice too."""

    @property
    def is_cubic(self) -> bool:
        """Whether larger slices are made of 4×4×4 cubes."""
        return len(self.largest) == 3


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BLOCKS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 819e9, int(15.75 * GIB), 200e9, 1, _FLAT, (16, 16)),
        Chip("v5p", 459e12, 2765e9, int(95.74 * GIB), 600e9, 1, _BLOCKS, (16, 16, 24)),
        Chip("v6e", 918e12, 1640e9, int(31.25 * GIB), 400e9, 1, _FLAT, (16, 16)),
        # A device is one of two halves, which share the chip's links.
        Chip("tpu7x", 1153.5e12, 3690e9, int(94.75 * GIB), 300e9, 2, _BLOCKS, (16, 16, 36)),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the command line and the compiler spell it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices of the slice."""
        return self.chips * self.chip.devices_per_chip

    def describe(self) -> list[Any]:
        """The slice's devices, for compiling only; needs libtpu but no TPU.

        Raises:
          UserError: libtpu is missing, or too old for this slice.
        """
        from jax.experimental import topologies

        options = {"chips_per_host_bounds": [1, 1, 1]} if self.chips == 1 else {}
        try:
            return list(
                topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options).devices  # pyright: ignore
            )
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"topology {self.name}: the TPU compiler cannot describe it ({str(error).splitlines()[0]}); "
                'install it with pip install "jax[tpu]"'
            ) from None


def parse_topology(text: str) -> Topology:
    """Reads `CHIP:AxB` or `CHIP:AxBxC`.

    Raises:
      UserError: no such chip, or no slice of this shape is sold; the message lists the ones that are.
    """
    name, _, sizes = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology: got {text!r}, need CHIP:SIZE with a chip of {', '.join(CHIPS)}, as in v6e:8x8")
    chip = CHIPS[name]
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
    except ValueError:
        shape = ()
    if not is_slice(chip, shape):
        rule = ""
        if chip.is_cubic:
            bound = "x".join(map(str, chip.largest))
            rule = f", or any AxBxC of multiples of 4 in ascending order up to {bound}"
        known = ", ".join(topology.name for topology in standard_topologies(chip))
        raise UserError(f"--topology: {text!r} is not a slice that exists; need one of {known}{rule}")
    return Topology(chip, shape)


def is_slice(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether the chip is sold in slices of this shape."""
    if shape in chip.small:
        return True
    if not chip.is_cubic or len(shape) != 3:
        return False
    is_cubes = all(size >= 4 and size % 4 == 0 for size in shape) and tuple(sorted(shape)) == shape
    return is_cubes and all(size <= most for size, most in zip(shape, chip.largest, strict=True))


def standard_topologies(chip: Chip) -> tuple[Topology, ...]:
    """The usual slices, smallest first: the small ones, then cubes whose sizes are powers of two, then the largest."""
    shapes = list(chip.small)
    if chip.is_cubic:
        powers = (4, 8, 16)
        shapes += [shape for shape in itertools.combinations_with_replacement(powers, 3) if shape[2] <= 2 * shape[0]]
        shapes.append(chip.largest)
    return tuple(sorted((Topology(chip, shape) for shape in shapes), key=lambda topology: topology.chips))
