"""The matrix products of a compiled program, each timed alone.

XLA chooses the kernels of its products by shape. Their sum is about what a program with products of these shapes takes
at best with this version of XLA on this machine, whatever becomes of masks, norms and copies; with products of other
shapes it can be less.
"""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.compilation import compiler_options
from v4jax.plan.costs import program_costs
from v4jax.plan.products import Product

_COLD_BYTES = 1 << 27
"""Operands that are read in turns, so that none is found in a cache; fewer for small products (`_MOST_COPIES`)."""
_LEAST_FLOPS = 2e9
"""Of one call, so that starting it does not count."""
_MOST_COPIES = 256
_CALLS = 5
_PRECISIONS = {
    "default": jax.lax.Precision.DEFAULT,
    "high": jax.lax.Precision.HIGH,
    "highest": jax.lax.Precision.HIGHEST,
}
_DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(jnp.bfloat16)}


def products_alone(program: jax.stages.Lowered, *, is_cold: bool) -> float:
    """Seconds that the float products of a program take, each alone, as often as it runs (`Costs.products`)."""
    text = program.compile().as_text()
    assert text is not None
    runs = program_costs(text).products
    return sum(count * product_alone(product, is_cold=is_cold) for product, count in runs.items() if _is_float(product))


def product_alone(product: Product, *, is_cold: bool) -> float:
    """Seconds of one, the best of some calls with several in each. `is_cold`: with operands that no cache holds."""
    copies = _COLD_BYTES / product.nbytes if is_cold else _LEAST_FLOPS / max(product.flops, 1.0)
    copies = min(max(math.ceil(copies), 1), _MOST_COPIES)
    lefts, rights = (
        [jnp.asarray(np.ones(shape.dims, _DTYPES[shape.dtype])) for _ in range(copies)]
        for shape in (product.left, product.right)
    )
    numbers, precision = (product.contracted, product.batch), _PRECISIONS[product.precision]

    def all_of_them(lefts: list[jax.Array], rights: list[jax.Array]) -> list[jax.Array]:
        return [
            jax.lax.dot_general(left, right, numbers, precision=precision)
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


def _is_float(product: Product) -> bool:
    return {product.left.dtype, product.right.dtype} <= set(_DTYPES)
