"""What a kernel is compiled and judged with: shapes, necessary work, the best known figures and the targets.

Each `<op>/cases.py` lists its `CASES`. A figure is the TPU compiler's own model, never a time: S are static-profile
cycles of the whole program, B are issued bundles × trip counts. S compares with S, B with B.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from kernels_pallas.tpu import CHIPS, Chip

Model = Literal["flash", "pro", "ugly"]
Kind = Literal["S", "B"]


@dataclasses.dataclass(frozen=True)
class Matmul:
    """Matrix-unit work that no implementation avoids."""

    flops: float
    """Two per multiply-add."""
    depth: int
    """Length of the contraction: the unit's unused part counts as work (`Case.floor_cycles`)."""
    operands: Literal["bf16", "fp8"] = "bf16"

    def cycles(self, chip: Chip) -> float:
        """At the peak of the unit, of whose depth a shallow contraction fills a part."""
        peak = chip.mxu_flops_fp8 if self.operands == "fp8" else chip.mxu_flops
        return self.flops / peak * max(1.0, chip.mxu_depth / self.depth)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A known figure of someone else's kernel."""

    cycles: float
    kind: Kind
    note: str = ""
    """What it lacks or adds, if it is not the same work."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    op: str
    """Name of the operation, as `dispatch` has it."""
    name: str
    model: Model
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    """A function and its arguments as (trees of) `ShapeDtypeStruct`, to be traced for the TPU under test."""
    hbm_bytes: int
    """Compulsory traffic: each operand read once, each result written once."""
    matmuls: tuple[Matmul, ...] = ()
    best: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    """Per chip name: the best figure known of another implementation."""
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Per chip name: the ratio to the floor to reach, in `target_kind`."""
    target_kind: Kind = "S"
    inputs: str = ""
    """Where trip counts depend on data: what they are fixed at here."""
    chips: tuple[str, ...] = tuple(CHIPS)
    """Where it is compiled."""
    static: bool = True
    """Whether S is asked for: its cost grows with the grid steps, and thousands of them exhaust the memory."""
    counts_bundles: bool = True
    """Whether B means anything: not where most bundles are issued in one of many grid steps, and counted in all."""
    region_shares: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    """Kernels with regions that run in some grid steps only: in which part of them, region by region as the code has
    them. B would count each in every step."""
    in_ci: bool = False
    """Whether CI compiles it (one case per kernel)."""

    def __post_init__(self) -> None:
        for field in (self.best, self.targets, self.chips):
            if not set(field) <= set(CHIPS):
                raise ValueError(f"case {self.op}/{self.name}: chips {sorted(field)}, known are {', '.join(CHIPS)}")

    @property
    def label(self) -> str:
        """`op/name`, unique."""
        return f"{self.op}/{self.name}"


def floor_cycles(case: Case, chip: Chip) -> float:
    """Cycles that no implementation undercuts: the larger of matrix-unit work and compulsory HBM traffic."""
    return max(sum(matmul.cycles(chip) for matmul in case.matmuls), case.hbm_bytes / chip.hbm_bytes_per_cycle)


def accepted_cycles(case: Case, chip: Chip, cycles: float) -> float:
    """A compiler figure with the bandwidth that its model ignores: at least the traffic's cycles."""
    return max(cycles, case.hbm_bytes / chip.hbm_bytes_per_cycle)


def all_cases() -> tuple[Case, ...]:
    """The cases of every operation of this package.

    Raises:
      ValueError: two of one label.
    """
    found: dict[str, Case] = {}
    for file in sorted(Path(__file__).parent.glob("*/cases.py")):
        for case in importlib.import_module(f"{__package__}.{file.parent.name}.cases").CASES:
            if case.label in found:
                raise ValueError(f"two cases named {case.label}")
            found[case.label] = case
    return tuple(found.values())


def find_cases(labels: tuple[str, ...]) -> tuple[Case, ...]:
    """Cases by label, in this order.

    Raises:
      ValueError: an unknown label.
    """
    known = {case.label: case for case in all_cases()}
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ValueError(f"case: got {', '.join(unknown)}, known are {', '.join(known)}")
    return tuple(known[label] for label in labels)
