"""The matrix products of a compiled program, each timed alone: nothing around them can make the program faster.

XLA chooses the kernels of its products by shape. Their sum is therefore what a program with products of these shapes
takes at best with this version of XLA on this machine, whatever becomes of masks, norms and copies.
"""

import dataclasses
import functools
import math
import re
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.compilation import compiler_options
from v4jax.plan.hlo import Computation, Instruction, Program, Shape

Dimensions = tuple[int, ...]

_COLD_BYTES = 1 << 27
"""Operands that are read in turns, so that none is found in a cache; fewer for small products (`_MOST_COPIES`)."""
_LEAST_FLOPS = 2e8
"""Of one call, so that starting it does not count."""
_MOST_COPIES = 256
_CALLS = 5


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
        """Multiplications and additions."""
        shared = math.prod(self.right.dims[i] for i in (*self.contracted[1], *self.batch[1]))
        return 2.0 * self.left.elements * self.right.elements / shared

    @property
    def nbytes(self) -> int:
        """Of both operands."""
        return self.left.nbytes + self.right.nbytes

    def seconds(self, *, is_cold: bool) -> float:
        """Time of one, the best of some calls with several in each. `is_cold`: with operands that no cache holds."""
        copies = _COLD_BYTES / self.nbytes if is_cold else _LEAST_FLOPS / max(self.flops, 1.0)
        copies = min(max(math.ceil(copies), 1), _MOST_COPIES)
        lefts, rights = (
            [jnp.asarray(np.ones(shape.dims, _NUMPY[shape.dtype])) for _ in range(copies)]
            for shape in (self.left, self.right)
        )

        def all_of_them(lefts: list[jax.Array], rights: list[jax.Array]) -> list[jax.Array]:
            return [
                jax.lax.dot_general(left, right, (self.contracted, self.batch), precision=_PRECISIONS[self.precision])
                for left, right in zip(lefts, rights, strict=True)
            ]

        run = jax.jit(all_of_them, compiler_options=compiler_options(jax.default_backend()))
        jax.block_until_ready(run(lefts, rights))
        best = math.inf
        for _ in range(_CALLS):
            start = time.perf_counter()
            jax.block_until_ready(run(lefts, rights))
            best = min(best, time.perf_counter() - start)
        return best / copies


_PRECISIONS = {
    "default": jax.lax.Precision.DEFAULT,
    "high": jax.lax.Precision.HIGH,
    "highest": jax.lax.Precision.HIGHEST,
}
_NUMPY = {"f32": np.dtype(np.float32), "bf16": np.dtype(jnp.bfloat16)}


def _dimensions(one: Instruction, key: str) -> Dimensions:
    found = re.search(rf"{key}_dims=\{{([\d,]*)\}}", one.attributes)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


Runs = dict[Product, float]
"""How often each product runs."""


def products_of(text: str) -> Runs:
    """The products of a compiled program; loops that depend on data run as often as under an even load."""
    program = Program(text)

    @functools.cache
    def of(name: str) -> Runs:
        home, total = program.computations[name], defaultdict[Product, float](float)
        for one in home:
            if one.operation == "dot":
                total[Product.of(home, one)] += 1
            for runs, times in inner(home, one):
                for product, count in runs.items():
                    total[product] += count * times
        return dict(total)

    def inner(home: Computation, one: Instruction) -> list[tuple[Runs, float]]:
        if one.operation == "while":
            return [(of(name), program.trips(home, one).count) for name in one.called("body")]
        if one.operation == "conditional":
            names = one.called("branch_computations", "true_computation", "false_computation")
            return [(max((of(name) for name in names), key=_flops), 1.0)]
        return [(of(name), 1.0) for name in one.called("calls", "to_apply")]

    return of(program.entry.name)


def _flops(runs: Runs) -> float:
    return sum(product.flops * count for product, count in runs.items())


def seconds_alone(program: jax.stages.Lowered, *, is_cold: bool) -> float:
    """What the float products of a program take, each alone, as often as it runs."""
    text = program.compile().as_text()
    assert text is not None
    runs = {product: count for product, count in products_of(text).items() if _is_float(product)}
    return sum(count * product.seconds(is_cold=is_cold) for product, count in runs.items())


def _is_float(product: Product) -> bool:
    return {product.left.dtype, product.right.dtype} <= set(_NUMPY)
