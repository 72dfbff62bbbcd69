"""The `dot` instructions of a compiled program: shapes, and which axes are multiplied."""

import dataclasses
import math
import re

from v4jax.plan.hlo import Computation, Instruction, Shape

Dimensions = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot` instruction, up to the layout of its operands."""

    left: Shape
    right: Shape
    contracted: tuple[Dimensions, Dimensions]
    batch: tuple[Dimensions, Dimensions]
    precision: str

    @classmethod
    def of(cls, home: Computation, one: Instruction) -> "Product":
        """The product that an instruction of a computation asks for."""
        left, right = (home.instructions[name].shapes[0] for name in one.operands[:2])
        precision = re.search(r"operand_precision=\{(\w+)", one.attributes)
        return cls(
            left, right, (_dimensions(one, "lhs_contracting"), _dimensions(one, "rhs_contracting")),
            (_dimensions(one, "lhs_batch"), _dimensions(one, "rhs_batch")), precision[1] if precision else "default",
        )  # fmt: skip

    @property
    def flops(self) -> float:
        """2 per multiplied pair."""
        shared = math.prod(self.left.dims[i] for i in (*self.contracted[0], *self.batch[0]))
        return 2.0 * self.left.elements * (self.right.elements // max(shared, 1))

    @property
    def nbytes(self) -> int:
        """Of both operands."""
        return self.left.nbytes + self.right.nbytes


def _dimensions(one: Instruction, key: str) -> Dimensions:
    found = re.search(rf"{key}_dims=\{{([\d,]*)\}}", one.attributes)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()
